"""Finding things by module path, in the source tree and in the folders of TOKENLAB_METHODS."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tokenlab
from tokenlab.core import names
from tokenlab.core.errors import NameLookupError

ROOT = Path(tokenlab.__file__).parent.parent

SOFT = '''"""soft: mixes tokens.

More.
"""
__all__ = ["mix"]
VALUE = 1

class SoftThing:
    pass

def mix():
    return 7

def helper():
    pass
'''


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `zoo` with two families, importable during the test."""
    write(
        tmp_path,
        {
            "zoo/__init__.py": "",
            "zoo/_private.py": "raise RuntimeError('never imported')",
            "zoo/experts/__init__.py": "",
            "zoo/experts/soft.py": SOFT,
            "zoo/depth/skipper.py": '"""skipper: skips."""\n',
            "zoo/depth/broken.py": '"""broken: fails."""\nimport a_library_that_is_not_there\n',
            "zoo/plain.py": "",
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "zoo"
    for name in [n for n in sys.modules if n.partition(".")[0] == "zoo"]:
        del sys.modules[name]


@pytest.fixture
def methods(monkeypatch):
    """Sets TOKENLAB_METHODS, and forgets afterwards what was imported from there."""
    before = set(sys.modules)

    def use(*folders: Path) -> None:
        monkeypatch.setenv("TOKENLAB_METHODS", os.pathsep.join(map(str, folders)))

    yield use
    for name in set(sys.modules) - before:
        if name.startswith("tokenlab.methods"):
            del sys.modules[name]


class TestFind:
    def test_walks_families(self, package):
        assert names.find("zoo", "soft").SoftThing.__module__ == "zoo.experts.soft"
        assert names.find("zoo", "skipper").__name__ == "zoo.depth.skipper"
        assert names.find("zoo", "plain").__name__ == "zoo.plain"
        assert names.find("zoo.experts", "soft") is names.find("zoo", "soft")

    def test_several_packages_are_searched_together(self, package):
        assert names.find(("zoo.experts", "zoo.depth"), "skipper").__name__ == "zoo.depth.skipper"
        with pytest.raises(
            NameLookupError, match=r"zoo\.experts or zoo\.depth has no module 'softt'.*'soft'"
        ):
            names.find(("zoo.experts", "zoo.depth"), "softt")

    def test_misspelt_name_gets_the_nearest(self, package):
        with pytest.raises(NameLookupError, match=r"zoo has no module 'sofd'\. Did you mean 'soft'\?"):
            names.find("zoo", "sofd")

    @pytest.mark.parametrize(
        "name", ["", ".", "experts", "experts.soft", "../zoo/plain", "_private", "__init__"]
    )
    def test_only_plain_public_names_are_found(self, package, name):
        with pytest.raises(NameLookupError):
            names.find("zoo", name)

    @pytest.mark.parametrize("name", ["zoology", "zoo.nothing", "zoo.nothing.deeper", "zoo.plain"])
    def test_missing_package(self, package, name):
        with pytest.raises(NameLookupError, match="no package"):
            names.find(name, "soft")

    def test_a_failing_import_shows_its_own_error(self, package):
        with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
            names.find("zoo", "broken")

    def test_a_failing_parent_shows_its_own_error(self, package):
        write(package, {"bad/__init__.py": "import a_library_that_is_not_there", "bad/sub/thing.py": ""})
        with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
            names.find("zoo.bad.sub", "thing")

    def test_one_name_in_two_families_names_both(self, package):
        write(package, {"depth/soft.py": ""})
        for lookup in (lambda: names.find("zoo", "soft"), lambda: names.list_modules("zoo")):
            with pytest.raises(NameLookupError) as error:
                lookup()
            assert str(package / "depth/soft.py") in str(error.value)
            assert str(package / "experts/soft.py") in str(error.value)

    def test_a_file_that_cannot_be_imported_is_told(self, package):
        write(package, {"depth/my-method.py": ""})
        with pytest.raises(NameLookupError, match="my-method.*rename"):
            names.find("zoo", "soft")

    def test_find_attr(self, package):
        assert names.find_attr("zoo", "soft", "VALUE") == 1
        with pytest.raises(NameLookupError, match=r"zoo\.experts\.soft does not define 'mixx'.*'mix'"):
            names.find_attr("zoo", "soft", "mixx")


class TestList:
    def test_names_paths_and_summaries_without_importing(self, package):
        found = names.list_modules("zoo")
        assert [tuple(module) for module in found] == [
            ("broken", "zoo.depth.broken", "broken: fails."),
            ("plain", "zoo.plain", ""),
            ("skipper", "zoo.depth.skipper", "skipper: skips."),
            ("soft", "zoo.experts.soft", "soft: mixes tokens."),
        ]
        assert "zoo.depth.broken" not in sys.modules

    def test_only_those_that_define_a_name(self, package):
        assert [module.name for module in names.list_modules("zoo", defines="helper")] == ["soft"]

    def test_a_changed_file_is_read_again(self, package):
        names.list_modules("zoo")
        write(package, {"plain.py": '"""plain: now with words."""'})
        assert names.list_modules("zoo")[1].summary == "plain: now with words."

    def test_a_syntax_error_names_the_file(self, package):
        write(package, {"depth/typo.py": "def f(:\n"})
        with pytest.raises(SyntaxError) as error:
            names.list_modules("zoo")
        assert error.value.filename == str(package / "depth/typo.py")


class TestExtraFolders:
    def test_find_list_and_top_level_import_see_them_alike(self, tmp_path, methods):
        methods(write(tmp_path / "mine", {"newfamily/extra_soft.py": SOFT}))
        module = names.find("tokenlab.methods", "extra_soft")
        assert module.__name__ == "tokenlab.methods.newfamily.extra_soft"
        assert ("extra_soft", module.__name__, "soft: mixes tokens.") in names.list_modules(
            "tokenlab.methods"
        )
        from tokenlab import SoftThing, mix

        assert SoftThing is module.SoftThing
        assert mix() == 7
        assert "SoftThing" in dir(tokenlab)
        assert not hasattr(tokenlab, "helper")

    def test_an_existing_family_is_extended(self, package, tmp_path, methods, monkeypatch):
        monkeypatch.setitem(names.EXTRA_FOLDERS, "zoo", "TOKENLAB_METHODS")
        methods(
            write(
                tmp_path / "mine",
                {
                    "experts/extra.py": "from .sibling import NUMBER\nfrom zoo.experts.soft import VALUE\n",
                    "experts/sibling.py": "NUMBER = 5\n",
                },
            )
        )
        assert names.find("zoo", "extra").NUMBER == 5
        assert names.find("zoo", "soft").VALUE == 1

    def test_another_folder_takes_the_place_of_the_first(self, tmp_path, methods):
        one = write(tmp_path / "one", {"fam/thing.py": "WHERE = 1\n", "fam/gone.py": ""})
        two = write(tmp_path / "two", {"fam/thing.py": "WHERE = 2\n"})
        methods(one)
        assert names.find("tokenlab.methods", "thing").WHERE == 1
        methods(two)
        assert names.find("tokenlab.methods", "thing").WHERE == 2
        with pytest.raises(NameLookupError):
            names.find("tokenlab.methods", "gone")

    def test_one_name_in_two_folders_names_both(self, tmp_path, methods):
        one = write(tmp_path / "one", {"fam/thing.py": ""})
        two = write(tmp_path / "two", {"other/thing.py": ""})
        methods(one, two)
        with pytest.raises(NameLookupError, match=f"{one}.*{two}"):
            names.find("tokenlab.methods", "thing")

    def test_a_missing_folder_is_told(self, tmp_path, methods):
        methods(tmp_path / "nowhere")
        with pytest.raises(NameLookupError, match="TOKENLAB_METHODS names .*nowhere.*not a folder"):
            names.find("tokenlab.methods", "thing")


class TestTopLevel:
    def test_version_and_subpackages(self):
        assert "__version__" in dir(tokenlab)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert project.get("version", tokenlab.__version__) == tokenlab.__version__
        assert tokenlab.core.names is names
        assert {"core", "sharding"} <= set(dir(tokenlab))

    def test_unknown_name_gets_the_nearest(self, tmp_path, methods):
        methods(write(tmp_path / "mine", {"newfamily/extra_soft.py": SOFT}))
        with pytest.raises(AttributeError, match=r"no public name 'SoftThin'\. Did you mean 'SoftThing'\?"):
            tokenlab.SoftThin  # noqa: B018
        with pytest.raises(ImportError):
            from tokenlab import SoftThin  # noqa: F401

    def test_a_name_defined_twice_names_both_modules(self, tmp_path, methods):
        methods(write(tmp_path / "mine", {"fam/one_a.py": SOFT, "fam/one_b.py": SOFT}))
        with pytest.raises(AttributeError, match=r"methods\.fam\.one_a .* by tokenlab\.methods\.fam\.one_b"):
            tokenlab.SoftThing  # noqa: B018

    def test_importing_what_fails_shows_its_own_error(self, tmp_path, methods):
        methods(
            write(
                tmp_path / "mine",
                {"fam/fails.py": "class Failing:\n    pass\nraise OSError('its own words')"},
            )
        )
        with pytest.raises(OSError, match="its own words"):
            tokenlab.Failing  # noqa: B018

    def test_all_must_be_a_plain_list(self, tmp_path, methods):
        methods(write(tmp_path / "mine", {"fam/computed.py": "X = ['a']\n__all__ = X + ['b']\n"}))
        with pytest.raises(NameLookupError, match=r"computed\.py line 2: __all__"):
            names.public_names()

    def test_nothing_public_hides_a_subpackage(self):
        assert not set(names.public_names()) & set(names.subpackages())

    def test_no_public_name_of_the_source_tree_is_defined_twice(self):
        assert {n: m for n, m in names.public_names().items() if len(m) > 1} == {}

    def test_listing_does_not_import_jax(self):
        code = (
            "import sys, tokenlab; from tokenlab.core import names; dir(tokenlab);"
            "[names.list_modules(f'tokenlab.{p}') for p in ('core', 'sharding')];"
            "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
