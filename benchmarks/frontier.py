"""The whole curve: llama.cpp's presets, and the plans that the same curves give at the same layout.

One `cerebellum run --budget` measures the response curves; every plan here is what they propose at a
preset's size, nothing else measured for it. Presets and plans are then scored on the report text, as KL
divergence from the source; intervals take articles for independent, and the preset's own error counts. Presets are
llama-quantize's, rounded by ggml; plans are rounded as a run rounds them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import budget as rivals
import matplotlib
from common import ON_PROSE, articles, bounds, cerebellum, save, share
from making import Maker
from matplotlib.figure import Figure

from cerebellum import open_run
from cerebellum.base import preset_base
from cerebellum.errors import AnswerIsNo
from cerebellum.measure.artifacts import Curves
from cerebellum.measure.measurer import file_variant, measuring
from cerebellum.plan.artifacts import FrontierRow
from cerebellum.plan.budget import frontier, plan_unmeasured
from cerebellum.plan.target import Target
from cerebellum.progress import Silent
from cerebellum.settings import DEFAULT_ENCODER, DEMO_MODEL, ENCODERS, KLD
from cerebellum.stats.clusters import less_than_reference
from cerebellum.workspace import Workspace

PRESETS = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_XS", "Q3_K_S", "IQ3_M"),
    *("Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
)
PICTURE = Path(__file__).parent.parent / "docs" / "frontier.png"


def measure(bench: rivals.Bench, curves: Curves, presets: list[str], chunks: int) -> list[dict[str, Any]]:
    """Measures size and KL divergence of every preset and of the plan of its size, on the report text."""
    workspace = bench.workspace
    maker = Maker(workspace=workspace, folder=bench.folder / "presets")
    corpus = workspace.report_corpus
    order = sorted(corpus.sample(chunks, workspace.settings.seed))
    everywhere = articles(workspace.engine, workspace.source.path, corpus)
    of_article = [everywhere[chunk] for chunk in order]
    rows = []
    with measuring(workspace, workspace.source_variant, order, corpus) as measurer:
        for name in presets:
            base = preset_base(workspace.engine, workspace.source, name, workspace.matrix)
            path = maker.write(name, base.types, "ggml", base)
            n_bytes = path.stat().st_size
            preset = measurer.kld_means(file_variant(path, name), order)
            row: dict[str, Any] = {"preset": name, "bytes": n_bytes, "preset_kld": float(preset.mean())}
            with suppress(AnswerIsNo):  # smaller than the types of the curves allow
                plan = plan_unmeasured(curves, workspace.layout, Target(file_bytes=n_bytes), KLD)
                variant = workspace.shards.variant(plan.changes)
                ours = measurer.kld_means(variant, order)
                row |= {
                    "plan_bytes": plan.file_bytes,
                    "plan_kld": float(ours.mean()),
                    "less_kld_pct": bounds(less_than_reference(ours, preset, of_article)),
                    "plan_predicted": curves.base_kld + (plan.predicted_kld or 0.0),
                }
            rows.append(row)
    return rows


def picture(rows: list[dict[str, Any]], predicted: Sequence[FrontierRow]) -> Figure:
    """Draws presets and plans as measured, and what the curves foretell of every size between."""
    matplotlib.rcParams["svg.hashsalt"] = "cerebellum"
    drawn = Figure(figsize=(9, 4.6), dpi=110, layout="constrained")
    axes = drawn.add_subplot()
    presets = [(row["bytes"] / 1e6, row["preset_kld"]) for row in rows]
    plans = [(row["plan_bytes"] / 1e6, row["plan_kld"]) for row in rows if "plan_kld" in row]
    axes.plot(*zip(*presets, strict=True), "o", color="#b4532a", label="llama.cpp's presets, measured")
    axes.plot(*zip(*plans, strict=True), "o", color="#1f6f8b", label="Cerebellum at the same size, measured")
    line = [(row.file_bytes / 1e6, row.predicted_kld) for row in predicted]
    axes.plot(
        *zip(*line, strict=True), color="#1f6f8b", linewidth=1, alpha=0.6, label="foretold by the curves"
    )
    names: dict[int, list[str]] = {}
    for row in rows:
        names.setdefault(row["bytes"], []).append(row["preset"])
    for (x, y), row in zip(presets, rows, strict=True):
        label = ", ".join(names.pop(row["bytes"], []))
        axes.annotate(label, (x, y), xytext=(2, 6), textcoords="offset points", fontsize=8, rotation=60)
    axes.set_yscale("log")
    axes.set_xlim(min(x for x, _ in presets) - 0.3, max(x for x, _ in presets) + 0.6)
    axes.set_ylim(top=3.4 * max(y for _, y in presets))
    axes.set_xlabel("file, MB")
    axes.set_ylabel("KL divergence from the F16 source, nats a token")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    return drawn


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table of benchmarks/README.md, in Markdown."""
    print(
        "| preset | bytes | preset, nats | plan, nats | less | foretold |\n| --- | --- | --- | --- | --- | --- |"
    )
    for row in rows:
        plan = row.get("plan_kld")
        cells = "under the smallest plan | | "
        if plan is not None:
            cells = f"{plan:.5f} | {share(row['less_kld_pct'])} | {row['plan_predicted']:.5f}"
        print(f"| {row['preset']} | {row['bytes']:,} | {row['preset_kld']:.5f} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--chunks", type=int, default=64, help="random ones of the report text")
    parser.add_argument("--folder", type=Path, help="a run folder with curves, instead of a run of its own")
    parser.add_argument("--encoder", choices=ENCODERS, default=DEFAULT_ENCODER, help="of the plans")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpu-layers", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch) / "run"
        if not asked.folder:
            flags = ["--budget", "Q3_K_M", "--imatrix-chunks", "100", "--report-chunks", "8", "--keep-shards"]
            machine = ["--threads", str(asked.threads), "--gpu-layers", str(asked.gpu_layers)]
            cerebellum(
                "run", DEMO_MODEL, "-o", folder, *flags, *ON_PROSE, *machine, "--encoder", asked.encoder
            )
        workspace = Workspace.reopen(folder, rivals.engine_for, Silent())
        curves = open_run(folder).curves()
        with workspace.locked():
            bench = rivals.Bench(workspace=workspace, folder=Path(scratch))
            rows = measure(bench, curves, asked.presets, asked.chunks)
            foretold = frontier(curves, workspace.layout, KLD)
    show(rows)
    picture(rows, foretold).savefig(PICTURE)
    print(PICTURE, save("frontier", {"chunks": asked.chunks, "encoder": asked.encoder, "rows": rows}))


if __name__ == "__main__":
    main()
