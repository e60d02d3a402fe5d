"""transfer.json: what became of one model's plan on another's weights. Types only; reading it loads no engine."""

from __future__ import annotations

from typing import Literal

from cerebellum.codec import Artifact, Record

Bounds = tuple[float, float]

Verdict = Literal["holds", "broken", "open"]
HOLDS: Verdict = "holds"
BROKEN: Verdict = "broken"
OPEN: Verdict = "open"
"""Whether a promise surely holds on other weights, surely does not, or was not told apart by the chunks read."""


class Figure(Record, frozen=True, kw_only=True):
    """A number with its interval; None where it collapsed or was not measured."""

    mean: float | None
    ci: Bounds | None


class GroupAgain(Record, frozen=True, kw_only=True):
    """A group, or a role, that was measured again: what it cost before and what it costs now, in one unit.

    Of a limit that is the change of perplexity in percent, of a budget the KL divergence above the anchor's, nats a
    token. ``differs`` says that the two are surely not the same.
    """

    name: str
    type: str
    before: Figure
    now: Figure
    differs: bool


class Transferred(Artifact, frozen=True, kw_only=True):
    """transfer.json.

    ``promise`` says in words what the plan promised on its own model, ``over`` how far the finetune is over it, nats
    a token (below zero: the promise holds), paired on ``chunks`` chunks of the selection text. ``before_pct`` and
    ``now_pct`` are the changes of perplexity against each model's own base. ``before_share`` and ``now_share`` say
    how much of the base's KL divergence from its source the plan has; None where the run had a limit. ``fits`` says
    whether the file is within the budget, which a longer header may prevent. ``revised`` says that the plan shipped
    is another one, and ``again`` which groups were measured for it.
    """

    format: Literal[1] = 1
    run: str
    run_source: str
    run_source_sha256: str | None
    source: str
    source_sha256: str
    promise: str
    verdict: Verdict
    over: Figure
    chunks: int
    of_chunks: int
    before_pct: Figure
    now_pct: Figure
    before_share: float | None
    now_share: float | None
    fits: bool
    revised: bool
    again: tuple[GroupAgain, ...]
