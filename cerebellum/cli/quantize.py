"""One GGUF at one of llama.cpp's presets: llama-quantize's job, with our encoder or with ggml's.

Types, fallbacks and metadata are llama-quantize's, and with ggml's encoder so is every byte. With ours the file
says so in one more key of its metadata, by which this command knows its own files again. No file is
measured here; that is `cerebellum run`, or `cerebellum compare` afterwards.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from cerebellum import encode, imatrix
from cerebellum.base import preset_base
from cerebellum.codec import Record
from cerebellum.encode import moments
from cerebellum.encode.encoders import Encoder, OurEncoder, choose, watched_inputs
from cerebellum.engine.protocols import Engine
from cerebellum.errors import BadInput
from cerebellum.files import is_one_of
from cerebellum.gguf import TensorSource, encode_kv, read_gguf, write_gguf
from cerebellum.layout import Layout
from cerebellum.progress import Reporter
from cerebellum.settings import GGML, OURS, Domain, EncoderName
from cerebellum.shards import Recipe, tensor_content
from cerebellum.source import Source, open_source
from cerebellum.texts import load_corpora

_ENCODER_KEY = "cerebellum.encoder"


@dataclass(frozen=True, kw_only=True)
class Quantizing:
    """What to quantize and how.

    ``moments`` is where second moments lie or are put, by default beside ``out``; they are made from the first
    ``chunks`` chunks of ``ctx`` tokens of ``texts``, 0 for all. Without an ``imatrix`` all columns count alike.
    """

    source: Path
    preset: str
    out: Path
    imatrix: Path | None
    encoder: EncoderName
    feedback: bool
    moments: Path | None
    texts: tuple[Domain, ...]
    ctx: int
    chunks: int
    threads: int
    force: bool = False
    allow_requantize: bool = False


class Quantized(Record, frozen=True, kw_only=True):
    """The answer: the file and who rounded it. Sizes are in bytes; ``seconds`` are those of rounding and writing,
    ``moments_seconds`` those before it, 0 where second moments were there or not wanted.
    """

    path: str
    preset: str
    encoder: EncoderName
    moments: str | None
    tensors: int
    source_bytes: int
    bytes: int
    sha256: str
    seconds: float
    moments_seconds: float


def quantize(request: Quantizing, engine: Engine, reporter: Reporter) -> Quantized:
    """Writes the file, whole or not at all.

    Raises:
        BadInput: the source is quantized already and that was not allowed, a file is in the way, the matrix
            is another model's, or a type needs one.
    """
    source = open_source(request.source, allow_requantize=request.allow_requantize)
    _refuse_output(request, source)
    matrix = None if request.imatrix is None else _matrix(request.imatrix, source)
    started = time.monotonic()
    encoder = choose(request.encoder, engine, _moments(request, engine, source, reporter), reporter)
    prepared = time.monotonic()
    base = preset_base(engine, source, request.preset, matrix, has_imatrix=matrix is not None)
    recipe = Recipe(
        source=source,
        layout=Layout(tensors=source.tensors, groups={}, base=base),
        matrix=matrix,
        engine=encoder,
        folder=request.out.parent,
        threads=request.threads,
    )
    records = (*base.records, *_records(encoder))
    n_bytes, sha256 = _write(recipe, request.out, records, reporter)
    fed_by = encoder.moments if isinstance(encoder, OurEncoder) else None
    return Quantized(
        path=str(request.out),
        preset=base.label,
        encoder=OURS if isinstance(encoder, OurEncoder) else GGML,
        moments=str(fed_by.path) if fed_by else None,
        tensors=len(source.tensors),
        source_bytes=source.n_bytes,
        bytes=n_bytes,
        sha256=sha256,
        seconds=time.monotonic() - prepared,
        moments_seconds=prepared - started,
    )


def _refuse_output(request: Quantizing, source: Source) -> None:
    out = request.out
    given = [*source.paths, request.imatrix or request.source, *(text.path for text in request.texts)]
    if is_one_of(out, given):
        raise BadInput(f"{out}: is an input and would be replaced; give another -o")
    if out.exists() and not request.force and not _is_ours(out):
        raise BadInput(
            f"{out}: is there already and was not written here; give another -o, or --force to replace it"
        )


def _is_ours(path: Path) -> bool:
    """Says whether our encoder made a file; ggml's bytes are llama-quantize's and tell nothing of who wrote them."""
    try:
        return read_gguf(path).value(_ENCODER_KEY) is not None
    except BadInput:
        return False


def _matrix(path: Path, source: Source) -> imatrix.ImportanceMatrix:
    found = imatrix.read(path)
    if not set(found.entries) & set(source.tensors):
        raise BadInput(f"{path}: has no entry for a tensor of this model; give its own matrix")
    return found


def _moments(
    request: Quantizing, engine: Engine, source: Source, reporter: Reporter
) -> moments.Moments | None:
    """Returns the second moments that were given, whatever text they are of, or those of this text."""
    watched = watched_inputs(request.encoder, request.feedback, source.tensors)
    if watched is None or not watched.weights:
        return None
    if request.moments is not None and request.moments.exists():
        return moments.read_given(request.moments, watched)
    out = request.moments or request.out.with_suffix(".moments.gguf")
    moments.refuse_foreign(out)
    reporter.note(watched.said())
    corpus = load_corpora(engine, source.path, request.texts, request.ctx)
    asked = moments.Asked(
        watched=watched,
        fingerprint=lambda: source.fingerprint,
        corpus=corpus,
        chunks=request.chunks or corpus.n_chunks,
        engine=engine.identity,
        out=out,
    )
    return moments.compute_or_reuse(asked, engine=engine, shards=source.paths, reporter=reporter)


def _records(encoder: Encoder) -> tuple[bytes, ...]:
    """Says in the file who rounded it, where that was not llama.cpp."""
    if not isinstance(encoder, OurEncoder):
        return ()
    fed = f", errors fed back by moments {encoder.moments.sha256[:16]}" if encoder.moments else ""
    return (encode_kv(_ENCODER_KEY, f"version {encode.ENCODER_VERSION}{fed}", GGUFValueType.STRING),)


def _write(recipe: Recipe, out: Path, records: tuple[bytes, ...], reporter: Reporter) -> tuple[int, str]:
    """Writes the file; returns its size in bytes and its SHA-256, worked out as the bytes went by."""
    base = recipe.layout.base
    digest = hashlib.sha256()
    with reporter.task(f"quantizing to {base.label}", len(recipe.source.tensors)) as tick:

        def content(name: str) -> Iterator[NDArray[np.uint8]]:
            yield from tensor_content(recipe, name, base.types[name])
            tick()

        tensors = [
            TensorSource(name=name, shape=tensor.shape, type=base.types[name], chunks=partial(content, name))
            for name, tensor in recipe.source.tensors.items()
        ]
        n_bytes = write_gguf(out, records, tensors, base.alignment, digest.update)
    return n_bytes, digest.hexdigest()
