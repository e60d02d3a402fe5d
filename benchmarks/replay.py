"""Are the verdicts as sure as they claim? Per-chunk differences, replayed in random orders that the truth is known for.

``record NAME`` scores every group of a model on a text once, with its divergence from the base, and some combinations.
``replay NAME...`` then runs what `cerebellum run` runs, groups and combinations, in thousands of other orders of the
same chunks, and can fail: every vector is moved onto the wrong side of what it may be called, where each verdict
is an error. ``drawn`` does it with drawn texts: skew, heavy tails, topics and outliers. ``--sabotage`` breaks a rule
on purpose, to see the replay fail: it ends with 1 where more errors come out than are allowed. ``tables NAME...``
prints what is known as Markdown and draws docs/replay.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from common import RESULTS, save
from populations import NASTY, SCORED, Population, drawn, load, vectors_path

from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.measure.measurer import Measurer, measuring
from cerebellum.measure.race import ChunkAsk, ChunkScores, RaceSettings, chunk_order, race
from cerebellum.measure.stage import COMBINATION_FIRST_LOOK, COMBINATION_GROWTH
from cerebellum.plan.limit import Trial, Unit, threshold_plan
from cerebellum.progress import Silent
from cerebellum.settings import (
    DEFAULT_ENCODER,
    DEMO_MODEL,
    ComeAlong,
    Limit,
    Settings,
    held,
    texts_that_come_along,
)
from cerebellum.stats.paired import Interval, as_nats, as_percent, superpopulation_interval
from cerebellum.stats.sequential import (
    FixedWidth,
    Rule,
    Sample,
    SpendingRule,
    StoppingRule,
    combination_share,
    looks,
    union_share,
)
from cerebellum.verdicts import NOTHING, SENSITIVE, TOLERANT, Measurement, Threshold, drive
from cerebellum.workspace import Workspace

Row = dict[str, Any]
Rows = Iterator[Row]

ALPHA, INDIFFERENCE, SINGLES_SHARE = 0.05, 0.2, 0.5
COMPARED = 8  # chunks with a divergence, as in a run


@dataclass(frozen=True, kw_only=True)
class Way:
    """A rule as a run would use it: its first look, and whether it is told the divergence.

    ``fresh``: combinations are read in an order of their own.
    """

    name: str
    first: int
    make: Callable[[float, int, tuple[int, ...]], Rule]
    told_kld: bool = True
    fresh: bool = True

    def settings(
        self, order: tuple[int, ...], limit: float, alpha: float, worth: float | None = None
    ) -> RaceSettings:
        """The race of a run, at a level for each bound; of combinations where their ``worth`` is given, in chunks."""
        planned = looks(self.first, 1.5, len(order))
        if worth is not None:
            planned = looks(COMBINATION_FIRST_LOOK, COMBINATION_GROWTH, len(order))
        return RaceSettings(
            order=order,
            looks=planned,
            threshold=Threshold(limit_pct=limit, indifference_pct=INDIFFERENCE),
            rule=self.make(alpha, len(order), planned),
            scored_per_chunk=SCORED,
            worth=worth,
        )


def _spending(alpha: float, population: int, planned: tuple[int, ...]) -> Rule:
    return SpendingRule(alpha=alpha, population=population, looks=planned)


def _for_all_times(alpha: float, population: int, _planned: tuple[int, ...]) -> Rule:
    return StoppingRule(alpha=alpha, population=population)


BEFORE = Way(name="for all times, from 8", first=8, make=_for_all_times)
SHIPPED = Way(name="spending, KL, from 2", first=2, make=_spending)
WITHOUT = Way(name="spending, no KL, from 4", first=4, make=_spending, told_kld=False)
WITHSTOOD = ("normal", "topics (articles of 3 to 14 chunks)", "skew 0.8 (gamma)")
"""Drawn texts on which the level is promised; docs/STATISTICS.md says what is not."""

WAYS = (BEFORE, SHIPPED, WITHOUT)
"""What a run used before and still uses where no divergence is measured; what it uses; and what it does not."""


@dataclass(frozen=True, kw_only=True)
class EveryLook:
    """Sabotage: the whole level at every look, as if nobody had looked before."""

    alpha: float
    population: int

    def intervals(self, samples: Sequence[Sample]) -> list[Interval]:
        """Returns each sample's interval as though its look were the only one."""
        rules = [
            SpendingRule(alpha=self.alpha, population=self.population, looks=(len(sample.values_N),))
            for sample in samples
        ]
        return [rule.intervals([sample])[0] for rule, sample in zip(rules, samples, strict=True)]


def _every_look(alpha: float, population: int, _planned: tuple[int, ...]) -> Rule:
    return EveryLook(alpha=alpha, population=population)


def _twelve_times(alpha: float, population: int, planned: tuple[int, ...]) -> Rule:
    return SpendingRule(alpha=min(12 * alpha, 0.5), population=population, looks=planned)


def _twice(alpha: float, population: int, planned: tuple[int, ...]) -> Rule:
    return SpendingRule(alpha=2 * alpha, population=population, looks=planned)


SABOTAGED = {
    "looks": Way(name="looks", first=2, make=_every_look),
    "share": Way(name="share", first=2, make=_twelve_times),
    "order": Way(name="order", first=2, make=_spending, fresh=False),
    "twice": Way(name="twice", first=2, make=_twice),
}
"""Rules broken on purpose: no price for looking again; every group and combination at twelve times its level, as if
there were one; combinations read in the order that chose them; and twice the level, which the rule's slack may hide."""


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


def groups_rows(asked: argparse.Namespace, name: str) -> Rows:
    """Chunks and errors on a recorded text as it is."""
    population = load(name).population
    for limit in asked.thresholds:
        for way in asked.ways:
            rng = np.random.default_rng(asked.seed)
            tally = race_groups(population, way, limit, asked.races // 4, rng)
            row: Row = {"limit_pct": limit, "rule": way.name}
            row["chunks"] = tally.chunks / tally.races
            row["base_chunks"] = tally.base / tally.races
            row["error"] = rate(tally.with_error, tally.races)
            yield row


def hardest_rows(asked: argparse.Namespace, name: str) -> Rows:
    """Family errors with every recorded vector on the wrong side of each limit."""
    population = load(name).population
    for limit in asked.thresholds:
        for way in asked.ways:
            rng = np.random.default_rng(asked.seed)
            row: Row = {"limit_pct": limit, "rule": way.name}
            for side, mean in hardest(limit):
                tally = race_groups(population.at(mean), way, limit, asked.races, rng)
                row[f"never {side}"] = rate(tally.with_error, tally.races)
            yield row


def rate(count: int, of: int) -> dict[str, float]:
    """A share in percent with its Monte Carlo standard error, which is never told as zero."""
    share = count / of
    least = max(share, 1 / of)
    return {"pct": 100 * share, "se_pct": 100 * math.sqrt(least * (1 - least) / of), "of": of}


def nasty_rows(asked: argparse.Namespace) -> Rows:
    """Family errors of drawn texts with all groups on the wrong side; 2.5% are allowed to the groups.

    A fresh text for every order would average over texts; ten texts are drawn, each in many orders.
    """
    cases = [(name, draw, 1.0) for name, draw in NASTY.items()]
    cases += [(f"normal, KL says {scale:g} of the spread", NASTY["normal"], scale) for scale in (0.5, 1.5)]
    for name, draw, scale in cases:
        for way in asked.ways if scale == 1.0 else asked.ways[1:2]:
            row: Row = {"population": name, "rule": way.name}
            for side, mean in hardest(3.0):
                errors = 0
                for text in range(10):
                    rng = np.random.default_rng((asked.seed, text))
                    population = drawn(draw, rng, kld_scale=scale).at(mean)
                    errors += race_groups(population, way, 3.0, asked.nasty // 10, rng).with_error
                row[f"never {side}"] = rate(errors, asked.nasty)
            yield row


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
    order = an_order(rng, population.chunks)
    fresh = an_order(rng, population.chunks) if way.fresh else order
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

    def measured(trial: Trial) -> Measurement:
        level = combination_share(ALPHA * (1 - SINGLES_SHARE), len(combinations) + 1)
        settings = way.settings(fresh, limit, level, trial.worth)
        (found,) = drive(race([trial.changes], settings), together)
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
    together = sums * population.interaction.factors(sets, sums)
    holds = (together < as_nats(limit)) & ~(sets & (means >= as_nats(limit))).any(1)
    return int((sets @ saved)[holds].max())


def runs_rows(asked: argparse.Namespace, name: str) -> Rows:
    """Whole runs: bytes against the oracle, chunks, and errors with every combination on the wrong side."""
    population = load(name).population
    way = asked.ways[-1] if asked.sabotage else SHIPPED
    for limit in asked.thresholds:
        rng = np.random.default_rng(asked.seed)
        oracle = best_possible(population, limit)
        ran = [run_once(population, way, limit, rng) for _ in range(asked.orders)]
        shares = np.array([one.bytes_saved / max(oracle, 1) for one in ran])
        row: Row = {
            "limit_pct": limit,
            "oracle_bytes": oracle,
            "mean_share": float(shares.mean()),
            "se_share": float(shares.std(ddof=1) / math.sqrt(len(shares))),
            "least_share": float(shares.min()),
            "runs_over_90_pct": float((shares >= 0.9).mean()),
        }
        for key in ("chunks_alone", "chunks_together", "base", "combinations", "true_pct"):
            row[key] = float(np.mean([getattr(one, key) for one in ran]))
        hard = replace(population, recentred=as_nats(limit + INDIFFERENCE) + 1e-9)
        wrong = sum(run_once(hard, way, limit, rng).wrong_tolerant for _ in range(asked.races))
        row["never tolerant"] = rate(wrong, asked.races)
        yield row


def wholes_rows(asked: argparse.Namespace, name: str) -> Rows:
    """Recorded combinations beside what the replay makes of their groups: change, spread and divergence."""
    recorded = load(name)
    population = recorded.population
    for whole in recorded.wholes:
        changes = dict.fromkeys(whole.groups, "")
        parts = population.answer(ChunkAsk(changes=changes, chunks=tuple(range(population.chunks))))
        assert parts.kld_N is not None
        yield {
            "groups": "+".join(whole.groups),
            "change_pct": as_percent(float(whole.nll_N.mean())),
            "sum_of_parts_pct": as_percent(sum(population.truth({group: ""}) for group in whole.groups)),
            "replayed_pct": as_percent(population.truth(changes)),
            "sd_over_replayed": float(whole.nll_N.std() / parts.nll_N.std()),
            "kld_over_sum": float(whole.kld_N.mean() / parts.kld_N.mean()),
        }


def equal_rows(asked: argparse.Namespace) -> Rows:
    """Twelve equal groups, of which so many fit: noise alone chooses, and every combination is on the wrong side."""
    limit, races = 3.0, asked.nasty
    way = asked.ways[-1] if asked.sabotage else SHIPPED
    for fitting in (2.5, 3.5, 6.0):
        wrong = combinations = 0
        for text in range(10):
            rng = np.random.default_rng((asked.seed, text))
            population = drawn(NASTY["normal"], rng).at(as_nats(limit) / fitting)
            hard = replace(population, recentred=as_nats(limit + INDIFFERENCE) + 1e-9)
            for _ in range(races // 10):
                ran = run_once(hard, way, limit, rng)
                wrong += ran.wrong_tolerant
                combinations += ran.combinations
        yield {
            "groups that fit": fitting,
            "rule": way.name,
            "combinations": combinations / races,
            "never tolerant": rate(wrong, races),
        }


# ---- an estimate to within a width ----


def until_rows(asked: argparse.Namespace) -> Rows:
    """`compare --until`: chunks until the width asked for, and how often the interval then misses the truth."""
    for name, draw in NASTY.items():
        for half in (0.5, 0.25, 0.15):
            row: Row = {"population": name, "half_width_sd": half}
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
            yield row


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
    """Shows a number of a row."""
    if isinstance(value, dict) and "se_pct" in value:
        return f"{value['pct']:.2f}% ± {value['se_pct']:.2f}"
    if isinstance(value, dict):
        return ", ".join(told(part) if isinstance(part, dict) else f"{part:.1f}" for part in value.values())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def too_many(row: Row) -> bool:
    """Whether more errors came out than are allowed, by more than two Monte Carlo standard errors."""
    errors = [value for key, value in row.items() if key.startswith("never")]
    return any(error["pct"] - 2 * error["se_pct"] > 100 * ALPHA * SINGLES_SHARE for error in errors)


def markdown(title: str, rows: Sequence[Row]) -> str:
    """Returns rows as a table of Markdown."""
    lines = [f"**{title}**", "", "| " + " | ".join(rows[0]) + " |", "| " + "--- | " * len(rows[0])]
    lines += ["| " + " | ".join(told(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def tables(asked: argparse.Namespace) -> int:
    """Prints all results as Markdown and draws the picture of the first recording."""
    for name in (*asked.names, "drawn"):
        found = known(name)
        for section in (*RECORDED, *DRAWN):
            if found.get(section):
                print(markdown(f"{name}: {section}", found[section]))
    if known(asked.names[0]).get("groups") and known("drawn").get("nasty"):
        plot(known(asked.names[0])["groups"], known("drawn")["nasty"])
    return 0


def plot(groups: Sequence[Row], nasty: Sequence[Row]) -> None:
    """Chunks of each rule against the limit, and family errors on every text -> docs/replay.svg."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "cerebellum"
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(2, 3))
    for way in WAYS:
        mine = sorted(
            (row for row in groups if row["rule"] == way.name), key=lambda row: float(row["limit_pct"])
        )
        total = [row["chunks"] + row["base_chunks"] for row in mine]
        left.plot([row["limit_pct"] for row in mine], total, marker="o", label=way.name)
    left.set(xlabel="limit on the increase, %", ylabel="chunks of all groups and the base", yscale="log")
    left.legend()
    names = list(NASTY)
    for place, way in enumerate(WAYS):
        told_of = {row["population"]: row for row in nasty if row["rule"] == way.name}
        worst = [max(told_of[n][f"never {s}"]["pct"] for s in (TOLERANT, SENSITIVE)) for n in names]
        heights = [max(error, 0.05) for error in worst]
        right.barh([i + 0.25 * (place - 1) for i in range(len(names))], heights, 0.25, label=way.name)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.axvline(100 * ALPHA * SINGLES_SHARE, color="grey", linestyle="--", label="allowed to the groups")
    right.set(xscale="log", xlabel="runs with a wrong verdict when every group lies on the wrong side, %")
    right.legend(fontsize="small")
    figure.savefig(Path(__file__).parents[1] / "docs" / "replay.svg", metadata={"Date": None})


RECORDED: dict[str, Callable[[argparse.Namespace, str], Rows]] = {
    "runs": runs_rows,
    "wholes": wholes_rows,
    "groups": groups_rows,
    "hardest": hardest_rows,
}
DRAWN: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "equal": equal_rows,
    "until": until_rows,
    "nasty": nasty_rows,
}


def known(name: str) -> dict[str, Any]:
    """Returns results/replay-NAME.json."""
    path = RESULTS / f"replay-{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def replay(asked: argparse.Namespace) -> int:
    """Replays recordings; of each, sections that were not asked for stay as they were."""
    failed = 0
    for name in asked.names:
        about = dict(load(name).about) | {"chunks": load(name).population.chunks}
        sections = {section: partial(RECORDED[section], asked, name) for section in RECORDED}
        failed += run_sections(asked, name, {"about": about}, sections)
    return min(failed, 1)


def draw(asked: argparse.Namespace) -> int:
    """Replays drawn texts."""
    sections = {section: partial(DRAWN[section], asked) for section in DRAWN}
    return min(run_sections(asked, "drawn", {}, sections), 1)


def run_sections(
    asked: argparse.Namespace, name: str, about: dict[str, Any], sections: Mapping[str, Callable[[], Rows]]
) -> int:
    """Works out what was asked for, keeps it unless a rule was sabotaged, and returns how many rows err too often."""
    counts = {"races": asked.races, "orders": asked.orders, "nasty_races": asked.nasty, "seed": asked.seed}
    results = {key: rows for key, rows in known(name).items() if key in sections}
    failed = 0
    for section in asked.sections or list(sections):
        if section not in sections:
            continue
        results[section] = []
        for row in sections[section]():
            results[section].append(row)
            failed += judged(section, row)
            print(
                name, section, *(f"{key}: {told(value)}" for key, value in row.items()), sep=" | ", flush=True
            )
        if not asked.sabotage:
            setting = {"alpha": ALPHA, "indifference_pct": INDIFFERENCE, **counts}
            save(f"replay-{name}", {**about, **setting, **results})
    print(
        f"{name}: {failed} rows with more errors than allowed" if failed else f"{name}: no row errs too often"
    )
    return failed


def judged(section: str, row: Row) -> bool:
    """Whether a shipped or sabotaged rule errs too often; where nothing withstands a text, that is no failure."""
    ours = row.get("rule", SHIPPED.name) == SHIPPED.name or row.get("rule") in SABOTAGED
    withstood = section != "nasty" or row["population"] in WITHSTOOD
    return ours and withstood and too_many(row)


# ---- recording ----


@dataclass(frozen=True, kw_only=True)
class Take:
    """What one recording is of: an open run folder, its chunks, those that are compared with the base, the type."""

    workspace: Workspace
    chunks: tuple[int, ...]
    compared: tuple[int, ...]
    kind: str


def record(asked: argparse.Namespace) -> int:
    """Scores groups, and some combinations, on ``--chunks`` random chunks -> results/replay-NAME.npz.

    Those chunks are the text then: what is replayed is orders of them, and their mean is the truth. A recording that
    was stopped goes on from its folder, and what is known is written after every variant.
    """
    select_text, select_domains = held(texts_that_come_along(asked.text, "select"))
    settings = Settings(
        source=asked.model,
        goal=Limit(demote=asked.demote),
        select_text=select_text,
        select_domains=select_domains,
        base=asked.base,
        imatrix_chunks=asked.imatrix_chunks,
        kld_cache_bytes=1 << 50,
        threads=asked.threads,
        gpu_layers=asked.gpu_layers,
        allow_requantize=True,
        encoder=DEFAULT_ENCODER,
    )
    engine = LlamaEngine(EngineSettings(threads=settings.threads, gpu_layers=settings.gpu_layers))
    workspace = Workspace(asked.folder / asked.names[0], settings, engine, Silent())
    with workspace.locked():
        chunks = chunk_order(workspace.selection.n_chunks, settings.seed)[: asked.chunks]
        take = Take(workspace=workspace, chunks=chunks, compared=chunks[: asked.compared], kind=asked.demote)
        names = [next(iter(changes)) for changes in workspace.layout.demotions(asked.demote)]
        arrays: dict[str, Any] = {"about": np.array(json.dumps(about(take)))}
        with measuring(workspace, workspace.shards.variant(NOTHING), take.compared) as measurer:
            for groups in [*((name,) for name in names), *some_combinations(names, asked.combinations)]:
                arrays |= recorded(take, measurer, groups)
                np.savez_compressed(vectors_path(asked.names[0]), **arrays)
                print("recorded", "+".join(groups), flush=True)
    return 0


def about(take: Take) -> dict[str, Any]:
    """Returns what made a recording."""
    workspace = take.workspace
    return {
        "model": workspace.source.path.name,
        "base": workspace.settings.base,
        "demote": take.kind,
        "text": workspace.selection.name,
        "text_sha256": workspace.selection.sha256,
        "of_chunks": workspace.selection.n_chunks,
        "scored_per_chunk": workspace.selection.scored_per_chunk,
        "encoder": workspace.settings.encoder,
        "engine": workspace.engine.identity,
    }


def some_combinations(names: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Returns all groups together, then combinations of 2 to all but one of them, drawn from a seed."""
    rng = np.random.default_rng(15)
    found: dict[tuple[str, ...], None] = {tuple(names): None} if count else {}
    while len(found) < min(count, 2 ** len(names) - len(names) - 1):
        members = rng.choice(len(names), int(rng.integers(2, len(names))), replace=False)
        found[tuple(names[place] for place in sorted(members))] = None
    return list(found)


def recorded(take: Take, measurer: Measurer, groups: tuple[str, ...]) -> dict[str, Any]:
    """Measures a variant: its differences from the base, its divergences (NaN where not compared) and its bytes."""
    shards = take.workspace.shards
    changes = dict.fromkeys(groups, take.kind)
    zero = measurer.chunk_means(shards.variant(NOTHING), take.chunks)
    nll = measurer.chunk_means(shards.variant(changes), take.chunks) - zero
    kld = np.full(len(nll), np.nan)
    kld[: len(take.compared)] = measurer.kld_means(shards.variant(changes), take.compared)
    key = "+".join(groups)
    saved = np.array(take.workspace.layout.bytes_saved(changes))
    return {f"{key}/nll": nll.astype(np.float32), f"{key}/kld": kld.astype(np.float32), f"{key}/bytes": saved}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=list(ACTIONS))
    parser.add_argument("names", nargs="*", default=["embedded"], help="of recordings")
    recording = parser.add_argument_group("record")
    recording.add_argument("--model", type=Path, default=DEMO_MODEL)
    recording.add_argument("--text", choices=get_args(ComeAlong), default="prose")
    recording.add_argument("--base", default="Q3_K_M")
    recording.add_argument("--demote", default="Q2_K")
    recording.add_argument(
        "--folder", type=Path, default=Path("replay-runs"), help="holds a run folder a name"
    )
    recording.add_argument("--chunks", type=int, help="random chunks to record; all without it")
    recording.add_argument(
        "--compared", type=int, help="the first of them, to be compared with the base; all"
    )
    recording.add_argument("--combinations", type=int, default=12)
    recording.add_argument("--imatrix-chunks", type=int, default=100)
    recording.add_argument("--gpu-layers", type=int, default=0)
    recording.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    replaying = parser.add_argument_group("replay, drawn")
    replaying.add_argument("--sections", nargs="+", choices=[*RECORDED, *DRAWN])
    replaying.add_argument("--races", type=int, default=2000, help="orders for each family error")
    replaying.add_argument("--orders", type=int, default=200, help="whole runs as they are")
    replaying.add_argument("--nasty", type=int, default=1000, help="orders for each drawn text")
    replaying.add_argument("--thresholds", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    replaying.add_argument("--seed", type=int, default=1)
    replaying.add_argument("--sabotage", choices=list(SABOTAGED), help="break a rule; nothing is written")
    asked = parser.parse_args()
    asked.ways = (SABOTAGED[asked.sabotage],) if asked.sabotage else WAYS
    return asked


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "record": record,
    "replay": replay,
    "drawn": draw,
    "tables": tables,
}


def main() -> None:
    asked = arguments()
    sys.exit(ACTIONS[asked.action](asked))


if __name__ == "__main__":
    main()
