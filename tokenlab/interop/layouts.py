"""How other libraries name the parameters of a Vision Transformer, and which of them wrote a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokenlab.core.errors import CheckpointError


@dataclass(frozen=True)
class Layout:
    """The names of one library.

    Attributes:
      name: for messages.
      parts: our part -> its name there; `{k}` stands for the number of a block. Linear layers and norms have `.weight`
        and `.bias` below it, tokens and scales nothing.
      unused: names that hold nothing a forward pass reads, and why.
      position_of_registers: whether the position table may have rows for registers (and may leave out CLS too).
      norm_eps: of its layer norms, where nothing else says.
      heads: width D -> heads H of the models that were published in it, where they are not those of a ViT.
    """

    name: str
    parts: Mapping[str, str]
    unused: Mapping[str, str] = field(default_factory=dict)
    position_of_registers: bool = False
    norm_eps: float = 1e-6
    heads: Mapping[int, int] = field(default_factory=dict)

    def part_of(self, leaf: str) -> str | None:
        """The part that a leaf belongs to; None when there is none. An unused leaf belongs to itself."""
        if leaf in self.unused:
            return leaf
        for part, name in self.parts.items():
            suffix = "" if part in BARE else r"\.(weight|bias)"
            if re.fullmatch(re.escape(name).replace(r"\{k\}", r"\d+") + suffix, leaf):
                return part
        return None


BARE = ("cls", "registers", "position", "attention_scale", "ffn_scale")
"""Parts that are one array."""

_TIMM = {
    "cls": "cls_token",
    "registers": "reg_token",
    "position": "pos_embed",
    "patch": "patch_embed.proj",
    "attention_norm": "blocks.{k}.norm1",
    "qkv": "blocks.{k}.attn.qkv",
    "query_norm": "blocks.{k}.attn.q_norm",
    "key_norm": "blocks.{k}.attn.k_norm",
    "out": "blocks.{k}.attn.proj",
    "attention_scale": "blocks.{k}.ls1.gamma",
    "ffn_norm": "blocks.{k}.norm2",
    "up": "blocks.{k}.mlp.fc1",
    "down": "blocks.{k}.mlp.fc2",
    "ffn_scale": "blocks.{k}.ls2.gamma",
    "norm": "norm",
    "classifier": "head",
}

_HUGGING_FACE = {
    "cls": "embeddings.cls_token",
    "position": "embeddings.position_embeddings",
    "patch": "embeddings.patch_embeddings.projection",
    "query": "encoder.layer.{k}.attention.attention.query",
    "key": "encoder.layer.{k}.attention.attention.key",
    "value": "encoder.layer.{k}.attention.attention.value",
    "out": "encoder.layer.{k}.attention.output.dense",
    "norm": "layernorm",
    "classifier": "classifier",
}

_MASK = "it stands for hidden patches in pre-training"
_POOLER = "no classifier reads it"

LAYOUTS = (
    Layout("timm", _TIMM, position_of_registers=True),
    Layout("DINOv2", {**_TIMM, "registers": "register_tokens"}, {"mask_token": _MASK}),
    Layout(
        "Hugging Face ViT",
        {
            **_HUGGING_FACE,
            "attention_norm": "encoder.layer.{k}.layernorm_before",
            "ffn_norm": "encoder.layer.{k}.layernorm_after",
            "up": "encoder.layer.{k}.intermediate.dense",
            "down": "encoder.layer.{k}.output.dense",
        },
        {
            "embeddings.mask_token": _MASK,
            "pooler.dense.weight": _POOLER,
            "pooler.dense.bias": _POOLER,
        },
        norm_eps=1e-12,
    ),
    Layout(
        "Hugging Face DINOv2",
        {
            **_HUGGING_FACE,
            "registers": "embeddings.register_tokens",
            "attention_norm": "encoder.layer.{k}.norm1",
            "attention_scale": "encoder.layer.{k}.layer_scale1.lambda1",
            "ffn_norm": "encoder.layer.{k}.norm2",
            "up": "encoder.layer.{k}.mlp.fc1",
            "down": "encoder.layer.{k}.mlp.fc2",
            "ffn_scale": "encoder.layer.{k}.layer_scale2.lambda1",
        },
        {"embeddings.mask_token": _MASK},
    ),
    Layout(
        "Jumbo",
        {
            **{part: name for part, name in _TIMM.items() if part != "cls"},
            "registers": "jumbo_token",
            "special_norm": "blocks.{k}.norm3",
            "special_up": "jumbo_mlp.fc1",
            "special_down": "jumbo_mlp.fc2",
        },
        {"cls_token": "the pieces stand in its place"},
        norm_eps=1e-5,
        heads={96: 3, 128: 4},
    ),
)
"""Known layouts. Of two that know as many names of a file the first is meant."""

_PREFIXES = ("vit.", "deit.", "dinov2.", "dinov2_with_registers.")
"""What Hugging Face puts before the names of a backbone that stands in a larger model."""

_REASONS = {
    r"fc_norm\.": "a norm after the mean over tokens has no place in the ViT here; "
    "import a model that pools its class token",
    r"dist_token|distillation|head_dist|cls_classifier": "a distillation token has no place in the ViT here; "
    "import the model that was trained without distillation",
    r"mlp\.(w12|w3|weights_in|weights_out)\.": "block(ffn=swiglu) has no biases, this gated feed-forward has; "
    "import a size with a plain one, such as S, B or L",
    r"attn_pool\.": "pooling by attention has no place in the ViT here; import a model that pools its class token",
    r"norm_pre\.": "a norm before the first block has no place in the ViT here; import a model without it",
}


def short(leaf: str) -> str:
    """A leaf's name without what stands before the names of a backbone."""
    for prefix in _PREFIXES:
        if leaf.startswith(prefix):
            return leaf.removeprefix(prefix)
    return leaf


def recognise(leaves: Iterable[str], source: str) -> Layout:
    """The layout that knows most of the names.

    Args:
      leaves: all names of a file.
      source: where they are from, for messages.

    Raises:
      CheckpointError: no layout knows more than half of the names; or a name the layout has no place for.
    """
    leaves = sorted(leaves)
    known = [sum(layout.part_of(short(leaf)) is not None for leaf in leaves) for layout in LAYOUTS]
    best = known.index(max(known))
    if 2 * known[best] <= len(leaves):
        names = ", ".join(layout.name for layout in LAYOUTS)
        held = ", ".join(leaves[:3]) + (" ..." if len(leaves) > 3 else "") or "nothing"
        raise CheckpointError(
            f"{source} is of no known layout: it holds {held}, expected "
            f"the names of a Vision Transformer in one of the layouts {names}."
        )
    layout = LAYOUTS[best]
    for leaf in leaves:
        if layout.part_of(short(leaf)) is None:
            reasons = [why for pattern, why in _REASONS.items() if re.search(pattern, leaf)]
            why = reasons[0] if reasons else "the ViT here has no place for it; import a plain pre-norm ViT"
            raise CheckpointError(f"{source}: unexpected {leaf} (layout {layout.name}): {why}.")
    return layout
