"""How much wider intervals are by article than by chunk: the recorded vectors of budget.py, no model runs.

`verify`, `compare` and encoder_quality.py take chunks for independent. Chunks of one article resemble each other, so
that an interval which takes articles for independent is the wider one, and the more so the more chunks of an article
are read. Draws of N chunks at random are those of `--report-chunks N`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common import RESULTS, Vector

from cerebellum.stats.clusters import mean_by_cluster
from cerebellum.stats.paired import superpopulation_interval

DRAWS = 60


def ratio(change: Vector, article: Vector, chunks: int, random: np.random.Generator) -> float:
    """Returns the width of the interval by article over that by chunk, the mean over random draws of chunks."""
    found = []
    for _ in range(DRAWS if chunks < len(change) else 1):
        drawn = random.permutation(len(change))[:chunks]
        ours = superpopulation_interval(change[drawn])
        wide = mean_by_cluster(change[drawn], [int(number) for number in article[drawn]]).interval()
        found.append((wide.high - wide.low) / (ours.high - ours.low))
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--chunks", type=int, nargs="+", default=[100, 200, 736])
    asked = parser.parse_args()
    print("| change from the preset | " + " | ".join(f"{chunks} chunks" for chunks in asked.chunks) + " |")
    print("| --- |" + " --- |" * len(asked.chunks))
    random = np.random.default_rng(0)
    for path in sorted(Path(RESULTS).glob("budget-*.npz")):
        vectors = np.load(path)
        for key in vectors.files:
            name, _, kind = key.partition("/")
            if kind and name != "preset":
                change = vectors[key].astype(np.float64) - vectors[f"preset/{kind}"]
                told = [f"{ratio(change, vectors['article'], chunks, random):.2f}" for chunks in asked.chunks]
                print(f"| {path.stem.removeprefix('budget-')}, {name}: {kind} | " + " | ".join(told) + " |")


if __name__ == "__main__":
    main()
