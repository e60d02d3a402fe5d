"""The base's logits of a few chunks, on disk, so that variants can be compared with them for free.

Bounded in bytes and removed when the measuring is done; losing it costs a decode, never a measurement.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cerebellum.files import atomic_writer
from cerebellum.llama.engine import Logits


class LogitCache:
    """One .npy file of (S, V) float32 a chunk, for the first chunks that fit in ``max_bytes``."""

    def __init__(self, folder: Path, chunks: Sequence[int], chunk_bytes: int, max_bytes: int) -> None:
        self.folder = folder
        self.chunks = frozenset(chunks[: max_bytes // max(chunk_bytes, 1)])
        self.n_bytes = len(self.chunks) * chunk_bytes

    def store(self, chunk: int, logits_SV: Logits) -> None:
        """Keeps a chunk of the base, whole or not at all."""
        if chunk in self.chunks:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_writer(self._path(chunk), logits_SV.nbytes) as stream:
                np.save(stream, logits_SV)

    def load(self, chunk: int) -> Logits | None:
        """The base's logits, mapped from the file, or None where they are not kept."""
        path = self._path(chunk)
        if chunk not in self.chunks or not path.exists():
            return None
        logits_SV: Logits = np.load(path, mmap_mode="r")
        return logits_SV

    def missing(self, chunks: Sequence[int]) -> list[int]:
        """Those of ``chunks`` that should be here and are not."""
        return [chunk for chunk in chunks if chunk in self.chunks and not self._path(chunk).exists()]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk}.npy"
