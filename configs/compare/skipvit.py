"""SkipViT in miniature: is it CLS's attention, is it the return, is it the warm-up? Equal steps, three seeds.

tokenlab compare --config=configs/compare/skipvit.py --workdir=runs/compare_skipvit

CIFAR-10 from TFDS_DATA_DIR, or the digits where that is not set. Arms are evaluated as they are trained; an arm whose
evaluation is dense is "skip, dense evaluation".
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config
from tokenlab.core.config import load

RUNS = Path(__file__).parents[1] / "skipvit.py"
ARMS = ("dense", "skip", "random", "no return", "warm-up")


def get_config(steps: str = "400") -> ConfigDict:
    """The comparison, with so many steps an arm."""
    config = default_config()
    config.title = "SkipViT at equal steps"
    config.base = load(f"{RUNS}:dense")
    config.base.steps = int(steps)
    arms = []
    for name in ARMS:
        own = load(f"{RUNS}:{name}")
        arms.append({"name": name, "model.stack": own.model.stack})
        if own.stack_vars:
            arms[-1]["stack_vars"] = own.stack_vars.to_dict()
    skip = load(f"{RUNS}:skip").model.stack
    arms.append(
        {"name": "skip, dense evaluation", "model.stack": skip.replace("(0.45)", "(0.45, train_only=True)")}
    )
    config.arms = tuple(arms)
    config.baseline = "dense"
    config.budget.kind = "steps"
    return config
