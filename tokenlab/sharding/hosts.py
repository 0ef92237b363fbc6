"""Several processes as one job: who this process is, and the start of jax's multi-controller runtime.

A process learns its place from flags, from the environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID or, in an indexed Kubernetes job, JOB_COMPLETION_INDEX), from Slurm, or from a TPU's metadata, in this
order. All of it happens before anything touches a device: a backend that is there already knows its own devices only.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

import jax

import tokenlab
from tokenlab.core.errors import HostsError, TokenLabError
from tokenlab.sharding import runtime, watch
from tokenlab.sharding.roll_call import roll_call, split

START_TIMEOUT = 300.0
"""Seconds in which all processes of a job have to report: hosts of a queue come up minutes apart."""

HOST_TIMEOUT = 60.0
"""Seconds without a sign of life after which a process counts as gone."""

STUCK_TIMEOUT = 1800.0
"""Seconds in which no process gets further after which a job counts as stuck: longer than any compilation."""

_SAME_EVERYWHERE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """A process's place in a job of several.

    Attributes:
        coordinator: HOST:PORT of process 0, the same in all processes.
        process_id: in [0, num_processes).
        num_processes: of the job, >= 2.
        found_in: where that was found, for messages.
        local_device_ids: the GPUs of this process; None = all of its host.
    """

    coordinator: str
    process_id: int
    num_processes: int
    found_in: str
    local_device_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        split(self.coordinator)
        if self.num_processes < 1:
            raise HostsError(
                f"{self.found_in}: {self.num_processes} processes; expected a number of at least 1."
            )
        if not 0 <= self.process_id < self.num_processes:
            raise HostsError(
                f"{self.found_in}: process {self.process_id} of {self.num_processes}; expected an id from 0 to "
                f"{self.num_processes - 1}."
            )


def find(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Environment | None = None,
) -> Place | None:
    """This process's place in a job; None where it is alone.

    Args:
        coordinator, num_processes, process_id: of the flags; all or none, but `num_processes=1` alone says that this
            process is alone whatever its surroundings.
        environment: None = that of the process.

    Raises:
        HostsError: only some of them are given, or they make no sense.
    """
    environment = os.environ if environment is None else environment
    flags = {"--coordinator": coordinator, "--process-id": process_id, "--num-processes": num_processes}
    if any(value is not None for value in flags.values()):
        if num_processes == 1 and coordinator is None and process_id in (None, 0):
            return None
        missing = [name for name, value in flags.items() if value is None]
        if missing:
            given = ", ".join(f"{name}={value}" for name, value in flags.items() if value is not None)
            raise HostsError(
                f"{given} without {' and '.join(missing)}: expected all of --coordinator=HOST:PORT --process-id=K "
                "--num-processes=N, or none of them."
            )
        found: Place | None = Place(coordinator, process_id, num_processes, "the command line")
    else:
        found = _in_environment(environment) or _in_slurm(environment) or _in_tpu_metadata(environment)
    return found if found is not None and found.num_processes > 1 else None


def _in_environment(environment: Environment) -> Place | None:
    """JAX_NUM_PROCESSES and what belongs to it, as our Kubernetes manifests set them."""
    if "JAX_NUM_PROCESSES" not in environment:
        return None
    which = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environment else "JOB_COMPLETION_INDEX"
    wanted = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", which)
    missing = [name for name in wanted if not environment.get(name)]
    if missing:
        raise HostsError(
            f"JAX_NUM_PROCESSES is set and {' and '.join(missing)} is not: expected JAX_COORDINATOR_ADDRESS=HOST:PORT, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID (or Kubernetes' JOB_COMPLETION_INDEX), or none of them."
        )
    count, number = (_whole(name, environment[name]) for name in wanted[1:])
    return Place(environment["JAX_COORDINATOR_ADDRESS"], number, count, "the environment")


def _in_slurm(environment: Environment) -> Place | None:
    """The task of a Slurm step, as jax reads it: its first node coordinates, at a port made of the job's number."""
    if int(environment.get("SLURM_NTASKS", "1") or 1) < 2:
        return None
    task = runtime.slurm()
    if task is None:
        return None
    port = environment.get("JAX_COORDINATOR_PORT")
    address = environment.get("JAX_COORDINATOR_ADDRESS") or task.get_coordinator_address(None, port)
    # A process that is alone on its node takes all GPUs of it, where jax by itself would take the first.
    alone = re.match(r"1(\(|$)", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return Place(
        address,
        task.get_process_id(),
        task.get_process_count(),
        f"Slurm job {environment['SLURM_JOB_ID']}",
        None if alone or "JAX_LOCAL_DEVICE_IDS" in environment else (int(environment["SLURM_LOCALID"]),),
    )


def _in_tpu_metadata(environment: Environment) -> Place | None:
    """The worker of a TPU slice, as jax reads its metadata (TPU VMs) or environment (GKE)."""
    worker = None if environment.get("JAX_PLATFORMS", "tpu").startswith("cpu") else runtime.tpu()
    if worker is None or (count := worker.get_process_count()) < 2:
        return None
    port = environment.get("JAX_COORDINATOR_PORT")
    address = worker.get_coordinator_address(int(START_TIMEOUT), port)
    return Place(address, worker.get_process_id(), count, "the TPU's metadata")


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise HostsError(f"{name} is {text!r}: expected a whole number.")
    return int(text)


@contextlib.contextmanager
def joined(
    place: Place | None,
    *,
    start_timeout: float = START_TIMEOUT,
    host_timeout: float = HOST_TIMEOUT,
    stuck_timeout: float = STUCK_TIMEOUT,
    preemption: bool = True,
) -> Iterator[None]:
    """Runs its block as one process of a job; of a job of one, as if it were not there.

    An error in the block is told to the other processes, which end too and name this one; that a process dies or hangs
    ends this one with a message that names it (`tokenlab.sharding.watch`).

    Args:
        place: of this process; None: it is alone.
        start_timeout: seconds in which all processes have to report.
        host_timeout: seconds without a sign of life after which a process counts as gone.
        stuck_timeout: seconds in which no process gets further after which the job counts as stuck.
        preemption: SIGTERM to one process is a notice to all (`tokenlab.train.interrupt`); where nobody asks for such
            notices, SIGTERM ends the process as ever.

    Raises:
        HostsError: the processes do not find each other, or jax has begun to use its devices.
    """
    if place is None:
        yield
        return
    if runtime.devices_in_use():
        raise HostsError(
            f"process {place.process_id} of {place.num_processes} (by {place.found_in}) uses its devices already: join "
            "the others before anything is computed."
        )
    versions = {
        "tokenlab": tokenlab.__version__,
        **{name: metadata.version(name) for name in _SAME_EVERYWHERE},
    }
    names = roll_call(place.coordinator, place.process_id, place.num_processes, start_timeout, versions)
    jax.config.update("jax_enable_preemption_service", preemption)
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=int(start_timeout) + 1,
        # Ours comes first, and says more.
        heartbeat_timeout_seconds=int(3 * host_timeout) + 30,
        shutdown_timeout_seconds=int(host_timeout) + 1,
    )
    watching = watch.Watch(
        runtime.client(),
        place.process_id,
        names,
        place.coordinator,
        host_timeout=host_timeout,
        stuck_timeout=stuck_timeout,
    )
    watching.start()
    watch.use(watching)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit):
            _fail(watching, error, host_timeout)
            raise
        watching.finish()  # preempted, as all are
        raise
    else:
        watching.finish()
        jax.distributed.shutdown()
    finally:
        watch.use(None)


def _fail(watching: watch.Watch, error: BaseException, host_timeout: float) -> None:
    """Tells the others, and sees to it that this process does not wait for them when it ends."""
    if isinstance(error, RuntimeError | ValueError | OSError) and not isinstance(error, TokenLabError):
        # A device that cannot reach another speaks of sockets: who is behind it is known a little later. Where all
        # others still beat, it was this process itself.
        print(
            f"tokenlab: {_one_line(error)}; looking for up to {host_timeout:g} s whether a process is gone",
            file=sys.stderr,
            flush=True,
        )
        watching.wait_for_verdict()
    if isinstance(error, TokenLabError):
        status = watch.EXIT_STOPPED
    else:
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    watching.fail(_one_line(error), status)
    atexit.register(_leave, status)  # runs before what jax registered, which waits for all processes


def _leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:500]
