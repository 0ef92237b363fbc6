"""Random-LTD against dense training, at equal layer tokens and at equal steps: a decoder, or a ViT. Three seeds.

tokenlab compare --config=configs/compare/random_ltd.py --workdir=runs/compare_random_ltd
tokenlab compare --config=configs/compare/random_ltd.py:vit --workdir=runs/compare_random_ltd_vit
tokenlab compare --config=configs/compare/random_ltd.py:decoder,steps --workdir=runs/compare_random_ltd_steps
tokenlab compare --config=configs/compare/random_ltd.py:vit,steps --workdir=runs/compare_random_ltd_vit_steps

One report holds both: random-LTD has its steps, "dense" stops where it has computed as many layer tokens, and "dense,
equal steps" trains as many steps, which is more; the report says how much more. ",steps" asks what the clock of the
learning rate is worth at equal steps. Evaluation is dense for all.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config
from tokenlab.core.config import load
from tokenlab.core.errors import ConfigError

RUNS = Path(__file__).parents[1] / "random_ltd.py"
STEPS = {"decoder": 300, "vit": 400}
NAMES = {"decoder": "shakespeare", "vit": "vit"}


def get_config(run: str = "decoder") -> ConfigDict:
    """The comparison of a decoder or a "vit"; ",steps" behind it is the one of clocks, at equal steps."""
    name, _, kind = run.partition(",")
    if name not in STEPS or kind not in ("", "steps"):
        raise ConfigError(f"no comparison {run!r}: expected decoder or vit, with ',steps' behind it or not.")
    config = default_config()
    config.base = load(f"{RUNS}:{NAMES[name]},dense")
    config.base.steps = STEPS[name]
    dropping = load(f"{RUNS}:{NAMES[name]}")
    dense = {"name": "dense", "model.stack": config.base.model.stack}
    own = {
        "name": "random-LTD",
        "model.stack": dropping.model.stack,
        "stack_vars": {"k": dropping.stack_vars.k},
        "optimizer.schedule.clock": "layer_tokens",
    }
    kept = {**own, "name": "random-LTD, lr by steps", "optimizer.schedule.clock": "steps"}
    if kind == "steps":
        config.arms = (dense, own, kept)
        config.title = "Random-LTD at equal steps"
        config.budget.kind = "steps"
    else:
        config.arms = (own, dense, {**dense, "name": "dense, equal steps", "steps_of": own["name"]})
        config.title = "Random-LTD and dense training at equal layer tokens and at equal steps"
        config.budget.kind = "layer_tokens"
    config.baseline = config.arms[0]["name"]
    return config
