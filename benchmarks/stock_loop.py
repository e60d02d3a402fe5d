"""The sweep as everybody does it, against Cerebellum: same groups, type, matrix, text and context.

The usual way re-quantizes and rewrites the whole model for every group (llama-quantize, anchored
--tensor-type) and scores the whole text each time (llama-perplexity). Both are run here, one after the
other, and every ratio comes from this one run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from common import cerebellum, save, stock, stock_perplexity, timed
from rich.console import Console
from rich.table import Table

from cerebellum.settings import DEMO_MODEL, SELECTION_TEXT


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--text", type=Path, default=SELECTION_TEXT)
    parser.add_argument("--llama-bin", type=Path, help="folder of llama-quantize and llama-perplexity")
    parser.add_argument("--base", default="Q3_K_M")
    parser.add_argument("--demote", default="Q2_K")
    parser.add_argument("--max-increase", type=float, nargs="+", default=[3.0], help="thresholds in percent")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--imatrix-chunks", type=int, default=100)
    parser.add_argument("--name", default="stock_loop", help="of the JSON in results/")
    parser.add_argument("--allow-requantize", action="store_true", help="for a model quantized already")
    parser.add_argument("--base-file", type=Path, help="a base made already, instead of --base")
    return parser.parse_args()


def stock_sweep(asked: argparse.Namespace, groups: list[str], matrix: Path, folder: Path) -> dict[str, Any]:
    """Base, then every group: quantize the model, score the text."""
    quantize = stock("llama-quantize", asked.llama_bin)
    perplexity = stock("llama-perplexity", asked.llama_bin)
    options = ["--imatrix", matrix, *(["--allow-requantize"] if asked.allow_requantize else [])]
    rows: dict[str, Any] = {}
    for group in ["", *groups]:
        out, seconds = asked.base_file or folder / "variant.gguf", 0.0
        if group or not asked.base_file:
            pattern = rf"^blk\.[0-9]+\.{group}\.weight$={asked.demote.lower()}"
            override = ["--tensor-type", pattern] if group else []
            out = folder / "variant.gguf"
            command = [quantize, *options, *override, asked.model, out, asked.base, str(asked.threads)]
            seconds = timed(command).seconds
        scored = stock_perplexity(perplexity, out, asked.text, asked.ctx, asked.threads)
        rows[group or "base"] = scored | {"seconds": seconds + scored["seconds"]}
        print(f"stock {group or 'base'}: {rows[group or 'base']}", flush=True)
    return rows


def compare(
    asked: argparse.Namespace, limit: float, stock_rows: dict[str, Any], ours: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Verdicts side by side, and what each took."""
    base = stock_rows["base"]["ppl"]
    rows = []
    for found in ours["measurements"]:
        (group,) = found["groups"]
        delta = 100 * (stock_rows[group]["ppl"] / base - 1)
        rows.append(
            {
                "group": group,
                "stock_delta_pct": delta,
                "stock_verdict": "tolerant" if delta < limit else "sensitive",
                **{key: found[key] for key in ("delta_pct", "ci_pct", "chunks", "verdict", "near_tie")},
            }
        )
    stock_tokens = sum(int(row["chunks"]) * asked.ctx for row in stock_rows.values())
    stock_seconds = sum(row["seconds"] for row in stock_rows.values())
    return {
        "threshold_pct": limit,
        "groups": rows,
        "same_verdicts": sum(r["stock_verdict"] == r["verdict"] for r in rows),
        "stock_tokens": stock_tokens,
        "tokens": ours["tokens_scored"],
        "tokens_ratio": stock_tokens / ours["tokens_scored"],
        "stock_seconds": stock_seconds,
        "seconds": seconds,
        "seconds_ratio": stock_seconds / seconds,
    }


def show(result: dict[str, Any]) -> None:
    table = Table(
        "group", "stock", "", "Cerebellum", "", "chunks", title=f"Limit +{result['threshold_pct']:g}%"
    )
    for row in result["groups"]:
        low, high = row["ci_pct"]
        table.add_row(
            row["group"],
            f"{row['stock_delta_pct']:+.2f}%",
            row["stock_verdict"],
            f"{row['delta_pct']:+.2f}% [{low:+.2f}, {high:+.2f}]",
            row["verdict"] + (" (near tie)" if row["near_tie"] else ""),
            str(row["chunks"]),
        )
    console = Console(width=110)
    console.print(table)
    tokens = (
        f"tokens {result['stock_tokens']:,} against {result['tokens']:,}: {result['tokens_ratio']:.1f}x fewer"
    )
    seconds = f"wall {result['stock_seconds']:.1f} s against {result['seconds']:.1f} s"
    agreed = f"same verdict for {result['same_verdicts']} of {len(result['groups'])} groups"
    console.print(f"{agreed}; {tokens}; {seconds}: {result['seconds_ratio']:.1f}x less", highlight=False)


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        matrix = folder / "imatrix.gguf"
        # The matrix is given to both, so making it is in neither time.
        cerebellum(
            "imatrix",
            asked.model,
            "-o",
            matrix,
            "--chunks",
            str(asked.imatrix_chunks),
            "--ctx",
            str(asked.ctx),
            "--imatrix-text",
            "prose",
        )
        results, stock_rows = [], {}
        for limit in asked.max_increase:
            # ggml's encoder and no graphics card: the bytes and the machine of the other side
            flags = ["--encoder", "ggml", "--gpu-layers", "0"]
            flags += ["--base", asked.base, "--demote", asked.demote, "--imatrix", matrix, "--ctx", asked.ctx]
            flags += ["--allow-requantize"] if asked.allow_requantize else []
            flags += ["--base-file", asked.base_file] if asked.base_file else []
            flags += ["--select-text", asked.text, "--report-text", "prose"]
            flags += ["--max-increase", limit, "--threads", asked.threads]
            ours, seconds = cerebellum(
                "measure", asked.model, "-o", folder / f"run-{limit}", *map(str, flags)
            )
            groups = [row["groups"][0] for row in ours["measurements"]]
            stock_rows = stock_rows or stock_sweep(asked, groups, matrix, folder)
            results.append(compare(asked, limit, stock_rows, ours, seconds))
    for result in results:
        show(result)
    path = save(
        asked.name,
        {"model": asked.model.name, "text": asked.text.name, "stock": stock_rows, "runs": results},
    )
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
