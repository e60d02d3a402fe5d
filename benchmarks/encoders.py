"""Our encoder against ggml's: speed on one core and weighted error, on real tensors and on made ones.

Both encode the same rows in turns in one process, and the fastest of several rounds counts. Real rows are
the demo model's matrices with its importance matrix; made rows are normal, with log-normal importances of
several spreads: what real models have is wider than what the demo's has. The error is the one that ggml's
encoders minimise, importance * sqrt(sigma * mean square + x^2) * squared error.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import cerebellum, save
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cerebellum.encode import ENCODER_VERSION, SUPPORTED, encode
from cerebellum.gguf import bits_per_weight
from cerebellum.imatrix import read
from cerebellum.llama.quantize import QuantizeJob, quantize, to_float
from cerebellum.settings import DEMO_MODEL
from cerebellum.source import open_source

T = GGMLQuantizationType
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SIGMA = {T.Q2_K: 1.0, T.Q3_K: 2.0, T.Q4_K: 2.0, T.Q5_K: 2.0, T.Q6_K: 0.0, T.Q8_0: 0.0}
MADE_ROWS, MADE_COLUMNS = 512, 2048


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one matrix, (rows, columns), and the importance of its columns."""

    values: Floats
    importance: Floats


def real_rows(model: Path, matrix: Path) -> list[Rows]:
    """Every matrix of the layers that has an importance and rows of whole blocks, expert by expert."""
    source, found = open_source(model), read(matrix)
    rows = []
    for name, tensor in source.tensors.items():
        importance = found.importance(name)
        if importance is None or not name.startswith("blk.") or tensor.shape[0] % 256:
            continue
        columns = tensor.shape[0]
        values = to_float(source.read(name), tensor.type, columns).reshape(importance.size // columns, -1)
        parts = importance.reshape(-1, columns)
        rows += [
            Rows(values=v.reshape(-1, columns), importance=i) for v, i in zip(values, parts, strict=True)
        ]
    return rows


def made_rows(log_sd: float) -> list[Rows]:
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(MADE_ROWS, MADE_COLUMNS)) * 0.02).astype(np.float32)
    importance = np.exp(rng.normal(size=MADE_COLUMNS) * log_sd).astype(np.float32)
    return [Rows(values=values, importance=importance)]


def ours(rows: Rows, kind: GGMLQuantizationType, threads: int) -> Bytes:
    return encode(rows.values, kind, rows.importance, threads=threads)


def theirs(rows: Rows, kind: GGMLQuantizationType, threads: int) -> Bytes:
    job = QuantizeJob(
        name="rows",
        raw=rows.values.view(np.uint8).ravel(),
        shape=rows.values.shape[::-1],
        from_type=T.F32,
        to_type=kind,
        importance=rows.importance,
    )
    return np.concatenate(list(quantize(job, threads)))


def weighted_error(rows: Rows, raw: Bytes, kind: GGMLQuantizationType) -> float:
    columns = rows.values.shape[1]
    back = to_float(raw.ravel(), kind, columns).reshape(rows.values.shape).astype(np.float64)
    weights = np.broadcast_to(rows.importance.astype(np.float64), rows.values.shape)
    if SIGMA[kind]:
        blocks = rows.values.astype(np.float64).reshape(-1, 256)
        spread = SIGMA[kind] * (blocks**2).mean(axis=1, keepdims=True)
        weights = weights * np.sqrt(spread + blocks**2).reshape(rows.values.shape)
    return float((weights * (back - rows.values) ** 2).sum())


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(tables: Sequence[Rows], kind: GGMLQuantizationType, rounds: int, threads: int) -> dict[str, Any]:
    """Both encoders in turns, the fastest round of each; errors as a ratio of sums."""
    seconds: dict[str, list[float]] = {"ours": [], "ggml": []}
    for _ in range(rounds):
        seconds["ours"].append(timed(lambda: _each(ours, tables, kind, threads)))
        seconds["ggml"].append(timed(lambda: _each(theirs, tables, kind, threads)))
    best = {name: min(values) for name, values in seconds.items()}
    errors = [
        sum(weighted_error(rows, encoder(rows, kind, threads), kind) for rows in tables)
        for encoder in (ours, theirs)
    ]
    elements = sum(rows.values.size for rows in tables)
    return {
        "elements": elements,
        "ours_million_per_s": elements / best["ours"] / 1e6,
        "ggml_million_per_s": elements / best["ggml"] / 1e6,
        "speed_ratio": best["ggml"] / best["ours"],
        "error_ratio": errors[0] / errors[1],
    }


def _each(
    encoder: Callable[[Rows, GGMLQuantizationType, int], Bytes],
    tables: Sequence[Rows],
    kind: GGMLQuantizationType,
    threads: int,
) -> None:
    for rows in tables:
        encoder(rows, kind, threads)


def cases(asked: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, list[Rows]]]:
    matrix = asked.imatrix or scratch / "imatrix.gguf"
    if asked.imatrix is None:
        cerebellum("imatrix", asked.model, "-o", matrix, "--imatrix-text", "prose", "--chunks", "100")
    yield asked.model.stem, real_rows(asked.model, matrix)
    for log_sd in asked.log_sd:
        yield f"normal, log-sd {log_sd:g}", made_rows(log_sd)


def show(name: str, found: dict[str, dict[str, Any]]) -> None:
    table = Table("type", "ours, M/s", "ggml, M/s", "faster", "weighted error", title=name)
    for kind, row in found.items():
        table.add_row(
            kind,
            f"{row['ours_million_per_s']:.1f}",
            f"{row['ggml_million_per_s']:.1f}",
            f"{row['speed_ratio']:.1f}x",
            f"{row['error_ratio']:.3f}",
        )
    Console(width=110).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--imatrix", type=Path, help="one made already")
    parser.add_argument("--log-sd", type=float, nargs="*", default=[0.0, 1.0, 2.0, 3.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="encoders", help="of the JSON in results/")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    kinds = sorted(SUPPORTED, key=bits_per_weight)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, tables in cases(asked, Path(scratch)):
            results[name] = {kind.name: compare(tables, kind, asked.rounds, asked.threads) for kind in kinds}
            show(name, results[name])
    machine = {"cpu": _cpu(), "load_1min": os.getloadavg()[0], "threads": asked.threads}
    print(save(asked.name, {"encoder": ENCODER_VERSION, "run_on": machine, "cases": results}))


def _cpu() -> str:
    """The processor's name as Linux gives it, or what Python knows of it elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
