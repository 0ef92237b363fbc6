"""Hardware rules: what a configuration changes on some devices, and which of its rules holds where.

A file says, say,

    config.hardware = (
        dict(kind="TPU v5e", devices=16, set={"mesh.fsdp": 16, "mesh.data": 1},
             step_seconds=0.21, basis="estimated", source="tokenlab compile --config=... --topology=v5e:4x4"),
        dict(kind="TPU *", set={"mesh.fsdp": -1, "mesh.data": 1}, ...),
    )

and of the rules that fit the devices the first holds. It wins over what the file says; what is changed afterwards, on
the command line for one, wins over it (`tokenlab.core.config.override` takes such keys out of the rules). A rule
changes where things lie and how they are worked out: so a run may go on where another rule holds, and its workdir keeps
the configuration as it was before any rule.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from tokenlab import models
from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import ConfigError, TokenLabError, suggest
from tokenlab.core.patterns import fits
from tokenlab.cost.hardware import HARDWARE
from tokenlab.sharding.slices import Slices
from tokenlab.train.config import HardwareRule, MeshConfig, TrainConfig, completed

MAY_SET = (
    "mesh.*",
    "model.remat",
    "model.execution",
    "model.dtype",
    "optimizer.accumulate",
    "optimizer.offload",
    "eval.batch_size",
    "data.memory",
    "data.prefetch",
    "data.threads",
    "data.workers",
)
"""Keys that a rule may set. One that sets a part of `mesh` sets all of it, what it does not name to its default.
`model.dtype` and `optimizer.accumulate` round in other places, and microbatches draw their own random numbers; all else
changes no more than the order of sums."""

_MAKERS = ("NVIDIA ", "AMD ")
"""What kinds of devices begin with that have no datasheet here."""


@dataclass(frozen=True)
class Applied:
    """What the rules of a configuration came to on some devices.

    Attributes:
        kind, devices: that were looked for.
        rule: the one that holds; None where none fits.
        changed: key -> value before and since.
    """

    kind: str
    devices: int
    rule: HardwareRule | None = None
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def xla(self) -> dict[str, Any]:
        """Options of the compiler for train steps."""
        return dict(self.rule.xla) if self.rule is not None else {}

    def __str__(self) -> str:
        """One line."""
        where = f"{self.devices} x {self.kind}"
        if self.rule is None:
            return f"hardware: no rule fits {where}; the configuration holds as it is"
        said = [f"{key}={new!r}" for key, (_, new) in self.changed.items()]
        said += [f"{key}={value}" for key, value in self.rule.xla.items()]
        took = f"{self.rule.step_seconds:.3g} s a step {self.rule.basis} by `{self.rule.source}`"
        return f"hardware: {where}, {_name(self.rule)}: {', '.join(said) or 'nothing is changed'} ({took})"

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        found: dict[str, Any] = {"kind": self.kind, "devices": self.devices, "rule": None}
        if self.rule is not None:
            found["rule"] = dataclasses.asdict(self.rule)
            found["changed"] = {key: list(both) for key, both in self.changed.items()}
        return found


def applied(config: TrainConfig, kind: str, devices: int) -> tuple[TrainConfig, Applied | None]:
    """The configuration as it runs on these devices, and what was changed; None of one without rules.

    All rules are checked, also those that do not hold here.

    Args:
        config: with its rules.
        kind: `jax.Device.device_kind`, or the name of a datasheet.
        devices: of all processes.

    Raises:
        ConfigError: a rule for devices that nobody knows, one that can never hold as one before it takes all its
            devices, a key that a rule may not set or that does not exist, or a value that does not fit.
    """
    if not config.hardware:
        return config, None
    for number, rule in enumerate(config.hardware):
        where = f"config.hardware[{number}] ({_name(rule)})"
        _check_kind(rule, where)
        for before in config.hardware[:number]:
            if before.devices in (None, rule.devices) and fits(rule.kind, before.kind):
                raise ConfigError(
                    f"{where} never holds: {_name(before)} comes before it and fits all of its devices. Put it "
                    "first, or leave it out."
                )
        _changed(config, rule, where)
    known = _called(kind)
    for number, rule in enumerate(config.hardware):
        if rule.devices in (None, devices) and any(fits(name, rule.kind) for name in known):
            changed = _changed(config, rule, f"config.hardware[{number}] ({_name(rule)})")
            before, since = _flat(config), _flat(changed)
            differ = {key: (before.get(key), since.get(key)) for key in rule.set}
            return changed, Applied(kind, devices, rule, differ)
    return config, Applied(kind, devices)


def on(config: TrainConfig, devices: Sequence[Any] | None = None) -> tuple[TrainConfig, Applied | None]:
    """`applied` for these devices of jax; None: all there are."""
    if not config.hardware:
        return config, None
    devices = jax.devices() if devices is None else devices
    return applied(config, devices[0].device_kind, len(devices))


def at(config: TrainConfig, topology: str) -> tuple[TrainConfig, Applied | None]:
    """`applied` for TPU slices by kind, shape and number, "v5e:16x16" or "v5e:16x16*2", which need not be there."""
    asked = Slices.parse(topology)
    return applied(config, f"TPU {asked.kind}", asked.devices)


def without_mesh(config: TrainConfig) -> TrainConfig:
    """The configuration with rules that leave the mesh alone: another one was given."""
    rules = (
        dataclasses.replace(rule, set={k: v for k, v in rule.set.items() if not k.startswith("mesh.")})
        for rule in config.hardware
    )
    return dataclasses.replace(config, hardware=tuple(rules))


@contextlib.contextmanager
def told(rule: Applied | None) -> Iterator[None]:
    """Turns a compiler's complaint about an option that a rule has for it into an error that names the rule."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error).strip().splitlines()[0]
        if rule is not None and any(option in text for option in rule.xla):
            raise ConfigError(f"config.hardware: xla of {_name(rule.rule)}: {text}") from error
        raise


def _name(rule: HardwareRule) -> str:
    return f"the rule for {rule.kind}" + ("" if rule.devices is None else f" x {rule.devices}")


def _called(kind: str) -> tuple[str, ...]:
    """All that a kind of device is called."""
    for hardware in HARDWARE:
        if kind == hardware.name or kind in hardware.device_kinds:
            return (hardware.name, *hardware.device_kinds)
    return (kind,)


def _check_kind(rule: HardwareRule, where: str) -> None:
    known = ["cpu", *(name for hardware in HARDWARE for name in _called(hardware.name))]
    if not any(fits(name, rule.kind) for name in known) and not rule.kind.startswith(_MAKERS):
        raise ConfigError(f"{where}: no device is of the kind {rule.kind!r}.{suggest(rule.kind, known)}")


def _changed(config: TrainConfig, rule: HardwareRule, where: str) -> TrainConfig:
    """The configuration with what the rule sets."""
    values: dict[str, Any] = completed(dataclasses.asdict(config))
    if any(key.startswith("mesh.") for key in rule.set):
        values["mesh"] = dataclasses.asdict(MeshConfig())
    for key, value in rule.set.items():
        if not any(fits(key, pattern) for pattern in MAY_SET):
            raise ConfigError(
                f"{where} sets {key!r}, which is not of the devices: expected one of {', '.join(MAY_SET)}."
                f"{suggest(key, MAY_SET)}"
            )
        *parents, name = key.split(".")
        group: Any = values
        for parent in parents:
            group = group.get(parent) if isinstance(group, dict) else None
        if not isinstance(group, dict) or name not in group:
            raise ConfigError(
                f"{where} sets {key!r}, and config has no such key.{suggest(name, group or values)}"
            )
        group[name] = value
    try:
        models.check_settings(values["model"])
        return to_dataclass(TrainConfig, {**values, "hardware": config.hardware})
    except TokenLabError as error:
        raise ConfigError(f"{where}: {error}") from error


def _flat(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        found[path] = value
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else str(key))

    walk(dataclasses.asdict(config), "")
    return found
