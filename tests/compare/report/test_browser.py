"""The page in a real browser: nothing in its console, nothing asked of the network, and what it draws.

Skips where there is no chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.compare.report import example
from tests.compare.report.test_page import numbers_in
from tokenlab.compare import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed, which draws the page"),
]

# Presses what can be pressed, then tells through the console what became of it.
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const told = {};
  const root = document.documentElement;
  const divs = [...document.querySelectorAll("[data-chart]")];
  told.width = innerWidth;
  told.wide = root.scrollWidth;
  const fits = (div) => Math.abs(div.querySelector(".main-svg").clientWidth - div.clientWidth) < 2;
  told.drawn = divs.map((div) => [div.dataset.chart, fits(div)]);
  const values = (chart) => divs.filter((div) => div.dataset.chart === chart).flatMap((div) =>
    div.data.flatMap((trace) => trace.hoverinfo === "skip" ? [] : [...trace.x, ...trace.y]));
  told.pareto = values("pareto");
  told.curves = {};
  for (const key of ["step", "train_flops", "seconds"]) {
    document.querySelector(`[data-set="x"][data-to="${key}"]`).click();
    told.curves[key] = values("curves");
  }
  document.querySelector('[data-set="y"][data-to="loss"]').click();
  told.loss = values("curves");
  document.querySelector('[data-set="range"][data-to="late"]').click();
  document.querySelector('[data-set="split"][data-to="train"]').click();
  told.pressed = [...document.querySelectorAll('[data-set][aria-pressed="true"]')].map((button) => button.dataset.to);
  const shades = () => divs[1].data.slice(1).map((trace) => trace.opacity);
  document.querySelector('.chip[data-arm="1"]').click();
  told.focus = shades();
  document.querySelector('.chip[data-arm="1"]').click();
  told.unfocus = shades();
  const names = () => [...document.querySelectorAll("#arms tbody tr")].map((row) => Number(row.id.slice(4)));
  const heads = document.querySelectorAll("#arms thead button");
  heads[6].click();
  told.descending = names();
  heads[6].click();
  told.ascending = names();
  told.sort = [...document.querySelectorAll("#arms thead th")].map((head) => head.getAttribute("aria-sort"));
  heads[0].click();
  told.back = names();
  const ground = () => getComputedStyle(document.body).backgroundColor;
  const theme = document.getElementById("theme");
  told.grounds = [ground()];
  for (let press = 0; press < 3; press++) {
    theme.click();
    told.grounds.push(ground());
  }
  console.log("TOLD " + JSON.stringify(told));
}, 200));
</script>
</body>"""


def browse(page: Path, folder: Path, *options: str) -> tuple[list[str], list[str]]:
    """Opens a page. Returns the lines of its console, and the addresses outside that it asked for."""
    log = folder / "net.json"
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            # The browser asks for the time and for updates of its own accord: it is to reach nobody.
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--log-net-log={log}",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=3000",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    console = re.findall(r"CONSOLE[^\]]*\] \"(.*)\", source: ", done.stderr)
    net = json.loads(log.read_text())
    start = net["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = [
        event["params"]
        for event in net["events"]
        if event["type"] == start and "url" in event.get("params", {})
    ]
    asked = [
        request["url"]
        for request in requests
        if re.match("(https?|wss?):", request["url"]) and request["initiator"] != "not an origin"
    ]
    return console, asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    report.write(example.results(), folder)
    page = folder / "report" / "index.html"
    (folder / "probed.html").write_text(
        page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8"
    )
    # A window of chromium is at least 500 pixels wide; a frame in it can be a phone.
    for name in ("report/index", "probed"):
        frame = f'<iframe src="{(folder / name).with_suffix(".html").as_uri()}"></iframe>'
        looks = "<style>body{margin:0}iframe{display:block;border:0;width:390px;height:8000px}</style>"
        (folder / f"phone-{Path(name).name}.html").write_text(f"<!doctype html>{looks}{frame}")
    return folder


@pytest.mark.parametrize(
    ("width", "page", "scheme"), [(1280, "report/index.html", "dark"), (390, "phone-index.html", "light")]
)
def test_silent_and_alone(folder: Path, tmp_path: Path, width: int, page: str, scheme: str) -> None:
    picture = tmp_path / "page.png"
    console, asked = browse(
        folder / page,
        tmp_path,
        f"--screenshot={picture}",
        f"--window-size={max(500, width)},2400",
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
    )
    assert (console, asked) == ([], [])
    pixels = _pixels(picture)[:, :width]
    assert (pixels[5, 5].mean() < 60) == (scheme == "dark")
    assert pixels.std() > 15  # there is something on it


def test_a_request_would_be_seen(folder: Path, tmp_path: Path) -> None:
    text = (folder / "report" / "index.html").read_text(encoding="utf-8")
    asking = text.replace("</body>", '<img src="https://nowhere.invalid/x.png" alt="x"></body>')
    (tmp_path / "asking.html").write_text(asking, encoding="utf-8")
    console, asked = browse(tmp_path / "asking.html", tmp_path, "--dump-dom")
    assert asked == [] and "Content Security Policy" in console[0]
    (tmp_path / "asking.html").write_text(re.sub("<meta http-equiv[^>]*>", "", asking), encoding="utf-8")
    _, asked = browse(tmp_path / "asking.html", tmp_path, "--dump-dom")
    assert asked == ["https://nowhere.invalid/x.png"]


def _pixels(picture: Path) -> Any:
    from matplotlib import image

    return image.imread(picture)[..., :3] * 255


@pytest.fixture(scope="module", params=[1280, 390])
def told(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    page = folder / ("probed.html" if request.param == 1280 else "phone-probed.html")
    console, asked = browse(
        page,
        tmp_path_factory.mktemp("browser"),
        "--dump-dom",
        f"--window-size={max(500, request.param)},2400",
        "--blink-settings=preferredColorScheme=1",
    )
    assert asked == []
    (line,) = console
    found = json.loads(line.removeprefix("TOLD "))
    assert found["width"] == request.param
    return found


def test_the_page_does_not_scroll_sideways(told: dict[str, Any]) -> None:
    assert told["wide"] == told["width"]


def test_all_charts_are_drawn_and_fit(told: dict[str, Any]) -> None:
    assert told["drawn"] == [[name, True] for name in ["pareto"] * 6 + ["curves", "tokens", "experts"]]


def test_what_is_drawn_is_in_the_results(told: dict[str, Any]) -> None:
    known = set(numbers_in(example.results()))
    assert len(told["pareto"]) == 2 * (6 * 6 - 1)  # six arms with a result, six costs, one not recorded
    for values in (told["pareto"], *told["curves"].values(), told["loss"]):
        assert values
        assert set(map(float, values)) <= known
    assert len({tuple(values) for values in told["curves"].values()}) == 3


def test_buttons(told: dict[str, Any]) -> None:
    assert told["pressed"] == ["seconds", "loss", "train", "late"]
    assert told["focus"].count(1) == 1 and told["focus"][1] == 1 and max(told["focus"][2:]) < 0.5
    assert set(told["unfocus"]) == {1}


def test_sorting(told: dict[str, Any]) -> None:
    arms = example.results()["arms"]
    known = [index for index, arm in enumerate(arms) if arm["peak_bytes"] is not None]
    none = [index for index, arm in enumerate(arms) if arm["peak_bytes"] is None]
    ascending = sorted(known, key=lambda index: arms[index]["peak_bytes"])
    assert told["descending"] == ascending[::-1] + none
    assert told["ascending"][: len(known)] == ascending
    assert sorted(told["ascending"][len(known) :]) == none
    assert told["sort"][6] == "ascending" and told["sort"].count("none") == len(told["sort"]) - 1
    assert told["back"] == list(range(len(arms)))


def test_theme(told: dict[str, Any]) -> None:
    system, light, dark, again = told["grounds"]
    assert system == light == again != dark
