"""The tokens of an example on several devices: for rows that are too long for one.

tokenlab train --config=configs/mixture_of_depths.py:220M --workdir=runs/long --config.mesh.recipe=sequence:4
"""

from typing import Any


def get_mesh(sequence: int = 4) -> dict[str, Any]:
    """`sequence` devices share the tokens of an example; the others parameters and examples."""
    return {"data": 1, "fsdp": -1, "sequence": sequence}
