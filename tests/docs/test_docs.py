"""The documentation is true: its code runs, its commands parse, its links lead somewhere, its tables match the code.

A fenced block whose first line is ```python title=PATH is a file of the tutorial; every other ```python block is run,
all of a page in one namespace, unless that line says no-run. Lines that begin with `tokenlab` in shell blocks are
commands.
"""

from __future__ import annotations

import functools
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from tokenlab import cli, models
from tokenlab.compare import CompareConfig
from tokenlab.core import config, flags, names, stack
from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import NameLookupError, StackError
from tokenlab.cost import count

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = ROOT / "docs" / "adding-a-method.md"
GALLERY = ROOT / "docs" / "methods.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SHELL = ("sh", "bash", "shell", "console")
EXTRA = names.EXTRA_FOLDERS["tokenlab.methods"]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what else stands on its first line, the line below that, and its text."""

    language: str
    info: str
    line: int
    text: str

    @property
    def title(self) -> str | None:
        """The path it is to be written to."""
        found = re.search(r"\btitle=(\S+)", self.info)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)([^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], text.count("\n", 0, m.start(3)) + 1, m[3]) for m in found]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path, program: str = "tokenlab") -> list[list[str]]:
    """Every command line of a page, as words; those of indented blocks too."""
    texts = [block.text for block in blocks(page) if block.language in SHELL]
    texts.append("\n".join(re.findall(r"^ {4,}(.*)$", prose(page), flags=re.MULTILINE)))
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines if program in line]
    return [found for found in words if found and found[0] == program]


def written(page: Path, folder: Path) -> Path:
    """The files of a page, written to a folder."""
    for block in blocks(page):
        if block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> Path:
    """A folder with the files of the tutorial, where its reader stands."""
    return written(TUTORIAL, tmp_path_factory.mktemp("tutorial"))


@pytest.fixture
def added(tutorial, monkeypatch) -> Iterator[Path]:
    """The methods of the tutorial can be found, as after its `export`."""
    monkeypatch.setenv(EXTRA, str(tutorial / "methods"))
    yield tutorial
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tutorial)):
            del sys.modules[name]


def process(words: list[str], folder: Path, tutorial: Path, **variables: str) -> str:
    """Runs a program as the reader of the tutorial would; its output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {EXTRA: str(tutorial / "methods"), "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def contract(tutorial: Path, name: str) -> str:
    """Runs the tutorial's pytest command for one of its methods; what it printed."""
    ((_, *words),) = [found for found in commands(TUTORIAL, "python") if found[1:3] == ["-m", "pytest"]]
    words = [str(tutorial / word) if word == "test_cls_value.py" else word for word in words]
    words = [name if word == "cls_value" else word for word in words]
    return process([sys.executable, *words, "-q", "-p", "no:cacheprovider"], ROOT, tutorial)


# ---------------------------------------------------------------------------------------------------- the tutorial


@pytest.mark.slow
def test_the_method_of_the_tutorial_passes_the_contract(tutorial):
    """What the page promises: the file, its own test and the contract's, found by name alone."""
    passed = re.search(r"(\d+) passed", contract(tutorial, "cls_value"))
    own = (tutorial / "test_cls_value.py").read_text().count("def test_")
    # Each promise of the page is a test, and more must not go missing from the run without notice.
    assert passed and int(passed[1]) >= own + 8


@pytest.mark.slow
def test_the_feed_forward_layer_of_the_tutorial_passes_the_contract(tutorial):
    passed = re.search(r"(\d+) passed", contract(tutorial, "geglu"))
    assert passed and int(passed[1]) >= 8


@pytest.mark.slow
def test_the_method_of_the_tutorial_is_listed(added, capsys):
    assert cli.main(["list", "scores", "methods"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines.count("cls_value") == 2
    with pytest.raises(NameLookupError, match="Did you mean 'cls_value'"):
        models.Names().score("cls_valeu")


@pytest.mark.parametrize("by", ["", ":cls", ":random"])
def test_the_configuration_of_the_tutorial_describes_a_run(added, by):
    from tokenlab.train import experiment

    built = experiment.build(config.load(f"{added / 'configs' / 'cls_value.py'}{by}"))
    name = by.removeprefix(":") or "cls_value"
    assert built.model.stack_text == f"block*2 + keep(0.5, by={name}) + block*4"
    assert (built.model.program.present, built.model.program.after) == (17, 9)


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run(tutorial, tmp_path):
    """All of them, in their order, with fewer steps."""
    written(TUTORIAL, tmp_path)
    short = ["--config.steps=2", "--config.log_every=1", "--config.batch_size=16"]
    for _, *words in commands(TUTORIAL):
        more = short if words[0] == "train" else []
        quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        process([sys.executable, "-m", "tokenlab.cli", *words, *more], tmp_path, tutorial, **quick)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["cls", "cls_value", "random"]


# ---------------------------------------------------------------------------------------------------- every page


def test_there_are_pages():
    assert {"architecture.md", "adding-a-method.md", "methods.md"} <= {page.name for page in PAGES}


LONG = {"early-fusion.md", "jumbo.md", "language-models.md", "experts.md", "image-tokenizer.md"}


@pytest.mark.quick(*(page.name for page in PAGES if page.name not in LONG))
@each_page
def test_python_blocks_run(page):
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page):
        if block.language == "python" and not block.title and "no-run" not in block.info:
            code = "\n" * (block.line - 1) + block.text  # so that a traceback shows the line of the page
            exec(compile(code, str(page), "exec"), namespace)


@each_page
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose(page)):
        file, _, anchor = "".join(target).partition("#")
        if re.match(r"[a-z]+:", file):
            continue
        linked = (page.parent / file).resolve() if file else page
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            broken.append("".join(target))
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_files_and_names_exist(page):
    """Paths and dotted names that stand in `...`, but for files that the page itself writes."""
    text = prose(page)
    own = {Path(block.title).name for block in blocks(page) if block.title}
    tops = "tokenlab|tests|docs|configs|experiments|launch"
    paths = re.findall(rf"`((?:{tops})/[\w./\-]*|\w[\w/\-]*/[\w\-]+\.py)`", text)
    missing = [
        p
        for p in paths
        if Path(p).name not in own and not any((ROOT / top / p).exists() for top in ("", "tokenlab"))
    ]
    assert missing == []
    for name in sorted(set(re.findall(r"`(tokenlab(?:\.\w+)+)", text))):
        pkgutil.resolve_name(name)


@each_page
def test_commands_parse(page, added):
    """The command line accepts them, their configuration exists and has the keys, their stacks can be read."""
    for _, name, *words in commands(page):
        arguments = flags.parse(name, cli.COMMANDS[name], words)
        if file := arguments.values.get("config"):
            here = added if (added / file.partition(":")[0]).exists() else ROOT
            changed = config.override(config.load(f"{here}/{file}"), arguments.overrides)
            if name == "compare":
                to_dataclass(CompareConfig, changed)
                changed = changed.base
            stack.parse(changed.model.get("stack") or "block", changed.stack_vars.to_dict())
        elif text := arguments.overrides.get("model.stack"):
            stack.parse(text)


# ---------------------------------------------------------------------------------------------------- the gallery


SECTIONS = {"Items": "item", "Scores": "score", "Feed-forward layers": "ffn", "Special tokens": "special"}


@pytest.fixture(autouse=True)
def own_methods_stay_out(request, monkeypatch):
    """Methods of whoever runs the tests are not what the pages describe."""
    if "added" not in request.fixturenames:
        monkeypatch.delenv(EXTRA, raising=False)


def rows(section: str) -> dict[str, list[str]]:
    """First cell (a name) -> the cells of each row of a section's table."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", GALLERY.read_text(encoding="utf-8"), re.M | re.S)[1]
    lines = [
        re.split(r"\s*\|\s*", line.strip().strip("|").strip())
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {line[0].strip("`"): line for line in lines}


def vit(text: str):
    """The model whose figures the page shows."""
    spec = {"image": ((224, 224, 3), "float32")}
    return models.build({"name": "vit", "size": "S/16", "stack": text}, spec=spec, num_outputs=1000)


def bert(text: str):
    """The model whose figures the page shows of a stack that ranks tokens by their ids, which pictures do not have."""
    spec = {"ids": ((512,), "int32")}
    return models.build({"name": "encoder_lm", "size": "base", "stack": text}, spec=spec, num_outputs=30_522)


def shown_in(text: str):
    """The model of a stack line, and the FLOPs of what to compare it with."""
    try:
        return vit(text), dense_flops(vit)
    except StackError as error:
        if "by their ids" not in str(error):
            raise
        return bert(text), dense_flops(bert)


@functools.cache
def dense_flops(build) -> int:
    return forward_flops(build("block*12"))


def forward_flops(model) -> int:
    batch = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")}
    if hasattr(model, "vocab_size"):
        batch = {"ids": (1, 512), "predict": (1, 77)}
        batch = {key: jax.ShapeDtypeStruct(shape, "int32") for key, shape in batch.items()}
    return count(
        lambda state, batch: model.apply(state, batch, execution="scan").logits, model.abstract_state(), batch
    ).flops


@pytest.mark.parametrize("section", SECTIONS)
def test_the_gallery_lists_what_there_is(section):
    role, shown = SECTIONS[section], rows(section)
    known = models.names_of(role)
    assert sorted(shown) == sorted(known), (
        "the gallery and the code differ; a row for each of what there is, please"
    )
    dense = dense_flops(vit)
    assert f"{dense:,}" in GALLERY.read_text(encoding="utf-8")
    for name, (first, about, line, *figures) in shown.items():
        text = line.strip("`")
        assert re.search(rf"\b{name}\b", text), f"the stack line of {name} does not use it"
        model, without = shown_in(text)
        assert model.program.depth == 12
        wanted = [str(model.program.after), f"{forward_flops(model) / without:.3f}"]
        row = [first, known[name].removeprefix(f"{name}: "), line, *wanted]
        assert [first, about, line, *figures] == row, f"the row should be: | {' | '.join(row)} |"


def test_the_gallery_lists_the_methods():
    shown = rows("Methods")
    found = {module.name: module.dotted.split(".") for module in names.list_modules("tokenlab.methods")}
    assert sorted(shown) == sorted(found)
    for name, (_, family, link, line) in shown.items():
        _, _, folder, file = found[name]
        assert family == folder
        assert link == f"[{file}.py](../tokenlab/methods/{folder}/{file}.py)"
        shown_in(line.strip("`"))
