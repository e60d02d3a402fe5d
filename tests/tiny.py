"""Small models, texts and runs for the tests of the stages: nothing here needs more than seconds."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from odd_gguf import any_kv

from cerebellum.base import Base
from cerebellum.engine.fake import FakeEngine
from cerebellum.gguf import (
    GGMLQuantizationType,
    GGUFValueType,
    TensorInfo,
    TensorSource,
    encode_kv,
    tensor_bytes,
    write_gguf,
)
from cerebellum.groups import make_groups, role_of
from cerebellum.layout import Layout
from cerebellum.ledger import Ledger
from cerebellum.llama.native import LlamaEngine
from cerebellum.measure.measurer import Measurer
from cerebellum.measure.race import ChunkAsk, ChunkScores, RaceSettings, Sweep, race
from cerebellum.settings import DEMO_MODEL
from cerebellum.shards import Recipe, Shards
from cerebellum.source import Source, open_source
from cerebellum.stats.paired import Interval
from cerebellum.stats.sequential import SpendingRule
from cerebellum.texts import Corpus, load_corpus
from cerebellum.verdicts import Changes, Measurement, Threshold, drive

T, V = GGMLQuantizationType, GGUFValueType
Found = TypeVar("Found")

MATRIX = (256, 256)
MATRIX_Q3, MATRIX_Q2 = 256 * 110, 256 * 84  # bytes of a 256 x 256 matrix: a Q3_K block has 110, Q2_K 84

Shapes = Mapping[str, tuple[int, ...]]


def hybrid_shapes() -> dict[str, tuple[int, ...]]:
    """One Mamba-2 layer and one attention layer, each with two routed experts and a shared one."""
    ffn = {
        "ffn_norm.weight": (256,),
        "ffn_gate_inp.weight": (256, 2),
        "ffn_gate_exps.weight": (256, 256, 2),
        "ffn_down_exps.weight": (256, 256, 2),
        "ffn_gate_shexp.weight": MATRIX,
    }
    mamba = {"attn_norm.weight": (256,), "ssm_in.weight": MATRIX, "ssm_a": (1, 8)}
    attention = {"attn_norm.weight": (256,), "attn_q.weight": MATRIX}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (256, 300)}
    for layer, mixer in enumerate((mamba, attention)):
        shapes |= {f"blk.{layer}.{rest}": shape for rest, shape in {**mixer, **ffn}.items()}
    return shapes | {"output_norm.weight": (256,)}


def random_tensor(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> TensorSource:
    """Normal values that depend on the name alone."""
    seed = int.from_bytes(name.encode()[-8:], "little")
    values = 0.05 * np.random.default_rng(seed).standard_normal(shape[::-1])
    if "norm" in name:
        values = 1.0 + values
    raw = values.astype(np.float32 if kind == T.F32 else np.float16).tobytes()
    return TensorSource(name=name, shape=shape, type=kind, chunks=lambda: [raw])


def hybrid_records() -> list[bytes]:
    arch = "granitehybrid"
    return [
        encode_kv("general.architecture", arch, V.STRING),
        encode_kv("general.file_type", 1, V.UINT32),
        encode_kv(f"{arch}.block_count", 2, V.UINT32),
        encode_kv(f"{arch}.expert_count", 2, V.UINT32),
        encode_kv(f"{arch}.expert_used_count", 1, V.UINT32),
        encode_kv(f"{arch}.context_length", 4096, V.UINT32),
    ]


def write_hybrid(path: Path, shapes: Shapes | None = None) -> Path:
    """A GGUF that only the fake engine can open: real names, real bytes, no vocabulary."""
    tensors = [random_tensor(n, s, _plain_type(n, s)) for n, s in (shapes or hybrid_shapes()).items()]
    write_gguf(path, hybrid_records(), tensors)
    return path


def _plain_type(name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    plain = len(shape) == 1 or shape[0] == 1 or "ffn_gate_inp" in name
    return T.F32 if plain else T.F16


def write_llama(path: Path, n_embd: int = 576, n_ff: int = 1536, layers: int = 2) -> Path:
    """SmolLM2's shape in short: a llama of random weights whose rows take no block of 256."""
    demo, arch = open_source(DEMO_MODEL), "llama"
    n_vocab = demo.tensors["token_embd.weight"].shape[1]
    n_heads, n_kv = n_embd // 64, n_embd // 64 // 3
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_embd, n_vocab)}
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (n_embd,),
            f"blk.{layer}.attn_q.weight": (n_embd, n_embd),
            f"blk.{layer}.attn_k.weight": (n_embd, n_kv * 64),
            f"blk.{layer}.attn_v.weight": (n_embd, n_kv * 64),
            f"blk.{layer}.attn_output.weight": (n_embd, n_embd),
            f"blk.{layer}.ffn_norm.weight": (n_embd,),
            f"blk.{layer}.ffn_gate.weight": (n_embd, n_ff),
            f"blk.{layer}.ffn_up.weight": (n_embd, n_ff),
            f"blk.{layer}.ffn_down.weight": (n_ff, n_embd),
        }
    shapes["output_norm.weight"] = (n_embd,)
    numbers = {
        "block_count": layers,
        "context_length": 2048,
        "embedding_length": n_embd,
        "feed_forward_length": n_ff,
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv,
        "rope.dimension_count": 64,
        "vocab_size": n_vocab,
    }
    records = [
        encode_kv("general.architecture", arch, V.STRING),
        encode_kv("general.name", "Tiny 576", V.STRING),
        encode_kv("general.file_type", 1, V.UINT32),
        *(encode_kv(f"{arch}.{key}", number, V.UINT32) for key, number in numbers.items()),
        any_kv(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5, V.FLOAT32),
        *(record for key, record in demo.kv_records.items() if key.startswith("tokenizer.")),
    ]
    write_gguf(path, records, [random_tensor(n, s, _plain_type(n, s)) for n, s in shapes.items()])
    return path


def split_by_hand(model: Path, folder: Path, stem: str, count: int) -> list[Path]:
    """``model`` as ``count`` split files with llama.cpp's names and keys; the first has the metadata."""
    source = open_source(model, allow_requantize=True)
    names = list(source.tensors)
    edges = [len(names) * i // count for i in range(count + 1)]
    paths = []
    for number in range(count):
        records = [] if number else list(source.kv_records.values())
        records += [
            encode_kv("split.no", number, V.UINT16),
            encode_kv("split.count", count, V.UINT16),
            encode_kv("split.tensors.count", len(names), V.INT32),
        ]
        tensors = [_copied(source, name) for name in names[edges[number] : edges[number + 1]]]
        paths.append(folder / f"{stem}-{number + 1:05d}-of-{count:05d}.gguf")
        write_gguf(paths[-1], records, tensors)
    return paths


def _copied(source: Source, name: str) -> TensorSource:
    tensor = source.tensors[name]
    return TensorSource(name=name, shape=tensor.shape, type=tensor.type, chunks=lambda: [source.read(name)])


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor of a GGUF as (type name, bytes)."""
    source = open_source(path, allow_requantize=True)
    return {name: (tensor.type.name, source.read(name).tobytes()) for name, tensor in source.tensors.items()}


# ---- the fake bench: synthetic model, real shards, real ledger, damage as told ----


@dataclass
class Recorder:
    """A reporter that remembers what it was told."""

    tasks: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ticks: int = 0

    def task(self, title: str, total: int) -> Any:
        from contextlib import nullcontext

        self.tasks.append((title, total))

        def tick() -> None:
            self.ticks += 1

        return nullcontext(tick)

    def note(self, text: str) -> None:
        self.notes.append(text)


def damage_at_q2(by_role: Mapping[str, float]) -> Callable[[TensorInfo], float]:
    """Damage, nats/token, of each role that is at Q2_K, spread over its tensors' bytes."""

    def damage(tensor: TensorInfo) -> float:
        n_layers = 2 if role_of(tensor.name).startswith("ffn") else 1
        return by_role.get(role_of(tensor.name), 0.0) / n_layers if tensor.type == T.Q2_K else 0.0

    return damage


@dataclass(kw_only=True)
class Bench:
    """Everything a sweep needs, on the fake engine. ``session()`` is a new process, as it were."""

    folder: Path
    source: Source
    base: Base
    text: Path
    engine: FakeEngine
    ctx: int = 32
    damage: dict[str, float] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        groups = {g.name: g for g in make_groups(self.source) if not g.protected}
        return Layout(tensors=self.source.tensors, groups=groups, base=self.base)

    def corpus(self) -> Corpus:
        return load_corpus(self.engine, self.source.path, self.text, self.ctx)

    def session(self) -> tuple[Ledger, Measurer, Shards]:
        ledger = Ledger(self.folder / "ledger.sqlite")
        recipe = Recipe(
            source=self.source,
            layout=self.layout,
            matrix=None,
            engine=LlamaEngine(),
            folder=self.folder / "shards",
            threads=2,
        )
        return ledger, Measurer(self.engine, ledger, self.corpus()), Shards(recipe, ledger)


def measure_fixed(
    candidates: Iterable[Changes],
    chunks: tuple[int, ...],
    population: int,
    *,
    alpha: float = 0.025,
    scored_per_chunk: int = 1,
) -> Sweep[tuple[Measurement, ...]]:
    """Every candidate on the same ``chunks``: a race with one look, at which each bound is wrong with ``alpha``."""
    looks = (len(chunks),)
    settings = RaceSettings(
        order=chunks,
        looks=looks,
        threshold=Threshold(limit_pct=0.0),
        rule=SpendingRule(alpha=alpha, population=population, looks=looks),
        scored_per_chunk=scored_per_chunk,
    )
    return (yield from race(list(candidates), settings))


def run_sweep(sweep: Sweep[Found], measurer: Measurer, shards: Shards) -> Found:
    """Drives a sweep to its end: every question is measured on real shards."""

    def answer(ask: ChunkAsk) -> ChunkScores:
        return ChunkScores(nll_N=measurer.chunk_means(shards.variant(ask.changes), ask.chunks))

    return drive(sweep, answer)


def hybrid_base(source: Source) -> Base:
    """Every demotable tensor at Q3_K, the rest as it is."""
    protected = {t for g in make_groups(source) if g.protected for t in g.tensors}
    types = {
        name: tensor.type if name in protected or tensor.shape[0] % 256 else T.Q3_K
        for name, tensor in source.tensors.items()
    }
    return Base(label="Q3_K_M", types=types, records=tuple(source.kv_records.values()))


def make_bench(folder: Path, **damage: float) -> Bench:
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_bytes(small_text(20 * 32))
    source = open_source(write_hybrid(folder / "hybrid.F16.gguf"))
    engine = FakeEngine(damage=damage_at_q2(damage))
    return Bench(
        folder=folder, source=source, base=hybrid_base(source), text=text, engine=engine, damage=damage
    )


def small_text(n_bytes: int, seed: int = 0) -> bytes:
    """Printable ASCII; no two chunks of it are the same."""
    return bytes(np.random.default_rng(seed).integers(97, 123, n_bytes, dtype=np.uint8))


def measured(changes: Mapping[str, str], mean: float | None, half: float = 0.0, n: int = 4) -> Measurement:
    """A measurement made by hand, ``mean`` in nats/token; None has collapsed."""
    if mean is None:
        return Measurement(changes=dict(changes), delta=None)
    delta = Interval(mean=mean, low=mean - half, high=mean + half, n=n, population=n)
    return Measurement(changes=dict(changes), delta=delta)


# ---- runs of the command line ----


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The one line of trouble: the last on stderr, the only one of its kind, no traceback."""
        lines = self.err.splitlines()
        assert "Traceback" not in self.err, self.err
        assert [line for line in lines if line.startswith("cerebellum: ")] == lines[-1:], self.err
        return lines[-1]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cerebellum", *map(str, arguments)]


def run_process(*arguments: object, **options: Any) -> Ran:
    """The command in a process of its own."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, **options)
    return Ran(code=done.returncode, out=done.stdout, err=done.stderr)


def tiny_run(source: Path, folder: Path, select: Path, report: Path, *more: object) -> list[object]:
    """The arguments of a whole run in seconds: everything may be demoted, so that something is."""
    sizes = "--ctx 64 --chunks 4 --imatrix-chunks 2 --report-chunks 3 --threads 2 --max-increase 999%"
    texts = ("--select-text", select, "--report-text", report)
    return ["run", source, "-o", folder, *sizes.split(), *texts, *more]


def n_measured(ledger: Ledger) -> int:
    """How many chunks a ledger holds."""
    with closing(sqlite3.connect(ledger.path)) as database:
        return int(database.execute("SELECT count(*) FROM chunk").fetchone()[0])


def ledger_rows(folder: Path) -> dict[tuple[Any, ...], bytes]:
    """Every measurement in a run folder: (variant, text, ctx, engine, metric, chunk) -> bytes."""
    path = folder / "ledger.sqlite"
    if not path.exists():
        return {}
    query = (
        "SELECT variant, text, ctx, engine, metric, chunk, nll FROM series "
        "JOIN chunk ON chunk.series = series.id"
    )
    database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)
    try:
        return {tuple(key): nll for *key, nll in database.execute(query)}
    except sqlite3.OperationalError:  # not yet made, or just being made
        return {}
    finally:
        database.close()


def children_of(pid: int) -> list[int]:
    """Processes of a process, and theirs."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    below: dict[int, list[int]] = {}
    for line in listed.splitlines():
        child, parent = map(int, line.split())
        below.setdefault(parent, []).append(child)
    found = list(below.get(pid, []))
    for child in found:  # it grows while it is read
        found += below.get(child, [])
    return found


def ray_workers_of(pid: int) -> list[int]:
    """The processes of Ray's actors that a run has started: Ray names them."""
    found = []
    for child in children_of(pid):
        try:
            name = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if b"_Worker" in name:
            found.append(child)
    return found


def total_bytes(kind: GGMLQuantizationType, shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(tensor_bytes(kind, shape) for shape in shapes)


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0
