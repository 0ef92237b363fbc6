"""Token dropping by importance, at random and with ScTD beside the dense encoder at equal counted FLOPs, three seeds.

tokenlab compare --config=configs/compare/sctd.py --workdir=runs/compare_sctd
tokenlab compare --config=configs/compare/sctd.py:200 --workdir=runs/compare_sctd_short

Six blocks on the sources of Python, a masked-language-model loss; all arms are evaluated dense. "cls_cosine" of arms
that drop tokens says how near the state of the first token with dropped tokens is to the one without.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config
from tokenlab.core.config import load

BASE = Path(__file__).parents[1] / "sctd.py"

STACKS = {
    "dense": "block*6",
    "importance": "block*2 + token_dropping(keep=63, by=importance(beta=0.95))(block*3) + block",
    "random": "block*2 + token_dropping(keep=63, by=random)(block*3) + block",
}


def get_config(steps: str = "1500") -> ConfigDict:
    """The comparison; every arm spends what the dense one spends in `steps` steps."""
    config = default_config()
    config.title = "Token dropping and ScTD at equal training FLOPs"
    config.base = load(BASE)
    config.base.steps = int(steps)
    aligned = config.base.model.stack
    config.base.model.stack = STACKS["dense"]
    alternating = config.base.stack_vars.a
    config.base.stack_vars = ConfigDict()
    arms = [{"name": name, "model.stack": stack} for name, stack in STACKS.items()]
    config.arms = (*arms, {"name": "sctd", "model.stack": aligned, "stack_vars.a": alternating})
    config.budget.kind = "flops"
    return config
