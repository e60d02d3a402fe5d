"""Logits to nats on the host: one pass over rows that fit in a core's cache, on as many threads as there are.

NumPy lets go of the GIL, so blocks of rows run side by side, and a worker can score while a model decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.protocols import Job, Logits, Scores, Tokens

_ROWS_AT_ONCE = 4  # of 152k float32 logits: 2.4 MB, within a core's cache
_RUN = 256  # float32 values summed before float64 takes over: a divergence is a small difference

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Normalized:
    """Logits (S, V) with each row's best token, its logit and the log of the sum of exp(logit - top), (S,).

    Rows that hold a NaN or infinity have a log-sum that is not finite.
    """

    logits_SV: Logits
    best_S: NDArray[np.int64]
    top_S: NDArray[np.float32]
    log_sum_S: NDArray[np.float64]

    def nll(self, targets_S: Tokens) -> NDArray[np.float64]:
        """Negative log-likelihood of each target, nats, (S,)."""
        return -self.log_probs(np.arange(len(targets_S)), targets_S)

    def log_probs(self, rows_N: NDArray[np.int64], tokens_N: NDArray[np.integer]) -> NDArray[np.float64]:
        """Log-probability of token n in row n's distribution, nats, (N,); a row may be asked again."""
        chosen_N = self.logits_SV[rows_N, tokens_N]
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is the answer
            return np.asarray((chosen_N - self.top_S[rows_N]).astype(np.float64) - self.log_sum_S[rows_N])


class BlockMap(Protocol):
    """``map`` itself, or the ``map`` of an executor."""

    def __call__(self, work: Callable[[slice], None], blocks: Iterable[slice], /) -> Iterator[None]: ...


def normalize(logits_SV: Logits, mapping: BlockMap = map) -> Normalized:
    """As llama-perplexity's log_softmax: float32 exponentials, in float64 beyond short runs.

    ``mapping`` spreads blocks of rows over threads: NumPy lets go of the GIL.
    """
    n = len(logits_SV)
    best_S = np.empty(n, np.int64)
    top_S = np.empty(n, np.float32)
    log_sum_S = np.empty(n)

    def work(rows: slice) -> None:
        block = logits_SV[rows]
        best_S[rows] = block.argmax(axis=1)
        top_S[rows] = block[np.arange(len(block)), best_S[rows]]
        with np.errstate(invalid="ignore", over="ignore"):
            exps = block - top_S[rows, None]
            log_sum_S[rows] = np.log(_sums(np.exp(exps, out=exps)))

    for _ in mapping(work, _row_blocks(logits_SV)):
        pass
    return Normalized(logits_SV=logits_SV, best_S=best_S, top_S=top_S, log_sum_S=log_sum_S)


def token_nll(logits_SV: Logits, targets_S: Tokens) -> NDArray[np.float64]:
    """Negative log-likelihood of each target, nats, shape (S,); NaN in a row that is not finite."""
    return normalize(logits_SV).nll(targets_S)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a base model predicts, in the form that makes KL divergences from it cheap.

    ``probabilities_SV`` float32, ``neg_entropy_S`` sum of p ln p in nats, ``top_S`` most likely token.
    """

    probabilities_SV: NDArray[np.float32]
    neg_entropy_S: NDArray[np.float64]
    top_S: NDArray[np.int64]

    @property
    def n_bytes(self) -> int:
        return int(self.probabilities_SV.nbytes)

    def close(self) -> None:
        """Nothing: main memory goes with the last who holds it."""


def predict(base: Normalized, mapping: BlockMap = map) -> Prediction:
    """The base's probabilities, worked out once for all variants."""
    probabilities_SV = np.empty_like(base.logits_SV)
    neg_entropy_S = np.empty(len(base.logits_SV))

    def work(rows: slice) -> None:
        exact = base.top_S[rows] + base.log_sum_S[rows]
        rounded = exact.astype(np.float32)
        log_p = base.logits_SV[rows] - rounded[:, None]
        with np.errstate(invalid="ignore"):
            p = np.exp(log_p)
            p /= _sums(p)[:, None].astype(np.float32)  # a millionth short of 1 would show
            probabilities_SV[rows] = p
            neg_entropy_S[rows] = _dot(p, log_p) + (rounded - exact)

    for _ in mapping(work, _row_blocks(base.logits_SV)):
        pass
    return Prediction(probabilities_SV=probabilities_SV, neg_entropy_S=neg_entropy_S, top_S=base.best_S)


def divergence(base: Prediction, other: Normalized) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(KL divergence of other from base in nats, whether the top tokens agree), each (S,).

    KL(P || Q) = sum p ln p - sum p (logit - max) + log-sum: one pass over the logits, no exponential.
    """
    kld_S = np.empty(len(other.logits_SV))
    for rows in _row_blocks(other.logits_SV):
        shifted = other.logits_SV[rows] - other.top_S[rows, None]
        kld_S[rows] = base.neg_entropy_S[rows] - _dot(base.probabilities_SV[rows], shifted)
    return kld_S + other.log_sum_S, base.top_S == other.best_S


def score_rows(logits_SV: Logits, job: Job, mapping: BlockMap = map) -> Scores:
    """All that a job asks of its chunk's logits: NLL, divergence and agreement in one pass over them."""
    if job.keep or job.entropy:
        return _scored_with_probabilities(logits_SV, job, mapping)
    reference = job.against if isinstance(job.against, Prediction) else None
    n = len(logits_SV)
    nll_S = np.empty(n)
    kld_S = np.zeros(n)
    best_S = np.empty(n, np.int64)

    def work(rows: slice) -> None:
        block = logits_SV[rows]
        each = np.arange(len(block))
        best_S[rows] = block.argmax(axis=1)
        with np.errstate(
            invalid="ignore", over="ignore"
        ):  # what is not finite gives NaN, which is the answer
            shifted = block - block[each, best_S[rows], None]
            chosen = shifted[each, job.targets[rows]].astype(np.float64)
            if reference is not None:
                cross = _dot(reference.probabilities_SV[rows], shifted)
                kld_S[rows] = reference.neg_entropy_S[rows] - cross
            log_sum = np.log(_sums(np.exp(shifted, out=shifted)))
            nll_S[rows] = log_sum - chosen
            kld_S[rows] += log_sum

    for _ in mapping(work, _row_blocks(logits_SV)):
        pass
    if reference is None:
        return Scores(nll_S=nll_S)
    return Scores(nll_S=nll_S, kld_S=kld_S, same_top_S=reference.top_S == best_S)


def _scored_with_probabilities(logits_SV: Logits, job: Job, mapping: BlockMap) -> Scores:
    """All that a job asks of its chunk's logits where their probabilities are wanted too."""
    own = normalize(logits_SV, mapping)
    kept = predict(own, mapping)
    found = Scores(
        nll_S=own.nll(job.targets),
        entropy_S=-kept.neg_entropy_S if job.entropy else None,
        kept=kept if job.keep else None,
    )
    if not isinstance(job.against, Prediction):
        return found
    kld_S, same_top_S = divergence(job.against, own)
    return replace(found, kld_S=kld_S, same_top_S=same_top_S)


def _sums(a_RV: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row sums: short runs in float32, which is fast, and their sums in float64, (R,)."""
    whole = a_RV.shape[1] // _RUN * _RUN
    runs = a_RV[:, :whole].reshape(len(a_RV), -1, _RUN)
    tail = a_RV[:, whole:].sum(axis=1, dtype=np.float64)
    return np.asarray(np.add.reduce(runs, axis=2).sum(axis=1, dtype=np.float64) + tail)


def _dot(a_RV: NDArray[np.float32], b_RV: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row-wise products, summed as ``_sums`` does, (R,)."""
    whole = a_RV.shape[1] // _RUN * _RUN
    shape = (len(a_RV), -1, _RUN)
    runs = np.einsum("rnk,rnk->rn", a_RV[:, :whole].reshape(shape), b_RV[:, :whole].reshape(shape))
    tail = np.multiply(a_RV[:, whole:], b_RV[:, whole:], dtype=np.float64).sum(axis=1)
    return np.asarray(runs.sum(axis=1, dtype=np.float64) + tail)


def _row_blocks(rows: Logits) -> Iterator[slice]:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        yield slice(start, start + _ROWS_AT_ONCE)


def overlapped(items: Iterator[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """``work`` of every item, in order, while the next item is being made on this thread."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        pending: Future[Result] | None = None
        for item in items:
            future = worker.submit(work, item)
            if pending is not None:
                yield pending.result()
            pending = future
        if pending is not None:
            yield pending.result()
