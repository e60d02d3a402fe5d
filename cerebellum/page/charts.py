"""Draws the charts, each one function from plain numbers to a matplotlib figure of a given width.

Every mark of data carries an id (``gid``), so that a test can see that the page shows all there is. Colour is
never alone: what is over the limit is also to the right of a line, or named in words.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from cerebellum.page.pictures import (
    ACCENT,
    INK,
    MUTED,
    NARROW,
    RULE,
    SENSITIVE,
    TOLERANT,
    UNDECIDED,
    figure,
)

MINUS = "\u2212"
_ROW = 24  # CSS pixels that a row of a chart takes
_FRAME = 62  # CSS pixels for the axis and its label
_LONGEST_NAME = 24
_DASHES = (0, (4, 3))
_MOST_EMPTY = 2.5
_DECADES = 30  # a linear axis hides what is smaller than a thirtieth of its length
_COLOURS = {
    "tolerant": TOLERANT,
    "promoted": TOLERANT,
    "demoted": ACCENT,
    "sensitive": SENSITIVE,
    "collapsed": SENSITIVE,
}


@dataclass(frozen=True, kw_only=True)
class EstimateMark:
    """Is one row of a forest plot: a mean with its interval, in percent.

    ``verdict`` picks the colour and ``text`` stands at the right end of the row.
    """

    name: str
    mean: float
    low: float
    high: float
    verdict: str = ""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Is one row of the chart of rates: a damage for each byte saved, with the interval it could have.

    ``changed`` says that the plan changed this group, which is then drawn in another colour.
    """

    name: str
    value: float
    low: float
    high: float
    changed: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Shows how one verdict was reached: the chunks seen, and mean, low and high in percent
    after each look.
    """

    name: str
    verdict: str
    chunks: Sequence[int]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Point:
    """Is a variant by size and damage, with its interval; only where there is room does ``label`` name it."""

    name: str
    size: float
    delta: float
    low: float
    high: float
    verdict: str
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class JudgedMark:
    """Is a file by its size and its KL divergence from the source, nats a token, with the divergence's bounds."""

    name: str
    size: float
    damage: float
    bounds: tuple[float, float]
    survives: bool


@dataclass(frozen=True, kw_only=True)
class Step:
    """Is a group at one type: its size, its damage and the damage's interval in nats a token.

    ``chosen`` marks the type that the plan gave it.
    """

    size: float
    damage: float
    low: float
    high: float
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Shows what one group costs at each type, from the smallest type to the largest, as a small chart of its
    own.
    """

    name: str
    steps: Sequence[Step]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Is a role over a span of layers with its damage, in the unit that ``heat_map`` is told."""

    role: str
    layers: Sequence[int]
    delta: float


def verdict_colour(verdict: str) -> str:
    """Returns the colour of a verdict, and that of an undecided one where the word is not known."""
    return _COLOURS.get(verdict, UNDECIDED)


def short(name: str) -> str:
    """Returns a name cut to what leaves room for the data, with an ellipsis where something was cut off."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def told_apart(names: Sequence[str]) -> list[str]:
    """Returns names without the words that all of them begin with, which tell nothing apart, such as the model's."""
    common = os.path.commonprefix(list(names))  # noqa: RUF071  (of names, not of paths)
    ends_a_word = all(name[len(common) :][:1] in ("-", ".") for name in names)
    cut = len(common) if ends_a_word else common.rfind("-") + 1
    left = [name[cut:].lstrip("-.") for name in names]
    return left if all(left) and len(names) > 1 else list(names)


def estimates_chart(width: int, rows: Sequence[EstimateMark], limit: float | None, label: str) -> Figure:
    """Draws a forest plot: a dot and its interval for each row, and the limit in percent as a dashed line.

    ``label`` names the axis; where the limit lies too far off to be drawn, the axis says it in words.
    """
    drawn = figure(width, _ROW * len(rows) + _FRAME)
    axes = drawn.add_subplot()
    for place, row in enumerate(rows):
        colour = verdict_colour(row.verdict) if row.verdict else ACCENT
        axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2, gid=f"interval-{place}")
        axes.plot([row.mean], [place], "o", color=colour, markersize=6, gid=f"estimate-{place}")
    shown = limit if near(limit, [row.high for row in rows]) else None
    if shown is not None:
        axes.axvline(shown, color=SENSITIVE, linewidth=1.2, linestyle=_DASHES, gid="limit")
    _named_rows(axes, [row.name for row in rows], [row.text for row in rows])
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_xlabel(label if limit is None or shown is not None else f"{label}; the limit is +{limit:g}%")
    return drawn


def near(limit: float | None, highs: Sequence[float]) -> bool:
    """Says whether drawing the limit leaves room for the data; if not, it is told in words and not drawn."""
    return limit is not None and limit <= _MOST_EMPTY * max(highs, default=0)


def rates_chart(width: int, rows: Sequence[Rate], label: str, in_percent: bool) -> Figure:
    """Draws dots from the cheapest byte to the dearest; ``in_percent`` decides the unit of the axis.

    Rates can span decades, and then the axis is logarithmic.
    """
    drawn = figure(width, _ROW * len(rows) + _FRAME)
    axes = drawn.add_subplot()
    floor = _log_floor(rows)
    for place, row in enumerate(rows):
        colour = ACCENT if row.changed else UNDECIDED
        low, value, high = (max(x, floor or x) for x in (row.low, row.value, row.high))
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        face = colour if value == row.value else "none"
        axes.plot(
            [value], [place], "o", color=colour, markerfacecolor=face, markersize=6, gid=f"rate-{place}"
        )
    if floor:
        axes.set_xscale("log")
        axes.set_xlim(left=floor)
    else:
        axes.axvline(0, color=MUTED, linewidth=1)
    _named_rows(axes, [row.name for row in rows], [row.text for row in rows], log=bool(floor))
    if not in_percent:
        axes.xaxis.set_major_formatter(FuncFormatter(_nats_tick))
    axes.set_xlabel(label)
    return drawn


def _log_floor(rows: Sequence[Rate]) -> float | None:
    """Returns where a logarithmic axis starts, or None where a linear one shows everything or zero counts."""
    lows = [row.low for row in rows]
    values = [row.value for row in rows]
    if min(values) <= 0 or sum(low > 0 for low in lows) < len(lows) / 2:
        return None
    return min(values) / 2 if max(values) >= _DECADES * min(values) else None


def _named_rows(axes: Axes, names: Sequence[str], texts: Sequence[str], log: bool = False) -> None:
    """Writes names on the left and values on the right, with a faint rule under each row and the first row on
    top.
    """
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(LogLocator(numticks=6) if log else MaxNLocator(5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_percent_tick))
    axes.grid(axis="x", alpha=0.8)
    axes.set_axisbelow(True)
    if any(texts):
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(texts)), list(texts))
        right.tick_params(length=0, pad=6, labelcolor=MUTED)
        right.spines["right"].set_visible(False)


def _percent_tick(value: float, _place: int | None = None) -> str:
    return "0" if value == 0 else f"{value:+g}%".replace("-", MINUS)


def paths_chart(width: int, panels: Sequence[Panel], limit: float) -> Figure:
    """Draws small multiples: the interval of each group closing as chunks are read, against the limit in
    percent.
    """
    columns = 2 if width <= NARROW else 4
    lines = math.ceil(len(panels) / columns)
    drawn = figure(width, 118 * lines + 34)
    grid = drawn.subplots(lines, columns, squeeze=False, sharey=True)
    top = max(3 * limit, *(max(panel.means) * 1.25 for panel in panels))
    bottom = min(-1.2 * limit, *(min(panel.means) * 1.25 for panel in panels))
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        _path(axes, panels[place], limit, place)
        axes.set_ylim(bottom, top)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(_percent_tick))
        axes.tick_params(axis="y", labelcolor=MUTED, labelsize=9)
    drawn.supxlabel("chunks read", fontsize=10, color=MUTED)
    return drawn


def _path(axes: Axes, panel: Panel, limit: float, place: int) -> None:
    colour = verdict_colour(panel.verdict)
    axes.fill_between(panel.chunks, panel.lows, panel.highs, color=colour, alpha=0.22, linewidth=0)
    axes.plot(panel.chunks, panel.means, color=colour, linewidth=1.8)
    last = panel.chunks[-1]
    axes.plot([last, last], [panel.lows[-1], panel.highs[-1]], color=colour, linewidth=1.4)
    axes.plot([last], panel.means[-1:], "o", color=colour, markersize=4.5, gid=f"path-{place}")
    axes.axhline(limit, color=SENSITIVE, linewidth=1, linestyle=_DASHES)
    axes.axhline(0, color=RULE, linewidth=1)
    axes.set_title(short(panel.name), fontsize=10, color=INK, loc="left", pad=4)
    axes.set_xscale("log")
    ends = sorted({panel.chunks[0], panel.chunks[-1]})
    axes.set_xticks(ends, [str(n) for n in ends], fontsize=9)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.06)


def sizes_chart(width: int, points: Sequence[Point], unit: str, limit: float | None) -> Figure:
    """Draws everything that was measured by its size in ``unit`` and its damage in percent; lower left is
    better.

    The limit in percent is a dashed line where drawing it leaves room for the data.
    """
    drawn = figure(width, 300)
    axes = drawn.add_subplot()
    for place, point in enumerate(points):
        colour = ACCENT if point.label else verdict_colour(point.verdict)
        if point.verdict:
            axes.plot([point.size] * 2, [point.low, point.high], color=colour, linewidth=1.4, alpha=0.6)
        axes.plot([point.size], [point.delta], "o", color=colour, markersize=6, gid=f"point-{place}")
        if point.label:
            _point_label(axes, point, points)
    if limit is not None and near(limit, [point.high for point in points]):
        axes.axhline(limit, color=SENSITIVE, linewidth=1.2, linestyle=_DASHES)
    axes.set_xlabel(f"tensors, {unit}")
    axes.set_ylabel("perplexity against the base")
    axes.yaxis.set_major_formatter(FuncFormatter(_percent_tick))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.grid(alpha=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.08, 0.16)
    return drawn


def _point_label(axes: Axes, point: Point, points: Sequence[Point], rise: int = 0) -> None:
    """Writes a point's label where it hides nothing.

    The base's stands beside its point where nothing is larger, else under it, or over it where there is a ``rise``;
    every other one stands beside its point.
    """
    middle = (min(p.size for p in points) + max(p.size for p in points)) / 2
    side = 1 if point.size <= middle or rise else -1
    away = (9 * side, rise)
    align = "left" if side > 0 else "right"
    if not point.verdict:
        last = point.size >= max(p.size for p in points) and not rise
        away = (8, 0) if last else (0, 13 if rise else -13)
        align = "left" if last else "center"
    axes.annotate(
        short(point.label),
        (point.size, point.delta),
        xytext=away,
        textcoords="offset points",
        ha=align,
        va="center",
        fontsize=10,
    )


def curves_chart(width: int, curves: Sequence[Curve], unit: str) -> Figure:
    """Draws small multiples: damage by size in ``unit`` for each group, with a ring around what was chosen.

    All panels share the vertical axis, so that a flat curve is one that costs little.
    """
    columns = 2 if width <= NARROW else 4
    lines = math.ceil(len(curves) / columns)
    drawn = figure(width, 122 * lines + 34)
    grid = drawn.subplots(lines, columns, squeeze=False, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(curves):
            axes.set_visible(False)
            continue
        _curve(axes, curves[place], place)
    drawn.supxlabel(f"size of the group, {unit}", fontsize=10, color=MUTED)
    return drawn


def _curve(axes: Axes, curve: Curve, place: int) -> None:
    sizes = [step.size for step in curve.steps]
    damages = [step.damage for step in curve.steps]
    axes.axhline(0, color=RULE, linewidth=1)
    axes.plot(sizes, damages, color=ACCENT, linewidth=1.4, gid=f"curve-{place}")
    for step in curve.steps:
        axes.plot([step.size] * 2, [step.low, step.high], color=ACCENT, linewidth=1.2, alpha=0.5)
        size = 7.5 if step.chosen else 3.5
        face = "none" if step.chosen else ACCENT
        axes.plot([step.size], [step.damage], "o", color=ACCENT, markerfacecolor=face, markersize=size)
    axes.set_title(short(curve.name), fontsize=10, color=INK, loc="left", pad=4)
    ends = sorted({min(sizes), max(sizes)})
    axes.set_xticks(ends, [f"{end:.3g}" for end in ends])
    axes.tick_params(axis="both", labelsize=9, labelcolor=MUTED)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(_nats_tick))
    axes.margins(x=0.12)


def _nats_tick(value: float, _place: int | None = None) -> str:
    return "0" if value == 0 else f"{value:+.2g}".replace("-", MINUS)


def frontier_chart(
    width: int, best: Sequence[tuple[float, float]], points: Sequence[Point], unit: str
) -> Figure:
    """Draws the best that the parts promise at each size as a line, and what was measured whole as points.

    ``best`` holds (size in ``unit``, KL divergence in nats a token); the axis is logarithmic where all is
    above 0.
    """
    drawn = figure(width, 300)
    axes = drawn.add_subplot()
    axes.plot(
        [s for s, _ in best], [damage for _, damage in best], color=UNDECIDED, linewidth=1.6, gid="frontier"
    )
    for place, point in enumerate(points):
        axes.plot([point.size], [point.delta], "o", color=ACCENT, markersize=6, gid=f"point-{place}")
        if point.label:
            _point_label(axes, point, points, rise=8)
    _size_and_divergence(axes, unit, log=all(damage > 0 for _, damage in best))
    return drawn


def judged_chart(width: int, marks: Sequence[JudgedMark], unit: str) -> Figure:
    """Draws files by size in ``unit`` and KL divergence from the source; lower left is better.

    Survivors are filled and joined by steps: what lies above the steps is beaten. The axis is logarithmic where all
    bounds are above 0.
    """
    drawn = figure(width, 360)
    axes = drawn.add_subplot()
    alive = sorted((mark for mark in marks if mark.survives), key=lambda mark: mark.size)
    if len(alive) > 1:
        axes.step(
            [mark.size for mark in alive],
            [mark.damage for mark in alive],
            where="post",
            color=RULE,
            linewidth=1.6,
            gid="survivors",
        )
    labels = told_apart([mark.name for mark in marks])
    for place, mark in enumerate(marks):
        colour = ACCENT if mark.survives else UNDECIDED
        axes.plot([mark.size] * 2, mark.bounds, color=colour, linewidth=1.4, gid=f"interval-{place}")
        face = colour if mark.survives else "none"
        axes.plot([mark.size], [mark.damage], "o", color=colour, markerfacecolor=face, gid=f"point-{place}")
        _judged_label(axes, mark, marks, short(labels[place]))
    _size_and_divergence(axes, unit, log=all(mark.bounds[0] > 0 for mark in marks))
    return drawn


def _judged_label(axes: Axes, mark: JudgedMark, marks: Sequence[JudgedMark], label: str) -> None:
    """Names a file where others leave room: survivors below the steps that join them, beaten ones above."""
    smallest = min(each.size for each in marks)
    share = (mark.size - smallest) / (max(each.size for each in marks) - smallest or 1.0)
    side = 1 if share <= (0.5 if mark.survives else 0.8) else -1
    axes.annotate(
        label,
        (mark.size, mark.damage),
        xytext=(8 * side, -14 if mark.survives else 5),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        color=INK if mark.survives else MUTED,
    )


def _size_and_divergence(axes: Axes, unit: str, *, log: bool) -> None:
    """Names the axes of a chart of files by size and KL divergence."""
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(f"file, {unit}")
    axes.set_ylabel("KL divergence, nats a token")
    axes.yaxis.set_major_formatter(FuncFormatter("{:.3g}".format))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.grid(alpha=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.08, 0.16)


def heat_map(width: int, cells: Sequence[Cell], told: Callable[[float], str]) -> Figure:
    """Draws roles by layers, where a role was measured in spans: the deeper the colour, the more damage.

    ``told`` writes the damage of the deepest colour, so that the colours have a scale.
    """
    roles = list(dict.fromkeys(cell.role for cell in cells))
    last = max(layer for cell in cells for layer in cell.layers)
    drawn = figure(width, _ROW * len(roles) + _FRAME)
    axes = drawn.add_subplot()
    scale = max(max(abs(cell.delta) for cell in cells), 1e-9)
    for place, cell in enumerate(cells):
        for layer in cell.layers:
            strength = max(cell.delta, 0) / scale
            axes.barh(
                roles.index(cell.role),
                1,
                left=layer - 0.5,
                height=0.9,
                color=SENSITIVE,
                alpha=0.06 + 0.94 * strength,
                gid=f"cell-{place}-{layer}",
            )
    axes.set_xlim(-0.5, last + 0.5)
    axes.set_yticks(range(len(roles)), [short(role) for role in roles])
    axes.set_ylim(len(roles) - 0.5, -0.5)
    axes.tick_params(axis="both", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(f"layer; the deepest colour is {told(scale)}")
    return drawn
