"""What is attacked: each target turns mutated bytes into a file and reads it as the program does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

sys.path.insert(0, str(Path(__file__).parents[1]))

import run_folder
from tiny import random_tensor, write_hybrid

from cerebellum import imatrix
from cerebellum.bench.artifacts import BenchResults
from cerebellum.codec import as_json, read_artifact
from cerebellum.folder import SizeRow, Sizes
from cerebellum.gguf import GgufFile, encode_kv, read_gguf, write_gguf
from cerebellum.groups import Groups, attention_layers, describe, make_groups, recurrent_layers, source_file
from cerebellum.ledger import Divergence, Ledger, SeriesKey
from cerebellum.llama.guard import check_contents
from cerebellum.manifest import Manifest
from cerebellum.measure.artifacts import Curves, Measurements, read_recorded
from cerebellum.memory.shape import largest_context, memory_shape
from cerebellum.plan.artifacts import AnyPlan
from cerebellum.settings import Budget, Preset, Published, Settings
from cerebellum.source import open_source, plain_metadata
from cerebellum.verify import Verified

from . import mutators

KEY = SeriesKey(variant="v", text="t", ctx=8, engine="fake")


@dataclass(frozen=True)
class Target:
    """A name, what makes the n-th input, and what reads it."""

    name: str
    make: Callable[[Random], bytes]
    read: Callable[[Path], object]


def targets(folder: Path) -> list[Target]:
    """All targets, with their seeds written to ``folder``."""
    return [*_models(folder), *_matrices(folder), _ledger(folder), *_artifacts(folder)]


def _models(folder: Path) -> list[Target]:
    found = []
    for model in (write_hybrid(folder / "hybrid.gguf"), _few_tensors(folder)):
        file = read_gguf(model)
        tensors = [(t.name, t.shape, int(t.type), t.offset - start_of(file)) for t in file.tensors]
        data = file.n_bytes - start_of(file)
        with model.open("rb") as stream:
            head = stream.read(start_of(file))
        records = dict(file.kv_records)
        found += [
            Target(
                f"{model.stem} structured",
                lambda rng, r=records, t=tensors, d=data: mutators.gguf(r, t, d, rng),  # type: ignore[misc]
                read_model,
            ),
            Target(
                f"{model.stem} blind",
                lambda rng, h=head, d=data: mutators.blind(h, rng) + bytes(d),  # type: ignore[misc]
                read_model,
            ),
        ]
    return found


def start_of(file: GgufFile) -> int:
    """Where the tensors' bytes begin."""
    return min(tensor.offset for tensor in file.tensors)


def _few_tensors(folder: Path) -> Path:
    """A llama with a name, languages and a chat template, and next to no weights: quick to write, a lot to read."""
    path = folder / "few.gguf"
    records = [
        encode_kv("general.architecture", "llama", GGUFValueType.STRING),
        encode_kv("general.name", "Few", GGUFValueType.STRING),
        encode_kv("general.languages", ["en", "de"], GGUFValueType.ARRAY),
        encode_kv("tokenizer.chat_template", "{{ messages }}", GGUFValueType.STRING),
        encode_kv("tokenizer.ggml.tokens", ["a", "b"], GGUFValueType.ARRAY),
        *(encode_kv(f"llama.{key}", n, GGUFValueType.UINT32) for key, n in _COUNTS.items()),
    ]
    shapes = {"token_embd.weight": (32, 2), "blk.0.attn_k.weight": (32, 8), "blk.0.attn_norm.weight": (32,)}
    write_gguf(path, records, [random_tensor(n, s, GGMLQuantizationType.F32) for n, s in shapes.items()])
    return path


_COUNTS = {
    "block_count": 1,
    "embedding_length": 32,
    "attention.head_count": 4,
    "attention.head_count_kv": 4,
    "attention.sliding_window": 8,
    "expert_count": 2,
    "expert_used_count": 1,
    "ssm.inner_size": 8,
    "ssm.state_size": 8,
    "context_length": 64,
    "feed_forward_length": 64,
}


def read_model(path: Path) -> None:
    """Header, splits, groups, facts, memory and what llama.cpp could bear: all that `inspect` and `plan` do."""
    source = open_source(path, allow_requantize=True)
    groups = make_groups(source, spans=8)
    json.dumps(as_json(describe(source, groups)), allow_nan=False)
    json.dumps(as_json(source_file(source, source.header_sha256, None)), allow_nan=False)
    metadata = plain_metadata(source.files[0])
    shape = memory_shape(metadata, attention_layers(source), len(recurrent_layers(source)), source.n_bytes)
    memory = shape.at(4096, 4)
    largest_context(shape, memory.total, 1 << 20)
    check_contents(source)


def _matrices(folder: Path) -> list[Target]:
    entries = {
        f"blk.{n}.attn_q.weight": imatrix.Entry(sums=np.ones((1, 8), np.float32), counts=np.array([3]))
        for n in range(4)
    }
    made = folder / "imatrix.gguf"
    imatrix.write(made, entries, "text.txt", 3, 8, "recipe")
    file = read_gguf(made)
    tensors = [(t.name, t.shape, int(t.type), t.offset - start_of(file)) for t in file.tensors]
    records = dict(file.kv_records)
    data = file.n_bytes - start_of(file)
    whole = made.read_bytes()
    legacy = legacy_matrix()
    return [
        Target("imatrix structured", lambda rng: mutators.gguf(records, tensors, data, rng), read_matrix),
        Target("imatrix blind", lambda rng: mutators.blind(whole, rng), read_matrix),
        Target("imatrix .dat blind", lambda rng: mutators.blind(legacy, rng), read_matrix),
    ]


def legacy_matrix() -> bytes:
    """llama.cpp's old format by hand: names, calls, values, then chunks and the data set."""
    numbers = np.arange(8, dtype="<f4").tobytes()
    entry = b"".join(np.array([n], "<i4").tobytes() for n in (6,)) + b"blk.0w"
    entry += np.array([3, 8], "<i4").tobytes() + numbers
    return (
        np.array([2], "<i4").tobytes()
        + entry
        + entry.replace(b"blk.0", b"blk.1")
        + np.array([7], "<i4").tobytes()
    )


def read_matrix(path: Path) -> None:
    """Reads a matrix and all that the quantizer asks of it."""
    matrix = imatrix.read(path)
    for name in matrix.entries:
        matrix.importance(name)
    str(matrix.datasets)
    imatrix.refuse_foreign(path)


def _ledger(folder: Path) -> Target:
    path = folder / "ledger.sqlite"
    with Ledger(path) as ledger:
        series = ledger.series(KEY)
        base = ledger.series(SeriesKey(variant="base", text="t", ctx=8, engine="fake"))
        far = Divergence(base_series=base, kld=np.ones(4), same_top=np.ones(4, np.bool_))
        for chunk in range(20):
            ledger.record(series, chunk, np.ones(4), far)
        ledger.record_content_hash("a", "b", "c")
        ledger.settle()
    whole = path.read_bytes()
    return Target("ledger blind", lambda rng: mutators.blind(whole, rng), read_ledger)


def read_ledger(path: Path) -> None:
    """Opens a ledger and asks for everything that is in it."""
    try:
        with Ledger(path) as ledger:
            series = ledger.series(KEY)
            base = ledger.series(SeriesKey(variant="base", text="t", ctx=8, engine="fake"))
            known = sorted(ledger.measured(series))
            if known:
                ledger.nll(series, known)
            ledger.diverged(series, base)
            ledger.divergence(series, base, range(20))
            ledger.content_hash("a", "b")
            ledger.knows("v")
            ledger.digest()
            ledger.settle()
    finally:
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)


_SIZE = SizeRow(
    label="Q3_K_M",
    asked=Preset(name="Q3_K_M"),
    budget_bytes=7,
    plan="plan.json",
    verify="verify.json",
    bench="bench.json",
)


def _artifacts(folder: Path) -> list[Target]:
    values: dict[str, tuple[Any, Any]] = {
        "settings": (Settings(source=Path("/m.gguf"), goal=Budget(sizes=(Preset(name="Q3_K_M"),))), Settings),
        "source": (run_folder.source(), type(run_folder.source())),
        "groups": (run_folder.groups(run_folder.plan()), Groups),
        "measurements": (run_folder.measurements(), Measurements),
        "curves": (run_folder.curves(), Curves),
        "plan by limit": (run_folder.plan(), AnyPlan),
        "plan by budget": (run_folder.budget_plan(), AnyPlan),
        "verify": (run_folder.verify(), Verified),
        "manifest": (run_folder.manifest(), Manifest),
        "bench": (run_folder.bench(), BenchResults),
        "sizes": (Sizes(sizes=(_SIZE, _SIZE)), Sizes),
        "published": (Published(base_model="a/b", license="mit"), Published),
    }
    found = []
    for name, (value, wanted) in values.items():
        plain = as_json(value)
        raw = json.dumps(plain, indent=2).encode()

        def read(path: Path, wanted: Any = wanted) -> None:
            json.dumps(as_json(read_artifact(path, wanted, "make it again")), allow_nan=False)

        found += [
            Target(f"{name} structured", lambda rng, p=plain: mutators.json_text(p, rng), read),  # type: ignore[misc]
            Target(f"{name} blind", lambda rng, r=raw: mutators.blind(r, rng), read),  # type: ignore[misc]
        ]
    measured = as_json(run_folder.measurements())
    found.append(Target("recorded structured", lambda rng: mutators.json_text(measured, rng), read_recorded))
    return found
