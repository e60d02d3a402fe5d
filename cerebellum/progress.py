"""How stages tell of long work, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Tick = Callable[[], None]


class Reporter(Protocol):
    """``task`` opens a piece of work of ``total`` equal steps and yields what to call after each."""

    def task(self, title: str, total: int) -> AbstractContextManager[Tick]: ...

    def note(self, text: str) -> None: ...


class Silent:
    """Says nothing; for tests and for callers from Python."""

    def task(self, title: str, total: int) -> AbstractContextManager[Tick]:
        return nullcontext(lambda: None)

    def note(self, text: str) -> None:
        pass
