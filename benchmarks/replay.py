"""Are the verdicts as sure as they claim? Per-chunk differences, replayed in random orders that the truth is known for.

``record`` scores every group of the embedded model on a text once, with its divergence from the base.
``replay`` then runs what `cerebellum run` runs, groups and combinations, in thousands of other orders of the
same chunks, and can fail: every vector is moved onto the wrong side of what it may be called, where each verdict
is an error. Drawn texts with skew, heavy tails, topics and outliers stand beside the recorded ones.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import save
from populations import NASTY, SCORED, VECTORS, Population, drawn, load
from rich.console import Console
from rich.table import Table

from cerebellum.measure.race import ChunkAsk, ChunkScores, RaceSettings, race
from cerebellum.plan.limit import Unit, threshold_plan
from cerebellum.stats.paired import as_nats, as_percent, superpopulation_interval
from cerebellum.stats.sequential import (
    FixedWidth,
    Rule,
    SpendingRule,
    StoppingRule,
    combination_share,
    looks,
    union_share,
)
from cerebellum.verdicts import SENSITIVE, TOLERANT, Changes, Measurement, Threshold, drive

ALPHA, INDIFFERENCE, SINGLES_SHARE, ASIDE = 0.05, 0.2, 0.5, 0.1
RESULT = Path(__file__).parent / "results" / "replay.json"
COMPARED = 8  # chunks with a divergence, as in a run


@dataclass(frozen=True, kw_only=True)
class Way:
    """A rule as a run would use it: its first look, and whether it is told the divergence."""

    name: str
    first: int
    make: Callable[[float, int, tuple[int, ...]], Rule]
    told_kld: bool = True

    def settings(
        self, order: tuple[int, ...], limit: float, alpha: float, aside: float | None = None
    ) -> RaceSettings:
        """The race of a run, at a level for each bound."""
        planned = looks(self.first, 1.5, len(order))
        return RaceSettings(
            order=order,
            looks=planned,
            threshold=Threshold(limit_pct=limit, indifference_pct=INDIFFERENCE),
            rule=self.make(alpha, len(order), planned),
            scored_per_chunk=SCORED,
            aside=self.make(aside, len(order), planned) if aside else None,
        )


def _spending(alpha: float, population: int, planned: tuple[int, ...]) -> Rule:
    return SpendingRule(alpha=alpha, population=population, looks=planned)


def _for_all_times(alpha: float, population: int, _planned: tuple[int, ...]) -> Rule:
    return StoppingRule(alpha=alpha, population=population)


BEFORE = Way(name="for all times, from 8", first=8, make=_for_all_times)
SHIPPED = Way(name="spending, KL, from 2", first=2, make=_spending)
WITHOUT = Way(name="spending, no KL, from 4", first=4, make=_spending, told_kld=False)
WAYS = (BEFORE, SHIPPED, WITHOUT)
"""What a run used before and still uses where no divergence is measured; what it uses; and what it does not."""


class Reader:
    """Answers races from a population and counts what they took."""

    def __init__(self, population: Population, way: Way, order: tuple[int, ...]) -> None:
        self.population, self.way = population, way
        self.compared = frozenset(order[:COMPARED])
        self.base: set[int] = set()
        self.chunks = 0

    def __call__(self, ask: ChunkAsk) -> ChunkScores:
        found = self.population.answer(ask)
        if not ask.changes:
            self.base.update(ask.chunks)
            return found
        self.chunks += len(ask.chunks)
        if found.kld_N is None or not self.way.told_kld:
            return ChunkScores(nll_N=found.nll_N)
        seen = np.array([chunk in self.compared for chunk in ask.chunks])
        return ChunkScores(nll_N=found.nll_N, kld_N=np.where(seen, found.kld_N, np.nan))

    def with_kld(self, found: Measurement) -> Measurement:
        """Adds the divergence as the ledger would have it."""
        answer = self.population.answer(ChunkAsk(changes=found.changes, chunks=tuple(self.compared)))
        if answer.kld_N is None or not self.way.told_kld:
            return found
        return replace(found, kld=superpopulation_interval(answer.kld_N))


def an_order(rng: np.random.Generator, n: int) -> tuple[int, ...]:
    return tuple(int(chunk) for chunk in rng.permutation(n))


# ---- the groups alone ----


@dataclass
class Tally:
    """Counts over races. A verdict is wrong when the truth lies beyond the limit and its indifference."""

    races: int = 0
    with_error: int = 0
    chunks: int = 0
    base: int = 0


def race_groups(
    population: Population, way: Way, limit: float, races: int, rng: np.random.Generator
) -> Tally:
    """Races all groups in random orders, at the level that a run gives the groups."""
    tally = Tally()
    alpha = union_share(ALPHA * SINGLES_SHARE, len(population.groups))
    truths = {name: population.truth({name: ""}) for name in population.groups}
    threshold = Threshold(limit_pct=limit, indifference_pct=INDIFFERENCE)
    for _ in range(races):
        order = an_order(rng, population.chunks)
        reader = Reader(population, way, order)
        found = drive(
            race([{name: ""} for name in population.groups], way.settings(order, limit, alpha)), reader
        )
        tally.races += 1
        tally.with_error += any(_wrong(m, truths[next(iter(m.changes))], threshold) for m in found)
        tally.chunks += reader.chunks
        tally.base += len(reader.base)
    return tally


def _wrong(found: Measurement, truth: float, threshold: Threshold) -> bool:
    """Whether a verdict contradicts the truth. The bounds are those the verdict itself uses, to a rounding."""
    verdict = found.verdict(threshold)
    over, under = (threshold.limit_pct + side * INDIFFERENCE for side in (1, -1))
    if verdict == TOLERANT:
        return truth >= as_nats(over) - 1e-12
    return verdict == SENSITIVE and truth <= as_nats(under) + 1e-12


def hardest(limit: float) -> Iterator[tuple[str, float]]:
    """Where every group is moved to: what must not be called tolerant, what must not be called sensitive.

    A hair beyond, since at n = N the answer is exact and the side of an equality is a rounding.
    """
    yield "tolerant", as_nats(limit + INDIFFERENCE) + 1e-9
    yield "sensitive", as_nats(limit - INDIFFERENCE) - 1e-9


def groups_rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Chunks and errors on the recorded texts as they are."""
    rows = []
    for family in load():
        for limit in asked.thresholds:
            for way in WAYS:
                rng = np.random.default_rng(asked.seed)
                tally = race_groups(family.alone, way, limit, asked.races // 4, rng)
                row = {"family": family.name, "limit_pct": limit, "rule": way.name}
                row["chunks"] = tally.chunks / tally.races
                row["base_chunks"] = tally.base / tally.races
                row["error"] = rate(tally.with_error, tally.races)
                rows.append(row)
                print(row, flush=True)
    return rows


def hardest_rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Family errors with every recorded vector on the wrong side: the same question at every limit."""
    rows = []
    for family in load():
        for way in WAYS:
            rng = np.random.default_rng(asked.seed)
            row: dict[str, Any] = {"family": family.name, "rule": way.name}
            for side, mean in hardest(3.0):
                tally = race_groups(family.alone.at(mean), way, 3.0, asked.races, rng)
                row[f"never {side}"] = rate(tally.with_error, tally.races)
            rows.append(row)
            print(row, flush=True)
    return rows


def rate(count: int, of: int) -> dict[str, float]:
    """A share in percent with its Monte Carlo standard error, which is never told as zero."""
    share = count / of
    least = max(share, 1 / of)
    return {"pct": 100 * share, "se_pct": 100 * math.sqrt(least * (1 - least) / of), "of": of}


def nasty_rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Family errors of drawn texts with all groups on the wrong side; 2.5% are allowed to the groups.

    A fresh text for every order would average over texts; ten texts are drawn, each in many orders.
    """
    rows = []
    cases = [(name, draw, 1.0) for name, draw in NASTY.items()]
    cases += [(f"normal, KL says {scale:g} of the spread", NASTY["normal"], scale) for scale in (0.5, 1.5)]
    for name, draw, scale in cases:
        for way in WAYS if scale == 1.0 else (SHIPPED,):
            row: dict[str, Any] = {"population": name, "rule": way.name}
            for side, mean in hardest(3.0):
                errors = 0
                for text in range(10):
                    rng = np.random.default_rng((asked.seed, text))
                    population = drawn(draw, rng, kld_scale=scale).at(mean)
                    errors += race_groups(population, way, 3.0, asked.nasty // 10, rng).with_error
                row[f"never {side}"] = rate(errors, asked.nasty)
            rows.append(row)
            print(row, flush=True)
    return rows


# ---- whole runs ----


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a whole run came to."""

    chunks_alone: int
    chunks_together: int
    base: int
    combinations: int
    bytes_saved: int
    true_pct: float
    wrong_tolerant: bool


def run_once(population: Population, way: Way, limit: float, rng: np.random.Generator) -> Ran:
    """Groups, then combinations, as `cerebellum run` has them, each in an order of its own."""
    order, fresh = an_order(rng, population.chunks), an_order(rng, population.chunks)
    alone, together = Reader(population, way, order), Reader(population, way, fresh)
    alpha = union_share(ALPHA * SINGLES_SHARE, len(population.groups))
    racing = race([{name: "Q2_K"} for name in population.groups], way.settings(order, limit, alpha))
    units = tuple(
        Unit(
            changes=found.changes,
            bytes_saved=population.bytes_saved[next(iter(found.changes))],
            measurement=alone.with_kld(found),
        )
        for found in drive(racing, alone)
    )
    threshold = Threshold(limit_pct=limit, indifference_pct=INDIFFERENCE)
    combinations: list[Measurement] = []

    def measured(changes: Changes) -> Measurement:
        level = combination_share(ALPHA * (1 - SINGLES_SHARE), len(combinations) + 1)
        (found,) = drive(race([changes], way.settings(fresh, limit, level, ASIDE)), together)
        combinations.append(together.with_kld(found))
        return combinations[-1]

    chosen = drive(threshold_plan(units, threshold), measured)
    return Ran(
        chunks_alone=alone.chunks,
        chunks_together=together.chunks,
        base=len(alone.base | together.base),
        combinations=len(combinations),
        bytes_saved=sum(population.bytes_saved[name] for name in chosen.changes),
        true_pct=as_percent(population.truth(chosen.changes)) if chosen.changes else 0.0,
        wrong_tolerant=any(
            found.verdict(threshold) == TOLERANT and _wrong(found, population.truth(found.changes), threshold)
            for found in combinations
        ),
    )


def best_possible(population: Population, limit: float) -> int:
    """Bytes that an oracle saves, who knows the full-text change of every group and combination."""
    means = population.nll_GN.mean(1)
    saved = np.array([population.bytes_saved[name] for name in population.groups])
    sets = (np.arange(2 ** len(means))[:, None] >> np.arange(len(means)) & 1).astype(bool)
    sums = sets @ means
    together = np.where(sets.sum(1) > 1, sums * (1 + population.interaction * sums), sums)
    holds = (together < as_nats(limit)) & ~(sets & (means >= as_nats(limit))).any(1)
    return int((sets @ saved)[holds].max())


def runs_rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole runs: bytes against the oracle, chunks, and errors with every combination on the wrong side."""
    rows = []
    for family in load():
        population = replace(family.alone, interaction=family.interaction)
        for limit in asked.thresholds:
            rng = np.random.default_rng(asked.seed)
            oracle = best_possible(population, limit)
            ran = [run_once(population, SHIPPED, limit, rng) for _ in range(asked.orders)]
            shares = np.array([one.bytes_saved / max(oracle, 1) for one in ran])
            row: dict[str, Any] = {
                "family": family.name,
                "limit_pct": limit,
                "oracle_bytes": oracle,
                "mean_share": float(shares.mean()),
                "least_share": float(shares.min()),
                "runs_over_90_pct": float((shares >= 0.9).mean()),
            }
            for key in ("chunks_alone", "chunks_together", "base", "combinations", "true_pct"):
                row[key] = float(np.mean([getattr(one, key) for one in ran]))
            hard = replace(population, recentred=as_nats(limit + INDIFFERENCE) + 1e-9)
            wrong = sum(run_once(hard, SHIPPED, limit, rng).wrong_tolerant for _ in range(asked.races))
            row["never tolerant"] = rate(wrong, asked.races)
            rows.append(row)
            print(row, flush=True)
    return rows


def equal_rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Twelve equal groups, of which so many fit: noise alone chooses, and every combination is on the wrong side."""
    rows = []
    limit, races = 3.0, asked.nasty
    for fitting in (2.5, 3.5, 6.0):
        wrong = combinations = 0
        for text in range(10):
            rng = np.random.default_rng((asked.seed, text))
            population = drawn(NASTY["normal"], rng).at(as_nats(limit) / fitting)
            hard = replace(population, recentred=as_nats(limit + INDIFFERENCE) + 1e-9)
            for _ in range(races // 10):
                ran = run_once(hard, SHIPPED, limit, rng)
                wrong += ran.wrong_tolerant
                combinations += ran.combinations
        row = {
            "groups that fit": fitting,
            "combinations": combinations / races,
            "never tolerant": rate(wrong, races),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


# ---- an estimate to within a width ----


def until_rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """`compare --until`: chunks until the width asked for, and how often the interval then misses the truth."""
    rows = []
    for name, draw in NASTY.items():
        for half in (0.5, 0.25, 0.15):
            row: dict[str, Any] = {"population": name, "half_width_sd": half}
            values = drawn(draw, np.random.default_rng(asked.seed)).nll_GN
            rules: dict[str, StoppingRule | FixedWidth] = {
                "for all times": StoppingRule(alpha=0.025, population=values.shape[1]),
                "fixed width": FixedWidth(population=values.shape[1]),
            }
            for title, rule in rules.items():
                rng = np.random.default_rng(asked.seed)
                stops = [_stop(rule, values[k % len(values)], half * 0.01, rng) for k in range(asked.orders)]
                row[title] = {
                    "chunks": float(np.mean([n for n, _ in stops])),
                    "missed": rate(sum(missed for _, missed in stops), len(stops)),
                }
            rows.append(row)
            print(row, flush=True)
    return rows


def _stop(
    rule: StoppingRule | FixedWidth, values_N: np.ndarray, half: float, rng: np.random.Generator
) -> tuple[int, bool]:
    """Chunks when the interval is first narrow enough, from the eighth on, and whether it misses the truth."""
    shuffled, truth = rng.permutation(values_N), float(values_N.mean())
    for n in range(8, len(shuffled) + 1):
        found = rule.interval(shuffled[:n])
        if found.high - found.low <= 2 * half:
            break
    return n, not found.low - 1e-12 <= truth <= found.high + 1e-12


# ---- what is shown ----


def told(value: Any) -> str:
    if isinstance(value, dict) and "se_pct" in value:
        return f"{value['pct']:.2f}% ± {value['se_pct']:.2f}"
    if isinstance(value, dict):
        return ", ".join(told(part) if isinstance(part, dict) else f"{part:.1f}" for part in value.values())
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(told(value) for value in row.values()))
    Console(width=170).print(table)


def plot(results: dict[str, list[dict[str, Any]]]) -> None:
    """Chunks of each rule against the limit, and family errors on every text -> docs/replay.svg."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(2, 3))
    family = results["groups"][0]["family"]
    for way in WAYS:
        mine = [row for row in results["groups"] if row["rule"] == way.name and row["family"] == family]
        mine.sort(key=lambda row: float(row["limit_pct"]))
        total = [row["chunks"] + row["base_chunks"] for row in mine]
        left.plot([row["limit_pct"] for row in mine], total, marker="o", label=way.name)
    left.set(xlabel="limit on the increase, %", ylabel="chunks of twelve groups and the base", yscale="log")
    left.legend()
    names = list(NASTY)
    for place, way in enumerate(WAYS):
        told_of = {row["population"]: row for row in results["nasty"] if row["rule"] == way.name}
        worst = [
            max((told_of[n][f"never {s}"] for s in (TOLERANT, SENSITIVE)), key=lambda r: r["pct"])
            for n in names
        ]
        heights = [max(row["pct"], 0.05) for row in worst]
        right.barh([i + 0.25 * (place - 1) for i in range(len(names))], heights, 0.25, label=way.name)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.axvline(100 * ALPHA * SINGLES_SHARE, color="grey", linestyle="--", label="allowed to the groups")
    right.set(xscale="log", xlabel="runs with a wrong verdict when every group lies on the wrong side, %")
    right.legend(fontsize="small")
    figure.savefig(Path(__file__).parents[1] / "docs" / "replay.svg")


SECTIONS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "runs": runs_rows,
    "equal": equal_rows,
    "groups": groups_rows,
    "hardest": hardest_rows,
    "until": until_rows,
    "nasty": nasty_rows,
}


def replay(asked: argparse.Namespace) -> None:
    """Replays the sections asked for; results/replay.json keeps the others as they were."""
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    results = {name: kept[name] for name in SECTIONS if name in kept}
    for name in asked.sections:
        results[name] = SECTIONS[name](asked)
        counts = {
            "races": asked.races,
            "orders": asked.orders,
            "nasty_races": asked.nasty,
            "seed": asked.seed,
        }
        save("replay", {"alpha": ALPHA, "indifference_pct": INDIFFERENCE, **counts, **results})
    for name, rows in results.items():
        show(name, rows)
    if {"groups", "nasty"} <= set(results):
        plot(results)


# ---- recording ----


def record(asked: argparse.Namespace) -> None:
    """Scores groups, and some combinations, on ``--chunks`` random chunks -> results/replay_vectors.npz.

    Those chunks are the text then: what is replayed is orders of them, and their mean is the truth.
    """
    from cerebellum.llama.native import EngineSettings, LlamaEngine
    from cerebellum.measure.measurer import measuring
    from cerebellum.measure.race import chunk_order
    from cerebellum.progress import Silent
    from cerebellum.settings import DEMO_MODEL, Limit, Settings
    from cerebellum.verdicts import NOTHING
    from cerebellum.workspace import Workspace

    base, kind = "Q3_K_M", "Q2_K"
    goal = Limit(demote=kind)
    settings = Settings(
        source=asked.model or DEMO_MODEL, goal=goal, base=base, imatrix_chunks=100, kld_cache_bytes=1 << 40
    )
    engine = LlamaEngine(EngineSettings(threads=settings.threads))
    workspace = Workspace(asked.folder, settings, engine, Silent())
    arrays: dict[str, Any] = {}
    with workspace.locked():
        layout, shards = workspace.layout, workspace.shards
        names = [name for name in layout.groups if layout.why_not(name, kind) is None]
        everything = chunk_order(workspace.selection.n_chunks, settings.seed)[: asked.chunks]
        joint = [tuple(names), *(tuple(names[place::4]) for place in range(4))]
        with measuring(workspace, shards.variant(NOTHING), everything) as measurer:
            zero = measurer.chunk_means(shards.variant(NOTHING), everything)
            for groups in [*((name,) for name in names), *joint]:
                changes = dict.fromkeys(groups, kind)
                key = f"{base}/{kind}/{'+'.join(groups)}"
                arrays[f"{key}/nll"] = measurer.chunk_means(shards.variant(changes), everything) - zero
                arrays[f"{key}/kld"] = measurer.kld_means(shards.variant(changes), everything)
                arrays[f"{key}/bytes"] = np.array(layout.bytes_saved(changes))
                print(f"recorded {key}", flush=True)
    np.savez_compressed(VECTORS, **{key: value.astype(np.float32) for key, value in arrays.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=["record", "replay"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("replay-runs"))
    parser.add_argument("--chunks", type=int, help="random chunks to record; all without it")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--races", type=int, default=2000, help="orders for each family error")
    parser.add_argument("--orders", type=int, default=200, help="whole runs as they are")
    parser.add_argument("--nasty", type=int, default=1000, help="orders for each drawn text")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    {"record": record, "replay": replay}[asked.action](asked)


if __name__ == "__main__":
    main()
