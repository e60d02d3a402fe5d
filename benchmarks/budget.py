"""The best model that fits, against the presets and two other ways to spend the same bytes.

At the size of each preset, files from the same source and importance matrix: the preset, Cerebellum's
plan, an allocation over four depth bands (every tensor of a band gets one type; damages measured as ours
are), and a per-tensor allocation that minimises the squared error weighted by the importance matrix (no
model is run for it). All are scored on the report text, which had no say in any of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cerebellum, save
from gguf import GGMLQuantizationType
from rich.console import Console
from rich.table import Table

from cerebellum.base import preset_base
from cerebellum.engine.predictions import PredictionCache
from cerebellum.gguf import parse_type, tensor_bytes, write_gguf
from cerebellum.groups import layer_of
from cerebellum.measure.curves import ANCHOR, FINE_LADDER, K_LADDER
from cerebellum.measure.measurer import Measurer, file_variant
from cerebellum.measure.race import chunk_order
from cerebellum.measure.rounding import Sample
from cerebellum.plan.knapsack import Option, solve
from cerebellum.progress import Silent
from cerebellum.shards import Variant
from cerebellum.stats.paired import superpopulation_interval
from cerebellum.texts import Corpus
from cerebellum.workspace import DEMO_MODEL, Settings, Workspace

Types = Mapping[str, GGMLQuantizationType]

ALL_TYPES = (*K_LADDER, *FINE_LADDER)
N_BANDS = 4
BAND_CHUNKS = 12


@dataclass(frozen=True, kw_only=True)
class Bench:
    """An open run folder, with what all rivals share."""

    workspace: Workspace
    folder: Path

    def write(self, name: str, types: Types) -> Path:
        """The source at these types as a GGUF, metadata as the base has it."""
        path = self.folder / f"{name}.gguf"
        tensors = [self.workspace.shards.tensor(tensor, kind) for tensor, kind in types.items()]
        write_gguf(path, self.workspace.base.records, tensors, self.workspace.base.alignment)
        return path

    @property
    def free_tensors(self) -> list[str]:
        """The tensors a plan may change."""
        return [name for group in self.workspace.sizes.groups.values() for name in group.tensors]

    def n_bytes(self, name: str, kind: GGMLQuantizationType) -> int:
        return -(-tensor_bytes(kind, self.workspace.source.tensors[name].shape) // 32) * 32


def mse_types(bench: Bench, budget: int, kinds: Sequence[str]) -> Types:
    """Per tensor, the types of least squared error by importance in all, within the budget."""
    workspace, names = bench.workspace, bench.free_tensors
    samples = [Sample(workspace.source, workspace.matrix, name, workspace.settings.threads) for name in names]
    legal = [[kind for kind in map(parse_type, kinds) if sample.takes(kind)] for sample in samples]
    items = [
        [Option(n_bytes=bench.n_bytes(sample.name, k), damage=sample.error(k)) for k in ladder]
        for sample, ladder in zip(samples, legal, strict=True)
    ]
    choice = solve(items, budget - workspace.sizes.fixed_bytes())
    assert choice is not None, "the budget holds none of these types"
    chosen = {name: legal[i][index] for i, (name, index) in enumerate(zip(names, choice, strict=True))}
    return dict(workspace.base.types) | chosen


def band_types(bench: Bench, budget: int, damages: Sequence[Mapping[str, float]]) -> Types:
    """One type for all tensors of each depth band, by measured damage, within the budget."""
    bands = depth_bands(bench)
    items = [
        [
            Option(n_bytes=sum(bench.n_bytes(name, parse_type(kind)) for name in band), damage=value)
            for kind, value in damage.items()
        ]
        for band, damage in zip(bands, damages, strict=True)
    ]
    choice = solve(items, budget - bench.workspace.sizes.fixed_bytes())
    assert choice is not None, "the budget holds none of these types"
    types = dict(bench.workspace.base.types)
    for band, damage, index in zip(bands, damages, choice, strict=True):
        types |= dict.fromkeys(band, parse_type(list(damage)[index]))
    return types


def depth_bands(bench: Bench) -> list[list[str]]:
    n_layers = int(bench.workspace.source.arch_value("block_count"))
    bands: list[list[str]] = [[] for _ in range(N_BANDS)]
    for name in bench.free_tensors:
        bands[(layer_of(name) or 0) * N_BANDS // n_layers].append(name)
    return bands


def band_damages(bench: Bench) -> list[dict[str, float]]:
    """KL divergence from the source, by band and type, all else at the anchor, as our own curves have it."""
    workspace = bench.workspace
    corpus = workspace.selection
    order = chunk_order(corpus.n_chunks, workspace.settings.seed)[:BAND_CHUNKS]
    fine = dict(workspace.base.types) | dict.fromkeys(bench.free_tensors, parse_type(ANCHOR))
    with Measuring(bench, corpus, order) as measurer:
        found: list[dict[str, float]] = []
        for number, band in enumerate(depth_bands(bench)):
            found.append({})
            for kind in ALL_TYPES:
                path = bench.write(f"band{number}-{kind}", fine | dict.fromkeys(band, parse_type(kind)))
                found[-1][kind] = float(measurer.kld_means(file_variant(path, path.stem), order).mean())
                path.unlink()
    return found


class Measuring:
    """A measurer against the source's predictions on ``chunks`` of ``corpus``."""

    def __init__(self, bench: Bench, corpus: Corpus, chunks: Sequence[int]) -> None:
        workspace = bench.workspace
        vocab = workspace.engine.vocab_size(workspace.source.path)
        chunk_bytes = corpus.scored_per_chunk * vocab * 4
        self.cache = PredictionCache(bench.folder / "predictions", chunks, chunk_bytes, 8 << 30)
        self.measurer = Measurer(
            workspace.engine,
            workspace.ledger,
            corpus,
            reference=workspace.source_variant,
            cache=self.cache,
        )
        self.measurer.nll(workspace.source_variant, chunks)

    def __enter__(self) -> Measurer:
        return self.measurer

    def __exit__(self, *_: object) -> None:
        self.measurer.close()
        self.cache.remove()


def score(bench: Bench, variants: Mapping[str, Variant], chunks: int) -> dict[str, dict[str, Any]]:
    """Loss above the source on the report text, KL divergence from it, and the change from the preset."""
    corpus = bench.workspace.report_corpus
    wanted = range(min(chunks or corpus.n_chunks, corpus.n_chunks))
    with Measuring(bench, corpus, wanted) as measurer:
        source = measurer.chunk_means(bench.workspace.source_variant, wanted)
        kld = {name: measurer.kld_means(variant, wanted) for name, variant in variants.items()}
        nll = {name: measurer.chunk_means(variant, wanted) for name, variant in variants.items()}
    loss = {name: float((vector - source).mean()) for name, vector in nll.items()}
    rows = {}
    for name in variants:
        change = superpopulation_interval(nll[name] - nll["preset"])
        kld_change = superpopulation_interval(kld[name] - kld["preset"])
        rows[name] = {
            "loss_nats": loss[name],
            "less_loss_than_preset_pct": 100 * (1 - loss[name] / loss["preset"]),
            "change_from_preset_nats": [change.mean, change.low, change.high],
            "kld_nats": float(kld[name].mean()),
            "less_kld_than_preset_pct": 100 * (1 - float(kld[name].mean() / kld["preset"].mean())),
            "kld_change_nats": [kld_change.mean, kld_change.low, kld_change.high],
            "chunks": len(wanted),
        }
    return rows


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
            f"{row['less_loss_than_preset_pct']:.1f}%",
            f"{mean:+.5f} [{low:+.5f}, {high:+.5f}]" if name != "preset" else "",
            f"{row['kld_nats']:.5f}",
            f"{row['less_kld_than_preset_pct']:.1f}%",
        )
    Console(width=110).print(table)


def our_plan(folder: Path, asked: argparse.Namespace, budget: str, *flags: str) -> dict[str, Any]:
    """``cerebellum run --budget``: the plan, and what its curves cost in passes over the text."""
    found, _ = cerebellum("run", asked.model, "-o", folder, "--budget", budget, *flags, *run_flags(asked))
    passes = json.loads((folder / "curves.json").read_text())["passes"]
    kept = {key: found["plan"][key] for key in KEPT}
    return kept | {"file": found["file"], "passes": passes}


def without_iq(bench: Bench, plan: Mapping[str, Any]) -> dict[str, Variant]:
    """The plan of K-quants alone, where it was measured and not shipped."""
    plain = [c for c in plan["candidates"] if c["how"] == "K-quants alone"]
    if not plain or plain[0]["measured_kld"] == plan["measured_kld"]:
        return {}
    return {"Cerebellum, K-quants": bench.workspace.shards.variant(plain[0]["variant"])}


KEPT = (
    *("budget_bytes", "file_bytes", "base_kld", "predicted_kld", "measured_kld", "kld_ci"),
    *("predicted_delta_pct", "measured_delta_pct", "ci_pct", "tradeoff", "candidates", "groups"),
)


def run_flags(asked: argparse.Namespace) -> list[str]:
    made = ["--imatrix", str(asked.imatrix)] if asked.imatrix else []
    chunks = ["--imatrix-chunks", str(asked.imatrix_chunks), "--report-chunks", "8", *made]
    return [*chunks, "--gpu-layers", str(asked.gpu_layers), "--threads", str(asked.threads)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--budgets", nargs="+", default=["Q2_K", "Q3_K_M", "Q4_K_M"])
    parser.add_argument("--imatrix", type=Path, help="one made already")
    parser.add_argument("--imatrix-chunks", type=int, default=100)
    parser.add_argument("--report-chunks", type=int, default=0, help="0: the whole text")
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--name", default="budget", help="of the JSON in results/, one for each budget")
    return parser.parse_args()


def one_budget(asked: argparse.Namespace, scratch: Path, budget: str) -> dict[str, Any]:
    """All rivals at one size, on the report text."""
    folder = scratch / "run"
    by_ppl = our_plan(folder, asked, budget, "--objective", "ppl")
    shutil.copyfile(by_ppl["file"], scratch / "ppl.gguf")
    ours = our_plan(folder, asked, budget)
    workspace = Workspace(folder, Settings.load(folder / "settings.json"), Silent())
    bench, size = Bench(workspace=workspace, folder=scratch), ours["budget_bytes"]
    with workspace.locked():
        preset = preset_base(workspace.source, budget, workspace.matrix)
        files = {
            "preset": bench.write("preset", preset.types),
            "Cerebellum": Path(ours["file"]),
            "by perplexity": scratch / "ppl.gguf",
            "depth bands": bench.write("bands", band_types(bench, size, band_damages(bench))),
            "weighted MSE": bench.write("mse", mse_types(bench, size, ALL_TYPES)),
            "weighted MSE, K-quants": bench.write("mse-k", mse_types(bench, size, K_LADDER)),
        }
        variants = {name: file_variant(path, name) for name, path in files.items()}
        rows = score(bench, variants | without_iq(bench, ours), asked.report_chunks)
    for name, row in rows.items():
        row["bytes"] = files[name].stat().st_size if name in files else None
    return {"rows": rows, "plan": ours, "plan_by_perplexity": by_ppl}


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        for budget in asked.budgets:
            result = one_budget(asked, Path(scratch), budget)
            show(budget, result["rows"])
            print(save(f"{asked.name}-{budget}", {"model": asked.model.name, "budget": budget, **result}))


if __name__ == "__main__":
    main()
