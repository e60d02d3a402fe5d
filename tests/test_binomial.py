"""Accuracies against published values and properties that must hold."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from cerebellum.stats.binomial import (
    bonett_price,
    detectable_difference,
    mcnemar_exact,
    paired,
    smallest_significant,
    wilson,
)
from cerebellum.stats.holm import holm


def test_wilson_is_the_textbook_interval() -> None:
    found = wilson(8750, 10042)
    z, n, p = 1.959963984540054, 10042, 8750 / 10042
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-12)


def test_wilson_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        wilson(0, 0)


@pytest.mark.parametrize(
    ("b", "c", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (10, 2, 0.03857421875)]
)
def test_mcnemar_is_exact(b: int, c: int, p: float) -> None:
    assert mcnemar_exact(b, c) == pytest.approx(p)
    assert mcnemar_exact(c, b) == pytest.approx(p)


def test_bonett_price_of_their_formula() -> None:
    low, high = bonett_price(12, 2, 50)
    p_a, p_b = 13 / 52, 3 / 52
    half = 1.959963984540054 * math.sqrt((p_a + p_b - (p_a - p_b) ** 2) / 52)
    assert (low, high) == pytest.approx((p_a - p_b - half, p_a - p_b + half))


answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300)


@given(answers)
def test_swapping_the_models_turns_the_sign(rows: list[tuple[bool, bool]]) -> None:
    a, b = [x for x, _ in rows], [y for _, y in rows]
    one, other = paired(a, b), paired(b, a)
    assert one.difference == -other.difference == (sum(a) - sum(b)) / len(a)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert one.p_value == pytest.approx(other.p_value)
    assert one.low <= one.difference + 0.05 and one.difference - 0.05 <= one.high


@given(st.integers(0, 400), st.integers(400, 4000))
def test_the_smallest_significant_difference_is_exactly_that(discordant: int, n: int) -> None:
    found = smallest_significant(discordant, n)
    if found is None:
        assert mcnemar_exact(0, discordant) >= 0.05
        return
    net = round(found * n)
    rarer = (discordant - net) // 2
    assert mcnemar_exact(rarer, discordant - rarer) < 0.05
    assert mcnemar_exact(rarer + 1, discordant - rarer - 1) >= 0.05


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm([0.2, 0.0001], 0.05) == [False, True]
    assert holm([0.04]) == [True] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_bonferroni_and_each_alone(p_values: list[float]) -> None:
    for p, found in zip(p_values, holm(p_values), strict=True):
        assert (p < 0.05 / len(p_values)) <= found <= (p <= 0.05)


def test_detectable_difference_has_the_power_it_says() -> None:
    """By enumeration: McNemar's exact test finds the detectable difference about 80% of the time."""
    n, psi = 2000, 0.1
    d = detectable_difference(n, psi)
    share_a = (psi + d) / 2 / psi
    power = 0.0
    for total in range(int(n * psi * 0.6), int(n * psi * 1.4)):
        limit = binom.ppf(0.025, total, 0.5) - 1
        rejected = binom.cdf(limit, total, share_a) + binom.sf(total - limit - 1, total, share_a)
        power += binom.pmf(total, n, psi) * rejected
    assert 0.74 < power < 0.84


@given(st.integers(10, 20000), st.floats(0.001, 1.0))
def test_more_questions_show_smaller_differences(n: int, psi: float) -> None:
    assert detectable_difference(2 * n, psi) <= detectable_difference(n, psi) + 1e-9


@pytest.mark.parametrize("n", [3, 5, 40, 100])
def test_a_few_questions_that_all_agree_promise_nothing(n: int) -> None:
    """Fewer than six pairs that disagree are never significant, so nothing under 6 / n can be detectable."""
    found = paired([True] * n, [True] * n)
    assert min(1.0, 6 / n) <= found.detectable <= 1
