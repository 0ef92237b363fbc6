"""index.html as text: its data, its numbers, its names."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.compare.report import example
from tokenlab.compare import report
from tokenlab.core.errors import DataError

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
VOID = {"meta", "link", "img", "br", "line", "circle", "rect", "path"}
PREFIXES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, texts, and the contents of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.valued: list[tuple[float, str]] = []  # a number as it is, and as it is written out
        self.texts: list[str] = []
        self.scripts: dict[str | None, str] = {}
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> inside {[name for name, _ in self.open]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        tag, attrs = self.open[-1] if self.open else ("", {})
        if tag == "script":
            self.scripts[attrs.get("id")] = data
        elif tag != "style" and data.strip():
            self.texts.append(data)
            if attrs.get("data-value") is not None:
                self.valued.append((float(attrs["data-value"]), data))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("compare")
    (folder / "arms" / "keep-1a2b3c4d").mkdir(parents=True)
    (folder / "arms" / "keep-1a2b3c4d" / "tokens.png").write_bytes(PIXEL)
    return report.html(example.results(), folder)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def read_back(shown: str) -> float:
    """The number that a text such as "1.46 GFLOPs", "57.1 ms" or "−0.0215" stands for."""
    match = re.fullmatch(r"([+−±]?)([\d,.]+)(?: (.*))?", shown)
    assert match, shown
    sign, digits, unit = match[1], float(match[2].replace(",", "")), match[3] or ""
    unit = re.sub(r" of training$", "", unit)
    factor = {"ms": 1e-3, "s": 1}.get(unit) or PREFIXES[re.sub(r"(FLOPs|B)$", "", unit)]
    return (-1 if sign == "−" else 1) * digits * factor


def test_the_page_carries_the_results(page: Page) -> None:
    assert json.loads(page.scripts["results"]) == example.results()
    assert page.open == []


def test_every_number_shown_is_in_the_results(page: Page) -> None:
    known = set(numbers_in(example.results()))
    assert len(page.valued) > 150
    for value, shown in page.valued:
        assert value in known, shown
        assert math.isclose(read_back(shown), value, rel_tol=0.006, abs_tol=6e-5), (shown, value)


def test_no_cell_of_the_table_shows_a_number_of_its_own(text: str) -> None:
    table = text[text.index('<table id="arms">') : text.index("</table>")]
    for cell in re.findall(r"<td.*?</td>", table, flags=re.DOTALL):
        bare = re.sub(r'<span[^>]*data-value="[^"]*"[^>]*>[^<]*</span>', "", cell)
        if not re.match(r"<td data-value", bare):
            assert not re.search(r"\d", re.sub(r"<[^>]*>", "", bare)), cell


def test_names_are_shown_as_they_are(page: Page) -> None:
    assert [shown for shown in page.texts if shown == example.ODD]
    assert any(example.ODD in shown for shown in page.texts if shown.startswith("On the front"))
    titles = [attrs.get("aria-label") or "" for _, attrs in page.elements]
    assert any(example.ODD in title for title in titles)


def test_a_name_cannot_end_the_data() -> None:
    results = example.results()
    results["arms"][1]["name"] = "</script><script>alert(1)</script><!--"
    page = Page(report.html(results))
    assert json.loads(page.scripts["results"]) == results
    assert len(page.scripts) == 3  # results, view, and those without an id


def test_one_file_and_no_request(page: Page) -> None:
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)
        assert not [name for name in attrs if name.startswith("on")]
    policy = next(attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_structure(page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == tags.count("main") == 1
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    labels = [attrs[name] for _, attrs in page.elements for name in ("aria-labelledby",) if name in attrs]
    assert labels and set(labels) <= set(ids)
    for tag, attrs in page.elements:
        if tag == "img":
            assert attrs["alt"]
        if "data-chart" in attrs:
            assert attrs["role"] == "img" and attrs["aria-label"]
    charts = [attrs.get("data-chart") for _, attrs in page.elements if "data-chart" in attrs]
    assert charts == ["pareto"] * 6 + ["curves", "tokens", "experts"]
    assert tags.count("details") == 7


def test_pictures_are_inside_or_said_to_be_missing(page: Page, text: str) -> None:
    (source,) = (attrs["src"] for tag, attrs in page.elements if tag == "img")
    assert base64.b64decode(source.partition(",")[2]) == PIXEL
    assert "arms/keep-1a2b3c4d/gone.png" in page.texts
    assert "is left out: No such file or directory." in text
    without = report.html(example.results())
    assert "<img" not in without.partition("<script")[0]
    assert without.count("no folder was given to read it from") == 2
    results = example.results()
    results["arms"][1]["pictures"] = ["arms/tokens.gif"]
    assert "pictures end in .png, .jpg, .jpeg and .webp" in report.html(results, Path("."))


def test_what_reproduces_an_arm(page: Page) -> None:
    for arm in example.results()["arms"]:
        assert arm["command"] in page.texts
        assert json.dumps(arm["config"], indent=2) in page.texts


def test_what_is_missing_is_said(page: Page) -> None:
    for line in (
        "registers waits to be run.",
        "depth is not finished: 2 of 3 seeds have a result.",
        f"{example.ODD} has no record of its peak memory.",
        *example.results()["notes"],
    ):
        assert line in page.texts


def test_one_seed_and_none() -> None:
    one = Page(report.html(example.one_seed()))
    assert one.texts.count("one seed") == 11  # 6 arms, 5 of them with a difference
    none = Page(report.html(example.waiting()))
    assert "No arm has a result yet." in none.texts
    assert none.texts.count("No arm has both a result and this cost yet.") == 6
    assert "Learning curves" not in none.texts


def test_what_is_not_json() -> None:
    results = example.results()
    results["arms"][1]["config"]["learning_rate"] = math.nan
    with pytest.raises(DataError, match="expected finite JSON values"):
        report.html(results)
