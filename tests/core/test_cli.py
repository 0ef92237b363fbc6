"""The command line: what it hands to the packages that do the work, and what it says about mistakes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tokenlab import __version__, cli, models
from tokenlab.commands import list_
from tokenlab.core.errors import ConfigError, NonFiniteError, StackError
from tokenlab.train import optimizer

CONFIG = """
from dataclasses import dataclass, field
from typing import Any
from tokenlab.core.config import from_dataclass

@dataclass(frozen=True)
class Run:
    steps: int = 10
    stack: str = "block"
    vars: dict[str, Any] = field(default_factory=dict)

def get_config(arg=None):
    config = from_dataclass(Run)
    if arg:
        config.stack = arg
    return config
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def package(monkeypatch):
    """Stands in for a package that a command imports, and records how its function is called."""

    def replace(name: str, function: str, answer=None) -> list:
        calls = []

        def called(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{function: called}))
        return calls

    return replace


def run(capsys, *words):
    """Exit status, standard output and standard error of one command line."""
    status = cli.main(list(map(str, words)))
    out, err = capsys.readouterr()
    return status, out, err


class TestTrain:
    @pytest.mark.parametrize("style", ["--config={}:block*2", "--config {}:block*2"])
    def test_config_argument_overrides_and_workdir(self, config, package, capsys, style):
        calls = package("tokenlab.train", "run", {})
        words = style.format(config).split(" ")
        changes = ["--config.steps=3", "--config.vars.k=0.5", "--config.vars.text=a=b --x"]
        assert run(capsys, "train", *changes, *words, "--workdir", "/w/d") == (0, "", "")
        ((found, workdir),) = [args for args, _ in calls]
        assert found.to_dict() == {"steps": 3, "stack": "block*2", "vars": {"k": 0.5, "text": "a=b --x"}}
        assert workdir == "/w/d"

    def test_a_profile_is_asked_for(self, config, package, capsys):
        calls = package("tokenlab.train", "run", {})
        words = ("train", f"--config={config}", "--workdir=/w/d")
        run(capsys, *words)
        run(capsys, *words, "--profile")
        assert [how for _, how in calls] == [
            {"profile": profile, "sampler": None} for profile in (False, True)
        ]

    def test_mistakes_in_the_config_are_told_before_anything_is_run(self, config, package, capsys):
        calls = package("tokenlab.train", "run")
        words = ("train", f"--config={config}", "--workdir=/w/d", "--config.stepz=3")
        expected = "tokenlab: error: config has no key 'stepz'. Did you mean 'steps'?\n"
        assert run(capsys, *words) == (2, "", expected)
        assert calls == []


class TestEvaluate:
    def test_what_is_handed_on(self, tmp_path, package, capsys):
        calls = package("tokenlab.evaluate", "run", {})
        package("tokenlab.generate", "drawn")
        words = (
            "evaluate",
            f"--workdir={tmp_path}",
            "--config.model.stack=block*2 + keep(0.5)",
            "--split=validation",
        )
        assert run(capsys, *words, f"--json={tmp_path / 'r.json'}")[0] == 0
        assert run(capsys, "evaluate", "--workdir", tmp_path, "--no-pictures")[0] == 0
        more = ("--pictures", "--per-class", "--probe=knn,linear")
        assert run(capsys, "evaluate", "--workdir", tmp_path, *more, "--checkpoint=30")[0] == 0
        both_ways = {"painters": (sys.modules["tokenlab.generate"].drawn,)}
        rest = {"overrides": {}, "split": "test", "json": None, **both_ways}
        assert calls == [
            (
                (str(tmp_path),),
                {
                    "overrides": {"model.stack": "block*2 + keep(0.5)"},
                    "split": "validation",
                    "json": str(tmp_path / "r.json"),
                    "checkpoint": "latest",
                    "pictures": True,
                    "per_class": False,
                    "probes": None,
                    **both_ways,
                },
            ),
            (
                (str(tmp_path),),
                {**rest, "checkpoint": "latest", "pictures": False, "per_class": False, "probes": None},
            ),
            (
                (str(tmp_path),),
                {**rest, "checkpoint": 30, "pictures": "all", "per_class": True, "probes": "knn,linear"},
            ),
        ]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ["--config=x.py"],
                "evaluate takes no --config: the workdir knows its configuration; change fields of it",
            ),
            (["--pictures", "--no-pictures"], "evaluate: --pictures and --no-pictures contradict each other"),
            (
                ["--json=/no/such/folder/x.json"],
                "--json=/no/such/folder/x.json cannot be written: expected a file in",
            ),
            (
                ["--json=/proc/x.json"],
                "--json=/proc/x.json cannot be written: expected a file in a folder that",
            ),
            (["--checkpoint=lates"], "--checkpoint=lates: expected latest, best, or a step such as 3000."),
            (["--checkpoint=-3"], "--checkpoint=-3: expected latest, best, or a step"),
        ],
    )
    def test_mistakes(self, tmp_path, package, capsys, words, message):
        calls = package("tokenlab.evaluate", "run")
        status, _, err = run(capsys, "evaluate", f"--workdir={tmp_path}", *words)
        assert status == 2
        assert err.startswith(f"tokenlab: error: {message}")
        assert calls == []

    def test_a_workdir_that_is_none(self, tmp_path, capsys):
        status, _, err = run(capsys, "evaluate", f"--workdir={tmp_path / 'none'}")
        expected = f"--workdir={tmp_path / 'none'} is not a folder: expected the workdir of a training run."
        assert (status, err) == (2, f"tokenlab: error: {expected}\n")


class TestCost:
    class Table:
        def to_json(self):
            return {"total": 12}

        def to_markdown(self):
            return "| total |\n"

        def to_rich(self, width=None):
            return "a rich table"

    def test_table_markdown_and_json(self, config, tmp_path, package, capsys):
        calls = package("tokenlab.evaluate", "cost_report", self.Table())
        words = ("cost", f"--config={config}", "--config.steps=4")
        assert run(capsys, *words) == (0, "a rich table\n", "")
        target = tmp_path / "cost.json"
        assert run(capsys, *words, "--markdown", f"--json={target}") == (0, "| total |\n", "")
        assert json.loads(target.read_text()) == {"total": 12}
        assert [args[0].steps for args, _ in calls] == [4, 4]

    def test_a_target_that_cannot_be_written_is_told_first(self, config, tmp_path, package, capsys):
        calls = package("tokenlab.evaluate", "cost_report", self.Table())
        assert run(capsys, "cost", f"--config={config}", f"--json={tmp_path}")[0] == 2
        assert calls == []


class TestList:
    def test_every_section_has_something(self, capsys):
        status, out, err = run(capsys, "list")
        assert (status, err) == (0, "")
        for name, (title, _) in list_.SECTIONS.items():
            assert f"{title}  [{name}]\n" in out
        for line in (
            "  keep ",
            "  random ",
            "  mlp ",
            "  vit ",
            "  classify ",
            "  digits ",
            "  adamw ",
            "  block ",
        ):
            assert line in out
        assert out.count("(none)") == (0 if list_._configs() else 1)
        rows = [line.split() for line in out.splitlines() if line.startswith("  ") and "(none)" not in line]
        assert all(len(row) > 1 for row in rows), "each has a line of description"

    def test_some_sections(self, capsys):
        _, out, _ = run(capsys, "list", "tasks", "models")
        assert [line for line in out.splitlines() if line and not line.startswith(" ")] == [
            "tasks: config.task.name  [tasks]",
            "models: config.model.name  [models]",
        ]

    def test_it_lists_what_models_and_optimizers_know(self):
        rows = {name: rows() for name, (_, rows) in list_.SECTIONS.items()}
        for section, role in (("items", "item"), ("scores", "score"), ("ffn", "ffn"), ("special", "special")):
            assert dict(rows[section]) == models.names_of(role) | (
                {"block": list_._BLOCK} if section == "items" else {}
            )
        assert models.BLOCK == f"block: {list_._BLOCK}"
        assert [name for name, _ in rows["optimizers"]] == optimizer.names()

    def test_configs_of_the_current_folder(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "configs" / "deep").mkdir(parents=True)
        (tmp_path / "configs" / "one.py").write_text('"""One recipe.\n\nMore."""\n')
        (tmp_path / "configs" / "deep" / "two.py").write_text("")
        (tmp_path / "configs" / "_shared.py").write_text("")
        monkeypatch.chdir(tmp_path)
        _, out, _ = run(capsys, "list", "configs")
        assert out.splitlines()[1:3] == ["  configs/deep/two.py", "  configs/one.py       One recipe."]

    def test_configs_of_the_package_where_the_folder_has_none(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        _, out, _ = run(capsys, "list", "configs")
        assert any(line.startswith("  configs/quickstart.py ") for line in out.splitlines())

    def test_an_unknown_section(self, capsys):
        expected = "tokenlab: error: list: there is no section 'item'. Did you mean 'items'?\n"
        assert run(capsys, "list", "item") == (2, "", expected)

    def test_methods_of_other_folders(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "family").mkdir()
        (tmp_path / "family" / "mine.py").write_text('"""mine: an idea."""\nitem = 3\n')
        monkeypatch.setenv("TOKENLAB_METHODS", str(tmp_path))
        _, out, _ = run(capsys, "list", "items", "methods")
        assert sum(line.split() == ["mine", "an", "idea."] for line in out.splitlines()) == 2


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
            (["--verison"], "unknown flag before a command '--verison'. Did you mean '--version'?"),
            (["train"], "train: --config=FILE[:ARG] is missing (a Python file, an argument for it after a colon)."),
            (
                ["train", "--config=x.py"],
                "train: --workdir=DIR is missing (folder of the run, or gs://BUCKET/FOLDER; made when missing).",
            ),
            (["train", "--wrkdir=x"], "train: unknown flag --wrkdir. Did you mean '--workdir'?"),
            (["train", "-workdir=x"], "train: unknown flag -workdir. Did you mean '--workdir'?"),
            (["train", "--confg.steps=3"], "train: unknown flag --confg.steps. Did you mean --config.steps?"),
            (["train", "--model.stack=3"], "train: unknown flag --model.stack. Did you mean --config.model.stack?"),
            (["train", "--workdir"], "train: --workdir needs a value: expected --workdir=DIR."),
            (["train", "--workdir="], "train: --workdir needs a value: expected --workdir=DIR."),
            (["train", "--workdir", "--config=x.py"], "train: --workdir needs a value: expected --workdir=DIR."),
            (["train", "--workdir=a", "--workdir=b"], "train: --workdir is given twice."),
            (["train", "--config.steps", "3"], "train: --config.steps needs a value: expected --config.steps=VALUE."),
            (["train", "--config.a=1", "--config.a=2"], "train: --config.a is given twice."),
            (["train", "config.a=3"], "train: unexpected argument 'config.a=3'. Did you mean --config.a=3?"),
            (["cost", "--markdown=yes"], "cost: --markdown is a switch and takes no value; got 'yes'."),
            (["cost", "--markdown", "--markdown"], "cost: --markdown is given twice."),
            (["list", "--config.a=1"], "list: unknown flag --config.a. Known: --help."),
        ],
    )  # fmt: skip
    def test_one_line_and_exit_2(self, capsys, words, message):
        assert run(capsys, *words) == (2, "", f"tokenlab: error: {message}\n")

    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [
            (ConfigError("two\n lines"), 2, "tokenlab: error: two lines\n"),
            (
                NonFiniteError("step 3: loss is not finite"),
                2,
                "tokenlab: error: step 3: loss is not finite\n",
            ),
            (StackError("stack: what\n  blok\n  ^^^^"), 2, "tokenlab: error: stack: what\n  blok\n  ^^^^\n"),
            (KeyboardInterrupt(), 130, "tokenlab: interrupted\n"),
        ],
    )
    def test_errors_of_the_work(self, config, package, capsys, error, status, message):
        package("tokenlab.train", "run", error)
        assert run(capsys, "train", f"--config={config}", "--workdir=/w/d") == (status, "", message)

    @pytest.mark.parametrize("error", [SystemExit(143), RuntimeError("a bug")])
    def test_what_is_no_mistake_of_the_user_passes(self, config, package, error):
        package("tokenlab.train", "run", error)
        with pytest.raises(type(error)) as raised:
            cli.main(["train", f"--config={config}", "--workdir=/w/d"])
        assert raised.value is error


class TestHelp:
    @pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
    def test_of_the_program(self, capsys, words):
        status, out, _ = run(capsys, *words)
        assert status == 0
        for name, command in cli.COMMANDS.items():
            assert name in out
            assert command.summary in out

    @pytest.mark.parametrize("name", list(cli.COMMANDS))
    def test_of_a_command(self, capsys, name):
        status, out, _ = run(capsys, name, "--nonsense", "--help")
        assert status == 0
        assert out.startswith(f"usage: tokenlab {name} ")
        for flag in cli.COMMANDS[name].flags:
            assert f"--{flag.name}" in out
            assert flag.help in out
        assert all(len(line) <= 120 for line in out.splitlines())

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("import", " FILE.safetensors"),
            ("data", " (list | show NAME | show --config=FILE | ngram --config=FILE | prepare NAME)"),
            ("list", " [SECTION ...]"),
        ],
    )
    def test_words_are_shown_as_many_as_they_are(self, capsys, name, words):
        usage = run(capsys, name, "--help")[1].partition("\n\n")[0]
        assert " ".join(usage.split()).endswith(words)

    def test_version(self, capsys):
        assert run(capsys, "--version") == (0, f"tokenlab {__version__}\n", "")


def test_as_a_program():
    """Exit status and streams of a process; and neither help nor the quick sections wait for JAX."""
    code = (
        "import sys; from tokenlab import cli; from tokenlab.commands import list_;"
        "status = cli.main(['train', '--help']);"
        "status += cli.main(['list', *[name for name in list_.SECTIONS if name != 'optimizers']]);"
        "sys.exit(status + 10 * ('jax' in sys.modules))"
    )
    root = Path(cli.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    words = [sys.executable, "-m", "tokenlab.cli", "train", "--workdir=x"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tokenlab: error: train: --config=FILE[:ARG] is missing")
    assert done.stderr.count("\n") == 1


def test_python_m_is_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # else it may begin anew
    for word, status in (("--version", 0), ("trian", 2)):
        monkeypatch.setattr(sys, "argv", ["tokenlab", word])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("tokenlab", run_name="__main__")
        assert ended.value.code == status
    told = capsys.readouterr()
    assert told.out.startswith("tokenlab ") and "unknown command 'trian'" in told.err
