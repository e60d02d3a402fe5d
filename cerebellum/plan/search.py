"""The proposals that were measured whole so far, and what is to be known of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from cerebellum.layout import Layout
from cerebellum.measure.curves import Planning, Reference, Score, WholeAsk
from cerebellum.plan.allocation import Proposal
from cerebellum.plan.damage import WholePlan, base_point
from cerebellum.settings import Objective
from cerebellum.verdicts import Batch


@dataclass(kw_only=True)
class Search:
    """The proposals that were measured so far, in order, each combination once, and the ``base`` they start from."""

    base: Score
    reference: Reference
    proposals: list[Proposal] = field(default_factory=list)

    def measure(self, *proposals: Proposal | None) -> Planning[None]:
        """Asks for the scores of proposals, but for those that are none, are known, or are the base itself."""
        known = [{}, *(each.changes for each in self.proposals)]
        new: list[Proposal] = []
        for proposal in proposals:
            if proposal is not None and proposal.changes not in known:
                new.append(proposal)
                known.append(proposal.changes)
        if not new:
            return
        scores = yield Batch(asks=tuple(WholeAsk(changes=proposal.changes) for proposal in new))
        self.proposals += [one.scored(score, self.base) for one, score in zip(new, scores, strict=True)]

    def best(self, objective: Objective) -> Proposal | None:
        """Returns the best measured proposal, or None where all collapsed."""
        best = min(self.proposals, key=lambda proposal: proposal.badness(objective), default=None)
        return best if best is not None and best.measured(objective) is not None else None

    def above_anchor(self, proposal: Proposal, objective: Objective) -> float | None:
        """Returns the measured damage of a proposal above the anchor's, nats a token."""
        if proposal.score is None:
            return None
        damage = self.reference.damage_of_plan(proposal.score, self.base).damage(objective)
        return None if damage is None else damage.mean

    def lessons(self) -> list[WholePlan]:
        """Returns the measured proposals as a damage model learns from them: by their damage above the anchor's."""
        scores = [(each.changes, each.score) for each in self.proposals if each.score is not None]
        damages = [(changes, self.reference.damage_of_plan(score, self.base)) for changes, score in scores]
        return [WholePlan(changes=changes, kld=found.kld, nll=found.nll) for changes, found in damages]

    def with_base(self, layout: Layout, file_bytes: int) -> tuple[Proposal, ...]:
        """Returns all proposals, and the unchanged base if it fits: nothing changed, nothing lost."""
        points = tuple(base_point(name, layout) for name in layout.groups)
        base = Proposal(how="the base itself", points=points, file_bytes=layout.file_bytes())
        fitting = [base.scored(self.base, self.base)] if base.file_bytes <= file_bytes else []
        return (*self.proposals, *fitting)
