"""The stages of a run by budget: response curves, then the plan. The rest is as in ``run.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from cerebellum.base import preset_base
from cerebellum.budget import (
    Allocation,
    BudgetPlan,
    Known,
    Learning,
    budget_json,
    budget_plan,
    frontier,
    merged,
)
from cerebellum.curves import (
    BASE,
    FINE_LADDER,
    KLD,
    PPL,
    Point,
    Response,
    Score,
    Tried,
    Yardstick,
    anchored,
    candidates,
    interval_from_json,
    interval_json,
    measure_curves,
    measure_response,
    part_of,
    point_from_json,
    response_from_json,
)
from cerebellum.errors import BadInput
from cerebellum.fit import Card
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.measure import Measurer, measuring
from cerebellum.plan import Sizes
from cerebellum.recorded import MODEL, recorded_points
from cerebellum.rounding import RoundingErrors, rounding_errors
from cerebellum.sensitivity import Sensitivities, Whole
from cerebellum.sizes import parse_size
from cerebellum.source import Source
from cerebellum.sweep import Changes, Measurement, chunk_order
from cerebellum.workspace import Settings, Workspace, read_json, write_json
from cerebellum.zoom import zoom

_WHOLE_KLD_CHUNKS, _WHOLE_NLL_CHUNKS = 48, 96  # a plan as a whole: what ships deserves more than its parts
_YARDSTICK_SHARE = 0.2  # of the passes at most, for the source, the anchor and the base
_ROLES_SHARE, _FINE_SHARE = 0.5, 0.1  # of the passes; the rest tells layers apart
_LEAST, _MOST = 4, 24  # chunks of one part at one type


@dataclass
class Purse:
    """Chunks that may be scored for curves, and those that were; a chunk of a variant counts once."""

    limit: int
    spent_on: dict[frozenset[tuple[str, str]], int] = field(default_factory=dict)

    @property
    def spent(self) -> int:
        return sum(self.spent_on.values())

    @property
    def left(self) -> int:
        return self.limit - self.spent

    def pay(self, changes: Changes, n: int) -> None:
        key = frozenset(changes.items())
        self.spent_on[key] = max(n, self.spent_on.get(key, 0))


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What was measured of the parts, with all that a fit needs beside it."""

    responses: tuple[Response, ...]
    errors: RoundingErrors
    base: Whole
    anchor_kld: float
    most: int

    def damages(self, sizes: Sizes) -> Learning:
        return Learning(Sensitivities(self.responses, self.errors, sizes, self.anchor_kld), self.base)

    def as_json(self) -> dict[str, Any]:
        return {
            "chunks": self.most,
            "anchor_kld": self.anchor_kld,
            "base_above_anchor": {"kld": interval_json(self.base.kld), "nll": interval_json(self.base.nll)},
            "responses": [response.as_json() for response in self.responses],
            "rounding": self.errors.as_json(),
        }

    @classmethod
    def read(cls, workspace: Workspace) -> Curves:
        """curves.json, which ``run --budget`` makes."""
        found = read_json(workspace.path("curves.json"))
        try:
            base = {key: interval_from_json(value) for key, value in found["base_above_anchor"].items()}
            return cls(
                responses=tuple(response_from_json(row) for row in found["responses"]),
                errors=RoundingErrors.from_json(found["rounding"]),
                base=Whole(changes={}, **base),
                anchor_kld=found["anchor_kld"],
                most=found["chunks"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{workspace.path('curves.json')}: not as this version writes it ({type(error).__name__}: "
                f"{error}); run `cerebellum run --budget` again"
            ) from error


def curves_stage(workspace: Workspace) -> dict[str, Any]:
    """Every role at every type of the ladder, and layers apart where they differ -> curves.json."""
    workspace.write_source()
    settings, sizes = workspace.settings, workspace.sizes
    tried = candidates(sizes, settings.types, settings.anchor)
    if not tried:
        raise BadInput(
            f"{settings.source}: none of its groups can be both {settings.anchor} and one of --types; "
            "give another --anchor or other --types"
        )
    workspace.check_space([anchored(sizes, settings.anchor), *(part.at(kind) for part, kind in tried)])
    errors = _rounding(workspace)
    with _scoring(workspace) as scoring:
        yardstick, purse = scoring.yardstick(), scoring.purse
        most = max(_LEAST, min(_MOST, int(_ROLES_SHARE * purse.left / len(tried))))
        probes = Probes(scoring=scoring, yardstick=yardstick, most=min(most, len(scoring.few)))
        found = measure_curves(tried, probes.measure)
        reserve = int(_FINE_SHARE * purse.limit)
        found += zoom(found, errors, sizes, probes.measure, lambda: purse.left >= 2 * most + reserve)
        kld, nll = yardstick.above(yardstick.base)
        base = Whole(changes={}, kld=kld, nll=nll)
        lost = float(yardstick.anchor.kld.mean())
        curves = Curves(responses=found, errors=errors, base=base, anchor_kld=lost, most=probes.most)
        return _write_curves(workspace, curves, curves.damages(sizes).points(()), scoring)


def _rounding(workspace: Workspace) -> RoundingErrors:
    """Of the ladder and of the IQ types, which need no measurement to be considered."""
    settings = workspace.settings
    fine = FINE_LADDER if settings.fine_types else ()
    return rounding_errors(
        workspace.source,
        workspace.matrix,
        workspace.sizes,
        tuple(dict.fromkeys((*settings.types, *fine))),
        settings.anchor,
        settings.threads,
        workspace.reporter,
    )


def _write_curves(
    workspace: Workspace, curves: Curves, points: Sequence[Point], scoring: _Scoring
) -> dict[str, Any]:
    corpus, settings, yardstick = workspace.selection, workspace.settings, scoring.yardstick()
    content = {
        "base": workspace.base.label,
        "text": corpus.path.name,
        "text_sha256": corpus.sha256,
        "ctx": corpus.ctx,
        "seed": settings.seed,
        "tokens_scored": scoring.purse.spent * corpus.ctx,
        "passes": scoring.purse.spent / corpus.n_chunks,
        "base_kld": float(yardstick.base.kld.mean()),
        **curves.as_json(),
        "points": [_point_json(point, workspace.sizes) for point in points],
    }
    write_json(workspace.path("curves.json"), content)
    return content


def _point_json(point: Point, sizes: Sizes) -> dict[str, Any]:
    """With its role and layers, for charts."""
    group = sizes.groups[point.part.groups[0]]
    return {**point.as_json(), "role": group.role, "layers": list(group.layers)}


def budget_stage(workspace: Workspace) -> dict[str, Any]:
    """The knapsack's proposals, each measured whole; the best measured one -> plan.json."""
    target, settings = _target(workspace), workspace.settings
    budget, sizes = target.file_bytes(), workspace.sizes
    with _scoring(workspace) as scoring:
        curves = _with_fine_types(Curves.read(workspace), budget, scoring)
        damages = curves.damages(sizes)
        planning = budget_plan(damages, sizes, budget, settings.objective, settings.seed)
        try:
            changes = next(planning)
            while True:
                changes = planning.send((scoring.whole(changes), scoring.whole({})))
        except StopIteration as stop:
            plan: BudgetPlan = stop.value
        _write_curves(workspace, curves, damages.points(plan.candidates), scoring)
        base_kld = float(scoring.whole({}).kld.mean())
    planned = _budget_json(plan, target, base_kld)
    write_json(workspace.path("plan.json"), planned)
    return planned


def _with_fine_types(curves: Curves, budget: int, scoring: _Scoring) -> Curves:
    """The curves with the IQ types measured that the plan for this budget wants, the largest parts first.

    IQ types quantize ten times as slowly as K-quants, and rounding errors foretell them well, so a part
    is measured at one only where a plan wants it, and while the passes last.
    """
    workspace = scoring.workspace
    sizes, settings = workspace.sizes, workspace.settings
    scoring.pay_again(curves.responses)
    first = Allocation(curves.damages(sizes).points(()), sizes, settings.objective).best(budget)
    wanted: dict[tuple[str, str], list[str]] = {}
    for point in first.points if first else ():
        if point.kind in FINE_LADDER:
            role = sizes.groups[point.part.groups[0]].role
            wanted.setdefault((role, point.kind), []).extend(point.part.groups)
    tried = [(part_of(names, sizes), kind) for (_, kind), names in wanted.items()]
    tried.sort(key=lambda pair: -pair[0].n_bytes(pair[1], sizes))
    probes = Probes(scoring=scoring, yardstick=scoring.yardstick(), most=curves.most)
    found = []
    for pair in tried:
        if scoring.purse.left >= curves.most:
            found.append(probes.measure(pair))
    return replace(curves, responses=(*curves.responses, *found))


def rebudget(workspace: Workspace) -> dict[str, Any]:
    """A plan for another budget from curves.json alone: no model is loaded, nothing is measured."""
    found, objective = read_json(workspace.path("curves.json")), workspace.settings.objective
    return _unmeasured(read_points(workspace), _target(workspace), objective, found.get("base_kld"))


def plan_header(
    settings: Settings, measurements: Sequence[Measurement], source: Source, sizes: Sizes
) -> dict[str, Any]:
    """A plan by budget for a GGUF of which only the header is looked at."""
    target = _Target(settings, source, sizes)
    return _unmeasured(recorded_points(measurements, sizes), target, PPL) | {"model": MODEL}


def _unmeasured(
    points: Sequence[Point], target: _Target, objective: str, base_kld: float | None = None
) -> dict[str, Any]:
    """What the curves alone propose, as plan.json has it."""
    planning = budget_plan(Known(points), target.sizes, target.file_bytes(), objective)
    try:
        next(planning)
        planning.send(None)
    except StopIteration as stop:
        return _budget_json(stop.value, target, base_kld)
    raise AssertionError("a plan without measurements asks once")


def _budget_json(plan: BudgetPlan, target: _Target, base_kld: float | None) -> dict[str, Any]:
    """plan.json, with the memory it takes where a card was given."""
    memory = {"memory": target.card.plan_json(plan.chosen.changes)} if target.card else {}
    return budget_json(plan, target.sizes, base_kld) | memory


def frontier_of(workspace: Workspace) -> list[dict[str, Any]]:
    """Size and predicted damage of the best plans, from the smallest file to the largest."""
    base_kld = read_json(workspace.path("curves.json"))["base_kld"]
    found = frontier(read_points(workspace), workspace.sizes, objective=workspace.settings.objective)
    return [
        {
            "file_bytes": candidate.n_bytes,
            "predicted": candidate.predicted,
            "predicted_kld": base_kld + candidate.predicted if workspace.settings.objective == KLD else None,
            "changes": {
                point.part.name: point.kind
                for point in merged(candidate.points, workspace.sizes)
                if point.kind != BASE
            },
        }
        for candidate in found
    ]


def read_points(workspace: Workspace) -> tuple[Point, ...]:
    """What every group costs at every type, as the last plan of the folder left it."""
    return tuple(point_from_json(row) for row in read_json(workspace.path("curves.json"))["points"])


@dataclass(frozen=True)
class _Target:
    """What was asked for: a size, a preset's own size for this model, or a card."""

    settings: Settings
    source: Source
    sizes: Sizes
    matrix: ImportanceMatrix | None = None

    def file_bytes(self) -> int:
        """The budget as bytes of the file."""
        if self.card is not None:
            return self.card.file_bytes()
        asked = self.settings.budget or self.sizes.base.label
        try:
            return parse_size(asked)
        except ValueError:
            preset = preset_base(self.source, asked, self.matrix, has_imatrix=True)
            return replace(self.sizes, base=preset).whole_file_bytes()

    @cached_property
    def card(self) -> Card | None:
        """llama.cpp is asked once what it would allocate."""
        if self.settings.fit is None:
            return None
        return Card(self.source, self.sizes, _size(self.settings.fit), self.settings.fit_ctx)


def _size(asked: str) -> int:
    try:
        return parse_size(asked)
    except ValueError as error:
        raise BadInput(f"--fit: {error}") from error


def _target(workspace: Workspace) -> _Target:
    return _Target(workspace.settings, workspace.source, workspace.sizes, workspace.matrix)


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """Scores variants on the first chunks of the seeded order, against the source's own predictions.

    ``few`` chunks have those predictions on disk: parts get the first of them, plans all, and the NLL of
    plans is known on ``many``.
    """

    workspace: Workspace
    measurer: Measurer
    purse: Purse
    few: tuple[int, ...]
    many: tuple[int, ...]

    def alone(self, changes: Changes, n: int) -> Score:
        """For a part: paid for."""
        self.purse.pay(changes, n)
        return self._score(changes, self.few[:n], self.few[:n])

    def whole(self, changes: Changes) -> Score:
        return self._score(changes, self.many, self.few)

    def yardstick(self) -> Yardstick:
        """The anchor and the base on as many chunks as a share of the passes allows."""
        sizes, settings = self.workspace.sizes, self.workspace.settings
        n = max(2, min(len(self.few), int(_YARDSTICK_SHARE * self.purse.limit / 3)))
        self.purse.pay({"the source": ""}, n)
        anchor, base = self.alone(anchored(sizes, settings.anchor), n), self.alone({}, n)
        if not (anchor.finite and base.finite):
            raise BadInput(
                f"{settings.source}: its logits are not finite at {settings.anchor} or at {settings.base}; "
                "give another --anchor or --base"
            )
        return Yardstick(anchor=anchor, base=base)

    def pay_again(self, responses: Sequence[Response]) -> None:
        """What an earlier stage measured."""
        settings, sizes = self.workspace.settings, self.workspace.sizes
        for response in responses:
            changes = {**anchored(sizes, settings.anchor), **response.part.at(response.kind)}
            self.purse.pay(changes, response.kld.n if response.kld else _LEAST)

    def _score(self, changes: Changes, for_nll: tuple[int, ...], for_kld: tuple[int, ...]) -> Score:
        variant = self.workspace.shards.variant(changes)
        kld = self.measurer.kld_means(variant, for_kld)
        return Score(nll=self.measurer.chunk_means(variant, for_nll), kld=kld)


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Measures parts at types, each on ``most`` chunks or as many as it takes."""

    scoring: _Scoring
    yardstick: Yardstick
    most: int

    def measure(self, tried: Tried, largest: float = 0.0) -> Response:
        settings, sizes = self.scoring.workspace.settings, self.scoring.workspace.sizes
        part, kind = tried
        changes = {**anchored(sizes, settings.anchor), **part.at(kind)}
        return measure_response(
            tried, lambda n: self.scoring.alone(changes, n), self.yardstick, self.most, largest
        )


@contextmanager
def _scoring(workspace: Workspace) -> Iterator[_Scoring]:
    """Opens what scoring needs; the source's predictions are kept on disk meanwhile."""
    corpus, settings = workspace.selection, workspace.settings
    order = chunk_order(corpus.n_chunks, settings.seed)
    kept = order[:_WHOLE_KLD_CHUNKS]
    with measuring(workspace, workspace.source_variant, kept) as measurer:
        n_kept = len(measurer.cache.chunks) if measurer.cache else 0
        if n_kept < 2:
            raise BadInput("--kld-cache: too small for the predictions of two chunks; give it more")
        measurer.nll(workspace.source_variant, kept[:n_kept])
        yield _Scoring(
            workspace=workspace,
            measurer=measurer,
            purse=Purse(int(settings.curve_passes * corpus.n_chunks)),
            few=kept[:n_kept],
            many=order[:_WHOLE_NLL_CHUNKS],
        )
