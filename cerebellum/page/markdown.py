"""Writes untrusted text into Markdown, because names come out of files that anybody may have written.

Everything is escaped unless it says that it is Markdown already, so a forgotten filter shows as backslashes
and not as somebody's link.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Any

_INTERVAL = r"\[[+\u2212\d., ]+\](?![(\[:])"
_ACTIVE = re.compile(rf"({_INTERVAL})|(?<=[A-Za-z0-9])_(?=[A-Za-z0-9])|([\\`*_\[\]|~$])")
"""What Markdown may act on, but for intervals such as [+1.0, +2.0] and the _ inside a word."""

_PLAIN_CODE = re.compile(r"[A-Za-z0-9_.+/:@ ,()-]+")
_LINKS = (("://", "&#58;//"), ("www.", "www&#46;"), ("@", "&#64;"))


class Markdown(str):
    """Is text that is Markdown already, so that it is not escaped a second time."""

    __slots__ = ()


@dataclass(frozen=True)
class Code:
    """Is a name out of a file, to be shown in a code span and never to be read as markup."""

    text: str


Sentence = tuple[str | Code, ...]
"""A sentence of our own words and other people's names, for Markdown and HTML alike."""


def one_line(text: object) -> str:
    """Returns the text without line breaks and control characters, those that turn writing
    around among them.
    """
    return "".join(c if c.isprintable() else " " for c in str(text))


def escape_text(text: object) -> Markdown:
    """Returns plain text as Markdown that reads the same: no markup, no HTML, no link and no mention of
    anybody.
    """
    plain = html.escape(one_line(text), quote=False)
    escaped = _ACTIVE.sub(lambda match: f"\\{match[2]}" if match[2] else match[0], plain)
    for active, inert in _LINKS:
        escaped = escaped.replace(active, inert)
    return Markdown(escaped)


def code_span(text: object) -> Markdown:
    """Returns a name as code; unusual characters become entities, because no fence holds every name."""
    name = one_line(text)
    if _PLAIN_CODE.fullmatch(name):
        return Markdown(f"`{name}`")
    inert = "".join(c if c.isalnum() and c.isascii() else f"&#{ord(c)};" for c in name)
    return Markdown(f"<code>{inert}</code>")


def sentence(parts: Sentence) -> Markdown:
    """Returns a sentence as Markdown; our own words are escaped too, since they may hold numbers such as
    `~1`.
    """
    return Markdown("".join(code_span(p.text) if isinstance(p, Code) else escape_text(p) for p in parts))


def finalize(value: Any) -> Any:
    """Returns what a template writes for a value: everything but ``Markdown`` is escaped, and None is
    nothing.
    """
    return value if isinstance(value, Markdown) else escape_text("" if value is None else value)
