"""Progress on stderr: a bar with the time left on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PIPE_COLUMNS = 110  # rich assumes 80 where there is no terminal, and tables would wrap
_TITLE_COLUMNS = 64
_SECONDS_BETWEEN_LINES = 10.0

OUT = Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
"""Where answers go, and nothing else."""

ERR = Console(stderr=True)
"""Where progress, notes and complaints go."""


class ProgressReporter:
    """Progress on stderr: a bar with the time left on a terminal, now and then a line elsewhere."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        if not ERR.is_terminal:
            yield LineProgress(title, total).tick
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=ERR) as progress:
            task = progress.add_task(title[:_TITLE_COLUMNS], total=total)
            yield lambda: progress.advance(task)

    def note(self, text: str) -> None:
        ERR.print(text, style="dim", highlight=False)


class LineProgress:
    """For logs and pipes: a line at the start, then one every ten seconds with the time left."""

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self.started = self.said = time.monotonic()
        ERR.print(f"{title}: {total} steps", highlight=False, soft_wrap=True)

    def tick(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.said >= _SECONDS_BETWEEN_LINES and self.done < self.total:
            left = (now - self.started) / self.done * (self.total - self.done)
            line = f"{self.title}: {self.done} of {self.total}, {left:.0f} s left"
            ERR.print(line, highlight=False, soft_wrap=True)
            self.said = now
