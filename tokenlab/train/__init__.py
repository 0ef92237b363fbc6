"""Training: configuration, optimizer, state, step, checkpoints, records and the one loop for every model and task."""

from tokenlab.train.config import TrainConfig, default_config
from tokenlab.train.loop import run

__all__ = ["TrainConfig", "default_config", "run"]
