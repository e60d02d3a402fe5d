"""The best model that fits, against the presets and two other ways to spend the same bytes.

At the size of each preset, files from the same source and importance matrix: the preset by ggml's encoder (which all
others are compared with) and by the program's, Cerebellum's
plan, an allocation over four depth bands (every tensor of a band gets one type; damages measured as ours
are), and a per-tensor allocation that minimises the squared error weighted by the importance matrix (no
model is run for it). All are scored on the report text, which chose nothing within these runs; the default
objective was settled on it, once (docs/LOG.md). Intervals take articles for independent, not chunks, and the share by
which a loss is smaller has the preset's own error in it. A folder that is kept goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import ON_PROSE, articles, bounds, cerebellum, save, save_vectors, share
from gguf import GGMLQuantizationType
from making import Maker, Types
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from cerebellum import open_run
from cerebellum.base import preset_base
from cerebellum.gguf import parse_type, tensor_bytes, write_gguf
from cerebellum.groups import layer_of
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.measure.measurer import file_variant, measuring
from cerebellum.measure.method import Method
from cerebellum.measure.race import chunk_order
from cerebellum.measure.rounding import Sample
from cerebellum.plan.artifacts import BudgetPlan
from cerebellum.plan.knapsack import Option, solve
from cerebellum.progress import Silent
from cerebellum.settings import DEFAULT_ENCODER, DEMO_MODEL, ENCODERS, FINE_LADDER, K_LADDER, Budget, Settings
from cerebellum.shards import Variant
from cerebellum.stats.clusters import less_than_reference, mean_by_cluster
from cerebellum.stats.paired import Floats
from cerebellum.workspace import Workspace

Vectors = Mapping[str, Floats]

ALL_TYPES = (*K_LADDER, *FINE_LADDER)
N_BANDS = 4
BAND_CHUNKS = 12


@dataclass(frozen=True, kw_only=True)
class Bench:
    """An open run folder, with what all rivals share."""

    workspace: Workspace
    folder: Path

    def write(self, name: str, types: Types) -> Path:
        """Writes the source at these types as a GGUF, with the base's metadata, rounded as the run rounds."""
        path = self.folder / f"{name}.gguf"
        tensors = [self.workspace.shards.tensor(tensor, type_) for tensor, type_ in types.items()]
        write_gguf(path, self.workspace.base.records, tensors, self.workspace.base.alignment)
        return path

    @property
    def free_tensors(self) -> list[str]:
        """The tensors a plan may change."""
        return [name for group in self.workspace.layout.groups.values() for name in group.tensors]

    def n_bytes(self, name: str, type_: GGMLQuantizationType) -> int:
        """Returns what a tensor takes in the file, padded to the alignment."""
        return math.ceil(tensor_bytes(type_, self.workspace.source.tensors[name].shape) / 32) * 32


Errors = list[dict[GGMLQuantizationType, float]]


def mse_errors(bench: Bench, qtypes: Sequence[str]) -> Errors:
    """Returns the squared error by importance of each free tensor at each type that it takes, on all threads."""
    workspace = bench.workspace

    def errors(name: str) -> dict[GGMLQuantizationType, float]:
        sample = Sample(workspace.engine, workspace.source, workspace.matrix, name, Method())
        return {kind: sample.error(kind) for kind in map(parse_type, qtypes) if sample.takes(kind)}

    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(max_workers=workspace.settings.threads) as pool,
    ):
        return list(pool.map(errors, bench.free_tensors))


def mse_types(bench: Bench, budget: int, errors: Errors) -> Types:
    """Returns, tensor by tensor, the types of least squared error by importance in all, within the budget."""
    names = bench.free_tensors
    items = [
        [Option(n_bytes=bench.n_bytes(name, kind), damage=error) for kind, error in known.items()]
        for name, known in zip(names, errors, strict=True)
    ]
    choice = solve(items, budget - bench.workspace.layout.fixed_bytes())
    assert choice is not None, "the budget holds none of these types"
    chosen = {name: list(known)[index] for name, known, index in zip(names, errors, choice, strict=True)}
    return dict(bench.workspace.base.types) | chosen


def band_types(bench: Bench, budget: int, damages: Sequence[Mapping[str, float]]) -> Types:
    """Returns one type for all tensors of each depth band, by measured damage, within the budget."""
    bands = depth_bands(bench)
    items = [
        [
            Option(n_bytes=sum(bench.n_bytes(name, parse_type(qtype)) for name in band), damage=value)
            for qtype, value in damage.items()
        ]
        for band, damage in zip(bands, damages, strict=True)
    ]
    choice = solve(items, budget - bench.workspace.layout.fixed_bytes())
    assert choice is not None, "the budget holds none of these types"
    types = dict(bench.workspace.base.types)
    for band, damage, index in zip(bands, damages, choice, strict=True):
        types |= dict.fromkeys(band, parse_type(list(damage)[index]))
    return types


def depth_bands(bench: Bench) -> list[list[str]]:
    """Returns the tensors that a plan may change, by the quarter of the depth that they lie in."""
    n_layers = int(bench.workspace.source.arch_value("block_count"))
    bands: list[list[str]] = [[] for _ in range(N_BANDS)]
    for name in bench.free_tensors:
        bands[(layer_of(name) or 0) * N_BANDS // n_layers].append(name)
    return bands


def band_damages(bench: Bench) -> list[dict[str, float]]:
    """Measures KL divergence from the source by band and type, all else at the anchor, as our own curves do."""
    workspace = bench.workspace
    goal = workspace.settings.goal
    assert isinstance(goal, Budget)
    order = chunk_order(workspace.selection.n_chunks, workspace.settings.seed)[:BAND_CHUNKS]
    fine = dict(workspace.base.types) | dict.fromkeys(bench.free_tensors, parse_type(goal.anchor))
    with measuring(workspace, workspace.source_variant, order) as measurer:
        found: list[dict[str, float]] = []
        for number, band in enumerate(depth_bands(bench)):
            found.append({})
            for qtype in ALL_TYPES:
                path = bench.write(f"band{number}-{qtype}", fine | dict.fromkeys(band, parse_type(qtype)))
                found[-1][qtype] = float(measurer.kld_means(file_variant(path, path.stem), order).mean())
                path.unlink()
    return found


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A row for each file, and the vectors behind it: the article of each chunk, its loss and divergence by file."""

    rows: dict[str, dict[str, Any]]
    vectors: dict[str, Floats]


def score(bench: Bench, variants: Mapping[str, Variant], chunks: int) -> Scored:
    """Measures loss above the source on the report text, KL divergence from it, and the change from the preset."""
    source_variant = bench.workspace.source_variant
    corpus = bench.workspace.report_corpus
    wanted = sorted(corpus.sample(chunks or corpus.n_chunks, bench.workspace.settings.seed))
    unsure = frozenset(variant.digest for variant in (source_variant, *variants.values()))
    with measuring(bench.workspace, source_variant, wanted, corpus, unsure=unsure) as measurer:
        source = measurer.chunk_means(source_variant, wanted)
        entropy = measurer.entropy_means(source_variant, wanted)
        kld = {name: measurer.kld_means(variant, wanted) for name, variant in variants.items()}
        nll = {name: measurer.chunk_means(variant, wanted) for name, variant in variants.items()}
        unsurer = {name: measurer.entropy_means(one, wanted) - entropy for name, one in variants.items()}
    loss = {name: vector - source for name, vector in nll.items()}
    everywhere = articles(bench.workspace.engine, bench.workspace.source.path, corpus)
    of_article = [everywhere[chunk] for chunk in wanted]
    rows = {
        name: score_row(loss, kld, name, of_article)
        | {"entropy_change_nats": float(unsurer[name].mean())}
        | {"loss_beyond_kld_nats": bounds(mean_by_cluster(loss[name] - kld[name], of_article))}
        for name in variants
    }
    return Scored(
        rows=rows, vectors={"article": np.array(of_article), **_named(loss, "loss"), **_named(kld, "kld")}
    )


def score_row(loss: Vectors, kld: Vectors, name: str, of_article: Sequence[int]) -> dict[str, Any]:
    """Returns what is told of a file: articles are the clusters of all intervals."""
    change = mean_by_cluster(loss[name] - loss["preset"], of_article)
    kld_change = mean_by_cluster(kld[name] - kld["preset"], of_article)
    return {
        "loss_nats": float(loss[name].mean()),
        "less_loss_than_preset_pct": bounds(less_than_reference(loss[name], loss["preset"], of_article)),
        "change_from_preset_nats": bounds(change),
        "kld_nats": float(kld[name].mean()),
        "less_kld_than_preset_pct": bounds(less_than_reference(kld[name], kld["preset"], of_article)),
        "kld_change_nats": bounds(kld_change),
        "chunks": len(of_article),
        "articles": change.n,
    }


def _named(vectors: Vectors, kind: str) -> dict[str, Floats]:
    return {f"{name}/{kind}": vector.astype(np.float32) for name, vector in vectors.items()}


def show(budget: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(
        "file", "bytes", "loss, nats", "less", "against the preset, nats", "KL, nats", "less", title=budget
    )
    for name, row in rows.items():
        mean, low, high = row["change_from_preset_nats"]
        table.add_row(
            name,
            f"{row['bytes']:,}" if row["bytes"] else "",
            f"{row['loss_nats']:.5f}",
            share(row["less_loss_than_preset_pct"]),
            f"{mean:+.5f} [{low:+.5f}, {high:+.5f}]" if name != "preset" else "",
            f"{row['kld_nats']:.5f}",
            share(row["less_kld_than_preset_pct"]),
        )
    Console(width=150).print(table)


def our_plan(folder: Path, asked: argparse.Namespace, budget: str, *flags: str) -> dict[str, Any]:
    """Runs ``cerebellum run --budget``; returns the plan and what its curves cost in passes over the text."""
    found, _ = cerebellum("run", asked.model, "-o", folder, "--budget", budget, *flags, *run_flags(asked))
    kept = {key: found["plan"][key] for key in KEPT}
    return kept | {"file": found["file"], "passes": open_run(folder).curves().passes}


def without_iq(workspace: Workspace, plan: BudgetPlan) -> dict[str, Variant]:
    """Returns the plan of K-quants alone, where it was measured and not shipped."""
    plain = [each for each in plan.candidates if each.how == "K-quants alone"]
    if not plain or plain[0].measured_kld == plan.measured_kld:
        return {}
    return {"Cerebellum, K-quants": workspace.shards.variant(plain[0].changes)}


KEPT = (
    *("budget_bytes", "file_bytes", "base_kld", "predicted_kld", "measured_kld", "kld_ci"),
    *("predicted_delta_pct", "measured_delta_pct", "ci_pct", "tradeoff", "candidates", "groups"),
)


def engine_for(settings: Settings) -> LlamaEngine:
    """Returns the engine that the run was made with."""
    return LlamaEngine(EngineSettings(threads=settings.threads, gpu_layers=settings.gpu_layers))


def run_flags(asked: argparse.Namespace) -> list[str]:
    made = ["--imatrix", str(asked.imatrix)] if asked.imatrix else []
    chunks = ["--imatrix-chunks", str(asked.imatrix_chunks), "--report-chunks", "8", *made]
    machine = ["--gpu-layers", str(asked.gpu_layers), "--threads", str(asked.threads)]
    return [*chunks, *ON_PROSE, "--encoder", asked.encoder, *machine]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--budgets", nargs="+", default=["Q2_K", "Q3_K_M", "Q4_K_M"])
    parser.add_argument("--imatrix", type=Path, help="one made already")
    parser.add_argument("--imatrix-chunks", type=int, default=100)
    parser.add_argument("--report-chunks", type=int, default=0, help="0: the whole text")
    parser.add_argument("--short", action="store_true", help="the presets and our plan, none of the rivals")
    parser.add_argument("--encoder", choices=ENCODERS, default=DEFAULT_ENCODER, help="of all but the preset")
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where files go [default: a temporary one]")
    parser.add_argument("--name", default="budget", help="of the JSON in results/, one for each budget")
    return parser.parse_args()


def one_budget(asked: argparse.Namespace, scratch: Path, budget: str) -> dict[str, Any]:
    """Measures all rivals at one size on the report text."""
    folder = scratch / "run"
    by_ppl = None
    if not asked.short:
        by_ppl = our_plan(folder, asked, budget, "--objective", "ppl")
        shutil.copyfile(by_ppl["file"], scratch / "ppl.gguf")
    ours = our_plan(folder, asked, budget)
    workspace = Workspace.reopen(folder, engine_for, Silent())
    plan = open_run(folder).plan()
    assert isinstance(plan, BudgetPlan)
    bench = Bench(workspace=workspace, folder=scratch)
    size = plan.budget_bytes
    with workspace.locked():
        preset = preset_base(workspace.engine, workspace.source, budget, workspace.matrix)
        maker = Maker(workspace=workspace, folder=scratch)
        files = {
            "preset": maker.write(f"{budget}-preset", preset.types, "ggml", preset),
            "preset, rounded as here": bench.write("rounded", preset.types),
            "Cerebellum": Path(ours["file"]),
        }
        if not asked.short:
            files |= {
                "by perplexity": scratch / "ppl.gguf",
                "depth bands": bench.write("bands", band_types(bench, size, band_damages(bench))),
                "weighted MSE": bench.write("mse", mse_types(bench, size, mse_errors(bench, ALL_TYPES))),
                "weighted MSE, K-quants": bench.write(
                    "mse-k", mse_types(bench, size, mse_errors(bench, K_LADDER))
                ),
            }
        variants = {name: file_variant(path, name) for name, path in files.items()}
        scored = score(bench, variants | without_iq(workspace, plan), asked.report_chunks)
    for name, row in scored.rows.items():
        row["bytes"] = files[name].stat().st_size if name in files else None
    save_vectors(f"{asked.name}-{budget}", scored.vectors)
    return {"rows": scored.rows, "plan": ours, "plan_by_perplexity": by_ppl}


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for budget in asked.budgets:
            result = one_budget(asked, folder, budget)
            show(budget, result["rows"])
            print(
                save(
                    f"{asked.name}-{budget}",
                    {"model": asked.model.name, "encoder": asked.encoder, "budget": budget, **result},
                )
            )


if __name__ == "__main__":
    main()
