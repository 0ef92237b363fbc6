from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.data.text import packing

PACKINGS = [packing.stream, packing.fit]
sizes_of_documents = st.lists(st.integers(2, 20), min_size=1, max_size=30).map(np.array)


def numbered(sizes: np.ndarray) -> np.ndarray:
    """Tokens that are all different, from 1: token i of all is i + 1."""
    return np.arange(1, int(sizes.sum()) + 1)


def every_row(packed: packing.Packed, tokens: np.ndarray) -> dict[str, np.ndarray]:
    return packed.unpack(tokens, np.arange(len(packed)))


def test_stream_by_hand() -> None:
    # Two documents, 1 2 3 and 4 5 (3 and 5 are their ends), in rows of two.
    rows = every_row(packing.stream(np.array([3, 2]), 2), np.array([1, 2, 3, 4, 5]))
    assert rows["ids"].tolist() == [[1, 2], [3, 4]]
    assert rows["target"].tolist() == [[2, 3], [4, 5]]
    assert rows["segment"].tolist() == [[1, 1], [1, 2]]
    assert rows["position"].tolist() == [[0, 1], [0, 0]]


def test_fit_by_hand() -> None:
    # Documents of 1, 5 and 2 tokens before their ends, in rows of 4: the long one is cut into 4 and 1.
    tokens = np.array([10, 99, 20, 21, 22, 23, 24, 99, 30, 31, 99])
    rows = every_row(packing.fit(np.array([2, 6, 3]), 4), tokens)
    assert rows["ids"].tolist() == [[10, 24, 30, 31], [20, 21, 22, 23]]
    assert rows["target"].tolist() == [[99, 99, 31, 99], [21, 22, 23, 24]]
    assert rows["segment"].tolist() == [[1, 2, 3, 3], [1, 1, 1, 1]]
    assert rows["position"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


@settings(max_examples=100, deadline=None)
@given(sizes_of_documents, st.integers(2, 9))
def test_stream_is_the_documents_joined_and_cut(sizes: np.ndarray, length: int) -> None:
    tokens = numbered(sizes)
    rows = every_row(packing.stream(sizes, length), tokens)
    # Every window of N + 1 begins with the last token of the one before.
    windows = [tokens[i : i + length + 1] for i in range(0, len(tokens) - 1, length)]
    assert len(rows["ids"]) == len(windows)
    for row, window in enumerate(windows):
        used = len(window) - 1
        assert rows["ids"][row].tolist() == [*window[:-1], *[0] * (length - used)]
        assert rows["target"][row].tolist() == [*window[1:], *[0] * (length - used)]
        # Only the last row is padded, and zeros are all that padding holds.
        assert used == length or row == len(windows) - 1
        for key in ("segment", "position"):
            assert not rows[key][row, used:].any()


@pytest.mark.parametrize("pack", PACKINGS)
@settings(max_examples=60, deadline=None)
@given(sizes=sizes_of_documents, length=st.integers(2, 9))
def test_every_target_is_there_once(pack, sizes: np.ndarray, length: int) -> None:
    tokens = numbered(sizes)
    ends = np.cumsum(sizes)
    rows = every_row(pack(sizes, length), tokens)
    used = rows["segment"] > 0
    counted = used & ~np.isin(rows["ids"], ends)
    firsts = ends - sizes + 1
    assert sorted(rows["target"][counted].tolist()) == sorted(set(tokens.tolist()) - set(firsts.tolist()))
    np.testing.assert_array_equal(rows["target"][used], rows["ids"][used] + 1)


@pytest.mark.parametrize("pack", PACKINGS)
@settings(max_examples=60, deadline=None)
@given(sizes=sizes_of_documents, length=st.integers(2, 9))
def test_segments_and_positions(pack, sizes: np.ndarray, length: int) -> None:
    tokens = numbered(sizes)
    document = np.repeat(np.arange(len(sizes)), sizes)
    rows = every_row(pack(sizes, length), tokens)
    for ids, segment, position in zip(rows["ids"], rows["segment"], rows["position"], strict=True):
        used = int((segment > 0).sum())
        assert (segment[:used] > 0).all()  # padding is at the end
        expected_segment, expected_position = [], []
        for place in range(used):
            last = None if place == 0 else document[ids[place - 1] - 1]
            new = last is None or last != document[ids[place] - 1]
            expected_segment.append((expected_segment[-1] if place else 0) + new)
            expected_position.append(0 if new else expected_position[-1] + 1)
        assert segment[:used].tolist() == expected_segment
        assert position[:used].tolist() == expected_position


@settings(max_examples=60, deadline=None)
@given(sizes_of_documents, st.integers(2, 30))
def test_fit_keeps_documents_whole_that_fit_into_a_row(sizes: np.ndarray, length: int) -> None:
    tokens = numbered(sizes)
    rows = every_row(packing.fit(sizes, length), tokens)
    document = np.repeat(np.arange(len(sizes)), sizes)
    row_of = {}
    for number, (ids, segment) in enumerate(zip(rows["ids"], rows["segment"], strict=True)):
        for one in ids[segment > 0]:
            row_of.setdefault(int(document[one - 1]), set()).add(number)
    for number, size in enumerate(sizes.tolist()):
        assert len(row_of[number]) == -(-(size - 1) // length)


@settings(max_examples=60, deadline=None)
@given(sizes_of_documents, st.integers(2, 30))
def test_fit_opens_no_row_while_another_has_room(sizes: np.ndarray, length: int) -> None:
    rows = every_row(packing.fit(sizes, length), numbered(sizes))
    room = (rows["segment"] == 0).sum(axis=1).tolist()
    # A row is opened by its largest piece, and rooms only shrink.
    opened = sorted(
        ((np.bincount(row)[1:].max(), free) for row, free in zip(rows["segment"], room, strict=True))
    )
    for later, (size, free) in enumerate(opened):
        for larger, other_free in opened[later + 1 :]:
            assert size > other_free or (size == larger and size > free)


def test_fit_pads_little() -> None:
    sizes = np.random.default_rng(0).integers(2, 120, 400)
    packed = packing.fit(sizes, 256)
    used = int((sizes - 1).sum())
    assert len(packed) <= -(-used // 256) + 1
    assert 1 - used / (len(packed) * 256) < 0.01


def test_fit_takes_the_fullest_row_with_room() -> None:
    # 6 and 5 open rows of 10; 4 fits both and fills the first; 3 goes to the second, 2 beside it.
    packed = packing.fit(np.array([7, 6, 5, 4, 3]), 10)
    rows = every_row(packed, numbered(np.array([7, 6, 5, 4, 3])))
    assert [np.bincount(segment)[1:].tolist() for segment in rows["segment"]] == [[6, 4], [5, 3, 2]]


@pytest.mark.parametrize("pack", PACKINGS)
def test_rows_come_in_any_order_and_number(pack) -> None:
    sizes = np.array([4, 9, 2, 6, 3])
    packed, tokens = pack(sizes, 4), numbered(sizes)
    whole = every_row(packed, tokens)
    indices = np.array([3, 0, 3, 1])
    for key, array in packed.unpack(tokens, indices).items():
        np.testing.assert_array_equal(array, whole[key][indices])
        assert array.dtype == np.int32
    for array in packed.unpack(tokens, np.zeros(0, np.int64)).values():
        assert array.shape == (0, 4)


@pytest.mark.parametrize("pack", PACKINGS)
def test_the_smallest_there_is(pack) -> None:
    rows = every_row(pack(np.array([2]), 2), np.array([5, 9]))
    assert rows["ids"].tolist() == [[5, 0]] and rows["target"].tolist() == [[9, 0]]


@pytest.mark.parametrize("pack", PACKINGS)
@settings(max_examples=60, deadline=None)
@given(sizes=sizes_of_documents, length=st.integers(2, 9), data=st.data())
def test_spans_hold_what_the_rows_hold(pack, sizes: np.ndarray, length: int, data) -> None:
    tokens, packed = numbered(sizes), pack(sizes, length)
    start = data.draw(st.integers(0, len(packed)))
    stop = data.draw(st.integers(start, len(packed)))
    rows = packed.unpack(tokens, np.arange(start, stop))
    used = rows["segment"] > 0
    expected = set(rows["ids"][used].tolist()) | set(rows["target"][used].tolist())
    spans = packed.spans(start, stop)
    found = [one for first, last in spans for one in tokens[first:last].tolist()]
    assert found == sorted(expected)
    assert packed.spans(0, len(packed)) == [(0, len(tokens))]
