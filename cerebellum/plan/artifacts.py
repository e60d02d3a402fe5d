"""plan.json: what to ship, one shape for both goals. Types only; reading it loads no engine and no solver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cerebellum.codec import Artifact, Record
from cerebellum.measure.artifacts import Bounds, Effect, Response
from cerebellum.settings import Objective
from cerebellum.verdicts import Changes

if TYPE_CHECKING:  # whoever only reads plan.json needs no layout
    from cerebellum.layout import Layout

KEPT_TYPE = "base"

KEPT = "kept"
DEMOTED = "demoted"
PROMOTED = "promoted"
CHANGED = "changed"
"""How plan.json writes that a group stays at its base types. In code, that is absence."""


class GpuMemory(Record, frozen=True, kw_only=True):
    """What a plan takes on a GPU, part by part, in bytes; ``free`` is negative where it does not fit.

    ``compute_from`` and ``cache_from`` say whether a figure is llama.cpp's own, or a bound from above; a cache
    without windows is exact either way. ``card`` is the memory of the GPU.
    """

    context: int
    sequences: int
    weights: int
    cache: int
    cache_bytes_per_token: int
    cache_from: str
    attention_layers: int
    window: int
    state: int
    recurrent_layers: int
    server_sequences: int
    compute: int
    compute_from: str
    reserve: int
    total: int
    card: int
    free: int


class PlanRow(Record, frozen=True, kw_only=True):
    """One group: what it is, what was seen, what was decided.

    ``bytes_saved`` is what the decision saves, or would have saved at the type that was tried; negative where
    it adds. ``delta_pct`` is the change of perplexity, ``kld_mean`` the KL divergence from the base of the
    group alone, ``kld_change`` the foretold change of the divergence from the source (by budget), nats a token.
    """

    name: str
    role: str
    layers: tuple[int, ...]
    tensors: int
    base_type: str
    chosen_type: str
    bytes_saved: int
    delta_pct: float | None
    ci_pct: Bounds | None
    chunks: int | None
    verdict: str
    decision: str
    near_tie: bool = False
    measured_with: tuple[str, ...] = ()
    kld_mean: float | None = None
    kld_ci: Bounds | None = None
    top1_agreement: float | None = None
    kld_change: float | None = None

    @classmethod
    def kept(cls, layout: Layout, name: str) -> PlanRow:
        """Returns a group as it is at the base, of which nothing was seen."""
        group = layout.groups[name]
        return cls(
            name=name,
            role=group.role,
            layers=group.layers,
            tensors=len(group.tensors),
            base_type="+".join(layout.base_types([name])),
            chosen_type=KEPT_TYPE,
            bytes_saved=0,
            delta_pct=None,
            ci_pct=None,
            chunks=None,
            verdict=KEPT,
            decision=KEPT,
        )

    @staticmethod
    def told(qtype: str | None) -> str:
        """Returns how ``chosen_type`` names a type; None, which is at the base, needs a word there."""
        return KEPT_TYPE if qtype is None else qtype

    @property
    def changed(self) -> bool:
        """Whether the group leaves its base types."""
        return self.chosen_type != KEPT_TYPE


class Plan(Artifact, frozen=True, kw_only=True):
    """What every plan says: a row a group, the sum of the parts, the whole as measured, exact bytes.

    ``predicted_delta_pct`` is what the whole would cost if damages added up; ``measured_delta_pct`` and
    ``ci_pct`` are of the combination itself on the selection text, None where nobody measured it.
    ``imatrix_sha256`` names the importance matrix that all bytes behind these numbers were made with. ``memory``
    is what it takes on the graphics card that it was planned for, where one was named. ``label`` is the
    quantization label in the name of the file; a plan that names none is labelled as its base.
    """

    format: Literal[4] = 4
    base: str
    groups: tuple[PlanRow, ...]
    predicted_delta_pct: float | None
    measured_delta_pct: float | None
    ci_pct: Bounds | None
    base_tensor_bytes: int
    tensor_bytes: int
    bytes_saved: int
    file_bytes: int
    tensor_types: dict[str, str]
    imatrix_sha256: str | None = None
    memory: GpuMemory | None = None
    label: str | None = None

    @property
    def file_label(self) -> str:
        """The label in the name of the finished file, which is what people ask the Hub for."""
        return self.label or self.base

    @property
    def changes(self) -> Changes:
        """The groups that leave the base, with their types."""
        return {row.name: row.chosen_type for row in self.groups if row.changed}


class LimitPlan(Plan, frozen=True, kw_only=True, tag="threshold", tag_field="mode"):
    """A plan of the published method: what may be demoted to ``demote`` under a limit on damage."""

    threshold_pct: float
    indifference_pct: float
    demote: str


class PointRow(Effect, frozen=True, kw_only=True):
    """Foretold: a group at a type (None: at the base), its change against the base, and its bytes in the file.

    These are the fit's, with what whole plans taught; the chosen plan was made from them.
    """

    group: str
    type: str | None
    bytes: int


class CandidateRow(Record, frozen=True, kw_only=True):
    """A combination that was proposed and measured whole. ``how`` says what proposed it.

    Divergences from the source are changes against the base's own, nats a token. ``predicted_kld`` is the sum of its
    parts, or what steps around an earlier candidate foretold.
    """

    how: str
    changes: dict[str, str]
    file_bytes: int
    predicted_kld: float | None
    measured_kld: float | None
    kld_ci: Bounds | None
    delta_pct: float | None
    ci_pct: Bounds | None
    chunks: int | None


class StepRow(Record, frozen=True, kw_only=True):
    """One measured step: the candidate of the number ``around``, from 0, with one ``part`` at the types of ``changes``.

    ``way`` is finer, cheaper or other family; a group that steps to its base types is at "base". Its effect is against
    that candidate on the same ``chunks``: ``predicted`` by what the part does alone, in the measure that the budget
    makes least, and measured, nats a token; None where the step collapsed.
    """

    around: int
    part: str
    way: str
    changes: dict[str, str]
    predicted: float
    measured_kld: float | None
    kld_ci: Bounds | None
    delta_pct: float | None
    ci_pct: Bounds | None
    chunks: int


class FrontierRow(Record, frozen=True, kw_only=True):
    """Foretold: the best plan at one size of file, as the fit has it; nobody measured it.

    ``predicted`` is its damage against the base in the measure that the budget makes least, nats a token.
    ``predicted_kld`` is the KL divergence from the source itself, None where the objective is perplexity.
    """

    file_bytes: int
    predicted: float
    predicted_kld: float | None
    changes: dict[str, str] = {}  # noqa: RUF012 - msgspec copies the default of every field


class BudgetPlan(Plan, frozen=True, kw_only=True, tag="budget", tag_field="mode"):
    """The best measured plan within ``budget_bytes`` of file.

    ``base_kld`` is the base's own KL divergence from the source, to which ``predicted_kld``, ``measured_kld``
    and ``kld_ci`` are to be added. ``tradeoff`` says what the plan costs in the other measure, if that is sure;
    ``model`` names the stated model where types were never measured. ``responses`` were measured for this plan
    beyond those of the curves: parts at the IQ types that it wanted. ``points`` are what it was chosen from, with
    all that whole plans taught; where parts do not add up, ``steps`` say what they cost beside a candidate.
    ``frontier`` runs from the smallest file to the largest, so that nobody has to solve for it again to draw it.
    """

    budget_bytes: int
    objective: Objective
    base_kld: float | None
    predicted_kld: float | None
    measured_kld: float | None
    kld_ci: Bounds | None
    tradeoff: str | None = None
    candidates: tuple[CandidateRow, ...] = ()
    steps: tuple[StepRow, ...] = ()
    points: tuple[PointRow, ...] = ()
    responses: tuple[Response, ...] = ()
    frontier: tuple[FrontierRow, ...] = ()
    model: str | None = None


class GivenPlan(Plan, frozen=True, kw_only=True, tag="given", tag_field="mode"):
    """Types that were given by a recipe, named ``recipe``. Nothing was chosen, so no group was measured alone.

    The whole was measured on ``chunks`` of the ``of_chunks`` chunks of ``ctx`` tokens that the selection ``text`` has,
    0 where it was not yet. ``kld_mean`` (nats a token) and ``top1_agreement`` are against the base.
    """

    recipe: str
    text: str
    ctx: int
    chunks: int
    of_chunks: int
    kld_mean: float | None = None
    kld_ci: Bounds | None = None
    top1_agreement: float | None = None


AnyPlan = LimitPlan | BudgetPlan | GivenPlan
