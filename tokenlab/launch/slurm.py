"""slurm: a batch job of Slurm, one task a process, that goes on by itself after preemption and the time limit."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenlab.core.errors import ConfigError
from tokenlab.launch.front import program
from tokenlab.launch.job import Job, Plan, TargetConfig, at_least, check_line, exports, shell

SHARED_FILES = True
SCRIPT = "job.sh"

BODY = """\
set -uo pipefail
{exports}cd -- {folder} || exit

# Before the time limit Slurm sends USR1 to this script. The tasks then get SIGTERM: they save and end, and the job is
# queued again. Of preemption and of nodes that fail Slurm takes care itself (--requeue).
again=
trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

{srun} {command} &
step=$!
wait "$step"
status=$?
if [[ $again && $status -gt 128 ]]; then  # it was the signal that ended the wait
  wait "$step"
  status=$?
fi
if [[ $again && $status -ne 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


@dataclass(frozen=True, kw_only=True)
class Config(TargetConfig):
    """Settings of `--target=slurm`. The workdir and the interpreter must be on a file system that all nodes share.

    Attributes:
      nodes: how many, >= 1.
      tasks_per_node: processes on each node, >= 1.
      gpus_per_task: GPUs of each process; 0 asks for none.
      cpus_per_task: CPUs of each process; 0 leaves it to Slurm.
      memory: of each node, such as "64G"; "" leaves it to Slurm.
      time: limit, as Slurm writes it: "12:00:00", "2-00:00:00".
      signal_seconds: before the limit at which the run saves and the job is queued again, 1 to 65535.
      requeue: go on after preemption, a node's failure and the time limit.
      partition: where to run; "" is Slurm's default.
      account: to charge; "" is Slurm's default.
      qos: quality of service; "" is Slurm's default.
      constraint: features of the nodes.
      reservation: to run in.
      exclude: nodes to leave out.
      output: file for what the tasks print, `%j` being the job's number; "" is slurm-%j.log in the run folder.
      sbatch: any other field of sbatch, `--launch.sbatch.mail-type=END`; one without a value is `=`.
      python: the interpreter; "" is the one that launches.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_task: int = 0
    cpus_per_task: int = 0
    memory: str = ""
    time: str = "24:00:00"
    signal_seconds: int = 120
    requeue: bool = True
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    exclude: str = ""
    output: str = ""
    sbatch: Mapping[str, str] = field(default_factory=dict)
    python: str = ""


def build(config: Config, job: Job) -> Plan:
    """The script of the job, and the command that hands it to Slurm. Processes are told their place by SLURM_*."""
    at_least("--launch.nodes", config.nodes, 1)
    at_least("--launch.tasks_per_node", config.tasks_per_node, 1)
    at_least("--launch.gpus_per_task", config.gpus_per_task, 0)
    at_least("--launch.cpus_per_task", config.cpus_per_task, 0)
    if not 0 < config.signal_seconds < 65536:
        raise ConfigError(f"--launch.signal_seconds={config.signal_seconds}: expected 1 to 65535 seconds.")
    tasks = config.nodes * config.tasks_per_node
    what = f"{config.nodes} x {config.tasks_per_node} tasks"
    job.check_sizes(tasks, tasks * config.gpus_per_task if config.gpus_per_task else None, what)
    fields = _fields(config, job)
    for name, value in config.sbatch.items():
        if not re.fullmatch(r"[a-z][a-z-]*", name):
            raise ConfigError(
                f"--launch.sbatch.{name}: expected a field of sbatch by its long name, such as mail-type."
            )
        if name in fields:
            own = "output" if name == "output" else name.replace("-", "_")
            raise ConfigError(
                f"--launch.sbatch.{name}={value}: that field has a setting, or follows from one; see --launch.{own}."
            )
        fields[name] = check_line(f"--launch.sbatch.{name}", value)
    lines = "".join(f"#SBATCH --{name}{_value(value)}\n" for name, value in fields.items())
    code = str(job.snapshot)
    environment = job.environment(code)
    # A step does not take the CPUs of a task from its job (Slurm 22.05).
    step = ["srun", "--kill-on-bad-exit=1"]
    if config.cpus_per_task:
        step.append(f"--cpus-per-task={config.cpus_per_task}")
    if config.gpus_per_task:
        # Slurm lets each task see its own GPUs, numbered from 0; JAX would take the one of the task's own number.
        step.append(f"--gpus-per-task={config.gpus_per_task}")
        environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(config.gpus_per_task)))
    body = BODY.format(
        exports=exports(environment),
        srun=shell(step),
        folder=shlex.quote(os.getcwd()),
        command=shell(job.command(program(config.python), code)),
    )
    return Plan(
        {SCRIPT: f"#!/bin/bash\n{lines}{body}"},
        (("sbatch", str(job.snapshot / SCRIPT)),),
        notes=(
            "afterwards: squeue --me says where the job stands; scontrol requeue JOB begins it again, and it goes on "
            "from its last checkpoint",
        ),
    )


def _fields(config: Config, job: Job) -> dict[str, str]:
    """Field of sbatch -> value, "" for one that has none."""
    asked = {
        "gpus-per-task": config.gpus_per_task,
        "cpus-per-task": config.cpus_per_task,
        "mem": config.memory,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "reservation": config.reservation,
        "exclude": config.exclude,
    }
    folder = str(job.snapshot.parent if job.remote else job.snapshot.parent.parent).replace("%", "%%")
    output = check_line("the path of the log", config.output or f"{folder}/slurm-%j.log")
    return {
        "job-name": job.name,
        "nodes": str(config.nodes),
        "ntasks-per-node": str(config.tasks_per_node),
        **{name: str(value) for name, value in asked.items() if value},
        "output": output,
        "open-mode": "append",
        **(
            {"requeue": "", "signal": f"B:USR1@{config.signal_seconds}"}
            if config.requeue
            else {"no-requeue": ""}
        ),
    }


def _value(text: str) -> str:
    return f"={shlex.quote(text)}" if text else ""
