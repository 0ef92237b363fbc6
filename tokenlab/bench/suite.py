"""Suites: what is measured without a configuration. Nothing is listed here by hand but the sizes.

A stack item or a method says itself what it is measured by, in its own file:

    BENCHMARK = {"after 2": "block*2 + keep(0.5, by=cls) + block*10"}

a name for the table (the item's own name goes before it) and a stack of 12 blocks over 196 patches and CLS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from tokenlab import tasks
from tokenlab.bench.arm import Mode, Setting, batch_sharding
from tokenlab.bench.measure import Case
from tokenlab.core import names
from tokenlab.core.errors import NameLookupError, suggest
from tokenlab.sharding.mesh import make_mesh
from tokenlab.train import optimizer
from tokenlab.train.config import OptimizerConfig

PLACES = ("tokenlab.layers.items", "tokenlab.methods")
DECLARES = "BENCHMARK"
SUITES: Mapping[str, str] = {"core": "every stack item and method at the stacks that it declares"}
DENSE = Case.of("dense", "block*12")


@dataclass(frozen=True)
class Size:
    """What a suite is measured at: settings of the model, images of 224 px in 1,000 classes.

    Attributes:
      model: `config.model` without the stack.
      batch: examples a training step.
      rounds: timed rounds.
      inference_batch: examples of a forward pass alone; None for as many as in training.
    """

    model: Mapping[str, Any]
    batch: int
    rounds: int
    inference_batch: int | None = None


SIZES: Mapping[str, Size] = {
    "cpu": Size({"name": "vit", "size": "Ti/16", "dtype": "float32"}, batch=8, rounds=11, inference_batch=32),
    "accelerator": Size({"name": "vit", "size": "B/16", "dtype": "bfloat16"}, batch=128, rounds=25),
}
"""By what they fit: two CPU cores (the suite takes some minutes), or one modern accelerator chip."""

SPEC = {"image": ((224, 224, 3), "float32"), "label": ((), "int32")}
CLASSES = 1000


def cases(suite: str) -> tuple[list[Case], list[str]]:
    """What a suite measures, and the names of items and methods that declare nothing to measure.

    Raises:
      NameLookupError: no such suite.
    """
    if suite not in SUITES:
        raise NameLookupError(f"benchmark: there is no suite {suite!r}.{suggest(suite, SUITES)}")
    declared = {module.name for module in names.list_modules(PLACES, defines=DECLARES)}
    found = [
        Case.of(f"{name} {what}", stack)
        for name in sorted(declared)
        for what, stack in names.find_attr(PLACES, name, DECLARES).items()
    ]
    return found, [module.name for module in names.list_modules(PLACES) if module.name not in declared]


def size_of(name: str) -> Size:
    """The size of that name. Raises NameLookupError."""
    if name not in SIZES:
        raise NameLookupError(f"benchmark: there is no size {name!r}.{suggest(name, SIZES)}")
    return SIZES[name]


def setting(size: Size, batch: int | None = None, mode: Mode = "train") -> Setting:
    """A batch of noise on the first device, of `batch` examples or as many as the size says, and AdamW."""
    generator = np.random.default_rng(0)
    rows = batch or (size.inference_batch if mode == "inference" else None) or size.batch
    images = {
        "image": generator.standard_normal((rows, *SPEC["image"][0]), dtype=np.float32),
        "label": generator.integers(CLASSES, size=rows, dtype=np.int32),
        "mask": np.ones(rows, np.float32),
    }
    mesh = make_mesh(devices=jax.devices()[:1])
    return Setting(
        model=size.model,
        spec=SPEC,
        num_outputs=CLASSES,
        task=tasks.build({"name": "classify"}),
        optimizer=optimizer.build(OptimizerConfig(), steps=1000),
        mesh=mesh,
        batch=jax.device_put(images, batch_sharding(mesh)),
    )
