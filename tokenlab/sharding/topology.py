"""Devices of a TPU slice that is not there, to compile programs for: `topology("v5e:4x4")`."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from tokenlab.core.errors import ShardingError

# libtpu asks the cloud's metadata server who it is, and holds a lock so that two processes do not share one TPU. There
# is no TPU here, so neither is wanted.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


def topology(name: str) -> list[Any]:
    """The devices of a slice, for `tokenlab.sharding.mesh.make_mesh`; programs can be compiled for them, not run.

    Args:
      name: kind and shape of the slice: "v5e:4x4", "v5p:4x4x4", "v6e:16x16".

    Raises:
      ShardingError: libtpu is not installed, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ShardingError(
            f"compiling for {name} needs libtpu, the compiler for TPUs, which is not installed: pip install libtpu"
        )
    from jax.experimental import topologies

    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # whatever libtpu raises
        reason = str(error).strip().splitlines()[0]
        raise ShardingError(
            f"topology {name!r}: {reason}; expected kind and shape, such as v5e:4x4."
        ) from error
    return list(found.devices)
