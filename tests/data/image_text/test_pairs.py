"""Pictures with their captions, read back from rows."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.image_text.pairs import CAPTIONS, CODES, made
from tokenlab.core.errors import DataError, NameLookupError
from tokenlab.data import Dataset
from tokenlab.data.image_text import pairs


@pytest.mark.parametrize("options", [{}, {"isolate": False}, {"length": 34, "pictures_per_row": 2}])
def test_every_pair_of_a_split_is_there_once(options: dict) -> None:
    """Whether rows are one segment or several, and not with what stands before a picture."""
    source = Dataset(made(**options))
    for split, codes in CODES.items():
        found = [(pair.caption, pair.codes.tolist()) for pair in pairs(source, split)]
        wanted = list(zip(CAPTIONS[split], codes.tolist(), strict=True))
        assert sorted(found) == sorted(wanted)
    assert next(pairs(source, "dev")).codes.shape == (2, 2)
    assert np.issubdtype(next(pairs(source, "dev")).codes.dtype, np.integer)


def test_a_split_that_is_not_there_is_told() -> None:
    with pytest.raises((DataError, NameLookupError), match="dev"):
        next(pairs(made(), "development"))
