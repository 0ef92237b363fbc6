from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest

from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.text import ngram
from tokenlab.data.text.ngram import NGram

TRAIN = ["abracadabra", "abra", "cad", "é"]
OTHER = ["zz", "abrac", "cab", "abé"]


def oracle(train: list[str], other: list[str], order: int) -> float:
    """Bits per byte by the equation, with exact fractions and nothing but dictionaries."""
    counts: Counter[tuple[int, ...]] = Counter()
    for text in train:
        symbols = [*text.encode(), 256]
        for n in range(1, order + 1):
            counts.update(tuple(symbols[i - n : i]) for i in range(n, len(symbols) + 1))

    def probability(context: tuple[int, ...], symbol: int) -> Fraction:
        below = probability(context[1:], symbol) if context else Fraction(1, 257)
        following = {gram: count for gram, count in counts.items() if gram[:-1] == context}
        total, types = sum(following.values()), len(following)
        if not total:
            return below
        return (counts[(*context, symbol)] + types * below) / Fraction(total + types)

    bits, num_bytes = 0.0, 0
    for text in other:
        symbols = [*text.encode(), 256]
        for i in range(1, len(symbols)):
            context = tuple(symbols[max(0, i - order + 1) : i])
            bits -= math.log2(probability(context, symbols[i]))
            num_bytes += symbols[i] < 256
    return bits / num_bytes


@pytest.mark.parametrize("order", range(1, 6))
def test_it_is_the_equation(order: int) -> None:
    found = NGram(TRAIN, order).bits_per_byte(OTHER)
    assert found == pytest.approx([oracle(TRAIN, OTHER, n) for n in range(1, order + 1)], rel=1e-12)


def test_texts_in_parts_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = NGram(TRAIN).bits_per_byte(OTHER)
    monkeypatch.setattr(ngram, "CHUNK", 6)
    assert NGram(TRAIN).bits_per_byte(OTHER) == pytest.approx(whole, rel=1e-12)


def test_contexts_do_not_reach_into_the_document_before() -> None:
    model = NGram(["xy", "zw"] * 5, 3)
    # "y" ends a document, so nothing but the end was seen after it: "yz" was not.
    together, apart = model.bits_per_byte(["xyzw"])[-1], model.bits_per_byte(["xy", "zw"])[-1]
    assert together > 2 * apart


def test_documents_shorter_than_the_order() -> None:
    assert NGram(["a", "b"], 5).bits_per_byte(["ab"]) == pytest.approx(
        [oracle(["a", "b"], ["ab"], n) for n in range(1, 6)]
    )


def test_mistakes() -> None:
    for order in (0, 6, 2.0, True):
        with pytest.raises(ConfigError, match=f"the order of an n-gram is {order!r}; expected 1 to 5"):
            NGram(["ab"], order)
    with pytest.raises(DataError, match="no document to count"):
        NGram([""])
    with pytest.raises(DataError, match="no document of two bytes"):
        NGram(["ab"]).bits_per_byte(["a"])


def test_shakespeare() -> None:
    """The known figures of this text: 2.88 bits per byte for 3-grams, 2.27 for 5-grams."""
    source = data.build({"name": "shakespeare"})
    found = NGram(source.text("train")).bits_per_byte(source.text("validation"))
    assert found[2] == pytest.approx(2.876, abs=0.001) and found[4] == pytest.approx(2.266, abs=0.001)
    assert found == sorted(found, reverse=True)
