"""Rows by themselves: which pieces of the array they take, and that nothing is lost, padded or taken twice."""

from __future__ import annotations

import numpy as np
import pytest

from tokenlab.data.image_text import rows


def pieces_of(packed, row: int) -> list[tuple[int, int]]:
    own = slice(packed.rows[row], packed.rows[row + 1])
    return list(zip(packed.starts[own].tolist(), packed.lengths[own].tolist(), strict=True))


class TestDocuments:
    @pytest.mark.parametrize("pairs", [1, 2, 7, 100])
    def test_every_pair_in_both_orders(self, pairs: int) -> None:
        which, caption_first = rows.documents(pairs)
        both = sorted(zip(which.tolist(), caption_first.tolist(), strict=True))
        assert both == [(i, order) for i in range(pairs) for order in (False, True)]
        # Any so many in a row are of different pairs.
        for start in range(2 * pairs):
            assert len({int(which[i % (2 * pairs)]) for i in range(start, start + pairs)}) == pairs

    def test_orders_are_mixed_and_always_the_same(self) -> None:
        which, caption_first = rows.documents(1000)
        assert 450 < caption_first[:1000].sum() < 550
        assert (np.diff(which[:1000]) < 0).mean() > 0.4
        again = rows.documents(1000)
        np.testing.assert_array_equal(which, again[0])
        np.testing.assert_array_equal(caption_first, again[1])


class TestTexts:
    def test_they_follow_one_another_without_their_ends(self) -> None:
        # Tokens 10 11 12 (end), 13 14 (end), 15 16 17 18 19 (end): numbers of places in the array.
        texts = rows.Texts(10, np.array([3, 2, 5]))
        assert texts.total == 7
        assert texts.take(0) == []
        assert texts.take(1) == [(10, 1)]
        assert texts.take(3) == [(11, 1), (13, 1), (15, 1)]
        assert texts.take(2) == [(16, 2)]
        assert texts.take(3) == [(18, 1), (10, 2)]
        assert texts.taken == 9
        assert texts.take(14) == [(13, 1), (15, 4), (10, 2), (13, 1), (15, 4), (10, 2)]


class TestRows:
    @pytest.mark.parametrize("pictures", [1, 2, 3])
    def test_every_row_is_full_and_every_document_is_taken(self, pictures: int) -> None:
        sizes = np.array([7, 9, 8, 7, 10, 9, 7, 8, 9, 10])
        first = int(sizes.sum())
        texts = rows.Texts(first, np.array([900, 40]))
        packed = rows.rows(sizes, texts, 40, pictures)
        begins = (np.cumsum(sizes) - sizes).tolist()
        assert len(packed) == -(-len(sizes) // pictures)
        taken: list[int] = []
        place = first
        for row in range(len(packed)):
            found = pieces_of(packed, row)
            assert sum(length for _, length in found) == 40
            own = [begins.index(start) for start, _ in found if start < first]
            assert len(own) == pictures == len(set(own))
            for start, length in found:
                if start < first:  # a whole document but for its end
                    assert length == sizes[begins.index(start)] - 1
                else:  # the texts go on where they were left
                    assert start == place
                    place += length
            assert len(found) <= pictures + 2
            taken += own
        # Every document once; only the last row is filled up, with the first ones.
        assert sorted(taken) == sorted([*range(len(sizes)), *range(-len(sizes) % pictures)])
        for row in range(len(packed) - 1):
            assert sorted(taken[row * pictures : (row + 1) * pictures]) == list(
                range(row * pictures, (row + 1) * pictures)
            )
        assert texts.taken == place - first

    def test_where_documents_stand_varies(self) -> None:
        sizes = np.full(400, 9)
        packed = rows.rows(sizes, rows.Texts(3600, np.array([100_000])), 32, 1)
        places = []
        for row in range(400):
            before = 0
            for start, length in pieces_of(packed, row):
                if start < 3600:
                    places.append(before)
                before += length
        assert set(places) == set(range(25))
        counts = np.bincount(places)
        assert counts[1:-1].max() < 40  # no place in the middle is preferred

    def test_pieces_of_text_that_meet_are_one(self) -> None:
        packed = rows.rows(np.full(50, 9), rows.Texts(450, np.array([100_000])), 32, 1)
        numbers = np.diff(packed.rows)
        assert set(numbers.tolist()) == {2, 3}
        for row in range(50):
            found = pieces_of(packed, row)
            assert all(sum(one) != other[0] for one, other in zip(found, found[1:], strict=False))

    def test_a_row_without_room_has_no_text(self) -> None:
        texts = rows.Texts(40, np.array([50]))
        packed = rows.rows(np.full(4, 10), texts, 18, 2)
        assert texts.taken == 0 and np.diff(packed.rows).tolist() == [2, 2]

    def test_more_documents_leave_earlier_rows_as_they_were(self) -> None:
        few, many = (
            rows.rows(np.full(n, 9), rows.Texts(9 * 60, np.array([100_000])), 32, 2) for n in (20, 60)
        )
        for row in range(10):
            assert pieces_of(few, row) == pieces_of(many, row)
