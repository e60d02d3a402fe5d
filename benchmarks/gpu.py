"""One machine with a GPU, both sides: Cerebellum from nothing, and the stock loop of the same build.

    python benchmarks/gpu.py MODEL --llama-bin DIR [--budget Q3_K_M] [--name gpu-h100-model]

Wall time, tokens, and where the time goes; the stock loop (base and every group requantized whole, the whole
text scored) is worked out from one llama-quantize, llama-perplexity and llama-imatrix of the same session.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import save, stock, stock_perplexity, timed

from cerebellum.cli.commands import cli
from cerebellum.cli.doctor import check_swaps
from cerebellum.codec import as_json
from cerebellum.engine.timetable import time_table
from cerebellum.engine.timings import collecting
from cerebellum.llama.library import build_id, devices
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.progress import Silent
from cerebellum.settings import SELECTION_TEXT


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bin", type=Path, help="folder of llama-quantize, -perplexity and -imatrix")
    parser.add_argument("--base", default="Q3_K_M")
    parser.add_argument("--demote", default="Q2_K")
    parser.add_argument("--max-increase", default="3%")
    parser.add_argument("--budget", help="a size or preset: a budget run too")
    parser.add_argument("--imatrix-chunks", type=int, default=100)
    parser.add_argument("--report-chunks", type=int, default=100)
    parser.add_argument("--max-chunks", type=int, default=0)
    parser.add_argument("--text", type=Path, help="of the selection [default: the prose that comes along]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpu-layers", type=int, default=-1)
    parser.add_argument(
        "--folder", type=Path, help="where runs and stock files go [default: a temporary one]"
    )
    parser.add_argument("--encoder", help="ours or ggml [default: the program's]")
    parser.add_argument("--feedback", help="on or off, of our encoder [default: the program's]")
    parser.add_argument("--swaps", action="store_true", help="doctor's check of swaps first")
    parser.add_argument("--no-threshold", action="store_true", help="leave the threshold run out")
    parser.add_argument("--no-stock", action="store_true")
    parser.add_argument("--name", default="gpu", help="of the JSON in results/")
    return parser.parse_args()


def ours(asked: argparse.Namespace, folder: Path, goal: list[str]) -> dict[str, Any]:
    """One `cerebellum run` in this process, from nothing: wall seconds, tokens and the table of parts."""
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--base", asked.base, "--threads", asked.threads, "--gpu-layers", asked.gpu_layers, *goal]
    options += ["--imatrix-chunks", asked.imatrix_chunks, "--report-chunks", asked.report_chunks]
    options += ["--allow-requantize", "--select-text", asked.text or "prose", "--report-text", "prose"]
    options += ["--encoder", asked.encoder] if asked.encoder else []
    options += ["--no-feedback"] if asked.feedback == "off" else []
    command = ["run", asked.model, "-o", folder, *options]
    started = time.perf_counter()
    with collecting() as timings:
        try:
            cli.main([str(part) for part in command], standalone_mode=False)
        except SystemExit as ended:
            print(f"cerebellum run ended with {ended.code}", flush=True)
    seconds = time.perf_counter() - started
    print(f"\n{' '.join(goal)}: {seconds:.1f} s\n{time_table(timings).table()}", flush=True)
    plan = json.loads((folder / "plan.json").read_text())
    kept = ("predicted_delta_pct", "measured_delta_pct", "ci_pct", "budget_bytes", "label")
    found = {key: plan[key] for key in kept if key in plan}
    return {
        "seconds": seconds,
        "goal": goal,
        "timings": as_json(time_table(timings)),
        **found,
        **_counts(folder),
    }


def _counts(folder: Path) -> dict[str, Any]:
    """Tokens and chunks, as the manifest has them, and how many groups there were."""
    manifest = json.loads((folder / "manifest.json").read_text())
    groups = json.loads((folder / "groups.json").read_text())["groups"]
    return {
        "groups": len([group for group in groups if not group["protected"]]),
        "evidence": manifest.get("evidence", manifest.get("measured")),
    }


def theirs(asked: argparse.Namespace, folder: Path, text: Path, groups: int) -> dict[str, Any]:
    """The stock tools, each once, and what a loop over every group takes by them."""
    quantize, perplexity = (
        stock("llama-quantize", asked.llama_bin),
        stock("llama-perplexity", asked.llama_bin),
    )
    imatrix = stock("llama-imatrix", asked.llama_bin)
    on_gpu = ["-ngl", "99"] if asked.gpu_layers else []
    matrix, variant = folder / "stock-imatrix.gguf", folder / "stock.gguf"
    chunks = ["--chunks", str(asked.imatrix_chunks)]
    command = [imatrix, "-m", asked.model, "-f", text, "-o", matrix, "-c", "512", *chunks, *on_gpu]
    made = timed(command)
    print(f"llama-imatrix, {asked.imatrix_chunks} chunks: {made.seconds:.1f} s", flush=True)
    one = rf"^blk\.[0-9]+\.ffn_up.*\.weight$={asked.demote.lower()}"
    rest = ["--allow-requantize", "--imatrix", matrix, "--tensor-type", one]
    quantized = timed([quantize, *rest, asked.model, variant, asked.base, str(asked.threads)])
    print(f"llama-quantize: {quantized.seconds:.1f} s", flush=True)
    scored = _scored(perplexity, variant, text, asked, on_gpu)
    print(f"llama-perplexity: {scored}", flush=True)
    loop = made.seconds + (groups + 1) * (quantized.seconds + scored["seconds"])
    return {
        "imatrix_seconds": made.seconds,
        "quantize_seconds": quantized.seconds,
        "perplexity": scored,
        "loop_seconds_worked_out": loop,
    }


def _scored(
    binary: Path, model: Path, text: Path, asked: argparse.Namespace, on_gpu: list[str]
) -> dict[str, float]:
    """llama-perplexity of the whole text, on the GPU by its environment variable."""
    if on_gpu:
        os.environ["LLAMA_ARG_N_GPU_LAYERS"] = "99"
    return stock_perplexity(binary, model, text, 512, asked.threads)


def swaps(asked: argparse.Namespace) -> dict[str, Any]:
    """Whether swapped logits are a fresh load's, bit for bit, and how long the parts of it took."""
    engine = LlamaEngine(EngineSettings(threads=asked.threads, gpu_layers=asked.gpu_layers), note=print)
    with collecting() as timings:
        report = check_swaps(asked.model, engine, Silent())
    print(f"swaps: {report}\n{time_table(timings).table()}", flush=True)
    return report.as_json() | {"timings": as_json(time_table(timings))}


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {
            "model": asked.model.name,
            "bytes": asked.model.stat().st_size,
            "build": build_id(),
            "devices": [f"{device.name}: {device.description}" for device in devices()],
            "arguments": [part for part in sys.argv[1:] if part != str(asked.model)],
        }
        if asked.swaps:
            result["swaps"] = swaps(asked)
        runs = {} if asked.no_threshold else {"threshold": ["--max-increase", asked.max_increase]}
        if "threshold" in runs and asked.max_chunks:
            runs["threshold"] += ["--max-chunks", str(asked.max_chunks)]
        if asked.budget:
            runs["budget"] = ["--budget", asked.budget]
        for name, goal in runs.items():
            result[name] = ours(asked, folder / name, goal)
            save(asked.name, result)
        if not asked.no_stock:
            groups = result["threshold"]["groups"] if "threshold" in result else 7
            result["stock"] = theirs(asked, folder, asked.text or SELECTION_TEXT, groups)
        print(save(asked.name, result))


if __name__ == "__main__":
    main()
