"""Makes vit_weights_*.npz: random weights of PyTorch models by their authors' names, images, and what comes out.

    python tests/golden/make_vit_weights.py     needs torch, transformers and timm (made with 1.13, 4.48 and 1.0)

Every model is tiny and every parameter random, norms and biases too, so that one that is left out or put in the wrong
place shows. Values are rounded to float16 before the model runs, and stored so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

WIDTH, DEPTH, HEADS, PATCH, IMAGE, CLASSES = 32, 2, 2, 4, 16, 7


@dataclass(frozen=True)
class Case:
    """A model of others and what a test needs to know of it.

    Attributes:
      make: the module, and the weights that a user would have of it, by name.
      run: module, images [B, 3, S, S] -> normed tokens [B, N, D], and logits [B, C] or None.
      expected: settings of `ViTConfig` that the weights imply, beside the sizes.
    """

    make: Callable[[], tuple[torch.nn.Module, dict[str, torch.Tensor]]]
    run: Callable[[torch.nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    expected: Mapping[str, Any]


def timm_vit(**settings: Any) -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return VisionTransformer(**{**sizes, "num_classes": CLASSES, **settings})


def hugging_face(name: str, **settings: Any) -> torch.nn.Module:
    import transformers

    config_class = getattr(transformers, name).config_class
    sizes = {"image_size": IMAGE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": DEPTH}
    config = config_class(
        **sizes, num_attention_heads=HEADS, intermediate_size=4 * WIDTH, num_labels=CLASSES, **settings
    )
    return getattr(transformers, name)(config)


def randomise(module: torch.nn.Module, token_scale: float = 0.3) -> torch.nn.Module:
    """Random values in every parameter, rounded to float16; matrices keep the size of what goes through them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            drawn = torch.randn(value.shape, generator=generator)
            if "token" in name or "pos" in name:
                drawn *= token_scale
            elif value.ndim > 1:
                drawn *= value[0].numel() ** -0.5
            elif name.endswith("bias"):
                drawn *= 0.2
            else:  # norms and LayerScale
                drawn = 1 + 0.2 * drawn
            value.copy_(drawn.half().float())
    return module.eval()


def plain(**settings: Any) -> Callable[[], tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """A timm model."""

    def make() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        module = randomise(timm_vit(**settings))
        return module, module.state_dict()

    return make


def named(
    name: str, token_scale: float = 0.3, **settings: Any
) -> Callable[[], tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """A model of the transformers library."""

    def make() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        module = randomise(hugging_face(name, **settings), token_scale)
        return module, module.state_dict()

    return make


def dinov2_original(registers: int) -> Callable[[], tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """Weights by the names of DINOv2's authors, in timm's model by timm's own conversion."""

    def make() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        from timm.models.vision_transformer import checkpoint_filter_fn

        module = timm_vit(
            num_classes=0, init_values=1.0, reg_tokens=registers, no_embed_class=True, class_token=True
        )
        weights = {name: value.clone() for name, value in randomise(module).state_dict().items()}
        generator = torch.Generator().manual_seed(1)
        first = (0.3 * torch.randn((1, 1, WIDTH), generator=generator)).half().float()
        weights["pos_embed"] = torch.cat([first, weights["pos_embed"]], dim=1)
        weights["mask_token"] = torch.zeros(1, WIDTH)
        weights["register_tokens"] = weights.pop("reg_token")
        module.load_state_dict(checkpoint_filter_fn(dict(weights), module), strict=False)
        return module, weights

    return make


def run_timm(module: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokens = module.forward_features(images)
    has_head = isinstance(module.head, torch.nn.Linear)
    return tokens, module.forward_head(tokens) if has_head else None


def run_backbone(module: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, None]:
    return module(images).last_hidden_state, None


def run_classifier(module: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return module.base_model(images).last_hidden_state, module(images).logits


SCALED = {"layer_scale": 1.0}
CASES: dict[str, Case] = {
    "timm": Case(plain(), run_timm, {"registers": 0, "head": "cls"}),
    "timm_registers": Case(
        plain(reg_tokens=3, init_values=1.0, qk_norm=True, num_classes=0),
        run_timm,
        {"registers": 3, "qk_norm": True, **SCALED},
    ),
    "timm_mean": Case(
        plain(class_token=False, global_pool="avg", fc_norm=False, qkv_bias=False), run_timm, {"head": "mean"}
    ),
    # Tokens as small as the library itself draws them: there the eps of the layer norm shows.
    "hf_vit": Case(named("ViTForImageClassification", token_scale=0.02), run_classifier, {"norm_eps": 1e-12}),
    "hf_dinov2": Case(named("Dinov2Model"), run_backbone, {**SCALED, "norm_eps": 1e-6}),
    "hf_dinov2_registers": Case(
        named("Dinov2WithRegistersModel", num_register_tokens=3), run_backbone, {"registers": 3, **SCALED}
    ),
    "dinov2_registers": Case(dinov2_original(3), run_timm, {"registers": 3, **SCALED}),
}


def outputs(case: Case) -> dict[str, np.ndarray]:
    """What a golden file holds: weights/NAME, images [2, S, S, 3], tokens [2, N, D] and, with a classifier, logits."""
    module, weights = case.make()
    images = np.random.default_rng(0).normal(size=(2, IMAGE, IMAGE, 3)).astype(np.float32)
    with torch.no_grad():
        tokens, logits = case.run(module, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    found = {f"weights/{name}": value.numpy().astype(np.float16) for name, value in weights.items()}
    found |= {"images": images, "tokens": tokens.numpy(), "expected": np.array(json.dumps(case.expected))}
    return found if logits is None else {**found, "logits": logits.numpy()}


if __name__ == "__main__":
    for name, case in CASES.items():
        target = Path(__file__).with_name(f"vit_weights_{name}.npz")
        np.savez_compressed(target, **outputs(case))
        print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")
