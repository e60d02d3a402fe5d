"""Progress on stderr: a bar with the time left on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cerebellum.errors import visible

_PIPE_COLUMNS = 110  # rich assumes 80 where there is no terminal, and tables would wrap
_TITLE_COLUMNS = 64
_SECONDS_BETWEEN_LINES = 10.0


class Terminal(Console):
    """Is a console whose reader may leave: that is an error for the caller to judge, and not the end of it all.

    What goes to stderr is for whoever looks; where it cannot be written, the work goes on without it.
    """

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError, where rich itself would end the program with exit code 1."""
        raise BrokenPipeError

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            if not self.stderr:
                raise


OUT = Terminal(width=None if sys.stdout is not None and sys.stdout.isatty() else _PIPE_COLUMNS)
"""Where answers go, and nothing else."""

ERR = Terminal(stderr=True)
"""Where progress, notes and complaints go."""


def say(text: str, style: str | None = None, *, soft_wrap: bool = True) -> None:
    """Prints a line to stderr as it is: names in it are never markup and never act on the terminal."""
    ERR.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=soft_wrap)


class ProgressReporter:
    """Progress on stderr: a bar with the time left on a terminal, now and then a line elsewhere."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        if not ERR.is_terminal:
            yield LineProgress(title, total).tick
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=ERR) as progress:
            task = progress.add_task(visible(title)[:_TITLE_COLUMNS], total=total)
            yield lambda: progress.advance(task)

    def note(self, text: str) -> None:
        say(text, style="dim", soft_wrap=False)


class LineProgress:
    """For logs and pipes: a line at the start, then one every ten seconds with the time left."""

    def __init__(self, title: str, total: int) -> None:
        self.title = visible(title)
        self.total = total
        self.done = 0
        self.started = self.said = time.monotonic()
        say(f"{title}: {total} steps")

    def tick(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.said >= _SECONDS_BETWEEN_LINES and self.done < self.total:
            left = (now - self.started) / self.done * (self.total - self.done)
            line = f"{self.title}: {self.done} of {self.total}, {left:.0f} s left"
            say(line)
            self.said = now
