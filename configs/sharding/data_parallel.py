"""Every device has all parameters and some examples: for models that fit one device several times over.

tokenlab train --config=configs/quickstart.py --workdir=runs/quickstart --config.mesh.recipe=data_parallel

Gradients are summed over all devices in each step; nothing else moves.
"""

from typing import Any


def get_mesh() -> dict[str, Any]:
    """All devices along data."""
    return {"data": -1}
