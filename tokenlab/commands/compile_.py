"""`tokenlab compile`: compile a step of a configuration for devices that need not be there."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tokenlab.commands.common import CONFIG, EXIT_DOES_NOT_FIT, JSON, PIPE_WIDTH, writable
from tokenlab.core.errors import ConfigError
from tokenlab.core.flags import Arguments, Command, Flag, number


def run(arguments: Arguments) -> int:
    """Compile a step of a configuration for devices that need not be there; 3 when it does not fit them."""
    given = arguments.values
    target = writable(given["json"])
    outputs = number("compile: --outputs", given["outputs"])
    mesh = _mesh(given["mesh"])
    if given["topology"] != "here":
        # There is no TPU here, and JAX would look for one. Flags for a CPU's compiler are unknown to libtpu, which
        # stops at them.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if os.environ.pop("XLA_FLAGS", None):
            print("compile: XLA_FLAGS is left out; flags for a TPU's compiler go into LIBTPU_INIT_ARGS")
    from tokenlab.core import config

    wanted = config.override(config.load(given["config"]), arguments.overrides)
    if "search" in arguments.switches:
        for name, usual in (("mesh", None), ("new", None), ("step", "train")):
            if given[name] != usual:
                raise ConfigError(
                    f"compile: --search ranks meshes for training; leave out --{name}={given[name]}."
                )
        from tokenlab.train import search

        return search.command(wanted, given["config"], given["topology"], outputs=outputs, json_file=target)
    from rich.console import Console

    from tokenlab.train.compile_report import compile_report

    more = {} if given["new"] is None else {"new": number("compile: --new", given["new"])}
    report = compile_report(
        wanted, given["config"], given["topology"], mesh=mesh, num_outputs=outputs, step=given["step"], **more
    )
    if target is not None:
        Path(target).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    console.print(report.to_rich())
    return EXIT_DOES_NOT_FIT if report.fits is False else 0


def _mesh(text: str | None) -> dict[str, int] | None:
    """`--mesh=fsdp=16,expert=8` as sizes by axis."""
    if text is None:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = part.partition("=")
        if not equals or not size.strip().lstrip("-").isdigit() or axis.strip() in sizes:
            raise ConfigError(
                f"compile: --mesh={text!r}: expected devices per axis, each once, such as fsdp=16,expert=8."
            )
        sizes[axis.strip()] = int(size)
    return sizes


COMMAND = Command(
    run,
    "compile a train or serving step for devices that need not be there: memory, traffic, least time",
    (
        CONFIG,
        Flag(
            "topology",
            "a TPU slice such as v5e:16x16 (needs libtpu), or here: the devices of this process",
            "KIND:SHAPE",
            required=True,
        ),
        Flag("mesh", "devices per axis, such as fsdp=16,expert=16 (default: config.mesh)", "AXIS=N,..."),
        Flag("outputs", "logits, where the data is not here and does not say them", "N"),
        Flag(
            "step",
            "train, evaluate, or of a decoder prefill (prompts) and decode (a token more)",
            "NAME",
            default="train",
        ),
        Flag(
            "search", "compile nothing: rank every mapping of the devices by the roofline, no libtpu needed"
        ),
        Flag("new", "decode: tokens that memories have room for behind a prompt (default: 256)", "N"),
        JSON,
    ),
    overrides=True,
    more="Neither devices nor data are needed. Exit status 3: it does not fit.",
)
