"""Means and ratios of means over chunks that come in articles: neighbours resemble each other, articles do not.

Chunks of one article share its topic, so they say less than as many chunks of different articles. What is taken for
independent is therefore the article: an estimate is the ratio of two sums over articles, and its error that of the
articles' residuals (Cochran, Sampling Techniques, 1977, 2.11 and 6.8; sandwich estimators of generalised estimating
equations come to the same). Student's quantile for the number of articles pays for there being few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cerebellum.stats.estimate import Estimate
from cerebellum.stats.paired import Floats


def mean_by_cluster(values_N: Floats, clusters_N: Sequence[int]) -> Estimate:
    """Returns the mean of one value a chunk, (N,), with the error of whole articles; ``n`` counts articles.

    ``clusters_N`` numbers the article of each chunk. With an article a chunk it is ``Estimate.of``.
    """
    return _ratio(np.asarray(values_N, np.float64), np.ones(len(values_N)), clusters_N)


def ratio_by_cluster(values_N: Floats, reference_N: Floats, clusters_N: Sequence[int]) -> Estimate:
    """Returns mean(values) / mean(reference) over the same chunks, with the error of both; ``n`` counts articles.

    With T_c and R_c the sums over article c of C, and r = sum T / sum R, the error of r is

        se^2 = C/(C-1) sum (T_c - r R_c)^2 / (sum R_c)^2,

    the linearised ratio estimator: a chunk that is hard for both models moves both sums and has no residual, and the
    reference's own uncertainty counts. To say how much less one file loses than another, give each file's loss
    above the source on every chunk; the share saved is 1 - r, with the same error. Where the reference is not surely
    above zero (95%), a ratio to it has no bounds, and the error has no end.
    """
    values = np.asarray(values_N, np.float64)
    reference = np.asarray(reference_N, np.float64)
    found = _ratio(values, reference, clusters_N)
    if mean_by_cluster(reference, clusters_N).interval().low > 0:
        return found
    return Estimate(mean=found.mean, se=math.inf, n=found.n)


def less_than_reference(values_N: Floats, reference_N: Floats, clusters_N: Sequence[int]) -> Estimate:
    """Returns how much smaller a mean is than a reference's, in percent of that: 100 (1 - ``ratio_by_cluster``)."""
    ratio = ratio_by_cluster(values_N, reference_N, clusters_N)
    return Estimate(mean=100 * (1 - ratio.mean), se=100 * ratio.se, n=ratio.n)


def _ratio(values: Floats, reference: Floats, clusters_N: Sequence[int]) -> Estimate:
    """Returns sum(values) / sum(reference) with the error of the residuals' sums by cluster."""
    if not len(values) == len(reference) == len(clusters_N):
        raise ValueError(f"{len(values)} values, {len(reference)} references, {len(clusters_N)} clusters")
    ids, place_N = np.unique(np.asarray(clusters_N), return_inverse=True)
    count = len(ids)
    total = float(reference.sum())
    ratio = float(values.sum()) / total if total else math.nan
    residual_C = np.bincount(place_N, weights=values - ratio * reference, minlength=count)
    if count < 2 or not total:
        return Estimate(mean=ratio, se=math.inf, n=count)
    spread = math.sqrt(count / (count - 1) * float((residual_C**2).sum()))
    return Estimate(mean=ratio, se=spread / abs(total), n=count)
