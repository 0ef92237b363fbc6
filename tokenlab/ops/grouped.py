"""Products of sorted rows with one matrix a group: what experts compute when no token is dropped.

    y[r] = x[r] @ w[g],  r in group g

`lax.ragged_dot` is this operation on TPU and GPU. XLA:CPU runs it as a dense product with every group's matrix, E times
the work, so on CPU rows are cut into blocks, each within one group, and a loop takes the block's matrix.

implementation: None picks "blocks" on CPU and "ragged" elsewhere.
  "ragged": `lax.ragged_dot`; everywhere, but dense on CPU.
  "blocks": a loop over blocks of rows; everywhere.
  "dense": every row with every matrix and a mask; the reference for tests.
  "megablox": the Pallas kernel in JAX, TPU only. "tokamax": the package of that name, where it is installed.
A named one that cannot run is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, get_abstract_mesh

from tokenlab.core.errors import ShapeError, TokenLabError, suggest
from tokenlab.sharding.target import target_platform

Implementation: TypeAlias = Literal["ragged", "blocks", "dense", "megablox", "tokamax"]
IMPLEMENTATIONS = ("ragged", "blocks", "dense", "megablox", "tokamax")

TILE = 128  # rows that megablox takes at a time; it refuses a number of rows that this does not divide


def grouped_matmul(
    x: Array, w: Array, sizes: Array, *, implementation: Implementation | None = None
) -> Array:
    """y[r] = x[r] @ w[group of row r], [M, F]; rows beyond the groups give zeros.

    Args:
      x: [M, D], rows sorted by group.
      w: [E, D, F] in x's dtype.
      sizes: [E] int32, rows of each group; their sum is at most M. Groups may be empty.
      implementation: see the module.

    Raises: ShapeError for shapes and dtypes that do not fit, or sizes that are concrete and not those of groups of M
      rows; TokenLabError for an implementation that is unknown or cannot run.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or sizes.shape != w.shape[:1]:
        raise ShapeError(
            f"grouped_matmul takes x [M, D], w [E, D, F], sizes [E]; got {x.shape}, {w.shape}, {sizes.shape}."
        )
    if x.dtype != w.dtype:
        raise ShapeError(f"grouped_matmul: x is {x.dtype} and w {w.dtype}; cast one of them.")
    _check_sizes(sizes, x.shape[0])
    chosen = check_implementation(implementation)
    sizes = sizes.astype(jnp.int32)
    if chosen == "blocks":
        return _product(x, w, sizes, chosen)
    # What stands behind the groups is zero on CPU and undefined elsewhere, in results and in gradients; and "dense"
    # would multiply what is there by 0, which makes no zero of NaN.
    there = (jnp.arange(x.shape[0]) < sizes.sum())[:, None]
    x = jnp.where(there, x, jnp.zeros((), x.dtype))
    if chosen == "dense":
        y = jnp.einsum("md,edf,me->mf", x, w, _members(sizes, x.shape[0]).astype(x.dtype))
    elif chosen == "ragged":
        y = lax.ragged_dot(x, w, sizes)
    else:
        y = _product(x, w, sizes, chosen)
    return jnp.where(there, y, jnp.zeros((), y.dtype))


def _check_sizes(sizes: Array, rows: int) -> None:
    """Raise ShapeError for sizes that are concrete and not those of groups of so many rows."""
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ShapeError(f"sizes of groups are whole numbers; got {sizes.dtype}.")
    if not isinstance(sizes, jax.core.Tracer):
        known = np.asarray(sizes)
        if (known < 0).any() or known.sum() > rows:
            raise ShapeError(
                f"sizes of groups are at least 0 and sum to at most the {rows} rows; got {known.tolist()}."
            )


def check_implementation(implementation: str | None) -> str:
    """The implementation to run. Raises TokenLabError when it is unknown or cannot run here."""
    backend = target_platform()
    if implementation is None:
        return "blocks" if backend == "cpu" else "ragged"
    if implementation not in IMPLEMENTATIONS:
        raise TokenLabError(
            f"implementation {implementation!r} is unknown.{suggest(str(implementation), IMPLEMENTATIONS)}"
        )
    if implementation == "megablox" and backend != "tpu":
        raise TokenLabError(
            f"implementation 'megablox' runs on TPU, this is {backend}; leave it out, or take 'ragged'."
        )
    if implementation == "tokamax":
        try:
            import tokamax  # noqa: F401
        except ImportError as error:
            raise TokenLabError(
                "implementation 'tokamax' needs the package tokamax, which is not installed; leave it out, or "
                "take 'ragged'."
            ) from error
    return implementation


def group_of(sizes: Array, rows: int) -> Array:
    """The group of each row, [rows] int32; E beyond the last group."""
    ends = jnp.cumsum(sizes)
    return jnp.searchsorted(ends, jnp.arange(rows), side="right", method="compare_all").astype(jnp.int32)


def _members(sizes: Array, rows: int) -> Array:
    """[rows, E] bool."""
    return group_of(sizes, rows)[:, None] == jnp.arange(sizes.shape[0])


def block_rows(rows: int, groups: int) -> int:
    """Rows of a block: a power of two near half an even group's, in 8..512.

    Every group ends in a block that is partly empty, and every block copies a matrix: small blocks waste copies, large
    ones rows.
    """
    half = max(1, rows // (2 * groups))
    return int(np.clip(1 << (half.bit_length() - 1), 8, 512))


def _layout(sizes: Array, rows: int) -> tuple[int, Array, Array, Array]:
    """Rows a block, and of each block: its group, its first row, and where its group ends."""
    groups = sizes.shape[0]
    each = block_rows(rows, groups)
    count = -(-rows // each) + groups  # each group adds at most one block that is not full
    used = -(-sizes // each)
    ends = jnp.cumsum(used)
    block = jnp.arange(count)
    group = jnp.searchsorted(ends, block, side="right", method="compare_all").astype(jnp.int32)
    inside = group < groups
    group = jnp.minimum(group, groups - 1)
    row_ends = jnp.cumsum(sizes)
    first = (row_ends - sizes)[group] + (block - (ends - used)[group]) * each
    end = row_ends[group]
    # Blocks that are not needed lie behind all rows and hold none.
    return each, group, jnp.where(inside, first, rows), jnp.where(inside, end, rows)


def _over_blocks(
    x: Array, sizes: Array, out: Array, body: Callable[[Array, Array, Array, Array], Array]
) -> Array:
    """Folds `body(out, rows of a block, its group, its first row)` over the blocks; rows of other groups are zeros."""
    each, group, first, end = _layout(sizes, x.shape[0])
    padded = jnp.pad(x, ((0, each), (0, 0)))
    skip = _may_branch()

    def step(out: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        group, first, end = block

        def compute(out: Array) -> Array:
            there = (first + jnp.arange(each) < end)[:, None]
            return body(out, jnp.where(there, lax.dynamic_slice_in_dim(padded, first, each), 0), group, first)

        return lax.cond(first < end, compute, lambda out: out, out) if skip else compute(out), None

    return lax.scan(step, out, (group, first, end))[0]


def _may_branch() -> bool:
    """Whether blocks that are not needed may be left out.

    Not inside a `jax.shard_map` that leaves the splitting over some axes to the compiler: it may put a collective into
    the branch, and devices whose rows differ would wait for each other in different blocks. There they compute zeros.
    """
    mesh = get_abstract_mesh()
    manual = [kind is AxisType.Manual for kind in mesh.axis_types]
    left = any(mesh.shape[axis] > 1 for axis, own in zip(mesh.axis_names, manual, strict=True) if not own)
    return not (any(manual) and left)


def _kernel(x: Array, w: Array, sizes: Array, implementation: str) -> Array:
    """`grouped_rows` by a kernel of another package."""
    if implementation == "megablox":
        from jax.experimental.pallas.ops.tpu.megablox import gmm

        whole = jnp.pad(x, ((0, -x.shape[0] % TILE), (0, 0)))
        return gmm(whole, w, sizes, preferred_element_type=x.dtype)[: x.shape[0]]
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # tokamax reads its flags, and would take the command line for them
    return tokamax.ragged_dot(x, w, sizes)


@functools.cache
def _counted(kind: str, rows: int, width: int, out: int, implementation: str) -> Callable[..., Array]:
    """`_rows` or `_weights` as a call that `tokenlab.cost` knows by its name and counts as M rows times a [D, F] each.

    The name holds M, D and F, since JAX may cut a call in two and give its parts other arguments.
    """
    made = {"rows": _rows, "weights": _weights}[kind]

    def call(left: Array, right: Array, sizes: Array) -> Array:
        return made(left, right, sizes, implementation)

    call.__name__ = f"grouped_{kind}_{rows}x{width}x{out}"
    return jax.jit(call, inline=False)


def grouped_rows(x: Array, w: Array, sizes: Array, implementation: str) -> Array:
    """Rows times their group's matrix, by blocks or a kernel: [M, D], [E, D, F], [E] -> [M, F]."""
    return _counted("rows", *x.shape, w.shape[2], implementation)(x, w, sizes)


def grouped_weights(x: Array, dy: Array, sizes: Array, implementation: str) -> Array:
    """Every group's x^T dy, by blocks or a kernel: [M, D], [M, F], [E] -> [E, D, F]."""
    return _counted("weights", *x.shape, dy.shape[1], implementation)(x, dy, sizes)


def _rows(x: Array, w: Array, sizes: Array, implementation: str) -> Array:
    if implementation != "blocks":
        return _kernel(x, w, sizes, implementation)

    def body(out: Array, part: Array, group: Array, first: Array) -> Array:
        y = part @ lax.dynamic_index_in_dim(w, group, keepdims=False)
        # Blocks come in order: what one writes beyond its group's end, the next overwrites.
        return lax.dynamic_update_slice_in_dim(out, y, first, axis=0)

    rows = x.shape[0]
    room = jnp.zeros((rows + block_rows(rows, w.shape[0]), w.shape[2]), x.dtype)
    return _over_blocks(x, sizes, room, body)[:rows]


def _weights(x: Array, dy: Array, sizes: Array, implementation: str) -> Array:
    width = x.shape[1]
    if implementation != "blocks":
        # The kernels have it as the gradient of their matrices, whatever those hold.
        w = jnp.zeros((sizes.shape[0], width, dy.shape[1]), x.dtype)
        return jax.vjp(lambda w: _kernel(x, w, sizes, implementation), w)[1](dy)[0]

    def body(dw: Array, part: Array, group: Array, first: Array) -> Array:
        del first
        return dw.at[group].add(part[:, :width].T @ part[:, width:])

    room = jnp.zeros((sizes.shape[0], width, dy.shape[1]), jnp.float32)  # sums over many blocks
    return _over_blocks(jnp.concatenate([x, dy], axis=1), sizes, room, body)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: Array, w: Array, sizes: Array, implementation: str) -> Array:
    return grouped_rows(x, w, sizes, implementation)


def _product_forward(
    x: Array, w: Array, sizes: Array, implementation: str
) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_rows(x, w, sizes, implementation), (x, w, sizes)


def _product_backward(
    implementation: str, saved: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array, np.ndarray]:
    # By hand: differentiating the loop would add an array as large as w for every block, and nobody knows what a
    # kernel's own gradient costs.
    x, w, sizes = saved
    dx = grouped_rows(dy, jnp.swapaxes(w, 1, 2), sizes, implementation)
    dw = grouped_weights(x, dy, sizes, implementation).astype(w.dtype)
    return dx, dw, np.zeros(sizes.shape, jax.dtypes.float0)


_product.defvjp(_product_forward, _product_backward)


def map_blocks(fn: Callable[[Any, Array], Array], params: Any, x: Array, sizes: Array) -> Array:
    """Any function of (a group's parameters, rows) on sorted rows, a block of rows at a time.

    Args:
      fn: (params without their leading axis, [R, D]) -> [R, D'], every row alone.
      params: tree of arrays [E, ...].
      x: [M, D], rows sorted by group.
      sizes: [E] int32.

    Returns: [M, D']; rows beyond the groups give zeros.
    """
    rows = x.shape[0]
    each, group, first, end = _layout(sizes, rows)
    padded = jnp.pad(x, ((0, each), (0, 0)))

    def step(_: None, block: tuple[Array, Array]) -> tuple[None, Array]:
        group, first = block
        own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, group, keepdims=False), params)
        return None, fn(own, lax.dynamic_slice_in_dim(padded, first, each))

    del end
    _, done = lax.scan(step, None, (group, first))
    used = -(-sizes // each)
    mine = group_of(sizes, rows)
    own = jnp.minimum(mine, sizes.shape[0] - 1)
    offset = jnp.arange(rows) - (jnp.cumsum(sizes) - sizes)[own]
    place = ((jnp.cumsum(used) - used)[own] * each + offset).clip(0, done.shape[0] * each - 1)
    y = done.reshape(-1, done.shape[-1])[place]
    return jnp.where((mine < sizes.shape[0])[:, None], y, jnp.zeros((), y.dtype))
