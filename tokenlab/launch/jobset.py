"""jobset: a manifest for any Kubernetes cluster that has JobSet: TPU slices, GPUs or CPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from tokenlab.core.errors import ConfigError
from tokenlab.launch.accelerators import Slice, tpu_slice
from tokenlab.launch.image import DOCKERFILE, ImageConfig, build_image
from tokenlab.launch.job import IMAGE_CODE, Job, Plan, at_least
from tokenlab.launch.tpu_vm import upload

SHARED_FILES = False
MANIFEST = "jobset.yaml"
WORKERS = "workers"  # the one group of pods
PORT = 8476  # of the first pod, over which the others find it
TPU_PORT = 8471
SEPARATE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
KEEP = f'mkdir -p "$1" && cp -Rn {IMAGE_CODE}/. "$1"'  # the snapshot, into a run folder on a volume
QUEUE = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True, kw_only=True)
class Config(ImageConfig):
    """Settings of `--target=jobset`: a topology of TPUs, or a number of pods.

    Attributes:
      topology: kind and shape of a TPU slice: v5e:4x4, v5p:4x4x8; "" where there are no TPUs.
      slices: how many of them, >= 1.
      pods: processes, where there are no TPUs, >= 1.
      gpus: of each of these pods; 0 is none.
      cpus: that each pod asks for, such as "16" or "500m"; "" asks for none.
      memory: that each pod asks for, such as "64Gi"; "" asks for none.
      node_selector: labels of the nodes, `--launch.node_selector.KEY=TEXT`.
      claim: PersistentVolumeClaim that all pods can write to, for a workdir below `mount`; "" is none.
      mount: where the claim is mounted.
      namespace: of the manifest.
      queue: of Kueue; "" is none.
      service_account: of the pods; "" is the namespace's default.
      max_restarts: how often all begin again after a pod was taken away or failed, >= 0.
      grace_seconds: that a pod has to save its state, >= 1.
    """

    topology: str = ""
    slices: int = 1
    pods: int = 1
    gpus: int = 0
    cpus: str = ""
    memory: str = ""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    claim: str = ""
    mount: str = "/runs"
    namespace: str = "default"
    queue: str = ""
    service_account: str = ""
    max_restarts: int = 20
    grace_seconds: int = 120


def build(config: Config, job: Job) -> Plan:
    """Build and push the image, keep the snapshot in the run folder, apply the manifest."""
    for name in ("slices", "pods", "grace_seconds"):
        at_least(f"--launch.{name}", getattr(config, name), 1)
    for name in ("gpus", "max_restarts"):
        at_least(f"--launch.{name}", getattr(config, name), 0)
    for name in ("namespace", "claim", "service_account", "queue"):
        if getattr(config, name) and not re.fullmatch(
            r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", getattr(config, name)
        ):
            raise ConfigError(
                f"--launch.{name}={getattr(config, name)}: expected the name of a Kubernetes object."
            )
    for name in ("cpus", "memory"):
        if not re.fullmatch(r"([0-9.]+[A-Za-z]{0,2})?", getattr(config, name)):
            raise ConfigError(
                f"--launch.{name}={getattr(config, name)}: expected a quantity such as 16, 500m or 64Gi."
            )
    tpu = tpu_slice("--launch.topology", config.topology) if config.topology else None
    if tpu is not None and (config.pods != 1 or config.gpus):
        raise ConfigError(
            "--launch.topology says how many pods and chips there are: leave out pods and gpus."
        )
    if tpu is None and config.slices != 1:
        raise ConfigError(
            f"--launch.slices={config.slices} of what? Give --launch.topology too, such as v5e:4x4."
        )
    if not (config.claim and job.workdir.startswith(f"{config.mount.rstrip('/')}/")):
        job.check_remote(
            "what a pod writes to its own disk is gone when it restarts (or give --launch.claim=NAME, a volume, and a "
            f"workdir below {config.mount})"
        )
    if tpu is not None:
        what = f"{config.slices} x {config.topology}"
        job.check_sizes(config.slices * tpu.hosts, config.slices * tpu.chips, what, tpu.device_kind)
    else:
        job.check_sizes(config.pods, config.pods * config.gpus or None, f"{config.pods} pods")
    image, dockerfile, making = build_image(config, job, "tpu" if tpu else "gpu" if config.gpus else "")
    manifest = yaml.dump(
        _manifest(config, job, tpu, image), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6
    )
    keep = (upload(job),) if job.remote else ()
    apply = ("kubectl", "apply", f"--filename={job.snapshot / MANIFEST}")
    return Plan(
        {DOCKERFILE: dockerfile, MANIFEST: manifest},
        (*keep, *making, apply),
        notes=(f"afterwards: kubectl --namespace={config.namespace} get jobset/{job.name}",),
    )


def _manifest(config: Config, job: Job, tpu: Slice | None, image: str) -> dict[str, Any]:
    pods = tpu.hosts if tpu else config.pods
    labels = {"labels": {QUEUE: config.queue}} if config.queue else {}
    notes = {"annotations": {SEPARATE: "cloud.google.com/gke-nodepool"}} if tpu else {}
    work = {
        "backoffLimit": 0,  # a pod that fails fails the job, and JobSet begins all of them again
        "completionMode": "Indexed",
        "parallelism": pods,
        "completions": pods,
        "template": {"spec": _pod(config, job, tpu, image)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, "namespace": config.namespace, **labels, **notes},
        "spec": {
            "failurePolicy": {"maxRestarts": config.max_restarts},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [
                {"name": WORKERS, "replicas": config.slices, "template": {"spec": work}},
            ],
        },
    }


def _pod(config: Config, job: Job, tpu: Slice | None, image: str) -> dict[str, Any]:
    words = job.command("python3", IMAGE_CODE)
    ports = [TPU_PORT] if tpu else [PORT] if config.pods > 1 else []
    chips = {"google.com/tpu": tpu.chips // tpu.hosts} if tpu else {}
    asked = {"cpu": config.cpus, "memory": config.memory, **chips, "nvidia.com/gpu": config.gpus}
    amounts = {name: str(amount) for name, amount in asked.items() if amount}
    limits = {name: amount for name, amount in amounts.items() if name != "cpu"}
    resources = (
        {"resources": {"requests": amounts, **({"limits": limits} if limits else {})}} if amounts else {}
    )
    command = [_literal(word) for word in words]
    if not tpu and config.pods > 1:  # of a TPU, JAX is told its place by GKE
        first = f"{job.name}-{WORKERS}-0-0.{job.name}"
        place = (f"--coordinator={first}:{PORT}", f"--num-processes={config.pods}")
        command += [*map(_literal, place), "--process-id=$(JOB_COMPLETION_INDEX)"]
    selector = dict(config.node_selector)
    if tpu:
        selector["cloud.google.com/gke-tpu-accelerator"] = tpu.kind.gke
        selector["cloud.google.com/gke-tpu-topology"] = tpu.topology
    mounts = {"volumeMounts": [{"name": "runs", "mountPath": config.mount}]} if config.claim else {}
    container = {
        "name": "train",
        "image": image,
        "command": command,
        "env": [
            {"name": name, "value": _literal(text)} for name, text in job.environment(IMAGE_CODE).items()
        ],
        **({"ports": [{"containerPort": port} for port in ports]} if ports else {}),
        **resources,
        **mounts,
    }
    keep = {
        "name": "keep",
        "image": image,
        "command": [
            "sh",
            "-c",
            _literal(KEEP),
            "keep",
            _literal(f"{job.workdir}/launch/{job.snapshot.name}"),
        ],
        **mounts,
    }
    volume = {"name": "runs", "persistentVolumeClaim": {"claimName": config.claim}}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.grace_seconds,
        **({"serviceAccountName": config.service_account} if config.service_account else {}),
        **({"nodeSelector": selector} if selector else {}),
        **({} if job.remote else {"initContainers": [keep]}),
        "containers": [container],
        **({"volumes": [volume]} if config.claim else {}),
    }


def _literal(text: str) -> str:
    """Text in which Kubernetes replaces nothing: it reads `$(NAME)`, and `$$` as one `$`."""
    return text.replace("$", "$$")


class _Dumper(yaml.SafeDumper):
    """Quotes all text but plain words: readers differ in what else is text, 1e3 for one."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = re.fullmatch(r"[A-Za-z/][\w./-]+", text, flags=re.ASCII) and text.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_WORDS = ("yes", "no", "on", "off", "true", "false", "null")
_Dumper.add_representer(str, _text)
