"""The cost table of a model: one row a layer, in the order of execution, made from counted scopes.

The numbers come from `tokenlab.cost.count` of the unrolled model, whose layers set `jax.named_scope`s; this module
only sorts them into rows and columns, and fails if one FLOP is lost on the way.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from tokenlab.core.errors import CostError
from tokenlab.cost.flops import Cost

OTHER = "other"
KINDS = ("attention/projections", "attention/maps", "attention/readings", "mlp", "router")


_WIDE = Console(width=1000, file=io.StringIO())  # only measures


@dataclasses.dataclass(frozen=True)
class RowInfo:
    """What a row says beside its counted cost.

    Attributes:
      name: the `jax.named_scope` of the row, such as "embed", "block_00", "keep_00" or "head".
      tokens: tokens of one example that this part of the model works on.
      parameters: number of parameters that belong to it.
    """

    name: str
    tokens: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class CostRow:
    """One row: its RowInfo and its counted costs (FLOPs; bytes are 0 where none were given)."""

    name: str
    tokens: int | None
    parameters: int
    forward_by_kind: dict[str, int]
    train_flops: int
    forward_bytes: int = 0
    train_bytes: int = 0

    @property
    def forward_flops(self) -> int:
        return sum(self.forward_by_kind.values())

    @property
    def group(self) -> str:
        """The name without its number: "block" for "block_07"."""
        return re.sub(r"_\d+$", "", self.name)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A group of rows compared with the same group of the dense table; None where that has no such cost."""

    group: str
    forward: float | None
    train: float | None


@dataclasses.dataclass(frozen=True)
class CostTable:
    """Rows (the last one is "other" if that costs anything), and the kinds of operation their forward FLOPs have."""

    rows: tuple[CostRow, ...]
    kinds: tuple[str, ...]

    @classmethod
    def build(
        cls,
        scopes_forward: Mapping[str, int],
        scopes_train: Mapping[str, int],
        *,
        rows: Sequence[RowInfo],
        bytes_forward: Mapping[str, int] | None = None,
        bytes_train: Mapping[str, int] | None = None,
        kinds: Sequence[str] = KINDS,
        total_forward: int | None = None,
        total_train: int | None = None,
    ) -> CostTable:
        """Sorts counted scopes into rows and kinds.

        A scope path belongs to the row that its last component with a row's name names, and to "other" if there is
        none: "skip_00/block_05/mlp" costs block_05, whose tokens it works on, and scopes around the whole model do no
        harm. A row may have the name of a path, "decoder/block_00", which goes before that of its end. Below the row it
        is of the longest of `kinds` whose components it contains in their order (so scopes in between, such as the
        names of Linen modules, do no harm), and of kind "other" if there is none.

        Args:
          scopes_forward, scopes_train: FLOPs by scope path: `Cost.by_scope` of the forward pass and of the train step.
          rows: the parts of the model in the order of execution. Their names are unique, and none is "other".
          bytes_forward, bytes_train: `Cost.bytes_by_scope` of the same, or None for no such columns.
          kinds: scope paths below a row, such as "attention/maps"; add the names of other feed-forward layers to KINDS.
          total_forward, total_train: `Cost.flops` of the same, which the rows must add up to; None: the sum of the
            scopes.

        Raises:
          CostError: rows with the same name or a reserved one, an amount that is not a whole number of at least 0, or
            rows that do not add up to the totals.
        """
        names = [row.name for row in rows]
        for name in names:
            if names.count(name) > 1 or name in (OTHER, "total", ""):
                raise CostError(
                    f"cost table: row name {name!r} is given twice or reserved; give every part of the model its own "
                    'name, such as "block_00", and none "other" or "total".'
                )
        split = {name: dict.fromkeys((*kinds, OTHER), 0) for name in (*names, OTHER)}
        for path, flops in _checked(scopes_forward):
            row, below = _row_of(path, names)
            split[row][_kind_of(below, kinds)] += flops
        train = _by_row(scopes_train, names)
        moved_forward, moved_train = _by_row(bytes_forward or {}, names), _by_row(bytes_train or {}, names)
        infos = [(row.name, row.tokens, row.parameters) for row in rows] + [(OTHER, None, 0)]
        made = tuple(
            CostRow(
                name, tokens, parameters, split[name], train[name], moved_forward[name], moved_train[name]
            )
            for name, tokens, parameters in infos
            if name != OTHER
            or any((*split[OTHER].values(), train[OTHER], moved_forward[OTHER], moved_train[OTHER]))
        )
        table = cls(made, (*kinds, OTHER))
        wanted_forward = sum(scopes_forward.values()) if total_forward is None else total_forward
        wanted_train = sum(scopes_train.values()) if total_train is None else total_train
        for what, got, wanted in (
            ("forward", table.total.forward_flops, wanted_forward),
            ("training", table.total.train_flops, wanted_train),
        ):
            if got != wanted:
                raise CostError(
                    f"cost table: the rows add up to {got} {what} FLOPs, the program has {wanted}; "
                    "give the scopes and the total of one and the same Cost."
                )
        return table

    @classmethod
    def from_costs(
        cls, forward: Cost, train: Cost, *, rows: Sequence[RowInfo], kinds: Sequence[str] = KINDS
    ) -> CostTable:
        """`build` from the Costs of the forward pass and of the train step, with bytes, and their totals checked."""
        return cls.build(
            forward.by_scope,
            train.by_scope,
            rows=rows,
            bytes_forward=forward.bytes_by_scope,
            bytes_train=train.bytes_by_scope,
            kinds=kinds,
            total_forward=forward.flops,
            total_train=train.flops,
        )

    @property
    def total(self) -> CostRow:
        """The sum of all rows, named "total"."""
        return _sum("total", self.rows, self.kinds)

    def group(self, name: str) -> CostRow | None:
        """The sum of the rows of a group, such as "block"; None if there is none."""
        members = [row for row in self.rows if row.group == name]
        return _sum(name, members, self.kinds) if members else None

    def ratios(self, dense: CostTable) -> list[Ratio]:
        """This table's cost over the dense one's: each group of rows in the order of first appearance, then "total"."""
        found = []
        for name in dict.fromkeys(row.group for row in (*self.rows, *dense.rows)):
            ours, theirs = self.group(name), dense.group(name)
            found.append(Ratio(name, *_ratio(ours, theirs)))
        return [*found, Ratio("total", *_ratio(self.total, dense.total))]

    def to_json(self, dense: CostTable | None = None) -> dict[str, Any]:
        """A plain dict of rows and total (FLOPs and bytes as integers), with ratios by group where `dense` is given."""
        result: dict[str, Any] = {
            "rows": [_row_to_json(row) for row in self.rows],
            "total": _row_to_json(self.total),
        }
        if dense is not None:
            result["dense_total"] = _row_to_json(dense.total)
            result["of_dense"] = {
                r.group: {"forward": r.forward, "train": r.train} for r in self.ratios(dense)
            }
        return result

    def to_rich(
        self, dense: CostTable | None = None, *, title: str | None = None, width: int | None = None
    ) -> Table:
        """The table for a terminal; with `dense`, each row, group and total also as a fraction of the dense one's.

        Kinds of operation and bytes are left out where the whole table does not fit into `width` columns; None is wide
        enough for all.
        """
        table = self._rich(dense, title, detail=True)
        needed = Measurement.get(_WIDE, _WIDE.options, table).maximum
        return table if width is None or needed <= width else self._rich(dense, title, detail=False)

    def _rich(self, dense: CostTable | None, title: str | None, detail: bool) -> Table:
        header, lines = self._cells(dense, detail)
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for index, name in enumerate(header):
            last = name.split(" / ") if " / " in name else name.rsplit("/", 1)[-1].split()
            stacked = "\n".join(last)  # narrow columns: the words of a header one above the other
            table.add_column(stacked, justify="left" if index == 0 else "right", no_wrap=True)
        for line in lines:
            if line is None:
                table.add_section()
            else:
                table.add_row(*line)
        return table

    def to_markdown(self, dense: CostTable | None = None) -> str:
        """The same table in Markdown."""
        header, lines = self._cells(dense)
        rule = ["---"] + ["---:"] * (len(header) - 1)
        return (
            "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *filter(None, lines))) + "\n"
        )

    def _cells(
        self, dense: CostTable | None, detail: bool = True
    ) -> tuple[list[str], list[list[str] | None]]:
        """Header and lines of text; None is a rule between sections. Columns that are zero throughout are left out."""
        kinds = [
            kind for kind in self.kinds if detail and any(row.forward_by_kind[kind] for row in self.rows)
        ]
        with_bytes = detail and any(row.forward_bytes or row.train_bytes for row in self.rows)
        header = ["layer", "tokens", "params", *kinds, "forward FLOPs", "training FLOPs"]
        header += ["forward bytes", "training bytes"] * with_bytes
        header += ["forward / dense", "training / dense"] * (dense is not None)

        def cells(row: CostRow, base: CostRow | None) -> list[str]:
            line = [row.name, "" if row.tokens is None else str(row.tokens), pretty(row.parameters)]
            line += [pretty(row.forward_by_kind[kind]) for kind in kinds]
            line += [pretty(row.forward_flops), pretty(row.train_flops)]
            if with_bytes:
                line += [pretty(row.forward_bytes, "B"), pretty(row.train_bytes, "B")]
            if dense is not None:
                line += ["-" if ratio is None else f"{ratio:.3f}" for ratio in _ratio(row, base)]
            return line

        dense_rows = {row.name: row for row in dense.rows} if dense is not None else {}
        lines: list[list[str] | None] = [cells(row, dense_rows.get(row.name)) for row in self.rows]
        if dense is not None:
            groups = dict.fromkeys(row.group for row in self.rows if row.group != row.name)
            if groups:
                lines.append(None)
            for name in groups:
                total = self.group(name)
                lines.append(cells(dataclasses.replace(total, name=f"all {name}"), dense.group(name)))
        lines.append(None)
        lines.append(cells(self.total, dense.total if dense is not None else None))
        return header, lines


def pretty(amount: float, unit: str = "", digits: int = 3) -> str:
    """A number in so many digits with a decimal prefix: 9198354432 -> "9.2 G", or in 4 digits of "B" "9.198 GB"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(amount) >= factor * (1 - 0.5 * 10.0**-digits):  # 999,999 in three digits is 1 M, not 1e+03 k
            return f"{amount / factor:.{digits}g} {prefix}{unit}"
    return f"{amount:.{digits}g} {unit}".rstrip()


def _checked(scopes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    for path, amount in scopes.items():
        if not isinstance(amount, int) or isinstance(amount, bool) or amount < 0:
            raise CostError(
                f"cost table: scope {path!r} has {amount!r}, expected a whole number of at least 0; "
                "give Cost.by_scope as it is."
            )
        yield path, amount


def _row_of(path: str, names: Sequence[str]) -> tuple[str, list[str]]:
    parts = path.split("/")
    for end in range(len(parts), 0, -1):
        for start in range(end):  # the longest first: "decoder/block_00" is no "block_00"
            if (name := "/".join(parts[start:end])) in names:
                return name, parts[end:]
    return OTHER, parts


def _kind_of(below: Sequence[str], kinds: Sequence[str]) -> str:
    def contains(kind: str) -> bool:
        remaining = iter(below)
        return all(part in remaining for part in kind.split("/"))

    return max(filter(contains, kinds), key=lambda kind: kind.count("/"), default=OTHER)


def _by_row(scopes: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    amounts = dict.fromkeys((*names, OTHER), 0)
    for path, amount in _checked(scopes):
        amounts[_row_of(path, names)[0]] += amount
    return amounts


def _sum(name: str, rows: Iterable[CostRow], kinds: Sequence[str]) -> CostRow:
    rows = list(rows)
    return CostRow(
        name=name,
        tokens=None,
        parameters=sum(row.parameters for row in rows),
        forward_by_kind={kind: sum(row.forward_by_kind[kind] for row in rows) for kind in kinds},
        train_flops=sum(row.train_flops for row in rows),
        forward_bytes=sum(row.forward_bytes for row in rows),
        train_bytes=sum(row.train_bytes for row in rows),
    )


def _ratio(ours: CostRow | None, theirs: CostRow | None) -> tuple[float | None, float | None]:
    """Forward and training FLOPs of `ours` over `theirs`; None for what the dense side does not have."""
    if theirs is None:
        return None, None
    forward, train = (0, 0) if ours is None else (ours.forward_flops, ours.train_flops)
    return (
        forward / theirs.forward_flops if theirs.forward_flops else None,
        train / theirs.train_flops if theirs.train_flops else None,
    )


def _row_to_json(row: CostRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "tokens": row.tokens,
        "parameters": row.parameters,
        "forward_flops": row.forward_flops,
        "forward_by_kind": {kind: flops for kind, flops in row.forward_by_kind.items() if flops},
        "train_flops": row.train_flops,
        "forward_bytes": row.forward_bytes,
        "train_bytes": row.train_bytes,
    }
