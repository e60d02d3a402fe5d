"""The one error tree: what goes wrong on purpose is a CerebellumError with its exit code."""

from __future__ import annotations


class CerebellumError(Exception):
    """The root of every error Cerebellum raises on purpose; `exit_code` is the command's."""

    exit_code = 1


class BadInput(CerebellumError):
    """Wrong use or bad input. The message is one line: what is wrong, where, what to do.

    A path or a name out of a hostile file may hold line breaks; they are folded to spaces here, so
    that one line stays one line whoever wrote the message.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class AnswerIsNo(CerebellumError):
    """The question was understood and the answer is no: verification failed, budget unreachable."""

    exit_code = 1
