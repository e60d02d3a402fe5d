"""Makes a drawing an inline SVG that follows the page's colours, and a PNG for the card.

A figure is drawn twice, for a wide and for a narrow page, because text that shrinks with its picture cannot
be read on a telephone. Colours become CSS variables, so one SVG serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK = "#1c1d1f"
MUTED = "#6a6e75"
RULE = "#dfe1e5"
PAPER = "#fffffe"
TOLERANT = "#23795b"
SENSITIVE = "#c0462c"
UNDECIDED = "#8b8577"
ACCENT = "#3557b7"

_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    PAPER: "--paper",
    TOLERANT: "--tolerant",
    SENSITIVE: "--sensitive",
    UNDECIDED: "--undecided",
    ACCENT: "--accent",
}
WIDE = 920
NARROW = 342
"""Widths the two drawings are made for, in CSS pixels."""

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 1.0,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.5,
    "legend.frameon": False,
    "legend.fontsize": 10.0,
    "svg.fonttype": "none",
}
_FONT = re.compile(r"font: (?:[\w-]+ )*?([\d.]+)px [^;\"]*")
_SIZE = re.compile(r'<svg[^>]*? width="[^"]*"[^>]*?>', re.DOTALL)
_VIEW = re.compile(r'viewBox="([^"]*)"')

Draw = Callable[[int], Figure]
"""Draws for a page of so many CSS pixels."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Holds one chart: its name (also that of its PNG), what it shows in words, and its drawings."""

    name: str
    title: str
    wide: Markup
    narrow: Markup
    png: bytes


def picture(name: str, title: str, draw: Draw) -> Picture:
    """Draws the chart at both widths as SVG, and the wide one as PNG too; ``title`` says in words what it
    shows.
    """
    with _styled(name):
        wide = draw(WIDE)
        narrow = draw(NARROW)
        return Picture(
            name=name,
            title=title,
            wide=_svg(wide, f"{name}-w", title),
            narrow=_svg(narrow, f"{name}-n", title),
            png=_png(wide),
        )


def figure(width: int, height: float) -> Figure:
    """Returns an empty figure of a size in CSS pixels: one point of the drawing is one pixel of the page."""
    return Figure(figsize=(width / 72, height / 72), layout="constrained")


@contextmanager
def _styled(salt: str) -> Iterator[None]:
    """Sets our style whatever the user's matplotlibrc says; the salt makes the ids in the SVG repeatable."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE | {"svg.hashsalt": salt})
        yield


def _svg(drawn: Figure, prefix: str, title: str) -> Markup:
    stream = io.StringIO()
    FigureCanvasSVG(drawn)
    drawn.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = _FONT.sub(r"font-size: \1px", text)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return Markup(_opened(text, title))


def _opened(text: str, title: str) -> str:
    """Makes the root element as wide as its place, and names it for those who cannot see it."""
    view = _VIEW.search(text)
    box = view[1] if view else f"0 0 {WIDE} {WIDE}"
    label = Markup.escape(title)
    return _SIZE.sub(lambda _: f'<svg viewBox="{box}" role="img" aria-label="{label}">', text, count=1)


def _png(drawn: Figure) -> bytes:
    """Returns the drawing on white and at twice the size, for pages whose background is not ours."""
    stream = io.BytesIO()
    drawn.set_facecolor("white")
    FigureCanvasAgg(drawn)
    drawn.savefig(stream, format="png", dpi=144, metadata={"Software": None})
    return stream.getvalue()
