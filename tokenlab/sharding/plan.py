"""Parallel folding: attention and layers of experts with mappings of their own onto the same devices.

    attention and dense layers   TP x CP x DP  x PP = W devices
    layers of experts            ETP x EP x EDP x PP = W devices

Ranks are dealt out tensor first, so that rank = tp + TP (cp + CP (dp + DP pp)) and
rank = etp + ETP (ep + EP (edp + EDP pp)): expert parallelism folds over the nearest devices, whatever attention does
with them. The axes of the mesh are the common refinement of both factorisations. Of the break points TP, TP CP,
TP CP DP and ETP, ETP EP, ETP EP EDP, sorted, each has to divide the next; their ratios are the sizes of the axes.

Source: Liu et al. 2025, MoE Parallel Folding (arXiv 2504.14960), section 3; ranks are in the order of Megatron Core.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tokenlab.core.errors import ShardingError, suggest
from tokenlab.sharding.axes import FAR_TO_NEAR, NAMES, Attention, Experts, attending, of_experts
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import Rules

_ATTENTION: dict[str, tuple[Attention, ...]] = {
    "tp": ("tensor",),
    "cp": ("sequence",),
    "fsdp": ("fsdp",),
    "dp": ("data", "fsdp"),
}
_EXPERTS: dict[str, tuple[Experts, ...]] = {"etp": ("tensor",), "ep": ("expert",), "edp": ("data",)}


@dataclass(frozen=True)
class ParallelPlan:
    """`ParallelPlan(tp=2, cp=2, dp=2, ep=8, etp=1)`: both mappings of 8 devices.

    Attributes:
      tp: devices that share the heads and hidden units of attention and dense layers.
      cp: devices that share the tokens of an example.
      dp: devices that share the examples.
      pp: pipeline stages; ranks are told apart by them, and a mesh needs pp = 1.
      ep: devices that share the experts.
      etp: devices that share the hidden units of every expert; None for as many as tp.
      fsdp: of the dp devices, those that share parameters too, the nearest; a divisor of dp.
      beyond: whether the experts lie on other devices of dp than those of fsdp, as without folding, and not on the
        nearest; etp is then tp, and ep x fsdp a divisor of dp.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    fsdp: int = 1
    beyond: bool = False

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        for name in ("tp", "cp", "dp", "pp", "ep", "etp", "fsdp"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ShardingError(f"plan: {name} is {size!r}; expected a number of devices >= 1.")
        if self.dp % self.fsdp:
            raise ShardingError(
                f"plan: fsdp {self.fsdp} does not divide dp {self.dp}, of which it is a part."
            )
        inside = self.tp * self.cp * self.dp
        if inside % (self.etp * self.ep):
            raise ShardingError(
                f"plan: etp {self.etp} x ep {self.ep} does not divide the {inside} devices of tp {self.tp} x cp "
                f"{self.cp} x dp {self.dp}; every stage needs whole sets of experts."
            )
        if self.beyond and (self.etp != self.tp or self.dp % (self.fsdp * self.ep)):
            raise ShardingError(
                f"plan: beyond needs etp = tp and ep x fsdp to divide dp; got etp {self.etp}, tp {self.tp}, "
                f"ep {self.ep}, fsdp {self.fsdp}, dp {self.dp}."
            )
        _ = self.sizes

    @property
    def devices(self) -> int:
        """W, over all stages."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def edp(self) -> int:
        """Devices with the same experts."""
        return self.tp * self.cp * self.dp // (self.etp * self.ep)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> devices along it, the nearest first; axes of size 1 are left out."""
        dense = [
            ("tensor", self.tp),
            ("sequence", self.cp),
            ("fsdp", self.fsdp),
            ("data", self.dp // self.fsdp),
        ]
        inner = self.cp * self.fsdp if self.beyond else 1
        experts = [("tensor", self.etp), ("data", inner), ("expert", self.ep), ("data", self.edp // inner)]
        ends, expert_ends = _ends(dense), _ends(experts)
        found, before = {}, 1
        for point in sorted({end for _, end in ends} | {end for _, end in expert_ends}):
            if point % before:
                raise ShardingError(
                    f"plan: attention parts the devices at {[end for _, end in ends]} and experts at "
                    f"{[end for _, end in expert_ends]}, and {before} does not divide {point}; take sizes that nest."
                )
            if point > before:
                mine = next(role for role, end in ends if end >= point)
                theirs = next(role for role, end in expert_ends if end >= point)
                found[NAMES[mine, theirs]] = point // before
            before = point
        return found

    @property
    def folded(self) -> bool:
        """Whether experts use the devices as no subgroup of data parallelism could: beyond dp, or with another etp."""
        plain = {"data", "fsdp", "sequence", "tensor", "expert", "fsdp_expert"}
        return not plain.issuperset(self.sizes)

    @property
    def settings(self) -> dict[str, int]:
        """What makes a run use this plan: values of `config.mesh`, those that differ from one device.

        Without folding devices are then dealt out in the order of `make_mesh`, experts to the nearest.

        Raises: ShardingError for pipeline stages, which it has no words for.
        """
        # Without `mesh.experts` the experts lie on an axis of their own.
        plain = not self.folded and (self.beyond or self.cp * self.fsdp == 1)
        if self.pp > 1:
            raise ShardingError(f"plan {self}: config.mesh cannot say it.")
        sizes = {"tensor": self.tp, "sequence": self.cp, "fsdp": self.fsdp}
        if plain or (self.ep == 1 and self.etp == self.tp):
            sizes["expert"] = self.ep
            sizes["data"] = self.dp // self.fsdp // self.ep
        else:
            sizes["data"] = self.dp // self.fsdp
            sizes["experts.expert"] = self.ep
        found = {name: size for name, size in sizes.items() if size > 1 or name == "data"}
        return found if self.etp == self.tp else {**found, "experts.tensor": self.etp}

    def axes(self, group: str) -> tuple[str, ...]:
        """The mesh axes of tp, cp, fsdp, dp, etp, ep or edp, as a PartitionSpec or a collective takes them."""
        if group in _ATTENTION:
            return attending(self.sizes, *_ATTENTION[group])
        if group in _EXPERTS:
            return of_experts(self.sizes, *_EXPERTS[group])
        raise ShardingError(f"plan: there is no group {group!r}.{suggest(group, [*_ATTENTION, *_EXPERTS])}")

    def groups(self, group: str) -> list[tuple[int, ...]]:
        """The ranks that form each group of a kind: those of `axes`, or pp."""
        far = [axis for axis in FAR_TO_NEAR if axis in self.sizes]
        ranks = np.arange(self.devices).reshape(self.pp, *(self.sizes[axis] for axis in far))
        mine = ["pp"] if group == "pp" else self.axes(group)
        names = ["pp", *far]
        inside = [names.index(axis) for axis in names if axis in mine]
        others = [place for place in range(len(names)) if place not in inside]
        size = math.prod(ranks.shape[place] for place in inside)
        return sorted(map(tuple, ranks.transpose(*others, *inside).reshape(-1, size).tolist()))

    def mesh(self, devices: Sequence[jax.Device] | None = None, *, rules: Rules | None = None) -> Mesh:
        """The mesh of these devices, by default of all; see `tokenlab.sharding.mesh.make_mesh`.

        Raises: ShardingError for pipeline stages, which a mesh has no axis for, and for another number of devices.
        """
        if self.pp != 1:
            raise ShardingError(f"plan: pp is {self.pp}; a mesh has no axis of pipeline stages, take pp=1.")
        return make_mesh({"data": 1, **self.sizes}, devices, rules=rules, order=FAR_TO_NEAR)

    def validate(
        self,
        *,
        num_experts: int | None = None,
        heads: int | None = None,
        seq: int | None = None,
        hidden: int | None = None,
        n_layers: int | None = None,
    ) -> None:
        """Raise a ShardingError for what a model has of each and the plan does not divide; None is not looked at.

        Args:
          num_experts: E.
          heads: of keys, where there are fewer of those.
          seq: tokens of an example.
          hidden: units of an expert, F.
          n_layers: blocks.
        """
        split = math.prod(self.sizes[axis] for axis in attending(self.sizes, "sequence", "tensor"))
        for what, size, by, ways in (
            ("experts", num_experts, f"ep {self.ep}", self.ep),
            ("hidden units of an expert", hidden, f"etp {self.etp}", self.etp),
            ("heads", heads, f"tp {self.tp}", self.tp),
            ("tokens of an example", seq, f"cp {self.cp} x tp {self.tp}", split),
            ("blocks", n_layers, f"pp {self.pp}", self.pp),
        ):
            if size is not None and size % ways:
                raise ShardingError(f"plan: {size} {what} cannot be split over {by}; take a divisor.")

    def __str__(self) -> str:
        dense = {"tp": self.tp, "cp": self.cp, "fsdp": self.fsdp, "dp": self.dp // self.fsdp, "pp": self.pp}
        experts = {"etp": self.etp, "ep": self.ep, "edp": self.edp}
        both = (
            " ".join(f"{name}{size}" for name, size in each.items() if size > 1) for each in (dense, experts)
        )
        return " | ".join(each or "1" for each in both) + (" beyond" if self.beyond else "")


def every_plan(devices: int, *, fsdp: bool = False, beyond: bool = False) -> Iterator[ParallelPlan]:
    """Every legal plan of so many devices without pipeline stages, each mesh once.

    Args:
      devices: W, at least 1.
      fsdp: also those in which part of dp, or all of it, shares parameters.
      beyond: also those in which the experts lie among the devices of dp, and no nearer than fsdp: those without
        folding that are not among the others.
    """
    seen: set[tuple[tuple[str, int], ...]] = set()
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for tp, cp, etp, ep in itertools.product(divisors, repeat=4):
        if devices % (tp * cp) or devices % (etp * ep):
            continue
        dp = devices // (tp * cp)
        shares = [size for size in divisors if dp % size == 0] if fsdp else [1]
        for share, far in itertools.product(shares, (False, True) if beyond else (False,)):
            if far and (etp != tp or cp * share == 1):
                continue
            try:
                plan = ParallelPlan(tp=tp, cp=cp, dp=dp, ep=ep, etp=etp, fsdp=share, beyond=far)
            except ShardingError:
                continue  # its break points do not nest
            if (key := tuple(plan.sizes.items())) not in seen:
                seen.add(key)
                yield plan


def _ends(parts: Sequence[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Each role with the product of the sizes up to its own."""
    return list(
        zip(
            [role for role, _ in parts],
            itertools.accumulate((size for _, size in parts), int.__mul__),
            strict=True,
        )
    )
