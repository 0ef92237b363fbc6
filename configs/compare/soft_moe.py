"""Soft MoE against dense at equal counted training FLOPs: digits with ten seeds, or Fashion-MNIST with three.

tokenlab compare --config=configs/compare/soft_moe.py:digits --workdir=runs/compare_soft_moe
tokenlab compare --config=configs/compare/soft_moe.py:fashion --workdir=runs/compare_soft_moe_fashion

Slots are as many as tokens, so a layer costs what the dense one does and its mixing besides. The prepared Fashion-MNIST
is looked for in TFDS_DATA_DIR. What came out is in experiments/soft_moe/README.md.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config, product
from tokenlab.core.config import load

CONFIGS = Path(__file__).parents[1]

# data: (recipe, steps of the dense run, seeds, blocks without experts, blocks with, experts, slots of each)
SETTINGS = {
    "digits": ("quickstart.py", 600, tuple(range(10)), 2, 2, 17, 1),
    "fashion": ("fashion_mnist.py", 1000, (0, 1, 2), 3, 3, 25, 2),
}


def get_config(data: str = "digits") -> ConfigDict:
    """The comparison on "digits" or "fashion"."""
    recipe, steps, seeds, before, after, experts, slots = SETTINGS[data]
    config = default_config()
    config.title = f"Soft MoE on {data} at equal training FLOPs"
    config.base = load(CONFIGS / recipe)
    config.base.steps = steps
    config.seeds = seeds
    layer = f"soft_moe(experts={experts}, slots={slots}"
    stacks = {  # the second costs as much and mixes without looking
        "soft": f"block*{before} + block(ffn={layer}))*{after}",
        "soft, uniform": f"block*{before} + block(ffn={layer}, dispatch=uniform, combine=uniform))*{after}",
    }
    if data == "fashion":
        del stacks["soft, uniform"]
    config.arms = product({"model.stack": {"dense": f"block*{before + after}", **stacks}})
    config.budget.kind = "flops"
    return config
