"""An open model: one llama_context for chunks of one length, decoded several at a time, and its scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cerebellum.engine.protocols import CannotSwap, Job, Logits, Scores, Tokens
from cerebellum.engine.scoring import Prediction, score_rows
from cerebellum.engine.timings import timed
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.llama.library import LOG, Pointer, llama
from cerebellum.llama.resident import Use, WeightFinder, Weights
from cerebellum.llama.scorer import DeviceScorer, ResultFinder

TensorCallback = Callable[[int, bool], bool]
"""llama.cpp's ``cb_eval``: (address of a graph node, whether it is asked for rather than shown)."""

_TRUSTED = 1e-5  # nats a token: what the device's and the host's scores of one chunk may differ by


@dataclass(frozen=True, kw_only=True)
class ContextShape:
    """What a context is made for: ``sequences`` chunks of ``ctx`` tokens, ``ubatch`` tokens a graph."""

    ctx: int
    sequences: int
    ubatch: int
    threads: int


class Context:
    """A llama_context with its batch. Chunk k is sequence k; every decode forgets the one before."""

    def __init__(self, model: Pointer, shape: ContextShape, callback: TensorCallback | None = None) -> None:
        self._lib = llama()
        self._shape = shape
        self._model = model
        # The C side keeps the function pointer, so it must outlive the context.
        self._callback = self._lib.ggml_backend_sched_eval_callback(_as_c(callback))
        self.address = self._lib.llama_init_from_model(model, self._params(callback is not None))
        if not self.address:
            raise BadInput(f"no context of {shape.sequences} x {shape.ctx} tokens: {LOG.last_error()}")
        self._batch = self._lib.llama_batch_init(shape.ctx * shape.sequences, 0, 1)
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(model)))
        self._laid_out = (0, 0, 0)

    def _params(self, watched: bool) -> Pointer:
        params = self._lib.llama_context_default_params()
        shape = self._shape
        params.n_ctx = params.n_batch = shape.ctx * shape.sequences
        params.n_ubatch = shape.ubatch
        params.n_seq_max = shape.sequences
        params.n_threads = params.n_threads_batch = shape.threads
        params.no_perf = True
        if watched:
            params.cb_eval = self._callback
        return params

    def decode(self, chunks: Sequence[Tokens], first: int) -> None:
        """Decodes chunks of one length side by side, with logits from token ``first`` of each on."""
        length = len(chunks[0])
        if length > self._shape.ctx or len(chunks) > self._shape.sequences:
            raise ValueError(f"{len(chunks)} chunks of {length} tokens for {self._shape}")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self.address), True)
        self._lay_out(len(chunks), length, first)
        n = len(chunks) * length
        np.ctypeslib.as_array(self._batch.token, (n,))[:] = np.concatenate(chunks)
        status = self._lib.llama_decode(self.address, self._batch)
        if status != 0:
            raise CerebellumError(f"llama_decode returned {status}: {LOG.last_error()}")
        self._lib.llama_synchronize(self.address)

    def extend(self, token: int, position: int) -> None:
        """Decodes one more token of the first sequence, behind what was decoded last, with its logits."""
        batch = self._batch
        batch.n_tokens = 1
        batch.token[0] = token
        batch.pos[0] = position
        batch.n_seq_id[0] = 1
        batch.seq_id[0][0] = 0
        batch.logits[0] = 1
        self._laid_out = (0, 0, 0)
        status = self._lib.llama_decode(self.address, batch)
        if status != 0:
            raise CerebellumError(f"llama_decode returned {status}: {LOG.last_error()}")
        self._lib.llama_synchronize(self.address)

    def _lay_out(self, chunks: int, length: int, first: int) -> None:
        """Positions and sequences of a batch, which are the same for all batches of one form."""
        if self._laid_out == (chunks, length, first):
            return
        batch = self._batch
        n = chunks * length
        batch.n_tokens = n
        positions = np.tile(np.arange(length), chunks)
        np.ctypeslib.as_array(batch.pos, (n,))[:] = positions
        np.ctypeslib.as_array(batch.n_seq_id, (n,))[:] = 1
        np.ctypeslib.as_array(batch.logits, (n,))[:] = positions >= first
        for i in range(n):
            batch.seq_id[i][0] = i // length
        self._laid_out = (chunks, length, first)

    def rows(self, n_rows: int) -> Logits:
        """The last decode's logits, (n_rows, vocabulary): llama.cpp's own memory, good until the next."""
        pointer = self._lib.llama_get_logits(self.address)
        if not pointer:
            raise CerebellumError(f"llama.cpp returned no logits: {LOG.last_error()}")
        return np.ctypeslib.as_array(pointer, shape=(n_rows, self.vocab_size))

    def forget_graph(self) -> None:
        """Makes llama.cpp build its next graph from nothing, as a new context does, a thousand times as fast.

        Setting a control vector, and be it none, has this effect; no other call that leaves logits alone has.
        """
        n_embd = self._lib.llama_model_n_embd(self._model)
        if self._lib.llama_set_adapter_cvec(self.address, None, 0, n_embd, -1, -1) != 0:
            raise CerebellumError(f"llama.cpp keeps its graph: {LOG.last_error()}")

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self.address)


def _as_c(callback: TensorCallback | None) -> Callable[[int, bool, object], bool]:
    return lambda tensor, ask, _data: bool(callback and callback(tensor, ask))


class LlamaModel:
    """Scores chunks of one length. Made by ``LlamaEngine``, which frees it.

    With ``on_gpu`` logits are scored where they lie, once the first chunk has shown that this gives what
    the host makes of them; ``note`` hears where it does not.
    """

    def __init__(
        self,
        model: Pointer,
        shape: ContextShape,
        *,
        on_gpu: bool,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._shape = shape
        self._note = note
        finder = ResultFinder() if on_gpu and shape.ubatch == shape.ctx * shape.sequences else None
        self._scorer = DeviceScorer(finder) if finder else None
        self._trusted = False
        self.context = Context(model, shape, finder.callback if finder else None)
        self._workers = ThreadPoolExecutor(max_workers=shape.threads)

    @property
    def vocab_size(self) -> int:
        return self.context.vocab_size

    @property
    def chunks_at_once(self) -> int:
        return self._shape.sequences

    def logits(self, tokens_T: Tokens) -> Logits:
        first = len(tokens_T) // 2
        self.context.decode([tokens_T], first)
        return self.context.rows(len(tokens_T) - first)[:-1].copy()

    def score(self, jobs: Sequence[Job]) -> list[Scores]:
        """Scores chunks of one length, ``chunks_at_once`` a decode.

        A decode is filled up with its last chunk: the form of a batch changes the last bits of its logits. So do the
        chunks beside one; whoever wants the same bits again asks for the same chunks in the same places. NLL is
        always the device's, also where there is no room there for the predictions.
        """
        found: list[Scores] = []
        size = self._shape.sequences
        for start in range(0, len(jobs), size):
            part = jobs[start : start + size]
            with timed("decoding"):
                chunks = [job.tokens_T for job in part]
                chunks += [chunks[-1]] * (size - len(chunks))
                self.context.decode(chunks, len(chunks[0]) // 2)
            with timed("scoring"):
                found += self._scores(part)
        return found

    def _scores(self, jobs: Sequence[Job]) -> list[Scores]:
        rows = len(jobs[0].tokens_T) - len(jobs[0].tokens_T) // 2
        logits = self.context.rows(self._shape.sequences * rows)
        of_chunk = [logits[i * rows : (i + 1) * rows - 1] for i in range(len(jobs))]
        if self._scorer is None or not self._agrees(jobs, rows, of_chunk[0]):
            return [self._on_host(chunk, job) for chunk, job in zip(of_chunk, jobs, strict=True)]
        found = self._scorer.score(jobs, rows)
        return [
            replace(self._on_host(chunk, job), nll_S=scores.nll_S) if _lacks(scores, job) else scores
            for chunk, job, scores in zip(of_chunk, jobs, found, strict=True)
        ]

    def _on_host(self, logits_SV: Logits, job: Job) -> Scores:
        return score_rows(logits_SV, job, self._workers.map)

    def _agrees(self, jobs: Sequence[Job], rows: int, logits_SV: Logits) -> bool:
        """Whether the device gives what the host gives, tried once on the first chunk that is decoded."""
        if self._trusted or self._scorer is None:
            return self._trusted
        plain = Job(tokens_T=jobs[0].tokens_T)
        try:
            ours = self._scorer.score([plain], rows)[0].nll_S
        except (CerebellumError, MemoryError) as error:
            return self._distrust(str(error))
        theirs = self._on_host(logits_SV, plain).nll_S
        if not np.allclose(ours, theirs, rtol=0, atol=_TRUSTED, equal_nan=True):
            return self._distrust(f"it is off by {np.nanmax(np.abs(ours - theirs)):.2g} nats")
        self._trusted = True
        return True

    def _distrust(self, why: str) -> bool:
        self._note(f"logits are scored on the host, not on the GPU: {why}")
        if self._scorer is not None:
            self._scorer.close()
        self._scorer = None
        return False

    def close(self) -> None:
        self._workers.shutdown()
        if self._scorer is not None:
            self._scorer.close()
        self.context.close()


def _lacks(scores: Scores, job: Job) -> bool:
    """Whether the GPU could not give all: no room to keep, or a reference that lies on the host."""
    return (job.keep and scores.kept is None) or (
        isinstance(job.against, Prediction) and scores.kld_S is None
    )


class ResidentModel(LlamaModel):
    """A model whose groups are swapped in place. Its weights are found when it is opened."""

    def __init__(
        self,
        model: Pointer,
        paths: Sequence[Path],
        shape: ContextShape,
        *,
        on_gpu: bool,
        room: int | None,
        extra: Sequence[int] = (),
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        uses = find_weights(model, shape)
        super().__init__(model, shape, on_gpu=on_gpu, note=note)
        self._weights: Weights | None = None
        self._refusal = ""
        try:
            self._weights = Weights(model, paths, uses, self.context.forget_graph, room, extra)
        except CannotSwap as error:
            self._refusal = str(error)

    def swap(self, shards: Sequence[Path]) -> None:
        if self._weights is None:
            raise CannotSwap(self._refusal)
        with timed("swapping"):
            self._weights.swap(shards)

    def close(self) -> None:
        if self._weights is not None:
            self._weights.close()
        super().close()


def find_weights(model: Pointer, shape: ContextShape) -> dict[str, list[Use]]:
    """Every weight that the graph of one token reads: name -> where it is."""
    finder = WeightFinder()
    small = ContextShape(
        ctx=min(shape.ctx, 32), sequences=1, ubatch=min(shape.ctx, 32), threads=shape.threads
    )
    context = Context(model, small, finder.callback)
    try:
        context.decode([np.zeros(1, np.int32)], 0)
    finally:
        context.close()
    if finder.error is not None:
        raise finder.error
    return finder.uses
