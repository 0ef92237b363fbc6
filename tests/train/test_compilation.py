"""The persistent compilation cache: where it is, and that it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from tokenlab.train.compilation import use_cache

default, given = Path(sys.argv[1]) / "tokenlab" / "xla", Path(sys.argv[2])
count = lambda folder: len(list(folder.glob("*-cache"))) if folder.is_dir() else 0
jax.jit(lambda x: x + 1)(jnp.ones(3)).block_until_ready()  # jax looks at its settings once, which is now
for number, setting in enumerate((True, str(given), False, True), 1):
    before = count(default), count(given)
    used = use_cache(setting)
    jax.jit(lambda x: jnp.sin(x * number) @ x.T)(jnp.ones((3, 4))).block_until_ready()
    names = {None: "none", default: "default", given: "given"}
    print(names[used], count(default) > before[0], count(given) > before[1])
"""


def lines(tmp_path: Path, **variables: str) -> list[str]:
    unset = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "home"), str(tmp_path / "given")]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_where_programs_are_kept(tmp_path: Path) -> None:
    """In the user's folder, in the one that is given, nowhere; and True keeps to the folder in use."""
    assert lines(tmp_path) == [
        "default True False",
        "given False True",
        "none False False",
        "given False True",
    ]


def test_the_variable_of_jax_is_heeded(tmp_path: Path) -> None:
    first = lines(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "given"))[0]
    assert first == "given False True"
