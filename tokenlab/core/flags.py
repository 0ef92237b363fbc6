"""What stands on a command line: flags, switches, overrides `--config.key=value`, words; and the help about them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tokenlab.core.errors import ConfigError, suggest

PROGRAM = "tokenlab"
HELP_WIDTH = 118


@dataclass(frozen=True)
class Flag:
    """`--name=VALUE`, or a switch `--name` when `value` is empty."""

    name: str
    help: str
    value: str = ""
    default: str | None = None
    required: bool = False


@dataclass(frozen=True)
class Arguments:
    """What was given to a command.

    Attributes:
      values: value flags by name; the default, or None, where not given.
      switches: names of the switches that were given.
      overrides: dotted key -> text of each `--config.key=text`.
      words: arguments that are no flags.
      settings: dotted key -> text of each `--NAME.key=text`, where NAME is the command's group of settings.
    """

    values: Mapping[str, str | None]
    switches: frozenset[str]
    overrides: Mapping[str, str]
    words: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """One command: what it does, the flags it takes, and the function that does it.

    Attributes:
      run: called with the arguments; whatever it prints is the answer.
      summary: one line for the help.
      flags: value flags and switches.
      overrides: takes `--config.key=value`.
      words: the arguments that are no flags, as its usage shows them; "" when it takes none.
      hints: flag that it does not take -> what to do instead.
      more: further lines for its help.
      settings: takes `--NAME.key=value` of this name, beside the configuration's; "" when it takes none.
    """

    run: Callable[[Arguments], int | None]
    summary: str
    flags: tuple[Flag, ...] = ()
    overrides: bool = False
    words: str = ""
    hints: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    settings: str = ""

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups whose keys it takes: `--GROUP.key=value`."""
        return ("config",) * self.overrides + (self.settings,) * bool(self.settings)


def parse(name: str, command: Command, words: Sequence[str]) -> Arguments:
    """Read the words after a command's name.

    A value follows its flag after "=" or as the next word; an override is always `--config.key=value`.

    Raises:
      ConfigError: an unknown flag (with the nearest), one given twice or without its value, one that is missing, or a
        word that is no flag.
    """
    flags = {flag.name: flag for flag in command.flags}
    values: dict[str, str | None] = {}
    switches: set[str] = set()
    grouped: dict[str, dict[str, str]] = {"config": {}, command.settings: {}}
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            others.append(word)
            continue
        key, equals, value = word.lstrip("-").partition("=")
        group, dot, within = key.partition(".")
        if word.startswith("--") and dot and group in command.groups:
            if not equals:
                raise ConfigError(f"{name}: {word} needs a value: expected {word}=VALUE.")
            if within in grouped[group]:
                raise ConfigError(f"{name}: --{key} is given twice.")
            grouped[group][within] = value
            continue
        if not word.startswith("--") or key not in flags:
            raise ConfigError(_unknown(name, command, word.partition("=")[0]))
        if key in values or key in switches:
            raise ConfigError(f"{name}: --{key} is given twice.")
        if not flags[key].value:
            if equals:
                raise ConfigError(f"{name}: --{key} is a switch and takes no value; got {value!r}.")
            switches.add(key)
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("-") else ""
        if not value:
            raise ConfigError(f"{name}: --{key} needs a value: expected --{key}={flags[key].value}.")
        values[key] = value
    if others and not command.words:
        hint = f" Did you mean --{others[0]}?" if "=" in others[0] else ""
        raise ConfigError(f"{name}: unexpected argument {others[0]!r}.{hint}")
    for flag in command.flags:
        if flag.required and flag.name not in values:
            raise ConfigError(f"{name}: --{flag.name}={flag.value} is missing ({flag.help}).")
        if flag.value:
            values.setdefault(flag.name, flag.default)
    settings = grouped[command.settings] if command.settings else {}
    return Arguments(values, frozenset(switches), grouped["config"], tuple(others), settings)


def _unknown(name: str, command: Command, flag: str) -> str:
    key = flag.lstrip("-")
    for hinted, hint in command.hints.items():
        if key == hinted:
            return f"{name} takes no --{key}: {hint}."
    head, dot, tail = key.partition(".")
    if dot and command.overrides:  # --confg.steps, or --model.stack without the "config."
        near = [group for group in command.groups if "mean" in suggest(head, [group])]
        dotted = f"{near[0]}.{tail}" if near else f"config.{key}"
        return f"{name}: unknown flag {flag}. Did you mean --{dotted}?"
    known = [*(f"--{each.name}" for each in command.flags), "--help"]
    return f"{name}: unknown flag {flag}.{suggest(f'--{key}', known)}"


def usage(name: str, command: Command) -> str:
    """What `PROGRAM name --help` says."""
    words, lines = [PROGRAM, name], []
    for flag in command.flags:
        spelt = f"--{flag.name}={flag.value}" if flag.value else f"--{flag.name}"
        words.append(spelt if flag.required else f"[{spelt}]")
        default = f" (default: {flag.default})" if flag.default is not None else ""
        lines.append(f"  {spelt:<22} {flag.help}{default}")
    if command.overrides:
        words.append("[--config.KEY=VALUE ...]")
        lines.append(f"  {'--config.KEY=VALUE':<22} replace a field of the configuration; any number of them")
    if command.settings:
        words.append(f"[--{command.settings}.KEY=VALUE ...]")
        lines.append(f"  {f'--{command.settings}.KEY=VALUE':<22} a setting of the target; any number of them")
    if command.words:
        words.append(command.words)
    about = f"{command.summary[0].upper()}{command.summary[1:]}."
    shown = textwrap.wrap(
        f"usage: {' '.join(words)}", HELP_WIDTH, subsequent_indent="       ", break_on_hyphens=False
    )
    return "\n".join([*shown, "", about, "", *lines, command.more]).rstrip()


def decimal(flag: str, text: str | None) -> float | None:
    """A flag's number, or None where it was not given."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{flag}={text}: expected a number.") from None


def number(flag: str, text: str | None) -> int | None:
    """A whole number, or None where none is given."""
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    raise ConfigError(f"{flag}={text}: expected a whole number.")
