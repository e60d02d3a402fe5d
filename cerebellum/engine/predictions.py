"""The base's predictions for a few chunks, on disk, so that variants are compared with them for free.

Bounded in bytes and removed when the measuring is done; losing it costs a decode, never a measurement.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.scoring import Prediction
from cerebellum.files import atomic_write_bytes


class PredictionCache:
    """Two .npy files a chunk, for the first of ``chunks`` that fit in ``max_bytes``."""

    def __init__(self, folder: Path, chunks: Sequence[int], chunk_bytes: int, max_bytes: int) -> None:
        self.folder = folder
        self.chunks = frozenset(chunks[: max_bytes // max(chunk_bytes, 1)])
        self.n_bytes = len(self.chunks) * chunk_bytes

    def claim(self, owner: str) -> None:
        """Forgets what a killed run of another ``owner`` (model, text, context) left in the folder."""
        mark = self.folder / "owner"
        if mark.exists() and mark.read_text() == owner:
            return
        self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(mark, owner.encode())

    def store(self, chunk: int, prediction: Prediction) -> None:
        """Keeps a chunk of the base; the probabilities go last, so they vouch for the rest."""
        if chunk not in self.chunks:
            return
        rows = np.stack([prediction.neg_entropy_S, prediction.top_S.astype(np.float64)])
        self._save(self._rows_path(chunk), rows)
        self._save(self._path(chunk), prediction.probabilities_SV)

    def load(self, chunk: int) -> Prediction | None:
        """The base's prediction, mapped from the file, or None where it is not kept."""
        if chunk not in self.chunks or not self._path(chunk).exists():
            return None
        neg_entropy_S, top_S = np.load(self._rows_path(chunk))
        return Prediction(
            probabilities_SV=np.load(self._path(chunk), mmap_mode="r"),
            neg_entropy_S=neg_entropy_S,
            top_S=top_S.astype(np.int64),
        )

    def missing(self, chunks: Sequence[int]) -> list[int]:
        """Those of ``chunks`` that should be here and are not."""
        return [chunk for chunk in chunks if chunk in self.chunks and not self._path(chunk).exists()]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk}.npy"

    def _rows_path(self, chunk: int) -> Path:
        return self.folder / f"{chunk}.rows.npy"

    def _save(self, path: Path, values: NDArray[np.generic]) -> None:
        # np.save writes to a file past Python, and on a full disk says so without an errno.
        content = io.BytesIO()
        np.save(content, values)
        atomic_write_bytes(path, content.getvalue())
