"""Types that a recipe gives -> plan.json: nothing is chosen, and the whole is measured against the base."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from msgspec.structs import replace

from cerebellum.base import preset_base
from cerebellum.engine.protocols import Engine
from cerebellum.errors import BadInput
from cerebellum.gguf import needs_imatrix, parse_type
from cerebellum.groups import EMBEDDING_ROLE, HEAD_ROLE, given_groups
from cerebellum.layout import Layout
from cerebellum.measure.artifacts import Bounds, finite_pair
from cerebellum.measure.measurer import Measurer, measuring
from cerebellum.measure.race import chunk_order
from cerebellum.plan.artifacts import CHANGED, DEMOTED, PROMOTED, GivenPlan, PlanRow
from cerebellum.plan.stage import written
from cerebellum.settings import Given, Settings
from cerebellum.shards import Variant
from cerebellum.source import open_source
from cerebellum.stats.paired import Interval, superpopulation_interval
from cerebellum.verdicts import NOTHING, Changes
from cerebellum.workspace import Workspace


def given_changes(layout: Layout, given: Given) -> Changes:
    """Returns the groups that leave the base where types are given; a group has one wanted type.

    Raises BadInput where a row cannot take its type.
    """
    wanted = {
        name: given.types[group.tensors[0]]
        for name, group in layout.groups.items()
        if group.tensors[0] in given.types
    }
    return {
        name: qtype
        for name, qtype in wanted.items()
        if layout.group_types(name, qtype) != layout.group_types(name)
    }


def check_given(workspace: Workspace, given: Given) -> None:
    """Raises BadInput before any work where a tensor cannot have the type that is given."""
    layout = Layout.of(workspace.source, workspace.groups, workspace.base_of_shapes)
    known = workspace.matrix.entries if workspace.settings.imatrix is not None else ()
    check_types(given_changes(layout, given), layout, known)
    if workspace.selection.n_chunks < 2:
        raise BadInput(
            f"{workspace.selection.path}: one chunk of {workspace.selection.ctx} tokens says nothing of more text; "
            "give a longer --select-text or a smaller --ctx"
        )


def check_types(changes: Changes, layout: Layout, known: Collection[str] = ()) -> None:
    """Raises BadInput where embeddings or the output head are to have a type that needs an importance matrix, or
    vectors any other type than they have.

    No matrix has an entry for the former, but for one that was given and has them among the tensors ``known``.
    """
    for group, qtype in changes.items():
        vector = next((n for n in layout.groups[group].tensors if len(layout.tensors[n].shape) < 2), None)
        if vector is not None:
            raise BadInput(f"{vector}: is a vector and cannot be {qtype}; leave it out of the recipe")
        of_them = layout.groups[group].role in (EMBEDDING_ROLE, HEAD_ROLE)
        lacking = [name for name in layout.groups[group].tensors if name not in known]
        if of_them and lacking and needs_imatrix(parse_type(qtype)):
            raise BadInput(
                f"{lacking[0]}: {qtype} needs an importance matrix, which has no entry for it; give it another type "
                "in the recipe, or an --imatrix that has one"
            )


def plan_given(workspace: Workspace, given: Given) -> GivenPlan:
    """Measures the whole against the base on the selection text and writes plan.json."""
    workspace.write_source()
    layout = workspace.layout
    changes = given_changes(layout, given)
    workspace.check_space([changes])
    corpus = workspace.selection
    order = chunk_order(corpus.n_chunks, workspace.settings.seed)[: given.chunks or corpus.n_chunks]
    plan = unmeasured_given(layout, given, workspace.settings, corpus.n_chunks)
    if changes:
        base = workspace.shards.variant(NOTHING)
        with measuring(workspace, base, order) as measurer:
            plan = _measured(plan, measurer, (base, workspace.shards.variant(changes)), order)
    return written(workspace, plan)


def replan_given(workspace: Workspace, given: Given) -> GivenPlan:
    """Writes plan.json of a recipe in a folder that another run left; measures nothing."""
    workspace.write_groups()
    plan = unmeasured_given(workspace.layout, given, workspace.settings, workspace.selection.n_chunks)
    return written(workspace, plan)


def given_header(settings: Settings, given: Given, engine: Engine) -> GivenPlan:
    """Plans for a GGUF of which only the header is looked at."""
    source = open_source(settings.source, allow_requantize=True)
    base = preset_base(engine, source, settings.base, None)
    layout = Layout.of(source, given_groups(source, given.types), base)
    check_types(given_changes(layout, given), layout)
    return unmeasured_given(layout, given, settings, of_chunks=0)


def _measured(
    plan: GivenPlan, measurer: Measurer, pair: tuple[Variant, Variant], order: Sequence[int]
) -> GivenPlan:
    """Returns the plan with what is measured of the base and the whole, a ``pair``, on some chunks."""
    base, whole = pair
    against = measurer.chunk_means(base, order)
    compared = [chunk for chunk in order if measurer.cache is None or chunk in measurer.cache.chunks]
    if compared:
        measurer.kld_means(whole, compared)
    nll = measurer.chunk_means(whole, order)
    known = measurer.divergence(whole, compared)
    delta = superpopulation_interval(nll - against) if np.isfinite(nll).all() else None
    mean, low, high = delta.percent() if delta else (None, None, None)
    return replace(
        plan,
        chunks=len(order),
        measured_delta_pct=mean,
        ci_pct=finite_pair(low, high) if low is not None and high is not None else None,
        kld_mean=_mean(known[0]) if known else None,
        kld_ci=_bounds(known[0]) if known else None,
        top1_agreement=known[1] if known else None,
    )


def _mean(found: Interval) -> float | None:
    return found.mean if np.isfinite(found.mean) else None


def _bounds(found: Interval) -> Bounds | None:
    return finite_pair(found.low, found.high) if np.isfinite(found.mean) else None


def unmeasured_given(layout: Layout, given: Given, settings: Settings, of_chunks: int) -> GivenPlan:
    """Returns the plan of a recipe before anything is measured: types and exact bytes."""
    changes = given_changes(layout, given)
    return GivenPlan(
        recipe=given.recipe,
        label=given.label,
        base=layout.base.label,
        groups=tuple(_row(name, changes.get(name), layout) for name in layout.groups),
        predicted_delta_pct=None,
        measured_delta_pct=None if changes else 0.0,
        ci_pct=None,
        base_tensor_bytes=layout.tensor_bytes(),
        tensor_bytes=layout.tensor_bytes(changes),
        bytes_saved=layout.bytes_saved(changes),
        file_bytes=layout.file_bytes(changes),
        tensor_types=layout.type_names(changes),
        text=settings.select_name,
        ctx=settings.ctx,
        chunks=0,
        of_chunks=of_chunks,
    )


def _row(name: str, qtype: str | None, layout: Layout) -> PlanRow:
    kept = PlanRow.kept(layout, name)
    if qtype is None:
        return replace(kept, verdict="at the base already")
    saved = layout.bytes_saved({name: qtype})
    return replace(
        kept,
        chosen_type=qtype,
        bytes_saved=saved,
        verdict="as the recipe says",
        decision=DEMOTED if saved > 0 else PROMOTED if saved < 0 else CHANGED,
    )
