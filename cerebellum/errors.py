"""Defines the one error tree: whatever goes wrong on purpose is a CerebellumError with its exit code."""

from __future__ import annotations


class CerebellumError(Exception):
    """Is the root of every error that Cerebellum raises on purpose, with its command's `exit_code`."""

    exit_code = 1


class BadInput(CerebellumError):
    """Says that a command was used wrongly or was given bad input; one line tells what, where and what to do.

    A path or a name out of a hostile file may hold line breaks. They are folded to spaces here, so that one
    line stays one line whoever wrote the message.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class AnswerIsNo(CerebellumError):
    """Says that a question was understood and its answer is no: the budget is out of reach, say."""

    exit_code = 1
