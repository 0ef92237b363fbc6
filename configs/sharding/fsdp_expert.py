"""Experts on different devices, and parameters in parts over the others: for large models with experts.

tokenlab train --config=configs/moma.py:435M-4t4i --workdir=runs/moma_435m --config.mesh.recipe=fsdp_expert:4

Attention has the parts of `fsdp` and is whole along `expert`.
"""

from typing import Any


def get_mesh(expert: int = 8) -> dict[str, Any]:
    """`expert` devices share the experts, the others parameters; all devices share the examples."""
    return {"data": 1, "fsdp": -1, "expert": expert}
