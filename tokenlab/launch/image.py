"""The container image of a launch on Kubernetes: the snapshot, on an image that has what it needs."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tokenlab.core.errors import ConfigError
from tokenlab.launch.job import IMAGE_CODE, Job, TargetConfig
from tokenlab.launch.snapshot import requirements

DOCKERFILE = "Dockerfile"


@dataclass(frozen=True, kw_only=True)
class ImageConfig(TargetConfig):
    """Settings of every target that runs in containers.

    Attributes:
      image: repository to push the image to, without a tag: the tag is the snapshot's name.
      base_image: what it is built on: has Python, 3.11 or newer, and pip.
      docker: the program that builds and pushes it.
    """

    image: str
    base_image: str = "python:3.11-slim"
    docker: str = "docker"


def build_image(config: ImageConfig, job: Job, extra: str) -> tuple[str, str, tuple[tuple[str, ...], ...]]:
    """The image's name, its Dockerfile, and the commands that build and push it.

    Args:
      config: the settings.
      job: what is launched.
      extra: of the package, for the accelerator: "tpu", "gpu", or "" for none.

    Raises:
      ConfigError: a name that no image can have.
    """
    if (
        not re.fullmatch(r"[a-z0-9][a-z0-9._:/-]*[a-z0-9]", config.image)
        or ":" in config.image.rpartition("/")[2]
    ):
        raise ConfigError(
            f"--launch.image={config.image}: expected a repository without a tag, such as "
            "europe-west4-docker.pkg.dev/PROJECT/REPOSITORY/tokenlab."
        )
    if not re.fullmatch(r"[\w][\w.:/@-]*", config.base_image, flags=re.ASCII):
        raise ConfigError(f"--launch.base_image={config.base_image}: expected the name of an image.")
    name = f"{config.image}:{job.snapshot.name}"
    more = "".join(f" {shlex.quote(line)}" for line in requirements(extra)) if extra else ""
    text = (
        f"FROM {config.base_image}\n"
        f"COPY requirements.txt {IMAGE_CODE}/requirements.txt\n"
        f"RUN python3 -m pip install --no-cache-dir -r {IMAGE_CODE}/requirements.txt{more}\n"
        f"COPY . {IMAGE_CODE}\n"
        f"WORKDIR {IMAGE_CODE}\n"
    )
    folder = str(job.snapshot)
    return name, text, ((config.docker, "build", f"--tag={name}", folder), (config.docker, "push", name))
