"""The report, opened in a browser: nothing is fetched, nothing overflows, every chart has its data."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from run_folder import (
    GROUPS,
    changed_at,
    manifest,
    measurements,
    plan,
    source,
    write_run_folder,
)

from cerebellum.card.stage import make_card, read_stories

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MARKS = {
    "sensitivity": ("estimate", 9),
    "rates": ("rate", 9),
    "paths": ("path", 9),
    "sizes": ("point", 11),
    "predicted": ("estimate", 3),
}
"""What each chart draws its data with, and how many there are in the made-up run."""

WIDTHS = (390, 1280)

LOOK = """
<script>
addEventListener('load', () => {
  const page = document.documentElement.clientWidth;
  const name = e => e.tagName + '.' + (e.id || e.getAttribute('class') || e.textContent.trim().slice(0, 30));
  const shown = e => e.checkVisibility();
  const out = (e, box) => {
    const r = e.getBoundingClientRect();
    return r.width && (r.right > box.right + 1 || r.left < box.left - 1);
  };
  const loose = [...document.querySelectorAll('body *:not(svg *)')].filter(e => !e.closest('.scroll'));
  const words = [...document.querySelectorAll('svg text')].filter(shown);
  const svgs = [...document.querySelectorAll('figure svg')].filter(shown);
  const sizes = words.map(e => {
    const m = e.getScreenCTM();
    return parseFloat(getComputedStyle(e).fontSize) * Math.hypot(m.a, m.b);
  });
  const seen = {
    width: innerWidth,
    scrolls: document.documentElement.scrollWidth - page,
    fetched: performance.getEntriesByType('resource').map(r => r.name),
    overflowing: loose.filter(e => shown(e) && out(e, {left: 0, right: page})).map(name),
    cut: words.filter(e => out(e, e.ownerSVGElement.getBoundingClientRect())).map(name),
    charts: Object.fromEntries(svgs.map(e => [e.closest('figure').id,
      [...e.querySelectorAll('[id]')].filter(m => m.getBoundingClientRect().width > 0).map(m => m.id)])),
    smallest: Math.min(...sizes),
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
  };
  parent.postMessage(JSON.stringify(seen), '*');
});
</script>
"""
FRAME = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<pre id="seen"></pre>
<script>addEventListener('message', e => document.getElementById('seen').textContent = e.data);</script>
<iframe src="{page}" width="{width}" height="900" style="border: 0"></iframe>
"""
"""A browser window is 500 pixels wide at least; a frame in it is as narrow as a telephone."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    make_card(write_run_folder(folder))
    return folder / "report.html"


@cache
def looked(report: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """What a browser sees. The page allows no script, so a copy is opened that does."""
    assert BROWSER is not None
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text())
    copy = report.with_name(f"look-{width}-{dark}.html")
    copy.write_text(page.replace("</body>", f"{LOOK}</body>"))
    frame = report.with_name(f"frame-{width}-{dark}.html")
    frame.write_text(FRAME.format(page=copy.name, width=width))
    profile = report.with_name(f"profile-{width}-{dark}")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        "--window-size=1400,1000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


@browser
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_fetched(report: Path, width: int) -> None:
    seen = looked(report, width)
    assert seen["width"] == width
    assert seen["fetched"] == []


@browser
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows(report: Path, width: int) -> None:
    seen = looked(report, width)
    assert (seen["scrolls"], seen["overflowing"], seen["cut"]) == (0, [], [])


@browser
@pytest.mark.parametrize("width", WIDTHS)
def test_names_of_any_length_do_not_overflow(tmp_path: Path, width: int) -> None:
    name = "a_name_that_goes_on_" * 9
    rows = tuple(replace(row, name=f"{row.name}_{name}") for row in plan().groups)
    run = replace(manifest().result, file=f"{name}.gguf", bytes=1)
    made = write_run_folder(
        tmp_path,
        source=source(name=name),
        plan=plan(base=name, groups=rows),
        manifest=manifest(result=run),
    )
    make_card(made)
    seen = looked(tmp_path / "report.html", width)
    assert (seen["scrolls"], seen["overflowing"], seen["cut"]) == (0, [], [])


@browser
@pytest.mark.parametrize("width", WIDTHS)
def test_every_chart_shows_all_its_data(report: Path, width: int) -> None:
    """At each width one drawing of each chart is seen, and each of its marks has an extent."""
    charts = looked(report, width)["charts"]
    assert set(charts) == {f"chart-{name}" for name in MARKS}
    size = "n" if width == 390 else "w"
    for name, (mark, n_marks) in MARKS.items():
        wanted = {f"{name}-{size}-{mark}-{place}" for place in range(n_marks)}
        assert wanted <= set(charts[f"chart-{name}"])


@browser
@pytest.mark.parametrize("width", WIDTHS)
def test_words_in_charts_can_be_read(report: Path, width: int) -> None:
    assert looked(report, width)["smallest"] >= 8.5


@browser
def test_light_and_dark(report: Path) -> None:
    light, dark = looked(report, 1280), looked(report, 1280, dark=True)
    assert (light["paper"], light["ink"]) == ("rgb(255, 255, 255)", "rgb(28, 29, 31)")
    assert (dark["paper"], dark["ink"]) == ("rgb(22, 24, 27)", "rgb(230, 229, 225)")


def test_the_page_itself_forbids_what_it_does_not_need(report: Path) -> None:
    page = report.read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    addresses = set(re.findall(r"(?:src|href)=\"([^\"#][^\"]*)\"|url\(([^)#]*)", page))
    assert {a or b for a, b in addresses} <= {"data:,", ""}


def test_colours_follow_the_page(report: Path) -> None:
    """No drawing keeps a colour of its own, or it could vanish in the dark."""
    drawn = "".join(re.findall(r"<svg.*?</svg>", report.read_text(), re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)
    assert "var(--sensitive)" in drawn


def test_ids_are_unique(report: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', report.read_text())
    assert len(ids) == len(set(ids))


def test_charts_are_drawn_the_same_twice(tmp_path: Path) -> None:
    story = read_stories(write_run_folder(tmp_path))[0]
    first, second = story.drawings(), story.drawings()
    assert {name: (p.wide, p.png) for name, p in first.items()} == {
        name: (p.wide, p.png) for name, p in second.items()
    }


def test_a_chart_without_data_is_not_there(tmp_path: Path) -> None:
    one = plan(predicted_delta_pct=None, groups=plan().groups[:1])
    alone = measurements(measurements=())
    found = read_stories(write_run_folder(tmp_path, plan=one, measurements=alone))[0].drawings()
    assert set(found) == {"sensitivity"}


def test_a_heat_map_where_a_role_was_measured_in_spans(tmp_path: Path) -> None:
    rows = plan().groups
    for place, layers in enumerate((range(20), range(20, 40))):
        name = f"ffn_down[{layers[0]}-{layers[-1]}]"
        rows = changed_at(rows, place, name=name, role="ffn_down", layers=tuple(layers))
    found = read_stories(write_run_folder(tmp_path, plan=plan(groups=rows)))[0].drawings()
    assert len(re.findall(r'id="layers-w-cell-\d+-\d+"', found["layers"].wide)) == 40


def test_every_group_is_named_in_the_first_chart(report: Path) -> None:
    (drawn,) = re.findall(r'<figure id="chart-sensitivity">.*?</figure>', report.read_text(), re.DOTALL)
    for name, *_ in GROUPS:
        assert drawn.count(f">{name}</text>") == 2
