"""Questions asked by workers: whoever asks them and whoever dies, the answers are one process's, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_fake_run import damage
from test_workers import Countdown, Hired, Stopped, with_workers
from tiny import Recorder

from cerebellum.bench import answers as answers_module
from cerebellum.bench.answers import parts
from cerebellum.bench.artifacts import BenchResults
from cerebellum.bench.scores import Examinee
from cerebellum.bench.stage import BenchRequest, bench, make_exams
from cerebellum.bench.tasks import SAMPLES
from cerebellum.bench.workers import Askers, ExamTask, MakeAskRoom, PartAnswers
from cerebellum.codec import as_json
from cerebellum.engine.asking import Asker
from cerebellum.engine.fake import FakeEngine, FakeModel
from cerebellum.engine.fake_asker import FakeAsker, arbitrary
from cerebellum.engine.fake_pool import FakePool
from cerebellum.engine.workers import Room, Task
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.measure.worker import WorkRoom
from cerebellum.run import run_all
from cerebellum.settings import Domain, Limit
from cerebellum.workspace import Workspace

REQUEST = BenchRequest(data=SAMPLES, tasks=("hellaswag", "arc_challenge"), rotations=2, generate=3)
PER_MODEL = 4 * 4  # exams, and the parts of each


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty questions make four parts, as thousands do."""
    monkeypatch.setattr(answers_module, "PART", 11)


@dataclass
class Known(FakeEngine):
    """Each file is a model of its own, and answers are off by their company; ``asked`` counts models opened."""

    mingling: float = 1e-3
    asked: Counter[str] = field(default_factory=Counter)
    off: float = 0.0

    def asker(self, paths: Sequence[Path]) -> AbstractContextManager[Asker]:
        return self._opened(paths[0].name)

    @contextmanager
    def _opened(self, name: str) -> Iterator[FakeAsker]:
        self.asked[name] += 1

        def worth(prompt: str, ending: str) -> float:
            return arbitrary(name + prompt, ending) - self.off

        yield FakeAsker(worth=worth, identity=self.identity, mingling=self.mingling)


@dataclass(kw_only=True)
class Asked:
    """A bench in a folder by ``size`` workers, or by this process where that is 0."""

    folder: Path
    size: int = 3
    seed: int = 0
    kills: frozenset[int] = frozenset()
    kills_on: Callable[[Task], bool] = lambda _: False
    make_engine: Callable[..., FakeEngine] = lambda _: Known()
    engines: list[FakeEngine] = field(default_factory=list)
    reporter: Recorder = field(default_factory=Recorder)

    def examinees(self) -> list[Examinee]:
        files = [self.folder / "good.gguf", self.folder / "base.gguf"]
        for file in files:
            file.write_bytes(file.name.encode())
        return [Examinee(name=f.stem, paths=(f,), sha256=f.stem[0] * 64) for f in files]

    def __call__(self, request: BenchRequest = REQUEST) -> BenchResults:
        examinees = self.examinees()
        place = (self.folder / "answers", self.reporter)
        if not self.size:
            return bench(examinees, request, Known().asker, *place)
        crew = Askers(hire=self.hire, identity="fake").crew(examinees, make_exams(request), self.reporter)
        return bench(examinees, request, _no_opener, *place, crew)

    def hire(self) -> FakePool:
        def made(note: Callable[[str], None]) -> FakeEngine:
            self.engines.append(self.make_engine(note))
            return self.engines[-1]

        how: dict[str, Any] = {"size": self.size, "seed": self.seed, "kills": self.kills}
        return FakePool(make_room=MakeAskRoom(make_engine=made), kills_on=self.kills_on, **how)


def _no_opener(_paths: Sequence[Path]) -> AbstractContextManager[Asker]:
    raise AssertionError("the process that decides asks nothing")


def told(found: BenchResults) -> object:
    """All of bench.json but for the seconds and counts of this session."""
    shown = as_json(found)
    assert isinstance(shown, dict)
    return shown | {"session": ()}


def evidence(folder: Path) -> dict[str, list[str]]:
    """The lines of each file, in one order: parts are written as they come."""
    files = sorted((folder / "answers").glob("*.jsonl"))
    return {file.name: sorted(file.read_text().splitlines()) for file in files}


@pytest.fixture
def alone(tmp_path: Path, small_parts: None) -> Asked:
    """What one process gives."""
    folder = tmp_path / "alone"
    folder.mkdir()
    return Asked(folder=folder, size=0)


def other(tmp_path: Path, **how: Any) -> Asked:
    folder = tmp_path / "workers"
    folder.mkdir(exist_ok=True)
    return Asked(folder=folder, **how)


@pytest.mark.parametrize(("size", "seed"), [(1, 0), (2, 1), (3, 2), (7, 3)])
def test_workers_give_the_answers_of_one_process(tmp_path: Path, alone: Asked, size: int, seed: int) -> None:
    many = other(tmp_path, size=size, seed=seed)
    found = many()
    assert told(found) == told(alone()) and evidence(many.folder) == evidence(alone.folder)
    assert sum(row.asked for row in found.session) == 2 * 4 * 40
    ((_, steps),) = many.reporter.tasks
    assert many.reporter.ticks == steps == 2 * PER_MODEL
    again = other(tmp_path, size=size)()
    assert told(again) == told(found) and not any(row.asked for row in again.session)


@pytest.mark.parametrize("seed", range(3))
def test_workers_that_die_are_replaced_and_nothing_is_answered_twice(
    tmp_path: Path, alone: Asked, seed: int
) -> None:
    kills = frozenset(range(2 + seed, 40, 5))
    many = other(tmp_path, seed=seed, kills=kills)
    assert told(many()) == told(alone()) and evidence(many.folder) == evidence(alone.folder)
    assert len(many.engines) > 3 and any("died on" in note for note in many.reporter.notes)


def _kills_one(task: Task) -> bool:
    return isinstance(task, ExamTask) and task.paths[0].stem == "base" and len(task.part.questions) == 7


def test_three_deaths_on_the_same_questions_name_them_and_keep_the_rest(tmp_path: Path, alone: Asked) -> None:
    with pytest.raises(CerebellumError, match=r"^base: hellaswag.letter, questions 34 to 40: 3 workers died"):
        other(tmp_path, kills_on=_kills_one)()
    kept = evidence(tmp_path / "workers")
    many = other(tmp_path)
    found = many()
    assert told(found) == told(alone()) and evidence(many.folder) == evidence(alone.folder)
    assert sum(row.reused for row in found.session) == sum(map(len, kept.values())) > 0


def test_a_driver_that_dies_goes_on_with_workers_or_without(tmp_path: Path, alone: Asked) -> None:
    kept: set[str] = set()
    for n_tasks in (5, 16, 27):
        with pytest.raises(Stopped):
            other(tmp_path, kills_on=Countdown(n_tasks))()
        now = {line for lines in evidence(tmp_path / "workers").values() for line in lines}
        assert kept < now
        kept = now
    assert told(other(tmp_path, size=0)()) == told(alone())
    assert evidence(tmp_path / "workers") == evidence(alone.folder)


def test_a_worker_goes_on_with_the_model_that_it_has_open(tmp_path: Path) -> None:
    many = other(tmp_path, size=2, seed=5)
    many()
    opened = [sum(engine.asked.values()) for engine in many.engines]  # type: ignore[attr-defined]
    assert len(opened) == 2 and max(opened) <= 3, "the first to compare by, its own, and the other's to help"


def test_the_same_file_twice_is_asked_once(tmp_path: Path) -> None:
    many = other(tmp_path)
    first, _ = many.examinees()
    pair = [first, replace(first, name="again")]
    exams = make_exams(REQUEST)
    crew = Askers(hire=many.hire, identity="fake").crew(pair, exams, many.reporter)
    found = bench(pair, REQUEST, _no_opener, many.folder / "answers", many.reporter, crew)
    assert [row.asked for row in found.session] == [40] * 4 + [0] * 4
    assert sum(map(len, evidence(many.folder).values())) == 4 * 40


def test_a_worker_with_other_answers_is_not_used(tmp_path: Path, alone: Asked) -> None:
    made = iter([0.0, 1e-4, 0.0])
    many = other(tmp_path, make_engine=lambda _: Known(off=next(made)))
    assert told(many()) == told(alone()) and evidence(many.folder) == evidence(alone.folder)
    (note,) = [note for note in many.reporter.notes if "is not used" in note]
    assert "worker 2" in note and "on the first questions" in note


def test_an_engine_of_another_name_is_refused(tmp_path: Path) -> None:
    many = other(tmp_path, make_engine=lambda _: Known(identity="another card"))
    with pytest.raises(CerebellumError, match=r"no worker can be used: .*another card, this run's is fake"):
        many()
    assert not any(evidence(many.folder).values())


def test_a_model_that_is_another_one_where_the_worker_is_is_refused(tmp_path: Path) -> None:
    many = other(tmp_path)
    good, _ = many.examinees()
    task = ExamTask.of(good, make_exams(REQUEST)[0], {})
    good.paths[0].write_bytes(b"another model")
    with pytest.raises(BadInput, match="put models on a disk that all machines share"):
        task.run(MakeAskRoom(make_engine=lambda _: Known())())


def _short(found: PartAnswers) -> PartAnswers:
    return replace(found, answers=found.answers[1:])


def _twice(found: PartAnswers) -> PartAnswers:
    return replace(found, answers=(found.answers[0], *found.answers))


@pytest.mark.parametrize("spoil", [_short, _twice])
def test_other_answers_than_were_asked_for_are_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[PartAnswers], PartAnswers]
) -> None:
    whole = ExamTask.run

    def run(task: ExamTask, room: Room) -> PartAnswers:
        return spoil(whole(task, room))

    monkeypatch.setattr(ExamTask, "run", run)
    with pytest.raises(CerebellumError, match="gave other answers than it was asked for"):
        other(tmp_path)()
    assert not any(evidence(tmp_path / "workers").values())


def test_parts_follow_from_the_exam_alone() -> None:
    for exam in make_exams(REQUEST):
        cut = parts(exam)
        assert [len(part.questions) for part in cut] == [11, 11, 11, 7]
        assert sum((part.questions for part in cut), ()) == exam.questions


def test_what_is_missing_in_a_part_is_asked_in_it(tmp_path: Path, alone: Asked) -> None:
    """An evidence with holes, as a kill of one process leaves: workers and one process fill them alike."""
    found = []
    for asked in (alone, other(tmp_path)):
        Asked(folder=asked.folder, size=0)()
        for file in (asked.folder / "answers").glob("*.jsonl"):
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(sorted(lines)[::3]))
        asked()
        found.append(evidence(asked.folder))
    assert found[0] == found[1]


@dataclass
class Watching:
    """Remembers which tasks were run, and kills nobody."""

    tasks: list[Task] = field(default_factory=list)

    def __call__(self, task: Task) -> bool:
        self.tasks.append(task)
        return False


@pytest.mark.parametrize("on_cards", [False, True])
def test_a_whole_run_has_its_questions_asked_by_the_workers_that_measured(
    tmp_path: Path, on_cards: bool
) -> None:
    """The report is of two domains, so that it has a reference of which workers on cards keep the predictions."""
    request = BenchRequest(data=SAMPLES, tasks=("arc_challenge",))
    run_all(of_two_domains(with_workers(tmp_path / "one", Limit(max_increase_pct=1.0), None)), request)
    hired = Hired(kills_on=(watching := Watching()), on_cards=on_cards)
    run = of_two_domains(with_workers(tmp_path / "many", Limit(max_increase_pct=1.0), hired))
    run.engine.asker = _no_opener  # type: ignore[method-assign]
    run_all(run, request)
    one, many = (run_folder(tmp_path / name) for name in ("one", "many"))
    assert one == many and sum(map(len, one.values())) == 2 * 2 * 40
    kinds = [type(task) for task in watching.tasks]
    assert set(kinds[kinds.index(ExamTask) :]) == {ExamTask}, "nobody measures any more"


def of_two_domains(run: Workspace) -> Workspace:
    texts = run.settings.report_text, run.settings.select_text
    domains = tuple(Domain(name=path.stem, path=path) for path in texts if path)
    run.settings = msgspec.structs.replace(run.settings, report_text=None, report_domains=domains)
    return run


def run_folder(folder: Path) -> dict[str, list[str]]:
    files = sorted((folder / "run" / "bench").glob("*.jsonl"))
    return {file.name: sorted(file.read_text().splitlines()) for file in files}


@dataclass
class Counting(FakeEngine):
    """Counts how many models are open together."""

    now: int = 0
    most: int = 0

    @contextmanager
    def open(self, paths: Sequence[Path], ctx: int) -> Iterator[FakeModel]:
        with self._counted(), super().open(paths, ctx) as model:
            yield model

    @contextmanager
    def asker(self, paths: Sequence[Path]) -> Iterator[Asker]:
        with self._counted(), super().asker(paths) as asker:
            yield asker

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.now += 1
        self.most = max(self.most, self.now)
        yield
        self.now -= 1


def test_a_worker_has_one_model_open(tmp_path: Path) -> None:
    """The model that measures makes room for the one that is asked, and the other way round."""
    engine = Counting(damage=damage)
    hired = Hired(size=1, make_engine=lambda _: engine)
    for chunks in (2, 4):
        run = with_workers(tmp_path, Limit(chunks=chunks), hired)
        run_all(run, BenchRequest(data=SAMPLES, tasks=("arc_challenge",), limit=5))
    assert engine.most == 1
    room = hired.pool._rooms[0]  # type: ignore[union-attr]
    assert isinstance(room, WorkRoom)
    assert room.asker([tmp_path / "a.gguf"]) is room.asker([tmp_path / "a.gguf"]) and engine.now == 1
    assert room.scorer and engine.now == 0
