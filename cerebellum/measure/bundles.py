"""Which chunks share a decode: a rule of the text and its order alone, never of who decodes or of what is there.

Where several chunks go into one decode, as on a graphics card, the last bits of a chunk depend on the chunks beside it
and on its place among them (4e-6 nats a token were seen). So a chunk is always decoded in the same company: the chunks
at places k*m to k*m + m - 1 of the order, where m is what one decode takes. Whoever wants one of them decodes all of
them, which costs as much, and keeps what it got. Then a measurement is the same number by one process or by many,
after a kill, and in whatever order questions are asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Bundle = tuple[int, ...]
"""The numbers of the chunks that share a decode, in their places."""


@dataclass(frozen=True)
class Bundles:
    """The chunks of a text, cut into decodes; only the last one may have fewer than the others.

    ``name`` tells the company that chunks are decoded in from any other; it is empty where each is decoded alone.
    """

    every: tuple[Bundle, ...]
    name: str
    _of_chunk: dict[int, Bundle]

    @classmethod
    def of(cls, order: Sequence[int], together: int) -> Bundles:
        """Cuts an order of all chunks of a text into decodes of ``together`` chunks."""
        every = tuple(tuple(order[at : at + together]) for at in range(0, len(order), together))
        name = "" if together == 1 else hashlib.sha256(repr(every).encode()).hexdigest()[:12]
        return cls(every, name, {chunk: bundle for bundle in every for chunk in bundle})

    def holding(self, chunks: Iterable[int]) -> list[Bundle]:
        """Returns the decodes that these chunks are in, each once, in the order of the chunks."""
        return list(dict.fromkeys(self._of_chunk[chunk] for chunk in chunks))
