"""A tiny trained run, made once for all tests of this folder; other runs on the same weights are copies of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import override
from tokenlab.train import default_config, run

STACK = "block + keep(0.5, by=learned, train_only=True) + block"


def config(**changes: Any) -> ConfigDict:
    """Six steps of a ViT of two blocks on 16 patches of the digits, half of which it sees in training."""
    found = default_config()
    found.update(steps=6, batch_size=16, log_every=2, eval_every=3, checkpoint_every=3)
    found.model.update(size="nano/2", execution="unroll")
    found.eval.batch_size = 128
    found.optimizer.update(learning_rate=0.01, ema=0.5)
    return override(found, {"model.stack": STACK, **changes})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(workdir, what the run said of itself); not to be changed."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, run(config(), workdir)


def copy(workdir: Path, target: Path, **changes: Any) -> Path:
    """A run with other settings and the same checkpoints: dotted key -> value, written into its config.json."""
    shutil.copytree(workdir, target)
    saved = json.loads((target / "config.json").read_text())
    for key, value in changes.items():
        group = saved
        *parents, name = key.split(".")
        for parent in parents:
            group = group[parent]
        group[name] = value
    (target / "config.json").write_text(json.dumps(saved))
    return target
