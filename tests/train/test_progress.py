"""Progress: plain lines, the live line, rates from totals, and a terminal that is left as it was."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from tokenlab.train.progress import Progress, readable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def train(step: int, seconds: float, **values: Any) -> dict[str, Any]:
    totals = {"flops": step * 2 * 10**9, "tokens": step * 640, "seconds": seconds, "data_seconds": 0.0}
    return {"step": step, "split": "train", "accuracy": 0.25, "loss": 2.302585, **values, **totals}


def evaluation(step: int) -> dict[str, Any]:
    return {**train(step, 1.0), "split": "validation", "accuracy": 0.9375, "loss": 0.5}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def plain(text: str) -> str:
    """Without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_plain_lines_one_a_record() -> None:
    file, clock = io.StringIO(), Clock()
    with Progress(400, batch_size=64, file=file, clock=clock) as progress:
        progress.note("vit [4 blocks]")
        progress.record(train(20, 2.0))
        assert file.getvalue().count("\n") == 2  # at once, not at the end
        clock.now += 3.0
        progress.record(train(40, 3.0, learning_rate=1e-5))
        progress.record(evaluation(40))
    assert file.getvalue().splitlines() == [
        "vit [4 blocks]",
        "step 20/400  loss 2.303  accuracy 0.25  640 images/s  6.4 k tokens/s  20 GFLOP/s  ETA 0:00:38",
        # Training took 1 s, the clock says 3 s, of which 0.3 enters: 18 * (0.7 * 2 s + 0.3 * 3 s) = 41.4 s.
        "step 40/400  loss 2.303  accuracy 0.25  learning_rate 1e-05  1.28 k images/s  12.8 k tokens/s  40 GFLOP/s"
        "  ETA 0:00:41",
        "step 40/400  validation:  loss 0.5  accuracy 0.9375",
    ]


def test_evaluations_do_not_enter_the_rates() -> None:
    file, clock = io.StringIO(), Clock()
    with Progress(100, batch_size=1, examples="sequences", file=file, clock=clock) as progress:
        progress.record(train(10, 1.0))
        clock.now += 50.0
        progress.record(evaluation(10))
        clock.now += 50.0
        progress.record(train(20, 2.0))
    rates = [
        re.search(r"(\S+) sequences/s", line)
        for line in file.getvalue().splitlines()
        if "validation" not in line
    ]
    assert [rate.group(1) for rate in rates if rate] == ["10", "10"]


def test_no_rates_without_time_or_steps() -> None:
    file = io.StringIO()
    with Progress(100, batch_size=8, file=file, clock=Clock()) as progress:
        progress.record(train(10, 0.0))
        progress.record(train(10, 5.0))
    assert file.getvalue() == "step 10/100  loss 2.303  accuracy 0.25\n" * 2


def test_live_line_with_notes_above_it(terminal: Terminal) -> None:
    clock = Clock()
    with Progress(400, batch_size=64, file=terminal, clock=clock) as progress:
        progress.record(train(20, 2.0))
        progress.note("checkpoint 20 is damaged [it says]")
        progress.record(evaluation(20))
        clock.now += 1.0
        progress.record(train(400, 40.0))
    assert "\x1b[?25l" in terminal.getvalue()
    text = plain(terminal.getvalue())
    assert re.search(
        r"step 20/400 .*loss 2.303  accuracy 0.25  640 images/s  6.4 k tokens/s  20 GFLOP/s  ETA 0:00:38",
        text,
    )
    assert "checkpoint 20 is damaged [it says]\n" in text
    assert "step 20/400  validation:  loss 0.5  accuracy 0.9375\n" in text
    last = text.rstrip().splitlines()[-1]
    assert "step 400/400" in last and "ETA 0:00:00" in last


def test_live_line_is_drawn_at_most_ten_times_a_second_and_at_the_end(terminal: Terminal) -> None:
    clock = Clock()
    drawn = []
    with Progress(100, batch_size=64, file=terminal, clock=clock) as progress:
        for step in range(1, 101):
            before = terminal.tell()
            progress.record(train(step, step * 0.03))
            drawn.append(terminal.tell() > before)
            clock.now += 0.03
    assert drawn[:9] == [True, False, False, False, True, False, False, False, True]
    assert drawn[-1]
    assert sum(drawn) <= 27


def test_everything_is_told_on_a_narrow_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with Progress(400, batch_size=64, file=terminal, clock=Clock()) as progress:
        progress.record(train(20, 2.0))
    words = " ".join(plain(terminal.getvalue()).split())
    for text in (
        "step 20/400",
        "loss 2.303",
        "640 images/s",
        "6.4 k",
        "tokens/s",
        "20 GFLOP/s",
        "ETA",
        "0:00:38",
    ):
        assert text in words


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_terminal_is_restored_whatever_happens(terminal: Terminal, error: type[BaseException]) -> None:
    import sys

    streams = sys.stdout, sys.stderr
    with pytest.raises(error), Progress(400, batch_size=64, file=terminal, clock=Clock()) as progress:
        progress.record(train(20, 2.0))
        raise error
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again
    assert (sys.stdout, sys.stderr) == streams


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Progress(400, batch_size=64, file=terminal, clock=Clock()) as progress:
        progress.record(train(20, 2.0))
    assert "\x1b" not in terminal.getvalue() and terminal.getvalue().count("\n") == 1


def test_processes_that_are_not_the_first_are_silent(terminal: Terminal) -> None:
    with Progress(400, batch_size=64, file=terminal, primary=False) as progress:
        progress.note("hello")
        progress.record(train(20, 2.0))
        progress.record(evaluation(20))
    assert terminal.getvalue() == ""


def test_standard_output_is_looked_up_when_it_is_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(400, batch_size=64) as progress:
        progress.note("hello")
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 FLOP/s"),
        (0.5, "0.5 FLOP/s"),
        (999.4, "999 FLOP/s"),
        (999.6, "1 kFLOP/s"),
        (12_345, "12.3 kFLOP/s"),
        (1.5e15, "1.5 PFLOP/s"),
        (2e21, "2e+03 EFLOP/s"),
    ],
)
def test_readable(value: float, text: str) -> None:
    assert readable(value, "FLOP/s") == text


def test_readable_keeps_words_apart() -> None:
    assert (readable(12.34, " images/s"), readable(6400, " images/s")) == ("12.3 images/s", "6.4 k images/s")
