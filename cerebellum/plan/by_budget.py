"""The stages of a run by budget: response curves, then the plan. The rest is as in ``run.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cerebellum.base import preset_base
from cerebellum.errors import BadInput
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.llama.library import build_id
from cerebellum.llama.presets import parse_preset
from cerebellum.measure.curves import (
    BASE,
    FINE_LADDER,
    KLD,
    PPL,
    Point,
    Response,
    anchored,
    base_kinds,
    candidates,
    kinds_for,
    measure_curves,
    nats_from_json,
    nats_json,
    part_of,
    point_from_json,
    response_from_json,
)
from cerebellum.measure.probe import Probes, Session, open_session
from cerebellum.measure.race import Measurement
from cerebellum.measure.rounding import RoundingErrors, rounding_errors
from cerebellum.measure.zoom import zoom
from cerebellum.plan.budget import (
    Allocation,
    BudgetPlan,
    Known,
    Learning,
    budget_json,
    budget_plan,
    frontier,
    merged,
    unreachable,
)
from cerebellum.plan.damage import Sensitivities, Whole
from cerebellum.plan.limit import Sizes
from cerebellum.plan.recorded import MODEL, recorded_points
from cerebellum.plan.target import Card
from cerebellum.source import Source
from cerebellum.units import parse_size
from cerebellum.workspace import CURVES_FORMAT, Settings, Workspace, read_curves, read_json, write_json

ROUNDING_FORMAT = 1  # of rounding.json
_ROLES_SHARE, _FINE_SHARE = 0.5, 0.1  # of the passes; the rest tells layers apart
_LEAST, _MOST = 4, 24  # chunks of one part at one type


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
            "base_above_anchor": {"kld": nats_json(self.base.kld), "nll": nats_json(self.base.nll)},
            "responses": [response.as_json() for response in self.responses],
            "rounding": self.errors.as_json(),
        }

    @classmethod
    def read(cls, workspace: Workspace) -> Curves:
        """curves.json, which ``run --budget`` makes."""
        found = read_curves(workspace.folder)
        try:
            base = {key: nats_from_json(value) for key, value in found["base_above_anchor"].items()}
            return cls(
                responses=tuple(response_from_json(row) for row in found["responses"]),
                errors=RoundingErrors.from_json(found["rounding"]),
                base=Whole(changes={}, **base),
                anchor_kld=found["anchor_kld"],
                most=found["chunks"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{workspace.path('curves.json')}: damaged ({type(error).__name__}: {error}); "
                "run `cerebellum run --budget` again"
            ) from error


def run(workspace: Workspace) -> None:
    """Both stages in one session, so that the source's predictions are made once."""
    check_reachable(workspace)
    with open_session(workspace) as session:
        curves_stage(workspace, session)
        budget_stage(workspace, session)


def curves_stage(workspace: Workspace, session: Session) -> dict[str, Any]:
    """Every role at every type of the ladder, and layers apart where they differ -> curves.json."""
    workspace.write_source()
    settings, sizes = workspace.settings, workspace.sizes
    tried = candidates(sizes, settings.types, settings.anchor)
    if not tried:
        raise BadInput(
            f"{settings.source}: none of its groups can be both {settings.anchor} and one of --types; "
            "give another --anchor or other --types"
        )
    left = [name for name in sizes.groups if not sizes.legal(name, settings.anchor)]
    if left:
        note = f"{len(left)} groups cannot be {settings.anchor} and stay at the base: {', '.join(left[:6])}"
        workspace.reporter.note(note)
    workspace.check_space([anchored(sizes, settings.anchor), *(part.at(kind) for part, kind in tried)])
    errors, yardstick, purse = _rounding(workspace), session.yardstick, session.purse
    most = max(_LEAST, min(_MOST, int(_ROLES_SHARE * purse.left / len(tried))))
    probes = Probes(session=session, most=min(most, len(session.few)))
    found = measure_curves(tried, probes.measure)
    reserve = int(_FINE_SHARE * purse.limit)
    found += zoom(found, errors, sizes, probes.measure, lambda: purse.left >= 2 * most + reserve)
    kld, nll = yardstick.above(yardstick.base)
    base = Whole(changes={}, kld=kld, nll=nll)
    lost = float(yardstick.anchor.kld.mean())
    curves = Curves(responses=found, errors=errors, base=base, anchor_kld=lost, most=probes.most)
    return _write_curves(workspace, curves, curves.damages(sizes).points(()), session)


def check_reachable(workspace: Workspace) -> None:
    """AnswerIsNo before any work where shapes alone say that no file can be so small."""
    settings, source = workspace.settings, workspace.source
    base = (
        workspace.base if settings.base_file else preset_base(source, settings.base, None, has_imatrix=True)
    )
    sizes = Sizes.of(source, workspace.groups, base)
    smallest = sizes.fixed_bytes() + sum(
        min(sizes.file_bytes(name, kind) for kind in (BASE, *kinds_for(name, _offered(settings), sizes)))
        for name in sizes.groups
    )
    wanted = _Target(settings, source, sizes).file_bytes()
    if wanted < smallest:
        raise unreachable(wanted, smallest)


def _offered(settings: Settings) -> tuple[str, ...]:
    """The types that a plan may choose: the ladder, and the IQ types, which need no measurement for it."""
    return tuple(dict.fromkeys((*settings.types, *(FINE_LADDER if settings.fine_types else ()))))


def _rounding(workspace: Workspace) -> RoundingErrors:
    """From rounding.json if it was made from just this; IQ types take minutes on a large model."""
    settings, path = workspace.settings, workspace.path("rounding.json")
    kinds, base = list(_offered(settings)), workspace.base
    recipe = [
        ROUNDING_FORMAT,
        build_id(),
        workspace.source_sha256,
        workspace.matrix.sha256,
        base.file.sha256() if base.file else workspace.sizes.tensor_types({}),
        list(workspace.sizes.groups),
        kinds,
        settings.anchor,
    ]
    if path.exists() and (kept := read_json(path)).get("made_from") == recipe:
        return RoundingErrors.from_json(kept)
    found = rounding_errors(
        workspace.source,
        workspace.matrix,
        workspace.sizes,
        kinds,
        settings.anchor,
        settings.threads,
        workspace.reporter,
    )
    write_json(path, {"made_from": recipe, **found.as_json()})
    return found


def _write_curves(
    workspace: Workspace, curves: Curves, points: Sequence[Point], session: Session
) -> dict[str, Any]:
    corpus, settings, yardstick = workspace.selection, workspace.settings, session.yardstick
    content = {
        "format": CURVES_FORMAT,
        "base": workspace.base.label,
        "text": corpus.path.name,
        "text_sha256": corpus.sha256,
        "ctx": corpus.ctx,
        "seed": settings.seed,
        "tokens_scored": session.purse.spent * corpus.ctx,
        "passes": session.purse.spent / corpus.n_chunks,
        "base_kld": float(yardstick.base.kld.mean()),
        **curves.as_json(),
        "points": [_point_json(point, workspace.sizes) for point in points],
    }
    write_json(workspace.path("curves.json"), content)
    return content


def _point_json(point: Point, sizes: Sizes) -> dict[str, Any]:
    """With its role and layers, for charts."""
    group = sizes.groups[point.part.groups[0]]
    own = sorted(base_kinds(point.part, sizes))
    return {**point.as_json(), "role": group.role, "layers": list(group.layers), "base_types": own}


def budget_stage(workspace: Workspace, session: Session) -> dict[str, Any]:
    """The knapsack's proposals, each measured whole; the best measured one -> plan.json."""
    target, settings = _target(workspace), workspace.settings
    budget, sizes = target.file_bytes(), workspace.sizes
    curves = _with_fine_types(Curves.read(workspace), budget, session)
    damages, base = curves.damages(sizes), session.whole({})
    planning = budget_plan(damages, sizes, budget, settings.objective, settings.seed)
    try:
        changes = next(planning)
        while True:
            changes = planning.send((session.whole(changes), base))
    except StopIteration as stop:
        plan: BudgetPlan = stop.value
    changed = [candidate for candidate in plan.candidates if candidate.changes]
    _write_curves(workspace, curves, damages.points(changed), session)
    planned = _budget_json(plan, target, float(base.kld.mean()))
    write_json(workspace.path("plan.json"), planned)
    return planned


def _with_fine_types(curves: Curves, budget: int, session: Session) -> Curves:
    """The curves with the IQ types measured that the plan for this budget wants, the largest parts first.

    IQ types quantize ten times as slowly as K-quants, and rounding errors foretell them well, so a part
    is measured at one only where a plan wants it, and while the passes last.
    """
    workspace = session.workspace
    sizes, settings = workspace.sizes, workspace.settings
    first = Allocation(curves.damages(sizes).points(()), sizes, settings.objective).best(budget)
    wanted: dict[tuple[str, str], list[str]] = {}
    for point in first.points if first else ():
        if point.kind in FINE_LADDER:
            role = sizes.groups[point.part.groups[0]].role
            wanted.setdefault((role, point.kind), []).extend(point.part.groups)
    tried = [(part_of(names, sizes), kind) for (_, kind), names in wanted.items()]
    tried.sort(key=lambda pair: -pair[0].n_bytes(pair[1], sizes))
    probes = Probes(session=session, most=curves.most)
    known = {(response.part, response.kind) for response in curves.responses}
    found = []
    for pair in tried:
        if pair not in known and session.purse.left >= curves.most:
            found.append(probes.measure(pair))
    return replace(curves, responses=(*curves.responses, *found))


def rebudget(workspace: Workspace) -> dict[str, Any]:
    """A plan for another budget from curves.json alone: no model is loaded, nothing is measured."""
    found, objective = read_curves(workspace.folder), workspace.settings.objective
    return _unmeasured(_points(found), _target(workspace), objective, found["base_kld"])


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
    curves, objective = read_curves(workspace.folder), workspace.settings.objective
    found = frontier(_points(curves), workspace.sizes, objective=objective)
    return [
        {
            "file_bytes": candidate.n_bytes,
            "predicted": candidate.predicted,
            "predicted_kld": curves["base_kld"] + candidate.predicted if objective == KLD else None,
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
    return _points(read_curves(workspace.folder))


def _points(curves: Mapping[str, Any]) -> tuple[Point, ...]:
    return tuple(point_from_json(row) for row in curves["points"])


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
        with suppress(ValueError):
            return parse_size(asked)
        try:
            parse_preset(asked)
        except BadInput as error:
            raise BadInput(f"--budget {asked}: neither a size such as 13GiB nor a preset; {error}") from error
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
