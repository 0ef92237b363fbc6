"""gke: TPU slices of a GKE cluster, by way of XPK, Google's command line for such clusters."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from tokenlab.core.errors import ConfigError
from tokenlab.launch.accelerators import tpu_slice
from tokenlab.launch.image import DOCKERFILE, ImageConfig, build_image
from tokenlab.launch.job import IMAGE_CODE, Job, Plan, at_least, one_line
from tokenlab.launch.tpu_vm import upload

SHARED_FILES = False
LONGEST_NAME = 39
"""Letters of a workload's name that XPK takes."""
PRIORITIES = ("very-low", "low", "medium", "high", "very-high")


@dataclass(frozen=True, kw_only=True)
class Config(ImageConfig):
    """Settings of `--target=gke`.

    Attributes:
      project: of Google Cloud.
      zone: of the cluster's TPUs, such as us-east5-a.
      cluster: made with `xpk cluster create`.
      topology: kind and shape of a slice: v5e:4x4, v5p:4x4x8.
      slices: how many, >= 1.
      priority: in the cluster's queue.
      max_restarts: how often all begin again after a pod was taken away or failed, >= 0.
      grace_seconds: that a pod has to save its state, >= 1.
    """

    project: str
    zone: str
    cluster: str
    topology: str
    slices: int = 1
    priority: str = "medium"
    max_restarts: int = 20
    grace_seconds: int = 120


def build(config: Config, job: Job) -> Plan:
    """Build and push the image, keep the snapshot in the run folder, create the workload."""
    at_least("--launch.slices", config.slices, 1)
    at_least("--launch.max_restarts", config.max_restarts, 0)
    at_least("--launch.grace_seconds", config.grace_seconds, 1)
    if config.priority not in PRIORITIES:
        raise ConfigError(f"--launch.priority={config.priority}: expected one of {', '.join(PRIORITIES)}.")
    tpu = tpu_slice("--launch.topology", config.topology)
    job.check_remote("what a pod writes to its own disk is gone when it restarts")
    what = f"{config.slices} x {config.topology}"
    job.check_sizes(config.slices * tpu.hosts, config.slices * tpu.chips, what, tpu.device_kind)
    image, dockerfile, making = build_image(config, job, "tpu")
    # XPK puts the command into a block of YAML as it is, and Kubernetes replaces $(NAME) in it before bash reads it.
    environment = (f"{name}={one_line(text)}" for name, text in job.environment(IMAGE_CODE).items())
    words = (one_line(word) for word in job.command("python3", IMAGE_CODE))
    restarts = ("--restart-on-user-code-failure",) if config.max_restarts else ()
    workload = (
        "xpk",
        "workload",
        "create",
        f"--workload={job.name}",
        f"--cluster={config.cluster}",
        f"--project={config.project}",
        f"--zone={config.zone}",
        f"--tpu-type={tpu.accelerator_type}",
        f"--num-slices={config.slices}",
        f"--docker-image={image}",
        f"--priority={config.priority}",
        f"--max-restarts={config.max_restarts}",
        *restarts,
        f"--termination-grace-period-seconds={config.grace_seconds}",
        f"--command={' '.join(('env', *environment, *words))}",
    )
    there = (f"--cluster={config.cluster}", f"--project={config.project}", f"--zone={config.zone}")
    after = " ".join(map(shlex.quote, ("xpk", "workload", "list", *there)))
    return Plan({DOCKERFILE: dockerfile}, (upload(job), *making, workload), notes=(f"afterwards: {after}",))
