"""The front of all targets: settings, checks, the text of what is run, the snapshot, and then the run."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenlab.core import config as core_config
from tokenlab.core import names
from tokenlab.core.bucket import is_address
from tokenlab.core.errors import ConfigError, NameLookupError, suggest
from tokenlab.launch import processes, snapshot
from tokenlab.launch.job import Job, Plan, check_line, job_name, one_line, shell
from tokenlab.sharding.axes import SIZES

PACKAGE = "tokenlab.launch"
LONGEST_NAME = 40
"""Letters of a job's name. Kubernetes allows 63 for NAME-JOB-1-1, the name of a pod."""


def targets() -> list[names.Module]:
    """The targets there are, by the name users write: `tpu-vm` is `tpu_vm.py`."""
    found = names.list_modules(PACKAGE, defines="build")
    return [module._replace(name=module.name.replace("_", "-")) for module in found]


def run(
    target: str,
    config: str,
    workdir: str,
    *,
    changes: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> Plan:
    """Print what a launch runs, keep code and configuration in the run folder, and run it.

    Args:
      target: name of a target, see `targets`.
      config: "FILE.py" or "FILE.py:ARGUMENT".
      workdir: folder of the run, or its address.
      changes: dotted key -> text of each `--config.key=text`.
      settings: dotted key -> text of each `--launch.key=text`.
      dry_run: print only; nothing is written.

    Returns:
      What was, or would be, run.

    Raises:
      ConfigError, NameLookupError: an unknown target or setting, one that is missing, or sizes, names and folders that
        do not fit; nothing has been written or run.
      SystemExit: with the status of the first command that failed.
    """
    changes = dict(changes or {})
    known = {module.name: module.dotted for module in targets()}
    if target not in known:
        raise NameLookupError(f"--target={target}: there is no such target.{suggest(target, known)}")
    module = names.find(PACKAGE, known[target].rpartition(".")[2])
    chosen = read_settings(module.Config, settings or {})
    described = core_config.override(core_config.load(config), changes)
    longest = getattr(module, "LONGEST_NAME", LONGEST_NAME)
    name = job_name(chosen.name, workdir, longest)
    here = module.SHARED_FILES and not is_address(workdir)
    folder = (Path(workdir) / "launch" if here else Path(chosen.staging) / name).absolute()
    if os.pathsep in str(folder):
        raise ConfigError(
            f"{folder}: a folder of code cannot have {os.pathsep!r} in its path, which separates such folders."
        )
    contents = snapshot.collect(config, changes, workdir)

    def planned() -> tuple[Plan, Job]:
        job = Job(
            name=name,
            config=config,
            changes=changes,
            workdir=workdir,
            snapshot=folder / snapshot.next_name(folder, contents),
            methods=contents.methods,
            env=chosen.env,
            batch_size=described.get("batch_size"),
            mesh=_mesh(described),
            rules=_rules(described),
        )
        return module.build(chosen, job), job

    plan, job = planned()
    if dry_run:
        print(text(target, plan, job), end="", flush=True)
        return plan
    with snapshot.locked(folder):
        plan, job = planned()  # again: another launch may have taken the number before the lock was ours
        shown = text(target, plan, job)
        snapshot.write(folder, job.snapshot.name, contents, dict(plan.files) | {"launch.txt": shown})
    if plan.port is not None and not processes.free_port(plan.port):
        raise ConfigError(
            f"port {plan.port} of this machine is in use: give another one, --launch.port=PORT."
        )
    print(shown, end="", flush=True)
    status = processes.together(plan.commands) if plan.together else _in_order(plan.commands)
    if status:
        raise SystemExit(status)
    return plan


def text(target: str, plan: Plan, job: Job) -> str:
    """What a launch runs: every file it writes beside the code, then every command."""
    where = f"# {target}: {job.name}, code and configuration in {one_line(str(job.snapshot))}\n"
    parts = [where]
    for name, content in plan.files.items():
        parts.append(f"\n# file {one_line(str(job.snapshot / name))}\n{content.rstrip()}\n")
    several = plan.together and len(plan.commands) > 1
    lines = [shell(words) + " &" * several for words in plan.commands] + ["wait"] * several
    parts.append("\n# run\n" + "".join(f"{line}\n" for line in lines))
    if notes := (*(" ".join(line.split()) for line in job.told), *plan.notes):
        parts.append("\n" + "".join(f"# {note}\n" for note in notes))
    return "".join(parts)


def read_settings(cls: type[Any], given: Mapping[str, str]) -> Any:
    """The settings of a target from the text of each `--launch.key=text`.

    Raises:
      ConfigError: an unknown setting (with the nearest), one that is missing or of another type, or an environment
        variable that has no name.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    groups = [name for name in fields if typing.get_origin(hints[name]) is Mapping]
    single: dict[str, str] = {}
    grouped: dict[str, dict[str, str]] = {}
    for key, value in given.items():
        head, dot, tail = key.partition(".")
        if head not in fields:
            raise ConfigError(f"launch has no setting {key!r}.{suggest(head, fields)}")
        if (head in groups) != bool(tail):
            expected = f"--launch.{head}.NAME=TEXT" if head in groups else f"--launch.{head}=VALUE"
            raise ConfigError(f"--launch.{key}={value}: expected {expected}.")
        if dot:
            grouped.setdefault(head, {})[tail] = value
        else:
            single[head] = value
    for name in grouped.get("env", {}):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--launch.env.{name}: expected the name of an environment variable.")
    abouts = descriptions(cls)
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and not single.get(name):
            raise ConfigError(f"--launch.{name}={name.upper()} is missing ({abouts[name]}).")
    try:
        changed = core_config.override(core_config.from_dataclass(cls), single)
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.", "--launch.", 1)) from None
    values = {name: changed[name] for name in fields if name not in groups}
    found = core_config.to_dataclass(cls, values | grouped, path="launch")
    for name, value in single.items():
        check_line(f"--launch.{name}", value)
    return found


def descriptions(cls: type[Any]) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of each field, each as one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        attributes = (
            (inspect.getdoc(base) or "").partition("Attributes:\n")[2] if "__doc__" in vars(base) else ""
        )
        for name, said in re.findall(r"^  (\w+): (.*(?:\n    .*)*)", attributes, flags=re.MULTILINE):
            found[name] = " ".join(said.split()).rstrip(".")
    return found


def _mesh(described: Any) -> dict[str, int]:
    """Devices by axis of `config.mesh`, where it says nothing but that."""
    mesh = described.get("mesh")
    if mesh and mesh.get("recipe"):
        from tokenlab.train.config import MeshConfig

        return core_config.to_dataclass(MeshConfig, mesh).given()
    sizes = {axis: mesh[axis] for axis in SIZES if axis in mesh} if mesh else {}
    return sizes if all(type(size) is int for size in sizes.values()) else {}


def _rules(described: Any) -> Callable[[str, int], tuple[Mapping[str, int], str]] | None:
    """What the rules for devices of a configuration come to, see `Job.rules`."""
    if not described.get("hardware"):
        return None
    from tokenlab.train import hardware
    from tokenlab.train.config import TrainConfig

    config = core_config.to_dataclass(TrainConfig, described)

    def there(kind: str, devices: int) -> tuple[Mapping[str, int], str]:
        found, rule = hardware.applied(config, kind, devices)
        return found.mesh.given(), str(rule)

    return there


def _in_order(commands: tuple[tuple[str, ...], ...]) -> int:
    """Run commands one after the other; the status of the first that fails, else 0."""
    for words in commands:
        try:
            status = subprocess.run(words, check=False).returncode
        except OSError as error:
            raise ConfigError(
                f"{words[0]} cannot be run: {error.strerror}; install it, or take what --dry-run prints elsewhere."
            ) from error
        if status:
            print(f"tokenlab: {words[0]} ended with status {status}", file=sys.stderr)
            return 128 - status if status < 0 else status
    return 0


def program(name: str) -> str:
    """The interpreter to run with where the machine shares this one's files: as given, or this one."""
    return os.path.expanduser(name) if name else sys.executable
