"""Parity with the PyTorch that is installed, through files as its libraries save them (`pip install .[parity]`)."""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.outside import NAMES
from tokenlab import models
from tokenlab.interop import vit_weights, workdir

pytest.importorskip("torch", reason="parity with PyTorch needs the extra 'parity': torch is missing")
pytest.importorskip("safetensors.torch", reason="safetensors has no PyTorch part for this torch")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))


@pytest.mark.parametrize("name", NAMES)
def test_as_in_the_installed_pytorch(name, tmp_path):
    library = "transformers" if name.startswith("hf_") else "timm"
    pytest.importorskip(library, reason=f"parity with PyTorch needs the extra 'parity': {library} is missing")
    import make_vit_weights
    import torch
    from safetensors.torch import save_file

    case = make_vit_weights.CASES[name]
    module, foreign = case.make()
    file = tmp_path / "model.safetensors"
    if library == "transformers":
        module.save_pretrained(tmp_path)  # with its config.json, which tells the heads
    else:
        save_file({leaf: value.contiguous() for leaf, value in foreign.items()}, file)
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        tokens, logits = case.run(module, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    weights = vit_weights.read(workdir.load(file))
    settings, _ = workdir.model_settings({}, weights, workdir.description(file, weights))
    classes = weights.classes or 7
    model = models.build(
        {"name": "vit", **settings}, spec={"image": ((16, 16, 3), "float32")}, num_outputs=classes
    )
    state = weights.state(settings["num_heads"])
    blank = {"kernel": np.zeros((32, classes), np.float32), "bias": np.zeros(classes, np.float32)}
    state["head"] = {"classifier": blank, **state["head"]}
    found = model.apply(state, {"image": jnp.asarray(images)})
    np.testing.assert_allclose(found.tokens, tokens.numpy(), atol=1e-4)
    if logits is not None:
        np.testing.assert_allclose(found.logits, logits.numpy(), atol=1e-4)
