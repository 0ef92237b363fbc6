"""The core suite finds what there is by itself."""

from __future__ import annotations

import pytest

from tokenlab import models
from tokenlab.bench import suite
from tokenlab.bench.arm import ways
from tokenlab.core import names
from tokenlab.core.errors import NameLookupError


@pytest.fixture(autouse=True)
def own_methods_stay_out(monkeypatch) -> None:
    monkeypatch.delenv(names.EXTRA_FOLDERS["tokenlab.methods"], raising=False)


def test_every_item_and_method_declares_what_it_is_measured_by() -> None:
    cases, silent = suite.cases("core")
    assert silent == []
    listed = {module.name for module in names.list_modules(suite.PLACES)}
    assert (
        {case.name.partition(" ")[0] for case in cases} == listed >= {"keep", "skip", "merge", "evit", "tome"}
    )
    assert len({case.name for case in cases}) == len(cases)


def test_the_stacks_fit_both_sizes_and_use_what_they_are_named_for() -> None:
    cases, _ = suite.cases("core")
    for size in suite.SIZES.values():
        for case in cases:
            model = models.build(size.model, spec=suite.SPEC, num_outputs=suite.CLASSES, stack=case.train)
            assert model.program.depth == 12 and model.tokens_per_example == 197
            steps = model.program.flat()
            used = {step.kind[1] for step in steps if hasattr(step, "kind")}
            blocks = [step.block for step in steps if hasattr(step, "block")]
            used |= {name for block in blocks for name in (block.ffn_name, block.special_name)}
            assert case.name.partition(" ")[0] in used, case


def test_a_method_from_outside_is_measured_too_or_named(tmp_path, monkeypatch) -> None:
    family = tmp_path / "dropping"
    family.mkdir()
    (family / "loud.py").write_text(
        '"""loud: declares."""\nBENCHMARK = {"once": "block*12", "twice": "block*12"}\n'
    )
    (family / "quiet.py").write_text('"""quiet: does not."""\n')
    monkeypatch.setenv(names.EXTRA_FOLDERS["tokenlab.methods"], str(tmp_path))
    cases, silent = suite.cases("core")
    assert [case.name for case in cases if case.name.startswith("loud")] == ["loud once", "loud twice"]
    assert silent == ["quiet"]


def test_unknown_names_are_told() -> None:
    with pytest.raises(NameLookupError, match="no suite 'cor'. Did you mean 'core'"):
        suite.cases("cor")
    with pytest.raises(NameLookupError, match="no size 'gpu'"):
        suite.size_of("gpu")


def test_the_setting_of_a_size() -> None:
    tiny = suite.Size({"name": "vit", "size": "nano/112"}, batch=3, rounds=1)
    made = suite.setting(tiny)
    assert made.batch_size == 3 and suite.setting(tiny, 2).batch_size == 2
    assert made.mesh.size == 1
    assert made.batch["image"].shape == (3, 224, 224, 3) and made.batch["label"].dtype == "int32"


def test_what_has_nothing_to_scan_over_is_only_unrolled() -> None:
    tiny = suite.setting(suite.Size({"size": "nano/56"}, batch=1, rounds=1))
    assert ways(tiny, "block*2", "train") == ("scan", "unroll")
    assert ways(tiny, "block(between=merge(2))*2", "train") == ("unroll",)
    fixed = suite.setting(suite.Size({"size": "nano/56", "execution": "scan"}, batch=1, rounds=1))
    assert ways(fixed, "block*2", "inference") == ("scan",)
