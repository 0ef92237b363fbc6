"""Real processes, not jax: their output, what happens when one fails, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenlab.core.errors import ConfigError
from tokenlab.launch import processes

ROOT = Path(__file__).resolve().parents[2]
PYTHON = (sys.executable, "-IS", "-c")
WAITS = """
import os, signal, time
def told(number, frame):  # print is no use here: the signal may come while it is at work
    os.write(1, b"told %d\\n" % number)
    os._exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, told)
os.write(1, b"ready\\n")
time.sleep(60)
"""


def test_two_processes_print_line_by_line(capsys):
    program = "import sys; print('one'); print('é', sys.argv[1], file=sys.stderr); sys.stdout.write('no end')"
    assert processes.together([(*PYTHON, program, str(k)) for k in range(2)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == ["[0] no end", "[0] one", "[0] é 0", "[1] no end", "[1] one", "[1] é 1"]


def test_one_process_has_no_prefix(capsys):
    assert processes.together([(*PYTHON, "print('one')")]) == 0
    assert capsys.readouterr().out == "one\n"


def test_one_that_fails_stops_the_others(capsys):
    begun = time.monotonic()
    fails = "import sys, time; time.sleep(1); sys.exit(7)"
    assert processes.together([(*PYTHON, WAITS), (*PYTHON, fails)]) == 7
    found = capsys.readouterr()
    assert "[0] told 15" in found.out
    assert found.err == "tokenlab: process 1 ended with status 7; the others are stopped\n"
    assert time.monotonic() - begun < 30


def test_one_that_does_not_stop_is_killed():
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(60)"
    )
    fails = "import os, signal, time; time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)"
    begun = time.monotonic()
    assert processes.together([(*PYTHON, deaf), (*PYTHON, fails)], grace=0.2) == 128 + 9
    assert time.monotonic() - begun < 40


def test_one_that_ends_well_leaves_the_others_alone():
    assert processes.together([(*PYTHON, ""), (*PYTHON, "import time; time.sleep(0.5)")]) == 0


def test_a_program_that_is_missing_ends_those_that_run():
    with pytest.raises(ConfigError, match="/no/such/program cannot be run: No such file"):
        processes.together([(*PYTHON, WAITS), ("/no/such/program",)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_all(number, tmp_path):
    """Of the launcher itself, as a scheduler or a user would send them."""
    commands = [(*PYTHON, WAITS)] * 2
    code = f"import sys\nfrom tokenlab.launch import processes\nsys.exit(processes.together({commands!r}))"
    launcher = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with launcher:
        try:
            ready = [launcher.stdout.readline() for _ in range(2)]
            assert sorted(ready) == ["[0] ready\n", "[1] ready\n"]
            launcher.send_signal(number)
            rest = launcher.stdout.read()
        finally:
            launcher.kill()
    assert sorted(rest.splitlines()) == [f"[0] told {int(number)}", f"[1] told {int(number)}"]
    assert launcher.returncode == 128 + number


def test_local_launch_of_two(go, here, programs, capsys):
    """The whole of a launch: a snapshot, two processes that are told their places, and their output."""
    programs.add("python", more="print(*sys.argv[-3:])")
    go("local", here / "run", processes=2, python=programs.folder / "python")
    assert [words[-3:] for _, words, _, _ in sorted(programs.calls())] == [
        ["--coordinator=localhost:29500", f"--process-id={k}", "--num-processes=2"] for k in range(2)
    ]
    out = capsys.readouterr().out
    assert "[0] --coordinator=localhost:29500 --process-id=0 --num-processes=2\n" in out
    assert "[1] --coordinator=localhost:29500 --process-id=1 --num-processes=2\n" in out


def test_devices_of_local_processes(go):
    def variables(**settings):
        plan = go("local", dry_run=True, **settings)
        return [
            [word for word in words if word.startswith(("JAX", "XLA", "CUDA"))] for words in plan.commands
        ]

    assert variables() == [[]]
    assert variables(processes=2, platform="cuda", devices=2) == [
        ["JAX_PLATFORMS=cuda", "CUDA_VISIBLE_DEVICES=0,1"],
        ["JAX_PLATFORMS=cuda", "CUDA_VISIBLE_DEVICES=2,3"],
    ]
    ((platform, flags),) = variables(platform="cpu", devices=4)
    assert platform == "JAX_PLATFORMS=cpu"
    assert flags.endswith("--xla_force_host_platform_device_count=4")


def test_a_port_in_use_is_told_before_anything_starts(go, here, programs):
    import socket

    programs.add("python")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of this machine is in use: give another one"):
            go("local", here / "run", processes=2, port=port, python=programs.folder / "python")
    assert programs.calls() == []
