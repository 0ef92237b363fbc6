"""tpu-vm: a queued resource of Cloud TPU, one slice or several, asked for, waited for, used and deleted with gcloud."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from tokenlab.core.errors import ConfigError
from tokenlab.launch.accelerators import tpu_slice
from tokenlab.launch.job import CODE, Job, Plan, TargetConfig, at_least, exports, shell
from tokenlab.launch.snapshot import requirements

SHARED_FILES = False
SCRIPT, REMOTE = "launch.sh", "train.sh"

BODY = """\
#!/usr/bin/env bash
set -uo pipefail
tpu={name}
where=({where})
queued=(gcloud compute tpus queued-resources)
everywhere=(--worker=all --node=all "${{where[@]}}")

state() {{
  "${{queued[@]}}" describe "$tpu" "${{where[@]}}" --format='value(state.state)' 2>/dev/null
}}

obtain() {{  # ask for the slices where nobody has yet, and wait until they are there; fails where they are taken away
  if [[ -z $(state) ]]; then
    "${{queued[@]}}" create "$tpu" "${{where[@]}}" \\
      {create} || exit
  fi
  local now
  while now=$(state); [[ $now != ACTIVE ]]; do
    case $now in
      SUSPENDING|SUSPENDED|DELETING) return 1 ;;
      ''|FAILED) echo "queued resource $tpu: ${{now:-gone}}" >&2; exit 1 ;;
    esac
    echo "queued resource $tpu: $now" >&2
    sleep {poll}
  done
}}

release() {{
  "${{queued[@]}}" delete "$tpu" "${{where[@]}}" --force --quiet
}}

train() {{  # --batch-size=all: the machines wait for each other, so all of them have to begin
  "${{queued[@]}}" ssh "$tpu" "${{everywhere[@]}}" --command={prepare} &&
    "${{queued[@]}}" scp --recurse {snapshot} "$tpu:{code}/" "${{everywhere[@]}}" &&
    "${{queued[@]}}" ssh "$tpu" "${{everywhere[@]}}" --batch-size=all --command={command}
}}

{upload}for ((attempt = 0; attempt <= {restarts}; attempt++)); do
  if obtain; then
    train
    status=$?
    [[ $status -eq 0 ]] || sleep {lag}  # that slices are taken away is known a while after it has happened
    if [[ $status -eq 0 || $(state) == ACTIVE ]]; then
      {keep}exit "$status"
    fi
  fi
  echo "queued resource $tpu was taken away" >&2
  release || exit
done
exit 1
"""

TRAIN = """\
#!/usr/bin/env bash
set -euo pipefail
cd ~
{keep}{setup}
{exports}exec {command}
"""

SETUP = """\
python3 -m pip install --quiet --user uv
[[ -d .tokenlab ]] || python3 -m uv venv --quiet --python=3.11 .tokenlab
python3 -m uv pip install --quiet --python=.tokenlab -r {code}/requirements.txt {tpu}"""

LAG = 60  # seconds


@dataclass(frozen=True, kw_only=True)
class Config(TargetConfig):
    """Settings of `--target=tpu-vm`.

    Attributes:
      project: of Google Cloud.
      zone: where the TPUs are, such as us-west4-a.
      topology: kind and shape of a slice: v5e:4x4, v5p:4x4x8.
      slices: how many, >= 1; between them the data centre's network.
      runtime: software of the TPU VMs; "" is what Google Cloud names for the kind of TPU.
      capacity: spot can be taken away, on-demand cannot, reserved is what the project has reserved.
      max_restarts: how often it is asked for again when it was taken away, >= 0.
      keep: leave the TPUs when the run has ended, with everything on their disks.
      valid_until: time after which a request that was not granted lapses, such as "6h"; "" is never.
      python: the interpreter on each machine, from the home folder.
      setup: shell commands that prepare each machine, in its home folder; "" makes the environment `.tokenlab` there,
        of Python 3.11 and the versions that are installed here.
      poll_seconds: between two looks at the request, >= 1.
    """

    project: str
    zone: str
    topology: str
    slices: int = 1
    runtime: str = ""
    capacity: str = "spot"
    max_restarts: int = 20
    keep: bool = False
    valid_until: str = ""
    python: str = ".tokenlab/bin/python"
    setup: str = ""
    poll_seconds: int = 30


CAPACITIES = {"spot": ("--spot",), "on-demand": (), "reserved": ("--reserved",)}


def build(config: Config, job: Job) -> Plan:
    """Two scripts, one for here, which obtains the TPUs, and one for each machine; JAX reads places of TPU metadata."""
    at_least("--launch.slices", config.slices, 1)
    at_least("--launch.max_restarts", config.max_restarts, 0)
    at_least("--launch.poll_seconds", config.poll_seconds, 1)
    if config.capacity not in CAPACITIES:
        raise ConfigError(f"--launch.capacity={config.capacity}: expected one of {', '.join(CAPACITIES)}.")
    tpu = tpu_slice("--launch.topology", config.topology)
    hosts = config.slices * tpu.hosts
    what = f"{config.slices} x {config.topology}"
    if hosts > 1:
        job.check_remote(f"{what} is {hosts} machines, each with a disk of its own")
    elif not config.keep:
        job.check_remote(
            "the TPU's disk is deleted with it when the run has ended (or give --launch.keep=True)"
        )
    job.check_sizes(hosts, config.slices * tpu.chips, what, tpu.device_kind)
    nodes = (f"--node-id={job.name}",)
    if config.slices > 1:
        nodes = (f"--node-count={config.slices}", f"--node-prefix={job.name}")
    until = (f"--valid-until-duration={config.valid_until}",) if config.valid_until else ()
    runtime = config.runtime or tpu.kind.runtime
    sizes = (f"--accelerator-type={tpu.accelerator_type}", f"--runtime-version={runtime}")
    create = shell((*nodes, *sizes, *CAPACITIES[config.capacity], *until)).replace("\n", "\n      ")
    code = f"{CODE}/{job.snapshot.name}"
    script = BODY.format(
        name=job.name,
        where=shell((f"--project={config.project}", f"--zone={config.zone}")),
        create=create,
        poll=config.poll_seconds,
        prepare=shlex.quote(f"mkdir -p {CODE}"),
        snapshot=shlex.quote(str(job.snapshot)),
        code=CODE,
        command=shlex.quote(f"bash {code}/{REMOTE}"),
        upload=f"{shell(upload(job))} || exit\n" if job.remote else "",
        restarts=config.max_restarts,
        lag=LAG,
        keep="" if config.keep else "release\n      ",
    )
    runs = shlex.quote(f"{job.workdir.rstrip('/')}/launch")
    train = TRAIN.format(
        setup=config.setup or SETUP.format(code=code, tpu=shell(requirements("tpu"))),
        keep="" if job.remote else f"mkdir -p {runs}\ncp -Rn {code} {runs}/\n",
        exports=exports(job.environment(code)),
        command=shell(job.command(config.python, code)),
    )
    return Plan(
        {SCRIPT: script, REMOTE: train},
        (("bash", str(job.snapshot / SCRIPT)),),
        notes=(
            "this machine drives the run: keep it on, and in tmux; the same command finds the TPUs again",
        ),
    )


def upload(job: Job) -> tuple[str, ...]:
    """The command that copies the snapshot into the run folder at `gs://...`; what is there stays as it is."""
    address = f"{job.workdir.rstrip('/')}/launch/"
    return ("gcloud", "storage", "cp", "--recursive", "--no-clobber", str(job.snapshot), address)
