"""Find and list things by module path: a method, an item, a model or a task is a file, named as the file is.

There is no registry. `find("tokenlab.methods", "soft_moe")` walks the package's folder and its subfolders
(families) and imports the one file of that name; `list_modules` walks the same folders and reads docstrings
without importing anything. Files and folders whose name begins with "_" are private and never found.

Methods may also live outside the source tree: the environment variable TOKENLAB_METHODS holds folders,
separated as in PATH, each laid out like tokenlab/methods/: `<family>/<name>.py`. They are found, listed and
offered by `from tokenlab import ...` exactly like the built-in ones.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tokenlab.core.errors import NameLookupError, suggest

EXTRA_FOLDERS = {"tokenlab.methods": "TOKENLAB_METHODS"}  # package -> environment variable with more folders
PUBLIC_PACKAGES = ("methods", "ops", "layers", "models")  # what `from tokenlab import Name` looks through

_SOURCE_ROOT = Path(__file__).parent.parent
_added_paths: set[str] = set()  # every folder this module has put on some package's __path__


class Module(NamedTuple):
    """A module that can be found by name.

    Attributes:
      name: what users write, the file's stem.
      dotted: its full import path.
      summary: the first line of its docstring, "" without one.
    """

    name: str
    dotted: str
    summary: str


class _File(NamedTuple):
    """A module's file, the path it is imported by, and the package it was looked for in."""

    package: str
    dotted: str
    path: Path


class _Source(NamedTuple):
    """What a module's text says, read with `ast`."""

    summary: str
    defined: frozenset[str]
    public: frozenset[str]


def find(package: str | Sequence[str], name: str) -> ModuleType:
    """Import the module called `name` from `package`, whichever family (subfolder) it stands in.

    Args:
      package: dotted path of the package, for example "tokenlab.methods", or several of them, searched
        together.
      name: the file's stem, for example "soft_moe".

    Returns:
      The imported module.

    Raises:
      NameLookupError: no such package, no module of that name (with the nearest one), or two of that name.
      Exception: whatever the module itself raises on import is passed on as it is.
    """
    files = _files(package)
    if name not in files:
        where = package if isinstance(package, str) else " or ".join(package)
        raise NameLookupError(f"{where} has no module {name!r}.{suggest(str(name), files)}")
    return _load(files[name])


def find_attr(package: str | Sequence[str], name: str, attribute: str) -> object:
    """The value `attribute` of the module that `find(package, name)` gives.

    Raises:
      NameLookupError: as `find`, or the module does not define `attribute`.
    """
    module = find(package, name)
    try:
        return getattr(module, attribute)
    except AttributeError:
        near = suggest(attribute, _read(_files(package)[name].path).defined)
        raise NameLookupError(
            f"{module.__name__} does not define {attribute!r}, which is expected of it.{near}"
        ) from None


def list_modules(package: str | Sequence[str], *, defines: str | None = None) -> list[Module]:
    """The modules of `package` and its families, sorted by name, read without importing them.

    Args:
      package: dotted path of the package, or several.
      defines: list only the modules that define this name at their top level.

    Returns:
      A list of `Module(name, dotted, summary)`.

    Raises:
      NameLookupError: no such package, or one name that two files answer to.
      SyntaxError: a file is not Python.
    """
    found = []
    for name, file in sorted(_files(package).items()):
        source = _read(file.path)
        if defines is None or defines in source.defined:
            found.append(Module(name, file.dotted, source.summary))
    return found


def summary(file: Path) -> str:
    """The first line of a Python file's docstring, "" without one, read without running it."""
    return _read(file).summary


def subpackages() -> list[str]:
    """Names of the packages and modules directly under tokenlab/, sorted."""
    folders = [path.name for path in _SOURCE_ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    files = [path.stem for path in _SOURCE_ROOT.glob("*.py")]
    return sorted(name for name in folders + files if name.isidentifier() and not name.startswith("_"))


def public_names() -> dict[str, list[str]]:
    """Public name -> dotted paths of the modules that define it, over methods/, ops/, layers/ and models/.

    Public are the names in a module's `__all__` and its top-level classes with a capital first letter.
    """
    return {name: [file.dotted for file in files] for name, files in _public_files().items()}


def public(name: str) -> object:
    """The public class, function or subpackage `name` of TokenLab, imported when first asked for.

    Raises:
      AttributeError: nothing public has that name (with the nearest one), or several modules define it.
    """
    if name.startswith("_"):
        raise AttributeError(f"module 'tokenlab' has no attribute {name!r}")
    if name in subpackages():
        return importlib.import_module(f"tokenlab.{name}")
    known = _public_files()
    files = known.get(name, [])
    if not files:
        near = suggest(name, known)
        raise AttributeError(f"tokenlab has no public name {name!r}.{near if 'mean' in near else ''}")
    if len(files) > 1:
        places = " and by ".join(f"{file.dotted} ({file.path})" for file in files)
        raise AttributeError(f"tokenlab.{name} is defined by {places}; import it from one of them.")
    return getattr(_load(files[0]), name)


def _public_files() -> dict[str, list[_File]]:
    found: dict[str, list[_File]] = {}
    for part in PUBLIC_PACKAGES:
        if (_SOURCE_ROOT / part).is_dir():
            for file in _walk(f"tokenlab.{part}"):
                for name in _read(file.path).public:
                    found.setdefault(name, []).append(file)
    return dict(sorted(found.items()))


def _read(file: Path) -> _Source:
    """Docstring line, defined names and public names of a Python file, without importing it.

    Raises:
      SyntaxError: the file is not Python; the error names file and line.
    """
    status = file.stat()
    return _read_source(file, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4096)
def _read_source(file: Path, mtime_ns: int, size: int) -> _Source:
    del mtime_ns, size  # part of the cache key only: a file that changed is read again
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    summary = (ast.get_docstring(tree) or "").strip().partition("\n")[0].strip()
    defined: set[str] = set()
    public: set[str] = set()
    for node in tree.body:
        match node:
            case ast.ClassDef(name=name):
                defined.add(name)
                if name[0].isupper():
                    public.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                defined.add(name)
            case ast.Assign(targets=targets):
                names = {target.id for target in targets if isinstance(target, ast.Name)}
                defined |= names
                if "__all__" in names:
                    public |= _listed(file, node)
            case ast.AnnAssign(target=ast.Name(id=name)):
                defined.add(name)
                if name == "__all__":
                    public |= _listed(file, node)
    return _Source(summary, frozenset(defined), frozenset(public))


def _listed(file: Path, node: ast.Assign | ast.AnnAssign) -> set[str]:
    """The names in `__all__ = [...]`."""
    try:
        return set(ast.literal_eval(node.value))
    except (ValueError, TypeError):
        where = f"{file} line {node.lineno}"
        raise NameLookupError(f"{where}: __all__ must be a plain list of strings.") from None


def _files(package: str | Sequence[str]) -> dict[str, _File]:
    """The public modules of one package or several by name; two files of one name are an error."""
    found: dict[str, _File] = {}
    for root in (package,) if isinstance(package, str) else package:
        for file in _walk(root):
            other = found.setdefault(file.path.stem, file)
            if other.path != file.path:
                both = f"{other.path} and {file.path}"
                raise NameLookupError(
                    f"two modules are named {file.path.stem!r}: {both}; rename one of them."
                )
    return found


def _walk(package: str) -> list[_File]:
    """The public modules in the folders of a package and the families below them."""
    folders = [(package, folder) for folder in (*_own_folders(package), *_extra_folders(package))]
    found = []
    while folders:
        dotted, folder = folders.pop(0)
        for path in sorted(folder.iterdir()):
            name = f"{dotted}.{path.stem}"
            if path.name.startswith(("_", ".")):
                continue
            if path.is_dir() and path.name.isidentifier():
                folders.append((name, path))
            elif path.suffix == ".py" and path.is_file():
                if not path.stem.isidentifier():
                    raise NameLookupError(
                        f"{path} cannot be imported: rename it, {path.stem!r} is no Python name."
                    )
                found.append(_File(package, name, path))
    return found


def _own_folders(package: str) -> list[Path]:
    """The folders of a package as installed, without those this module added."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError as error:
        # The parent is missing; an import that fails inside an existing parent is that parent's own error.
        if error.name is None or not (package == error.name or package.startswith(error.name + ".")):
            raise
        spec = None
    if spec is None or spec.submodule_search_locations is None:
        raise NameLookupError(f"there is no package {package!r} to look in.")
    return [Path(path) for path in spec.submodule_search_locations if path not in _added_paths]


def _extra_folders(package: str) -> list[Path]:
    """The folders that the environment adds to a package, in order."""
    variable = EXTRA_FOLDERS.get(package)
    folders: list[Path] = []
    for text in os.environ.get(variable, "").split(os.pathsep) if variable else ():
        if not text:
            continue
        folder = Path(text).expanduser().resolve()
        if not folder.is_dir():
            raise NameLookupError(f"{variable} names {text!r}, which is not a folder.")
        if folder not in folders:
            folders.append(folder)
    return folders


def _load(file: _File) -> ModuleType:
    """Import a module from exactly this file."""
    loaded = sys.modules.get(file.dotted)
    if loaded is not None:
        if Path(loaded.__file__ or "") == file.path:
            return loaded
        del sys.modules[file.dotted]  # the same name from a folder that TOKENLAB_METHODS held before
    importlib.invalidate_caches()
    extras = _extra_folders(file.package)
    families = file.dotted.removeprefix(file.package + ".").split(".")[:-1]
    for depth in range(len(families) + 1):
        parent = importlib.import_module(".".join([file.package, *families[:depth]]))
        _set_extra_paths(parent, [extra.joinpath(*families[:depth]) for extra in extras])
    return importlib.import_module(file.dotted)


def _set_extra_paths(module: ModuleType, folders: list[Path]) -> None:
    """Let `module` (a package) import from those of `folders` that exist, besides its own."""
    wanted = [str(folder) for folder in folders if folder.is_dir()]
    own = [path for path in module.__path__ if path not in _added_paths]
    # A family that exists in extra folders only is a namespace package: its path follows its parent's.
    missing = [path for path in wanted if path not in own]
    _added_paths.update(missing)
    if list(module.__path__) != own + missing:
        module.__path__ = own + missing
