"""Config files, overrides, dataclasses and JSON: every mistake is told with the key it was made in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from ml_collections.config_dict import ConfigDict

from tokenlab.core import config as configs
from tokenlab.core.errors import ConfigError, NameLookupError

LOCKED = "def get_config():\n    config = ConfigDict({'steps': 1}).lock()\n    config.stepz = 2\n"


@dataclass(frozen=True)
class Schedule:
    name: Literal["cosine", "constant"] = "cosine"
    warmup: int | float = 0.1
    final: float = 0.0


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    clip: float | None = 1.0
    ema: float | None = None
    schedule: Schedule = Schedule()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    steps: int = 100
    name: str = "run"
    stack: str | None = None
    remat: bool = False
    grid: tuple[int, int] = (8, 8)
    layers: tuple[int, ...] = ()
    cache: bool | str = True
    optimizer: Optimizer = Optimizer()
    extra: Optimizer | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    anything: Any = 3


@dataclass(frozen=True)
class Required:
    width: int
    depth: int = 2

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be >= 1, got {self.width}")
        if self.width == 13:
            raise NameLookupError("thirteen")


class TestToDataclass:
    def test_nested_values_and_defaults(self):
        values = {"steps": 7, "grid": [4, 2], "optimizer": {"clip": None, "schedule": {"warmup": 3}}}
        run = configs.to_dataclass(Run, values)
        expected = Run(steps=7, grid=(4, 2), optimizer=Optimizer(clip=None, schedule=Schedule(warmup=3)))
        assert run == expected
        assert type(run.optimizer.schedule.warmup) is int
        with pytest.raises(FrozenInstanceError):
            run.steps = 8

    def test_a_configdict_and_what_is_in_it(self):
        config = ConfigDict({"optimizer": {"options": {"b2": 0.95, "deep": {"x": 1}}}, "sizes": {"a": 1}})
        run = configs.to_dataclass(Run, config)
        assert type(run.optimizer.options) is dict
        assert type(run.optimizer.options["deep"]) is dict
        assert run.sizes == {"a": 1}

    def test_an_int_serves_for_a_float_and_becomes_one(self):
        found = configs.to_dataclass(Optimizer, {"learning_rate": 1, "clip": 2})
        assert type(found.learning_rate) is float
        assert type(found.clip) is float

    def test_an_instance_passes(self):
        assert configs.to_dataclass(Run, {"optimizer": Optimizer(ema=0.9)}).optimizer.ema == 0.9

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"stepz": 3}, r"config has no key 'stepz'\. Did you mean 'steps'\?"),
            ({"optimizer": {"schedule": {"fnal": 3}}}, r"config\.optimizer\.schedule has no key 'fnal'\..*'final'"),
            ({"steps": 1.5}, r"config\.steps is 1\.5 \(float\): expected int\."),
            ({"steps": True}, r"config\.steps is True \(bool\): expected int"),
            ({"steps": None}, r"config\.steps is None: expected int"),
            ({"steps": "many"}, r"config\.steps is 'many' \(str\)"),
            ({"remat": 1}, r"config\.remat is 1 \(int\): expected True or False"),
            ({"name": 3}, r"config\.name is 3 \(int\): expected str"),
            ({"grid": (1, 2, 3)}, r"config\.grid is \(1, 2, 3\) \(tuple\): expected \(int, int\)"),
            ({"grid": "ab"}, r"config\.grid is 'ab' \(str\): expected \(int, int\)"),
            ({"layers": (1, 2.5)}, r"config\.layers\[1\] is 2\.5 \(float\): expected int"),
            ({"layers": 4}, r"config\.layers is 4 \(int\): expected a sequence of int"),
            ({"cache": 3}, r"config\.cache is 3 \(int\): expected True or False or str"),
            ({"sizes": {"a": "b"}}, r"config\.sizes\.a is 'b' \(str\): expected int"),
            ({"sizes": 3}, r"config\.sizes is 3 \(int\): expected a group of keys and values"),
            ({"optimizer": 3}, r"config\.optimizer is 3 \(int\): expected a group of fields \(learning_rate, clip"),
            ({"optimizer": {"clip": "x"}}, r"config\.optimizer\.clip is 'x' \(str\): expected float or None"),
            ({"optimizer": {"clip": True}}, r"config\.optimizer\.clip is True \(bool\)"),
            ({"optimizer": {"schedule": {"name": "cosin"}}}, r"name is 'cosin' .* one of 'cosine', .*'cosine'\?"),
            ({"extra": {"clipp": 1.0}}, r"config\.extra has no key 'clipp'\. Did you mean 'clip'\?"),
        ],
    )  # fmt: skip
    def test_mistakes(self, values, message):
        for mapping in (values, ConfigDict(values)):
            with pytest.raises(ConfigError, match=message) as error:
                configs.to_dataclass(Run, mapping)
            assert "\n" not in str(error.value)

    def test_missing_and_own_checks(self):
        with pytest.raises(ConfigError, match=r"config\.model\.width is missing: expected int"):
            configs.to_dataclass(Required, {"depth": 1}, "config.model")
        with pytest.raises(ConfigError, match=r"config\.model: width must be >= 1, got 0"):
            configs.to_dataclass(Required, {"width": 0}, "config.model")
        with pytest.raises(NameLookupError, match="^thirteen$"):
            configs.to_dataclass(Required, {"width": 13})

    def test_sequence_of_groups(self):
        @dataclass(frozen=True)
        class Many:
            parts: Sequence[Mapping[str, int]] = ()

        assert configs.to_dataclass(Many, {"parts": [{"a": 1}]}).parts == ({"a": 1},)
        with pytest.raises(ConfigError, match=r"config\.parts\[0\]\.a is 'x'"):
            configs.to_dataclass(Many, {"parts": [{"a": "x"}]})


class TestFromDataclass:
    def test_round_trip(self):
        assert configs.to_dataclass(Run, configs.from_dataclass(Run)) == Run()
        run = Run(steps=3, optimizer=Optimizer(options={"b2": 0.9}), extra=Optimizer(clip=None))
        assert configs.to_dataclass(Run, configs.from_dataclass(run)) == run

    def test_locked_but_for_open_groups(self):
        config = configs.from_dataclass(Run)
        with pytest.raises(AttributeError, match="steps"):
            config.stepz = 3
        with pytest.raises(AttributeError):
            config.optimizer.schedule.x = 3
        config.optimizer.options.b2 = 0.95
        config.sizes.a = 1
        assert configs.to_dataclass(Run, config).optimizer.options == {"b2": 0.95}

    def test_fields_that_may_be_none(self):
        config = configs.from_dataclass(Run)
        config.stack = "block*2"
        config.optimizer.clip = None
        config.optimizer.ema = 1
        run = configs.to_dataclass(Run, config)
        assert (run.stack, run.optimizer.clip, run.optimizer.ema) == ("block*2", None, 1.0)
        with pytest.raises(TypeError):
            config.optimizer.ema = "much"

    def test_an_int_stays_an_int_where_both_may_stand(self):
        config = configs.from_dataclass(Run)
        config.optimizer.schedule.warmup = 5
        warmup = configs.to_dataclass(Run, config).optimizer.schedule.warmup
        assert warmup == 5
        assert type(warmup) is int

    def test_a_field_without_default_must_be_set(self):
        config = configs.from_dataclass(Required)
        with pytest.raises(ConfigError, match=r"config\.width is None: expected int"):
            configs.to_dataclass(Required, config)
        config.width = 4
        assert configs.to_dataclass(Required, config) == Required(4)


class TestLoad:
    def write(self, folder, body, name="some.py"):
        path = folder / name
        path.write_text("from ml_collections.config_dict import ConfigDict\n" + body)
        return path

    def test_with_and_without_argument(self, tmp_path):
        path = self.write(tmp_path, "def get_config(arg=None):\n    return ConfigDict({'arg': arg})\n")
        assert configs.load(path).arg is None
        assert configs.load(f"{path}:a:b,c=d").arg == "a:b,c=d"
        assert configs.load(f"{path}:").arg == ""

    def test_a_rewritten_file_is_read_anew_and_leaves_nothing(self, tmp_path):
        for value in range(3):
            path = self.write(tmp_path, f"def get_config():\n    return ConfigDict({{'x': {value}}})\n")
            assert configs.load(path).x == value
        assert [p.name for p in tmp_path.iterdir()] == ["some.py"]

    def test_a_dataclass_in_the_file(self, tmp_path):
        body = (
            "from dataclasses import dataclass\nfrom tokenlab.core.config import from_dataclass\n"
            "@dataclass(frozen=True)\nclass Mine:\n    x: 'int | None' = None\n"
            "def get_config():\n    return from_dataclass(Mine)\n"
        )
        assert configs.load(self.write(tmp_path, body)).x is None

    @pytest.mark.parametrize(
        ("body", "arg", "message"),
        [
            ("X = 1\n", "", r"some\.py does not define get_config"),
            ("get_config = 3\n", "", r"some\.py does not define get_config"),
            ("def get_config():\n    return {}\n", "", r"returns a dict: expected a ConfigDict"),
            ("def get_config():\n    return None\n", "", r"returns a NoneType"),
            ("def get_config():\n    return ConfigDict()\n", ":a", r"get_config\(\): .* with the argument 'a'"),
            ("def get_config(arg):\n    return ConfigDict()\n", "", r"get_config\(arg\): .* with no argument"),
            ("def get_config():\n    return {}['k']\n", "", r"some\.py line 3 raises KeyError: 'k'"),
            ("def get_config():\n    assert False\n", "", r"some\.py line 3 raises AssertionError\."),
            ("import not_there_at_all\n", "", r"some\.py line 2 raises ModuleNotFoundError: .*not_there_at_all"),
            ("def get_config(:\n", "", r"some\.py line 2 raises SyntaxError: "),
            (LOCKED, "", r"line 4 raises AttributeError: .*Did you mean"),
        ],
    )  # fmt: skip
    def test_mistakes(self, tmp_path, body, arg, message):
        path = self.write(tmp_path, body)
        with pytest.raises(ConfigError, match=message) as error:
            configs.load(f"{path}{arg}")
        assert "\n" not in str(error.value)

    def test_missing_file_and_wrong_kind(self, tmp_path):
        self.write(tmp_path, "", "quickstart.py")
        with pytest.raises(
            ConfigError, match=r"quickstrat\.py' does not exist\. Did you mean 'quickstart\.py'\?"
        ):
            configs.load(tmp_path / "quickstrat.py")
        with pytest.raises(ConfigError, match="does not exist"):
            configs.load(tmp_path / "no" / "folder.py:arg")
        with pytest.raises(ConfigError, match=r"expected FILE\.py or FILE\.py:ARGUMENT"):
            configs.load("quickstart")

    def test_those_that_come_with_the_package_are_there_in_any_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert configs.load("configs/soft_moe.py:S/16").model.size == "S/16"
        with pytest.raises(
            ConfigError, match=r"quickstrat\.py' does not exist\. Did you mean 'quickstart\.py'\?"
        ):
            configs.load("configs/quickstrat.py")
        own = tmp_path / "configs" / "soft_moe.py"
        own.parent.mkdir()
        own.write_text(
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'mine': 1})\n"
        )
        assert configs.load("configs/soft_moe.py").mine == 1
        assert configs.locate("configs/soft_moe.py:arg") == (Path("configs/soft_moe.py"), "arg")

    def test_own_errors_pass(self, tmp_path):
        body = "from tokenlab.core.errors import StackError\ndef get_config():\n    raise StackError('a\\n  ^')\n"
        with pytest.raises(Exception, match=r"^a\n  \^$") as error:
            configs.load(self.write(tmp_path, body))
        assert type(error.value).__name__ == "StackError"


class TestOverride:
    @pytest.fixture
    def config(self):
        config = configs.from_dataclass(Run)
        config.sizes.a = 1
        config.optimizer.options.k = 0.5
        config.optimizer.options.rule = "0:1.0, 10:0.5"
        return config

    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [
            ("steps", "10", 10),
            ("steps", "1_000", 1000),
            ("steps", 12, 12),
            ("name", "other", "other"),
            ("name", "12", "12"),
            ("name", "", ""),
            ("name", "a=b, c", "a=b, c"),
            ("name", "'quoted'", "quoted"),
            ("name", "'None'", "None"),
            ("name", "None", None),
            ("stack", "block*4 + keep(0.5) + block*8", "block*4 + keep(0.5) + block*8"),
            ("stack", "None", None),
            ("remat", "true", True),
            ("remat", "False", False),
            ("grid", "4,2", (4, 2)),
            ("grid", "[4, 2]", (4, 2)),
            ("layers", "(3,)", (3,)),
            ("cache", "False", False),
            ("cache", "kept/here", "kept/here"),
            ("anything", "2.5", 2.5),
            ("anything", "word", "word"),
            ("optimizer.learning_rate", "1", 1.0),
            ("optimizer.learning_rate", "3e-4", 3e-4),
            ("optimizer.clip", "None", None),
            ("optimizer.ema", "0.99", 0.99),
            ("optimizer.ema", "1", 1.0),
            ("optimizer.schedule.warmup", "20", 20),
            ("optimizer.schedule.warmup", "0.2", 0.2),
            ("optimizer.options.k", "4", 4),
            ("optimizer.options.k", "0:1.0, 10:0.5", "0:1.0, 10:0.5"),
            ("optimizer.options.rule", "0.25", 0.25),
            ("optimizer.options.fresh", "0.5", 0.5),
            ("optimizer.options", "{'b1': 0.8}", {"b1": 0.8}),
        ],
    )
    def test_values(self, config, key, text, value):
        before = configs.to_json(config)
        found = configs.override(config, {key: text})
        for part in key.split("."):
            found = found[part]
        found = found.to_dict() if isinstance(found, ConfigDict) else found
        assert found == value
        assert type(found) is type(value)
        assert configs.to_json(config) == before

    @pytest.mark.parametrize(
        ("key", "text", "message"),
        [
            ("stepz", "1", r"config has no key 'stepz'\. Did you mean 'steps'\?"),
            ("optimizer.scedule.final", "1", r"config\.optimizer has no key 'scedule'\. Did you mean 'schedule'\?"),
            ("optimizer.schedule.fnal", "1", r"config\.optimizer\.schedule has no key 'fnal'\..*'final'"),
            ("steps.x", "1", r"config\.steps\.x does not exist: config\.steps is a field, 100, not a group"),
            ("", "1", r"config has no key ''"),
            ("optimizer.", "1", r"config\.optimizer has no key ''"),
            ("optimizer.options.a b", "1", r"config\.optimizer\.options has no key 'a b'"),
            ("optimizer.options.new.deep", "1", r"config\.optimizer\.options has no key 'new'"),
            ("steps", "1.5", r"config\.steps is 1\.5 \(float\): expected int"),
            ("steps", "1e3", r"config\.steps is 1000\.0 \(float\): expected int"),
            ("steps", "True", r"config\.steps is True \(bool\)"),
            ("steps", "", r"config\.steps is '' \(str\): expected int"),
            ("steps", "ten", r"config\.steps is 'ten' \(str\)"),
            ("name", 3, r"config\.name is 3 \(int\): expected str"),
            ("remat", "yes", r"config\.remat is 'yes' \(str\): expected True or False"),
            ("remat", "1", r"config\.remat is 1 \(int\): expected True or False"),
            ("grid", "4", r"config\.grid is 4 \(int\): expected a sequence"),
            ("optimizer.learning_rate", "fast", r"config\.optimizer\.learning_rate is 'fast' \(str\): expected float"),
            ("optimizer", "adam", r"config\.optimizer is a group, not a field; its fields: config\.optimizer\.clip"),
            ("optimizer", "{'clip': 1.0}", r"config\.optimizer is a group"),
            ("optimizer.options", "3", r"config\.optimizer\.options is a group.*options\.k"),
        ],
    )  # fmt: skip
    def test_mistakes(self, config, key, text, message):
        with pytest.raises(ConfigError, match=message) as error:
            configs.override(config, {key: text})
        assert "\n" not in str(error.value)

    def test_several_at_once_and_still_locked(self, config):
        found = configs.override(config, {"steps": "3", "optimizer.options.new": "1", "sizes.b": "2"})
        run = configs.to_dataclass(Run, found)
        assert (run.steps, run.sizes, run.optimizer.options["new"]) == (3, {"a": 1, "b": 2}, 1)
        assert found.is_locked
        assert found.optimizer.schedule.is_locked
        assert not found.optimizer.options.is_locked

    def test_what_refers_to_a_field_follows_it(self):
        config = ConfigDict({"steps": 10})
        config.warmup = config.get_ref("steps") // 5
        config.lock()
        assert configs.override(config, {"steps": "50"}).warmup == 10
        assert config.warmup == 2


class TestJson:
    def test_exact_round_trip(self):
        values = {
            "float": 0.1 + 0.2,
            "tiny": 5e-324,
            "whole": 1.0,
            "negative_zero": -0.0,
            "int": 2**70,
            "none": None,
            "bool": False,
            "text": "block*2 + keep(½)\n",
            "tuple": (1, 2.0, ("a", None), ()),
            "group": {"empty": {}, "nested": {"x": (0.1,)}},
        }
        config = ConfigDict(values)
        text = configs.to_json(config)
        found = configs.from_json(text).to_dict()
        assert repr(found) == repr(config.to_dict())
        assert configs.to_json(configs.from_json(text)) == text
        assert configs.diff(config, configs.from_json(text)) == []

    def test_of_a_dataclass_config(self):
        config = configs.from_dataclass(Run(optimizer=Optimizer(clip=None, options={"b": 1})))
        found = configs.from_json(configs.to_json(config), like=config)
        assert configs.to_dataclass(Run, found) == configs.to_dataclass(Run, config)
        assert found.is_locked
        assert found.optimizer.is_locked
        assert not found.optimizer.options.is_locked
        assert not found.sizes.is_locked
        assert configs.from_json(configs.to_json(config)).optimizer.options.is_locked

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (float("inf"), r"config\.a\.b is inf, which JSON cannot hold"),
            (float("nan"), r"config\.a\.b is nan"),
            (object, r"config\.a\.b is <class 'object'>"),
            ((1, {2}), r"config\.a\.b\[1\] is \{2\} \(set\)"),
            ({3: 4}, r"config\.a\.b has the key 3 \(int\): keys must be text"),
        ],
    )
    def test_what_json_cannot_hold(self, value, message):
        with pytest.raises(ConfigError, match=message):
            configs.to_json({"a": {"b": value}})

    @pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
    def test_unreadable_text(self, text):
        with pytest.raises(ConfigError, match="saved configuration"):
            configs.from_json(text)

    def test_it_is_plain_json(self):
        assert json.loads(configs.to_json({"b": (1,), "a": None}, indent=None)) == {"a": None, "b": [1]}


class TestDiff:
    def test_lines(self):
        a = configs.from_dataclass(Run)
        b = configs.override(a, {"steps": "7", "optimizer.clip": "None", "optimizer.options.b2": "0.9"})
        assert configs.diff(a, b) == [
            "optimizer.clip: 1.0 -> None",
            "optimizer.options: {} -> (absent)",
            "optimizer.options.b2: (absent) -> 0.9",
            "steps: 100 -> 7",
        ]

    def test_what_counts_as_equal(self):
        same = {"a": (1, 2.0, ({"x": 1},)), "b": float("nan"), "c": 1}
        assert configs.diff(same, {"a": [1, 2, [{"x": 1}]], "b": float("nan"), "c": 1.0}) == []
        assert configs.diff({"c": 1}, {"c": True}) == ["c: 1 -> True"]
        assert configs.diff({"c": None}, {}) == ["c: None -> (absent)"]
        assert configs.diff({"c": (1,)}, {"c": (1, 2)}) == ["c: (1,) -> (1, 2)"]
