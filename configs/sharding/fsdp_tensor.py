"""Heads and hidden units on different devices besides: for wide models, and where a device has too few examples.

tokenlab train --config=configs/mixture_of_depths.py:3B --workdir=runs/mod_3b --config.mesh.recipe=fsdp_tensor:4

The devices of `tensor` hold the same examples, so that their number need not divide the batch; they exchange
activations twice a layer, so they have to be near each other.
"""

from typing import Any


def get_mesh(tensor: int = 4) -> dict[str, Any]:
    """`tensor` devices share each layer, the others its parameters and the examples."""
    return {"data": 1, "fsdp": -1, "tensor": tensor}
