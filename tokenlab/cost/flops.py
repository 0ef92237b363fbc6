"""Counted cost of a JAX function: a walk over its jaxpr after dead-code elimination.

Nothing is run or compiled, and nothing is guessed: an operation whose cost is not known is an error. What XLA's own
analysis gets wrong is counted as it runs: a scan body as often as its length, a ragged matrix product by the rows of
its buffer, recomputation under `jax.checkpoint` told apart, work inside `shard_map` on all devices. The units are told
in `tokenlab.cost.operations`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval

from tokenlab.core.errors import CostError
from tokenlab.cost import operations
from tokenlab.cost.scopes import scope_of


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a function costs each time it is called, over all devices. All figures are exact integers.

    Attributes:
      flops: FLOPs of matrix products (dense, ragged, convolutions), 2 for a multiply-add: the figure papers compare.
      recomputed: the part of `flops` that `jax.checkpoint` does a second time.
      replicated: the part of `flops` (not counted in `recomputed`) that several devices of a `shard_map` do alike.
        Known where the `shard_map` checks its replication (`check_vma=True`, the default), else 0. Work replicated by
        the compiler under plain `jit` is not in the jaxpr and so not in `flops` either.
      elementwise: elements written by arithmetic, comparisons, selections, conversions and reductions.
      transcendental: elements written by exp, log, tanh, erf, sqrt, pow and the like.
      bytes: read and written by matrix products, reductions, sorts, gathers, scatters and dynamic slices.
      by_kind: `flops` by primitive, such as {"dot_general": 123}.
      by_scope: `flops` by `jax.named_scope` path, such as {"block_00/mlp": 123}; "" is outside every scope. Forward,
        backward and recomputation of a scope add up under one path.
      bytes_by_scope: `bytes`, likewise.
    """

    flops: int = 0
    recomputed: int = 0
    replicated: int = 0
    elementwise: int = 0
    transcendental: int = 0
    bytes: int = 0
    by_kind: dict[str, int] = dataclasses.field(default_factory=dict)
    by_scope: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes_by_scope: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def model_flops(self) -> int:
        """`flops` less what is recomputed or replicated: what the mathematics of the model asks for."""
        return self.flops - self.recomputed - self.replicated

    def __add__(self, other: Cost) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        merged = {}
        for field in dataclasses.fields(Cost):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            merged[field.name] = _add_dicts(ours, theirs) if isinstance(ours, dict) else ours + theirs
        return Cost(**merged)

    def __mul__(self, times: int) -> Cost:
        if not isinstance(times, int) or isinstance(times, bool) or times < 0:
            return NotImplemented
        scaled = {}
        for field in dataclasses.fields(Cost):
            value = getattr(self, field.name)
            scaled[field.name] = (
                {key: times * amount for key, amount in value.items()}
                if isinstance(value, dict)
                else times * value
            )
        return Cost(**scaled)

    __rmul__ = __mul__


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Cost:
    """Counts what `fn(*args, **kwargs)` costs, without running it.

    Args:
      fn: any traceable function, jitted or not, such as a forward pass, `jax.value_and_grad` of a loss or a train step.
      *args, **kwargs: pytrees whose leaves are arrays or `jax.ShapeDtypeStruct`s (only shapes and dtypes are read).
        Leaves without shape and dtype (Python numbers, strings, functions) are passed to `fn` as they are.

    Returns:
      The Cost. Work whose result `fn` does not return is not counted, as XLA would not execute it. Of a `lax.cond` the
      branch with the most FLOPs counts. Work inside `shard_map` is counted on all devices of its mesh axes; what
      collectives move is not.

    Raises:
      CostError: `fn` holds an operation of unknown cost (`register_cost` gives it one), or a `while` loop whose number
        of trips the program does not fix.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def call(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        merged = [next(remaining) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
        all_args, all_kwargs = jax.tree.unflatten(structure, merged)
        return fn(*all_args, **all_kwargs)

    closed = jax.make_jaxpr(call)([leaf for leaf, array in zip(leaves, is_array, strict=True) if array])
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    tally = _Tally()
    _walk(jaxpr, _Place(), tally)
    return tally.cost()


def _add_dicts(ours: dict[str, int], theirs: dict[str, int]) -> dict[str, int]:
    return {key: ours.get(key, 0) + theirs.get(key, 0) for key in ours | theirs}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the walk is: what an equation found here is multiplied by and filed under."""

    scope: tuple[str, ...] = ()
    times: int = 1
    recomputed: bool = False
    # Name and size of the mesh axes of the surrounding shard_maps.
    manual_axes: tuple[tuple[str, int], ...] = ()

    def inside(self, eqn: Any) -> _Place:
        path, recomputed = scope_of(eqn.source_info)
        return dataclasses.replace(self, scope=self.scope + path, recomputed=self.recomputed or recomputed)

    @property
    def name(self) -> str:
        return "/".join(self.scope)


class _Tally:
    """A Cost under construction."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.by_kind: Counter[str] = Counter()
        self.by_scope: Counter[str] = Counter()
        self.bytes_by_scope: Counter[str] = Counter()

    def add(self, eqn: Any, place: _Place) -> None:
        once = operations.operation_cost(eqn)
        for name, amount in once._asdict().items():
            self.totals[name] += place.times * amount
        if moved := place.times * once.bytes:
            self.bytes_by_scope[place.name] += moved
        if flops := place.times * once.flops:
            self.by_kind[eqn.primitive.name] += flops
            self.by_scope[place.name] += flops
            if place.recomputed:
                self.totals["recomputed"] += flops
            else:
                self.totals["replicated"] += flops - flops // _copies(eqn, place)

    def merge(self, other: _Tally) -> None:
        for name in ("totals", "by_kind", "by_scope", "bytes_by_scope"):
            getattr(self, name).update(getattr(other, name))

    def rank(self) -> tuple[int, ...]:
        """Orders the branches of a `cond`: FLOPs first, then the rest."""
        return tuple(self.totals[name] for name in ("flops", "elementwise", "transcendental", "bytes"))

    def cost(self) -> Cost:
        return Cost(
            **self.totals,
            by_kind=dict(self.by_kind),
            by_scope=dict(self.by_scope),
            bytes_by_scope=dict(self.bytes_by_scope),
        )


def _copies(eqn: Any, place: _Place) -> int:
    """How many devices of the surrounding `shard_map`s do this very work: those along axes on which nothing varies."""
    if not place.manual_axes:
        return 1
    varying = frozenset().union(*(atom.aval.manual_axis_type.varying for atom in eqn.invars))
    return math.prod(axis_size for axis, axis_size in place.manual_axes if axis not in varying)


def _open(jaxpr: Any) -> Any:
    """The jaxpr with the equations, from a closed or an open one."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _called(params: dict[str, Any]) -> Any:
    """The one jaxpr that a call executes; the parameter's name varies between primitives and versions of JAX."""
    return next(_open(params[key]) for key in ("jaxpr", "call_jaxpr", "call", "callee") if key in params)


def _expanded(eqn: Any) -> Any:
    """What a `jax.experimental.hijax.HiPrim` stands for; newer JAX makes jnp.searchsorted one, for example."""
    primitive = eqn.params["_prim"]

    def expand(*flat: Any) -> Any:
        return primitive.expand(*jax.tree.unflatten(primitive.in_tree, flat))

    return jax.make_jaxpr(expand)(
        *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
    ).jaxpr


def _walk(jaxpr: Any, place: _Place, tally: _Tally) -> None:
    for eqn in jaxpr.eqns:
        name, params, here = eqn.primitive.name, eqn.params, place.inside(eqn)
        if operations.is_known(name) or operations.named_call(eqn):
            tally.add(eqn, here)
        elif name in operations.CALLS:
            _walk(_called(params), here, tally)
        elif name == "call_hi_primitive":
            _walk(_expanded(eqn), here, tally)
        elif name == "scan":
            _walk(
                _open(params["jaxpr"]), dataclasses.replace(here, times=here.times * params["length"]), tally
            )
        elif name == "while":
            trips = _static_trips(eqn)
            if trips is None:
                raise CostError(
                    f"cost: a while loop{_in(here)} has no number of trips fixed by the program; use lax.scan, or "
                    "lax.fori_loop with Python integers as bounds."
                )
            _walk(_open(params["body_jaxpr"]), dataclasses.replace(here, times=here.times * trips), tally)
            _walk(
                _open(params["cond_jaxpr"]), dataclasses.replace(here, times=here.times * (trips + 1)), tally
            )
        elif name == "cond":
            branches = []
            for branch in params["branches"]:
                branches.append(_Tally())
                _walk(_open(branch), here, branches[-1])
            tally.merge(max(branches, key=_Tally.rank))
        elif name == "shard_map":
            axes = tuple((axis, params["mesh"].shape[axis]) for axis in sorted(params["newly_manual_axes"]))
            # Without the check no value is marked as varying, and nothing can be told about replication.
            known = axes if params["check_vma"] else ()
            devices = math.prod(axis_size for _, axis_size in axes)
            inside = dataclasses.replace(
                here, times=here.times * devices, manual_axes=here.manual_axes + known
            )
            _walk(_open(params["jaxpr"]), inside, tally)
        else:
            raise CostError(
                f"cost: the operation {name!r}{_in(here)}{_target(params)} has no known cost; give it one with "
                f"tokenlab.cost.register_cost({name!r}, rule), or count the program with plain JAX in its place."
            )


def _in(place: _Place) -> str:
    return f" in scope {place.name!r}" if place.scope else ""


def _target(params: dict[str, Any]) -> str:
    """What a foreign call or a kernel calls, where its parameters say so."""
    for key in ("target_name", "name"):
        if isinstance(params.get(key), str):
            return f" ({params[key]})"
    return ""


def _static_trips(eqn: Any) -> int | None:
    """The number of trips of a `while` that counts a literal integer up to a literal bound in literal steps, else None.

    `lax.fori_loop` makes such a loop when a bound is not a Python integer; with two of them it makes a scan.
    """
    num_cond_consts, num_body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = _open(eqn.params["cond_jaxpr"]), _open(eqn.params["body_jaxpr"])
    carried = eqn.invars[num_cond_consts + num_body_consts :]
    body_carried = body.invars[num_body_consts:]
    if (
        len(cond.eqns) != 1
        or cond.eqns[0].primitive.name != "lt"
        or cond.outvars[0] is not cond.eqns[0].outvars[0]
    ):
        return None
    counter, bound = cond.eqns[0].invars

    def carry_index(atom: Any) -> int | None:
        return next((i for i, var in enumerate(cond.invars[num_cond_consts:]) if var is atom), None)

    i = carry_index(counter)
    if i is None:
        return None
    steps = [e for e in body.eqns if body.outvars[i] in e.outvars and e.primitive.name == "add"]
    if len(steps) != 1 or steps[0].invars[0] is not body_carried[i]:
        return None
    start, step = _literal(carried[i]), _literal(steps[0].invars[1])
    j = carry_index(bound)
    if j is not None:  # carried unchanged, as fori_loop does
        end = _literal(carried[j]) if body.outvars[j] is body_carried[j] else None
    elif any(var is bound for var in cond.invars):
        end = _literal(eqn.invars[list(cond.invars).index(bound)])
    else:
        end = _literal(bound)
    if start is None or end is None or step is None or step <= 0:
        return None
    return max(0, math.ceil((end - start) / step))


def _literal(atom: Any) -> int | None:
    """The value of an integer literal of a jaxpr, None for anything else."""
    if not hasattr(atom, "val") or atom.aval.shape or atom.aval.dtype.kind not in "iu":
        return None
    return int(atom.val)
