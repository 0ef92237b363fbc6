"""Experts by modality on garments and Shakespeare at equal counted training FLOPs, three seeds: four decoder blocks.

tokenlab compare --config=configs/compare/moma.py --workdir=runs/compare_moma
tokenlab compare --config=configs/compare/moma.py:1000,digits --workdir=runs/compare_moma_digits

Rows are half codes of pictures (Fashion-MNIST in 8 x 8 grey levels) and half text, so places are exact and nothing is
left out. Arms with experts are judged by their auxiliary routers, never by what experts choose, which looks at later
tokens. Digits need no download, and are so few that 1,000 steps read them six times over.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config, product
from tokenlab.core.config import load

BASE = Path(__file__).parents[1] / "image_text_digits.py"

STACKS = {
    "dense": "block*4",
    "1t1i": "block(ffn=moma(text=1, image=1))*4",
    "2t2i": "block(ffn=moma(text=2, image=2))*4",
    "4t4i": "block(ffn=moma(text=4, image=4))*4",
    "4x": "block(ffn=moma(mixed=4))*4",
    "4t4i, mod": "(mod(keep=0.25)(block(ffn=moma(text=4, image=4, slack=1.5))) + block(ffn=moma(text=4, image=4)))*3",
}


def get_config(what: str = "1000") -> ConfigDict:
    """The comparison: steps of the dense arm, whose FLOPs every arm spends, and pictures, "1000,digits"."""
    steps, _, pictures = what.partition(",")
    config = default_config()
    config.title = "Experts by modality at equal training FLOPs"
    config.base = load(BASE)
    config.base.steps = int(steps)
    config.base.data.pictures = pictures or "fashion_mnist"
    config.base.data.size = 8
    config.arms = product({"model.stack": STACKS})
    config.budget.kind = "flops"
    config.also = {"loss_text": "min", "loss_image": "min"}
    return config
