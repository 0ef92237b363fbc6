"""Other experts on other devices, all else whole on each: for layers of experts that are most of the model.

tokenlab train --config=configs/soft_moe.py:S/16 --workdir=runs/soft_moe --config.mesh.recipe=expert:8

Tokens are exchanged twice a layer of experts. What is not of experts lies whole on every device, as this says.
"""

from typing import Any


def get_mesh(expert: int = 8) -> dict[str, Any]:
    """`expert` devices share the experts; all devices share the examples."""
    return {"data": -1, "expert": expert, "unsharded": 1.0}
