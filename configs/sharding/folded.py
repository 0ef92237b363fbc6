"""Attention and layers of experts each use the same devices in their own way: for wide models with experts.

tokenlab train --config=configs/grin.py --workdir=runs/grin --config.mesh.recipe=folded:4,16

In attention `tensor` devices share a layer, in layers of experts `expert` devices, the nearest ones, share the experts
and every expert is whole (docs/scale.md).
"""

from typing import Any


def get_mesh(tensor: int = 2, expert: int = 8) -> dict[str, Any]:
    """`tensor` devices share attention and `expert` devices the experts; all others share parameters."""
    return {"data": 1, "fsdp": -1, "tensor": tensor, "experts": {"expert": expert, "tensor": 1}}
