"""Measures parts and whole plans for a budget on an engine: on the first chunks of the seeded order.

Divergences are from the source, whose predictions are kept on disk while a session is open. What parts may
cost is limited; whole plans are few, and get more chunks: what ships deserves more than its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
from gguf import GGMLQuantizationType

from cerebellum.errors import BadInput
from cerebellum.layout import Layout
from cerebellum.measure.artifacts import Curves, Response, RoundingErrors
from cerebellum.measure.crew import Wish
from cerebellum.measure.curves import (
    Curving,
    Planning,
    Probe,
    ProbeAsk,
    Reference,
    Score,
    T,
    WholeAsk,
    measure_layers,
    measure_roles,
    role_probes,
)
from cerebellum.measure.measurer import Measurer, measuring
from cerebellum.measure.method import Method
from cerebellum.measure.pace import Left, Work, time_left
from cerebellum.measure.race import chunk_order
from cerebellum.measure.rounding import read_or_make_errors
from cerebellum.settings import Budget
from cerebellum.units import size
from cerebellum.verdicts import NOTHING, Asked, Changes, drive_together
from cerebellum.workspace import Workspace

_NAMED = 6  # groups that a note still names

WIDER_BY = {"Q6_K": 1.1, "Q5_K": 1.3}
"""Coarser anchors, finest first: how many times as wide as from Q8_0 they make the intervals of damages at Q4_K, the
median over the roles of the embedded model; at Q2_K and Q3_K they make no difference (docs/LOG.md)."""


@dataclass(kw_only=True)
class MeasurementBudget:
    """Counts the chunks that parts cost, against the limit of the run; a chunk of a variant costs once."""

    limit: int
    beforehand: int = 0
    spent_on: dict[frozenset[tuple[str, str]], int] = field(default_factory=dict)

    @property
    def spent(self) -> int:
        """Chunks charged so far, those of the source and of earlier stages among them."""
        return self.beforehand + sum(self.spent_on.values())

    @property
    def left(self) -> int:
        """Chunks that may still be scored; negative where a single measurement went over the limit."""
        return self.limit - self.spent

    def charge(self, changes: Changes, n: int) -> None:
        """Charges the first ``n`` chunks of a variant; those that it was charged before are free."""
        key = frozenset(changes.items())
        self.spent_on[key] = max(n, self.spent_on.get(key, 0))

    def progress(self, left: Left | None) -> str:
        """Tells people the share that is spent and, once a pace is known, the time left."""
        told = f"curves {100 * self.spent / self.limit:.0f}%"
        return f"{told}, {left.told()}: " if left else f"{told}: "


@dataclass(kw_only=True)
class Session:
    """Scores variants against the source's own predictions, for as long as these are on disk.

    ``few`` chunks have those predictions: parts get the first of them, whole plans all of them, and the NLL
    of whole plans is known on ``many``. ``limit`` is what all curves may cost, in chunks; ``tried`` are the variants
    whose shards are known to be wanted.
    """

    workspace: Workspace
    goal: Budget
    method: Method
    measurer: Measurer
    few: tuple[int, ...]
    many: tuple[int, ...]
    limit: int
    tried: tuple[Changes, ...] = ()
    _reference: Reference | None = field(default=None, repr=False)

    @property
    def layout(self) -> Layout:
        """The layout of the model that is measured."""
        return self.workspace.layout

    @property
    def presets(self) -> Mapping[str, Mapping[str, GGMLQuantizationType]]:
        """The types that llama.cpp's presets give this model, by preset."""
        return self.workspace.presets

    @property
    def seed(self) -> int:
        """The seed of the chunk order, and of damages that are drawn."""
        return self.workspace.settings.seed

    def measure_reference(self) -> Reference:
        """Scores the anchor and the base on all of ``few``, the first time that it is asked for.

        Raises BadInput where either gives no finite logits, for nothing could be compared with it.
        """
        if self._reference is None:
            anchored = self.layout.anchored(self.goal.anchor)
            anchor = self.score(anchored, self.few, self.few, f"all at {self.goal.anchor}")
            base = self.score(NOTHING, self.few, self.few)
            self._refuse_collapse(anchor, "--anchor", self.goal.anchor)
            self._refuse_collapse(base, "--base", self.layout.base.label)
            self._reference = Reference(anchor=anchor, base=base)
        return self._reference

    def run(self, curving: Curving[T], budget: MeasurementBudget) -> T:
        """Scores all that a generator asks for, and charges it to ``budget``."""
        return drive_together([curving], self.desk(budget))[0]

    def desk(self, budget: MeasurementBudget) -> ProbeDesk:
        """Returns what answers probes, each charged to ``budget`` when it is asked for."""
        return ProbeDesk(session=self, budget=budget)

    def ahead(self, probes: Sequence[Probe]) -> AbstractContextManager[None]:
        """Makes the shards of these probes beside the block, where a GPU measures."""
        return self.workspace.shards_ahead([probe.part.at(probe.qtype) for probe in probes])

    def time_left(self, budget: MeasurementBudget) -> Left | None:
        """Returns how long the curves still take at most, by what chunks and shards took so far."""
        shards = self.workspace.shards
        done = Work(chunks=self.measurer.measured, weights=shards.weights_made)
        left = Work(chunks=budget.left, weights=shards.weights_missing(self.tried))
        return time_left(done, left, at_once=self.workspace.engine.on_gpu)

    def budget_after(self, curves: Curves) -> MeasurementBudget:
        """Returns what the curves left of the budget for parts, also where another session measured them."""
        return MeasurementBudget(limit=self.limit, beforehand=curves.chunks_scored)

    def plan(self, planning: Planning[T]) -> T:
        """Scores all whole plans that a generator asks for."""
        with ExitStack() as ahead:
            return drive_together([planning], PlanDesk(session=self, ahead=ahead))[0]

    def score(
        self, changes: Changes, for_nll: tuple[int, ...], for_kld: tuple[int, ...], label: str = ""
    ) -> Score:
        """Scores a variant: its NLL on some chunks, its divergence on others of ``few``."""
        self.measurer.gather(Wish(nll=for_nll, kld=for_kld, changes=changes, label=label))
        variant = self.workspace.shards.variant(changes, label)
        kld = self.measurer.kld_means(variant, for_kld)
        return Score(nll=self.measurer.chunk_means(variant, for_nll), kld=kld)

    def _refuse_collapse(self, score: Score, flag: str, qtype: str) -> None:
        if not score.finite:
            source = self.workspace.settings.source
            raise BadInput(f"{source}: its logits are not finite at {qtype}; give another {flag}")


@dataclass(frozen=True, kw_only=True)
class _Desk(Generic[Asked]):
    """Answers questions about variants on a session's measurer, several at once where there are workers."""

    session: Session

    def want(self, who: int, asks: Sequence[Asked], likely: Sequence[Asked]) -> None:
        """Hears what a generator wants next."""
        sure = [self._wish(ask) for ask in asks]
        self.session.measurer.want(who, sure, [self._wish(ask) for ask in likely])

    def ready(self, ask: Asked) -> bool:
        """Says whether a score is known."""
        return self.session.measurer.has(self._wish(ask))

    def wait(self) -> None:
        """Returns once more is known."""
        self.session.measurer.wait()

    def _wish(self, ask: Asked) -> Wish:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PlanDesk(_Desk[WholeAsk]):
    """Answers for whole plans: their divergence on all of ``few``, their NLL on all of ``many``, or less of both.

    ``ahead`` holds the making of the shards of what was asked for last, beside the scoring where a GPU does that.
    """

    ahead: ExitStack

    def want(self, who: int, asks: Sequence[WholeAsk], likely: Sequence[WholeAsk]) -> None:
        """Hears what is wanted next, and begins with its shards."""
        self.ahead.close()
        self.ahead.enter_context(self.session.workspace.shards_ahead([ask.changes for ask in asks]))
        super().want(who, asks, likely)

    def answer(self, ask: WholeAsk) -> Score:
        """Returns a score, measured now where nobody has."""
        wish = self._wish(ask)
        self.session.measurer.doing = ask.doing
        return self.session.score(wish.changes, wish.nll, wish.kld)

    def _wish(self, ask: WholeAsk) -> Wish:
        session = self.session
        return Wish(nll=session.many[: ask.n], kld=session.few[: ask.n], changes=ask.changes)


@dataclass(frozen=True, kw_only=True)
class ProbeDesk(_Desk[ProbeAsk]):
    """Answers probes; what workers score ahead is charged once it is asked for, if ever."""

    budget: MeasurementBudget

    def answer(self, ask: ProbeAsk) -> Score:
        """Returns a score, measured now where nobody has, and charges it."""
        wish = self._wish(ask)
        self.session.measurer.doing = self.budget.progress(self.session.time_left(self.budget))
        self.budget.charge(wish.changes, ask.n)
        return self.session.score(wish.changes, wish.nll, wish.kld, wish.label)

    def _wish(self, ask: ProbeAsk) -> Wish:
        session = self.session
        chunks = session.few[: ask.n]
        return Wish(
            nll=chunks,
            kld=chunks,
            changes=ask.probe.changes(session.layout, session.goal.anchor),
            label=f"{ask.probe.part.name}:{ask.probe.qtype}, the rest at {session.goal.anchor}",
        )


@contextmanager
def open_session(workspace: Workspace, goal: Budget, method: Method | None = None) -> Iterator[Session]:
    """Opens what scoring needs; the source's predictions are kept on disk meanwhile.

    Raises BadInput where the text, the disk for predictions or the source itself allow no comparison.
    """
    if method is None:
        swaps = _swaps(workspace, goal.types, goal.anchor)
        method = Method() if swaps else Method.of_slow_switches()
    corpus = workspace.selection
    if corpus.n_chunks < 2:
        raise BadInput(
            f"{corpus.path}: {corpus.n_chunks} chunk of {corpus.ctx} tokens says nothing of more text; "
            "give a longer --select-text or a smaller --ctx"
        )
    order = chunk_order(corpus.n_chunks, workspace.settings.seed)
    limit = int(goal.passes * corpus.n_chunks)
    affordable = int(method.reference_share * limit / 3)  # of source, anchor and base each
    wanted = order[: max(2, min(method.plan_kld_chunks, affordable))]
    with measuring(workspace, workspace.source_variant, wanted) as measurer:
        n_kept = len(measurer.cache.chunks) if measurer.cache else 0
        if n_kept < 2:
            raise BadInput("--kld-cache: too small for the predictions of two chunks; give it more")
        if not np.isfinite(measurer.nll(workspace.source_variant, wanted[:n_kept])).all():
            source = workspace.settings.source
            raise BadInput(f"{source}: its own logits are not finite; there is nothing to compare with")
        yield Session(
            workspace=workspace,
            goal=goal,
            method=method,
            measurer=measurer,
            few=wanted[:n_kept],
            many=order[: method.plan_nll_chunks],
            limit=limit,
        )


def measure_curves(workspace: Workspace, session: Session) -> Curves:
    """Measures every role at every type, then layers apart where they differ, until the passes are spent."""
    goal = session.goal
    method = session.method
    probes = check_probes(workspace.layout, goal, str(workspace.settings.source))
    _tell_left_out(workspace, goal.anchor)
    _tell_anchor(workspace, goal)
    tried = [probe.part.at(probe.qtype) for probe in probes]
    anchored = workspace.layout.anchored(goal.anchor)
    workspace.check_space([anchored, *tried])
    errors = read_or_make_errors(workspace, goal, method)
    session.tried = (anchored, *tried)
    with workspace.shards_ahead(session.tried):
        return _measured(session, probes, errors)


def _measured(session: Session, probes: Sequence[Probe], errors: RoundingErrors) -> Curves:
    """Measures the probes, then layers apart, until the passes are spent."""
    workspace = session.workspace
    method = session.method
    reference = session.measure_reference()
    budget = MeasurementBudget(limit=session.limit, beforehand=3 * len(session.few))
    share = int(method.roles_share * budget.left / len(probes))
    most = max(method.least_chunks, min(method.most_chunks, share))
    reserved = int(method.fine_share * budget.limit) + 2 * most
    most = min(most, len(session.few))
    responses = measure_roles(probes, reference, method, most, session.desk(budget))
    layers = measure_layers(
        responses,
        errors,
        workspace.layout,
        reference,
        method,
        most,
        lambda: budget.left >= reserved,
    )
    responses += session.run(layers, budget)
    return curves_of(session, reference, responses, errors, budget, most)


def curves_of(
    session: Session,
    reference: Reference,
    responses: tuple[Response, ...],
    errors: RoundingErrors,
    budget: MeasurementBudget,
    most: int,
) -> Curves:
    """Puts together curves.json: what was measured, on what text, and what it cost."""
    workspace = session.workspace
    corpus = workspace.selection
    return Curves(
        base=workspace.base.label,
        text=corpus.name,
        text_sha256=corpus.sha256,
        ctx=corpus.ctx,
        seed=session.seed,
        chunks=most,
        tokens_scored=budget.spent * corpus.ctx,
        passes=budget.spent / corpus.n_chunks,
        anchor_kld=float(reference.anchor.kld.mean()),
        base_kld=float(reference.base.kld.mean()),
        base_above_anchor=reference.damage(reference.base),
        responses=responses,
        rounding=errors,
        method=session.method,
    )


def _tell_anchor(workspace: Workspace, goal: Budget) -> None:
    """Proposes a smaller anchor where only with that the GPU holds the whole model, and tells what it costs."""
    if _swaps(workspace, goal.types, goal.anchor):
        return
    sizes = {anchor: _anchored_bytes(workspace, anchor) for anchor in (goal.anchor, *WIDER_BY)}
    for anchor, wider in WIDER_BY.items():
        if sizes[anchor] < sizes[goal.anchor] and _swaps(workspace, goal.types, anchor):
            workspace.reporter.note(
                f"anchor: a model at {goal.anchor} ({size(sizes[goal.anchor])}) does not fit on the GPU, so that every "
                f"change opens a model anew. --anchor {anchor} ({size(sizes[anchor])}) fits, and groups are swapped "
                f"in place; intervals of small damages are then some {wider:.1f} times as wide"
            )
            return


def _anchored_bytes(workspace: Workspace, anchor: str) -> int:
    return workspace.layout.file_bytes(workspace.layout.anchored(anchor))


def _swaps(workspace: Workspace, types: Sequence[str], anchor: str) -> bool:
    """Whether the probes of a budget are swapped in place on a model at ``anchor``."""
    tried = [probe.part.at(probe.qtype) for probe in role_probes(workspace.layout, types, anchor)]
    return workspace.can_swap(workspace.layout.anchored(anchor), tried)


def check_probes(layout: Layout, goal: Budget, source: str) -> Sequence[Probe]:
    """Returns every role at every type asked for; BadInput before any work where there is none."""
    probes = role_probes(layout, goal.types, goal.anchor)
    if not probes:
        raise BadInput(
            f"{source}: none of its groups can be both {goal.anchor} and one of --types; "
            "give another --anchor or other --types"
        )
    return probes


def _tell_left_out(workspace: Workspace, anchor: str) -> None:
    """Notes which groups cannot be at the anchor: they are never measured and stay at their base types."""
    left = [name for name in workspace.layout.groups if not workspace.layout.legal(name, anchor)]
    if left:
        named = ", ".join(left[:_NAMED])
        workspace.reporter.note(f"{len(left)} groups cannot be {anchor} and stay at the base: {named}")
