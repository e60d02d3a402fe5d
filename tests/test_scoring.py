"""Logits to nats, against scipy in float64, and what happens when they are not finite."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import logsumexp

from cerebellum.engine.protocols import Job
from cerebellum.engine.scoring import divergence, normalize, overlapped, predict, score_rows, token_nll

LOGITS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.floats(-200, 200, width=32),
)


@given(LOGITS, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_nll_is_logsumexp_less_the_target(logits_SV: np.ndarray, seed: int) -> None:
    targets = np.random.default_rng(seed).integers(0, logits_SV.shape[1], len(logits_SV)).astype(np.int32)
    exact = logits_SV.astype(np.float64)
    expected = logsumexp(exact, axis=1) - exact[np.arange(len(targets)), targets]
    found = token_nll(logits_SV, targets)
    assert found.dtype == np.float64 and found.shape == (len(targets),)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    assert (found >= 0).all()


@pytest.mark.parametrize("offset", [-1e30, -1e4, 1e4, 1e30])
def test_large_logits_neither_overflow_nor_lose_the_answer(offset: float) -> None:
    logits = np.full((3, 50), offset, np.float32)
    np.testing.assert_allclose(token_nll(logits, np.zeros(3, np.int32)), np.log(50), rtol=1e-6)


def test_more_rows_than_are_scored_at_once() -> None:
    logits = np.random.default_rng(0).normal(size=(100, 7)).astype(np.float32)
    targets = np.arange(100, dtype=np.int32) % 7
    apart = [token_nll(logits[i : i + 1], targets[i : i + 1])[0] for i in range(100)]
    assert np.array_equal(token_nll(logits, targets), apart)


def test_threads_change_no_bit() -> None:
    logits = np.random.default_rng(1).normal(size=(100, 70)).astype(np.float32)
    alone = normalize(logits)
    with ThreadPoolExecutor(max_workers=4) as workers:
        together = normalize(logits, workers.map)
    for name in ("best_S", "top_S", "log_sum_S"):
        assert np.array_equal(getattr(alone, name), getattr(together, name))
    rows, tokens = np.array([3, 3, 99]), np.array([0, 1, 69])
    nll = [
        token_nll(logits[r : r + 1], np.array([t], np.int32))[0] for r, t in zip(rows, tokens, strict=True)
    ]
    assert np.array_equal(-alone.log_probs(rows, tokens), nll)


@pytest.mark.parametrize("where", ["target", "elsewhere"])
def test_nan_is_nan_in_its_row_alone(where: str) -> None:
    logits = np.zeros((3, 5), np.float32)
    logits[1, 2 if where == "target" else 4] = np.nan
    nll = token_nll(logits, np.full(3, 2, np.int32))
    assert np.isnan(nll[1]) and np.isfinite(nll[[0, 2]]).all()


@pytest.mark.parametrize("column", [2, 4])
@pytest.mark.parametrize("row", ["one +inf", "all -inf"])
def test_an_infinite_row_is_not_finite_and_says_nothing_else(column: int, row: str) -> None:
    logits = np.zeros((2, 5), np.float32)
    if row == "one +inf":
        logits[0, column] = np.inf
    else:
        logits[0] = -np.inf
    nll = token_nll(logits, np.full(2, 2, np.int32))
    assert not np.isfinite(nll[0]) and nll[1] == pytest.approx(np.log(5))


def kl(base_SV: np.ndarray, other_SV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return divergence(predict(normalize(base_SV)), normalize(other_SV))


@given(LOGITS)
@settings(max_examples=40, deadline=None)
def test_divergence_of_equals_is_zero(logits_SV: np.ndarray) -> None:
    kld, same = kl(logits_SV, logits_SV.copy())
    np.testing.assert_allclose(kld, 0, atol=1e-4)  # float32 logits of up to 200
    assert same.all()


@given(LOGITS, st.floats(0.01, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_divergence_is_never_negative_and_right(logits_SV: np.ndarray, scale: float, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(size=logits_SV.shape)
    other = (logits_SV / 20 + scale * noise).astype(np.float32)
    base = (logits_SV / 20).astype(np.float32)
    log_p = base - logsumexp(base.astype(np.float64), axis=1, keepdims=True)
    log_q = other - logsumexp(other.astype(np.float64), axis=1, keepdims=True)
    kld, same = kl(base, other)
    np.testing.assert_allclose(kld, (np.exp(log_p) * (log_p - log_q)).sum(axis=1), rtol=1e-3, atol=1e-5)
    assert (kld > -1e-5).all()
    assert np.array_equal(same, base.argmax(axis=1) == other.argmax(axis=1))


def test_divergence_is_from_the_first() -> None:
    """KL((1/2, 1/2) || (3/4, 1/4)) = ln(2) - ln(3)/2 by hand; the other way round it is another number."""
    half = np.log(np.array([[0.5, 0.5]], np.float32))
    skewed = np.log(np.array([[0.75, 0.25]], np.float32))
    by_hand = np.log(2) - np.log(3) / 2
    assert kl(half, skewed)[0][0] == pytest.approx(by_hand, abs=1e-6)
    back = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert kl(skewed, half)[0][0] == pytest.approx(back, abs=1e-6)


@given(st.lists(st.integers(), max_size=20))
@settings(max_examples=30, deadline=None)
def test_overlapped_keeps_the_order(items: list[int]) -> None:
    assert list(overlapped(iter(items), lambda item: item * 2)) == [item * 2 for item in items]


def test_overlapped_works_while_the_next_is_made() -> None:
    """The second item is made only once work on the first has begun: neither waits for the other."""
    begun, made = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 1
        assert begun.wait(10)
        made.set()
        yield 2

    def work(item: int) -> int:
        begun.set()
        assert made.wait(10)
        return item

    assert list(overlapped(items(), work)) == [1, 2]


def test_overlapped_hands_on_what_went_wrong() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("the second")
        return item

    results = overlapped(iter([1, 2, 3]), work)
    assert next(results) == 1
    with pytest.raises(ValueError, match="the second"):
        list(results)


def test_overlapped_hands_on_what_the_items_raise() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(overlapped(items(), lambda item: item))


@given(LOGITS)
@settings(max_examples=60, deadline=None)
def test_entropy_is_that_of_the_predictions_and_changes_nothing_else(logits_SV: np.ndarray) -> None:
    exact = logits_SV.astype(np.float64)
    log_p = exact - logsumexp(exact, axis=1, keepdims=True)
    tokens = np.zeros(2 * len(logits_SV) + 2, np.int32)
    plain = score_rows(logits_SV, Job(tokens_T=tokens))
    asked = score_rows(logits_SV, Job(tokens_T=tokens, entropy=True))
    assert plain.entropy_S is None and asked.entropy_S is not None and asked.kept is None
    np.testing.assert_allclose(asked.entropy_S, -(np.exp(log_p) * log_p).sum(axis=1), rtol=1e-4, atol=1e-4)
    assert np.array_equal(asked.nll_S, plain.nll_S)


def test_entropy_beside_a_reference_leaves_the_divergence() -> None:
    rng = np.random.default_rng(4)
    base, other = rng.standard_normal((2, 9, 50)).astype(np.float32)
    tokens = np.zeros(20, np.int32)
    against = predict(normalize(base))
    plain = score_rows(other, Job(tokens_T=tokens, against=against))
    asked = score_rows(other, Job(tokens_T=tokens, against=against, entropy=True))
    assert plain.kld_S is not None and asked.kld_S is not None and asked.entropy_S is not None
    np.testing.assert_allclose(asked.kld_S, plain.kld_S, atol=1e-6)
    assert np.array_equal(asked.same_top_S, plain.same_top_S)
