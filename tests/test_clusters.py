"""Means and ratios over articles: equal to the plain ones without articles, and honest with them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cerebellum.stats.clusters import less_than_reference, mean_by_cluster, ratio_by_cluster
from cerebellum.stats.estimate import Estimate


def test_an_article_a_chunk_is_the_plain_mean() -> None:
    values = np.random.default_rng(1).normal(3, 1, 40)
    found, plain = mean_by_cluster(values, range(40)), Estimate.of(values)
    assert (found.mean, found.se, found.n) == pytest.approx((plain.mean, plain.se, plain.n))


def test_by_hand() -> None:
    """Sums of articles 4, 8 over 4, 4: r = 1.5, residuals -2 and 2, se^2 = 2 * 8 / 64."""
    found = ratio_by_cluster(np.array([1.0, 3.0, 8.0]), np.array([1.9, 2.1, 4.0]), [7, 7, 9])
    assert (found.mean, found.n) == (1.5, 2)
    sums = mean_by_cluster(np.array([1.0, 3.0, 8.0]), [7, 7, 9])
    assert sums.mean == 4 and sums.se == pytest.approx(math.sqrt(2 * (4**2 + 4**2)) / 3)
    assert found.se == math.inf  # two articles do not show that the reference is above zero
    many = ratio_by_cluster(
        np.tile([1.0, 3.0, 8.0], 20), np.tile([1.9, 2.1, 4.0], 20), np.repeat(np.arange(40), [2, 1] * 20)
    )
    assert many.se == pytest.approx(math.sqrt(40 / 39 * 40 * 4) / 160)


def test_a_copied_chunk_teaches_nothing() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(1, 1, 30)
    once = mean_by_cluster(values, range(30))
    copied = mean_by_cluster(np.repeat(values, 5), np.repeat(np.arange(30), 5))
    assert copied.se == pytest.approx(once.se)
    assert Estimate.of(np.repeat(values, 5)).se < once.se / 2


def test_what_is_hard_for_both_has_no_error() -> None:
    reference = np.random.default_rng(3).gamma(4, 1, 50)
    assert ratio_by_cluster(0.6 * reference, reference, range(50)).se == pytest.approx(0, abs=1e-12)
    assert less_than_reference(0.6 * reference, reference, range(50)).mean == pytest.approx(40)


def test_no_bounds_against_nothing() -> None:
    rng = np.random.default_rng(4)
    assert ratio_by_cluster(rng.normal(1, 1, 30), rng.normal(0, 1, 30), range(30)).se == math.inf
    assert ratio_by_cluster(np.ones(3), np.ones(3), [0, 0, 0]).se == math.inf
    with pytest.raises(ValueError, match="2 clusters"):
        ratio_by_cluster(np.ones(3), np.ones(3), [0, 0])


def test_ninety_five_percent_of_intervals_hold_it() -> None:
    """Sixty articles of 3 to 20 chunks, each with a level of its own; chunks as independent would miss a third."""
    rng = np.random.default_rng(5)
    held = plain = 0
    for _ in range(400):
        clusters = np.repeat(np.arange(60), rng.integers(3, 21, 60))
        level = rng.gamma(8, 0.125, 60)[clusters]
        share = 0.6 + 0.2 * rng.standard_normal(60)[clusters]
        reference = level * rng.gamma(8, 0.125, len(clusters))
        values = reference * share + 0.2 * rng.standard_normal(len(clusters))
        found = ratio_by_cluster(values, reference, clusters).interval()
        alone = ratio_by_cluster(values, reference, range(len(clusters))).interval()
        held += found.low <= 0.6 <= found.high
        plain += alone.low <= 0.6 <= alone.high
    assert 0.915 <= held / 400 <= 0.985
    assert plain / 400 < 0.8
