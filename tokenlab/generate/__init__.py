"""Generation: what follows a prompt, from trained weights; text, and pictures where the model knows them.

`run`, `draw` and `describe` are the command; `drawn` draws both_ways.png, and `Samples` the same during training.
"""

from tokenlab.generate.both_ways import BothWays
from tokenlab.generate.command import run
from tokenlab.generate.generator import Generator
from tokenlab.generate.grammar import Grammar
from tokenlab.generate.pictures import describe, draw, drawn
from tokenlab.generate.samples import Samples

__all__ = ["BothWays", "Generator", "Grammar", "Samples", "describe", "draw", "drawn", "run"]
