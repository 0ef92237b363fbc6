"""A Slurm of one node on this machine: munged, slurmctld and slurmd, all in one folder, all gone afterwards.

    with cluster(folder) as environment:
        subprocess.run(["sbatch", ...], env=environment)

Nothing of the system's own configuration is read or written. The programs are installed with apt-get when they are
missing and this is root on a Debian; where that cannot be, `missing` says why.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PACKAGES = ("slurm-wlm", "munge")
STARTS = 60.0  # seconds

CONFIGURATION = """\
ClusterName=one
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=60
MinJobAge=3600
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing() -> str:
    """Why there can be no Slurm here, after trying to install it; "" where there can."""
    lacking = [name for name in PROGRAMS if _path(name) is None]
    if not lacking:
        return "" if os.geteuid() == 0 else "a Slurm of one's own needs root"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{', '.join(lacking)} not there, and no root with apt-get to install {' and '.join(PACKAGES)}"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", *words], capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode:
            return f"apt-get {words[2]} fails: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return ""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start it; the environment under which the commands of Slurm speak to it."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munged trusts no socket in a folder that others can write to
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    # Processes meet at a port that is made of their job's number: two clusters on one machine must not number alike.
    first = 1 + os.getpid() % 60_000
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, ports=_ports(2), first=first))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(configuration)}
    files = {
        "socket": "munge.socket",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "key-file": "munge.key",
    }
    files |= {"seed-file": "munge.seed"}
    places = [f"--{flag}={folder / name}" for flag, name in files.items()]
    running: list[subprocess.Popen[bytes]] = []
    with (folder / "output.log").open("ab") as output, contextlib.ExitStack() as stack:

        def start(name: str, *words: str) -> None:
            process = subprocess.Popen(
                [_path(name), *words], env=environment, stdout=output, stderr=output, start_new_session=True
            )
            running.append(process)
            stack.callback(_end, process)

        start("munged", "--foreground", "--force", *places)
        _until(lambda: (folder / "munge.socket").exists(), folder, running)
        start("slurmctld", "-D", "-c", "-f", str(configuration))
        start("slurmd", "-D", "-c", "-f", str(configuration), "-N", host)
        words = ["sinfo", "--noheader", "--format=%T"]
        _until(
            lambda: subprocess.run(words, env=environment, capture_output=True).stdout == b"idle\n",
            folder,
            running,
        )
        stack.callback(_end_jobs, environment)
        yield environment


def _path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


def _until(true, folder: Path, running: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + STARTS
    while not true():
        ended = [process.args[0] for process in running if process.poll() is not None]
        if ended or time.monotonic() > end:
            logs = "\n".join(
                f"{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in folder.glob("*.log")
            )
            raise RuntimeError(f"Slurm does not start; ended: {ended}\n{logs}")
        time.sleep(0.2)


def _end_jobs(environment: dict[str, str]) -> None:
    """What still runs would outlive slurmd."""
    words = ["squeue", "--noheader", "--states=pending,running,suspended,completing", "--format=%i"]
    end = time.monotonic() + 20
    while jobs := subprocess.run(words, env=environment, capture_output=True, text=True).stdout.split():
        subprocess.run(["scancel", "--signal=KILL", "--full", *jobs], env=environment, capture_output=True)
        subprocess.run(["scancel", *jobs], env=environment, capture_output=True)
        if time.monotonic() > end:
            return
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
