"""Digits: experts in the last two of four blocks against the dense ViT, three seeds each, equal counted training FLOPs.

tokenlab compare --config=configs/compare/experts.py --workdir=runs/compare_experts

Soft MoE's ablations (plain means, no mixing) have as many slots as it, so they cost nearly as much.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config, product
from tokenlab.core.config import load

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"

LAYERS = {
    "soft": "soft_moe(experts=17, slots=1)",
    "soft, uniform": "soft_moe(experts=17, slots=1, dispatch=uniform, combine=uniform)",
    "soft, identity": "soft_moe(experts=17, slots=1, dispatch=identity, combine=identity)",
    "tokens choice": "tokens_choice(experts=16, capacity=1.05, batch_priority=True)",
    "experts choice": "experts_choice(experts=16)",
}


def get_config(steps: str = "1000") -> ConfigDict:
    """The comparison; every arm spends what the dense one spends in `steps` steps."""
    config = default_config()
    config.title = "Experts on digits at equal training FLOPs"
    config.base = load(QUICKSTART)
    config.base.steps = int(steps)
    stacks = {name: f"block*2 + block(ffn={layer})*2" for name, layer in LAYERS.items()}
    config.arms = product({"model.stack": {"dense": "block*4", **stacks}})
    config.budget.kind = "flops"
    return config
