"""Measures parts and plans for a budget: on the first chunks of the seeded order, against the source.

The source's own predictions are kept on disk meanwhile. What parts may cost is limited; plans as a whole are
few, and get more chunks: what ships deserves more than its parts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from cerebellum.errors import BadInput
from cerebellum.measure.curves import Response, Score, Tried, Yardstick, anchored, measure_response
from cerebellum.measure.measurer import Measurer, measuring
from cerebellum.measure.race import Changes, chunk_order
from cerebellum.workspace import Workspace

_WHOLE_KLD_CHUNKS, _WHOLE_NLL_CHUNKS = 48, 96
_YARDSTICK_SHARE = 0.2  # of the passes at most, for the source, the anchor and the base


@dataclass
class Purse:
    """Chunks that may be scored for curves, and those that were; a chunk of a variant counts once."""

    limit: int
    spent_on: dict[frozenset[tuple[str, str]], int] = field(default_factory=dict)
    opened: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> int:
        return sum(self.spent_on.values())

    @property
    def left(self) -> int:
        return self.limit - self.spent

    def progress(self, measured: int) -> str:
        """For people: the share that is spent and, from the pace of ``measured`` chunks, the time left."""
        told = f"curves {100 * self.spent / self.limit:.0f}%"
        if measured:
            left = (time.monotonic() - self.opened) / measured * max(self.left, 0)
            told += f", {left / 60:.0f} min left at most" if left > 90 else f", {left:.0f} s left at most"
        return f"{told}: "

    def pay(self, changes: Changes, n: int) -> None:
        key = frozenset(changes.items())
        self.spent_on[key] = max(n, self.spent_on.get(key, 0))


@dataclass(kw_only=True)
class Session:
    """Scores variants on the first chunks of the seeded order, against the source's own predictions.

    ``few`` chunks have those predictions on disk: parts get the first of them, plans all, and the NLL of
    plans is known on ``many``.
    """

    workspace: Workspace
    measurer: Measurer
    purse: Purse
    few: tuple[int, ...]
    many: tuple[int, ...]

    def alone(self, changes: Changes, n: int, label: str = "") -> Score:
        """For a part: paid for."""
        self.measurer.doing = self.purse.progress(self.measurer.measured)
        self.purse.pay(changes, n)
        return self._score(changes, self.few[:n], self.few[:n], label)

    def whole(self, changes: Changes) -> Score:
        self.measurer.doing = "whole plans: "
        return self._score(changes, self.many, self.few)

    @cached_property
    def yardstick(self) -> Yardstick:
        """The anchor and the base on all of ``few``."""
        sizes, settings = self.workspace.sizes, self.workspace.settings
        self.purse.pay({"the source": ""}, len(self.few))
        anchor = self.alone(anchored(sizes, settings.anchor), len(self.few), f"all at {settings.anchor}")
        base = self.alone({}, len(self.few))
        for score, flag, kind in ((anchor, "anchor", settings.anchor), (base, "base", settings.base)):
            if not score.finite:
                raise BadInput(
                    f"{settings.source}: its logits are not finite at {kind}; give another --{flag}"
                )
        return Yardstick(anchor=anchor, base=base)

    def _score(
        self, changes: Changes, for_nll: tuple[int, ...], for_kld: tuple[int, ...], label: str = ""
    ) -> Score:
        variant = self.workspace.shards.variant(changes, label)
        kld = self.measurer.kld_means(variant, for_kld)
        return Score(nll=self.measurer.chunk_means(variant, for_nll), kld=kld)


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Measures parts at types, each on ``most`` chunks or as many as it takes."""

    session: Session
    most: int

    def measure(self, tried: Tried, largest: float = 0.0) -> Response:
        settings, sizes = self.session.workspace.settings, self.session.workspace.sizes
        part, kind = tried
        changes = {**anchored(sizes, settings.anchor), **part.at(kind)}
        label = f"{part.name}:{kind}, the rest at {settings.anchor}"
        return measure_response(
            tried, lambda n: self.session.alone(changes, n, label), self.session.yardstick, self.most, largest
        )


@contextmanager
def open_session(workspace: Workspace) -> Iterator[Session]:
    """Opens what scoring needs; the source's predictions are kept on disk meanwhile."""
    corpus, settings = workspace.selection, workspace.settings
    if corpus.n_chunks < 2:
        raise BadInput(
            f"{corpus.path}: {corpus.n_chunks} chunk of {corpus.ctx} tokens says nothing of more text; "
            "give a longer --select-text or a smaller --ctx"
        )
    order, limit = chunk_order(corpus.n_chunks, settings.seed), int(settings.curve_passes * corpus.n_chunks)
    wanted = order[: max(2, min(_WHOLE_KLD_CHUNKS, int(_YARDSTICK_SHARE * limit / 3)))]
    with measuring(workspace, workspace.source_variant, wanted) as measurer:
        n_kept = len(measurer.cache.chunks) if measurer.cache else 0
        if n_kept < 2:
            raise BadInput("--kld-cache: too small for the predictions of two chunks; give it more")
        if not np.isfinite(measurer.nll(workspace.source_variant, wanted[:n_kept])).all():
            raise BadInput(
                f"{settings.source}: its own logits are not finite; there is nothing to compare with"
            )
        yield Session(
            workspace=workspace,
            measurer=measurer,
            purse=Purse(limit),
            few=wanted[:n_kept],
            many=order[:_WHOLE_NLL_CHUNKS],
        )
