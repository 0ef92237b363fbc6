"""The command line: `tokenlab train | evaluate | generate | encode | compare | benchmark | cost | compile | data |
import | launch | list`.

A command is a small function and a row in COMMANDS. It imports the package that does the work when it runs, so that
help and mistakes on the command line answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tokenlab.core import huge_pages, names
from tokenlab.core.errors import ConfigError, NameLookupError, TokenLabError, suggest
from tokenlab.core.files import check_writable
from tokenlab.core.flags import PROGRAM, Arguments, Command, Flag, decimal, number, parse, usage

PIPE_WIDTH = 160  # columns of a table that does not go to a terminal
EXIT_ERROR, EXIT_DOES_NOT_FIT, EXIT_INTERRUPTED = 2, 3, 130


def train(arguments: Arguments) -> None:
    """Train what a configuration describes, or go on with it."""
    from tokenlab.core import config

    wanted = config.override(config.load(arguments.values["config"]), arguments.overrides)
    with _joined("train", arguments):
        from tokenlab.train import run

        sampler = None
        if wanted.get("sample_every"):
            from tokenlab.generate import Samples as sampler

        run(wanted, arguments.values["workdir"], profile="profile" in arguments.switches, sampler=sampler)


def evaluate(arguments: Arguments) -> None:
    """Evaluate trained weights, with another stack if one is given."""
    workdir = Path(arguments.values["workdir"])
    if not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is not a folder: expected the workdir of a training run.")
    if {"pictures", "no-pictures"} <= arguments.switches:
        raise ConfigError("evaluate: --pictures and --no-pictures contradict each other; give one of them.")
    target = _writable(arguments.values["json"])
    checkpoint = _checkpoint(arguments.values["checkpoint"])
    with _joined("evaluate", arguments, preemption=False):
        from tokenlab.evaluate import run
        from tokenlab.generate import drawn

        run(
            str(workdir),
            overrides=dict(arguments.overrides),
            split=arguments.values["split"],
            json=target,
            checkpoint=checkpoint,
            pictures="all" if "pictures" in arguments.switches else "no-pictures" not in arguments.switches,
            per_class="per-class" in arguments.switches,
            probes=arguments.values["probe"],
            painters=(drawn,),
        )


def _joined(name: str, arguments: Arguments, *, preemption: bool = True) -> AbstractContextManager[None]:
    """The job of several processes that this one is part of, by its flags or its surroundings; see `sharding.hosts`."""
    given = arguments.values
    count, which = (number(f"{name}: --{flag}", given[flag]) for flag in ("num-processes", "process-id"))
    waits = {flag: decimal(f"{name}: --{flag}", given[flag]) for flag in _WAITS if given[flag] is not None}
    from tokenlab.sharding import hosts

    place = hosts.find(given["coordinator"], count, which)
    for flag, seconds in waits.items():
        if place is None:
            raise ConfigError(
                f"{name}: --{flag} is for jobs of several processes, and this one is alone: leave it out."
            )
        if not 0 < seconds < float("inf"):
            raise ConfigError(f"{name}: --{flag}={given[flag]}: expected seconds > 0.")
    return hosts.joined(
        place, preemption=preemption, **{flag.replace("-", "_"): seconds for flag, seconds in waits.items()}
    )


def generate(arguments: Arguments) -> None:
    """Generate text, pictures or captions from trained weights."""
    given = arguments.values
    workdir = Path(given["workdir"])
    if not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is not a folder: expected the workdir of a training run.")
    from_picture = [name for name in ("image", "example") if given[name] is not None]
    if len(from_picture) == 2:
        raise ConfigError("generate: give a picture, either with --image=FILE or with --example=N.")
    what = f"--{from_picture[0]}" if from_picture else "--picture" if arguments.switches else "text"
    _check_kind(what, given, arguments.switches)
    prompts = () if from_picture else _prompts(given)
    whole = {
        name: number(f"generate: --{name}", given[name])
        for name in ("tokens", "top-k", "prompt-tokens", "seed", "samples", "example")
    }
    share = {name: decimal(f"generate: --{name}", given[name]) for name in ("temperature", "top-p")}
    checkpoint = _checkpoint(given["checkpoint"])
    if given["out"] is not None:
        check_writable(given["out"], "--out")
    from tokenlab import generate as generation
    from tokenlab.ops.sample import Sampling

    how: dict[str, Any] = {
        "sampling": Sampling(share["temperature"], whole["top-k"], share["top-p"]),
        "seed": whole["seed"],
        "overrides": dict(arguments.overrides),
        "checkpoint": checkpoint,
    }
    optional = {name: whole[name] for name in ("tokens", "samples") if whole[name] is not None}
    if from_picture:
        chosen = {"image": given["image"], "example": whole["example"]}
        split = {} if given["split"] is None else {"split": given["split"]}
        generation.describe(str(workdir), **chosen, **split, **optional, **how)
    elif arguments.switches:
        generation.draw(str(workdir), prompts, given["out"], **optional, **how)
    else:
        generation.run(str(workdir), prompts, prompt_tokens=whole["prompt-tokens"], **optional, **how)


_OF_KIND = {
    "text": ("prompt", "prompts", "tokens", "prompt-tokens"),
    "--picture": ("prompt", "prompts", "out", "samples"),
    "--image": ("image", "tokens"),
    "--example": ("example", "split", "tokens"),
}
"""Flags of `generate` that not everything takes, by what is generated."""


def _check_kind(what: str, given: Mapping[str, str | None], switches: Collection[str]) -> None:
    """Raise a ConfigError for a flag that has no meaning for what is to be generated."""
    owners = {name: [kind for kind, names in _OF_KIND.items() if name in names] for name in given}
    for name, value in given.items():
        if value is not None and owners[name] and what not in owners[name]:
            whose = " or ".join(owners[name])
            raise ConfigError(
                f"generate: --{name} goes with {whose}, and not with {what}: leave one of them out."
            )
    if what in ("--image", "--example") and "picture" in switches:
        raise ConfigError(f"generate: --picture draws a picture and {what} reads one: leave one of them out.")
    if what == "--picture" and given["out"] is None:
        raise ConfigError("generate: --out=FILE.png is missing: expected the file for the pictures.")


def _prompts(given: Mapping[str, str | None]) -> list[str]:
    if (given["prompt"] is None) == (given["prompts"] is None):
        raise ConfigError("generate: give a prompt with --prompt=TEXT, or several with --prompts=FILE.")
    if given["prompt"] is not None:
        return [given["prompt"]]
    try:
        return Path(given["prompts"]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"generate: --prompts={given['prompts']} cannot be read: {error}.") from None


def encode(arguments: Arguments) -> None:
    """Turn pictures into codes with a trained tokenizer."""
    given = arguments.values
    workdir = Path(given["workdir"])
    if not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is not a folder: expected the workdir of a training run.")
    check_writable(given["out"], "--out")
    checkpoint = _checkpoint(given["checkpoint"])
    from tokenlab.evaluate.encode import run

    run(
        str(workdir),
        given["out"],
        None if given["split"] is None else given["split"].split(","),
        overrides=dict(arguments.overrides),
        checkpoint=checkpoint,
        overwrite="overwrite" in arguments.switches,
    )


def compare(arguments: Arguments) -> None:
    """Train the arms of a comparison under one budget, or go on with it, and write the report."""
    from tokenlab.core import config

    given = arguments.values
    wanted = config.override(config.load(given["config"]), arguments.overrides)
    from tokenlab.compare import command

    said = {name: value for name, value in given.items() if name in ("config", "workdir") and value}
    command.run(
        wanted,
        given["workdir"],
        share=command.read_share(given["arms"]),
        arms=() if given["arm"] is None else (given["arm"],),
        training="report" not in arguments.switches,
        command=command.spelled(said, arguments.overrides),
    )


def benchmark(arguments: Arguments) -> None:
    """Time a configuration or a suite beside the dense stack of as many blocks."""
    given = arguments.values
    numbers = {name: number(f"benchmark: --{name}", given[name]) for name in ("rounds", "batch")}
    target, wanted = _writable(given["json"]), None
    if given["config"] is not None:
        from tokenlab.core import config

        wanted = config.override(config.load(given["config"]), arguments.overrides)
    elif arguments.overrides:
        raise ConfigError(
            "benchmark: --config.KEY=VALUE changes a configuration; give it with --config=FILE."
        )
    from tokenlab.bench import run

    run(
        wanted,
        name=Path((given["config"] or "").partition(":")[0]).stem,
        suite=given["suite"],
        size=given["size"],
        mode=given["mode"],
        json=target,
        markdown="markdown" in arguments.switches,
        profile=given["profile"],
        **numbers,
    )


def cost(arguments: Arguments) -> None:
    """Print what a configuration costs; nothing is trained."""
    from tokenlab.core import config

    target = _writable(arguments.values["json"])
    wanted = config.override(config.load(arguments.values["config"]), arguments.overrides)
    from tokenlab.evaluate import cost_report

    table = cost_report(wanted, chip=arguments.values["chip"])
    if target is not None:
        Path(target).write_text(json.dumps(table.to_json(), indent=2) + "\n", encoding="utf-8")
    if "markdown" in arguments.switches:
        print(table.to_markdown(), end="")
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console = Console(width=PIPE_WIDTH)
        console.print(table.to_rich(width=console.width))


def compile_(arguments: Arguments) -> int:
    """Compile a configuration's train step for devices that need not be there; 3 when it does not fit them."""
    given = arguments.values
    target = _writable(given["json"])
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
    from rich.console import Console

    from tokenlab.train.compile_report import compile_report

    report = compile_report(wanted, given["config"], given["topology"], mesh=mesh, num_outputs=outputs)
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


def data(arguments: Arguments) -> None:
    """List the data sets there are, show one, count n-grams in one, or prepare one."""
    given, described = arguments.values, None
    order = number("data: --order", given["order"])
    if given["config"] is not None:
        from tokenlab.core import config

        wanted = config.override(config.load(given["config"]), arguments.overrides)
        if "data" not in wanted:
            raise ConfigError(
                f"data: {given['config']} has no config.data; expected a configuration for training."
            )
        described = wanted.data
    elif arguments.overrides:
        raise ConfigError("data: --config.KEY=VALUE changes a configuration; give it with --config=FILE.")
    from tokenlab.data import show

    flags = {"data_dir": given["data-dir"], "png": given["png"], "split": given["split"], "order": order}
    show.run(arguments.words, config=described, **flags)


def import_(arguments: Arguments) -> None:
    """Make a workdir of the weights in a file."""
    if len(arguments.words) != 1:
        raise ConfigError(f"import: expected one FILE.safetensors, got {len(arguments.words)} files.")
    if not Path(arguments.words[0]).is_file():
        raise ConfigError(f"import: {arguments.words[0]} is not a file: expected FILE.safetensors.")
    from tokenlab.core import config

    wanted = config.override(config.load(arguments.values["config"]), arguments.overrides)
    from tokenlab.interop import import_weights

    notes = import_weights(
        arguments.words[0],
        arguments.values["workdir"],
        wanted,
        given=arguments.overrides,
        fresh_head="fresh-head" in arguments.switches,
    )
    print("\n".join(notes))


def launch(arguments: Arguments) -> None:
    """Train on several processes: here, under Slurm, on TPU VMs or on Kubernetes."""
    from tokenlab.launch import run

    given = arguments.values
    run(
        given["target"],
        given["config"],
        given["workdir"],
        changes=arguments.overrides,
        settings=arguments.settings,
        dry_run="dry-run" in arguments.switches,
    )


def list_(arguments: Arguments) -> None:
    """List what can be named in a stack and in a configuration."""
    for name in arguments.words:
        if name not in SECTIONS:
            raise NameLookupError(f"list: there is no section {name!r}.{suggest(name, SECTIONS)}")
    for name in arguments.words or SECTIONS:
        title, rows = SECTIONS[name]
        lines = rows()
        width = max((len(row) for row, _ in lines), default=0)
        print(f"{title}  [{name}]")
        for row, summary in lines or [("(none)", "")]:
            print(f"  {row:<{width}}  {summary.removeprefix(f'{row}: ')}".rstrip())
        print(flush=True)


# Stack items, scores and feed-forward layers stand in two places, as `tokenlab.models.PLACES` says; that package is
# not imported here, so that listing does not wait for JAX.
_BLOCK = (
    "attention and feed-forward; block(ffn=NAME) replaces the latter, block(between=ITEM) stands between, "
    "block(special=NAME) feeds CLS and registers."
)

Rows = list[tuple[str, str]]


def _modules(*packages: str, defines: str | None = None) -> Callable[[], Rows]:
    return lambda: [(found.name, found.summary) for found in names.list_modules(packages, defines=defines)]


def _items() -> Rows:
    return [("block", _BLOCK), *_modules("tokenlab.layers.items", "tokenlab.methods", defines="item")()]


def _configs() -> Rows:
    folder = Path("configs") if Path("configs").is_dir() else Path(__file__).parent.parent / "configs"
    files = sorted(path for path in folder.glob("**/*.py") if not path.name.startswith("_"))
    return [(str(path), names.summary(path)) for path in files]


def _targets() -> Rows:
    return [
        (found.name.replace("_", "-"), found.summary.removeprefix(f"{found.name.replace('_', '-')}: "))
        for found in names.list_modules("tokenlab.launch", defines="build")
    ]


def _optimizers() -> Rows:
    # What optax offers is known only by importing it, which takes a second or two; so this section comes last.
    import inspect

    import optax

    from tokenlab.train import optimizer

    return [
        (name, (inspect.getdoc(getattr(optax, name)) or "").partition("\n")[0]) for name in optimizer.names()
    ]


SECTIONS: dict[str, tuple[str, Callable[[], Rows]]] = {
    "items": ("stack items: block*4 + keep(0.5) + block*8", _items),
    "scores": (
        "scores: keep(0.5, by=NAME)",
        _modules("tokenlab.layers.scores", "tokenlab.methods", defines="score"),
    ),
    "ffn": (
        "feed-forward layers: block(ffn=NAME)",
        _modules("tokenlab.layers.ffn", "tokenlab.methods", defines="ffn"),
    ),
    "special": (
        "for CLS and registers: block(special=NAME)",
        _modules("tokenlab.methods", defines="special"),
    ),
    "methods": ("methods", _modules("tokenlab.methods")),
    "models": ("models: config.model.name", _modules("tokenlab.models", defines="build")),
    "tasks": ("tasks: config.task.name", _modules("tokenlab.tasks", defines="build")),
    "data": ("data sources: config.data.name", _modules("tokenlab.data.sources", defines="build")),
    "targets": ("launch targets: tokenlab launch --target=NAME", _targets),
    "configs": ("configs: --config=FILE", _configs),
    "optimizers": ("optimizers: config.optimizer.name", _optimizers),
}


_CONFIG = Flag("config", "a Python file, an argument for it after a colon", "FILE[:ARG]", required=True)
_JSON = Flag("json", "also write the result to this file", "FILE")
_WAITS = ("start-timeout", "host-timeout", "stuck-timeout")
_HOSTS = (
    Flag("coordinator", "of a job of several processes: address of process 0 (docs/scale.md)", "HOST:PORT"),
    Flag("process-id", "of this process, from 0", "K"),
    Flag("num-processes", "of the job; 1: this one is alone, whatever Slurm or a TPU says", "N"),
    Flag("start-timeout", "in which all processes have to report (default: 300)", "SECONDS"),
    Flag("host-timeout", "of silence after which a process counts as gone (default: 60)", "SECONDS"),
    Flag("stuck-timeout", "without a step anywhere after which the job is stuck (default: 1800)", "SECONDS"),
)

COMMANDS: dict[str, Command] = {
    "train": Command(
        train,
        "train what a configuration describes, or go on with it",
        (
            _CONFIG,
            Flag("workdir", "folder of the run; made when missing", "DIR", required=True),
            Flag("profile", "trace three steps into DIR/profile, with a summary of what took longest"),
            *_HOSTS,
        ),
        overrides=True,
    ),
    "evaluate": Command(
        evaluate,
        "evaluate trained weights, with another stack if one is given",
        (
            Flag("workdir", "folder of a training run", "DIR", required=True),
            Flag("split", "split of the data", "NAME", default="test"),
            Flag(
                "checkpoint", "the newest, the best, or that of a step", "latest|best|STEP", default="latest"
            ),
            _JSON,
            Flag("per-class", "also print precision, recall and F1 of each class"),
            Flag("probe", "learn from the train split's features: knn, linear or knn,linear", "NAMES"),
            Flag("pictures", "also draw predictions.png, calibration.png and confusion.png into the workdir"),
            Flag("no-pictures", "do not draw report.png, tokens.png and both_ways.png either"),
            *_HOSTS,
        ),
        overrides=True,
        more='--config.eval.stack="A; B; C" compares several stacks on the same weights and data.',
        hints={"config": "the workdir knows its configuration; change fields of it with --config.KEY=VALUE"},
    ),
    "generate": Command(
        generate,
        "generate text behind a prompt with a trained language model, pictures of captions, captions of pictures",
        (
            Flag("workdir", "folder of a training run", "DIR", required=True),
            Flag("prompt", "what the text begins with; at least a character", "TEXT"),
            Flag("prompts", "several at once: a file with one a line", "FILE"),
            Flag("picture", "draw pictures; the prompts are their captions (of a run on pictures and text)"),
            Flag("out", "of --picture: the sheet to write, with the caption above each", "FILE.png"),
            Flag("samples", "of --picture: pictures of each caption (default: 4)", "N"),
            Flag(
                "image",
                "a picture to say what it shows, in grey levels (of a run on pictures and text)",
                "FILE",
            ),
            Flag("example", "in its place, a picture of the run's data by its number, from 0", "N"),
            Flag("split", "of --example: split of the data (default: validation)", "NAME"),
            Flag(
                "tokens",
                "most tokens to generate (default: 256; captions: as many as a row has room for)",
                "N",
            ),
            Flag("temperature", "divides the logits; 0 takes the likeliest token", "T", default="0.8"),
            Flag("top-k", "draw from the K likeliest tokens", "K"),
            Flag("top-p", "draw from the likeliest tokens of together this probability", "P"),
            Flag("seed", "of the draws", "N", default="0"),
            Flag("prompt-tokens", "longest prompt to compile for (default: the training length)", "N"),
            Flag(
                "checkpoint", "the newest, the best, or that of a step", "latest|best|STEP", default="latest"
            ),
        ),
        overrides=True,
        more="--config.eval.stack=STACK generates with another stack on the same weights.",
    ),
    "encode": Command(
        encode,
        "turn every picture into codes with a trained tokenizer, in a file that gives the pictures again",
        (
            Flag("workdir", "folder of a training run", "DIR", required=True),
            Flag("out", "the file to write", "FILE.npz", required=True),
            Flag("split", "splits of the data (default: all)", "NAME,NAME"),
            Flag(
                "checkpoint", "the newest, the best, or that of a step", "latest|best|STEP", default="latest"
            ),
            Flag("overwrite", "replace FILE.npz where it exists"),
        ),
        overrides=True,
        more="docs/image-tokenizer.md says what the file holds.",
    ),
    "compare": Command(
        compare,
        "train several arms under one budget from several seeds, and write a report",
        (
            _CONFIG,
            Flag("workdir", "folder of the comparison; made when missing", "DIR", required=True),
            Flag("arms", "train only the I-th of N shares of the runs, as one of N machines", "I/N"),
            Flag("arm", "train only this arm", "NAME"),
            Flag("report", "train nothing: collect the finished runs and write the report"),
        ),
        overrides=True,
        more="A rerun goes on where the last one ended; runs that are finished stay as they are.",
    ),
    "benchmark": Command(
        benchmark,
        "time train step and inference of a configuration or a suite beside the dense stack",
        (
            dataclasses.replace(_CONFIG, required=False),
            Flag("suite", "what to time instead: core, every item and method", "NAME"),
            Flag("size", "of the suite: cpu or accelerator (default: by the device)", "NAME"),
            Flag("mode", "train, inference or both", "NAME", default="both"),
            Flag("rounds", "timed rounds, at least 3", "N"),
            Flag("batch", "examples a step (default: the configuration's or the suite's)", "N"),
            _JSON,
            Flag("markdown", "print the table in Markdown"),
            Flag("profile", "trace three steps of each stack into folders of this one", "DIR"),
        ),
        overrides=True,
        more="docs/benchmark.md says how to read the figures.",
    ),
    "cost": Command(
        cost,
        "count tokens, parameters and FLOPs of a configuration, layer by layer",
        (
            _CONFIG,
            _JSON,
            Flag("markdown", "print the table in Markdown"),
            Flag(
                "chip",
                'also print the roofline on a chip such as "TPU v5e", or on this machine: here',
                "NAME",
            ),
        ),
        overrides=True,
    ),
    "compile": Command(
        compile_,
        "compile a configuration's train step for devices that need not be there: memory, traffic, least time",
        (
            _CONFIG,
            Flag(
                "topology",
                "a TPU slice such as v5e:16x16 (needs libtpu), or here: the devices of this process",
                "KIND:SHAPE",
                required=True,
            ),
            Flag("mesh", "devices per axis, such as fsdp=16,expert=16 (default: config.mesh)", "AXIS=N,..."),
            Flag("outputs", "logits, where the data is not here and does not say them", "N"),
            _JSON,
        ),
        overrides=True,
        more="Neither devices nor data are needed. Exit status 3: it does not fit.",
    ),
    "data": Command(
        data,
        "list the data sets there are, show one, count n-grams in text, or prepare a set of TFDS",
        (
            dataclasses.replace(_CONFIG, help="show and ngram: the data of a configuration", required=False),
            Flag("data-dir", "folder of TFDS sets (default: $TFDS_DATA_DIR, else TFDS's own)", "DIR"),
            Flag("png", "show: the contact sheet (default: NAME.png in this folder)", "FILE"),
            Flag(
                "split",
                "show: split to count and draw (default: train, else the first); ngram: to predict (validation)",
                "NAME",
            ),
            Flag("order", "ngram: the longest n-gram, 1 to 5 (default: 5)", "N"),
        ),
        overrides=True,
        words="(list | show NAME | show --config=FILE | ngram --config=FILE | prepare NAME)",
        more="NAME is a TFDS set in that folder, the folder of one, or a source that needs no files.",
    ),
    "import": Command(
        import_,
        "make a workdir of weights from timm, Hugging Face or DINOv2",
        (
            _CONFIG,
            Flag("workdir", "folder to make", "DIR", required=True),
            Flag("fresh-head", "start the classifier at zeros instead of taking the file's"),
        ),
        overrides=True,
        words="FILE.safetensors",
        more="The configuration supplies data and task; the settings of the model come from the weights.",
    ),
    "launch": Command(
        launch,
        "train on several processes: here, under Slurm, on TPU VMs or on Kubernetes",
        (
            Flag("target", "where: local, slurm, tpu-vm, gke or jobset", "NAME", required=True),
            _CONFIG,
            Flag("workdir", "folder of the run, or gs://BUCKET/FOLDER", "DIR", required=True),
            Flag("dry-run", "print what would be run; write and run nothing"),
        ),
        overrides=True,
        settings="launch",
        more="docs/launch.md has the settings of each target. The same command again goes on with the run.",
    ),
    "list": Command(
        list_,
        "list stack items, methods, scores, models, tasks, data, launch targets, optimizers and configs",
        words="[SECTION ...]",
        more=f"Sections: {', '.join(SECTIONS)}; all by default.",
    ),
}


def console() -> int:
    """The program `tokenlab`: `main`, in huge pages where the system has them."""
    huge_pages.ensure()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, 2 for a mistake, 3 of `compile`, 130 after Ctrl-C."""
    words, status = list(sys.argv[1:] if argv is None else argv), 0
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_help())
        elif words[0] == "--version":
            from tokenlab import __version__

            print(f"{PROGRAM} {__version__}")
        else:
            status = _run(words[0], words[1:])
        sys.stdout.flush()
    except TokenLabError as error:
        print(f"{PROGRAM}: error: {_message(error)}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _message(error: TokenLabError) -> str:
    """One line, but where a caret stands under the place in a stack or a transform."""
    text = str(error)
    last = text.rpartition("\n")[2]
    return text if last and not last.strip(" ^") else " ".join(text.split())


def _run(name: str, words: Sequence[str]) -> int:
    if name not in COMMANDS:
        what = "flag before a command" if name.startswith("-") else "command"
        raise NameLookupError(f"unknown {what} {name!r}.{suggest(name, [*COMMANDS, '--help', '--version'])}")
    if any(word in ("-h", "--help") for word in words):
        print(usage(name, COMMANDS[name]))
        return 0
    command = COMMANDS[name]
    return command.run(parse(name, command, words)) or 0


def _writable(path: str | None) -> str | None:
    """Check before the work is done that its result can be written."""
    if path is not None:
        check_writable(path, "--json")
    return path


def _checkpoint(text: str) -> int | str:
    if text in ("latest", "best"):
        return text
    if text.isdecimal() and len(text) < 16:
        return int(text)
    raise ConfigError(f"--checkpoint={text}: expected latest, best, or a step such as 3000.")


def _help() -> str:
    lines = [f"usage: {PROGRAM} COMMAND [flags]    ({PROGRAM} COMMAND --help says more)", ""]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(console())
