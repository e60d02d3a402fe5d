"""Are the verdicts as sure as they claim? Real per-chunk differences, replayed in random orders.

``record`` scores every (group, type) on the whole text once, through the ordinary ledger. ``replay``
then runs the very race that `measure` runs, on thousands of other orders of the same chunks, where the
truth (the mean over the whole text) is known: wrong verdicts, chunks used, coverage at every look.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import cerebellum, save
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cerebellum.measure.race import RaceSettings, race
from cerebellum.settings import DEMO_MODEL, SELECTION_TEXT
from cerebellum.stats.paired import as_nats, as_percent
from cerebellum.stats.sequential import StoppingRule, union_share
from cerebellum.verdicts import SENSITIVE, TOLERANT, UNDECIDED, Measurement, Threshold
from cerebellum.workspace import Workspace

FAMILIES = (("Q3_K_M", "Q2_K"), ("Q4_K_M", "Q3_K"))
VECTORS = Path(__file__).parent / "results" / "replay_vectors.npz"

Family = dict[str, NDArray[np.float64]]
"""Group -> paired difference of every chunk of the text, nats/token."""


def record(asked: argparse.Namespace) -> None:
    """The full-text vectors of every family -> results/replay_vectors.npz."""
    vectors = {}
    for base, kind in FAMILIES:
        folder = asked.folder / f"{base}-{kind}"
        flags = ["--base", base, "--demote", kind, "--select-text", asked.text, "--imatrix-chunks", "100"]
        cerebellum("measure", asked.model, "-o", folder, *flags, "--chunks", str(10**6))
        for group, difference in read_vectors(folder, kind).items():
            vectors[f"{base}/{kind}/{group}"] = difference.astype(np.float32)
        print(f"recorded {base} to {kind}", flush=True)
    np.savez_compressed(VECTORS, **vectors)


def read_vectors(folder: Path, kind: str) -> Family:
    """Paired differences out of the ledger of a run folder."""
    from cerebellum.measure.measurer import Measurer
    from cerebellum.progress import Silent

    workspace = Workspace.reopen(folder, Silent())
    measurer = Measurer(workspace.engine, workspace.ledger, workspace.selection)
    everything = range(workspace.selection.n_chunks)
    base = measurer.chunk_means(workspace.shards.variant({}), everything)
    names = [name for name in workspace.layout.groups if workspace.layout.why_not(name, kind) is None]
    return {
        name: measurer.chunk_means(workspace.shards.variant({name: kind}), everything) - base
        for name in names
    }


def load() -> dict[str, Family]:
    families: dict[str, Family] = {}
    with np.load(VECTORS) as stored:
        for key in stored:
            base, kind, group = key.split("/")
            families.setdefault(f"{base} to {kind}", {})[group] = stored[key].astype(np.float64)
    return families


@dataclass
class Tally:
    """Counts over all replays of one family at one threshold."""

    family_errors: int = 0
    wrong: int = 0
    undecided: int = 0
    near: int = 0
    verdicts: int = 0
    chunks: int = 0
    base_chunks: int = 0
    uncovered: int = 0
    looks: int = 0


def replay_once(
    family: Family, order: NDArray[np.int64], threshold: Threshold, alpha: float
) -> tuple[Measurement, ...]:
    """One race over one order; the answers come from the recorded vectors."""
    population = len(order)
    settings = RaceSettings(
        order=tuple(int(i) for i in order),
        max_chunks=population,
        threshold=threshold,
        rule=StoppingRule(alpha=union_share(alpha, len(family)), population=population),
    )
    racing = race([{group: "demoted"} for group in family], settings)
    ask = next(racing)
    try:
        while True:
            chunks = list(ask.chunks)
            vector = family[next(iter(ask.changes))][chunks] if ask.changes else np.zeros(len(chunks))
            ask = racing.send(vector)
    except StopIteration as stop:
        found: tuple[Measurement, ...] = stop.value
        return found


def count(
    tally: Tally, found: tuple[Measurement, ...], truth: dict[str, float], threshold: Threshold
) -> None:
    """Adds one race. A verdict is wrong when the truth lies beyond the limit and its indifference."""
    wrong = 0
    for measurement in found:
        assert measurement.delta is not None
        true = truth[next(iter(measurement.changes))]
        verdict = threshold.verdict(measurement.delta)
        slack = threshold.indifference_pct
        wrong += verdict == TOLERANT and true >= as_nats(threshold.limit_pct + slack)
        wrong += verdict == SENSITIVE and true <= as_nats(threshold.limit_pct - slack)
        tally.undecided += verdict == UNDECIDED
        tally.near += threshold.near_tie(measurement.delta)
        tally.verdicts += 1
        tally.chunks += measurement.delta.n
        tally.uncovered += any(not look.low <= true <= look.high for look in measurement.trace)
        tally.looks += len(measurement.trace)
    tally.base_chunks += max(m.delta.n for m in found if m.delta)
    tally.wrong += wrong
    tally.family_errors += wrong > 0


def replay(asked: argparse.Namespace) -> None:
    """Every family, every threshold, ``--orders`` random orders each."""
    rng = np.random.default_rng(asked.seed)
    rows = []
    for name, family in load().items():
        truth = {group: float(vector.mean()) for group, vector in family.items()}
        population = len(next(iter(family.values())))
        limits = [(limit, False) for limit in asked.thresholds]
        # A threshold put 0.3 points beside a group's own delta: the hardest question there is.
        hardest = sorted(truth.values())[len(truth) // 2]
        limits += [(as_percent(hardest) + 0.3, True)]
        for limit, near in limits:
            threshold = Threshold(limit_pct=limit, indifference_pct=asked.indifference)
            tally = Tally()
            for _ in range(asked.orders):
                found = replay_once(family, rng.permutation(population), threshold, asked.alpha)
                count(tally, found, truth, threshold)
            rows.append(summary(name, limit, near, population, asked.orders, tally))
            print(rows[-1], flush=True)
    save(
        "replay",
        {"orders": asked.orders, "alpha": asked.alpha, "indifference_pct": asked.indifference, "rows": rows},
    )
    show(rows)
    plot(rows)


def summary(
    family: str, limit: float, near: bool, population: int, orders: int, tally: Tally
) -> dict[str, Any]:
    scored = (tally.chunks + tally.base_chunks) / orders
    groups = tally.verdicts // orders
    return {
        "family": family,
        "threshold_pct": round(limit, 3),
        "beside_a_group": near,
        "chunks_in_text": population,
        "family_error": tally.family_errors / orders,
        "wrong_verdicts": tally.wrong / tally.verdicts,
        "undecided": tally.undecided / tally.verdicts,
        "near_ties": tally.near / tally.verdicts,
        "mean_chunks": tally.chunks / tally.verdicts,
        "tokens_ratio": (groups + 1) * population / scored,
        "series_ever_uncovered": tally.uncovered / tally.verdicts,
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "family",
        "limit",
        "any verdict wrong",
        "chunks of text",
        "fewer tokens",
        "near ties",
        "interval ever off",
    )
    for row in rows:
        table.add_row(
            row["family"],
            f"{row['threshold_pct']:g}%" + (" (beside a group)" if row["beside_a_group"] else ""),
            f"{100 * row['family_error']:.2f}%",
            f"{row['mean_chunks']:.1f} of {row['chunks_in_text']}",
            f"{row['tokens_ratio']:.1f}x",
            f"{100 * row['near_ties']:.1f}%",
            f"{100 * row['series_ever_uncovered']:.3f}%",
        )
    Console(width=120).print(table)


def plot(rows: list[dict[str, Any]]) -> None:
    """Chunks used against the threshold, a line a family -> results/replay.svg."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for family in sorted({row["family"] for row in rows}):
        mine = [row for row in rows if row["family"] == family and not row["beside_a_group"]]
        limits = [row["threshold_pct"] for row in mine]
        left.plot(limits, [row["mean_chunks"] for row in mine], marker="o", label=family)
        right.plot(limits, [100 * row["family_error"] for row in mine], marker="o", label=family)
    left.set(xlabel="limit on the increase, %", ylabel="chunks until the verdict", yscale="log")
    right.axhline(5, color="grey", linestyle="--", label="allowed")
    right.set(xlabel="limit on the increase, %", ylabel="runs with any wrong verdict, %")
    left.legend()
    right.legend()
    figure.savefig(Path(__file__).parent / "results" / "replay.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=["record", "replay"])
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--text", type=Path, default=SELECTION_TEXT)
    parser.add_argument("--folder", type=Path, default=Path("replay-runs"))
    parser.add_argument("--orders", type=int, default=2000)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--indifference", type=float, default=0.2)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    {"record": record, "replay": replay}[asked.action](asked)


if __name__ == "__main__":
    main()
