"""The batch script, with programs in place of Slurm's: its fields and its ways to end. slurm/ has a real Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest


def fields(go, **settings) -> list[str]:
    lines = go("slurm", dry_run=True, **settings).files["job.sh"].splitlines()
    return [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]


def test_fields_that_are_not_asked_for_are_left_to_slurm(go, here):
    assert fields(go) == [
        "job-name=x",
        "nodes=1",
        "ntasks-per-node=1",
        "time=24:00:00",
        f"output={here}/runs/x/slurm-%j.log",
        "open-mode=append",
        "requeue",
        "signal=B:USR1@120",
    ]


def test_every_setting_is_a_field(go, here):
    asked = {
        "name": "n", "nodes": 2, "tasks_per_node": 4, "gpus_per_task": 2, "cpus_per_task": 8, "memory": "64G",
        "time": "1:00:00", "signal_seconds": 60, "partition": "p", "account": "a", "qos": "q", "constraint": "c&d",
        "reservation": "r", "exclude": "e1,e2", "output": "/logs/%j",
        "more": {"sbatch.mail-type": "END", "sbatch.exclusive": ""},
    }  # fmt: skip
    assert fields(go, **asked) == [
        "job-name=n", "nodes=2", "ntasks-per-node=4", "gpus-per-task=2", "cpus-per-task=8", "mem=64G", "time=1:00:00",
        "partition=p", "account=a", "qos=q", "constraint='c&d'", "reservation=r", "exclude=e1,e2", "output=/logs/%j",
        "open-mode=append", "requeue", "signal=B:USR1@60", "mail-type=END", "exclusive",
    ]  # fmt: skip
    script = go("slurm", dry_run=True, **asked).files["job.sh"]
    assert "\nsrun --kill-on-bad-exit=1 --cpus-per-task=8 --gpus-per-task=2 " in script
    assert "\nexport JAX_LOCAL_DEVICE_IDS=0,1\n" in script
    assert fields(go, requeue=False)[-1] == "no-requeue"


@pytest.fixture
def script(go, programs, here):
    programs.add("sbatch", "scontrol")
    go("slurm", here / "run")
    ((_, (found,), _, _),) = programs.calls("sbatch")
    return found


def start(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", script], env=os.environ | {"SLURM_JOB_ID": "7"})


@pytest.mark.parametrize("status", [0, 3, 143])
def test_its_status_is_that_of_the_tasks(script, programs, status):
    programs.add("srun", more=f"sys.exit({status})")
    assert start(script).wait(timeout=60) == status
    assert programs.calls("scontrol") == []


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (0, False)])
def test_before_the_time_limit(script, programs, here, status, requeued):
    """The tasks get SIGTERM and are waited for; where they had not finished, the job is queued again."""
    told = here / "told"
    waits = f"import time\nwhile not os.path.exists({str(told)!r}): time.sleep(0.05)\ntime.sleep(0.3)\n"
    programs.add("srun", more=f"{waits}sys.exit({status})")
    programs.add("scancel", more=f"open({str(told)!r}, 'w')")
    job = start(script)
    while not programs.calls("srun"):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == status
    assert [words for _, words, _, _ in programs.calls("scancel")] == [["--signal=TERM", "7"]]
    assert [words for _, words, _, _ in programs.calls("scontrol")] == [["requeue", "7"]] * requeued
