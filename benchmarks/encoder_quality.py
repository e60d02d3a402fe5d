"""Encoders judged by the model: whole presets, identical types, loss and KL on text that chose nothing.

Every variant is a way to round: ggml's codes or our encoder's, as they are, with their blocks scaled back
up (`Unshrink`), or with their errors fed back between columns (`feed_back`, by second moments of the
activations on the selection text). All are compared with the first, paired by chunk; intervals are over
chunks, 95%.

The entropy of every model's predictions is measured too. What the loss has beyond the KL divergence is zero on
average for a source that is as sure as it should be, and below zero where an overconfident one is flattened.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import save
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cerebellum.base import Base, preset_base
from cerebellum.encode import DAMPING, RESCALABLE, SUPPORTED, SWEEPS, Unshrink, encode, feed_back, unshrink
from cerebellum.encode.encoders import FED_BACK, round_rows
from cerebellum.encode.moments import Asked, Moments, Span, watch
from cerebellum.encode.moments import compute_or_reuse as moments_of
from cerebellum.engine.protocols import Engine, Job, Kept, QuantizeJob, Scores, Watch
from cerebellum.gguf import TensorSource, block_size, is_quantized, row_bytes, write_gguf
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


_BY_GGML: dict[
    str, Bytes
] = {}  # of one preset: several variants begin with ggml's codes, and those take longest


def by_ggml(matrix: Matrix) -> Bytes:
    weights = b"" if matrix.importance is None else matrix.importance.tobytes()
    key = hashlib.sha256(matrix.values.tobytes() + weights + bytes([int(matrix.kind)])).hexdigest()
    if key not in _BY_GGML:
        _BY_GGML[key] = _by_ggml(matrix)
    return _BY_GGML[key].copy()


def _by_ggml(matrix: Matrix) -> Bytes:
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


def rescaled_iq(matrix: Matrix, how: Unshrink | None) -> Bytes:
    """The product's codes, IQ types with their blocks scaled anew: to keep the projection on the original, or
    without ``how`` to lose the least of what rows give for the activations (`scaled_by_moments`)."""
    if matrix.kind in SUPPORTED or matrix.kind not in RESCALABLE:
        return iq_by_ggml(matrix)
    if how is None:
        return scaled_by_moments(matrix, by_ggml(matrix))
    return rescaled(matrix, by_ggml, how)


def scaled_by_moments(matrix: Matrix, raw: Bytes, damping: float = 0.1) -> Bytes:
    """Blocks scaled by factors f that make (x - f y)' M (x - f y) least over all blocks of a span together.

    x are a row's exact values, y what its blocks read back as, M the second moments with damping as in
    `feed_back`. A factor goes into the block's fp16 scale, the first two bytes of all IQ types.
    """
    size = block_size(matrix.kind)
    n_bytes = row_bytes(matrix.kind, size)
    blocks = raw.reshape(len(raw), -1, n_bytes)
    exact = matrix.values
    rounded = np.asarray(quants.dequantize(raw, matrix.kind), np.float32).reshape(exact.shape)
    factors = np.ones(blocks.shape[:2], np.float32)
    for span in matrix.moments:
        for number, own in enumerate(span.moments):
            width = len(own)
            metric = own + np.eye(width, dtype=np.float32) * damping * float(np.trace(own)) / width
            first = span.start + number * width
            at = slice(first // size, (first + width) // size)
            x = exact[:, first : first + width]
            y = rounded[:, first : first + width].reshape(len(x), -1, size)
            lines = np.einsum("rbi,bij->rbj", y, metric.reshape(-1, size, width), optimize=True)
            inner = np.einsum("rbci,rci->rbc", lines.reshape(*y.shape[:2], -1, size), y, optimize=True)
            inner += np.eye(y.shape[1]) * 1e-6 * (np.einsum("rbb->r", inner)[:, None, None] + 1e-30)
            wanted = np.einsum("rbj,rj->rb", lines, x, optimize=True)
            factors[:, at] = np.linalg.solve(inner, wanted[..., None])[..., 0]
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    changed = (scales * np.clip(factors, 0.9, 1.2)).astype(np.float16)
    blocks[..., :2] = changed[..., None].view(np.uint8)
    return raw


def fed_back(
    matrix: Matrix, rounding: Rounding, near: int = 0, damping: float = DAMPING, sweeps: int = SWEEPS
) -> Bytes:
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
            sweeps=sweeps,
        )
    return raw


def by_product(matrix: Matrix) -> Bytes:
    """What `--encoder ours` does: fed back where moments are, else scaled back up; IQ types begin with ggml's."""
    if matrix.kind not in SUPPORTED:
        return fed_back(matrix, by_ggml)
    spans = matrix.moments if matrix.kind in FED_BACK else ()
    return round_rows(matrix.values, matrix.kind, matrix.importance, spans, matrix.threads)


def iq_by_ggml(matrix: Matrix) -> Bytes:
    """The product's codes but in IQ types, which stay ggml's."""
    return by_product(matrix) if matrix.kind in SUPPORTED else by_ggml(matrix)


def variants() -> dict[str, Rounding]:
    """Every way to round by name."""
    by_row = Unshrink(share="row")
    fed = partial(fed_back, rounding=by_ours)
    return {
        "ggml": by_ggml,
        "the product": by_product,
        "IQ by ggml": iq_by_ggml,
        "IQ unshrunk by block": partial(rescaled_iq, how=Unshrink()),
        "IQ unshrunk by row": partial(rescaled_iq, how=by_row),
        "IQ half unshrunk by row": partial(rescaled_iq, how=Unshrink(strength=0.5, share="row")),
        "IQ scaled by moments": partial(rescaled_iq, how=None),
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
        "ours, fed back, damping 0.1": partial(fed, damping=0.1),
        "ours, fed back, damping 1": partial(fed, damping=1.0),
        "ours, fed back within 64": partial(fed, near=64),
        "ours, fed back within 512": partial(fed, near=512),
        "ours, fed back as in version 1": partial(fed, near=512, damping=0.1, sweeps=4),
        "ours, fed back, unshrunk": partial(rescaled, rounding=fed, how=by_row),
        "ours, unshrunk, fed back": partial(
            fed_back, rounding=partial(rescaled, rounding=by_ours, how=by_row)
        ),
    }


def in_layers(name: str, layers: int | None) -> bool:
    """Says whether a tensor is in one of the first layers; everything is where nobody says how many."""
    return layers is None or (name.startswith("blk.") and int(name.split(".")[1]) < layers)


@dataclass(frozen=True, kw_only=True)
class Model:
    source: Source
    base: Base
    matrix: ImportanceMatrix | None
    moments: Moments
    threads: int
    layers: int | None = None  # only the first so many take the base's types, all else stays as it is

    def write(self, path: Path, rounding: Rounding) -> None:
        tensors = [
            TensorSource(
                name=name,
                shape=self.source.tensors[name].shape,
                type=kind,
                chunks=partial(self._rounded, name, kind, rounding),
            )
            for name, kind in self._types().items()
        ]
        write_gguf(path, self.base.records, tensors, self.base.alignment)

    def _types(self) -> dict[str, GGMLQuantizationType]:
        return {
            name: kind if in_layers(name, self.layers) else self.source.tensors[name].type
            for name, kind in self.base.types.items()
        }

    def _rounded(self, name: str, kind: GGMLQuantizationType, rounding: Rounding) -> Iterator[Bytes]:
        """One expert after the other, each with its own importance."""
        tensor = self.source.tensors[name]
        if not is_quantized(kind) or kind == tensor.type:
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


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Means of each chunk, nats a token: NLL, entropy of the predictions, KL divergence from the source."""

    nll: Vector
    entropy: Vector
    kld: Vector


def reference(engine: Engine, source: Source, corpus: Corpus, chunks: int) -> tuple[list[Kept], Scored]:
    """Returns the source's predictions of the first ``chunks``, and what they score."""
    predictions: list[Kept] = []
    jobs = [Job(tokens_T=corpus.inputs(chunk), keep=True, entropy=True) for chunk in range(chunks)]
    nll, entropy = [], []
    for scores in scored(engine, source.paths, corpus.ctx, jobs):
        assert scores.kept is not None and scores.entropy_S is not None
        predictions.append(scores.kept)
        nll.append(scores.nll_S.mean())
        entropy.append(scores.entropy_S.mean())
    return predictions, Scored(nll=np.array(nll), entropy=np.array(entropy), kld=np.zeros(chunks))


def score(engine: Engine, path: Path, corpus: Corpus, predictions: Sequence[Kept]) -> Scored:
    """Returns what a model scores on the chunks that there are predictions of."""
    jobs = [
        Job(tokens_T=corpus.inputs(chunk), against=prediction, entropy=True)
        for chunk, prediction in enumerate(predictions)
    ]
    rows = []
    for scores in scored(engine, [path], corpus.ctx, jobs):
        assert scores.kld_S is not None and scores.entropy_S is not None
        rows.append((scores.nll_S.mean(), scores.entropy_S.mean(), scores.kld_S.mean()))
    nll, entropy, kld = np.array(rows).T
    return Scored(nll=nll, entropy=entropy, kld=kld)


def scored(engine: Engine, paths: Sequence[Path], ctx: int, jobs: Sequence[Job]) -> Iterator[Scores]:
    """Scores chunks in order, as many at once as the engine decodes together."""
    with engine.resident(paths, ctx) as model:
        for start in range(0, len(jobs), model.chunks_at_once):
            yield from model.score(jobs[start : start + model.chunks_at_once])


def report(found: Mapping[str, Scored], source: Scored) -> dict[str, dict[str, Any]]:
    first = next(iter(found))
    loss = {name: float((one.nll - source.nll).mean()) for name, one in found.items()}
    kld = {name: one.kld for name, one in found.items()}
    rows = {}
    for name, one in found.items():
        change = superpopulation_interval(one.nll - found[first].nll)
        kld_change = superpopulation_interval(one.kld - found[first].kld)
        rows[name] = {
            "loss_nats": loss[name],
            "loss_change_pct": 100 * (loss[name] / loss[first] - 1),
            "loss_change_nats": [change.mean, change.low, change.high],
            "kld_nats": float(kld[name].mean()),
            "kld_change_pct": 100 * float(kld[name].mean() / kld[first].mean() - 1),
            "kld_change_nats": [kld_change.mean, kld_change.low, kld_change.high],
            "entropy_change_nats": _with_interval(one.entropy - source.entropy),
            "loss_beyond_kld_nats": _with_interval(one.nll - source.nll - one.kld),
        }
    return rows


def confidence(one: Scored) -> dict[str, Any]:
    """A model's loss beside the entropy of its predictions, nats a token."""
    return {
        "loss_nats": float(one.nll.mean()),
        "entropy_nats": float(one.entropy.mean()),
        "loss_less_entropy_nats": _with_interval(one.nll - one.entropy),
    }


def _with_interval(values: Vector) -> list[float]:
    found = superpopulation_interval(values)
    return [found.mean, found.low, found.high]


def show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    words = ("rounding", "loss", "change", "±", "KL", "change", "±", "entropy", "loss - KL", "±")
    table = Table(*words, title=title)
    first = next(iter(rows.values()))
    for name, row in rows.items():
        _, low, high = row["loss_change_nats"]
        _, kld_low, kld_high = row["kld_change_nats"]
        beyond, beyond_low, beyond_high = row["loss_beyond_kld_nats"]
        table.add_row(
            name,
            f"{row['loss_nats']:.5f}",
            f"{row['loss_change_pct']:+.1f}%",
            f"{50 * (high - low) / first['loss_nats']:.1f}",
            f"{row['kld_nats']:.5f}",
            f"{row['kld_change_pct']:+.1f}%",
            f"{50 * (kld_high - kld_low) / first['kld_nats']:.1f}",
            f"{row['entropy_change_nats'][0]:+.4f}",
            f"{beyond:+.4f}",
            f"{(beyond_high - beyond_low) / 2:.4f}",
        )
    Console(width=130).print(table)


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


def pooled(weights: Mapping[str, Watch]) -> dict[str, Watch]:
    """Has the experts of a layer that read the same rows share their moments, as those of large models do."""
    same_rows = ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps")
    return {
        name: replace(kept, pooled=kept.pooled or name.split(".")[2] in same_rows)
        for name, kept in weights.items()
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--presets", nargs="+", default=["Q2_K", "Q3_K_M", "Q4_K_M"])
    parser.add_argument("--text", type=Path, default=REPORT_TEXT)
    parser.add_argument("--imatrix", type=Path, help="one made already")
    parser.add_argument("--moments", type=Path, help="made already from just this, or made there")
    parser.add_argument("--imatrix-chunks", type=int, default=100, help="and of the second moments")
    parser.add_argument("--pooled", action="store_true", help="experts that read the same rows share moments")
    parser.add_argument("--only", nargs="*", help="variants by name, beside the one they are compared with")
    parser.add_argument("--against", default="ggml", help="the variant that others are compared with")
    parser.add_argument("--layers", type=int, help="only the first so many are rounded")
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
    chosen = {asked.against: variants()[asked.against]} | {
        name: rounding for name, rounding in variants().items() if not asked.only or name in asked.only
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        selection = load_corpus(engine, source.path, SELECTION_TEXT, asked.ctx)
        matrix = importance_of(asked, engine, source, selection, Path(scratch))
        watched = watch(source.tensors)
        if asked.pooled:
            watched = replace(watched, weights=pooled(watched.weights))
        inside = {name: kept for name, kept in watched.weights.items() if in_layers(name, asked.layers)}
        watched = replace(watched, weights=inside)
        wanted = Asked(
            watched=watched,
            fingerprint=lambda: source.fingerprint,
            corpus=selection,
            chunks=asked.imatrix_chunks,
            engine=engine.identity,
            out=asked.moments or Path(scratch) / "moments.gguf",
        )
        moments = moments_of(wanted, engine=engine, shards=source.paths, reporter=Silent())
        corpus = load_corpus(engine, asked.model, asked.text, asked.ctx)
        predictions, of_source = reference(engine, source, corpus, min(asked.chunks, corpus.n_chunks))
        print(f"source: {confidence(of_source)}", file=sys.stderr)
        for preset in asked.presets:
            base = preset_base(engine, source, preset, matrix)
            model = Model(
                source=source,
                base=base,
                matrix=matrix,
                moments=moments,
                threads=asked.threads,
                layers=asked.layers,
            )
            scores: dict[str, Scored] = {}
            _BY_GGML.clear()
            for name, rounding in chosen.items():
                path = Path(scratch) / "variant.gguf"
                started = time.perf_counter()
                model.write(path, rounding)
                took = time.perf_counter() - started
                scores[name] = score(engine, path, corpus, predictions)
                path.unlink()
                print(
                    f"{preset}, {name}: KL {scores[name].kld.mean():.5f} nats, written in {took:.1f} s",
                    file=sys.stderr,
                )
            results[preset] = report(scores, of_source)
            show(f"{preset}, {len(predictions)} chunks", results[preset])
            found = {
                "model": asked.model.name,
                "chunks": len(predictions),
                "source": confidence(of_source),
                "presets": results,
            }
            print(save(asked.name, found))


if __name__ == "__main__":
    main()
