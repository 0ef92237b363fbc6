"""Weights of timm, Hugging Face and DINOv2 give what PyTorch gives; and what does not fit is named."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.outside import NAMES, golden
from tokenlab import models
from tokenlab.core.errors import CheckpointError
from tokenlab.interop import vit_weights

HEADS = 2


def model_of(weights, images, outputs, **changes):
    settings = {"name": "vit", "num_heads": HEADS, **weights.conventional, **weights.settings, **changes}
    settings.setdefault("stack", f"block*{weights.depth}")
    return models.build(settings, spec={"image": (images.shape[1:], "float32")}, num_outputs=outputs)


def state_of(weights, outputs):
    """The state, its classifier at zeros where there is none."""
    state, width = weights.state(HEADS), weights.settings["width"]
    blank = {"kernel": np.zeros((width, outputs), np.float32), "bias": np.zeros(outputs, np.float32)}
    return {**state, "head": {"classifier": blank, **state["head"]}}


@pytest.mark.parametrize("name", NAMES)
def test_as_in_pytorch(name):
    given = golden(name)
    weights = vit_weights.read(given.weights, source=name)
    model = model_of(weights, given.images, 7)
    state = state_of(weights, 7)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.abstract_state())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
    found = jax.jit(model.apply)(state, {"image": jnp.asarray(given.images)})
    np.testing.assert_allclose(found.tokens, given.tokens, atol=1e-5)
    if given.logits is not None:
        np.testing.assert_allclose(found.logits, given.logits, atol=1e-5)
    implied = {**weights.settings, **weights.conventional}
    assert {key: implied[key] for key in given.expected} == given.expected
    assert weights.classes == (None if given.logits is None else 7)


def test_there_is_a_golden_file_of_each_layout():
    found = {vit_weights.read(golden(name).weights).layout.name for name in NAMES}
    assert found == {"timm", "DINOv2", "Hugging Face ViT", "Hugging Face DINOv2"}


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_matters(name):
    """Parity would also hold if a leaf that changes nothing were dropped: none may be but those told in a note."""
    given = golden(name)
    before = jax.tree.leaves(vit_weights.read(given.weights).state(HEADS))
    notes = " ".join(vit_weights.read(given.weights).notes)
    for leaf in given.weights:
        changed = {**given.weights, leaf: given.weights[leaf] + 1}
        after = jax.tree.leaves(vit_weights.read(changed).state(HEADS))
        same = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        assert same == (leaf in notes), leaf


def test_a_bare_backbone_needs_no_prefix():
    given = golden("hf_vit").weights
    bare = {name.removeprefix("vit."): value for name, value in given.items() if name.startswith("vit.")}
    bare |= {"pooler.dense.weight": np.zeros((32, 32)), "pooler.dense.bias": np.zeros(32)}
    found = vit_weights.read(bare)
    assert found.classes is None
    assert "pooler.dense.weight is left out" in " ".join(found.notes)
    np.testing.assert_array_equal(
        found.state(HEADS)["embed"]["cls"], vit_weights.read(given).state(HEADS)["embed"]["cls"]
    )


def test_another_stack_on_the_same_weights():
    given = golden("timm")
    weights = vit_weights.read(given.weights)
    model = model_of(weights, given.images, 7, stack="block + keep(0.5, by=cls) + block")
    found = jax.jit(model.apply)(state_of(weights, 7), {"image": jnp.asarray(given.images)})
    assert found.tokens.shape == (2, 9, 32)
    assert not np.allclose(found.logits, given.logits, atol=1e-3)


def test_half_precision_becomes_float32(digits):
    halves = {name: value.astype(jnp.bfloat16) for name, value in digits.items()}
    state = vit_weights.read(halves).state(HEADS)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype(np.float32)}


def test_positions_on_an_oblong_grid(digits):
    digits["pos_embed"] = digits["pos_embed"][:, :9]
    with pytest.raises(CheckpointError, match=r"pos_embed .* has 9 positions, 9 or 8 of them of patches"):
        vit_weights.read(digits, grid=(4, 4))
    assert vit_weights.read(digits, grid=(2, 4)).settings["position_grid"] == (2, 4)


def test_positions_that_could_be_two_grids(digits):
    digits["reg_token"] = np.ones((1, 4, 16), np.float32)
    digits["pos_embed"] = digits["pos_embed"][:, :9]
    with pytest.raises(CheckpointError, match="more than one grid fits; give config.model.position_grid"):
        vit_weights.read(digits)
    found = vit_weights.read(digits, grid=(2, 2)).state(HEADS)["embed"]
    np.testing.assert_array_equal(found["registers"], 1 + digits["pos_embed"][0, 1:5])
    assert found["position"].shape == (4, 16)


@pytest.mark.parametrize(
    "leaf",
    [
        "norm.bias",
        "blocks.1.attn.qkv.weight",
        "blocks.2.attn.proj.bias",
        "pos_embed",
        "patch_embed.proj.weight",
    ],
)
def test_a_missing_leaf(digits, leaf):
    del digits[leaf]
    message = rf"digits\.safetensors: {re.escape(leaf)} is missing \(layout timm\); save the whole"
    with pytest.raises(CheckpointError, match=message):
        vit_weights.read(digits, source="digits.safetensors")


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        ("dist_token", "without distillation"),
        ("fc_norm.weight", "pools its class token"),
        ("blocks.0.mlp.w12.weight", r"block\(ffn=swiglu\) has no biases"),
        ("blocks.0.mlp.w3.bias", r"block\(ffn=swiglu\) has no biases"),
        ("norm_pre.weight", "before the first block"),
        ("attn_pool.q.weight", "pooling by attention"),
        ("blocks.0.attn.rel_pos", "import a plain pre-norm ViT"),
    ],
)
def test_an_unexpected_leaf(digits, leaf, why):
    with pytest.raises(CheckpointError, match=rf"unexpected {re.escape(leaf)} \(layout timm\).*{why}"):
        vit_weights.read({**digits, leaf: np.zeros(3)})


@pytest.mark.parametrize(
    ("leaf", "shape", "said"),
    [
        ("norm.weight", (15,), r"\[15\], expected \[16\]"),
        ("blocks.1.mlp.fc2.weight", (16, 60), r"\[16, 60\], expected \[16, 32\]"),
        ("blocks.0.attn.qkv.weight", (16, 48), r"\[16, 48\], expected \[48, 16\]"),
        ("cls_token", (16,), r"\[16\], expected \[1, 1, 16\]"),
        ("patch_embed.proj.weight", (16, 4), r"\[16, 4\], expected \[any, any, any, any\]"),
    ],
)
def test_a_wrong_shape(digits, leaf, shape, said):
    digits[leaf] = np.zeros(shape)
    with pytest.raises(CheckpointError, match=rf"{re.escape(leaf)} \(layout timm\) has shape {said}"):
        vit_weights.read(digits)


def test_values_that_are_not_finite(digits):
    digits["blocks.1.norm1.bias"][3] = np.nan
    with pytest.raises(CheckpointError, match=r"blocks\.1\.norm1\.bias .* not finite"):
        vit_weights.read(digits)


def test_oblong_patches(digits):
    digits["patch_embed.proj.weight"] = np.zeros((16, 1, 2, 4))
    with pytest.raises(CheckpointError, match="patches of 2x4 pixels; expected square ones"):
        vit_weights.read(digits)


def test_an_unknown_layout():
    with pytest.raises(CheckpointError, match="no known layout: it holds a, b, expected"):
        vit_weights.read({"a": np.zeros(1), "b": np.zeros(1)})
    with pytest.raises(CheckpointError, match="it holds nothing, expected"):
        vit_weights.read({})


def test_heads_that_do_not_divide_the_width(digits):
    with pytest.raises(CheckpointError, match="width 16 cannot be split into 3 heads"):
        vit_weights.read(digits).state(3)


def test_a_classifier_on_two_vectors():
    given = golden("hf_dinov2").weights
    given |= {"classifier.weight": np.zeros((7, 64)), "classifier.bias": np.zeros(7)}
    with pytest.raises(CheckpointError, match="class token beside the mean of the patches.*--fresh-head"):
        vit_weights.read(given)
    assert vit_weights.read(given, fresh_head=True).classes is None


def test_biases_of_some_blocks_only(digits):
    del digits["blocks.1.attn.qkv.bias"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv\.bias is missing"):
        vit_weights.read(digits)
    for k in (0, 2):
        del digits[f"blocks.{k}.attn.qkv.bias"]
    found = vit_weights.read(digits)
    assert not found.state(HEADS)["blocks"]["attention"]["query"]["bias"].any()
    assert found.notes == ("blocks.*.attn.qkv has no bias: it starts at zeros",)
