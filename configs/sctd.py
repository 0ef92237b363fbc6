"""ScTD, token dropping that follows the dense model at every tenth step (arXiv 2305.15273): small and as published.

tokenlab train --config=configs/sctd.py --workdir=runs/sctd
tokenlab cost  --config=configs/sctd.py:large

The miniature is that of configs/token_dropping.py. "large" has the shape of RoBERTa large and 512 tokens: 250,000
updates, a rate that falls in a straight line from 2e-4 after 25,000 steps of warm-up (the power of the published decay
is 1), batches of 16. At that scale nothing has been trained here.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import load
from tokenlab.core.errors import ConfigError
from tokenlab.train import default_config

HERE = Path(__file__).parent


def get_config(size: str = "miniature") -> ConfigDict:
    """The run: "miniature" or "large"."""
    if size not in ("miniature", "large"):
        raise ConfigError(f"sctd has no size {size!r}: expected 'miniature' or 'large'.")
    small = size == "miniature"
    config = load(f"{HERE / 'token_dropping.py'}:{'importance' if small else 'large'}")
    before, inside, keep = (2, 3, 63) if small else (11, 12, 255)
    config.model.stack = f"block*{before} + sctd(keep={keep}, align=a)(block*{inside}) + block"
    config.stack_vars = ConfigDict({"a": "every 10: 1 else 0"})
    config.task = default_config(model="encoder_lm", task="sctd", data="python_text").task
    if small:
        return config
    config.steps = 250_000
    config.batch_size = 16
    config.model.activation = "gelu"
    config.model.norm_eps = 1e-5
    config.model.types = 0
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule.warmup_steps = 25_000
    config.optimizer.options = {"eps": 1e-6}
    config.optimizer.clip = None
    return config
