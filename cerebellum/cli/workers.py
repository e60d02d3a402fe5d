"""--workers, --worker-threads and --ray: how many processes answer. What is measured does not depend on them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from cerebellum.cli.options import MAX_THREADS, options
from cerebellum.cli.streams import keep_stdout_for_this_thread
from cerebellum.errors import BadInput
from cerebellum.settings import Settings

if TYPE_CHECKING:
    from cerebellum.bench.workers import Askers
    from cerebellum.engine.ray_pool import Cluster
    from cerebellum.engine.workers import MakeRoom, Pool
    from cerebellum.llama.native import EngineSettings, LlamaEngine
    from cerebellum.measure.worker import PackedRecipe
    from cerebellum.workspace import Hire

_AUTO_THREADS = 4  # of a worker on the processor, where nobody says: more of them gain little in one decode
_CARDS = "CUDA_VISIBLE_DEVICES"


class WorkerCount(click.ParamType[Any]):
    """A number of workers, or ``auto``: one a graphics card, or as many as the processor has threads for."""

    name = "workers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Returns the number, or None for auto."""
        if value is None or str(value) == "auto":
            return None
        if str(value).isdigit() and 1 <= int(str(value)) <= 1024:
            return int(str(value))
        self.fail(f"{value!r} is neither a number of workers from 1 to 1024 nor auto", param, ctx)


worker_options: Callable[[Callable[..., Any]], Callable[..., Any]] = options(
    click.option(
        "--workers",
        type=WorkerCount(),
        default="1",
        show_default=True,
        help="Processes that measure and ask, one a graphics card: a number or auto (all cards). More than 1 need Ray.",
    ),
    click.option(
        "--worker-threads",
        type=click.IntRange(1, MAX_THREADS),
        help="Threads of each worker [default: the cores there are, divided by the workers].",
    ),
    click.option(
        "--ray", metavar="ADDRESS", help="A Ray cluster whose machines work, too; auto: this machine's."
    ),
)


@dataclass(frozen=True, kw_only=True)
class Hiring:
    """How many workers are wanted, with so many threads each, and on what."""

    size: int
    threads: int
    cluster: Cluster

    def hire_for(self, settings: Settings) -> Hire:
        """Returns what starts the workers of a run."""
        return partial(_hire, self, settings)

    def askers(self, engine: LlamaEngine) -> Askers:
        """Returns what starts workers for questions alone, with llama.cpp as this process has it but for threads."""
        from cerebellum.bench.workers import Askers

        return Askers(hire=partial(_hire_askers, self, engine.settings), identity=engine.identity)


def take_workers(asked: dict[str, Any]) -> Hiring | None:
    """Takes the three options out of what was asked, and reaches Ray where workers are wanted; None where none are.

    It has to come before llama.cpp is loaded: this process then sees one card, as every worker does.
    """
    size, threads, address = (asked.pop(name) for name in ("workers", "worker_threads", "ray"))
    if size == 1 and address is None:
        if threads is not None:
            raise click.UsageError("--worker-threads is of several workers: give --workers too, or --threads")
        return None
    if importlib.util.find_spec("ray") is None:
        flag = "--ray" if address is not None else "--workers"
        raise BadInput(
            f"{flag}: several workers need Ray, which is not installed: pip install 'cerebellum-gguf[ray]'; "
            "or leave the option out"
        )
    return _connected(size, threads, address, with_cards=asked.get("gpu_layers") != 0)


def _connected(size: int | None, threads: int | None, address: str | None, *, with_cards: bool) -> Hiring:
    from cerebellum.engine.ray_pool import connect  # loads Ray

    if not with_cards:
        os.environ[_CARDS] = ""
    keep_stdout_for_this_thread()
    cluster = connect(address, cores=(size or 1) * (threads or 1))
    if with_cards and cluster.cards:
        os.environ[_CARDS] = os.environ.get(_CARDS, "0").split(",")[0]
    size = size or cluster.cards or max(1, cluster.cores // (threads or _AUTO_THREADS))
    threads = threads or max(1, min(cluster.cores // size, MAX_THREADS))
    if size * threads > cluster.cores:
        raise BadInput(
            f"--workers {size} with {threads} threads each need {size * threads} cores, the Ray cluster has "
            f"{cluster.cores}; give fewer --workers or --worker-threads"
        )
    return Hiring(size=size, threads=threads, cluster=cluster)


def _hire(hiring: Hiring, settings: Settings, packed: PackedRecipe) -> Pool:
    """Starts workers, each with llama.cpp as the settings want it but for its threads."""
    from cerebellum.llama.native import EngineSettings, LlamaEngine
    from cerebellum.measure.worker import MakeWorkRoom

    engine = EngineSettings(
        threads=hiring.threads,
        gpu_layers=settings.gpu_layers,
        gpu_room=settings.gpu_room,
    )
    room = MakeWorkRoom(packed=packed, make_engine=partial(LlamaEngine, engine), threads=hiring.threads)
    return _pool(hiring, room, with_cards=bool(settings.gpu_layers))


def _hire_askers(hiring: Hiring, engine: EngineSettings) -> Pool:
    """Starts workers that ask questions and do nothing else."""
    from cerebellum.bench.workers import MakeAskRoom
    from cerebellum.llama.native import LlamaEngine

    settings = replace(engine, threads=hiring.threads)
    room = MakeAskRoom(make_engine=partial(LlamaEngine, settings))
    return _pool(hiring, room, with_cards=bool(settings.gpu_layers))


def _pool(hiring: Hiring, room: MakeRoom, *, with_cards: bool) -> Pool:
    from cerebellum.engine.ray_pool import RayPool, card_share

    cards = hiring.cluster.cards if with_cards else 0
    share = card_share(cards, hiring.size) if cards else 0.0
    return RayPool(room, size=hiring.size, threads=hiring.threads, cards=share)
