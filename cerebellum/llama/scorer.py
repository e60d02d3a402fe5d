"""Scoring where the logits are: on the GPU, by small graphs, so that a chunk's numbers are all that is read.

``cb_eval`` notes where llama.cpp puts its result; after a decode the logits still lie there. Three graphs
follow: the best token of every row; with it, the log of the sum of exponentials (from the softmax at the best
token, which is never small) and the target's logit; and, against a kept reference, the divergence. What is
small beside its parts is put together on the host in float64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cerebellum.engine.protocols import Job, Scores
from cerebellum.errors import CerebellumError
from cerebellum.llama.graphs import F32, Arena, Block, Graph, Workbench, device_of
from cerebellum.llama.library import GgmlTensor, device_memory

_RESULT = b"result_output\0"  # the name that llama.cpp gives the logits of every architecture
_KEPT_SHARE = 0.5  # of the memory that is free when the model is open: the rest is for staged weights

Vector = NDArray[np.float64]


class ResultFinder:
    """A ``cb_eval`` that only notes where the logits are; it never stops the graph."""

    def __init__(self) -> None:
        self.address = 0
        self._name = GgmlTensor.name.offset

    def callback(self, address: int, _ask: bool) -> bool:
        if ctypes.string_at(address + self._name, len(_RESULT)) == _RESULT:
            self.address = address
        return False


@dataclass
class OnDevice:
    """A reference's log-probabilities (S, V) on the GPU, each row off by its ``rounding_S``, nats.

    ``top_S`` are its best tokens.
    """

    log_probs: int
    rounding_S: Vector
    top_S: NDArray[np.int32]
    block: Block

    @property
    def n_bytes(self) -> int:
        return self.block.n_bytes

    def close(self) -> None:
        self.block.close()


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The scored rows of one chunk: where they begin, bytes into the logits, and what was found of them."""

    offset: int
    shape: tuple[int, int]
    top_S: NDArray[np.int32]


class DeviceScorer:
    """Scores the chunks of the last decode. ``rows`` is how many logits rows each of them has there."""

    def __init__(self, finder: ResultFinder, room: int | None = None) -> None:
        self._finder = finder
        self._bench: Workbench | None = None
        self._device = 0
        self._reserve = 0
        self._room = room

    def score(self, jobs: Sequence[Job], rows: int) -> list[Scores]:
        """Scores of the jobs, whose chunks lie one after another in the result, ``rows`` rows each."""
        bench = self._opened()
        n_vocab, n_rows = (int(n) for n in self._result().ne[:2])
        if n_rows < len(jobs) * rows:
            raise CerebellumError(f"the result has {n_rows} rows where {len(jobs) * rows} were decoded")
        graph = Graph(bench, "top")
        top = graph.read(graph.node("argmax", graph.over(self._finder.address, (n_vocab, n_rows))), np.int32)
        graph.run()
        np.clip(
            top, 0, n_vocab - 1, out=top
        )  # a row of NaN has no best token; its sums are NaN wherever read
        found = []
        for index, job in enumerate(jobs):
            chunk = _Rows(
                offset=4 * index * rows * n_vocab,
                shape=(n_vocab, rows - 1),
                top_S=top[index * rows : (index + 1) * rows - 1],
            )
            found.append(self._score(bench, job, chunk))
        return found

    def _score(self, bench: Workbench, job: Job, chunk: _Rows) -> Scores:
        n_vocab, n_rows = chunk.shape
        first = np.arange(n_rows, dtype=np.int32) * n_vocab
        graph = Graph(bench, "sums")
        logits = graph.over(self._finder.address, chunk.shape, chunk.offset)
        column = graph.node("reshape_2d", logits, 1, n_vocab * n_rows)
        chosen = np.concatenate([first + job.targets.astype(np.int32), first + chunk.top_S])
        picked = graph.read(graph.node("get_rows", column, graph.given(chosen)), np.float32)
        softmax = graph.node("reshape_2d", graph.node("soft_max", logits), 1, n_vocab * n_rows)
        at_top = graph.read(graph.node("get_rows", softmax, graph.given(first + chunk.top_S)), np.float32)
        graph.run()
        target = picked[:n_rows]
        top = picked[n_rows:]
        with np.errstate(divide="ignore", invalid="ignore"):
            log_sum_S = -np.log(at_top.astype(np.float64))
        nll_S = (top - target).astype(np.float64) + log_sum_S
        normalizer_S = top.astype(np.float64) + log_sum_S
        found = Scores(
            nll_S=nll_S,
            entropy_S=self._entropy(bench, chunk, normalizer_S) if job.entropy else None,
            kept=self._keep(bench, chunk, normalizer_S) if job.keep else None,
        )
        if not isinstance(job.against, OnDevice):
            return found
        kld_S = self._divergence(bench, chunk, normalizer_S, job.against)
        return replace(found, kld_S=kld_S, same_top_S=job.against.top_S == chunk.top_S)

    def _log_probs(self, graph: Graph, chunk: _Rows, normalizer_S: Vector) -> tuple[int, Vector]:
        """The node of logits less the row's normalizer as float32, and what that leaves out of it."""
        rounded = normalizer_S.astype(np.float32)
        logits = graph.over(self._finder.address, chunk.shape, chunk.offset)
        per_row = graph.given(rounded[:, None])
        return graph.node("sub", logits, per_row), normalizer_S - rounded

    def _keep(self, bench: Workbench, chunk: _Rows, normalizer_S: Vector) -> OnDevice | None:
        """The chunk's log-probabilities in memory of their own, or None where there is no room."""
        if device_memory(self._device)[0] - 4 * chunk.shape[0] * chunk.shape[1] < self._reserve:
            return None
        arena = Arena(1)
        log_probs = arena.tensor(F32, chunk.shape)
        try:
            block = Block(arena, bench.buffer_type)
        except MemoryError:
            return None
        graph = Graph(bench, "keep")
        node, rounding_S = self._log_probs(graph, chunk, normalizer_S)
        graph.keep(graph.node("cpy", node, log_probs))
        graph.run()
        return OnDevice(log_probs=log_probs, rounding_S=rounding_S, top_S=chunk.top_S.copy(), block=block)

    def _entropy(self, bench: Workbench, chunk: _Rows, normalizer_S: Vector) -> Vector:
        """How unsure each row is, nats, (S,): the negative sum of p log p."""
        graph = Graph(bench, "entropy")
        log_p, rounding_S = self._log_probs(graph, chunk, normalizer_S)
        terms = graph.node("mul", graph.node("exp", log_p), log_p)
        sum_S = graph.read(graph.node("sum_rows", terms), np.float32)
        graph.run()
        return np.asarray(rounding_S - sum_S.astype(np.float64))

    def _divergence(self, bench: Workbench, chunk: _Rows, normalizer_S: Vector, base: OnDevice) -> Vector:
        """KL divergence of these rows from the base's, (S,): the sum of p (log p - log q)."""
        graph = Graph(bench, "divergence")
        log_q, rounding_S = self._log_probs(graph, chunk, normalizer_S)
        log_p = graph.over(base.log_probs, chunk.shape)
        terms = graph.node("mul", graph.node("exp", log_p), graph.node("sub", log_p, log_q))
        kld_S = graph.read(graph.node("sum_rows", terms), np.float32)
        graph.run()
        return np.asarray(kld_S.astype(np.float64) - base.rounding_S + rounding_S)

    def _result(self) -> GgmlTensor:
        if not self._finder.address:
            raise CerebellumError("llama.cpp's graph shows no result_output: this build names it otherwise")
        return GgmlTensor.from_address(self._finder.address)

    def _opened(self) -> Workbench:
        if self._bench is None:
            self._device = device_of(self._result().buffer)
            self._bench = Workbench(self._device)
            free = device_memory(self._device)[0]
            self._reserve = int(free * (1 - _KEPT_SHARE)) if self._room is None else free - self._room
        return self._bench

    def close(self) -> None:
        if self._bench is not None:
            self._bench.close()
            self._bench = None
