from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from tokenlab import data
from tokenlab.core import names
from tokenlab.core.errors import ConfigError, DataError, NameLookupError, TokenLabError
from tokenlab.data import sources
from tokenlab.data.sources import digits


def test_by_name_from_dict_and_config_dict() -> None:
    for config in ({"name": "digits"}, ConfigDict({"name": "digits", "transform": "shift(1)"}), {}):
        assert data.build(config).name == "digits"
    assert data.resolve({"transform": "shift(1)"}) == digits.Config(transform="shift(1)")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            {"name": "digit"},
            NameLookupError,
            "^config.data.name is 'digit'; expected the name of a source. Did you mean 'digits'?",
        ),
        (
            {"name": 3},
            NameLookupError,
            "^config.data.name is 3; expected the name of a source. Known: arrays,",
        ),
        (
            {"name": "digits", "transfrom": "x"},
            ConfigError,
            "config.data.*'transfrom'.*Did you mean 'transform'?",
        ),
        ({"name": "digits", "transform": 3}, ConfigError, "config.data.transform"),
        ({"name": "digits", "prefetch": "2"}, ConfigError, "config.data.prefetch"),
        ({"name": "digits", "transform": "shfit(1)"}, DataError, "unknown operation 'shfit'"),
        ({"name": "digits", "transform": "shift(8)"}, DataError, "an int from 0 to 7"),
    ],
)
def test_bad_config(config: dict[str, object], error: type[TokenLabError], message: str) -> None:
    with pytest.raises(error, match=message):
        data.build(config)


def test_adding_a_source_is_adding_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder like tokenlab/data/sources/, with one more file in it.
    folder = tmp_path / "tried_sources"
    shutil.copytree(Path(sources.__path__[0]), folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "squares.py").write_text(
        '''"""Squares of numbers."""
from dataclasses import dataclass

import numpy as np

from tokenlab.data.source import ArraySource, DataConfig


@dataclass(frozen=True)
class Config(DataConfig):
    size: int = 4


def build(config):
    numbers = np.arange(config.size, dtype=np.float32)
    return ArraySource("squares", {"train": {"number": numbers, "square": numbers**2}}, None)
'''
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(data, "SOURCES", "tried_sources")
    source = data.build({"name": "squares", "size": 6})
    assert isinstance(source, data.Source)
    assert source.splits == {"train": 6}
    batch = data.TrainStream(source, "train", 6, seed=0).batch(0)
    np.testing.assert_array_equal(batch["square"], batch["number"] ** 2)
    with pytest.raises(ConfigError, match="no key 'sise'"):
        data.build({"name": "squares", "sise": 6})
    listed = [(module.name, module.summary) for module in names.list_modules(data.SOURCES)]
    assert ("squares", "Squares of numbers.") in listed and "digits" in dict(listed)


def test_every_source_module_has_the_two_names() -> None:
    modules = names.list_modules(data.SOURCES)
    assert [module.name for module in modules] == [
        m.name for m in names.list_modules(data.SOURCES, defines="build")
    ]
    for module in modules:
        config = names.find_attr(data.SOURCES, module.name, "Config")
        assert issubclass(config, data.DataConfig) and dataclasses.is_dataclass(config)
        assert module.summary
