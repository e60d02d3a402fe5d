"""Logits to nats, on a worker thread while the next chunk decodes.

NumPy and llama.cpp both let go of the GIL, so decoding chunk n + 1 and the log-sum-exp of chunk n
run at the same time on CPU and GPU alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.protocols import Logits, Tokens

_ROWS_AT_ONCE = 16  # keeps the temporary of a 152k vocabulary under 10 MB

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
    """As llama-perplexity's log_softmax: float32 exponentials, summed in float64.

    ``mapping`` spreads blocks of rows over threads: NumPy lets go of the GIL.
    """
    n = len(logits_SV)
    best_S, top_S, log_sum_S = np.empty(n, np.int64), np.empty(n, np.float32), np.empty(n)

    def work(rows: slice) -> None:
        block = logits_SV[rows]
        best_S[rows] = block.argmax(axis=1)
        top_S[rows] = block[np.arange(len(block)), best_S[rows]]
        with np.errstate(invalid="ignore", over="ignore"):
            exps = np.exp(block - top_S[rows, None])
            log_sum_S[rows] = np.log(exps.sum(axis=1, dtype=np.float64))

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


def predict(base: Normalized) -> Prediction:
    """The base's probabilities, worked out once for all variants."""
    probabilities_SV = np.empty_like(base.logits_SV)
    neg_entropy_S = np.empty(len(base.logits_SV))
    for rows in _row_blocks(base.logits_SV):
        log_p = base.logits_SV[rows] - (base.top_S[rows] + base.log_sum_S[rows].astype(np.float32))[:, None]
        probabilities_SV[rows] = np.exp(log_p)
        neg_entropy_S[rows] = _dot(probabilities_SV[rows], log_p)
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


def _dot(a_SV: NDArray[np.float32], b_SV: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row-wise products summed in float64: a divergence is a small difference of large sums."""
    return np.asarray(np.multiply(a_SV, b_SV, dtype=np.float64).sum(axis=1))


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
