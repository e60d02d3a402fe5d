"""Workers through Ray, on this machine or a cluster. The only module that knows Ray.

Ray starts and places processes, carries tasks and results, and notices deaths; nothing of that is done again here.
Each worker is an actor: with a graphics card of its own (``num_gpus=1``, by which Ray sets CUDA_VISIBLE_DEVICES), or
with so many threads of a processor. Ray's own restarts are off, for a new process has to prove its numbers again.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cerebellum.engine.workers import (
    HOST,
    MODEL,
    Done,
    Lane,
    MakeRoom,
    Outcome,
    Room,
    Task,
    failure,
    run_task,
)
from cerebellum.errors import BadInput, CerebellumError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
os.environ.setdefault(
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
)  # a worker without a card keeps this process's view

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

_STORE_BYTES = (
    256 << 20
)  # Ray's shared memory on this machine: a recipe with its importance matrix passes through it
_START_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What Ray has: processor cores and graphics cards, over all machines."""

    cores: int
    cards: int


def connect(address: str | None, cores: int) -> Cluster:
    """Joins the Ray cluster at an address ("auto" for the one this machine is in), or starts one of this machine alone.

    A local one has at least so many ``cores`` as far as Ray is concerned. Raises BadInput where there is none.
    """
    usual = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address is None:
            ray.init(
                num_cpus=max(cores, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                **usual,
            )
        else:
            ray.init(address=address, **usual)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"--ray {address}" if address else "--workers"
        raise BadInput(f"{where}: Ray cannot be reached ({error}); is `ray start` running there?") from error
    ray._private.worker._worker_logs_enabled = (
        False  # else it tells of dead workers on stdout, where answers go
    )
    found = ray.cluster_resources()
    return Cluster(cores=int(found.get("CPU", 0)), cards=int(found.get("GPU", 0)))


class _Worker:
    """The actor: a room, made when the first task comes, so that what goes wrong in it is told like any error."""

    def __init__(self, make_room: MakeRoom) -> None:
        self._make_room = make_room
        self._room: Room | None = None
        self._lock = threading.Lock()

    def run(self, task: Task) -> Outcome | CerebellumError:
        """Runs a task; errors are returned, for those that Ray raises carry tracebacks of other machines."""
        try:
            with self._lock:  # two lanes may begin at once
                if self._room is None:
                    self._room = self._make_room()
            return run_task(task, self._room)
        except Exception as error:
            return failure(error)


class RayPool:
    """``size`` actors, each with ``cards`` of a card (none: 0) and ``threads`` threads of a processor."""

    def __init__(self, make_room: MakeRoom, *, size: int, threads: int, cards: float) -> None:
        self.size = size
        self.on_cards = cards > 0
        self._make_room = ray.put(make_room)
        groups: dict[str, int] = {MODEL: 1, HOST: 1} if self.on_cards else {}
        made: Any = ray.remote(**({"concurrency_groups": groups} if groups else {"num_cpus": threads}))(
            _Worker
        )
        self._kind = made.options(num_cpus=threads, num_gpus=cards, max_restarts=0, max_task_retries=0)
        self._actors: list[Any] = [self._kind.remote(self._make_room) for _ in range(size)]
        self._under_way: dict[Any, Done] = {}

    def begin(self, worker: int, ticket: int, task: Task) -> None:
        """Sends a task to an actor."""
        run = self._actors[worker].run
        lane: Lane = task.lane
        method = run.options(concurrency_group=lane) if self.on_cards else run
        self._under_way[method.remote(task)] = Done(ticket=ticket, worker=worker)

    def wait(self, seconds: float) -> Sequence[Done]:
        """Returns all tasks that have ended, once one has."""
        refs = list(self._under_way)
        if not refs:
            return ()
        ready, _ = ray.wait(refs, num_returns=1, timeout=seconds)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return [self._ended(ref, self._under_way.pop(ref)) for ref in ready]

    def _ended(self, ref: Any, sent: Done) -> Done:
        try:
            found = ray.get(ref, timeout=_START_SECONDS)
        except RayActorError:
            return sent
        except (RayError, GetTimeoutError) as error:
            return Done(ticket=sent.ticket, worker=sent.worker, error=failure(error))
        if isinstance(found, CerebellumError):
            return Done(ticket=sent.ticket, worker=sent.worker, error=found)
        return Done(ticket=sent.ticket, worker=sent.worker, outcome=found)

    def renew(self, worker: int) -> None:
        """Starts another actor in the place of one."""
        ray.kill(self._actors[worker])
        self._actors[worker] = self._kind.remote(self._make_room)

    def close(self) -> None:
        """Ends all actors; Ray itself goes with this process."""
        for actor in self._actors:
            ray.kill(actor)
        self._under_way.clear()


def card_share(cards: int, size: int) -> float:
    """Returns what each of ``size`` workers gets of the cards there are: one, or a part of one where they are fewer."""
    return 1.0 if cards >= size else math.floor(1000 * cards / size) / 1000
