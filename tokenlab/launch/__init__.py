"""Launch: one training command on this machine, under Slurm, on TPU VMs or on Kubernetes.

A target is a file here that offers `Config`, its settings, `build(config, job) -> Plan`, the text of what is to be run,
and `SHARED_FILES`, whether its machines see the files of this one. `run` is the front of them all: it prints that text,
keeps it in the run folder beside the code, and runs it.
"""

from __future__ import annotations

from tokenlab.launch.front import run, targets
from tokenlab.launch.job import Job, Plan

__all__ = ["Job", "Plan", "run", "targets"]
