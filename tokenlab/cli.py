"""The command line: `tokenlab train | evaluate | generate | encode | compare | benchmark | cost | compile | data |
import | launch | list`.

A command is a file in `tokenlab/commands`. It imports the package that does the work when it runs, so that help and
mistakes on the command line answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tokenlab.commands import (
    benchmark,
    compare,
    compile_,
    cost,
    data,
    encode,
    evaluate,
    generate,
    import_,
    launch,
    list_,
    train,
)
from tokenlab.core import huge_pages
from tokenlab.core.errors import NameLookupError, TokenLabError, suggest
from tokenlab.core.flags import PROGRAM, Command, parse, usage

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130

COMMANDS: dict[str, Command] = {
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "generate": generate.COMMAND,
    "encode": encode.COMMAND,
    "compare": compare.COMMAND,
    "benchmark": benchmark.COMMAND,
    "cost": cost.COMMAND,
    "compile": compile_.COMMAND,
    "data": data.COMMAND,
    "import": import_.COMMAND,
    "launch": launch.COMMAND,
    "list": list_.COMMAND,
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


def _help() -> str:
    lines = [f"usage: {PROGRAM} COMMAND [flags]    ({PROGRAM} COMMAND --help says more)", ""]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(console())
