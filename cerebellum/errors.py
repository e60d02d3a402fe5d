"""Defines the one error tree: whatever goes wrong on purpose is a CerebellumError with its exit code.

What goes wrong is told in words out of other people's files, so here is also what makes such words harmless.
"""

from __future__ import annotations

import re

_ACTIVE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
"""Characters that do something to a terminal or to the order of writing instead of being seen, and halves of a
pair of surrogates, which is how Python holds bytes of a file's name that are no UTF-8."""


def visible(text: str) -> str:
    """Returns text from outside with every character that would act on a terminal, or hide, written out.

    A name with an escape sequence in it must not move a cursor or turn a line around, and people must see
    that it is there: ``\\x1b[2J`` is what they get. Line breaks and tabs are written out like the rest.
    """
    return _ACTIVE.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class CerebellumError(Exception):
    """Is the root of every error that Cerebellum raises on purpose, with its command's `exit_code`.

    A path or a name out of a hostile file may hold line breaks and escape sequences. The first are folded to
    spaces and the second written out here, so that one line stays one line whoever wrote the message.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(visible(" ".join(message.splitlines())))


class BadInput(CerebellumError):
    """Says that a command was used wrongly or was given bad input; one line tells what, where and what to do."""

    exit_code = 2


class AnswerIsNo(CerebellumError):
    """Says that a question was understood and its answer is no: the budget is out of reach, say."""

    exit_code = 1
