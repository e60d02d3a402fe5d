"""The base's predictions for a few chunks, kept so that variants are compared with them for free.

They stay on the GPU where the engine could keep them there, else on disk. Bounded in bytes and removed when
the measuring is done; losing them costs a decode, never a measurement.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cerebellum import files
from cerebellum.engine.protocols import Kept
from cerebellum.engine.scoring import Prediction
from cerebellum.files import atomic_write_bytes


class PredictionCache:
    """For the first of ``chunks`` that fit in ``max_bytes``: two .npy files each, or what lies on a GPU."""

    def __init__(self, folder: Path, chunks: Sequence[int], chunk_bytes: int, max_bytes: int) -> None:
        self.folder = folder
        self.chunks = frozenset(chunks[: max_bytes // max(chunk_bytes, 1)])
        self.n_bytes = len(self.chunks) * chunk_bytes
        self._on_card: dict[int, Kept] = {}

    def claim(self, owner: str) -> None:
        """Forgets what a killed run of another ``owner`` (model, text, context) left in the folder."""
        mark = self.folder / "owner"
        if mark.exists() and mark.read_text() == owner:
            return
        self.remove()
        files.make_folder(self.folder)
        atomic_write_bytes(mark, owner.encode())

    def store(self, chunk: int, prediction: Kept) -> None:
        """Keeps a chunk of the base; the probabilities go last, so they vouch for the rest."""
        if chunk not in self.chunks:
            prediction.close()
            return
        if not isinstance(prediction, Prediction):
            self._on_card[chunk] = prediction
            return
        rows = np.stack([prediction.neg_entropy_S, prediction.top_S.astype(np.float64)])
        self._save(self._rows_path(chunk), rows)
        self._save(self._path(chunk), prediction.probabilities_SV)

    def load(self, chunk: int) -> Kept | None:
        """The base's prediction, on the GPU or mapped from the file, or None where it is not kept."""
        if chunk in self._on_card:
            return self._on_card[chunk]
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
        there = (chunk in self._on_card or self._path(chunk).exists() for chunk in chunks)
        return [c for c, kept in zip(chunks, there, strict=True) if c in self.chunks and not kept]

    def forget(self) -> None:
        """Frees the GPU; what lies on the disk stays, for others may use it."""
        for kept in self._on_card.values():
            kept.close()
        self._on_card.clear()

    def remove(self) -> None:
        """Frees the GPU and the disk."""
        self.forget()
        files.DISK.remove_tree(self.folder)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk}.npy"

    def _rows_path(self, chunk: int) -> Path:
        return self.folder / f"{chunk}.rows.npy"

    def _save(self, path: Path, values: NDArray[np.generic]) -> None:
        # np.save writes to a file past Python, and on a full disk says so without an errno.
        content = io.BytesIO()
        np.save(content, values)
        atomic_write_bytes(path, content.getvalue())
