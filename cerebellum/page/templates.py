"""Renders the templates, which are Cerebellum's own files; a model's template is never one of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from cerebellum.errors import visible
from cerebellum.page.markdown import Code, Markdown, Sentence, code_span, finalize, sentence


def render_markdown(template: str, context: Mapping[str, Any]) -> str:
    """Renders a Markdown template by its name; every value is escaped that is not ``Markdown`` already.

    A name that the template uses and ``context`` lacks raises jinja2's UndefinedError.
    """
    return _markdown().get_template(template).render(context)


def render_html(template: str, context: Mapping[str, Any]) -> str:
    """Renders an HTML template by its name; every value is escaped that is not markup already."""
    return _html().get_template(template).render(context)


@cache
def _markdown() -> Environment:
    environment = Environment(**_options(), autoescape=False, finalize=finalize)
    environment.filters |= {"code": code_span, "sentence": sentence, "raw": Markdown}
    return environment


@cache
def _html() -> Environment:
    environment = Environment(**_options(), autoescape=True, finalize=_harmless)
    environment.filters |= {"code": _code, "sentence": _sentence}
    return environment


def _options() -> dict[str, Any]:
    return {
        "loader": PackageLoader("cerebellum", "card"),
        "undefined": StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
        "keep_trailing_newline": True,
    }


def _harmless(value: object) -> object:
    """Writes out the characters in a name that would turn writing around; markup of ours has none."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _code(text: object) -> Markup:
    return Markup("<code>{}</code>").format(visible(str(text)))


def _sentence(parts: Sentence) -> Markup:
    shown = (_code(part.text) if isinstance(part, Code) else escape(_harmless(part)) for part in parts)
    return Markup("").join(shown)
