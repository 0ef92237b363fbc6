"""TokenLab: transformers that do not spend the same compute on every token, in JAX.

`from tokenlab import SoftMoE` finds a public class or function wherever it is defined under methods/, ops/,
layers/ or models/ and imports that one module. Importing `tokenlab` itself imports neither JAX nor any of
them.
"""

from __future__ import annotations

from tokenlab.core import names as _names

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    return _names.public(name)


def __dir__() -> list[str]:
    return sorted({"__version__", *_names.subpackages(), *_names.public_names()})
