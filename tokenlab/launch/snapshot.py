"""Code and configuration as they were when a run was launched, in a folder of their own.

    tokenlab/          the package that is installed here
    config/            the configuration's file, and the Python files beside it that it may read
    configs/sharding/  recipes of sharding
    methods/0, ...     the folders of TOKENLAB_METHODS
    requirements.txt   what the package needs, in the versions that are installed here
    about.json         version, configuration, changes, and the git commit where the code is in a checkout
    NAME.diff          how that checkout differs from its commit

A snapshot is written under another name and then moved, so that it is whole or not there. Its name is its number and
eight digits of its checksum, `0002-5f1d77aa`; nothing is ever written over another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenlab import __version__
from tokenlab.core.bucket import is_address
from tokenlab.core.config import locate
from tokenlab.core.errors import ConfigError
from tokenlab.core.names import EXTRA_FOLDERS
from tokenlab.sharding import recipes

DISTRIBUTION = "tokenlab-jax"
PACKAGE = Path(__file__).parent.parent
_NAME = re.compile(r"(\d{4,})-[0-9a-f]{8}")


class Contents:
    """What a snapshot is to hold.

    Attributes:
      files: path in it -> bytes.
      methods: how many folders of `TOKENLAB_METHODS` are among them.
      digest: eight hexadecimal digits that change with any of them.
    """

    def __init__(self, files: Mapping[str, bytes], methods: int) -> None:
        self.files = dict(sorted(files.items()))
        self.methods = methods
        found = hashlib.sha256()
        for name, content in self.files.items():
            found.update(f"{len(name.encode())} {len(content)} {name}".encode("utf-8", "surrogateescape"))
            found.update(content)
        self.digest = found.hexdigest()[:8]


def collect(config: str, changes: Mapping[str, str], workdir: str) -> Contents:
    """Read what a snapshot holds.

    Args:
      config: "FILE.py" or "FILE.py:ARGUMENT"; the file exists.
      changes: dotted key -> text of each `--config.key=text`.
      workdir: of the run.

    Raises:
      ConfigError: a file cannot be read.
    """
    recipe, _ = locate(config)
    variable = os.environ.get(EXTRA_FOLDERS["tokenlab.methods"], "")
    extras = [Path(text).expanduser() for text in variable.split(os.pathsep) if text]
    try:
        files = {f"tokenlab/{name}": content for name, content in _tree(PACKAGE)}
        files |= {f"config/{path.name}": path.read_bytes() for path in _beside(recipe)}
        files |= {f"{recipes.FOLDER}/{path.name}": path.read_bytes() for path in recipes.files().values()}
        for i, extra in enumerate(extras):
            files |= {f"methods/{i}/{name}": content for name, content in _tree(extra)}
    except OSError as error:
        raise ConfigError(f"the code cannot be kept: {error.filename}: {error.strerror}.") from error
    about: dict[str, Any] = {
        "tokenlab": __version__,
        "config": config,
        "changes": dict(changes),
        "workdir": workdir,
        "git": {},
    }
    for name, path in (("tokenlab", PACKAGE / "__init__.py"), ("config", recipe)):
        found = _checkout(path)
        if found is not None and found[0] not in about["git"].values():  # mostly it is one checkout
            about["git"][name], files[f"{name}.diff"] = found
    files["about.json"] = (json.dumps(about, indent=2, sort_keys=True) + "\n").encode()
    needed = requirements() + (requirements("gcs") if is_address(workdir) else [])
    files["requirements.txt"] = "".join(f"{line}\n" for line in needed).encode()
    return Contents(files, len(extras))


def requirements(extra: str = "") -> list[str]:
    """What the installed package needs, each in the version that is installed here; or what an extra of it adds.

    Raises:
      ConfigError: it is not installed, but found in some folder, so that what it needs is unknown.
    """
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"the distribution {DISTRIBUTION} is not installed, so what it needs is unknown: pip install it."
        ) from None
    found = []
    for line in lines:
        wanted, _, marker = line.partition(";")
        if extra and f'extra == "{extra}"' in marker.replace("'", '"'):
            found.append(wanted.replace(" ", ""))
        elif not extra and "extra ==" not in marker:
            name, options = re.match(r"([\w.\-]+)(\[[^]]*\])?", wanted).groups()  # type: ignore[union-attr]
            found.append(f"{name}{options or ''}=={importlib.metadata.version(name)}")
    return sorted(found)


def next_name(folder: Path, contents: Contents) -> str:
    """The name that the next snapshot in a folder has."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    numbers = [int(found[1]) for name in names if (found := _NAME.fullmatch(name))]
    return f"{max(numbers, default=0) + 1:04d}-{contents.digest}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other launches from the numbers of a folder; makes it when missing. Raises ConfigError when it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def write(folder: Path, name: str, contents: Contents, more: Mapping[str, str]) -> Path:
    """Write a snapshot.

    Args:
      folder: of the snapshots, locked.
      name: from `next_name`.
      contents: from `collect`.
      more: further files, path in it -> text.

    Raises:
      ConfigError: it cannot be written; nothing of it is left.
    """
    made, unfinished = folder / name, folder / f".{name}.{os.getpid()}"
    files = contents.files | {path: text.encode("utf-8", "surrogateescape") for path, text in more.items()}
    try:
        for path, content in files.items():
            target = unfinished / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        os.rename(unfinished, made)  # fails where a folder with anything in it has that name
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ConfigError(f"the snapshot {made} cannot be written: {error.strerror}.") from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return made


def _tree(root: Path) -> Iterator[tuple[str, bytes]]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        for name in names:
            if not name.endswith((".pyc", ".pyo")) and not name.startswith("."):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path.read_bytes()


def _beside(recipe: Path) -> list[Path]:
    """A configuration's file and the Python files in its folder: a recipe may load its neighbours."""
    return [recipe, *(path for path in recipe.parent.glob("*.py") if path.is_file() and path != recipe)]


def _checkout(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """The git commit of a file's checkout and the checkout's changes; None where no checkout holds the file."""
    folder = path.parent

    def git(*words: str) -> bytes:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=True)
        return done.stdout

    try:
        git(
            "ls-files", "--error-unmatch", "--", path.name
        )  # of a project around an environment: not our code's commit
        commit = git("rev-parse", "HEAD").decode().strip()
        difference = git("diff", "--binary", "--no-ext-diff", "--no-color", "HEAD")
        status = (
            git("status", "--porcelain", "--untracked-files=normal").decode(errors="replace").splitlines()
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "status": status}, difference
