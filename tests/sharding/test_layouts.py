"""Where everything of the recipes lies is what golden/ holds: TOKENLAB_UPDATE_GOLDEN=1 writes it anew.

Models of published sizes on eight devices, from shapes alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest

from tokenlab import tasks
from tokenlab.core import config as configs
from tokenlab.data.outline import outline
from tokenlab.sharding import recipes
from tokenlab.train.config import TrainConfig
from tokenlab.train.layout import layout

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
UPDATE = "TOKENLAB_UPDATE_GOLDEN"
RUNS = {
    "data_parallel": "quickstart.py",
    "fsdp": "jumbo.py:base",
    "fsdp_tensor:2": "mixture_of_depths.py:3B",
    "expert:8": "soft_moe.py:S/16",
    "fsdp_expert:4": "moma.py:435M-4t4i",
    "sequence:2": "mixture_of_depths.py:220M",
    "folded:2,4": "grin.py",
}
"""Recipe -> configuration."""


def golden_of(recipe: str) -> Path:
    return GOLDEN / f"{recipe.replace(':', '_').replace(',', '_')}.txt"


@pytest.mark.parametrize("recipe", RUNS)
def test_everything_lies_where_it_lay(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))  # what is prepared here changes nothing
    given = configs.load(f"{ROOT}/configs/{RUNS[recipe]}")
    config = configs.to_dataclass(TrainConfig, configs.override(given, {"mesh.recipe": recipe}))
    facts = outline(config.data)
    outputs = tasks.build(config.task).num_outputs(facts)
    lines = layout(config, facts.spec, outputs, config.mesh.build(jax.devices()))
    found = "".join(f"{line}\n" for line in [f"{RUNS[recipe]} by {recipe}", *lines])
    golden = golden_of(recipe)
    if os.environ.get(UPDATE):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found, encoding="utf-8")
    assert found == golden.read_text(encoding="utf-8"), f"{UPDATE}=1 writes it anew"


def test_every_recipe_is_held_and_every_golden_is_of_one() -> None:
    assert {recipe.partition(":")[0] for recipe in RUNS} == set(recipes.files())
    assert sorted(GOLDEN.glob("*.txt")) == sorted(map(golden_of, RUNS))


def test_activations_are_among_them() -> None:
    lines = golden_of("sequence:2").read_text().splitlines()
    found = {line.split("  ")[3] for line in lines if line.startswith("activation")}
    assert {
        "P(fsdp, sequence)",
        "P(fsdp, -, ..., ...)",
    } <= found  # the residual; keys and values of a whole sequence
