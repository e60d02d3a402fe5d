"""Turns numbers into HTML, Markdown and pictures: a tool that knows no stage, only what it is given."""

from cerebellum.page.charts import (
    Cell,
    Curve,
    EstimateMark,
    Panel,
    Point,
    Rate,
    Step,
    curves_chart,
    estimates_chart,
    frontier_chart,
    heat_map,
    paths_chart,
    rates_chart,
    sizes_chart,
)
from cerebellum.page.markdown import Code, Sentence, code_span, escape_text
from cerebellum.page.pictures import Picture, picture
from cerebellum.page.templates import render_html, render_markdown

__all__ = [
    "Cell",
    "Code",
    "Curve",
    "EstimateMark",
    "Panel",
    "Picture",
    "Point",
    "Rate",
    "Sentence",
    "Step",
    "code_span",
    "curves_chart",
    "escape_text",
    "estimates_chart",
    "frontier_chart",
    "heat_map",
    "paths_chart",
    "picture",
    "rates_chart",
    "render_html",
    "render_markdown",
    "sizes_chart",
]
