"""What is to be launched (`Job`), what a target makes of it (`Plan`), and how words become text of a shell."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenlab.core.bucket import is_address
from tokenlab.core.errors import ConfigError

SHORT = 7  # words of a command that is printed as one line
CODE = "tokenlab-launch"  # folder of the snapshots on a TPU VM, in the home of who logs in
IMAGE_CODE = "/launch"  # folder of the snapshot in a container


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Settings that every target has.

    Attributes:
      name: of the job; "" makes one of the last part of the workdir.
      env: environment variables of the processes, `--launch.env.NAME=TEXT`.
      staging: folder on this machine for the snapshots of runs whose workdir is elsewhere (`gs://...`); one folder a
        job name in it.
    """

    name: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    staging: str = "runs/launches"


@dataclass(frozen=True)
class Job:
    """A training command that has been checked, without the place it runs at.

    Attributes:
      name: of the job.
      config: the configuration as given, "FILE.py" or "FILE.py:ARGUMENT".
      changes: dotted key -> text of each `--config.key=text`.
      workdir: folder of the run, or its address (`gs://bucket/folder`).
      snapshot: folder on this machine that holds code and configuration, absolute.
      methods: how many folders of `TOKENLAB_METHODS` the snapshot holds.
      env: environment variables of the processes.
      batch_size: examples a step, over all processes; None where the configuration does not say.
      mesh: devices by mesh axis, -1 for the rest; {} where the configuration does not say.
      rules: of a configuration with rules for devices (`tokenlab.train.hardware`), what they come to: kind and number
        of devices -> (`mesh` there, a line that says which rule holds); None of one without.
      told: lines for people that checking adds.
    """

    name: str
    config: str
    changes: Mapping[str, str]
    workdir: str
    snapshot: Path
    methods: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    batch_size: int | None = None
    mesh: Mapping[str, int] = field(default_factory=dict)
    rules: Callable[[str, int], tuple[Mapping[str, int], str]] | None = None
    told: list[str] = field(default_factory=list)

    @property
    def remote(self) -> bool:
        """Whether the workdir is an address instead of a path."""
        return is_address(self.workdir)

    def command(self, python: str, code: str) -> tuple[str, ...]:
        """The words that train, once `environment(code)` holds.

        Args:
          python: the interpreter.
          code: where the snapshot stands on the machine that runs them.
        """
        file, has_arg, arg = self.config.partition(".py:")
        config = f"{code}/config/{Path(file).name}" + (f".py:{arg}" if has_arg else "")
        words = (f"--config={config}", f"--workdir={self.workdir}")
        changes = (f"--config.{key}={text}" for key, text in self.changes.items())
        # -P: without it `python -m` looks for tokenlab in the folder it is started in before it looks in the snapshot.
        return (python, "-P", "-m", "tokenlab.cli", "train", *words, *changes)

    def environment(self, code: str) -> dict[str, str]:
        """What the processes need of their environment: the code of the snapshot, and what the settings ask for."""
        found = {"PYTHONPATH": code}
        if self.methods:
            found["TOKENLAB_METHODS"] = ":".join(f"{code}/methods/{i}" for i in range(self.methods))
        return found | dict(self.env)

    def check_sizes(self, processes: int, devices: int | None, what: str, kind: str | None = None) -> None:
        """Raise a ConfigError when the batch or the mesh does not fit that many processes and devices.

        Args:
          processes: over which the batch is divided.
          devices: of all processes together; None where only the machine knows.
          what: has them, for the message.
          kind: of the devices, as rules for devices name it; None where only the machine knows.
        """
        if self.batch_size is not None and self.batch_size % processes:
            raise ConfigError(
                f"config.batch_size is {self.batch_size}, which does not divide over the {processes} processes of "
                f"{what}: give a multiple of {processes}."
            )
        mesh = self.mesh
        if self.rules is not None:
            if kind is None or devices is None:
                self.told.append(
                    "hardware: which rule holds is known on the devices; tokenlab train says it there"
                )
                return
            mesh, said = self.rules(kind, devices)
            self.told.append(said)
        if devices is None or not mesh:
            return
        known = math.prod(size for size in mesh.values() if size != -1)
        shown = " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size != 1) or "of one device"
        if -1 in mesh.values():
            if devices % known:
                raise ConfigError(
                    f"config.mesh {shown}: the {devices} devices of {what} cannot be split by {known}; change the "
                    "mesh, or launch on a multiple."
                )
        elif known != devices:
            raise ConfigError(
                f"config.mesh {shown} needs {known} devices, and {what} has {devices}; change the mesh (-1 takes the "
                "rest) or the launch."
            )

    def check_remote(self, why: str) -> None:
        """Raise a ConfigError when the workdir is a path, saying why that does not do."""
        if not self.remote:
            raise ConfigError(f"--workdir={self.workdir} is a path, and {why}: expected gs://BUCKET/FOLDER.")


@dataclass(frozen=True)
class Plan:
    """All that a launch does, as text.

    Attributes:
      files: name in the snapshot -> text, written before anything is run.
      commands: the words of each command.
      together: start all commands at once and stop all when one fails; else one after the other, up to the first that
        fails.
      port: of this machine that has to be free.
      notes: what there is to know afterwards, one line each.
    """

    files: Mapping[str, str]
    commands: tuple[tuple[str, ...], ...]
    together: bool = False
    port: int | None = None
    notes: tuple[str, ...] = ()


def shell(words: Sequence[str]) -> str:
    """A command as a shell reads it: every word quoted; one of many words with a flag a line."""
    lines = [[shlex.quote(word) for word in words]]
    if len(words) > SHORT:
        flags = [k for k, word in enumerate(words) if k and word.startswith("--")] or [len(words)]
        ends = [*flags[1:], len(words)]
        lines = [lines[0][: flags[0]]] + [lines[0][k:end] for k, end in zip(flags, ends, strict=True)]
    return " \\\n  ".join(" ".join(line) for line in lines if line)


def one_line(word: str) -> str:
    """A word quoted for bash without a line break, a dollar sign or a byte beyond ASCII in the text.

    For places that read the text before a shell does: an indented block of YAML, and Kubernetes, which replaces
    `$(NAME)`.
    """
    if re.fullmatch(r"[\x20-\x7e]*", word) and "$" not in word:
        return shlex.quote(word)
    kept = (  # \xHH takes two digits and no more, so what follows is never read as part of it
        chr(byte) if 0x20 <= byte < 0x7F and chr(byte) not in "$'\\" else f"\\x{byte:02x}"
        for byte in word.encode("utf-8", "surrogateescape")
    )
    return "$'" + "".join(kept) + "'"


def exports(environment: Mapping[str, str]) -> str:
    """Lines of a shell script that set the environment; PYTHONPATH goes before what is there."""
    lines = []
    for name, text in environment.items():
        rest = '${PYTHONPATH:+":$PYTHONPATH"}' if name == "PYTHONPATH" else ""
        lines.append(f"export {name}={shlex.quote(text)}{rest}\n")
    return "".join(lines)


def job_name(given: str, workdir: str, longest: int) -> str:
    """The name of a job: as given, or made of the last part of the workdir.

    Lower-case letters, digits and single dashes, a letter first: what Slurm, Google Cloud and Kubernetes all take.

    Raises:
      ConfigError: the given name is none, or longer than `longest`.
    """
    if given:
        if re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", given) and len(given) <= longest:
            return given
        raise ConfigError(
            f"--launch.name={given!r}: expected at most {longest} lower-case letters, digits and dashes, a letter "
            "first and no dash last."
        )
    last = workdir.rstrip("/").rpartition("/")[2].lower()
    made = re.sub(r"[^a-z0-9]+", "-", last).strip("-")
    made = made if made[:1].isalpha() else f"run-{made}".strip("-")
    return made[:longest].rstrip("-")


def check_line(setting: str, text: str) -> str:
    """`text`, when it is printable and of one line; for places where a line break would begin something else."""
    if not text.isprintable():
        raise ConfigError(f"{setting}={text!r}: expected text of one line, without control characters.")
    return text


def at_least(setting: str, value: int | None, least: int) -> None:
    """Raise a ConfigError when a number is given and less than `least`."""
    if value is not None and value < least:
        raise ConfigError(f"{setting}={value}: expected a whole number >= {least}.")
