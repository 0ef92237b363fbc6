"""Do saved weights fit a model? One answer for everything that loads weights: evaluation, and `config.init_from`.

Weights belong to blocks, not to the stack: `blocks/<kind>` and `items/<kind>` stack theirs along the first axis, block
or item after block or item. So the weights of `block*12` fit every stack of 12 blocks, and what a stack adds that
learns (scores, routers) is missing until it is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from tokenlab.core.errors import CheckpointError, suggest
from tokenlab.core.patterns import fits
from tokenlab.layers.statistics import STATISTICS
from tokenlab.sharding.rules import path_of

OF_PRETRAINING = ("decoder",)
"""Groups of weights that a masked autoencoder needs beside its encoder: a model without them leaves them out."""


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by path, "head/kernel"."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fit_state(
    saved: Any,
    wanted: Any,
    fresh: Iterable[str] = (),
    *,
    source: str = "the checkpoint",
    left_out: bool = True,
) -> tuple[dict[str, Any], list[str]]:
    """The saved leaves that a model can use.

    Args:
      saved: nested dicts of arrays, as a run trained them.
      wanted: nested dicts of anything with `shape`, as `model.abstract_state()` gives them.
      fresh: paths ("head", "items/keep"), or patterns of whole ones ("blocks/moma/auxiliary_*", where * stands for any
        text and nothing else is special), whose leaves are not taken from `saved`, because they start anew.
      source: where `saved` is from, for messages: "the checkpoint in runs/a".
      left_out: learned parts of items that the stack does not hold are left out, and told; False makes them an error,
        for a run that starts from `saved` and should lose nothing unasked. Such a run begins statistics anew that
        `saved` does not have.

    Returns:
      path -> leaf of `saved`, for every leaf of `wanted` that is not under `fresh`; and notes to be told, one line
      each: learned parts of items that the model's stack does not hold are left out, and so are statistics and what
      pre-training alone needed.

    Raises:
      CheckpointError: a leaf that only one side has, or of another shape; or a path in `fresh` that neither side has.
        The message names the leaf, both sides and how to mend it. With `left_out`, extra leaves under items/ are none;
        extra leaves of a group of `OF_PRETRAINING` that the model has not at all never are.
    """
    have, want, fresh = flat(saved), flat(wanted), tuple(fresh)
    for name in fresh:
        if not any(_under(path, name) for path in (*have, *want)):
            tops = {"/".join(path.split("/")[:depth]) for path in want for depth in (1, 2)}
            raise CheckpointError(
                f"config.init_from.fresh has {name!r}, which is no parameter.{suggest(name, tops)}"
            )
    have, want = (
        {path: leaf for path, leaf in side.items() if not any(_under(path, name) for name in fresh)}
        for side in (have, want)
    )
    known = f"{STATISTICS}/"
    groups = {path.partition("/")[0] for path in want}
    skipped = {group for group in OF_PRETRAINING if group not in groups and "embed" in groups}
    may_be_extra = (known, "items/") if left_out else (known,)
    extra = [path for path in have if path not in want and path.startswith(may_be_extra)]
    extra += [path for path in have if path.partition("/")[0] in skipped]
    anew = [path for path in want if not left_out and path not in have and path.startswith(known)]
    want = {path: leaf for path, leaf in want.items() if path not in anew}
    for path in (*want, *have):
        given, expected = (tuple(side[path].shape) if path in side else None for side in (have, want))
        if given != expected and path not in extra:
            raise CheckpointError(
                f"parameter {path}: {source} {_holds(given)}, the model {_needs(expected)}; "
                f"{_mend(path, given, expected, starts=not left_out)}."
            )
    used = {_kind(path) for path in want}
    of_stack = [path for path in extra if path.startswith(("items/", known))]
    kinds = sorted({path if _kind(path) in used else _kind(path) for path in of_stack})
    notes = [f"{source} holds {kind}, which the stack does not use: left out" for kind in kinds]
    notes += [f"{source} does not hold {path}: it begins anew" for path in anew]
    found = sorted({path.partition("/")[0] for path in extra} & skipped)
    notes += [f"{source} holds {group}, which pre-training alone needs: left out" for group in found]
    return {path: have[path] for path in want}, notes


def fill(wanted: Any, leaves: Mapping[str, Any]) -> Any:
    """A tree like `wanted` with the leaves of `fit_state` in their places; every path must be there."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_of(path)], wanted)


def _kind(path: str) -> str:
    """ "items/mod" of "items/mod/router"."""
    return "/".join(path.split("/")[:2])


def _under(path: str, name: str) -> bool:
    if "*" in name:
        return fits(path, name)
    return f"{path}/".startswith(f"{name.strip('/')}/")


def _holds(shape: tuple[int, ...] | None) -> str:
    return "does not have it" if shape is None else f"has it as {shape}"


def _needs(shape: tuple[int, ...] | None) -> str:
    return "does not have it" if shape is None else f"needs it as {shape}"


def _mend(path: str, given: tuple[int, ...] | None, expected: tuple[int, ...] | None, *, starts: bool) -> str:
    """How to go on; `starts`: of a run that starts from the saved weights."""
    group, _, rest = path.partition("/")
    kind = f"{group}/{rest.partition('/')[0]}" if rest else group
    # A setting of training: whoever evaluates or imports weights cannot give it.
    anew = f", or start it anew in a run with config.init_from.fresh=('{kind}',)" if starts else ""
    if group == "items" and given is None:
        other = (
            anew
            or f", or train it first, in a run from these weights with config.init_from.fresh=('{kind}',)"
        )
        return f"use a stack without what it learns there{other}"
    if group == STATISTICS and given is None:
        return "use a stack that does not ask for it, or train with it first"
    stacked = group in ("blocks", "items") and given is not None and expected is not None
    if stacked and given[1:] == expected[1:]:
        what = "blocks" if group == "blocks" else "such items"
        return f"use a stack with {given[0]} {what} of this kind, as it was trained, not {expected[0]}{anew}"
    return f"use a model that fits{anew}"
