"""How a run gets faster with workers: a recorded run is decided again, on a clock that only the simulation turns.

`python benchmarks/scaling.py RUN --rates h100-32b` opens a finished run folder, runs its measure and plan stages anew
with the real driver (`measure/crew.py`), and answers every task from the run's ledger. Only the workers are made up:
a task takes what the rates say for its chunks, for loading and staging weights, and for its way there and back. Chunks
that workers score ahead and that the recorded run never asked for are answered with zeros: no decision sees them, and
the plan at the end has to be the recorded one, which is checked.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import shutil
import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import save

from cerebellum.engine.fake import FakeEngine
from cerebellum.engine.protocols import Engine
from cerebellum.engine.workers import Done, Outcome, Task
from cerebellum.folder import RunFolder
from cerebellum.gguf import TensorInfo, bits_per_weight, is_quantized
from cerebellum.ledger import Ledger, SeriesKey
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.measure.scorer import Found
from cerebellum.measure.worker import PackedRecipe, Scored, ScoreTask, ShardTask
from cerebellum.progress import Silent
from cerebellum.run import run_all, way_of
from cerebellum.settings import Budget, Goal, Limit, Preset, Settings
from cerebellum.texts import read_text
from cerebellum.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds on one worker. ``at_once`` chunks go into one decode; ``scale`` is the model's bytes over the recorded
    one's, and ``stage`` bytes a second go onto the card; ``load`` seconds open a model and ``travel`` a task's way."""

    decode: float
    at_once: int
    load: float
    load_source: float
    stage: float
    scale: float
    swap: float
    travel: float
    on_cards: bool


# H100 at 1.5B and 32B: decodes, swaps and openings of results/gpu-h100-qwen-ours.json and gpu-h100-32b.json; 8B lies
# between them by active parameters. The source of the 32B is opened at what its staged weights came at.
RATES = {
    "cpu": Rates(
        decode=0.1,
        at_once=1,
        load=0.1,
        load_source=0.1,
        stage=2e9,
        scale=1,
        swap=0.01,
        travel=0.002,
        on_cards=False,
    ),
    "h100-1.5b": Rates(
        decode=0.096,
        at_once=4,
        load=0.4,
        load_source=0.7,
        stage=6e9,
        scale=105,
        swap=0.003,
        travel=0.003,
        on_cards=True,
    ),
    "h100-8b": Rates(
        decode=0.3,
        at_once=4,
        load=1.2,
        load_source=3.0,
        stage=6e9,
        scale=550,
        swap=0.004,
        travel=0.003,
        on_cards=True,
    ),
    "h100-32b": Rates(
        decode=0.58,
        at_once=4,
        load=2.6,
        load_source=11.0,
        stage=6e9,
        scale=2200,
        swap=0.005,
        travel=0.003,
        on_cards=True,
    ),
}
# As if the workers of a host shared the predictions of the reference, which they do not: what that would bring.
RATES["h100-32b-shared"] = replace(RATES["h100-32b"], on_cards=False)


@dataclass(kw_only=True)
class Recorded:
    """What the ledger of a run says of every chunk, and zeros of those that it lacks."""

    ledger: Ledger
    text: str
    engine: str
    asked: int = 0
    made_up: int = 0

    @property
    def identity(self) -> str:
        """The engine's own name: series are of it and of the company that chunks keep in decodes."""
        return self.engine.partition(", decodes ")[0]

    def found(self, task: ScoreTask) -> tuple[Found, ...]:
        series = self._series(task.variant.digest, int(task.inputs.shape[1]))
        lacking = set(self.ledger.lacking(series, task.chunks))
        n_scored = int(task.inputs.shape[1]) - int(task.inputs.shape[1]) // 2 - 1
        divergences = self._divergences(task, series)
        found = []
        for chunk in task.chunks:
            self.asked += 1
            self.made_up += chunk in lacking
            nll = (
                np.zeros(n_scored)
                if chunk in lacking
                else self.ledger.nll(series, [chunk])[0].astype(np.float64)
            )
            kld = same = None
            if divergences is not None and task.kept is not None and chunk in task.kept.chunks:
                kld, same = divergences.get(chunk, (np.zeros(n_scored), np.ones(n_scored, np.bool_)))
            found.append(Found(chunk=chunk, nll=nll, kld=kld, same_top=same))
        return tuple(found)

    def _series(self, digest: str, ctx: int) -> int:
        return self.ledger.series(SeriesKey(variant=digest, text=self.text, ctx=ctx, engine=self.engine))

    def _divergences(self, task: ScoreTask, series: int) -> dict[int, tuple[Any, Any]] | None:
        if task.kept is None or task.kept.reference.digest == task.variant.digest:
            return None
        base = self._series(task.kept.reference.digest, int(task.inputs.shape[1]))
        rows = self.ledger._rows(
            "SELECT chunk, kld, same FROM divergence WHERE series=? AND base=?", (series, base)
        )
        return {
            chunk: (np.frombuffer(kld, "<f4").astype(np.float64), np.frombuffer(same, np.uint8).astype(bool))
            for chunk, kld, same in rows
        }


@dataclass(kw_only=True)
class _Hand:
    """A worker on the made-up clock: when each lane is free, what is open, and what is staged."""

    free: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    opened: Path | None = None
    shown: str = ""
    staged: set[Path] = field(default_factory=set)
    compared: set[object] = field(default_factory=set)
    busy: float = 0.0


class SimulatedPool:
    """Workers that take as long as the rates say, and know what the recorded run measured."""

    def __init__(self, size: int, rates: Rates, recorded: Recorded) -> None:
        self.size = size
        self.on_cards = rates.on_cards
        self.now = 0.0
        self._rates = rates
        self._recorded = recorded
        self.hands = [_Hand() for _ in range(size)]
        self._events: list[tuple[float, int, int, Task, float]] = []

    def begin(self, worker: int, ticket: int, task: Task) -> None:
        hand = self.hands[worker]
        lane = task.lane if self.on_cards else "model"
        seconds = self._seconds(hand, task)
        started = max(self.now + self._rates.travel / 2, hand.free[lane])
        hand.free[lane] = started + seconds
        hand.busy += seconds
        heapq.heappush(
            self._events, (hand.free[lane] + self._rates.travel / 2, ticket, worker, task, seconds)
        )

    def _seconds(self, hand: _Hand, task: Task) -> float:
        rates = self._rates
        if not isinstance(task, ScoreTask):
            return 0.0
        seconds = len(task.bundles) * rates.decode
        variant = task.variant
        seconds += self._reference_seconds(hand, task)
        if hand.opened != variant.paths[0]:
            seconds += rates.load if len(variant.paths) > 1 else rates.load_source
            hand.opened = variant.paths[0]
            hand.staged = set(variant.paths)
        elif hand.shown != variant.digest:
            new = set(variant.paths) - hand.staged
            seconds += rates.swap + sum(path.stat().st_size for path in new) * rates.scale / rates.stage
            hand.staged |= new
        hand.shown = variant.digest
        return seconds

    def _reference_seconds(self, hand: _Hand, task: ScoreTask) -> float:
        """What a worker with a card decodes of the reference before it can compare with it, as `Scorer.score` does."""
        if task.kept is None or not self.on_cards:
            return 0.0
        wanted = {
            (task.kept.text, task.kept.reference.digest, bundle)
            for bundle in task.bundles
            if not task.kept.chunks.isdisjoint(bundle)
        } - hand.compared
        hand.compared |= wanted
        if task.variant.digest == task.kept.reference.digest:
            return 0.0
        reference = replace(
            task, variant=task.kept.reference, bundles=tuple(b for *_, b in wanted), kept=None
        )
        return self._seconds(hand, reference) if wanted else 0.0

    def wait(self, seconds: float) -> Sequence[Done]:
        if not self._events:
            return ()
        self.now, ticket, worker, task, took = heapq.heappop(self._events)
        result: object = None
        if isinstance(task, ScoreTask):
            result = Scored(found=self._recorded.found(task))
        else:
            assert isinstance(task, ShardTask)
        outcome = Outcome(
            result=result,
            seconds={},
            wall=took,
            identity=self._recorded.identity,
            notes=(),
            where="simulated",
        )
        return (Done(ticket=ticket, worker=worker, outcome=outcome),)

    def renew(self, worker: int) -> None:
        raise AssertionError("nobody dies here")

    def close(self) -> None:
        self._events.clear()


class RecordedEngine(LlamaEngine):
    """Tokenizes as ever, and has the name of the engine that the run was measured on."""

    def __init__(self, identity: str) -> None:
        super().__init__(EngineSettings(threads=1))
        self._identity = identity

    @property
    def identity(self) -> str:
        return self._identity


class MadeUpEngine(FakeEngine):
    """The official fake, with sensitive state-space tensors: a run of it asks as many questions as one of a model."""

    def __init__(self, identity: str = "fake", chunks_at_once: int = 4) -> None:
        super().__init__(damage=made_up_damage, identity=identity, chunks_at_once=chunks_at_once, noise=0.4)


def made_up_damage(tensor: TensorInfo) -> float:
    """Error falls fourfold with each bit; roles differ up to tenfold, late layers from early ones twofold."""
    if not is_quantized(tensor.type):
        return 0.0
    role = zlib.crc32(tensor.name.split(".")[-2].encode()) % 1000 / 1000
    layer = int(tensor.name.split(".")[1]) if tensor.name.startswith("blk.") else 0
    return 0.3 * 10**role * (1 + layer / 6) * 4.0 ** -bits_per_weight(tensor.type)


def make_up(source: Path, folder: Path, goal: Goal) -> Path:
    """Runs a model's shapes on the fake engine, as one worker would: something to replay without a card."""
    folder.mkdir(parents=True)
    texts = [folder / "select.txt", folder / "report.txt"]
    for seed, text in enumerate(texts):
        text.write_bytes(
            bytes(np.random.default_rng(seed).integers(97, 123, 32 * (600, 20)[seed], dtype=np.uint8))
        )
    settings = Settings(
        source=source.absolute(),
        goal=goal,
        select_text=texts[0],
        report_text=texts[1],
        ctx=32,
        imatrix_chunks=20,
        keep_shards=True,
    )
    run = folder / "run"
    run_all(Workspace(run, settings, MadeUpEngine(), Silent()))
    return run


def engine_of(identity: str) -> Engine:
    return MadeUpEngine(identity) if identity.startswith("fake") else RecordedEngine(identity)


def copied(run: Path, folder: Path) -> None:
    """The run without what was measured: its settings, importance matrix, rounding errors and shards."""
    folder.mkdir()
    for name in ("settings.json", "imatrix.gguf", "moments.gguf", "rounding.json"):
        if (run / name).exists():
            shutil.copy2(run / name, folder / name)
    (folder / "shards").symlink_to((run / "shards").absolute())


def identity_of(ledger: Ledger, text: str) -> str:
    ((engine,),) = ledger._rows("SELECT DISTINCT engine FROM series WHERE text=?", (text,))
    return str(engine)


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A simulated run; ``busy`` is the share of the workers' time in which they had something to do."""

    workers: int
    seconds: float
    busy: float
    chunks: int
    scored_ahead: int


def simulate(run: Path, size: int, rates: Rates) -> Ran:
    """Decides the run again with so many workers."""
    settings = RunFolder(run).settings()
    with tempfile.TemporaryDirectory() as temporary, Ledger(run / "ledger.sqlite") as ledger:
        folder = Path(temporary) / "run"
        copied(run, folder)
        text = hashlib.sha256(read_text(settings.select_text)).hexdigest()
        recorded = Recorded(ledger=ledger, text=text, engine=identity_of(ledger, text))
        pools: list[SimulatedPool] = []

        def hire(_packed: PackedRecipe) -> SimulatedPool:
            pools.append(SimulatedPool(size, rates, recorded))
            return pools[-1]

        workspace = Workspace(folder, settings, engine_of(recorded.identity), Silent(), hire=hire)
        with workspace.locked():
            way_of(settings.goal).measure_and_plan(workspace)
        if (folder / "plan.json").read_bytes() != (run / "plan.json").read_bytes():
            sys.exit(f"with {size} workers the plan is another one: this must not be")
    pool = pools[0]
    busy = sum(hand.busy for hand in pool.hands) / (size * pool.now)
    return Ran(
        workers=size, seconds=pool.now, busy=busy, chunks=recorded.asked, scored_ahead=recorded.made_up
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "run", type=Path, nargs="?", help="a finished run folder, made by one worker (--keep-shards)"
    )
    parser.add_argument(
        "--made-up", type=Path, help="instead: a source, whose shapes are run on the fake engine first"
    )
    parser.add_argument("--budget", help="with --made-up: a preset; else the run is by a limit of 3%%")
    parser.add_argument("--rates", choices=sorted(RATES), default="h100-32b")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--name", default="scaling")
    asked = parser.parse_args()
    if (asked.run is None) == (asked.made_up is None):
        parser.error("give a run folder, or --made-up SOURCE")
    with tempfile.TemporaryDirectory() as temporary:
        run = asked.run
        if run is None:
            goal = Budget(sizes=(Preset(name=asked.budget),)) if asked.budget else Limit()
            run = make_up(asked.made_up, Path(temporary) / "made-up", goal)
        rows = [simulate(run, size, RATES[asked.rates]) for size in asked.workers]
    print(f"{'workers':>8}{'seconds':>10}{'faster':>8}{'busy':>7}{'chunks':>8}{'ahead':>7}")
    for row in rows:
        faster = rows[0].seconds / row.seconds
        cells = f"{row.seconds:10.1f}{faster:8.2f}{100 * row.busy:6.0f}%{row.chunks:8}{row.scored_ahead:7}"
        print(f"{row.workers:8}{cells}")
    result = {
        "run": (asked.run or asked.made_up).name,
        "goal": asked.budget,
        "rates": asked.rates,
        "rows": [vars(row) for row in rows],
    }
    print(save(asked.name, result))


if __name__ == "__main__":
    main()
