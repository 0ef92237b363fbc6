"""What a run tells while it runs: a live line on a terminal, one line a record anywhere else."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WORTH_TELLING = 0.03
"""Share of the time spent waiting for batches from which on the line says so."""

_TOTALS = ("step", "split", "flops", "tokens", "seconds", "data_seconds")
_REFRESH_SECONDS = 0.1


class Progress:
    """Shows records and notes; a context manager that leaves the terminal as it found it.

    On a terminal the newest training record stands in one line that is drawn anew, and everything else is printed
    above it. Rates are of training alone: they come from the differences of the totals in the records.

    Args:
        total_steps: steps of the run, >= 1.
        batch_size: examples per step.
        examples: what an example is called.
        file: where to write; None: standard output.
        primary: whether this process shows anything. None: `jax.process_index() == 0`.
        clock: a monotonic clock in seconds, for the time that is left.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        batch_size: int,
        examples: str = "images",
        file: TextIO | None = None,
        primary: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total_steps = total_steps
        self._batch_size, self._examples, self._clock = batch_size, examples, clock
        self._file = file
        self._primary = jax.process_index() == 0 if primary is None else primary
        self._live: Live | None = None
        self._before: Mapping[str, Any] = {
            "step": 0,
            "flops": 0,
            "tokens": 0,
            "seconds": 0.0,
            "data_seconds": 0.0,
        }
        self._before_at: float | None = None
        self._pace: float | None = None
        self._line = ""
        self._drawn_at = -_REFRESH_SECONDS

    def __enter__(self) -> Progress:
        console = Console(file=self._file)
        if self._primary and console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            try:
                live.update(self._drawing())
            finally:
                live.stop()

    def note(self, text: str) -> None:
        """Prints a message of one or more lines, above the live line where there is one."""
        if not self._primary:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._file or sys.stdout, flush=True)

    def record(self, record: Mapping[str, Any]) -> None:
        """Shows a record.

        Args:
            record: "step", "split", totals of the run so far ("flops" of the model, "tokens", "seconds" of training,
                "data_seconds" of it idle for want of batches) and metrics. The rates shown are since the record of
                the split "train" before it; with the first record those of the whole run.
        """
        metrics = {name: value for name, value in record.items() if name not in _TOTALS}
        shown = [
            f"{name} {_number(value)}"
            for name, value in sorted(metrics.items(), key=lambda m: m[0] != "loss")
        ]
        if record["split"] != "train":
            self.note("  ".join([f"step {record['step']}/{self.total_steps}", f"{record['split']}:", *shown]))
            return
        self._line = "  ".join([*shown, *self._rates(record)])
        if self._live is None:
            self.note(f"step {record['step']}/{self.total_steps}  {self._line}")
        elif self._clock() - self._drawn_at >= _REFRESH_SECONDS or record["step"] == self.total_steps:
            self._drawn_at = self._clock()
            self._live.update(self._drawing(), refresh=True)

    def _rates(self, record: Mapping[str, Any]) -> Iterator[str]:
        steps, flops, tokens, seconds, waited = (
            record[name] - self._before[name]
            for name in ("step", "flops", "tokens", "seconds", "data_seconds")
        )
        now = self._clock()
        if steps > 0 and seconds > 0:
            yield readable(steps * self._batch_size / seconds, f" {self._examples}/s")
            yield readable(tokens / seconds, " tokens/s")
            yield readable(flops / seconds, "FLOP/s")
            if waited > WORTH_TELLING * seconds:
                yield f"{waited / seconds:.0%} waiting for data"
            if self._pace is None or self._before_at is None:
                self._pace = seconds / steps
            else:  # by the clock, so that evaluations count; smoothed, as few intervals hold one
                self._pace += 0.3 * ((now - self._before_at) / steps - self._pace)
            left = datetime.timedelta(seconds=round(self._pace * (self.total_steps - record["step"])))
            yield f"ETA {left}"
        self._before, self._before_at = record, now

    def _drawing(self) -> Table:
        drawing = Table.grid(padding=(0, 1))
        step = self._before["step"]
        drawing.add_row(
            Text(f"step {step}/{self.total_steps}", no_wrap=True),
            ProgressBar(total=self.total_steps, completed=step, width=12),
            Text(self._line),
        )
        return drawing


def readable(value: float, unit: str) -> str:
    """A number to three digits with the SI prefix that suits it: "12.3 GFLOP/s", "6.4 k images/s"."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}" if prefixes[0] else f"{value:.3g} {unit.lstrip()}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
