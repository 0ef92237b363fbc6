"""A small comparison: two arms on digits, a few steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ml_collections.config_dict import ConfigDict

from tokenlab.compare.config import default_config, product
from tokenlab.core.config import override, to_json
from tokenlab.train import experiment
from tokenlab.train.config import default_config as train_config

STACKS = {"dense": "block*2", "keep": "block + keep(0.5, by=cls) + block"}


def small(**changes: Any) -> ConfigDict:
    config = default_config()
    config.base = train_config()
    config.base.update(steps=60, batch_size=16, log_every=20, eval_every=0, checkpoint_every=0)
    config.base.model.update(size="nano/4")
    config.arms = product({"model.stack": STACKS})
    config.seeds = (0, 1)
    config.pictures = 0
    return override(config, changes)


@pytest.fixture
def config() -> ConfigDict:
    return small()


@pytest.fixture(autouse=True, scope="module")
def built_once() -> Iterator[None]:
    """Equal arms of a file share what is built, traced and compiled, as the seeds of one comparison do."""
    build = experiment.build
    made: dict[tuple[str, str], experiment.Experiment] = {}

    def built(config: Any, *, source: Any = None) -> experiment.Experiment:
        if source is None or not isinstance(config, ConfigDict):
            return build(config, source=source)
        key = (to_json(config), source.fingerprint)
        if key not in made:
            made[key] = build(config, source=source)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "build", built)
        yield
