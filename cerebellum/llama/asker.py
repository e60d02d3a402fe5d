"""llama.cpp as an asker: forked sequences, many questions in one batch.

Questions of a benchmark repeat themselves: one instruction in front of all of them, one prompt in
front of all endings of a question. Each shared part is decoded once, in a sequence of its own, and
``llama_memory_seq_cp`` forks its state: cells of attention are shared, a recurrent state is copied
when a fork first writes. A recurrent state cannot be cut back, so everything forks *before* it goes on:

    seq 0: what all prompts begin with -> seq s: the rest of one prompt -> seq s..s+k: its endings

A wave is as many questions as fit in the context; its decodes are cut into pieces of one ubatch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cerebellum.engine.asking import Ask, Reply, TokenIds, Vocabulary, cut_at_stop
from cerebellum.engine.batching import (
    Piece,
    Run,
    Sheet,
    Want,
    common_prefix,
    cut_runs,
    make_parts,
    make_waves,
    prompt_wants,
)
from cerebellum.engine.protocols import Logits
from cerebellum.engine.scoring import normalize
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.llama.library import LOG, Bindings, Pointer, llama
from cerebellum.llama.native import LlamaEngine
from cerebellum.llama.vocabulary import read_vocabulary, text_of, tokens_of

# Every token is compared with all cells of the context, its own or not: on a CPU a small context is
# faster (768 against 2048: 12%), on a GPU and for recurrent layers a wave of many sequences is.
_CELLS_ON_CPU = 768
_CELLS = 2048
_MAX_SEQUENCES = 128  # llama.cpp allows 256
_MIN_SEQUENCES = 8
_STATE_BYTES = 2 << 30  # recurrent states of all sequences together


@dataclass(frozen=True, kw_only=True)
class Room:
    """What one wave may fill: ``cells`` of the context (None: what suits the machine), ``sequences``.

    One of the sequences is the shared prefix's. ``piece`` is how many tokens go into one decode.
    """

    cells: int | None = None
    sequences: int = _MAX_SEQUENCES
    piece: int = 512


_Piece = tuple[list[Want], Logits]


class Sequences:
    """An open model with one context of many sequences. Made by ``open_asker``, which frees it."""

    def __init__(self, model: Pointer, engine: LlamaEngine, room: Room) -> None:
        self._lib = llama()
        self._model = model
        self._engine = engine
        self._room = room
        self._vocab = self._lib.llama_model_get_vocab(model)
        self._n_vocab = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self._recurrent = bool(
            self._lib.llama_model_is_recurrent(model) or self._lib.llama_model_is_hybrid(model)
        )
        self._batch = self._lib.llama_batch_init(room.piece, 0, 1)
        self._context: Any = None
        self._cells = self._wanted = 0
        self._vocabulary = read_vocabulary(self._lib, model, self._vocab)
        self._workers = ThreadPoolExecutor(max_workers=engine.settings.threads)
        self.decoded_tokens = 0

    @property
    def identity(self) -> str:
        return self._engine.identity

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    @property
    def context_length(self) -> int:
        return int(self._lib.llama_model_n_ctx_train(self._model))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> TokenIds:
        return tokens_of(self._lib, self._vocab, text, add_special=add_special, parse_special=parse_special)

    def text(self, tokens: TokenIds) -> str:
        return text_of(self._lib, self._vocab, tokens)

    def score(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        sheets = [Sheet(index=index, ask=ask) for index, ask in enumerate(asks)]
        if not sheets:
            return
        for piece in self._pieces(sheets):
            for want, top, log_prob in self._score_piece(piece):
                want.sheet.fill(want, log_prob, top)
                if not want.sheet.missing:
                    yield want.sheet.index, want.sheet.reply()

    def _pieces(self, sheets: Sequence[Sheet]) -> Iterator[_Piece]:
        """Every decode that the asks need, with what its rows are wanted for."""
        prefix = common_prefix([sheet.ask.prompt for sheet in sheets])
        parts = make_parts(sheets, self._sequences() - 1)
        self._reserve(len(prefix) + max(part.cells(len(prefix)) for part in parts))
        self._keep_prefix(prefix)
        for wave in make_waves(parts, len(prefix), self._cells - len(prefix), self._sequences() - 1):
            runs = [self._prompt_run(part, prefix) for part in wave]
            yield from self._decode(runs, [prompt_wants(sheets, part) for part in wave])
            runs, wants = self._fork(sheets, wave)
            yield from self._decode(runs, wants)
            self._forget([run.seq for run in runs] + [part.seq for part in wave])

    def _score_piece(self, piece: _Piece) -> Iterator[tuple[Want, int, float]]:
        """(want, top token of its row, log-probability of its token); NaN stays NaN."""
        wants, logits_RV = piece
        rows = np.array([want.row for want in wants])
        tokens = np.array([want.token for want in wants])
        found = normalize(logits_RV, self._workers.map)
        log_probs = found.log_probs(rows, tokens)
        return zip(wants, found.best_S[rows].tolist(), log_probs.tolist(), strict=True)

    def _prompt_run(self, part: Piece, prefix: TokenIds) -> Run:
        if prefix:
            self._copy(0, part.seq)
        tokens = part.ask.prompt[len(prefix) :]
        return Run(seq=part.seq, start=len(prefix), tokens=tokens, outputs_from=len(tokens) - 1)

    def _fork(
        self, sheets: Sequence[Sheet], wave: Sequence[Piece]
    ) -> tuple[list[Run], list[list[tuple[Sheet, int, int]]]]:
        """The endings of a wave, each in a fork of its prompt; the last goes on in the prompt's own."""
        runs = []
        wants = []
        for part in wave:
            longer = [e for e in part.endings if len(part.ask.endings[e]) > 1]
            for offset in range(1, len(longer)):
                self._copy(part.seq, part.seq + offset)
            for offset, ending in enumerate(longer):
                fed = part.ask.endings[ending][:-1]
                runs.append(
                    Run(seq=part.seq + offset, start=len(part.ask.prompt), tokens=fed, outputs_from=0)
                )
                wants += [[(sheets[part.index], ending, i + 1)] for i in range(len(fed))]
        return runs, wants

    def _decode(
        self, runs: Sequence[Run], wants_per_row: Sequence[Sequence[tuple[Sheet, int, int]]]
    ) -> Iterator[_Piece]:
        """Decodes runs piece by piece; ``wants_per_row`` goes with their output rows, in order."""
        done = 0
        for piece in cut_runs(runs, self._room.piece, whole=self._recurrent):
            rows = self._decode_piece(piece)
            if not len(rows):
                continue
            wants = [
                Want(row=row, sheet=sheet, ending=ending, position=position)
                for row in range(len(rows))
                for sheet, ending, position in wants_per_row[done + row]
            ]
            done += len(rows)
            yield wants, rows

    def _decode_piece(self, runs: Sequence[Run]) -> Logits:
        """One llama_decode; the rows of logits asked for, in the order of the runs.

        They are llama.cpp's own memory, good until the next decode: at 200 kB a row a copy costs more
        than the scoring.
        """
        n_rows = self._fill(runs)
        status = self._lib.llama_decode(self._context, self._batch)
        if status != 0:
            raise CerebellumError(f"llama_decode returned {status}: {LOG.last_error()}")
        self.decoded_tokens += int(self._batch.n_tokens)
        if n_rows == 0:
            return np.empty((0, self._n_vocab), np.float32)
        pointer = self._lib.llama_get_logits(self._context)
        if not pointer:
            raise CerebellumError(f"llama.cpp returned no logits: {LOG.last_error()}")
        return np.ctypeslib.as_array(pointer, shape=(n_rows, self._n_vocab))

    def _fill(self, runs: Sequence[Run]) -> int:
        batch = self._batch
        n = batch.n_tokens = sum(len(run.tokens) for run in runs)
        np.ctypeslib.as_array(batch.token, (n,))[:] = [token for run in runs for token in run.tokens]
        np.ctypeslib.as_array(batch.pos, (n,))[:] = [
            run.start + i for run in runs for i in range(len(run.tokens))
        ]
        np.ctypeslib.as_array(batch.n_seq_id, (n,))[:] = 1
        wanted = [i >= run.outputs_from for run in runs for i in range(len(run.tokens))]
        np.ctypeslib.as_array(batch.logits, (n,))[:] = wanted
        for i, seq in enumerate(run.seq for run in runs for _ in run.tokens):
            batch.seq_id[i][0] = seq
        return sum(wanted)

    def generate(
        self, prompts: Sequence[TokenIds], max_tokens: int, stops: Sequence[str] = ()
    ) -> Iterator[tuple[int, str]]:
        asks = [Ask(prompt=prompt, endings=((0,) * (max_tokens + 1),)) for prompt in prompts]
        if not asks:
            return
        sheets = [Sheet(index=index, ask=ask) for index, ask in enumerate(asks)]
        prefix = common_prefix(prompts)
        parts = make_parts(sheets, self._sequences() - 1)
        self._reserve(len(prefix) + max(part.cells(len(prefix)) for part in parts))
        self._keep_prefix(prefix)
        for wave in make_waves(parts, len(prefix), self._cells - len(prefix), self._sequences() - 1):
            runs = [self._prompt_run(part, prefix) for part in wave]
            yield from self._continue(wave, runs, max_tokens, stops)
            self._forget([part.seq for part in wave])

    def _continue(
        self, wave: Sequence[Piece], runs: Sequence[Run], max_tokens: int, stops: Sequence[str]
    ) -> Iterator[tuple[int, str]]:
        """Greedy decoding of a wave, one token for each sequence that is still going."""
        going = list(wave)
        written: dict[int, list[int]] = {part.index: [] for part in wave}
        for step in range(max_tokens):
            pieces = cut_runs(runs, self._room.piece, whole=self._recurrent)
            tops = np.concatenate([self._decode_piece(piece).argmax(axis=1) for piece in pieces])
            still = []
            for part, top in zip(going, tops, strict=True):
                text, ended = self._extend(written[part.index], int(top), stops)
                if ended or step + 1 >= max_tokens:
                    yield part.index, text
                else:
                    still.append(part)
            going = still
            if not going:
                return
            runs = [
                Run(
                    seq=part.seq,
                    start=len(part.ask.prompt) + step,
                    tokens=(written[part.index][-1],),
                    outputs_from=0,
                )
                for part in going
            ]

    def _extend(self, written: list[int], token: int, stops: Sequence[str]) -> tuple[str, bool]:
        """Adds a token: (the text so far, whether it has ended)."""
        if self._lib.llama_vocab_is_eog(self._vocab, token):
            return self.text(tuple(written)), True
        written.append(token)
        return cut_at_stop(self.text(tuple(written)), stops)

    def _keep_prefix(self, prefix: TokenIds) -> None:
        self._lib.llama_memory_clear(self._memory(), True)
        if prefix:
            run = Run(seq=0, start=0, tokens=prefix, outputs_from=len(prefix))
            for piece in cut_runs([run], self._room.piece, whole=False):
                self._decode_piece(piece)

    def _copy(self, source: int, target: int) -> None:
        self._lib.llama_memory_seq_cp(self._memory(), source, target, -1, -1)

    def _forget(self, sequences: Sequence[int]) -> None:
        for seq in set(sequences):
            if not self._lib.llama_memory_seq_rm(self._memory(), seq, -1, -1):
                raise CerebellumError(f"llama.cpp cannot drop sequence {seq}: {LOG.last_error()}")

    def _memory(self) -> Pointer:
        return self._lib.llama_get_memory(self._context)

    def _sequences(self) -> int:
        """Sequences that the context gets: fewer where each carries a large recurrent state."""
        wanted = min(self._room.sequences, _MAX_SEQUENCES)
        if not self._recurrent:
            return wanted
        fits = _STATE_BYTES // max(1, _state_bytes(self._lib, self._model))
        return min(wanted, max(_MIN_SEQUENCES, fits))

    def _reserve(self, cells: int) -> None:
        """Makes the context that asks of so many ``cells`` get, whatever was asked before.

        How many questions share a decode follows from it, and with them the last bits of a reply: a worker that is
        asked a part of an exam alone has to give what one process gives that is asked all of it.
        """
        wanted = -(-max(cells, self._room.cells or self._usual_cells()) // 256) * 256
        if self._context is not None and wanted == self._wanted:
            return
        self._free_context()
        params = self._lib.llama_context_default_params()
        params.n_ctx = wanted
        params.n_batch = self._room.piece
        params.n_ubatch = self._room.piece
        params.n_seq_max = self._sequences()
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = self._engine.settings.threads
        params.no_perf = True
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise BadInput(f"no context of {wanted} tokens: {LOG.last_error()}; try fewer GPU layers")
        self._cells = int(self._lib.llama_n_ctx(self._context))
        self._wanted = wanted

    def _usual_cells(self) -> int:
        on_cpu = self._engine.settings.gpu_layers == 0
        return _CELLS_ON_CPU if on_cpu and not self._recurrent else _CELLS

    def _free_context(self) -> None:
        if self._context is not None:
            self._lib.llama_free(self._context)
            self._context = None

    def close(self) -> None:
        self._workers.shutdown()
        self._free_context()
        self._lib.llama_batch_free(self._batch)


@contextmanager
def open_asker(engine: LlamaEngine, paths: Sequence[Path], room: Room | None = None) -> Iterator[Sequences]:
    """A model over ``paths`` (first the file with the metadata), ready for asks of any length."""
    with engine.weights(paths) as model:
        opened = Sequences(model, engine, room or Room())
        try:
            yield opened
        finally:
            opened.close()


def _state_bytes(lib: Bindings, model: Pointer) -> int:
    """Of one sequence's recurrent state, at most: float32, every layer counted as recurrent."""

    def number(suffix: str, default: int) -> int:
        with suppress(ValueError):
            return int(_metadata(lib, model, f"{architecture}.{suffix}") or default)
        return default

    architecture = _metadata(lib, model, "general.architecture")
    inner = number("ssm.inner_size", 0)
    state = number("ssm.state_size", 0)
    if not inner or not state:  # RWKV and its kin: a state of 64 x embedding for each layer
        inner = number("embedding_length", 4096)
        state = number("wkv.head_size", 64)
    return 4 * inner * state * int(lib.llama_model_n_layer(model))


def _metadata(lib: Bindings, model: Pointer, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    count = lib.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if count >= 0 else ""
