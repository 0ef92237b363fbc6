"""Finds every stack item, score, feed-forward layer and feeder of special tokens, with stacks to try them in.

No list is kept by hand.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tokenlab import models
from tokenlab.core import names

SPEC = {"image": ((8, 8, 1), "float32")}  # 16 patches of 2x2 and a CLS token
OUTPUTS = 5


@dataclass(frozen=True)
class Part:
    """One thing that can stand in a stack, and one stack it stands in."""

    role: str
    name: str
    stack: str

    def __str__(self) -> str:
        return f"{self.role}:{self.name}:{self.stack}"


def find() -> list[Part]:
    """All parts; a part without examples of its own is tried in a plain stack."""
    found = []
    for role, default in (
        ("item", None),
        ("score", "block + keep(0.5, by={name}) + block"),
        ("ffn", "block + block(ffn={name})"),
        ("special", "block(special={name})*2 + block"),
    ):
        for name in models.names_of(role):
            if name == "block":
                continue
            offered = names.find_attr(models.PLACES[role], name, role)
            if getattr(offered, "needs_ids", False):
                continue  # pictures have none; tests/methods/dropping/test_token_dropping.py tries it in an encoder
            examples = getattr(offered, "examples", ()) or ((default.format(name=name),) if default else ())
            assert examples, f"{role} {name} offers no examples, so nothing could be tested"
            found += [Part(role, name, stack) for stack in examples]
    return found


def identities() -> list[Part]:
    """Items with a setting that must equal the dense stack, in that setting."""
    found = []
    for name in models.names_of("item"):
        if name == "block":
            continue
        item = names.find_attr(models.PLACES["item"], name, "item")
        if item.identity:
            found.append(Part("item", name, item.identity))
    return found


@functools.cache
def build(stack: str, **settings: Any) -> Any:
    """A tiny ViT over the stack; the same for the same arguments, since to build one is to trace each of its parts."""
    size = settings.pop("size", "nano/2")
    train = settings.pop("train", True)
    outputs = settings.pop("num_outputs", OUTPUTS)
    spec = settings.pop("spec", SPEC)
    return models.build(
        {"name": "vit", "size": size, "stack": stack, **settings}, spec=spec, num_outputs=outputs, train=train
    )


def depth(stack: str) -> int:
    """Blocks in a stack."""
    return build(stack).program.depth


def dense(stack: str) -> str:
    """The dense stack of as many blocks."""
    return f"block*{depth(stack)}"
