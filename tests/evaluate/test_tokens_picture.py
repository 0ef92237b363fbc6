"""From a recorded forward pass to tokens.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import matplotlib.image
import numpy as np
import pytest

from tokenlab import data, models
from tokenlab.core.errors import DataError, ShapeError
from tokenlab.evaluate import paint, tokens_picture
from tokenlab.evaluate.tokens_picture import read_trace

DIGITS = data.build({"name": "digits"})


def model(stack: str, **settings: Any) -> tuple[Any, Any]:
    spec = settings.pop("spec", DIGITS.spec)
    found = models.build(
        {"size": "nano/2", "stack": stack, **settings}, spec=spec, num_outputs=10, train=False
    )
    return found, jax.jit(found.init)(jax.random.key(0))


def section(stack: str, batch: data.Batch | None = None, **settings: Any) -> tokens_picture.Section:
    built, params = model(stack, **settings)
    return tokens_picture.section(built, params, batch or examples(3), title=stack)


def examples(rows: int) -> data.Batch:
    return tokens_picture.examples(DIGITS, "test", rows)


def test_examples_are_of_different_classes() -> None:
    assert examples(6)["label"].tolist() == [0, 1, 2, 3, 4, 5]
    assert examples(6)["image"].shape == (6, 8, 8, 1)
    with pytest.raises(DataError, match="tset"):
        tokens_picture.examples(DIGITS, "tset")


@pytest.mark.parametrize("registers", [0, 3])
def test_keep_shows_the_patches_that_score_best(registers: int) -> None:
    stack = "block + keep(5, by=norm) + block"
    built, params = model(stack, registers=registers)
    batch = examples(3)
    (column,) = tokens_picture.section(built, params, batch, title="").columns
    # What stands before the item, without it: the norms that the item ranks by.
    dense, _ = model("block + keep(1.0, by=norm) + block", registers=registers)
    point = jax.jit(lambda *given: dense.apply(*given, record=True).trace[0].tokens)(params, batch)
    norms = np.linalg.norm(np.asarray(point.x), axis=-1)[:, 1 + registers :]
    for patches, row in zip(column.patches, norms, strict=True):
        assert set(np.flatnonzero(patches.present)) == set(np.argsort(-row)[:5])
        assert not patches.gone.any() and not patches.merged.any()
    assert (column.name, column.after_block, column.tokens) == ("keep_00", 1, (16, 5))
    assert column.title == "keep_00\nafter block 1\n16 → 5 tokens"


def test_a_mean_head_has_no_class_token_to_leave_out() -> None:
    (column,) = section("block + keep(5, by=norm) + block", head="mean").columns
    assert column.tokens == (16, 5) and all(p.present.sum() == 5 for p in column.patches)


def test_patches_dropped_earlier_are_gone_later() -> None:
    first, second = section("block + keep(9) + block + keep(4)").columns
    for early, late in zip(first.patches, second.patches, strict=True):
        np.testing.assert_array_equal(late.gone, early.left)
        assert (late.gone.sum(), late.left.sum(), late.present.sum()) == (7, 5, 4)
    assert (second.after_block, second.tokens) == (2, (9, 4))


def test_merged_tokens_form_a_partition() -> None:
    first, second = section("(block + merge(5))*2").columns
    assert (first.tokens, second.tokens) == ((16, 11), (11, 6))
    for patches, count in ((first.patches[0], 11), (second.patches[0], 6)):
        assert patches.present.all() and len(np.unique(patches.after)) == count
        assert sum(map(len, patches.groups())) - len(patches.groups()) == 16 - count


def test_fused_tokens_are_one_group() -> None:
    (column,) = section("block(between=evit(0.5)) + block").columns
    assert (column.tokens, column.after_block) == ((16, 9), 1)
    assert all([len(group) for group in patches.groups()] == [8] for patches in column.patches)


def test_a_wrapper_shows_what_passes_through_its_body_and_nothing_after_it() -> None:
    columns = section("skip(keep=6)(block) + skip(keep=4)(block) + keep(8)").columns
    assert [(c.name, c.inside, c.after_block, c.tokens) for c in columns] == [
        ("skip_00", True, 0, (16, 6)),
        ("skip_01", True, 1, (16, 4)),
        ("keep_00", False, 2, (16, 8)),
    ]
    assert columns[0].title == "skip_00\nbefore block 1\n6 of 16 in the body"
    for column, count in zip(columns, (6, 4, 8), strict=True):
        assert all(p.present.sum() == count and not p.gone.any() for p in column.patches)
    assert any(
        np.any(a.after != b.after) for a, b in zip(columns[0].patches, columns[1].patches, strict=True)
    )


def test_a_wrapper_in_a_wrapper_and_one_that_loses_tokens() -> None:
    every = np.arange(5)[None]  # a class token and four patches
    outer, inner = np.array([[0, 1, 2, 3, -1]]), np.array([[0, 1, -1, 2, -1]])
    lost = np.array([[0, 1, 2, -1, -1]])
    trace = [
        ("skip_00", True, 1, outer),
        ("skip_01", True, 1, inner),
        ("skip_01", False, 1, outer),
        ("skip_00", False, 1, every),
        ("span_00", True, 1, outer),
        ("span_00", False, 1, lost),
        ("keep_00", False, 1, lost),
    ]
    columns = read_trace(trace, patches=4, blocks={"skip_01": 1})
    assert [(c.name, c.inside, c.tokens) for c in columns] == [
        ("skip_00", True, (4, 3)),
        ("skip_01", True, (3, 2)),
        ("span_00", True, (4, 3)),
        ("span_00", False, (4, 2)),
        ("keep_00", False, (2, 2)),
    ]
    assert columns[1].patches[0].gone.tolist() == [False, False, False, True]
    assert columns[3].patches[0].gone.tolist() == [False] * 4
    assert read_trace([], patches=4, blocks={}) == []
    with pytest.raises(ShapeError, match="fewer than the 9 patches"):
        read_trace(trace, patches=9, blocks={})


def test_the_png_holds_the_painted_cells_where_they_belong(tmp_path: Path) -> None:
    batch = examples(2)
    shown = [section("block + keep(5, by=norm) + block", batch), section("block + merge(4) + block", batch)]
    path = tokens_picture.save(tmp_path / "tokens.png", batch, [*shown, section("block*2", batch)])
    pixels = np.rint(matplotlib.image.imread(path)[..., :3] * 255).astype(np.uint8)
    rgb = [paint.image_to_rgb(image, -1, 1) for image in batch["image"]]
    found = []
    for row in range(2):
        wanted = [paint.enlarge(rgb[row], paint.factor_for(8))]
        wanted += [paint.paint(rgb[row], s.grid, s.columns[0].patches[row]) for s in shown]
        found.append([place(pixels, cell) for cell in wanted])
    assert [top for top, _ in found[0]] == [found[0][0][0]] * 3  # a row is one line
    assert [left for _, left in found[0]] == [left for _, left in found[1]]  # a column is one line
    assert found[0][0][0] < found[1][0][0] and found[0][0][1] < found[0][1][1] < found[0][2][1]
    assert list(tmp_path.iterdir()) == [path]


def place(pixels: np.ndarray, cell: np.ndarray) -> tuple[int, int]:
    """Where a picture holds a cell exactly: (top, left)."""
    height, width = cell.shape[:2]
    corners = np.argwhere((pixels == cell[0, 0]).all(axis=-1))
    for top, left in corners.tolist():
        part = pixels[top : top + height, left : left + width]
        if part.shape == cell.shape and np.array_equal(part, cell):
            return top, left
    raise AssertionError("the cell is not in the picture")


def test_colour_images_and_oblong_grids(tmp_path: Path) -> None:
    spec = {"image": ((8, 12, 3), "float32")}
    images = np.random.default_rng(0).random((2, 8, 12, 3), dtype=np.float32)
    found = section("block + keep(7, by=norm) + block", {"image": images}, spec=spec, size="nano/4", patch=2)
    assert found.grid == (4, 6) and len(found.columns[0].patches[0].after) == 24
    tokens_picture.save(tmp_path / "tokens.png", {"image": images}, [found])


def test_nothing_to_draw_is_told(tmp_path: Path) -> None:
    assert section("block*2").columns == ()
    with pytest.raises(ShapeError, match="nothing to draw"):
        tokens_picture.save(tmp_path / "tokens.png", examples(2), [section("block*2")])


def test_sections_that_are_too_wide_go_on_below_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [section("(block + keep(0.9, by=norm))*2"), section("block + keep(5, by=norm) + block")]
    pictures = [np.zeros((8, 8, 3), np.uint8)] * 3
    layout = tokens_picture._Layout(pictures, [["says", "a name"]])
    assert [len(band) for band in layout.bands(shown)] == [2]
    monkeypatch.setattr(tokens_picture, "WIDEST", 700)
    bands = layout.bands(shown)
    assert [[len(part.columns) for part in band] for band in bands] == [[1], [1], [1]]
    assert bands[1][0].title.endswith("(continued)") and layout.right(bands[0]) <= 700


def test_names_of_classes_and_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"image": ((192, 192, 3), "float32")}
    images = np.random.default_rng(0).uniform(-1, 1, (2, 192, 192, 3)).astype(np.float32)
    batch = {"image": images, "label": np.array([0, 3])}
    found = section("keep(7, by=norm) + block*2", batch, spec=spec, size="nano/16")
    kept = []
    monkeypatch.setattr(tokens_picture.style, "save", lambda figure, path: kept.append(figure))
    tokens_picture.save(tmp_path / "tokens.png", batch, [found], tuple(f"class {n}" for n in range(10)))
    texts = [text.get_text() for text in kept[0].texts]
    assert "class 0" in texts and "class 3" in texts
    assert sum(text.startswith("says\nclass ") for text in texts) == 2
    shown = [axes.images[0].get_array() for axes in kept[0].axes]
    np.testing.assert_array_equal(shown[0], paint.image_to_rgb(images[0], -1, 1))  # as large as it is
