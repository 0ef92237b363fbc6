"""The one place that knows private parts of jax: its coordination service's client, what it reads of a cluster, and the
scope that is being traced.

jax offers none of these in public: Orbax and others take the client from the same place. Written for jax 0.10.2.
"""

from __future__ import annotations

from typing import Any

from jax._src import cloud_tpu_init, clusters, distributed, source_info_util, xla_bridge

Cluster = type[clusters.ClusterEnv]


def client() -> Any:
    """The coordination service's client of this process; None in a process that is alone."""
    return distributed.global_state.client


def scope() -> str:
    """The `jax.named_scope`s around what is being traced, "block_00/mlp"; of a loop's body from that on."""
    return str(source_info_util.current_name_stack())


def devices_in_use() -> bool:
    """Whether jax has opened its devices already, after which no other process can be joined."""
    return xla_bridge.backends_are_initialized()


def slurm() -> Cluster | None:
    """What reads the variables of a Slurm step; None outside of one (a batch script's own shell is none)."""
    return clusters.SlurmCluster if clusters.SlurmCluster.is_env_present() else None


def tpu() -> Cluster | None:
    """What reads the metadata of a TPU's workers (TPU VMs) or their environment (GKE); None without a TPU."""
    if not cloud_tpu_init.running_in_cloud_tpu_vm:
        return None
    found = (clusters.GkeTpuCluster, clusters.GceTpuCluster)
    return next((cluster for cluster in found if cluster.is_env_present()), None)
