"""Forecasting of hourly series: the next 96 hours of a transformer's loads and oil temperature from the last 336.

tokenlab train --config=configs/series_forecast.py --workdir=runs/etth1
tokenlab train --config=configs/series_forecast.py:jumbo --workdir=runs/etth1_jumbo
tokenlab evaluate --workdir=runs/etth1

The file, ETTh1.csv.xz, is looked for in data/timeseries (ETDataset, Zhou et al. 2021, CC BY-ND: not in this package);
another with --config.data.files="('my.csv',)". Splits of 12, 4 and 4 months. Errors are of values scaled by the
training months, as papers report them; evaluation tells beside them those of the last value and of the same hour a day
before.
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.core.errors import ConfigError, suggest
from tokenlab.data.sources import series_csv
from tokenlab.train import default_config

MONTH = 30 * 24
DEPTH = 3
VARIANTS = {
    "plain": {"head": "cls", "registers": 0, "stack": f"block*{DEPTH}"},
    "registers": {"head": "cls", "registers": 4, "stack": f"block*{DEPTH}"},
    "jumbo": {"head": "special", "registers": 4, "stack": f"block(special=jumbo)*{DEPTH}"},
}


def get_config(variant: str = "plain") -> ConfigDict:
    """The run; `variant` says which special tokens there are."""
    if variant not in VARIANTS:
        raise ConfigError(f"series_forecast has no variant {variant!r}.{suggest(variant, VARIANTS)}")
    config = default_config(model="series", task="forecast")
    config.steps = 1000
    config.batch_size = 32
    config.log_every = 100
    config.eval_every = config.checkpoint_every = 250
    config.model.update(size="micro/16", output="steps", **VARIANTS[variant])
    config.task.season = 24
    config.data = from_dataclass(
        series_csv.Config(
            name="series_csv",
            files=("data/timeseries/ETTh1.csv.xz",),
            window=336,
            horizon=96,
            rows={"train": 12 * MONTH, "validation": 4 * MONTH, "test": 4 * MONTH},
        )
    )
    config.optimizer.learning_rate = 1e-3
    return config
