"""`tokenlab cost`: a table beside that of the dense stack."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.evaluate.conftest import config
from tokenlab import cli
from tokenlab.core.errors import StackError
from tokenlab.evaluate import cost_report


def test_a_stack_beside_the_dense_one_of_as_many_blocks() -> None:
    report = cost_report(
        config(**{"model.stack": "block + keep(k) + block*2", "stack_vars.k": "0:1.0, 5:0.5"})
    )
    found = report.to_json()
    assert "keep(0.5)" in found["title"] and "block*3" in found["title"]  # as in the last of the six steps
    assert [row["tokens"] for row in found["rows"][:6]] == [17, 17, 17, 9, 9, 9]
    assert found["dense_total"]["forward_flops"] > found["total"]["forward_flops"]
    ratio = found["total"]["train_flops"] / found["dense_total"]["train_flops"]
    assert found["of_dense"]["total"]["train"] == pytest.approx(ratio) and 0.5 < ratio < 0.8
    assert found["dense_total"]["parameters"] == found["total"]["parameters"]
    json.dumps(found)


def test_for_people() -> None:
    report = cost_report(config(**{"model.stack": "block + keep(0.5) + block"}))
    screen = io.StringIO()
    Console(width=200, file=screen).print(report.to_rich())
    for text in (screen.getvalue(), report.to_markdown()):
        assert "keep_00" in text and "block + keep(0.5) + block" in text and "dense" in text


def test_the_dense_stack_costs_what_it_costs() -> None:
    found = cost_report(config(**{"model.stack": "None"})).to_json()
    assert found["of_dense"]["total"] == {"forward": 1.0, "train": 1.0}


def test_a_wrong_stack_is_told() -> None:
    with pytest.raises(StackError, match="keep"):
        cost_report(config(**{"model.stack": "block + keep(0) + block"}))


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "c.py"
    file.write_text(
        "from tokenlab.train import default_config\n\n"
        "def get_config():\n    c = default_config()\n    c.model.size = 'nano/2'\n    return c\n"
    )
    target = tmp_path / "cost.json"
    flags = [
        f"--config={file}",
        "--config.model.stack=block+keep(0.5)+block",
        f"--json={target}",
        "--chip=TPU v5e",
    ]
    assert cli.main(["cost", *flags, "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| keep_00 |" in out and "roofline on TPU v5e" in out
    assert cli.main(["cost", *flags]) == 0
    assert "roofline on TPU v5e" in capsys.readouterr().out
    assert json.loads(target.read_text())["total"]["forward_flops"] > 0
