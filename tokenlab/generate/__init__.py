"""Generation: what follows a prompt, from trained weights; text, and pictures where the model knows them.

`run`, `draw` and `describe` are the command; `drawn` draws both_ways.png.
"""

from tokenlab.generate.both_ways import BothWays
from tokenlab.generate.command import run
from tokenlab.generate.generator import Generator
from tokenlab.generate.grammar import Grammar
from tokenlab.generate.pictures import describe, draw, drawn

__all__ = ["BothWays", "Generator", "Grammar", "describe", "draw", "drawn", "run"]
