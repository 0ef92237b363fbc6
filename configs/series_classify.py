"""Classification of hourly series: which of two transformers are these four days of loads and oil temperature from?

tokenlab train --config=configs/series_classify.py --workdir=runs/which_transformer
tokenlab train --config=configs/series_classify.py:jumbo --workdir=runs/which_transformer_jumbo

The files, ETTh1.csv.xz and ETTh2.csv.xz, are looked for in data/timeseries (ETDataset, Zhou et al. 2021, CC BY-ND: not
in this package). Every window is scaled to mean 0 and deviation 1, so that levels do not tell; the shape of a day must.
Windows overlap within a split and never across two.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass, load
from tokenlab.data.sources import series_csv
from tokenlab.train import default_config

FORECAST = Path(__file__).parent / "series_forecast.py"
MONTH = 30 * 24


def get_config(variant: str = "plain") -> ConfigDict:
    """The run; `variant` is one of configs/series_forecast.py."""
    config = default_config(model="series")
    config.steps = 600
    config.batch_size = 64
    config.log_every = 100
    config.eval_every = config.checkpoint_every = 200
    config.model.update(load(f"{FORECAST}:{variant}").model)
    config.model.update(size="micro/8", output="classes", channels="joint")
    config.data = from_dataclass(
        series_csv.Config(
            name="series_csv",
            files=("data/timeseries/ETTh1.csv.xz", "data/timeseries/ETTh2.csv.xz"),
            window=96,
            horizon=0,
            stride=6,
            rows={"train": 12 * MONTH, "validation": 4 * MONTH, "test": 4 * MONTH},
        )
    )
    config.optimizer.learning_rate = 1e-3
    return config
