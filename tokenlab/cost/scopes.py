"""Where in the model an equation belongs: its `jax.named_scope` path, freed from the marks of transformations."""

from __future__ import annotations

from typing import Any

# Names that JAX itself pushes on the stack. The first marks the part of a differentiated `jax.checkpoint` that is done
# a second time.
_RECOMPUTED = "rematted_computation"
_OWN_NAMES = frozenset({_RECOMPUTED, "checkpoint"})


def scope_of(source_info: Any) -> tuple[tuple[str, ...], bool]:
    """The scope path of one equation, relative to the jaxpr that holds it.

    Args:
      source_info: `eqn.source_info` of a jaxpr equation.

    Returns:
      (path, recomputed): the names given to `jax.named_scope` from the outermost in, so that an equation of the forward
      pass and those that its differentiation, batching or recomputation made from it have one path; and whether the
      equation is recomputation under `jax.checkpoint`. A name with slashes counts as several; the subscripts that
      `jnp.einsum` leaves are taken out. A scope directly inside one of the same name (or a sequence of scopes repeated
      at once) counts once, because that is also how the backward pass of `jax.checkpoint` writes the scope around it.
    """
    path: list[str] = []
    recomputed = False
    for element in source_info.name_stack.stack:
        if type(element).__name__ != "Scope":  # the others are transformations: jvp, transpose, vmap, ...
            continue
        if element.name in _OWN_NAMES:
            recomputed |= element.name == _RECOMPUTED
        elif "->" not in element.name:  # jnp.einsum names its scope "ij,jk->ik"
            path.extend(part for part in element.name.split("/") if part)
    return _without_repeats(tuple(path)), recomputed


def _without_repeats(path: tuple[str, ...]) -> tuple[str, ...]:
    """`a/b/a/b/c` -> `a/b/c`: every sequence that follows itself immediately is kept once, longest first."""
    for length in range(len(path) // 2, 0, -1):
        for start in range(len(path) - 2 * length + 1):
            middle, end = start + length, start + 2 * length
            if path[start:middle] == path[middle:end]:
                return _without_repeats(path[:middle] + path[end:])
    return path
