"""The official fake engine: no weights are run, damage is what the test says it is.

It opens real shard lists (so layouts, variants and digests are exercised) and reads only their
headers. Its logits are built so that the NLL of a chunk rises by the damage asked for, with noise that
depends on the chunk alone and is therefore shared by base and variants, as on real models.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cerebellum.engine.protocols import Logits, Tokenized, Tokens
from cerebellum.gguf import TensorInfo, read_gguf

Damage = Callable[[TensorInfo], float]
"""A tensor, with its type -> what it adds to the NLL in nats/token; NaN makes the model collapse."""


def no_damage(_tensor: TensorInfo) -> float:
    return 0.0


@dataclass
class FakeEngine:
    """Tokens are bytes. ``scored`` counts how often each (paths, chunk) was decoded, ``opened`` loads."""

    damage: Damage = no_damage
    noise: float = 0.2
    vocab_size: int = 256
    identity: str = "fake"
    scored: Counter[tuple[tuple[str, ...], bytes]] = field(default_factory=Counter)
    opened: int = 0

    def tokenize(self, path: Path, text: bytes) -> Tokenized:
        read_gguf(path)
        return Tokenized(tokens=np.frombuffer(text, np.uint8).astype(np.int32), bos=None)

    @contextmanager
    def open(self, paths: Sequence[Path], ctx: int) -> Iterator[FakeModel]:
        tensors = [tensor for path in paths for tensor in read_gguf(path).tensors]
        self.opened += 1
        total = float(sum(self.damage(tensor) for tensor in tensors))
        yield FakeModel(engine=self, names=tuple(path.name for path in paths), damage=total)


@dataclass(frozen=True, kw_only=True)
class FakeModel:
    """An open fake: ``damage`` is the sum over its tensors, nats/token."""

    engine: FakeEngine
    names: tuple[str, ...]
    damage: float

    @property
    def vocab_size(self) -> int:
        return self.engine.vocab_size

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
