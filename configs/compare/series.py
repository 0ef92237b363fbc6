"""Series: a CLS token, CLS and registers, or a Jumbo token, at equal counted training FLOPs; three seeds.

tokenlab compare --config=configs/compare/series.py --workdir=runs/compare_series
tokenlab compare --config=configs/compare/series.py:classify --workdir=runs/compare_series_classes

The files are looked for as configs/series_forecast.py and configs/series_classify.py say.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config
from tokenlab.core.config import load

CONFIGS = Path(__file__).parents[1]
ARMS = ("plain", "registers", "jumbo")
KEYS = ("head", "registers", "stack")


def get_config(task: str = "forecast") -> ConfigDict:
    """The comparison of "forecast" or "classify"."""
    recipe = CONFIGS / f"series_{task}.py"
    config = default_config()
    config.title = f"Series ({task}): special tokens at equal training FLOPs"
    config.base = load(f"{recipe}:{ARMS[0]}")
    arms = []
    for name in ARMS:
        model = load(f"{recipe}:{name}").model
        arms.append({"name": name, **{f"model.{key}": model[key] for key in KEYS}})
    config.arms = tuple(arms)
    config.baseline = ARMS[0]
    config.seeds = (0, 1, 2)
    config.budget.kind = "flops"
    return config
