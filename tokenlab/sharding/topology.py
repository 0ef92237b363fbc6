"""Devices of TPU slices that are not there, to compile programs for: `topology("v5e:4x4")`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from typing import Any

from tokenlab.core.errors import ShardingError
from tokenlab.sharding.slices import Slices

# libtpu asks the cloud's metadata server who it is, and holds a lock so that two processes do not share one TPU. There
# is no TPU here, so neither is wanted.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
_PIN = re.compile(r"^libtpu\s*==\s*([\w.*]+)")
_LOCK = "/tmp/libtpu_lockfile"


def topology(name: str) -> list[Any]:
    """The devices of one slice or several, for `tokenlab.sharding.mesh.make_mesh`; to compile programs for, not to run.

    Args:
      name: kind and shape of a slice, and how many of them: "v5e:4x4", "v5p:4x4x4", "v5e:16x16*2".

    Raises:
      ShardingError: libtpu is not installed, or does not know the slice.
    """
    check_compiler(name)
    from jax.experimental import topologies

    asked = Slices.parse(name)
    more = {"num_slices": asked.count} if asked.count > 1 else {}
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=asked.one, **more)
    except Exception as error:  # whatever libtpu raises
        reason = str(error).strip().splitlines()[0]
        if "lockfile" in reason:
            raise ShardingError(
                f"topology {name!r}: {reason}. Another process of this machine has libtpu open, or one that was killed "
                f"left {_LOCK}: end it, or remove that file, and leave ALLOW_MULTIPLE_LIBTPU_LOAD unset, as compiling "
                "opens no TPU."
            ) from error
        raise ShardingError(
            f"topology {name!r}: {reason}; expected kind and shape, such as v5e:4x4 or v5e:16x16*2."
        ) from error
    return list(found.devices)


def check_compiler(name: str) -> None:
    """Raise ShardingError where libtpu, which compiling for the slice `name` needs, is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        wanted = pinned_libtpu()
        version = f"'libtpu=={wanted}'" if wanted else "libtpu"
        raise ShardingError(
            f"compiling for {name} needs libtpu, the compiler for TPUs, which is not installed: pip install {version} "
            "(the version that this jax asks for), or tokenlab-jax[tpu]."
        )


def pinned_libtpu() -> str | None:
    """The version of libtpu that the extra `tpu` of this jax asks for, such as "0.0.42.*"; None where it names none."""
    for line in importlib.metadata.requires("jax") or ():
        if found := _PIN.match(line):
            return found[1]
    return None


def other_libtpu() -> str | None:
    """What to say of a libtpu that is not the one this jax asks for; None where it is, or there is none."""
    wanted = pinned_libtpu()
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None
    if (
        wanted is None
        or version == wanted
        or (wanted.endswith(".*") and f"{version}.".startswith(wanted[:-1]))
    ):
        return None
    return f"libtpu is {version}, and jax {importlib.metadata.version('jax')} goes with {wanted}"
