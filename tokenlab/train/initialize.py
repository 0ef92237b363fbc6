"""Starting from the parameters of another run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokenlab.core.bucket import is_address
from tokenlab.core.errors import CheckpointError, TokenLabError
from tokenlab.layers.program import Program
from tokenlab.layers.statistics import STATISTICS, join
from tokenlab.models.state import fit_state
from tokenlab.models.upcycle import upcycle
from tokenlab.sharding.rules import path_of
from tokenlab.train.checkpoint import Which, load_params
from tokenlab.train.config import InitFrom
from tokenlab.train.mirror import here
from tokenlab.train.records import read_run


def evaluation_params(path: str | Path, which: Which = "latest") -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run is evaluated with: the moving average of its parameters where it keeps one, and its statistics.

    Args:
        path: its workdir, its checkpoints folder, or the address of one of these.
        which: "latest", "best" or a step.

    Returns:
        (nested dicts of numpy arrays, meta data of the checkpoint).

    Raises:
        CheckpointError: as `load_params`.
    """
    params, meta = load_params(path, which)
    if meta["ema"]:
        params, _ = load_params(path, meta["step"], part="ema")
    statistics = None
    if meta.get("statistics"):
        statistics, _ = load_params(path, meta["step"], part=STATISTICS)
    return join(params, statistics), meta


def load(
    config: InitFrom, shapes: Any, model: Any = None, *, notes: list[str] | None = None
) -> dict[str, np.ndarray]:
    """The parameters that `config.init_from` says to load, by path ("head/kernel"); the rest is initialised.

    Args:
        config: `path` is a workdir or its checkpoints folder, here or in a bucket: its newest checkpoint is read, of it
            the moving average where one was kept. Parameters under a path of `fresh` are left to initialisation.
        shapes: parameters of the new model (anything with `shape`).
        model: the new one, for `config.upcycle`.
        notes: gets what is to be told, one line each: what is left out, statistics that only one side has.

    Raises:
        CheckpointError: no readable checkpoint; nothing to upcycle; a parameter that only one side has, or of another
            shape, and that is not under `fresh`; or a path in `fresh` that neither side has.
    """
    if config.path is None:
        return {}
    if is_address(config.path):
        with here(config.path) as folder:
            return _load(config, folder, shapes, model, notes)
    if not Path(config.path).is_dir():
        raise CheckpointError(
            f"config.init_from.path is {config.path!r}, no folder: give the workdir of another run."
        )
    return _load(config, Path(config.path), shapes, model, notes)


def _load(
    config: InitFrom, path: Path, shapes: Any, model: Any, notes: list[str] | None
) -> dict[str, np.ndarray]:
    tree, _ = evaluation_params(path)
    source, fresh = f"the checkpoint in {config.path}", config.fresh
    if config.upcycle:
        if model is None or model.program is None:
            raise CheckpointError(
                "config.init_from.upcycle: this model has no stack, so no experts; leave it out."
            )
        origin = _trained_stack(path, model)
        tree, anew = upcycle(
            tree, model.program, shapes, origin=origin, noise=config.upcycle_noise, source=source
        )
        fresh = (*fresh, *anew)
    leaves, told = fit_state(tree, shapes, fresh, source=source, left_out=False)
    if notes is not None:
        notes += told
    return leaves


def _trained_stack(path: Path, model: Any) -> Program | None:
    """The stack that a run trained, as it would be in `model`; None where no run.json tells it."""
    folder = next((at for at in (path, path.parent) if (at / "run.json").is_file()), None)
    text = None if folder is None else read_run(folder).get("stack")
    if not text:
        return None
    settings = dataclasses.replace(model.settings, stack=text)
    try:
        return dataclasses.replace(model, settings=settings, stack_vars={}).program
    except TokenLabError as error:
        raise CheckpointError(
            f"config.init_from.upcycle: {path} was trained as {text!r}, which does not fit this model: {error}"
        ) from error


def merge(params: Any, loaded: Mapping[str, np.ndarray]) -> Any:
    """`params` with the leaves of `loaded` in their places, each where the leaf it replaces lives."""

    def leaf(path: Any, old: jax.Array) -> jax.Array:
        new = loaded.get(path_of(path))
        return old if new is None else jax.device_put(np.asarray(new, old.dtype), old.sharding)

    return jax.tree_util.tree_map_with_path(leaf, params)
