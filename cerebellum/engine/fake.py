"""The official fake engine: no weights are run, damage is what the test says it is.

It opens real shard lists (so layouts, variants and digests are exercised) and reads only their
headers. Its logits are built so that the NLL of a chunk rises by the damage asked for, with noise that
depends on the chunk alone and is therefore shared by base and variants, as on real models. Its presets and
its encoder need no llama.cpp either, so that a whole run of both modes works on it, in seconds.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

from cerebellum.engine.asking import Asker
from cerebellum.engine.fake_asker import FakeAsker
from cerebellum.engine.protocols import (
    Bytes,
    CannotSwap,
    ColumnProducts,
    ColumnSquares,
    Floats,
    Job,
    Logits,
    QuantizeJob,
    Scores,
    Tokenized,
    Tokens,
    Watch,
)
from cerebellum.engine.scoring import score_rows
from cerebellum.engine.speed import GENERATED_TOKENS, PROMPT_TOKENS, REPEATS, Speed, speed_of
from cerebellum.errors import BadInput
from cerebellum.gguf import (
    TensorInfo,
    bits_per_weight,
    block_size,
    fits,
    is_quantized,
    parse_type,
    preset_label,
    read_gguf,
    row_bytes,
)

_MIXTURES = {"IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_XXS", "IQ3_M": "IQ3_S"}
"""Presets that are named after no type of their own, and the type that the fake makes of them."""

Damage = Callable[[TensorInfo], float]
"""A tensor, with its type -> what it adds to the NLL in nats/token; NaN makes the model collapse."""


def no_damage(_tensor: TensorInfo) -> float:
    return 0.0


@dataclass
class FakeEngine:
    """Tokens are bytes. ``scored`` counts how often each (paths, chunk) was decoded, ``opened`` loads,
    ``swapped`` swaps; ``cannot_swap`` is why it refuses to swap, if it does. Where ``chunks_at_once`` share a decode,
    each chunk's NLL is off by up to ``mingling`` nats, by which chunks they are and by its place among them."""

    damage: Damage = no_damage
    noise: float = 0.2
    n_vocab: int = 256
    identity: str = "fake"
    build: str = "fake"
    scored: Counter[tuple[tuple[str, ...], bytes]] = field(default_factory=Counter)
    opened: int = 0
    swapped: int = 0
    chunks_at_once: int = 1
    mingling: float = 0.0
    cannot_swap: str = ""
    on_gpu: bool = False
    _rounded: dict[bytes, Floats] = field(default_factory=dict, repr=False)

    def tokenize(self, path: Path, text: bytes, *, special: bool = False) -> Tokenized:
        read_gguf(path)
        return Tokenized(tokens=np.frombuffer(text, np.uint8).astype(np.int32), bos=None)

    def can_swap(self, weights: int, staged: int) -> bool:
        """Whether it was not told to refuse."""
        return not self.cannot_swap

    def chunks_together(self, ctx: int) -> int:
        return self.chunks_at_once

    def vocab_size(self, path: Path) -> int:
        return self.n_vocab

    def importance(
        self, paths: Sequence[Path], ctx: int, chunks: Iterable[Tokens], tick: Callable[[], None]
    ) -> Mapping[str, ColumnSquares]:
        """Gives every matrix in a block an importance that depends on its name alone."""
        n_rows = 0
        for tokens_T in chunks:
            n_rows += len(tokens_T)
            tick()
        weights = [t for path in paths for t in read_gguf(path).tensors if t.name.startswith("blk.")]
        return {t.name: _made_up_squares(t, n_rows) for t in weights if len(t.shape) > 1 and t.shape[0] > 1}

    def moments(
        self,
        paths: Sequence[Path],
        ctx: int,
        chunks: Iterable[Tokens],
        watched: Mapping[str, Watch],
        tick: Callable[[], None],
    ) -> Mapping[str, ColumnProducts]:
        """Gives every watched weight an input whose columns hang together in a way that follows from its name."""
        n_chunks = 0
        for _ in chunks:
            n_chunks += 1
            tick()
        weights = {t.name: t for path in paths for t in read_gguf(path).tensors if t.name in watched}
        return {name: _made_up_products(t, watched[name], n_chunks * ctx) for name, t in weights.items()}

    def importance_and_moments(
        self,
        paths: Sequence[Path],
        ctx: int,
        chunks: Iterable[Tokens],
        watched: Mapping[str, Watch],
        n_watched: int,
        tick: Callable[[], None],
    ) -> tuple[Mapping[str, ColumnSquares], Mapping[str, ColumnProducts]]:
        """Gives what both would give alone."""
        read = list(chunks)
        squares = self.importance(paths, ctx, read, tick)
        return squares, self.moments(paths, ctx, read[:n_watched], watched, lambda: None)

    def preset_types(
        self, source: Path, preset: LlamaFileType, *, has_imatrix: bool, allow_requantize: bool = False
    ) -> dict[str, GGMLQuantizationType]:
        """Gives every matrix in a block the type that the preset is named after, or Q8_0 where rows refuse it."""
        label = preset_label(preset)
        label = _MIXTURES.get(label, label)
        wanted = parse_type(label.rpartition("_")[0] if "_K_" in label else label)
        return {tensor.name: _preset_type(tensor, wanted) for tensor in read_gguf(source).tensors}

    def quantize(self, job: QuantizeJob, threads: int) -> Iterator[Bytes]:
        """Yields bytes of the right number that depend on the weights and the type, and mean nothing to ggml."""
        if job.from_type == job.to_type:
            yield job.raw
            return
        if not fits(job.to_type, job.shape):
            raise BadInput(f"{job.name}: rows of {job.shape[0]} cannot be {job.to_type.name}")
        exact = _as_float(job.raw, job.from_type).reshape(-1, job.shape[0])
        n_bytes = row_bytes(job.to_type, job.shape[0])
        made = [_made_up_row(row, job.to_type, n_bytes) for row in exact]
        self._rounded |= dict(zip(made, _rounded(exact, job.to_type), strict=True))
        yield np.frombuffer(b"".join(made), np.uint8)

    def to_float(self, raw: Bytes, type_: GGMLQuantizationType, n_per_row: int) -> Floats:
        """Returns what ``quantize`` rounded these very rows from; floats are converted as they are."""
        if not is_quantized(type_):
            return _as_float(raw, type_)
        rows = np.ascontiguousarray(raw).reshape(-1, row_bytes(type_, n_per_row))
        return np.concatenate([self._rounded[row.tobytes()] for row in rows])

    def encoded(self, job: QuantizeJob) -> Bytes:
        """Returns what ``quantize`` yields."""
        return np.concatenate(list(self.quantize(job, threads=1)))

    def round_trip(self, job: QuantizeJob) -> Floats:
        """Returns the tensor's values rounded to the type's grid."""
        exact = _as_float(job.raw, job.from_type).reshape(-1, job.shape[0])
        return _rounded(exact, job.to_type).reshape(-1)

    @property
    def machine(self) -> str:
        return "a fake machine"

    def speed(self, paths: Sequence[Path]) -> Speed:
        """Says that a byte takes a nanosecond for every token, and a prompt a tenth of that."""
        seconds = sum(path.stat().st_size for path in paths) * 1e-9
        return speed_of([seconds * PROMPT_TOKENS / 10] * REPEATS, [seconds * GENERATED_TOKENS] * REPEATS)

    def asker(self, paths: Sequence[Path]) -> AbstractContextManager[Asker]:
        """Gives a fake that knows nothing; its answers are off by their company where chunks' are."""
        return nullcontext(FakeAsker(identity=self.identity, mingling=self.mingling))

    @contextmanager
    def open(self, paths: Sequence[Path], ctx: int) -> Iterator[FakeModel]:
        self.opened += 1
        yield FakeModel(engine=self, base=tuple(paths))

    @contextmanager
    def resident(self, paths: Sequence[Path], ctx: int) -> Iterator[FakeModel]:
        with self.open(paths, ctx) as model:
            yield model


class FakeModel:
    """An open fake, swappable too: its ``damage`` is the sum over the tensors of its shards, nats/token."""

    def __init__(self, engine: FakeEngine, base: tuple[Path, ...]) -> None:
        self.engine = engine
        self.chunks_at_once = engine.chunks_at_once
        self._base = base
        self.names: tuple[str, ...] = ()
        self.damage = 0.0
        self._show(base)

    def swap(self, shards: Sequence[Path]) -> None:
        """Puts each shard where the one of its split number is."""
        if len(self._base) < 2:
            raise CannotSwap("the model is one file, not shards")
        if self.engine.cannot_swap:
            self._show(self._base)
            raise CannotSwap(self.engine.cannot_swap)
        paths = list(self._base)
        for path in shards:
            paths[int(read_gguf(path).value("split.no"))] = path
        self.engine.swapped += 1
        self._show(paths)

    def _show(self, paths: Sequence[Path]) -> None:
        tensors = [tensor for path in paths for tensor in read_gguf(path).tensors]
        self.names = tuple(path.name for path in paths)
        self.damage = float(sum(self.engine.damage(tensor) for tensor in tensors))

    @property
    def vocab_size(self) -> int:
        return self.engine.n_vocab

    def score(self, jobs: Sequence[Job]) -> list[Scores]:
        size = self.chunks_at_once
        decodes = [jobs[at : at + size] for at in range(0, len(jobs), size)]
        return [self._mingled(decode, place) for decode in decodes for place in range(len(decode))]

    def _mingled(self, decode: Sequence[Job], place: int) -> Scores:
        """Scores the chunk at a place of a decode, off by what its company does."""
        found = score_rows(self.logits(decode[place].tokens_T), decode[place])
        if not self.engine.mingling:
            return found
        company = b"".join(job.tokens_T.tobytes() for job in decode)
        off = self.engine.mingling * (zlib.crc32(bytes([place]) + company) / 2**32)
        kld_S = None if found.kld_S is None else found.kld_S + off
        return replace(found, nll_S=found.nll_S + off, kld_S=kld_S)

    def logits(self, tokens_T: Tokens) -> Logits:
        """The target's probability is exp(-nll) with nll = 2 + noise + damage * (1 + noise)."""
        self.engine.scored[(self.names, tokens_T.tobytes())] += 1
        targets = tokens_T[len(tokens_T) // 2 + 1 :]
        rng = np.random.default_rng(zlib.crc32(tokens_T.tobytes()))
        noise = self.engine.noise * rng.standard_normal(len(targets))
        nll = np.maximum(2.0 + noise + self.damage * (1.0 + noise), 1e-3)
        others = np.log(-np.expm1(-nll) / (self.vocab_size - 1))
        logits = np.repeat(others[:, None], self.vocab_size, axis=1)
        logits[np.arange(len(targets)), targets] = -nll
        return logits.astype(np.float32)


def _made_up_squares(tensor: TensorInfo, n_rows: int) -> ColumnSquares:
    n_experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
    rng = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    squares = rng.lognormal(size=(n_experts, tensor.shape[0])) * n_rows
    return ColumnSquares(squares=squares, counts=np.full(n_experts, n_rows, np.int64))


def _made_up_products(tensor: TensorInfo, watch: Watch, n_rows: int) -> ColumnProducts:
    """Sums ``n_rows`` made-up rows for each expert; neighbouring columns have half of their noise in common."""
    n_experts = 1 if watch.pooled or len(tensor.shape) < 3 else tensor.shape[2]
    found = ColumnProducts.empty(n_experts, tensor.shape[0], watch.span, same_rows=False)
    rng = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    for expert in range(n_experts):
        rows = rng.standard_normal((n_rows, tensor.shape[0] + 1), np.float32)
        found.add(expert, rows[:, 1:] + rows[:, :-1])
    return found


def _preset_type(tensor: TensorInfo, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(tensor.shape) < 2 or tensor.shape[0] < 32 or "norm" in tensor.name or "gate_inp" in tensor.name:
        return tensor.type
    return wanted if fits(wanted, tensor.shape) else GGMLQuantizationType.Q8_0


def _as_float(raw: Bytes, type_: GGMLQuantizationType) -> Floats:
    """Reads floats; the fake's sources are F32 or F16."""
    dtype = np.float32 if type_ == GGMLQuantizationType.F32 else np.float16
    return np.ascontiguousarray(raw).view(dtype).astype(np.float32)


def _made_up_row(row: Floats, type_: GGMLQuantizationType, n_bytes: int) -> bytes:
    """Returns bytes that depend on one row and the type alone, as those of a real encoder do.

    The two bytes that begin a block are zero. IQ types have their scale there, so that errors can be fed back
    without a code being worth a change.
    """
    made_up = hashlib.shake_128(bytes([int(type_)]) + row.tobytes()).digest(n_bytes)
    blocks = np.frombuffer(made_up, np.uint8).reshape(-1, row_bytes(type_, block_size(type_))).copy()
    if is_quantized(type_):
        blocks[:, :2] = 0
    return blocks.tobytes()


def _rounded(rows: Floats, type_: GGMLQuantizationType) -> Floats:
    """Rounds every row to a grid whose step halves with each bit of the type, as real types very nearly do."""
    step = np.abs(rows).max(axis=1, keepdims=True) / 2.0 ** (bits_per_weight(type_) - 1)
    return np.asarray(np.round(rows / np.maximum(step, 1e-30)) * step, np.float32)
