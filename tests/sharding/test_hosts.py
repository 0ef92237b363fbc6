"""Where a process finds its place in a job: flags, environment, Slurm, a TPU's metadata, or nowhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from tokenlab.core.errors import HostsError
from tokenlab.sharding import hosts
from tokenlab.sharding.hosts import Place, find, joined

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
KUBERNETES = {
    "JAX_COORDINATOR_ADDRESS": "run-0.run:8476",
    "JAX_NUM_PROCESSES": "4",
    "JOB_COMPLETION_INDEX": "2",
}


def test_a_process_on_its_own() -> None:
    assert find(environment={}) is None
    assert find(num_processes=1, environment=SLURM) is None
    assert find(environment={**SLURM, "SLURM_NTASKS": "1"}) is None
    with joined(None):
        assert jax.process_count() == 1


def test_flags() -> None:
    assert find("host:80", 2, 1, {}) == Place("host:80", 1, 2, "the command line")
    assert find("host:80", 2, 1, SLURM) == Place("host:80", 1, 2, "the command line")
    assert find("host:80", 1, 0, {}) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("host:80", None, None),
            "--coordinator=host:80 without --process-id and --num-processes: expected all of",
        ),
        (
            (None, 2, 1),
            "--process-id=1 --num-processes=2|--process-id=1, --num-processes=2 without --coordinator",
        ),
        (("host:80", 2, None), "without --process-id"),
        (("host:80", 2, 2), "process 2 of 2; expected an id from 0 to 1"),
        (("host:80", 0, 0), "0 processes; expected a number of at least 1"),
        (("host", 2, 1), "address is 'host': expected HOST:PORT"),
    ],
)
def test_flags_that_make_no_sense(given: tuple, message: str) -> None:
    with pytest.raises(HostsError, match=message):
        find(*given, environment={})


def test_kubernetes() -> None:
    assert find(environment=KUBERNETES) == Place("run-0.run:8476", 2, 4, "the environment")
    assert find(environment={**KUBERNETES, "JAX_PROCESS_ID": "1"}).process_id == 1
    for name in KUBERNETES.keys() - {"JAX_NUM_PROCESSES"}:
        with pytest.raises(HostsError, match=f"JAX_NUM_PROCESSES is set and {name} is not"):
            find(environment={**KUBERNETES, name: ""})
    with pytest.raises(HostsError, match="JOB_COMPLETION_INDEX is 'x': expected a whole number"):
        find(environment={**KUBERNETES, "JOB_COMPLETION_INDEX": "x"})


def test_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find() == Place("node07:61441", 3, 4, "Slurm job 4097", (1,))
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x4)")
    assert find().local_device_ids is None  # alone on its node
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "7000")
    assert find().coordinator == "node07:7000"
    monkeypatch.delenv("SLURM_STEP_NODELIST")  # the batch script itself
    assert find() is None


def test_a_tpu_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src import cloud_tpu_init

    for name, value in {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "localhost,other"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
    monkeypatch.delenv("JAX_PLATFORMS")
    assert find() is None
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    assert find() == Place("localhost:8482", 3, 4, "the TPU's metadata")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert find() is None


def test_devices_in_use_already() -> None:
    jax.devices()
    with pytest.raises(HostsError, match=r"process 0 of 2 \(by the command line\) uses its devices already"):
        with joined(Place("localhost:1", 0, 2, "the command line")):
            pass


def test_time_limits_are_for_several(capsys: pytest.CaptureFixture[str]) -> None:
    from tokenlab import cli

    words = ["train", "--config=configs/quickstart.py", "--workdir=unused", "--host-timeout=5"]
    assert cli.main(words) == 2
    assert "--host-timeout is for jobs of several processes" in capsys.readouterr().err
    several = ["--coordinator=localhost:1", "--process-id=1", "--num-processes=2", "--start-timeout=0"]
    assert cli.main([*words, *several]) == 2
    assert "--start-timeout=0: expected seconds > 0" in capsys.readouterr().err
    assert cli.main([*words[:3], "--process-id=1"]) == 2
    assert "--process-id=1 without --coordinator and --num-processes" in capsys.readouterr().err
    assert (
        hosts.START_TIMEOUT == 300 and hosts.HOST_TIMEOUT == 60 and hosts.STUCK_TIMEOUT == 1800
    )  # as the help says


PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tokenlab.sharding import agree
from tokenlab.sharding.hosts import find, joined
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rows import RowLayout

with joined(find(sys.argv[1], 2, int(sys.argv[2])), host_timeout=20):
    me = jax.process_index()
    assert agree.gather([me]) == [[0], [1]] and agree.from_primary({"from": me}) == {"from": 0}
    held = []
    for sizes in ({"data": 4}, {"tensor": 2, "expert": 2}, {"data": 2, "tensor": 2}):
        # The devices in the order of a torus, in which those of a process are no neighbours.
        for order in ((0, 1, 2, 3), (0, 2, 1, 3)):
            mesh = make_mesh(sizes, [jax.devices()[number] for number in order])
            layout = RowLayout(NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"))), 8)
            whole = np.arange(16.0).reshape(8, 2)
            placed = layout.put({"x": whole[layout.local]})["x"]
            for shard in placed.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[shard.index])
            held.append(layout.local.tolist())
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(placed)
    assert float(total) == whole.sum()
    print(held, flush=True)
"""


def test_two_real_processes() -> None:
    """What each holds of a batch of eight, on several meshes of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(index)],
            env={**os.environ, **flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        told = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, error) in zip(running, told, strict=True):
        assert process.returncode == 0, error
    first, second = (json.loads(said.splitlines()[-1]) for said, _ in told)
    everything, front, back = [*range(8)], [0, 1, 2, 3], [4, 5, 6, 7]
    assert first == [front, [0, 1, 4, 5], everything, front, front, everything]
    assert second == [back, [2, 3, 6, 7], everything, back, back, everything]
