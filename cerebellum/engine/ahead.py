"""Files made ahead of their need, on one thread beside the one that measures."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cerebellum.engine.timings import timed


class Ahead:
    """Makes files in the order of ``begin``; ``take`` gives what was made of one, or leaves it to the caller.

    What a maker raises is raised where its file is taken, and nowhere if nobody takes it.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._under_way: dict[Path, Future[str]] = {}

    def begin(self, path: Path, make: Callable[[], str]) -> None:
        """Queues the making of a file; the result is its hash."""
        if path not in self._under_way:
            self._under_way[path] = self._worker.submit(make)

    def take(self, path: Path) -> str | None:
        """Returns the hash of a file made ahead, waiting for it if it is under way.

        None where it was never queued, or has not been begun: its turn is cancelled and the caller is faster.
        """
        future = self._under_way.pop(path, None)
        if future is None or future.cancel():
            return None
        with timed("waiting"):
            return future.result()

    def close(self) -> None:
        """Cancels what is not begun and waits for what is, so that no half-made file is left."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._under_way.clear()
