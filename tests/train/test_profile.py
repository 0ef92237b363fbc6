"""Profiles: which steps are traced, what the summary says, and that training is the same with and without."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tokenlab.core.errors import ConfigError
from tokenlab.train import loop, profile
from tokenlab.train.config import default_config
from tokenlab.train.profile import Instruction, Profiler, aggregate, instructions, render, scope, window

PROGRAM = {
    "dot.1": Instruction("dot", "jit(step)/jvp(block_00)/mlp/dot_general"),
    "dot.2": Instruction("dot", "jit(step)/jvp(block_11)/mlp/dot_general"),
    "dot.3": Instruction("fusion", "jit(step)/transpose(jvp(block_00))/mlp/dot_general"),
    "copy.1": Instruction("copy", ""),
    "while.1": Instruction("while", "jit(step)/jvp(while)"),
}


def config(**changes):
    found = default_config()
    found.update(steps=6, batch_size=16, log_every=2, eval_every=3)
    found.model.size = "nano/4"
    found.update(changes)
    return found


def event(name: str, duration: float, pid: int = 1, tid: int = 1, **more) -> dict:
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": 0, "dur": duration, **more}


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(step)/jvp(block_00)/mlp/MLP/up/up/dot_general", "forward block_*/mlp/MLP/up/dot_general"),
        ("jit(step)/transpose(jvp(block_03))/attention/maps/mul", "backward block_*/attention/maps/mul"),
        ("jit(f)/jvp(jit(f))/while/body/closed_call/block_00/dot_general", "forward block_*/dot_general"),
        (
            "jit(f)/transpose(jvp())/while/body/checkpoint/rematted_computation/block_00/tanh",
            "recompute block_*/tanh",
        ),
        ("jit(f)/jvp(block_00)/maps/bgqd,bgmd->bgqm/dot_general", "forward block_*/maps/dot_general"),
        ("jit(step)/jvp(block_00)/jit(compute)/mlp/mul", "forward block_*/mlp/mul"),  # from JAX 0.12 on
        ("jit(step)/add", "add"),
        ("jit(f)/block_00/jit(softmax)/exp;jit(f)/block_00/div", "block_*/exp"),
        ("jit(f)/head/conv_1/dot_general", "head/conv_1/dot_general"),
        ("", ""),
    ],
)
def test_scopes(op_name: str, expected: str) -> None:
    assert scope(op_name) == expected


def test_blocks_add_up_and_loops_do_not_count_twice() -> None:
    events = [
        event("dot.1", 3000),
        event("thunk", 50, args={"hlo_op": "dot.2"}),
        event("dot.3", 1000),
        event("copy.1", 500),
        event("while.1", 9000),
        event("end: dot.1", 7),
        event("not of the program", 9999),
        {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "a thread"}},
    ]
    lines = aggregate(events, PROGRAM, steps=2)
    assert [(line.operation, line.milliseconds, line.count) for line in lines] == [
        ("forward block_*/mlp/dot_general", pytest.approx(1.525), 1.0),
        ("backward block_*/mlp/dot_general", pytest.approx(0.5), 0.5),
        ("(copy)", pytest.approx(0.25), 0.5),
    ]


def test_a_device_that_shows_an_instruction_in_two_lanes_is_read_once() -> None:
    lane = {"ph": "M", "pid": 7, "tid": 2, "name": "thread_name", "args": {"name": "XLA Ops"}}
    events = [lane, event("dot.1", 100, 7, 1), event("dot.1", 100, 7, 2), event("dot.1", 30, 8, 1)]
    (line,) = aggregate(events, PROGRAM, steps=1)
    assert line.milliseconds == pytest.approx(0.13)


def test_instructions_of_another_program_are_left_out() -> None:
    events = [
        event("dot.1", 100, args={"hlo_op": "dot.1", "hlo_module": "jit_train_step"}),
        event("dot.1", 900, args={"hlo_op": "dot.1", "hlo_module": "jit_eval_step"}),
        event("dot.1", 30),  # does not say
    ]
    (line,) = aggregate(events, PROGRAM, steps=1, module="jit_train_step")
    assert line.milliseconds == pytest.approx(0.13)


def test_the_summary_names_the_ten_longest() -> None:
    lines = [profile.Line(f"op{number}", 20.0 - number, 1.0) for number in range(12)]
    text = render(lines, 3)
    assert "op9" in text and "op10" not in text
    total = sum(line.milliseconds for line in lines)
    assert f"{total:.2f} ms a step" in text and f"{20 / total:.1%}" in text
    assert render([], 3) == "No instruction of the compiled program is in the trace.\n"


def test_instructions_of_a_compiled_program() -> None:
    def f(x):
        with jax.named_scope("head"):
            return jnp.tanh(x @ x), jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ y), x)

    found = instructions(jax.jit(f).lower(jnp.ones((64, 64))).compile().as_text())
    assert any(scope(each.op_name) == "head/dot_general" for each in found.values())
    assert "while" in {each.opcode for each in found.values()}  # its shape is a tuple


@pytest.mark.parametrize(
    ("start", "stop", "changes", "expected"),
    [
        (0, 100, [], range(2, 5)),
        (0, 5, [0], range(2, 5)),
        (40, 100, [0, 50], range(42, 45)),
        (0, 100, [0, 4, 8], range(10, 13)),  # the first two programs do not last long enough
        (0, 100, [100], range(2, 5)),
    ],
)
def test_the_steps_that_are_traced_are_of_one_program(start, stop, changes, expected) -> None:
    assert window(start, stop, changes) == expected


@pytest.mark.parametrize(("start", "stop", "changes"), [(0, 4, []), (96, 100, []), (0, 8, [4])])
def test_too_few_steps(start, stop, changes) -> None:
    with pytest.raises(ConfigError, match=f"the run has {stop - start} steps left"):
        window(start, stop, changes)


def test_a_trace_that_was_begun_is_ended(tmp_path) -> None:
    with contextlib.suppress(RuntimeError), Profiler(tmp_path, contextlib.nullcontext) as profiler:
        profiler.plan(0, 10, [])
        profiler.before(2, [])
        raise RuntimeError("a step fails")
    with profile.trace(tmp_path):  # would fail if one were open
        pass


def quality(workdir: Path) -> list[dict]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in records]


@pytest.mark.slow
def test_training_is_the_same_with_a_profile(tmp_path) -> None:
    wanted = config()
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    loop.run(wanted, plain)
    loop.run(wanted, profiled, profile=True)
    assert quality(profiled) == quality(plain) != []
    assert not (plain / "profile").exists()
    summary = (profiled / "profile" / profile.SUMMARY).read_text()
    assert "means of 3 steps" in summary and "backward block_*/" in summary
    (folder,) = (profiled / "profile" / "plugins" / "profile").iterdir()
    (trace,) = folder.glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    programs = {event["args"]["hlo_module"] for event in events if "hlo_module" in event.get("args", {})}
    assert {"jit_train_step", "jit_eval_step"} <= programs  # one was evaluated between the steps
    assert (folder / "perfetto_trace.json.gz").stat().st_size > 1000 and list(folder.glob("*.xplane.pb"))


def test_too_short_a_run_is_told_before_the_workdir_is_touched(tmp_path) -> None:
    with pytest.raises(ConfigError, match="the run has 4 steps left"):
        loop.run(config(steps=4), tmp_path / "w", profile=True)
    assert not (tmp_path / "w").exists()
