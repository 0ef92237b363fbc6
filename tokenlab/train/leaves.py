"""The arrays of a checkpoint: a state as arrays with names, and states made of them again.

Names are paths, "params/embed/kernel": dict keys, fields and indices alike become parts of them, so that a part of
a state can be read without the classes (optimizer states, say) that the rest of it is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tokenlab.core.errors import CheckpointError, suggest
from tokenlab.train.manifest import one_line


def named(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the order of `jax.tree.leaves`. Raises CheckpointError when a path is ambiguous."""
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        name = "/".join(parts)
        if not parts or not all(parts) or "/" in "".join(parts) or name in found:
            raise CheckpointError(
                f"the state has a leaf at {parts}, which makes no path of its own; expected a tree whose keys are "
                "distinct, not empty and without '/'"
            )
        found[name] = leaf
    return found


def describe(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of named leaves, for `meta.json`. Raises CheckpointError when one is no jax array."""
    described = {}
    for name, leaf in state.items():
        if not isinstance(leaf, jax.Array):
            raise CheckpointError(f"{name!r} in the state is a {type(leaf).__name__}; expected a jax array")
        described[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if _is_key(leaf):
            described[name]["impl"] = str(jax.random.key_impl(leaf))
    return described


def to_save(state: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Named leaves as nested dicts of what Orbax saves: key data for keys, and nothing for empty arrays."""
    stored = {name: leaf for name, leaf in state.items() if leaf.size}  # Orbax refuses those without elements
    return _nest(
        {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in stored.items()}
    )


def restore(folder: Path, saved: Mapping[str, Mapping[str, Any]], abstract_state: Any) -> Any:
    """The state of a checkpoint that is known to be whole.

    Args:
        folder: the checkpoint.
        saved: what `describe` said of it.
        abstract_state: see `Checkpoints.restore_latest`.

    Raises:
        CheckpointError: it is of another model, or cannot be restored with these shardings.
    """
    wanted = named(abstract_state)
    _check_fit(folder, saved, wanted)
    _check_shardings(folder, wanted)
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes, args = {}, {}
    for name, leaf in wanted.items():
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        shapes[name] = shape = jax.eval_shape(jax.random.key_data, shape) if _is_key(leaf) else shape
        args[name] = ocp.ArrayRestoreArgs(
            restore_type=jax.Array,
            sharding=getattr(leaf, "sharding", None) or first_device,
            global_shape=shape.shape,
            dtype=shape.dtype,
        )
    arrays = _read(folder, shapes, args)
    for name, leaf in wanted.items():
        if _is_key(leaf):
            arrays[name] = jax.random.wrap_key_data(arrays[name], impl=saved[name]["impl"])
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in wanted])


def restore_part(folder: Path, saved: Mapping[str, Mapping[str, Any]], part: str) -> Any:
    """The part of that name at the top of a saved state, as nested dicts of numpy arrays; keys as their data."""
    leaves = {name: leaf for name, leaf in saved.items() if name.split("/")[0] == part}
    if not leaves:
        parts = {name.split("/")[0] for name in saved}
        raise CheckpointError(f"checkpoint {folder} has no {part!r}.{suggest(part, parts)}")
    shapes = {
        name: jax.ShapeDtypeStruct(
            tuple(leaf["shape"]), jnp.uint32 if "impl" in leaf else jnp.dtype(leaf["dtype"])
        )
        for name, leaf in leaves.items()
    }
    args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in leaves}
    return _nest(_read(folder, shapes, args))[part]


def _check_fit(folder: Path, saved: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]) -> None:
    found = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in saved.items()}
    expected = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in wanted.items()}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"checkpoint {folder.name} in {folder.parent} is of another model: {name!r} is "
                f"{found.get(name, 'not in it')}, expected {expected.get(name, 'no such leaf')}; give the "
                "configuration it was trained with, or another workdir"
            )


def _check_shardings(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Any sharding does but one that does not divide an array, at which Orbax would stop in the middle."""
    for name, leaf in wanted.items():
        sharding = getattr(leaf, "sharding", None)
        try:
            if sharding is not None:
                sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {folder.name} in {folder.parent} cannot be restored with this sharding: {name!r}, "
                f"{list(leaf.shape)}: {one_line(error)}; give a mesh whose axes divide it"
            ) from error


def _read(
    folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], restore_args: Mapping[str, ocp.RestoreArgs]
) -> dict[str, Any]:
    stored = [name for name, shape in shapes.items() if shape.size]
    args = ocp.args.PyTreeRestore(
        item=_nest({name: shapes[name] for name in stored}),
        restore_args=_nest({name: restore_args[name] for name in stored}),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, jax.transfer_guard("allow"):
            arrays = named(checkpointer.restore(folder, args=args)) if stored else {}
            for name in shapes.keys() - set(stored):
                empty = np.zeros(shapes[name].shape, shapes[name].dtype)
                sharding = getattr(restore_args[name], "sharding", None)
                arrays[name] = jax.device_put(empty, sharding) if sharding else empty
            return arrays
    except Exception as error:  # the files are as they were written, so an older checkpoint would not help
        raise CheckpointError(
            f"cannot restore checkpoint {folder}, whose files are whole: {one_line(error)}; check the memory and the "
            "sharding it is restored with"
        ) from error


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
