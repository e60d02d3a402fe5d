"""Writes the card of a run that has not begun, on made-up results: what would fail last fails first.

A header can hold anything, and the card is where its facts are shown. A run that measured for hours must not end
there, so manifest, card and report are made once before it, from the real header and numbers that nobody measured.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from cerebellum.card.stage import card_context, read_stories, render_card
from cerebellum.codec import Artifact
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.folder import GROUPS, MANIFEST, MEASUREMENTS, PLAN, SOURCE, VERIFY, RunFolder
from cerebellum.groups import Group, Groups, record_of, source_file
from cerebellum.layout import Layout
from cerebellum.manifest import BaseNamed, EncoderNamed, Evidence, NamedFile, ResultNamed, manifest_of
from cerebellum.measure.artifacts import MeasurementRow, Measurements
from cerebellum.page.templates import render_html
from cerebellum.plan.artifacts import LimitPlan, PlanRow
from cerebellum.verdicts import SENSITIVE
from cerebellum.verify import Check, Measured, Report, Verified
from cerebellum.workspace import Workspace

_NO_SHA256 = "0" * 64
_PPL = Measured(ppl=10.0, se=0.1, tokens=1000)
_DELTA = 1.0
_BOUNDS = (0.5, 1.5)
_CHUNKS = 8


def rehearse(workspace: Workspace) -> None:
    """Makes manifest, card and report of made-up results; BadInput says what in the model's header they choke on.

    The results are those of a limit whatever the goal is, because what can fail is what the header holds, and
    both goals show the same of it. Nothing is left on the disk.
    """
    try:
        with TemporaryDirectory() as folder:
            artifacts = RunFolder(Path(folder))
            for name, value in _made_up(workspace).items():
                artifacts.write(name, value)
            stories = read_stories(artifacts.path)
            context = card_context(stories, {}, None)
            render_card(stories, context, None)
            render_html("report.html.j2", context)
    except (CerebellumError, OSError):
        raise
    except Exception as error:
        raise BadInput(
            f"{workspace.source.path}: its header cannot be shown on a card "
            f"({type(error).__name__}: {error}); please report this, with the header"
        ) from error


def _made_up(workspace: Workspace) -> dict[str, Artifact]:
    groups = workspace.groups
    layout = Layout.of(workspace.source, groups, workspace.base_of_shapes)
    return {
        SOURCE: source_file(workspace.source, _NO_SHA256, _NO_SHA256),
        GROUPS: Groups(groups=tuple(record_of(group) for group in groups)),
        MEASUREMENTS: _measurements(workspace, layout),
        PLAN: _plan(layout),
        VERIFY: _verified(workspace),
        MANIFEST: manifest_of(workspace, _evidence(workspace, layout)),
    }


def _plan(layout: Layout) -> LimitPlan:
    n_bytes = layout.tensor_bytes()
    return LimitPlan(
        base=layout.base.label,
        groups=tuple(_row(group, layout) for group in layout.groups.values()),
        predicted_delta_pct=_DELTA,
        measured_delta_pct=None,
        ci_pct=None,
        base_tensor_bytes=n_bytes,
        tensor_bytes=n_bytes,
        bytes_saved=0,
        file_bytes=n_bytes,
        tensor_types=layout.type_names(),
        threshold_pct=3.0,
        indifference_pct=0.2,
        demote="Q2_K",
    )


def _row(group: Group, layout: Layout) -> PlanRow:
    return PlanRow(
        name=group.name,
        role=group.role,
        layers=group.layers,
        tensors=len(group.tensors),
        base_type="+".join(layout.base_types([group.name])),
        chosen_type=PlanRow.told(None),
        bytes_saved=1,
        delta_pct=_DELTA,
        ci_pct=_BOUNDS,
        chunks=_CHUNKS,
        verdict=SENSITIVE,
        decision="kept",
    )


def _measurements(workspace: Workspace, layout: Layout) -> Measurements:
    corpus = workspace.selection
    rows = [
        MeasurementRow(
            groups=(name,), type="Q2_K", delta_pct=_DELTA, ci_pct=_BOUNDS, chunks=_CHUNKS, verdict=SENSITIVE
        )
        for name in layout.groups
    ]
    return Measurements(
        base=layout.base.label,
        demote="Q2_K",
        threshold_pct=3.0,
        indifference_pct=0.2,
        alpha=0.05,
        text=corpus.name,
        text_sha256=corpus.sha256,
        ctx=corpus.ctx,
        seed=workspace.settings.seed,
        chunks_in_text=corpus.n_chunks,
        chunks_scored=_CHUNKS,
        tokens_scored=_CHUNKS * corpus.ctx,
        tokens_full=_CHUNKS * corpus.ctx,
        measurements=tuple(rows),
    )


def _verified(workspace: Workspace) -> Verified:
    report = Report(
        text=workspace.report_corpus.name,
        text_sha256=workspace.report_corpus.sha256,
        same_as_selection=False,
        chunks=_CHUNKS,
        of_chunks=_CHUNKS,
        seed=None,
        source=_PPL,
        base=_PPL,
        result=_PPL,
        delta_pct=_DELTA,
        ci_pct=_BOUNDS,
    )
    return Verified(
        ok=True, checks=(Check(name="types as planned", ok=True, detail="made up"),), report=report
    )


def _evidence(workspace: Workspace, layout: Layout) -> Evidence:
    file = layout.base.file
    return Evidence(
        source_sha256=_NO_SHA256,
        matrix=NamedFile(file="imatrix.gguf", sha256=_NO_SHA256),
        base=BaseNamed(label=layout.base.label, file=file.path.name if file else None, sha256=None),
        tensor_types=layout.type_names(),
        shards={},
        artifacts={},
        ledger_digest=_NO_SHA256,
        result=ResultNamed(file="made-up.gguf", sha256=_NO_SHA256, bytes=layout.tensor_bytes()),
        encoder=EncoderNamed(),
    )
