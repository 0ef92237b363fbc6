"""A real Slurm of one node runs what `tokenlab launch --target=slurm` hands to it: two tasks, one run.

Slurm is started for the test in a folder of its own, and installed where it is missing and that is possible.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.slurm.cluster import cluster, missing
from tokenlab import cli, launch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
STEPS = 60
CHANGES = {
    "model.size": "nano/2",
    "model.stack": "block + keep(0.5, by=cls) + block",
    "steps": f"{STEPS}",
    "batch_size": "32",
    "log_every": "1",
    "eval_every": f"{STEPS}",
    "checkpoint_every": "5",
}
DISTRIBUTED = any(flag.name == "coordinator" for flag in cli.COMMANDS["train"].flags)
STAND_IN = """\
#!{python}
import sys
import jax
from tokenlab import cli

if __name__ == "__main__":
    jax.distributed.initialize()  # which reads SLURM_PROCID and its like
    sys.exit(cli.main(sys.argv[sys.argv.index("tokenlab.cli") + 1 :]))
"""
"""In place of the interpreter as long as `tokenlab train` does not look for its place by itself."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := missing():
        pytest.skip(f"no Slurm: {reason}")
    with cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture(scope="module")
def submit(slurm, tmp_path_factory):
    """Launch; the number of the job."""
    python = tmp_path_factory.mktemp("bin") / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)

    def submitted(workdir: Path) -> str:
        interpreter = sys.executable if DISTRIBUTED else str(python)
        settings = {"tasks_per_node": "2", "time": "00:30:00", "python": interpreter}
        launch.run("slurm", "configs/quickstart.py", str(workdir), changes=CHANGES, settings=settings)
        return max(call("squeue", "--noheader", "--states=all", "--format=%i").split(), key=int)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, value in slurm.items():
            patch.setenv(name, value)
        patch.setenv("XLA_FLAGS", "--xla_cpu_parallel_codegen_split_count=1")  # one device a task
        # Both have to have compiled before gloo is out of patience.
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield submitted


def call(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def facts(job: str) -> dict[str, str]:
    words = call("scontrol", "--oneliner", "show", "job", job).split()
    return dict(word.partition("=")[::2] for word in words if "=" in word)


def log(workdir: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-4000:] for path in workdir.glob("slurm-*.log"))


def finish(job: str, workdir: Path, seconds: float = 900.0) -> dict[str, str]:
    """Wait for a job, in the queue as short as may be; what Slurm says of it."""
    end = time.monotonic() + seconds
    while (found := facts(job))["JobState"] not in (
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
    ):
        if found["JobState"] == "PENDING":  # a job that is queued again has to wait for two minutes
            time.sleep(10)  # and its script, which asked for that, has to have ended
            subprocess.run(
                ["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True, check=False
            )
        assert time.monotonic() < end, f"{found}\n{log(workdir)}"
        time.sleep(0.5)
    assert found["JobState"] == "COMPLETED", f"{found}\n{log(workdir)}"
    return found


def steps(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def until(step: int, workdir: Path) -> None:
    end = time.monotonic() + 900
    while steps(workdir) < step:
        assert time.monotonic() < end, log(workdir)
        time.sleep(0.1)


def losses(workdir: Path) -> dict[int, float]:
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["split"] == "train"}


@pytest.fixture(scope="module")
def whole(submit, tmp_path_factory) -> dict[int, float]:
    """The losses of a run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    job = submit(workdir)
    assert finish(job, workdir)["Restarts"] == "0"
    assert facts(job)["NumTasks"] == "2"
    return losses(workdir)


def test_two_tasks_run_to_completion(whole):
    assert sorted(whole) == list(range(1, STEPS + 1))


def test_a_job_that_is_requeued_goes_on(submit, whole, tmp_path):
    """`scontrol requeue` in mid-training: the same losses as without."""
    workdir = tmp_path / "run with a space"
    job = submit(workdir)
    until(12, workdir)
    call("scontrol", "requeue", job)
    assert finish(job, workdir)["Restarts"] == "1"
    assert losses(workdir) == whole


def test_before_the_time_limit_it_saves_and_is_queued_again(submit, whole, tmp_path):
    """The signal that Slurm sends before the limit, here by hand."""
    workdir = tmp_path / "run"
    job = submit(workdir)
    until(12, workdir)
    call("scancel", "--batch", "--signal=USR1", job)
    assert finish(job, workdir)["Restarts"] == "1"
    assert losses(workdir) == whole
