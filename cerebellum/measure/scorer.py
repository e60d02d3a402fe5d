"""Scores chunks of variants on one resident model: in the process that decides, or in a worker.

It knows no ledger. What was scored goes back to whoever asked, who writes it down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.predictions import PredictionCache
from cerebellum.engine.protocols import CannotSwap, Engine, Job, Resident, Scores, Tokens
from cerebellum.measure.bundles import Bundle
from cerebellum.shards import Variant

Inputs = Callable[[int], Tokens]
"""The number of a chunk -> the tokens that the model is fed, (ctx,)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """A chunk as scored: NLL by token, nats (S,), against the reference its KL divergence and top tokens, and the
    entropy of its predictions where that was asked for.
    """

    chunk: int
    nll: NDArray[np.float64]
    entropy: NDArray[np.float64] | None = None
    kld: NDArray[np.float64] | None = None
    same_top: NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What variants are compared with: a reference, whose predictions are kept for some chunks."""

    reference: Variant
    cache: PredictionCache


class Scorer:
    """One model stays open between calls, and other variants are swapped into it; ``note`` hears where that fails."""

    def __init__(self, engine: Engine, note: Callable[[str], None]) -> None:
        self._engine = engine
        self._note = note
        self._stack = ExitStack()
        self._model: Resident | None = None
        self._ctx = 0
        self._open_paths: tuple[Path, ...] = ()
        self._open_digest = ""
        self._refusals: set[str] = set()

    def score(
        self,
        variant: Variant,
        bundles: Sequence[Bundle],
        inputs: Inputs,
        ctx: int,
        against: Compared | None,
        *,
        entropy: bool = False,
    ) -> Iterator[Found]:
        """Scores all chunks of some decodes; ``entropy`` asks for that of predictions.

        Where predictions of the reference should be kept and are gone (after a kill, say) it is decoded again first.
        """
        if against is not None and variant.digest != against.reference.digest:
            missing = [bundle for bundle in bundles if against.cache.missing(bundle)]
            for _ in self._score(against.reference, missing, inputs, ctx, against, entropy=False):
                pass
        yield from self._score(variant, bundles, inputs, ctx, against, entropy=entropy)

    def _score(
        self,
        variant: Variant,
        bundles: Sequence[Bundle],
        inputs: Inputs,
        ctx: int,
        against: Compared | None,
        *,
        entropy: bool,
    ) -> Iterator[Found]:
        if not bundles:
            return
        model = self._opened(variant, ctx)
        for bundle in bundles:
            jobs = [
                replace(_job(variant, chunk, inputs(chunk), against), entropy=entropy) for chunk in bundle
            ]
            for chunk, scores in zip(bundle, model.score(jobs), strict=True):
                if scores.kept is not None and against is not None:
                    against.cache.store(chunk, scores.kept)
                yield _found(chunk, scores)

    def _opened(self, variant: Variant, ctx: int) -> Resident:
        """The model that is open, with the variant's groups swapped in; a new one where that cannot be."""
        if self._model is not None and self._ctx == ctx and self._shows(self._model, variant):
            return self._model
        variant.ready()
        self.close()
        self._model = self._stack.enter_context(self._engine.resident(variant.paths, ctx))
        self._ctx = ctx
        self._open_paths = variant.paths
        self._open_digest = variant.digest
        return self._model

    def _shows(self, model: Resident, variant: Variant) -> bool:
        """Whether the model is the variant, or could be made it by a swap; where not, says why, once a reason."""
        if self._open_digest == variant.digest:
            return True
        variant.ready()
        if len(variant.paths) != len(self._open_paths) or variant.paths[0] != self._open_paths[0]:
            return False
        pairs = zip(variant.paths, self._open_paths, strict=True)
        try:
            model.swap([path for path, opened in pairs if path != opened])
        except CannotSwap as error:
            if str(error) not in self._refusals:
                self._refusals.add(str(error))
                self._note(f"variants are opened afresh, not swapped in: {error}")
            return False
        self._open_digest = variant.digest
        return True

    def close(self) -> None:
        """Frees the open model. The scorer can be used again."""
        self._stack.close()
        self._model = None
        self._open_digest = ""


def _job(variant: Variant, chunk: int, tokens: Tokens, against: Compared | None) -> Job:
    """What to ask of a chunk: the reference keeps its predictions, all others are compared with them."""
    if against is None:
        return Job(tokens_T=tokens)
    if variant.digest == against.reference.digest:
        return Job(tokens_T=tokens, keep=bool(against.cache.missing([chunk])))
    return Job(tokens_T=tokens, against=against.cache.load(chunk))


def _found(chunk: int, scores: Scores) -> Found:
    return Found(
        chunk=chunk,
        nll=scores.nll_S,
        kld=scores.kld_S,
        same_top=scores.same_top_S,
        entropy=scores.entropy_S,
    )
