"""What Cerebellum needs of many workers, without knowing how they are reached: on this machine, or on others.

A worker is a process with a *room*: an engine, one resident model and what belongs to it. Tasks go to a worker and
are run there, one after another in each lane. The only one who knows Ray is `ray_pool.py`; `fake_pool.py` is the
official fake, which runs tasks in this process in an order that a seed decides, and kills workers when it is told to.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cerebellum.engine.timings import collecting
from cerebellum.errors import CerebellumError

Lane = Literal["model", "host"]
MODEL: Lane = "model"
HOST: Lane = "host"
"""What runs a model, and what only the processor does. Where models run on a graphics card the two go side by side."""


class Room(Protocol):
    """What a worker has: its engine's identity, and the notes that its engine made since they were last taken."""

    @property
    def identity(self) -> str: ...

    def take_notes(self) -> tuple[str, ...]: ...

    def close(self) -> None: ...


class Task(Protocol):
    """Something to do in a worker's room. It travels to the worker, and its result back: both can be pickled."""

    @property
    def lane(self) -> Lane: ...

    def run(self, room: Room) -> object: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a task: its result, the seconds that it took by part, and who the worker is."""

    result: object
    seconds: dict[str, float]
    wall: float
    identity: str
    notes: tuple[str, ...]
    where: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """A task that ended: with an outcome, with an error that it raised, or, with neither, by its worker's death."""

    ticket: int
    worker: int
    outcome: Outcome | None = None
    error: CerebellumError | None = None

    @property
    def died(self) -> bool:
        """Whether the worker died under the task; nothing is known of what it did."""
        return self.outcome is None and self.error is None


class Pool(Protocol):
    """Workers by number, from 0. All methods are called by one thread."""

    @property
    def size(self) -> int: ...

    @property
    def on_cards(self) -> bool:
        """Whether each worker has a graphics card of its own, and so both lanes at once."""
        ...

    def begin(self, worker: int, ticket: int, task: Task) -> None:
        """Sends a task to a worker, behind those of its lane that are there already."""
        ...

    def wait(self, seconds: float) -> Sequence[Done]:
        """Returns what has ended since, after waiting for something to end; nothing where ``seconds`` have passed."""
        ...

    def renew(self, worker: int) -> None:
        """Starts another worker in the place of one that died, or that is to be started anew."""
        ...

    def close(self) -> None:
        """Ends all workers, whatever they do."""
        ...


def run_task(task: Task, room: Room) -> Outcome:
    """Runs a task in a worker, with its times. Called in the worker."""
    started = time.perf_counter()
    if task.lane == HOST:  # beside the other lane, whose collector must not hear of it
        result = task.run(room)
        seconds = {"quantizing": time.perf_counter() - started}
    else:
        with collecting() as timings:
            result = task.run(room)
        seconds = dict(timings.seconds)
    return Outcome(
        result=result,
        seconds=seconds,
        wall=time.perf_counter() - started,
        identity=room.identity,
        notes=room.take_notes(),
        where=f"process {os.getpid()} on {socket.gethostname()}",
    )


def failure(error: BaseException) -> CerebellumError:
    """Returns what went wrong in a worker as an error that can travel; one that was raised on purpose stays itself."""
    if isinstance(error, CerebellumError):
        return error
    return CerebellumError(f"a worker failed ({type(error).__name__}: {error})")


MakeRoom = Callable[[], Room]
"""Makes a worker's room, in the worker; it travels there, so it can be pickled."""
