"""The artifacts of a run folder, read once and joined: what the card and the report are made from.

There are three kinds of evidence, for a run has one of three goals, and their measurements have nothing in
common: groups alone against the base under a limit, curves of damage against bytes for a budget, and nothing but the
whole where types were given. What every run has is in ``FinishedRun``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cerebellum.bench.artifacts import BenchResults, PairRow, ScoreRow
from cerebellum.card.merged import MergedRow, merged_rows, points_together
from cerebellum.card.numbers import DIVERGENCE, PERPLEXITY, ByteUnit, Change, Scale
from cerebellum.errors import BadInput
from cerebellum.folder import GROUPS, MANIFEST, PLAN, RunFolder
from cerebellum.groups import HEAD_ROLE, MTP_PREFIX, GroupRecord, SourceFile
from cerebellum.manifest import Manifest, ResultNamed
from cerebellum.measure.artifacts import Curves, MeasurementRow, Measurements
from cerebellum.plan.artifacts import BudgetPlan, GivenPlan, GpuMemory, LimitPlan, Plan, PlanRow, PointRow
from cerebellum.settings import Published
from cerebellum.verify import Report, Verified


@dataclass(frozen=True, kw_only=True)
class SeenAt:
    """Holds what was known of a group's damage after so many chunks, on the way to its verdict.

    The change is of perplexity, in percent, with the interval that the sequential test had then.
    """

    chunks: int
    change: Change


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One group as people see it: what it was, what was seen, what was decided.

    ``change`` (of perplexity, percent) and ``kld`` (nats a token) are None where nothing was measured.
    ``chosen_type`` is None where the group stays at its base types; ``tried_type`` is then the type that its
    figures are of. ``bytes_saved`` is negative where the decision adds bytes.
    """

    name: str
    role: str
    layers: tuple[int, ...]
    tensors: int
    base_type: str
    chosen_type: str | None
    tried_type: str
    bytes_saved: int
    change: Change | None
    kld: Change | None
    chunks: int | None
    verdict: str
    near_tie: bool
    together_with: tuple[str, ...]
    trace: tuple[SeenAt, ...] = ()

    @property
    def changed(self) -> bool:
        """Says whether the group leaves its base types; one that was tried and kept counts as unchanged."""
        return self.chosen_type is not None


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Holds what was measured of several groups changed together.

    ``agreement`` is the share of tokens whose most likely token is the base's; ``kld`` is from the
    base, nats a token.
    """

    groups: tuple[str, ...]
    change: Change
    verdict: str
    kld: Change | None
    agreement: float | None


@dataclass(frozen=True, kw_only=True)
class MeasuredPlan:
    """A combination that was proposed for a budget and measured whole.

    ``kld`` is its KL divergence from the source against the base's own, nats a token.
    """

    n_bytes: int
    kld: float
    shipped: bool


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One way of scoring one benchmark, in percent of its questions.

    ``difference`` to the base, in points, and McNemar's ``p`` are there where both were asked the same
    questions. ``detectable`` is the smallest difference that they would have shown 8 times of 10.
    """

    task: str
    protocol: str
    metric: str
    n: int
    accuracy: Change
    base: float | None
    difference: Change | None
    p: float | None
    detectable: float | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Holds what the audit of a benchmark found: which model, in which task, and a sentence with its
    numbers. The card prints it among its limits, because a score with a problem says less than it seems
    to.
    """

    model: str
    where: str
    text: str


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """Holds what every finished run left, whatever its goal was; ``result`` is the finished file of this size, and
    ``published`` what people said of the model.

    Both stories tell sizes, checks, benchmarks and provenance from it in the same words.
    """

    source: SourceFile
    verified: Verified
    manifest: Manifest
    result: ResultNamed
    published: Published
    groups: tuple[GroupRecord, ...]
    benchmarks: tuple[Benchmark, ...]
    problems: tuple[Problem, ...]

    @property
    def name(self) -> str:
        """Returns the name of the model that people gave, or that of its metadata."""
        return self.published.name or self.source.name

    @property
    def report(self) -> Report:
        """Returns what verify measured on the report text: the perplexities of source, base and
        finished file, and the paired change.
        """
        return self.verified.report

    @property
    def reported(self) -> Change | None:
        """Returns the change of the finished file against the base on the report text, in percent;
        None where it is not finite, which means that the file is broken.
        """
        return Change.of(self.report.delta_pct, self.report.ci_pct)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Joins a finished run with its plan and its measurements: the part that both kinds of evidence share.

    Nothing here asks what the goal was; a subclass knows the types of its plan and of its measurements.
    """

    run: FinishedRun
    plan: Plan
    measured: Measurements | Curves | GivenPlan
    rows: tuple[GroupRow, ...]

    @property
    def changed(self) -> tuple[GroupRow, ...]:
        """Returns the groups that leave their base types, in the order of the plan, so that tables
        and sentences name them alike.
        """
        return tuple(row for row in self.rows if row.changed)

    @property
    def alone(self) -> tuple[GroupRow, ...]:
        """Returns the groups that have a change of perplexity of their own.

        One that was measured together with others is left out, for its figure is of all of them.
        """
        return tuple(row for row in self.rows if row.change is not None and not row.together_with)

    @property
    def has_head(self) -> bool:
        """Says whether the model has an output head of its own, apart from its embeddings."""
        return f"{HEAD_ROLE}.weight" in self.plan.tensor_types

    @property
    def mtp_types(self) -> str:
        """Returns the types of the layers for multi-token prediction in the file: `Q3_K x 8, F32 x 4`; "" without."""
        kept = [
            name
            for group in self.run.groups
            if group.name.startswith(MTP_PREFIX)
            for name in group.tensor_names
        ]
        counts = Counter(self.plan.tensor_types[name] for name in kept)
        return ", ".join(f"{qtype} x {count}" for qtype, count in counts.most_common())

    @property
    def whole(self) -> Change | None:
        """Returns the change of perplexity of what was shipped, measured whole on the selection
        text, in percent; None where nobody measured it.
        """
        return Change.of(self.plan.measured_delta_pct, self.plan.ci_pct)

    @property
    def unit(self) -> ByteUnit:
        """Returns the unit that bytes are told in.

        It follows from the size of the base and not of a group, so that rates can be compared.
        """
        return ByteUnit.for_model(self.plan.base_tensor_bytes)

    @property
    def planned_memory(self) -> GpuMemory | None:
        """Returns the memory on the gpu that the plan was made for; None where it was made for no gpu."""
        return None

    @property
    def from_source(self) -> Change | None:
        """Returns the KL divergence of what was shipped from the source, nats a token; None where it is not known."""
        return None


@dataclass(frozen=True, kw_only=True)
class LimitEvidence(Evidence):
    """Holds a run under a limit: each group alone against the base, then combinations of the tolerant ones.

    Damage has a price here, for every group was tried at the same cheaper type.
    """

    plan: LimitPlan
    measured: Measurements
    combinations: tuple[Combination, ...]

    @property
    def limit(self) -> float:
        """Returns the most that a group alone may add to perplexity, in percent; verdicts are
        against it.
        """
        return self.plan.threshold_pct

    @property
    def shipped(self) -> Combination | None:
        """Returns the measurement of exactly the groups that were shipped, if they were measured
        together; a single group was measured alone and has none.
        """
        wanted = {row.name for row in self.changed}
        return next((c for c in self.combinations if set(c.groups) == wanted), None)

    @property
    def scale(self) -> Scale:
        """Returns what damage is told in: KL divergence where every group has it, for it is far
        less noisy near the base; else the change of perplexity.
        """
        measured = [row for row in self.rows if row.change is not None]
        return DIVERGENCE if measured and all(row.kld for row in measured) else PERPLEXITY

    def damage(self, row: GroupRow) -> Change | None:
        """Returns a group's damage on the scale of this run, with its interval; None where it was
        not measured or has collapsed.
        """
        return row.kld if self.scale is DIVERGENCE else row.change

    def rate(self, row: GroupRow) -> Change | None:
        """Returns a group's damage for each unit of bytes saved; None where it saves nothing by itself."""
        damage = self.damage(row)
        if damage is None or row.bytes_saved <= 0 or row.together_with:
            return None
        return damage / self.unit.of(row.bytes_saved)

    @property
    def rated(self) -> list[tuple[GroupRow, Change]]:
        """Returns the groups that have a rate, with it, the cheapest byte first.

        Rates span decades, so the order says more than any mean.
        """
        found = [(row, per) for row in self.rows if (per := self.rate(row)) is not None]
        return sorted(found, key=lambda pair: pair[1].mean)


@dataclass(frozen=True, kw_only=True)
class BudgetEvidence(Evidence):
    """Holds a run for a budget: its rows are neighbouring layers merged, its damages KL divergences
    from the source. They come from the plan's points, with what whole plans taught.
    """

    plan: BudgetPlan
    measured: Curves

    @property
    def divergence(self) -> Change | None:
        """Returns the KL divergence from the source of what was shipped against the base's own,
        nats a token; below zero it is nearer to the source than the base is.
        """
        return Change.of(self.plan.measured_kld, self.plan.kld_ci)

    @property
    def from_source(self) -> Change | None:
        """Returns the KL divergence of what was shipped from the source itself, nats a token."""
        found = self.divergence
        if found is None:
            return None
        base = self.measured.base_kld
        return Change(mean=base + found.mean, low=base + found.low, high=base + found.high)

    @property
    def measured_plans(self) -> tuple[MeasuredPlan, ...]:
        """Returns the combinations that were measured whole, with the one that was shipped marked.

        It is known again by its bytes and its divergence, because plan.json lists all candidates
        alike.
        """
        return tuple(
            MeasuredPlan(
                n_bytes=row.file_bytes,
                kld=row.measured_kld,
                shipped=row.file_bytes == self.plan.file_bytes and row.measured_kld == self.plan.measured_kld,
            )
            for row in self.plan.candidates
            if row.measured_kld is not None
        )

    @property
    def planned_memory(self) -> GpuMemory | None:
        """Returns the memory on the gpu that the plan was made for; None where it was made for no gpu."""
        return self.plan.memory


@dataclass(frozen=True, kw_only=True)
class GivenEvidence(Evidence):
    """Holds a run with the types of somebody's recipe; the whole was measured, and no group alone."""

    plan: GivenPlan
    measured: GivenPlan

    @property
    def divergence(self) -> Change | None:
        """Returns the KL divergence from the base of what was shipped, nats a token."""
        return Change.of(self.plan.kld_mean, self.plan.kld_ci)


def read_given_evidence(folder: RunFolder, plan: GivenPlan) -> GivenEvidence:
    """Reads what a run with given types left; BadInput names the artifact that is missing or is not ours."""
    rows = tuple(_row(row, tried="none") for row in plan.groups)
    return GivenEvidence(run=_read_run(folder, plan), plan=plan, measured=plan, rows=rows)


def read_limit_evidence(folder: RunFolder, plan: LimitPlan) -> LimitEvidence:
    """Reads what a run under a limit left; BadInput names the artifact that is missing or is not ours."""
    measured = folder.measurements()
    alone = {row.groups[0]: row for row in measured.measurements if len(row.groups) == 1}
    return LimitEvidence(
        run=_read_run(folder, plan),
        plan=plan,
        measured=measured,
        rows=tuple(_limit_row(row, alone.get(row.name), plan.demote) for row in plan.groups),
        combinations=tuple(_combinations(measured)),
    )


def read_budget_evidence(folder: RunFolder, plan: BudgetPlan) -> BudgetEvidence:
    """Reads what a run for a budget left of one size; BadInput names the artifact that is missing or not ours."""
    return BudgetEvidence(
        run=_read_run(folder, plan),
        plan=plan,
        measured=folder.curves(),
        rows=tuple(_budget_row(found, points_together(plan, found.members)) for found in merged_rows(plan)),
    )


def _read_run(folder: RunFolder, plan: Plan) -> FinishedRun:
    """Reads what every run left; refuses groups and a plan that are not of one run."""
    known = {group.name for group in folder.groups().groups}
    strange = next((row.name for row in plan.groups if row.name not in known), None)
    if strange is not None:
        raise BadInput(f"{folder / GROUPS}: has no group {strange!r} of {PLAN}; run `cerebellum plan` again")
    bench = folder.bench()
    manifest = folder.manifest()
    return FinishedRun(
        source=folder.source(),
        verified=folder.verified(),
        manifest=manifest,
        result=_result(folder, manifest),
        published=folder.published(),
        groups=folder.groups().groups,
        benchmarks=tuple(_benchmarks(bench)) if bench else (),
        problems=tuple(_problems(bench)) if bench else (),
    )


def _result(folder: RunFolder, manifest: Manifest) -> ResultNamed:
    """Returns the finished file of the size that the folder is looked at for."""
    if folder.label is None:
        return manifest.result
    found = next((size.result for size in manifest.further if size.label == folder.label), None)
    if found is None:
        raise BadInput(f"{folder / MANIFEST}: has no file {folder.label!r}; run `cerebellum verify` again")
    return found


def _row(row: PlanRow, tried: str) -> GroupRow:
    return GroupRow(
        name=row.name,
        role=row.role,
        layers=row.layers,
        tensors=row.tensors,
        base_type=row.base_type,
        chosen_type=row.chosen_type if row.changed else None,
        tried_type=row.chosen_type if row.changed else tried,
        bytes_saved=row.bytes_saved,
        change=Change.of(row.delta_pct, row.ci_pct),
        kld=None,
        chunks=row.chunks,
        verdict=row.verdict,
        near_tie=row.near_tie,
        together_with=row.measured_with,
    )


def _limit_row(row: PlanRow, alone: MeasurementRow | None, demote: str) -> GroupRow:
    """Joins a row of the plan with the measurement of that group alone, where there is one."""
    found = _row(row, tried=demote)
    if alone is None:
        return found
    return replace(found, kld=Change.of(alone.kld_mean, alone.kld_ci), trace=tuple(_looks(alone)))


def _looks(measured: MeasurementRow) -> Iterator[SeenAt]:
    """Yields the looks after which there was an interval at all; after one chunk there is only a mean,
    which a chart of intervals cannot show.
    """
    for look in measured.trace:
        change = Change.of(look.delta_pct, look.ci_pct)
        if change is not None and look.ci_pct is not None and look.chunks is not None:
            yield SeenAt(chunks=look.chunks, change=change)


def _budget_row(found: MergedRow, points: list[PointRow]) -> GroupRow:
    """Joins a merged row with its curve: the damage of its type or, where it was kept, of one step down."""
    row = _row(found.row, tried="none")
    base = next((point for point in points if point.type is None), None)
    if base is None:
        return row
    if row.changed:
        chosen = next((point for point in points if point.type == row.chosen_type), None)
        return replace(row, kld=Change.in_nats(chosen.kld) if chosen else None)
    step = max((p for p in points if p.bytes < base.bytes), key=lambda point: point.bytes, default=None)
    if step is None or step.type is None:
        return replace(row, verdict="nothing smaller")
    return replace(
        row,
        tried_type=step.type,
        bytes_saved=base.bytes - step.bytes,
        change=Change.in_percent(step.nll),
        kld=Change.in_nats(step.kld),
    )


def _combinations(measured: Measurements) -> Iterator[Combination]:
    for row in measured.measurements:
        change = Change.of(row.delta_pct, row.ci_pct)
        if len(row.groups) > 1 and change is not None:
            yield Combination(
                groups=row.groups,
                change=change,
                verdict=row.verdict,
                kld=Change.of(row.kld_mean, row.kld_ci),
                agreement=row.top1_agreement,
            )


def _benchmarks(bench: BenchResults) -> Iterator[Benchmark]:
    """Joins the scores of the finished file, the first model, with those of its base, the second."""
    names = [model.name for model in bench.models]
    against = names[1] if len(names) > 1 else None
    scores = {_way(row): row for row in bench.scores if row.model == against}
    pairs = {_way(row): row for row in bench.paired if row.against == against}
    for row in bench.scores:
        if row.model == names[0]:
            yield _benchmark(row, scores.get(_way(row)), pairs.get(_way(row)))


def _benchmark(row: ScoreRow, base: ScoreRow | None, pair: PairRow | None) -> Benchmark:
    return Benchmark(
        task=row.task,
        protocol=row.protocol,
        metric=row.metric if row.labels == "original" else f"{row.metric}, {row.labels}",
        n=row.n,
        accuracy=Change(mean=row.accuracy_pct, low=row.ci_pct[0], high=row.ci_pct[1]),
        base=base.accuracy_pct if base else None,
        difference=Change.of(pair.difference_pct, pair.ci_pct) if pair else None,
        p=pair.p_value if pair else None,
        detectable=pair.detectable_pct if pair else None,
    )


def _way(row: ScoreRow | PairRow) -> tuple[str, str, str, str]:
    """Returns what was asked and how it was scored: only scores of one way may be compared."""
    return (row.task, row.protocol, row.metric, row.labels)


def _problems(bench: BenchResults) -> Iterator[Problem]:
    for check in bench.audit.checks:
        for text in check.problems:
            yield Problem(model=check.model, where=f"{check.task} ({check.protocol})", text=text)
