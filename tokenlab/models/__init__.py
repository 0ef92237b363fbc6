"""Models: one a file, found by its name; here names become things.

A model file offers `Config`, a frozen dataclass of its settings, and `build(config, **facts)`, which returns an object
with `init`, `apply`, `logical_axes` and the other methods of `tokenlab.models.vit.ViT`, most of which
`tokenlab.models.trunk.Trunk` has for it. One whose settings were renamed offers `current(settings)`, which
gives those of older runs their names of today. A model without a stack, such as `tokenlab.models.vq_image`, has
`program` None and `stack_text` "", and says in `cost_rows()` which parts a cost table tells apart.

Stack items, scores and feed-forward layers are looked for first among the generic ones in `tokenlab.layers`, then among
the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenlab.core import names
from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import NameLookupError, suggest
from tokenlab.layers.item import Item, Score

PLACES: Mapping[str, tuple[str, ...]] = {
    "item": ("tokenlab.layers.items", "tokenlab.methods"),
    "score": ("tokenlab.layers.scores", "tokenlab.methods"),
    "ffn": ("tokenlab.layers.ffn", "tokenlab.methods"),
    "special": ("tokenlab.methods",),
}
"""What a file offers (the attribute it defines) -> the packages whose files may offer it."""

ROLES: Mapping[str, str] = {
    "item": "stack item",
    "score": "score",
    "ffn": "feed-forward layer",
    "special": "feeder of special tokens",
}
"""What each of them is called in messages."""

BLOCK = (
    "block: attention and feed-forward; block(ffn=NAME) replaces the latter, block(between=ITEM) stands between, "
    "block(special=NAME) feeds CLS and registers."
)


class Names:
    """Finds what a stack names, by module path; see `tokenlab.layers.bind.Resolver`."""

    def item(self, name: str) -> type[Item]:
        """The class of stack item `name` (not of `block`, which is no item). Raises NameLookupError."""
        return self._find("item", name)

    def score(self, name: str) -> type[Score]:
        """The class of score `name`. Raises NameLookupError with the nearest name."""
        return self._find("score", name)

    def ffn(self, name: str) -> Callable[..., Any]:
        """The factory of feed-forward layer `name`. Raises NameLookupError with the nearest name."""
        return self._find("ffn", name)

    def special(self, name: str) -> Callable[..., Any]:
        """The factory of what feeds special tokens, by `name`. Raises NameLookupError with the nearest name."""
        return self._find("special", name)

    def _find(self, role: str, name: str) -> Any:
        known = names_of(role)
        if name not in known:
            raise NameLookupError(f"{ROLES[role]} {name!r} is unknown.{suggest(name, known)}")
        return names.find_attr(PLACES[role], name, role)


def names_of(role: str) -> dict[str, str]:
    """Every name that serves in a role of `PLACES` -> the first line of its docstring; nothing is imported."""
    found = {module.name: module.summary for module in names.list_modules(PLACES[role], defines=role)}
    return {"block": BLOCK, **found} if role == "item" else found


def build(
    settings: Mapping[str, Any],
    *,
    spec: Mapping[str, tuple[tuple[int, ...], str]],
    num_outputs: int,
    stack: str | None = None,
    stack_vars: Mapping[str, int | float] | None = None,
    train: bool = True,
) -> Any:
    """The model that `config.model` describes.

    Args:
      settings: `name` of the model's file, the rest its settings.
      spec: key -> (shape of one example, dtype), from the data source.
      num_outputs: logits the task needs.
      stack: in place of `settings["stack"]` (another stack on the same weights).
      stack_vars: numbers that names in the stack stand for.
      train: False takes `train_only` items out.

    Raises:
      NameLookupError, ConfigError, StackError, ShapeError: what does not fit, said in one line.
    """
    module, config = _read(settings if stack is None else {**settings, "stack": stack})
    return module.build(
        config, spec=spec, num_outputs=num_outputs, stack_vars=dict(stack_vars or {}), train=train
    )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise a NameLookupError or ConfigError for settings that no model has, or values that are not of their type."""
    _read(settings)


def _read(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The module of a model, and its settings."""
    settings = dict(settings)
    module = names.find("tokenlab.models", settings.pop("name", "vit"))
    if hasattr(module, "current"):
        settings = module.current(settings)
    return module, to_dataclass(module.Config, settings, path="config.model")
