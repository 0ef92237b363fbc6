"""Parameters, gradients and moments in as many parts as there are devices, examples too: the first thing to try.

tokenlab train --config=configs/mixture_of_depths.py:220M --workdir=runs/mod --config.mesh.recipe=fsdp
tokenlab train --config=configs/mixture_of_depths.py:220M --workdir=runs/mod --config.mesh.recipe=fsdp:16

A layer's parameters are gathered when it runs. With a number that many devices share them, and further ones (those of
other slices, say) have all of it again.
"""

from typing import Any


def get_mesh(fsdp: int | None = None) -> dict[str, Any]:
    """All devices along fsdp, or `fsdp` of them and the rest along data."""
    return {"data": 1, "fsdp": -1} if fsdp is None else {"data": -1, "fsdp": fsdp}
