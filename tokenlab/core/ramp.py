"""Numbers that go from one value to another over some steps, in as few values as one asks for.

Pure functions of the step, in plain Python: what depends on such a number is compiled anew for each of its values.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Literal

from tokenlab.core.errors import ConfigError

Number = int | float
Shape = Literal["linear", "cosine"]
SHAPES: tuple[Shape, ...] = ("linear", "cosine")

MOST_VALUES = 256
"""Values that a ramp may take: each of them is a program of its own."""


@dataclass(frozen=True)
class Ramp:
    """From `first` at step `start` to `last` at step `until`; it stays there.

    Between two ints the line is rounded towards `first`, first to a whole number and then to a multiple of `multiple`
    (down where it rises, up where it falls), and kept from passing `last`. So do DeepSpeed's "fixed_linear" schedules
    of random-LTD (arXiv 2211.11586), in the integer arithmetic that is exact; two things follow, in both. A `first`
    that is no multiple is rounded too, and lies below itself (where it
    would become 0, it is an error). A `last` that is no multiple is reached a little after
    `until`, when the line, which goes on, has passed the next multiple.

    With `values` there are only so many, evenly spaced from `first` to `last` (rounded to a multiple as the line is),
    and each holds until the line has come to the next.

    Attributes:
        first, last: both ints or both floats, and not equal.
        start, until: steps, 0 <= start < until.
        shape: "linear"; "cosine", half a period: slow, fast, slow.
        multiple: q >= 1, for ints.
        values: how many values there are, >= 2; None for as many as come.
    """

    first: Number
    last: Number
    start: int
    until: int
    shape: Shape = "linear"
    multiple: int = 1
    values: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.first, int) is not isinstance(self.last, int) or self.first == self.last:
            raise ConfigError(
                f"it goes from {self.first!r} to {self.last!r}: expected two different counts (ints) or two different "
                "fractions (floats)."
            )
        if self.shape not in SHAPES:
            raise ConfigError(f"its shape is {self.shape!r}: expected one of {', '.join(SHAPES)}.")
        if self.until - self.start < 1:
            raise ConfigError(
                f"it begins at step {self.start} and ends at {self.until}: expected at least 1 step between."
            )
        if self.multiple < 1 or (self.multiple > 1 and not isinstance(self.first, int)):
            raise ConfigError(f"its multiple is {self.multiple}: expected an int >= 1, between counts.")
        if isinstance(self.first, int) and 0 < self.first < min(self.multiple, self.last):
            raise ConfigError(
                f"it begins at {self.first}, which multiple={self.multiple} rounds down to 0: expected a first value "
                f"of at least {self.multiple}, or 0 where that is meant."
            )
        if self.values is not None and self.values < 2:
            raise ConfigError(f"it has {self.values} values: expected at least 2.")

    def at(self, step: int) -> Number:
        """The value of step `step` >= `start`."""
        gone, whole = step - self.start, self.until - self.start
        if not isinstance(self.first, int):
            return self._fraction(self._progress(gone / whole))
        # What falls is the mirror image of what rises.
        sign = 1 if self.last > self.first else -1
        low, high = sign * self.first, sign * self.last
        if self.shape == "linear":
            value = low + gone * (high - low) // whole
        elif gone < whole:
            value = math.floor(low + self._progress(gone / whole) * (high - low))
        else:
            return self.last
        value = min(value - value % self.multiple, high)
        if sign < 0:
            value = max(value, low)
        if self.values is not None:
            steps = [low + i * (high - low) // (self.values - 1) for i in range(self.values - 1)]
            levels = [level - level % self.multiple for level in steps] + [high]
            if sign < 0:
                levels = [max(level, low) for level in levels]
            value = levels[max(bisect.bisect_right(levels, value) - 1, 0)]
        return sign * value

    def _progress(self, share: float) -> float:
        share = min(share, 1.0)
        return share if self.shape == "linear" else (1 - math.cos(math.pi * share)) / 2

    def _fraction(self, progress: float) -> float:
        if self.values is not None:  # the sum makes up for the last bit of a division
            progress = math.floor(progress * (self.values - 1) + 1e-9) / (self.values - 1)
        return round(self.first + progress * (self.last - self.first), 12)

    def pieces(self, end: int) -> list[tuple[int, Number]]:
        """(first step, value) of every value met from `start` to below `end`, in order; by halving, not step by step.

        Raises:
            ConfigError: there are more than `MOST_VALUES`.
        """
        found = [(self.start, self.at(self.start))]
        while True:
            low, high = found[-1][0], end
            if high - low < 2 or self.at(high - 1) == found[-1][1]:
                return found
            high -= 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.at(middle) == found[-1][1] else (low, middle)
            found.append((high, self.at(high)))
            if len(found) > MOST_VALUES:
                raise ConfigError(
                    f"it takes more than {MOST_VALUES} values, and each is a program to compile: give values=16, or "
                    "another number of them, or a larger multiple."
                )
