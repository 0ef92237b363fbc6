"""sctd: token dropping whose sentence states follow the dense ones (Zhong et al., ACL 2023, arXiv 2305.15273).

Claim: token dropping alone loses what a whole sentence means, seen on sentiment and similarity; with the loss below it
gains up to 1.56 % on average over 12 tasks, at up to 57 % less time than dense pretraining (the authors' abstract).

Steps are those of `token_dropping`, with importances that move faster (beta 0.95). At every F-th step (F = 10, update 0
included) the same weights also run dense on the same batch, with draws of their own, and

    L = m CE_dense + (1 - m) CE_sparse + lambda (KL_penultimate + KL_last)       m = 1/2, lambda = 0.05
    KL = sum_b sum_d p (log p - log q)       p = softmax(dense CLS state), q = softmax(sparse CLS state), over D

of the states of the first token that come into the last block and out of it (sections 3.2 and 3.3). CE sums over hidden
tokens and KL over sequences: a mean of either would need another lambda. At all other steps L = CE_sparse.

The released code puts CE_sparse in the place of CE_dense: `reference_compat`. It keeps padding, as its importance is
pinned high: `rank_padding`. Its drop count is int(N p), so K is N - int(N p).

In a stack: `block*5 + sctd(keep=0.5, align=a)(block*6) + block` with `config.stack_vars.a = "every 10: 1 else 0"` and
`config.task.name = "sctd"`: one compiled step for each of the two, and nothing dense is computed in the others. So F
steps cost C_dense / C_sparse of a sparse step more. Reference: WHU-ZQH/ScTD.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.layers.item import Score
from tokenlab.layers.scores.importance import Importance
from tokenlab.methods.dropping.token_dropping import TokenDropping

Reduction = Literal["sum", "mean"]

LAMBDA = 0.05
"""The published weight of each KL, which is a sum over sequences."""


class SctdPath(NamedTuple):
    """What a run over a batch gives: sparse, or dense.

    Attributes:
      nats: cross-entropy summed over hidden tokens, [], float32.
      states: of the first token, [B, D] each, at the depths that are compared.
    """

    nats: Array
    states: tuple[Array, ...]


def every(step: int, interval: int) -> bool:
    """Whether step `step` (steps done before it, >= 0) is one of every `interval`: 0, F, 2 F, ...

    Raises: TokenLabError for an interval below 1.
    """
    if interval < 1:
        raise TokenLabError(f"every: the interval is {interval}; expected 1 step or more.")
    return step % interval == 0


def semantic_consistency(
    cls_sparse: Array,
    cls_dense: Array,
    reduction: Reduction = "sum",
    stop_gradient: bool = False,
    *,
    weights: Array | None = None,
) -> Array:
    """KL(dense || sparse) between softmaxes over features: a float32 scalar, >= 0.

    Args:
      cls_sparse, cls_dense: states of the first token, [B, D].
      reduction: over examples, "sum" as published, or "mean".
      stop_gradient: whether the dense state is a constant; in the released code it is none.
      weights: [B], 0 for a row that is no example.

    Raises: ShapeError for two shapes, TokenLabError for another reduction.
    """
    if cls_sparse.shape != cls_dense.shape or cls_sparse.ndim != 2:
        raise ShapeError(
            f"semantic_consistency: states are {list(cls_sparse.shape)} and {list(cls_dense.shape)}; expected [B, D], "
            "both."
        )
    if reduction not in ("sum", "mean"):
        raise TokenLabError(f"semantic_consistency: reduction is {reduction!r}; expected 'sum' or 'mean'.")
    dense = jax.lax.stop_gradient(cls_dense) if stop_gradient else cls_dense
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (dense, cls_sparse))
    each = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    weights = jnp.ones_like(each) if weights is None else weights
    total = jnp.sum(each * weights)
    return total if reduction == "sum" else total / jnp.maximum(jnp.sum(weights), 1.0)


def sctd_loss(
    sparse: SctdPath,
    dense: SctdPath | None = None,
    *,
    align: bool,
    lam: float = LAMBDA,
    mlm_mix: float = 0.5,
    reduction: Reduction = "sum",
    stop_gradient: bool = False,
    reference_compat: bool = False,
    weights: Array | None = None,
) -> tuple[Array, tuple[Array, ...]]:
    """The loss of a step, as a sum over the batch, and the KL of each depth.

    Args:
      sparse: the run with dropped tokens.
      dense: the run without, needed at a step that aligns.
      align: whether this step does; otherwise the loss is that of the sparse run and there is no KL.
      lam: weight of each KL, >= 0.
      mlm_mix: m, share of the dense cross-entropy, in [0, 1].
      reduction: of the KL over examples; the published `lam` belongs to "sum".
      stop_gradient: as in `semantic_consistency`.
      reference_compat: take the sparse cross-entropy in the place of the dense one, as the released code does.
      weights: [B], 0 for a row that is no example.

    Returns:
      The loss, not divided by the number of tokens; a scalar a depth.

    Raises:
      TokenLabError: no dense run at a step that aligns, states of other depths, or a number out of range.
    """
    if not lam >= 0 or not 0 <= mlm_mix <= 1:
        raise TokenLabError(
            f"sctd_loss: lam is {lam} and mlm_mix {mlm_mix}; expected lam >= 0 and mlm_mix in [0, 1]."
        )
    if not align:
        return sparse.nats, ()
    if dense is None:
        raise TokenLabError("sctd_loss: a step that aligns needs the dense run, got None.")
    if len(sparse.states) != len(dense.states):
        raise TokenLabError(
            f"sctd_loss: {len(sparse.states)} sparse states and {len(dense.states)} dense ones; expected those of the "
            "same depths."
        )
    if reduction == "mean" and lam == LAMBDA:
        warnings.warn(
            f"sctd_loss: lam={lam} is published for a KL that is summed over sequences; with reduction='mean' it "
            "weighs less the larger the batch.",
            stacklevel=2,
        )
    kls = tuple(
        semantic_consistency(ours, theirs, reduction, stop_gradient, weights=weights)
        for ours, theirs in zip(sparse.states, dense.states, strict=True)
    )
    other = sparse.nats if reference_compat else dense.nats
    return mlm_mix * other + (1 - mlm_mix) * sparse.nats + lam * sum(kls), kls


@dataclass(frozen=True)
class Sctd(TokenDropping):
    """`sctd(keep=0.5, align=a)(block*6)`: `token_dropping` that tells the task `sctd` when to run dense, too.

    Attributes:
      by: as of `token_dropping`, with beta 0.95.
      align: 1 in a step that also runs dense, else 0; a name with a schedule, "every 10: 1 else 0".
    """

    by: Score = Importance(beta=0.95)
    align: int = 0

    identity: ClassVar[str | None] = "block + sctd(keep=1.0, by=norm)(block*2) + block"
    examples: ClassVar[tuple[str, ...]] = ("block + sctd(keep=0.5, by=norm)(block*2) + block",)

    def __post_init__(self) -> None:
        if self.align not in (0, 1):
            raise TokenLabError(f"sctd: align is {self.align}; expected 1 (this step also runs dense) or 0.")

    @property
    def expects(self) -> tuple[str, ...]:
        """What only the task `sctd` gives."""
        return ("kl_last",) if self.align else ()


item = Sctd
# A step that does not align, as nine of ten are. The score of the method needs ids of tokens, which pictures have not.
BENCHMARK = {"half for 6 of 12": "block*5 + sctd(keep=0.5, by=random)(block*6) + block"}
