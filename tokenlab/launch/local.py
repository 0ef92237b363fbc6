"""local: several processes on this machine, on its CPU or its GPUs, as one run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from tokenlab.core.errors import ConfigError
from tokenlab.launch.front import program
from tokenlab.launch.job import Job, Plan, TargetConfig, at_least
from tokenlab.launch.processes import environ

SHARED_FILES = True


@dataclass(frozen=True, kw_only=True)
class Config(TargetConfig):
    """Settings of `--target=local`.

    Attributes:
      processes: how many, >= 1.
      platform: what they compute on; "" leaves the choice to JAX.
      devices: of each process: CPU devices, or GPUs, of which process k gets the k-th lot; 0 leaves them as they are.
      port: of this machine, over which the processes find each other.
      python: the interpreter; "" is the one that launches.
    """

    processes: int = 1
    platform: Literal["", "cpu", "cuda"] = ""
    devices: int = 0
    port: int = 29500
    python: str = ""


def build(config: Config, job: Job) -> Plan:
    """One command a process; each is told its place by flags of `tokenlab train`."""
    at_least("--launch.processes", config.processes, 1)
    at_least("--launch.devices", config.devices, 0)
    if not 0 < config.port < 65536:
        raise ConfigError(f"--launch.port={config.port}: expected a port, 1 to 65535.")
    if config.devices and not config.platform:
        raise ConfigError(
            f"--launch.devices={config.devices} of what? Give --launch.platform=cpu or cuda too."
        )
    if config.platform == "cuda" and config.processes > 1 and not config.devices:
        raise ConfigError(
            "--launch.platform=cuda: every process would take every GPU; give --launch.devices=N, GPUs of each."
        )
    python = program(config.python)
    if "=" in python:
        raise ConfigError(
            f"--launch.python={python}: expected a path without '=', which `env` reads as a variable."
        )
    what = f"{config.processes} processes on this machine"
    devices = config.processes * config.devices if config.devices else None
    job.check_sizes(config.processes, devices, what, "cpu" if config.platform == "cpu" else None)
    code = str(job.snapshot)
    commands = []
    for index in range(config.processes):
        place = (
            f"--coordinator=localhost:{config.port}",
            f"--process-id={index}",
            f"--num-processes={config.processes}",
        )
        words = job.command(python, code) + (place if config.processes > 1 else ())
        commands.append(environ(words, _devices(config, index) | job.environment(code)))
    several = config.processes > 1
    return Plan({}, tuple(commands), together=True, port=config.port if several else None)


def _devices(config: Config, index: int) -> dict[str, str]:
    found = {"JAX_PLATFORMS": config.platform} if config.platform else {}
    if config.devices and config.platform == "cpu":
        flag = f"--xla_force_host_platform_device_count={config.devices}"
        found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    elif config.devices:
        lot = range(index * config.devices, (index + 1) * config.devices)
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, lot))
    return found
