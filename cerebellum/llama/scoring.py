"""Logits to nats, on a worker thread while the next chunk decodes.

NumPy and llama.cpp both let go of the GIL, so decoding chunk n + 1 and the log-sum-exp of chunk n
run at the same time on CPU and GPU alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cerebellum.llama.engine import Logits, Tokens

_ROWS_AT_ONCE = 16  # keeps the temporary of a 152k vocabulary under 10 MB

Item = TypeVar("Item")
Result = TypeVar("Result")


def token_nll(logits_SV: Logits, targets_S: Tokens) -> NDArray[np.float64]:
    """Negative log-likelihood of each target, nats, shape (S,).

    As llama-perplexity's log_softmax: float32 exponentials of the logits less their maximum, summed
    in float64. A row that holds a NaN or infinity gives NaN.
    """
    return -target_log_probs(logits_SV, targets_S)


def target_log_probs(logits_SV: Logits, targets_S: Tokens) -> NDArray[np.float64]:
    """Log-probability of each target, nats, shape (S,)."""
    top_S, log_sum_S = log_normalizer(logits_SV)
    chosen_S = logits_SV[np.arange(len(targets_S)), targets_S]
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is the answer
        return (chosen_S - top_S).astype(np.float64) - log_sum_S


def log_normalizer(logits_SV: Logits) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """(row maximum, log of the sum of exp(logit - maximum)), each (S,); NaN where a row is not finite."""
    top_S = logits_SV.max(axis=1)
    log_sum_S = np.empty(len(logits_SV))
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(logits_SV), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            exps = np.exp(logits_SV[rows] - top_S[rows, None])
            log_sum_S[rows] = np.log(exps.sum(axis=1, dtype=np.float64))
    return top_S, log_sum_S


def divergence(base_SV: Logits, other_SV: Logits) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(KL divergence of other from base in nats, whether the top tokens agree), each (S,).

    KL(P || Q) = sum_v P(v) (ln P(v) - ln Q(v)) with P the base.
    """
    kld_S = np.empty(len(base_SV))
    for start in range(0, len(base_SV), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        log_p, log_q = _log_softmax(base_SV[rows]), _log_softmax(other_SV[rows])
        kld_S[rows] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1, dtype=np.float64)
    return kld_S, base_SV.argmax(axis=1) == other_SV.argmax(axis=1)


def _log_softmax(logits_SV: Logits) -> NDArray[np.float32]:
    top_S, log_sum_S = log_normalizer(logits_SV)
    shifted: NDArray[np.float32] = logits_SV - (top_S + log_sum_S.astype(np.float32))[:, None]
    return shifted


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
