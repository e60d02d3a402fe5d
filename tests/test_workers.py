"""Many workers, one ledger: whatever they do and in whatever order, the run is the one-worker run, bit for bit."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_fake_run import artifacts, damage, workspace
from tiny import ledger_rows, small_text

from cerebellum.engine.fake import FakeEngine
from cerebellum.engine.fake_pool import FakePool
from cerebellum.engine.protocols import Bytes, QuantizeJob
from cerebellum.engine.workers import Room, Task
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.gguf import TensorInfo
from cerebellum.measure.bundles import Bundles
from cerebellum.measure.race import chunk_order, fresh_order
from cerebellum.measure.scorer import Found
from cerebellum.measure.worker import MakeWorkRoom, PackedRecipe, Scored, ScoreTask
from cerebellum.plan import budget
from cerebellum.run import run_all
from cerebellum.settings import Budget, Goal, Limit, Preset
from cerebellum.workspace import Workspace

GOALS = [Limit(max_increase_pct=1.0), Budget(sizes=(Preset(name="Q3_K_M"),))]
each_goal = pytest.mark.parametrize("goal", GOALS, ids=["limit", "budget"])


def make_engine(
    _note: Callable[[str], None],
    damage: Callable[[TensorInfo], float] = damage,
    identity: str = "fake",
    at_once: int = 1,
) -> FakeEngine:
    """With several chunks at once, each is off in its last bits by the company that it has in a decode."""
    mingling = 1e-4 if at_once > 1 else 0.0
    return FakeEngine(damage=damage, identity=identity, chunks_at_once=at_once, mingling=mingling)


@dataclass(kw_only=True)
class Hired:
    """Hires fake workers and remembers the pool."""

    size: int = 3
    seed: int = 0
    kills: frozenset[int] = frozenset()
    kills_on: Callable[[Task], bool] = lambda _: False
    on_cards: bool = False
    make_engine: Callable[..., FakeEngine] = make_engine
    pool: FakePool | None = None

    def __call__(self, packed: PackedRecipe) -> FakePool:
        room = MakeWorkRoom(packed=packed, make_engine=self.make_engine, threads=1)
        self.pool = FakePool(
            make_room=room,
            size=self.size,
            seed=self.seed,
            kills=self.kills,
            kills_on=self.kills_on,
            on_cards=self.on_cards,
        )
        return self.pool


def with_workers(folder: Path, goal: Goal, hired: Hired | None, at_once: int = 1) -> Workspace:
    """The run of ``workspace``, by workers."""
    plain = workspace(folder, goal, make_engine(print, at_once=at_once))
    if at_once > 1:
        plain.settings.select_text.write_bytes(small_text(42 * 32))
    return Workspace(plain.folder, plain.settings, plain.engine, plain.reporter, hire=hired)


def same_decisions(one: Path, many: Path) -> None:
    """Every artifact with a decision in it, and the file, byte for byte; the ledgers agree on all that both have."""
    first = artifacts(one)
    second = artifacts(many)
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} <= {"settings.json", "manifest.json"}
    (file,) = one.glob("*.gguf") if not (one / "imatrix.gguf").exists() else gguf_of(one)
    assert file.read_bytes() == (many / file.name).read_bytes()
    rows = ledger_rows(one)
    others = ledger_rows(many)
    assert rows.keys() <= others.keys()
    assert all(others[key] == row for key, row in rows.items())


def gguf_of(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*Cerebellum*.gguf")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both goals, by one worker in this process."""
    found = {}
    for goal in GOALS:
        folder = tmp_path_factory.mktemp("alone")
        run_all(workspace(folder, goal))
        found[type(goal).__name__] = folder / "run"
    return found


def alone_of(alone: dict[str, Path], goal: Goal) -> Path:
    return alone[type(goal).__name__]


@each_goal
@pytest.mark.parametrize(
    ("size", "seed", "on_cards"), [(1, 0, False), (3, 1, False), (7, 2, False), (4, 3, True)]
)
def test_many_workers_decide_what_one_does(
    tmp_path: Path, alone: dict[str, Path], goal: Goal, size: int, seed: int, on_cards: bool
) -> None:
    hired = Hired(size=size, seed=seed, on_cards=on_cards)
    run = with_workers(tmp_path, goal, hired)
    run_all(run)
    same_decisions(alone_of(alone, goal), tmp_path / "run")
    assert run.engine.opened == 0, "the process that decides runs no model"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("size", "on_cards"), [(3, False), (4, True)])
def test_steps_of_many_workers_are_those_of_one_and_nothing_is_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, on_cards: bool
) -> None:
    """All whole plans pass for other than the sum of their parts here."""
    monkeypatch.setattr(budget, "is_off", lambda *_: True)
    goal = Budget(sizes=(Preset(name="Q3_K_M"),))
    run_all(workspace(tmp_path / "one", goal))
    many = with_workers(tmp_path / "many", goal, Hired(size=size, on_cards=on_cards))
    run_all(many)
    same_decisions(tmp_path / "one" / "run", tmp_path / "many" / "run")
    steps = json.loads((tmp_path / "many" / "run" / "plan.json").read_text())["steps"]
    assert len(steps) > 1 and all(step["measured_kld"] is not None for step in steps)
    rows = ledger_rows(tmp_path / "one" / "run")
    run_all(workspace(tmp_path / "one", goal))
    assert ledger_rows(tmp_path / "one" / "run") == rows


@each_goal
@pytest.mark.parametrize("seed", range(3))
def test_workers_that_die_change_nothing(
    tmp_path: Path, alone: dict[str, Path], goal: Goal, seed: int
) -> None:
    """Ten workers die, each under another task; no variant kills three."""
    kills = frozenset(int(n) for n in np.random.default_rng(seed).choice(120, 10, replace=False))
    hired = Hired(size=3, seed=seed, kills=kills, on_cards=seed == 2)
    run = with_workers(tmp_path, goal, hired)
    run_all(run)
    same_decisions(alone_of(alone, goal), tmp_path / "run")
    assert hired.pool is not None and hired.pool.started == 3 + len([n for n in kills if n < hired.pool.run])
    assert any("died on" in note for note in run.reporter.notes)  # type: ignore[attr-defined]


def kills_ssm(task: Task) -> bool:
    return isinstance(task, ScoreTask) and task.variant.label == "ssm_in:Q2_K"


def test_a_variant_that_three_workers_die_on_is_an_error_with_its_name(
    tmp_path: Path, alone: dict[str, Path]
) -> None:
    goal = GOALS[0]
    with pytest.raises(CerebellumError, match=r"^ssm_in:Q2_K: 3 workers died on it"):
        run_all(with_workers(tmp_path, goal, Hired(kills_on=kills_ssm)))
    assert ledger_rows(tmp_path / "run")
    run_all(with_workers(tmp_path, goal, Hired()))
    same_decisions(alone_of(alone, goal), tmp_path / "run")


class Stopped(Exception):
    """The process that decides was killed."""


@each_goal
def test_a_driver_that_dies_goes_on_and_measures_nothing_twice(
    tmp_path: Path, alone: dict[str, Path], goal: Goal
) -> None:
    rows: dict[tuple[object, ...], bytes] = {}
    for n_tasks in (3, 8, 13, 18, 10):
        hired = Hired(kills_on=Countdown(n_tasks))
        with pytest.raises(Stopped):
            run_all(with_workers(tmp_path, goal, hired))
        now = ledger_rows(tmp_path / "run")
        assert {key: now[key] for key in rows} == rows
        rows = now
    run_all(
        with_workers(tmp_path, goal, Hired())
    )  # a chunk that is there cannot be written again: the key is unique
    same_decisions(alone_of(alone, goal), tmp_path / "run")
    run_all(with_workers(tmp_path, goal, None))
    same_decisions(alone_of(alone, goal), tmp_path / "run")


@dataclass
class Countdown:
    """Stops everything when so many tasks have been run."""

    left: int

    def __call__(self, _task: Task) -> bool:
        self.left -= 1
        if self.left < 0:
            raise Stopped
        return False


def test_what_was_scored_ahead_is_in_the_ledger_and_no_look_sees_it(
    tmp_path: Path, alone: dict[str, Path]
) -> None:
    """With more workers than groups some chunks are scored that no verdict wanted."""
    goal = GOALS[0]
    run_all(with_workers(tmp_path, goal, Hired(size=9, seed=4)))
    same_decisions(alone_of(alone, goal), tmp_path / "run")
    assert len(ledger_rows(tmp_path / "run")) > len(ledger_rows(alone_of(alone, goal)))


def test_a_worker_with_other_numbers_is_not_used(tmp_path: Path, alone: dict[str, Path]) -> None:
    goal = GOALS[0]
    run = with_workers(tmp_path, goal, Hired(size=2, make_engine=Alternating()))
    run_all(run)
    same_decisions(alone_of(alone, goal), tmp_path / "run")
    notes = [note for note in run.reporter.notes if "is not used" in note]  # type: ignore[attr-defined]
    assert len(notes) == 1 and "the first chunks of the base" in notes[0]


@dataclass
class Alternating:
    """The first engine is as it should be, all others are off by a millionth of a nat."""

    made: int = 0

    def __call__(self, note: Callable[[str], None]) -> FakeEngine:
        self.made += 1
        return make_engine(note) if self.made == 1 else FakeEngine(damage=lambda t: damage(t) + 1e-6)


def test_shards_that_were_removed_are_made_again_by_workers(tmp_path: Path) -> None:
    """A finished run keeps no shard that only measuring needed; more chunks of it need them again."""
    run_all(with_workers(tmp_path / "many", Limit(chunks=2), None))
    run_all(with_workers(tmp_path / "many", Limit(chunks=6), Hired()))
    run_all(with_workers(tmp_path / "one", Limit(chunks=6), None))
    same_decisions(tmp_path / "one" / "run", tmp_path / "many" / "run")


def test_an_engine_of_another_name_is_refused_with_both_names(tmp_path: Path) -> None:
    hired = Hired(make_engine=lambda note: make_engine(note, identity="another card"))
    with pytest.raises(CerebellumError, match=r"no worker can be used: .*another card, this run's is fake"):
        run_all(with_workers(tmp_path, GOALS[0], hired))


def test_resumed_on_other_numbers_all_are_refused(tmp_path: Path) -> None:
    """What the ledger has of the base is the column that workers are held to."""
    run_all(with_workers(tmp_path, Limit(chunks=2), None))
    hired = Hired(make_engine=lambda _: FakeEngine(damage=lambda t: damage(t) + 1e-6))
    with pytest.raises(CerebellumError, match="no worker can be used: on the first chunks of the base"):
        run_all(with_workers(tmp_path, Limit(chunks=4), hired))


def test_bad_input_in_a_worker_is_the_runs_own_line(tmp_path: Path) -> None:
    hired = Hired(make_engine=lambda note: Refusing(damage=damage))
    with pytest.raises(BadInput, match="cannot be"):
        run_all(with_workers(tmp_path, GOALS[0], hired))


class Refusing(FakeEngine):
    def quantize(self, job: QuantizeJob, threads: int) -> Iterator[Bytes]:
        raise BadInput(f"{job.name}: cannot be {job.to_type.name}")


# --- several chunks a decode: a chunk's last bits depend on those beside it


@pytest.fixture(scope="module", params=[4, 8])
def mingling(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, Path]]:
    """How many chunks share a decode, and the runs of both goals by one worker in this process.

    The text has 42 chunks, so the last decode has two.
    """
    found = {}
    for goal in MINGLED:
        folder = tmp_path_factory.mktemp("alone")
        run_all(with_workers(folder, goal, None, request.param))
        found[type(goal).__name__] = folder / "run"
    return request.param, found


MINGLED = [Limit(max_increase_pct=1.0), Budget(sizes=(Preset(name="Q3_K_M"),), passes=6.0)]
each_mingled = pytest.mark.parametrize("goal", MINGLED, ids=["limit", "budget"])


def mingled_hired(at_once: int, **how: object) -> Hired:
    return Hired(make_engine=partial(make_engine, at_once=at_once), **how)  # type: ignore[arg-type]


@each_mingled
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_who_decodes_what_and_with_whom_changes_no_bit(
    tmp_path: Path, mingling: tuple[int, dict[str, Path]], goal: Goal, size: int
) -> None:
    at_once, alone = mingling
    hired = mingled_hired(at_once, size=size, seed=size, on_cards=size % 2 == 0)
    run_all(with_workers(tmp_path, goal, hired, at_once))
    same_decisions(alone_of(alone, goal), tmp_path / "run")


@each_mingled
def test_killed_workers_and_drivers_change_no_bit_of_a_decode(
    tmp_path: Path, mingling: tuple[int, dict[str, Path]], goal: Goal
) -> None:
    """Drivers die in the middle of everything, workers under some tasks; then one process ends the run."""
    at_once, alone = mingling
    for n_tasks in (4, 9, 23):
        with pytest.raises(Stopped):
            hired = mingled_hired(at_once, kills_on=Countdown(n_tasks), on_cards=n_tasks == 9)
            run_all(with_workers(tmp_path, goal, hired, at_once))
    kills = frozenset((3, 11, 17))
    run_all(with_workers(tmp_path, goal, mingled_hired(at_once, size=2, kills=kills), at_once))
    same_decisions(alone_of(alone, goal), tmp_path / "run")
    run_all(with_workers(tmp_path, goal, None, at_once))
    same_decisions(alone_of(alone, goal), tmp_path / "run")


@each_mingled
def test_a_decode_cut_by_a_kill_is_the_same_when_one_process_goes_on(
    tmp_path: Path, mingling: tuple[int, dict[str, Path]], goal: Goal
) -> None:
    """The ledger has some chunks of a decode and lacks others: the whole decode is made again, and the rest kept."""
    at_once, alone = mingling
    whole = alone_of(alone, goal)
    shutil.copytree(whole.parent, tmp_path, dirs_exist_ok=True)
    with sqlite3.connect(tmp_path / "run" / "ledger.sqlite") as ledger:
        ledger.execute("DELETE FROM divergence WHERE chunk % 3 = 1")
        ledger.execute("DELETE FROM chunk WHERE chunk % 3 = 1")
    assert len(ledger_rows(tmp_path / "run")) < len(ledger_rows(whole))
    opened = with_workers(tmp_path, goal, None, at_once)
    run_all(opened)
    same_decisions(whole, tmp_path / "run")
    assert ledger_rows(tmp_path / "run") == ledger_rows(whole)


def test_every_chunk_is_in_one_decode_whatever_order_asks() -> None:
    bundles = Bundles.of(chunk_order(42, 1), 4)
    assert sorted(chunk for bundle in bundles.every for chunk in bundle) == list(range(42))
    assert [len(bundle) for bundle in bundles.every] == [4] * 10 + [2]
    other = fresh_order(42, 1, 4)
    assert set(Bundles.of(other, 4).every) == set(bundles.every) and other != chunk_order(42, 1)
    first, *_, last = bundles.every
    assert bundles.holding([last[1], first[3], first[0]]) == [last, first]


def _short(found: Found) -> tuple[Found, ...]:
    return (replace(found, nll=found.nll[:-1]),)


def _short_divergence(found: Found) -> tuple[Found, ...]:
    return (found if found.kld is None else replace(found, kld=found.kld[:-1]),)


def _negative(found: Found) -> tuple[Found, ...]:
    return (replace(found, nll=found.nll - 100.0),)


def _of_another_chunk(found: Found) -> tuple[Found, ...]:
    return (replace(found, chunk=found.chunk + 1),)


def _twice(found: Found) -> tuple[Found, ...]:
    return (found, found)


def _none(found: Found) -> tuple[Found, ...]:
    return ()


SPOILT = {
    _short: "values",
    _short_divergence: "values",
    _negative: "below zero",
    _of_another_chunk: "was asked for",
    _twice: "was asked for",
    _none: "was asked for",
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_no_model_can_have_given_is_an_error_and_never_recorded(
    spoil: Callable[[Found], tuple[Found, ...]],
    tmp_path: Path,
    alone: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = ScoreTask.run
    tasks = 0

    def run(task: ScoreTask, room: Room) -> Scored:
        nonlocal tasks
        tasks += 1
        scored = whole(task, room)
        if tasks < 20:
            return scored
        return replace(scored, found=(*spoil(scored.found[0]), *scored.found[1:]))

    monkeypatch.setattr(ScoreTask, "run", run)
    goal = GOALS[1] if spoil is _short_divergence else GOALS[0]
    with pytest.raises(CerebellumError, match=SPOILT[spoil]):
        run_all(with_workers(tmp_path, goal, Hired()))
    good = ledger_rows(alone[type(goal).__name__])
    rows = ledger_rows(tmp_path / "run")
    assert rows
    assert all(row == good[key] for key, row in rows.items() if key in good)


def test_what_is_not_finite_has_collapsed_whoever_measured_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a result, which no number is made of: the group is not demoted."""
    whole = ScoreTask.run

    def run(task: ScoreTask, room: Room) -> Scored:
        scored = whole(task, room)
        if "ffn_gate_shexp:Q2_K" not in task.variant.label:
            return scored
        return replace(scored, found=tuple(replace(one, nll=one.nll * np.nan) for one in scored.found))

    monkeypatch.setattr(ScoreTask, "run", run)
    opened = with_workers(tmp_path, Limit(max_increase_pct=900.0), Hired())
    run_all(opened)
    row = next(row for row in opened.artifacts.plan().groups if row.name == "ffn_gate_shexp")
    assert (row.delta_pct, row.chosen_type) == (None, "base")
