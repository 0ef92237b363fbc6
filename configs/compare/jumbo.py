"""Jumbo against registers against plain at equal counted training FLOPs, narrow and wider, ten classes and a hundred.

tokenlab compare --config=configs/compare/jumbo.py --workdir=runs/compare_jumbo
tokenlab compare --config=configs/compare/jumbo.py:pairs,32 --workdir=runs/compare_jumbo_32
TFDS_DATA_DIR=... tokenlab compare --config=configs/compare/jumbo.py:cifar10,32 --workdir=runs/compare_jumbo_cifar10

"pairs" are two real digits side by side, a hundred classes, and need no download; "cifar10" is looked for in
TFDS_DATA_DIR. The number is the width. Four pieces or registers, four blocks; "no FFN" has the pieces and the head of
Jumbo and the MLP of the patches, "own" has a wide MLP in each block, "keep" drops half of the patches in training. Arms
differ in how many parameters they have, as the method does: the report says so.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config
from tokenlab.core.config import from_dataclass, load
from tokenlab.core.errors import ConfigError, suggest
from tokenlab.data.sources import digit_pairs

CONFIGS = Path(__file__).parents[1]
DEPTH, PIECES = 4, 4
WIDE = {"model.registers": PIECES, "model.head": "special"}
ARMS = {
    "plain": {"model.stack": f"block*{DEPTH}"},
    "registers": {"model.stack": f"block*{DEPTH}", "model.registers": PIECES},
    "jumbo": {"model.stack": f"block(special=jumbo)*{DEPTH}", **WIDE},
    "jumbo, no FFN": {"model.stack": f"block*{DEPTH}", **WIDE},
    "jumbo, own": {"model.stack": f"block(special=jumbo(shared=False))*{DEPTH}", **WIDE},
    "jumbo, keep": {
        "model.stack": f"keep(0.5, by=random, train_only=True) + block(special=jumbo)*{DEPTH}",
        **WIDE,
    },
}
SETTINGS = {"pairs": ("quickstart.py", 2000, 2), "cifar10": ("cifar10.py", 1500, 4)}
"""Data: recipe, steps of the plain arm, side of a patch."""


def get_config(what: str = "pairs,16") -> ConfigDict:
    """The comparison on "pairs" or "cifar10", and the width of its models."""
    data, _, width = what.partition(",")
    width = width or "16"
    if data not in SETTINGS:
        raise ConfigError(
            f"jumbo compares on {', '.join(SETTINGS)}, not on {data!r}.{suggest(data, SETTINGS)}"
        )
    if not width.isdigit() or not int(width) or int(width) % 8:
        raise ConfigError(f"jumbo: the width is {width!r}; expected a multiple of 8, such as 16 or 32.")
    recipe, steps, patch = SETTINGS[data]
    config = default_config()
    config.title = f"Jumbo on {data} at width {width} and equal training FLOPs"
    config.base = load(CONFIGS / recipe)
    if data == "pairs":
        config.base.data = from_dataclass(digit_pairs.Config(name="digit_pairs"))
    config.base.steps = steps
    config.base.model.update(
        size=f"micro/{patch}", width=int(width), mlp_dim=4 * int(width), num_heads=int(width) // 8
    )
    config.base.eval_every = config.base.log_every = 100
    config.arms = tuple({"name": name, **changes} for name, changes in ARMS.items())
    config.baseline = "plain"
    config.budget.kind = "flops"
    return config
