"""The cost table: every FLOP in one row, and texts a reader can use."""

from __future__ import annotations

import io
import json

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from rich.console import Console

from tokenlab.core.errors import CostError
from tokenlab.cost import CostTable, RowInfo, count, pretty

FORWARD = {
    "embed": 10,
    "block_00/attention/Attention/projections/query": 40,
    "block_00/attention/Attention/maps": 20,
    "block_00/attention/readings": 2,
    "block_00/mlp/MLP/up": 30,
    "keep_00/router": 3,
    "model/skip_00/block_01/attention/projections": 15,
    "model/skip_00/block_01/soft_moe": 16,
    "model/skip_00/router": 4,
    "head": 5,
    "": 1,
    "augment": 1,
}
TRAIN = {path: 3 * flops for path, flops in FORWARD.items()}
ROWS = [
    RowInfo("embed", 17, 100),
    RowInfo("block_00", 17, 200),
    RowInfo("keep_00", 17, 8),
    RowInfo("skip_00", 9, 0),
    RowInfo("block_01", 5, 200),
    RowInfo("head", 9, 50),
]


def table() -> CostTable:
    return CostTable.build(FORWARD, TRAIN, rows=ROWS, total_forward=147, total_train=3 * 147)


def dense() -> CostTable:
    block = {"attention/projections": 40, "attention/maps": 20, "mlp": 30}
    scopes = {"embed": 10, "head": 5} | {
        f"block_0{i}/{kind}": n for i in range(2) for kind, n in block.items()
    }
    rows = [RowInfo(name, 17, 100) for name in ("embed", "block_00", "block_01", "head")]
    return CostTable.build(scopes, {path: 3 * flops for path, flops in scopes.items()}, rows=rows)


def test_a_row_named_by_a_path_goes_before_that_of_its_end() -> None:
    scopes = {"block_00/mlp": 1, "decoder/block_00/mlp": 2, "model/decoder/Dense": 4, "x/decoder/block_00": 8}
    rows = [RowInfo(name, 17, 1) for name in ("block_00", "decoder/block_00", "decoder")]
    made = CostTable.build(scopes, scopes, rows=rows)
    assert {row.name: row.forward_flops for row in made.rows} == {
        "block_00": 1,
        "decoder/block_00": 10,
        "decoder": 4,
    }
    assert made.rows[1].forward_by_kind["mlp"] == 2


def test_rows_in_the_order_given_and_nothing_lost() -> None:
    made = table()
    assert [row.name for row in made.rows] == [row.name for row in ROWS] + ["other"]
    assert [row.forward_flops for row in made.rows] == [10, 92, 3, 4, 31, 5, 2]
    assert [row.train_flops for row in made.rows] == [30, 276, 9, 12, 93, 15, 6]
    assert [row.tokens for row in made.rows] == [17, 17, 17, 9, 5, 9, None]
    total = made.total
    assert (total.forward_flops, total.train_flops, total.parameters) == (147, 441, 558)


def test_kinds_of_operation() -> None:
    by_name = {row.name: row for row in table().rows}
    assert {kind: n for kind, n in by_name["block_00"].forward_by_kind.items() if n} == {
        "attention/projections": 40,
        "attention/maps": 20,
        "attention/readings": 2,
        "mlp": 30,
    }
    assert by_name["keep_00"].forward_by_kind["router"] == 3
    assert by_name["block_01"].forward_by_kind["other"] == 16  # no kind was named soft_moe
    named = CostTable.build(FORWARD, TRAIN, rows=ROWS, kinds=("attention", "mlp", "soft_moe"))
    kinds = named.group("block").forward_by_kind
    assert kinds == {"attention": 77, "mlp": 30, "soft_moe": 16, "other": 0}


def test_a_row_that_costs_nothing_stays_and_other_goes() -> None:
    made = CostTable.build(
        {"block_00/mlp": 6}, {}, rows=[RowInfo("block_00", 4, 1), RowInfo("merge_00", 4, 0)]
    )
    assert [(row.name, row.forward_flops) for row in made.rows] == [("block_00", 6), ("merge_00", 0)]


def test_ratios_to_the_dense_stack() -> None:
    ratios = {r.group: (r.forward, r.train) for r in table().ratios(dense())}
    assert list(ratios) == ["embed", "block", "keep", "skip", "head", "other", "total"]
    assert ratios["embed"] == (1.0, 1.0)
    assert ratios["block"] == (123 / 180, 369 / 540)
    assert ratios["keep"] == (None, None)
    assert ratios["total"] == (147 / 195, 441 / 585)
    only_embed = CostTable.build({"embed": 10}, {"embed": 30}, rows=ROWS[:1])
    assert {r.group: r.forward for r in only_embed.ratios(dense())}["block"] == 0.0


def test_json_is_plain() -> None:
    made = json.loads(json.dumps(table().to_json(dense())))
    assert made["rows"][1] == {
        "name": "block_00",
        "tokens": 17,
        "parameters": 200,
        "forward_flops": 92,
        "forward_by_kind": {
            "attention/projections": 40,
            "attention/maps": 20,
            "attention/readings": 2,
            "mlp": 30,
        },
        "train_flops": 276,
        "forward_bytes": 0,
        "train_bytes": 0,
    }
    assert made["total"]["forward_flops"] == sum(row["forward_flops"] for row in made["rows"]) == 147
    assert made["dense_total"]["train_flops"] == 585
    assert made["of_dense"]["block"] == {"forward": 123 / 180, "train": 369 / 540}
    assert "of_dense" not in table().to_json()


def test_markdown() -> None:
    lines = table().to_markdown(dense()).splitlines()
    assert lines[0] == (
        "| layer | tokens | params | attention/projections | attention/maps | attention/readings | mlp | router "
        "| other | forward FLOPs | training FLOPs | forward / dense | training / dense |"
    )
    assert set(lines[1]) <= set("|-: ")
    assert lines[3] == "| block_00 | 17 | 200 | 40 | 20 | 2 | 30 | 0 | 0 | 92 | 276 | 1.022 | 1.022 |"
    assert lines[4].endswith("| 3 | 9 | - | - |")
    assert lines[-1].startswith("| total |  | 558 |") and lines[-1].endswith("| 147 | 441 | 0.754 | 0.754 |")
    assert any(line.startswith("| all block |") for line in lines)
    assert len({line.count("|") for line in lines}) == 1
    assert "dense" not in table().to_markdown()


def test_rich_shows_the_same() -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(table().to_rich(dense(), title="what it costs"))
    text = console.file.getvalue()
    assert "what it costs" in text and "projections" in text and "0.754" in text
    assert "…" not in text and "attention" not in text  # narrow enough to be read
    assert table().to_rich().row_count == len(table().rows) + 1


def test_bytes_columns_appear_when_given() -> None:
    made = CostTable.build(
        FORWARD,
        TRAIN,
        rows=ROWS,
        bytes_forward={"block_00/mlp": 5000, "x": 1},
        bytes_train={"block_00": 15000},
    )
    assert (made.total.forward_bytes, made.total.train_bytes) == (5001, 15000)
    header, _, _, block, *_ = made.to_markdown().splitlines()
    assert "forward bytes | training bytes |" in header
    assert block.endswith("| 5 kB | 15 kB |")
    assert "bytes" not in table().to_markdown()


@pytest.mark.parametrize("rows", [["block_00", "block_00"], ["other"], ["total"], [""]])
def test_row_names_must_be_unique_and_free(rows: list[str]) -> None:
    with pytest.raises(CostError, match="row name .* is given twice or reserved"):
        CostTable.build(FORWARD, TRAIN, rows=[RowInfo(name, 1, 1) for name in rows])


@pytest.mark.parametrize("amount", [1.5, -1, True, None])
def test_amounts_must_be_whole_numbers(amount: object) -> None:
    with pytest.raises(CostError, match="whole number"):
        CostTable.build({"embed": amount}, {}, rows=ROWS)
    with pytest.raises(CostError, match="whole number"):
        CostTable.build({}, {}, bytes_train={"embed": amount}, rows=ROWS)


def test_rows_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(CostError, match="add up to 147 forward FLOPs, the program has 148"):
        CostTable.build(FORWARD, TRAIN, rows=ROWS, total_forward=148)
    with pytest.raises(CostError, match="441 training FLOPs, the program has 1"):
        CostTable.build(FORWARD, TRAIN, rows=ROWS, total_train=1)


def test_from_counted_costs() -> None:
    def model(p: dict[str, Array], x: Array) -> Array:
        with jax.named_scope("embed"):
            x = x @ p["embed"]
        for name in ("block_00", "block_01"):
            with jax.named_scope(name):
                x = jax.checkpoint(jax.named_scope("mlp")(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]))(
                    p, x
                )
        return x

    p = {"embed": jnp.ones((6, 4)), "up": jnp.ones((4, 16)), "down": jnp.ones((16, 4))}
    x = jnp.ones((3, 6))
    forward = count(model, p, x)
    train = count(jax.value_and_grad(lambda p, x: model(p, x)[0, 0]), p, x)
    rows = [RowInfo("embed", 3, 24), RowInfo("block_00", 3, 128), RowInfo("block_01", 3, 128)]
    made = CostTable.from_costs(forward, train, rows=rows)
    block = 2 * 2 * 3 * 4 * 16
    assert [row.forward_flops for row in made.rows] == [2 * 3 * 6 * 4, block, block]
    assert [row.train_flops for row in made.rows] == [
        2 * 2 * 3 * 6 * 4,
        3 * block + block // 2,
        3 * block + block // 2,
    ]
    assert made.rows[1].forward_by_kind["mlp"] == block
    assert made.total.forward_bytes == forward.bytes and made.total.train_bytes == train.bytes


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1 k"),
        (999_999, "1 M"),
        (999_400, "999 k"),
        (9198354432, "9.2 G"),
        (275e12, "275 T"),
        (2.5e15, "2.5 P"),
    ],
)
def test_pretty(amount: float, text: str) -> None:
    assert pretty(amount) == text


def test_pretty_with_unit() -> None:
    assert (pretty(9198354432, "FLOP", 4), pretty(12, "B"), pretty(0.5, "B")) == (
        "9.198 GFLOP",
        "12 B",
        "0.5 B",
    )
