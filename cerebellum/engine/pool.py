"""One pool of threads for all rounding of weights, and results in the order in which they were asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")


def begun_in_order(tasks: Iterable[Callable[[], T]], threads: int) -> Iterator[T]:
    """Begins all tasks at once on the shared pool, and yields their results in order.

    All callers with as many ``threads`` share one pool, so tasks that are begun before those ahead are through keep
    it busy at the seams. Results wait in memory until they are wanted; where nobody wants the rest, what is not
    begun is left undone.
    """
    pool = _pool(threads)
    return _in_order(deque(pool.submit(task) for task in tasks))


def _in_order(begun: deque[Future[T]]) -> Iterator[T]:
    try:
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="quantize")
