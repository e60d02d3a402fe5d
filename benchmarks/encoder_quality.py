"""Encoders judged by the model: whole presets, identical types, loss and KL on text that chose nothing.

Every variant is a way to round: ggml's codes or our encoder's, as they are, with their blocks scaled back
up (`Unshrink`), or with their errors fed back between columns (`feed_back`, by second moments of the
activations on the selection text). All are compared with the first, paired by chunk; intervals are over
chunks, 95%.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import reference, save, score
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cerebellum.base import Base, preset_base
from cerebellum.encode import RESCALABLE, SUPPORTED, Unshrink, encode, feed_back, unshrink
from cerebellum.encode.encoders import FED_BACK, round_rows
from cerebellum.encode.moments import Moments, Span, watch
from cerebellum.encode.moments import compute_or_reuse as moments_of
from cerebellum.engine.protocols import QuantizeJob
from cerebellum.gguf import TensorSource, is_quantized, row_bytes, write_gguf
from cerebellum.imatrix import ImportanceMatrix, compute_or_reuse, read
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.llama.quantize import quantize, to_float
from cerebellum.progress import Silent
from cerebellum.settings import DEMO_MODEL, REPORT_TEXT, SELECTION_TEXT
from cerebellum.source import Source, open_source
from cerebellum.stats.paired import superpopulation_interval
from cerebellum.texts import Corpus, load_corpus

T = GGMLQuantizationType
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One matrix to round, (rows, columns): importance (columns,) and moments by spans of columns, if known."""

    values: Floats
    kind: GGMLQuantizationType
    importance: Floats | None
    moments: tuple[Span, ...]
    threads: int


Rounding = Callable[[Matrix], Bytes]


def by_ggml(matrix: Matrix) -> Bytes:
    job = QuantizeJob(
        name="matrix",
        raw=matrix.values.view(np.uint8).ravel(),
        shape=matrix.values.shape[::-1],
        from_type=T.F32,
        to_type=matrix.kind,
        importance=matrix.importance,
    )
    return np.concatenate(list(quantize(job, matrix.threads))).reshape(len(matrix.values), -1)


def by_ours(matrix: Matrix, power: float = 1.0) -> Bytes:
    """Our encoder where it knows the type, ggml's where it does not; importances to a power."""
    if matrix.kind not in SUPPORTED:
        return by_ggml(matrix)
    found = matrix.importance
    weights = None if found is None else (found.astype(np.float64) ** power).astype(np.float32)
    return encode(matrix.values, matrix.kind, weights, threads=matrix.threads)


def rescaled(matrix: Matrix, rounding: Rounding, how: Unshrink) -> Bytes:
    raw = rounding(matrix)
    if matrix.kind not in RESCALABLE:
        return raw
    return unshrink(raw, matrix.values, matrix.importance, matrix.kind, how, threads=matrix.threads)


def fed_back(matrix: Matrix, rounding: Rounding, near: int = 0, damping: float = 0.1) -> Bytes:
    """Errors fed back, within ``near`` columns only where that is given, in the coarse types."""
    raw = rounding(matrix)
    if matrix.kind not in FED_BACK:
        return raw
    for span in matrix.moments:
        moments = span.moments
        if near:
            group = np.arange(moments.shape[-1]) // near
            moments = moments * (group[:, None] == group)
        columns = span.columns
        at = slice(row_bytes(matrix.kind, columns.start), row_bytes(matrix.kind, columns.stop))
        raw[:, at] = feed_back(
            *(raw[:, at], matrix.values[:, columns], moments, matrix.kind),
            threads=matrix.threads,
            damping=damping,
        )
    return raw


def by_product(matrix: Matrix) -> Bytes:
    """What `--encoder ours` does: fed back where moments are, else scaled back up."""
    if matrix.kind not in SUPPORTED:
        return by_ggml(matrix)
    spans = matrix.moments if matrix.kind in FED_BACK else ()
    return round_rows(matrix.values, matrix.kind, matrix.importance, spans, matrix.threads)


def variants() -> dict[str, Rounding]:
    """Every way to round by name; the first is what the others are compared with."""
    by_row = Unshrink(share="row")
    fed = partial(fed_back, rounding=by_ours)
    return {
        "ggml": by_ggml,
        "the product": by_product,
        "ggml, unshrunk": partial(rescaled, rounding=by_ggml, how=by_row),
        "ggml, fed back": partial(fed_back, rounding=by_ggml),
        "ours": by_ours,
        "ours, unshrunk": partial(rescaled, rounding=by_ours, how=by_row),
        "ours, half unshrunk": partial(rescaled, rounding=by_ours, how=Unshrink(strength=0.5, share="row")),
        "ours, unshrunk by block": partial(rescaled, rounding=by_ours, how=Unshrink()),
        "ours, unshrunk by tensor": partial(rescaled, rounding=by_ours, how=Unshrink(share="tensor")),
        "ours, importance^0.75, unshrunk": partial(
            rescaled, rounding=partial(by_ours, power=0.75), how=by_row
        ),
        "ours, fed back": fed,
        "ours, fed back, damping 0.03": partial(fed, damping=0.03),
        "ours, fed back, damping 0.3": partial(fed, damping=0.3),
        "ours, fed back within 64": partial(fed, near=64),
        "ours, fed back, unshrunk": partial(rescaled, rounding=fed, how=by_row),
        "ours, unshrunk, fed back": partial(
            fed_back, rounding=partial(rescaled, rounding=by_ours, how=by_row)
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Model:
    source: Source
    base: Base
    matrix: ImportanceMatrix | None
    moments: Moments
    threads: int

    def write(self, path: Path, rounding: Rounding) -> None:
        tensors = [
            TensorSource(
                name=name,
                shape=self.source.tensors[name].shape,
                type=kind,
                chunks=partial(self._rounded, name, kind, rounding),
            )
            for name, kind in self.base.types.items()
        ]
        write_gguf(path, self.base.records, tensors, self.base.alignment)

    def _rounded(self, name: str, kind: GGMLQuantizationType, rounding: Rounding) -> Iterator[Bytes]:
        """One expert after the other, each with its own importance."""
        tensor = self.source.tensors[name]
        if not is_quantized(kind):
            yield from quantize(
                QuantizeJob(
                    name=name,
                    raw=self.source.read(name),
                    shape=tensor.shape,
                    from_type=tensor.type,
                    to_type=kind,
                ),
                self.threads,
            )
            return
        columns = tensor.shape[0]
        experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
        values = to_float(self.source.read(name), tensor.type, columns).reshape(experts, -1, columns)
        found = self.matrix.importance(name) if self.matrix else None
        importance = None if found is None else found.reshape(experts, columns)
        for expert, rows in enumerate(values):
            matrix = Matrix(
                values=rows,
                kind=kind,
                importance=None if importance is None else importance[expert],
                moments=self.moments.of(name, expert),
                threads=self.threads,
            )
            yield rounding(matrix).ravel()


def report(nll: Mapping[str, Vector], kld: Mapping[str, Vector], source: Vector) -> dict[str, dict[str, Any]]:
    first = next(iter(nll))
    loss = {name: float((vector - source).mean()) for name, vector in nll.items()}
    rows = {}
    for name in nll:
        change = superpopulation_interval(nll[name] - nll[first])
        kld_change = superpopulation_interval(kld[name] - kld[first])
        rows[name] = {
            "loss_nats": loss[name],
            "loss_change_pct": 100 * (loss[name] / loss[first] - 1),
            "loss_change_nats": [change.mean, change.low, change.high],
            "kld_nats": float(kld[name].mean()),
            "kld_change_pct": 100 * float(kld[name].mean() / kld[first].mean() - 1),
            "kld_change_nats": [kld_change.mean, kld_change.low, kld_change.high],
        }
    return rows


def show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("rounding", "loss, nats", "change", "±", "KL, nats", "change", "±", title=title)
    first = next(iter(rows.values()))
    for name, row in rows.items():
        _, low, high = row["loss_change_nats"]
        _, kld_low, kld_high = row["kld_change_nats"]
        table.add_row(
            name,
            f"{row['loss_nats']:.5f}",
            f"{row['loss_change_pct']:+.1f}%",
            f"{50 * (high - low) / first['loss_nats']:.1f}",
            f"{row['kld_nats']:.5f}",
            f"{row['kld_change_pct']:+.1f}%",
            f"{50 * (kld_high - kld_low) / first['kld_nats']:.1f}",
        )
    Console(width=110).print(table)


def importance_of(
    asked: argparse.Namespace, engine: LlamaEngine, source: Source, selection: Corpus, folder: Path
) -> ImportanceMatrix:
    if asked.imatrix:
        return read(asked.imatrix)
    return compute_or_reuse(
        engine=engine,
        shards=source.paths,
        fingerprint=lambda: source.fingerprint,
        corpus=selection,
        chunks=asked.imatrix_chunks,
        out=folder / "imatrix.gguf",
        reporter=Silent(),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--presets", nargs="+", default=["Q2_K", "Q3_K_M", "Q4_K_M"])
    parser.add_argument("--text", type=Path, default=REPORT_TEXT)
    parser.add_argument("--imatrix", type=Path, help="one made already")
    parser.add_argument("--moments", type=Path, help="made already from just this, or made there")
    parser.add_argument("--imatrix-chunks", type=int, default=100, help="and of the second moments")
    parser.add_argument("--only", nargs="*", help="variants by name, beside ggml")
    parser.add_argument("--chunks", type=int, default=120)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--name", default="encoder_quality", help="of the JSON in results/")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    source = open_source(asked.model, allow_requantize=True)
    engine = LlamaEngine(EngineSettings(threads=asked.threads, gpu_layers=asked.gpu_layers))
    chosen = {
        name: rounding
        for name, rounding in variants().items()
        if name == "ggml" or not asked.only or name in asked.only
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        selection = load_corpus(engine, source.path, SELECTION_TEXT, asked.ctx)
        matrix = importance_of(asked, engine, source, selection, Path(scratch))
        moments = moments_of(
            engine=engine,
            shards=source.paths,
            fingerprint=lambda: source.fingerprint,
            watched=watch(source.tensors),
            corpus=selection,
            chunks=asked.imatrix_chunks,
            out=asked.moments or Path(scratch) / "moments.gguf",
            reporter=Silent(),
        )
        corpus = load_corpus(engine, asked.model, asked.text, asked.ctx)
        chunks = range(min(asked.chunks, corpus.n_chunks))
        predictions, nll_source = reference(engine, source.paths, corpus, chunks)
        for preset in asked.presets:
            base = preset_base(engine, source, preset, matrix)
            model = Model(source=source, base=base, matrix=matrix, moments=moments, threads=asked.threads)
            nll, kld = {}, {}
            for name, rounding in chosen.items():
                path = Path(scratch) / "variant.gguf"
                started = time.perf_counter()
                model.write(path, rounding)
                took = time.perf_counter() - started
                nll[name], kld[name] = score(engine, [path], corpus, chunks, predictions)
                path.unlink()
                print(
                    f"{preset}, {name}: KL {kld[name].mean():.5f} nats, written in {took:.1f} s",
                    file=sys.stderr,
                )
            results[preset] = report(nll, kld, nll_source)
            show(f"{preset}, {len(predictions)} chunks", results[preset])
            found = {"model": asked.model.name, "chunks": len(predictions), "presets": results}
            print(save(asked.name, found))


if __name__ == "__main__":
    main()
