"""The official fake pool: workers without processes, for tests of whoever hands out work.

Tasks and results are pickled as they would be on their way. Which worker is the next to finish is drawn by a seed, so
that answers come in any order; ``kills`` are the tasks, counted from 0 as they are run, during which a worker dies.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cerebellum.engine.workers import Done, MakeRoom, Room, Task, failure, run_task


@dataclass(kw_only=True)
class FakePool:
    """``size`` workers; ``started`` counts them with those that took the place of dead ones.

    ``kills`` may name tasks, or be a rule on a task that kills its worker every time.
    """

    make_room: MakeRoom
    size: int = 2
    seed: int = 0
    kills: frozenset[int] = frozenset()
    kills_on: Callable[[Task], bool] = lambda _: False
    on_cards: bool = False
    started: int = 0
    run: int = 0
    _queues: dict[int, deque[tuple[int, bytes]]] = field(default_factory=dict)
    _rooms: dict[int, Room] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        for worker in range(self.size):
            self.renew(worker)

    def begin(self, worker: int, ticket: int, task: Task) -> None:
        """Queues a task. A dead worker takes it too, and loses it."""
        self._queues[worker].append((ticket, pickle.dumps(task)))

    def wait(self, seconds: float) -> Sequence[Done]:
        """Runs the first task of a worker drawn by the seed."""
        busy = [worker for worker, queue in self._queues.items() if queue]
        if not busy:
            return ()
        worker = int(self._rng.choice(busy))
        ticket, packed = self._queues[worker].popleft()
        task = pickle.loads(packed)
        number = self.run
        self.run += 1
        dies = number in self.kills or self.kills_on(task)
        if (
            dies and self._rng.random() < 0.5
        ):  # before it has done anything, or when all is done but the answer
            return self._died(worker, ticket)
        try:
            outcome = run_task(task, self._rooms[worker])
        except Exception as error:
            return (Done(ticket=ticket, worker=worker, error=failure(error)),)
        if dies:
            return self._died(worker, ticket)
        return (Done(ticket=ticket, worker=worker, outcome=pickle.loads(pickle.dumps(outcome))),)

    def _died(self, worker: int, ticket: int) -> Sequence[Done]:
        lost = [ticket, *(queued for queued, _ in self._queues[worker])]
        self._queues[worker].clear()
        return tuple(Done(ticket=one, worker=worker) for one in lost)

    def renew(self, worker: int) -> None:
        """Gives a worker a new room."""
        self._queues[worker] = deque()
        self._rooms[worker] = self.make_room()
        self.started += 1

    def close(self) -> None:
        """Closes all rooms."""
        for room in self._rooms.values():
            room.close()
        self._queues.clear()
