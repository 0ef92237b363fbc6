"""`tokenlab list`: list what can be named in a stack and in a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenlab.core import names
from tokenlab.core.errors import NameLookupError, suggest
from tokenlab.core.flags import Arguments, Command


def run(arguments: Arguments) -> None:
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
    from tokenlab.core.config import shipped

    here = Path("configs")
    folder = here if here.is_dir() else shipped()
    files = sorted(path for path in folder.glob("**/*.py") if not path.name.startswith("_"))
    return [
        (str(here / path.relative_to(folder)), names.summary(path))
        for path in files
        if path.parent.name != "sharding"
    ]


def _recipes() -> Rows:
    from tokenlab.sharding import recipes

    return [(name, names.summary(path)) for name, path in recipes.files().items()]


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
    "meshes": ("ways to lay a model out: config.mesh.recipe", _recipes),
    "optimizers": ("optimizers: config.optimizer.name", _optimizers),
}


COMMAND = Command(
    run,
    "list stack items, methods, scores, models, tasks, data, launch targets, optimizers and configs",
    words="[SECTION ...]",
    more=f"Sections (else all): {', '.join(SECTIONS)}",
)
