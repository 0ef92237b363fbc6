"""Generation: what follows a prompt, from trained weights; `run` is the command."""

from tokenlab.generate.command import run
from tokenlab.generate.generator import Generator

__all__ = ["Generator", "run"]
