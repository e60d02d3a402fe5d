"""What to decode, in which order: asks -> parts -> waves -> runs -> pieces. No engine, no I/O.

A part is an ask under way, a wave the parts that fit in the context together, a run the tokens that
continue one sequence, a piece the runs (or parts of them) that go into one decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cerebellum.engine.asking import Ask, Reply, Scored, TokenIds, shared_prefix

_PREFIX_WORTH_KEEPING = 4  # tokens


@dataclass(frozen=True, kw_only=True)
class Run:
    """Tokens that continue one sequence from ``start``; logits are wanted from token ``outputs_from`` on."""

    seq: int
    start: int
    tokens: TokenIds
    outputs_from: int


@dataclass
class Piece:
    """An ask under way (or some of its endings, where it has more than there are sequences)."""

    index: int
    ask: Ask
    endings: tuple[int, ...]
    seq: int = 0

    @property
    def continued(self) -> list[TokenIds]:
        """Tokens to decode of each ending that has more than one; the last is only scored, never fed."""
        return [self.ask.endings[e][:-1] for e in self.endings if len(self.ask.endings[e]) > 1]

    @property
    def sequences(self) -> int:
        return max(1, len(self.continued))

    def cells(self, prefix: int) -> int:
        return len(self.ask.prompt) - prefix + sum(len(tokens) for tokens in self.continued)


@dataclass(frozen=True, kw_only=True)
class Want:
    """Row ``row`` of a piece's logits scores token ``position`` of an ending."""

    row: int
    sheet: Sheet
    ending: int
    position: int

    @property
    def token(self) -> int:
        return self.sheet.ask.endings[self.ending][self.position]


@dataclass
class Sheet:
    """Fills up as pieces are decoded; full when every token of every ending has its log-probability."""

    index: int
    ask: Ask
    log_probs: list[list[float]] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    top_token: int = -1
    missing: int = 0

    def __post_init__(self) -> None:
        self.log_probs = [[0.0] * len(ending) for ending in self.ask.endings]
        self.greedy = [True] * len(self.ask.endings)
        self.missing = sum(len(ending) for ending in self.ask.endings)

    def fill(self, want: Want, log_prob: float, top_token: int) -> None:
        self.log_probs[want.ending][want.position] = log_prob
        self.greedy[want.ending] &= top_token == self.ask.endings[want.ending][want.position]
        if want.position == 0:
            self.top_token = top_token
        self.missing -= 1

    def reply(self) -> Reply:
        rows = zip(self.log_probs, self.greedy, strict=True)
        scored = tuple(Scored(log_probs=tuple(probs), greedy=greedy) for probs, greedy in rows)
        return Reply(endings=scored, top_token=self.top_token)


def common_prefix(prompts: Sequence[TokenIds]) -> TokenIds:
    """What all prompts begin with, leaving each a token of its own; empty where it is not worth a fork."""
    if len(prompts) < 2:
        return ()
    shared = min(shared_prefix(prompts), min(len(prompt) for prompt in prompts) - 1)
    return prompts[0][:shared] if shared >= _PREFIX_WORTH_KEEPING else ()


def make_parts(sheets: Sequence[Sheet], sequences: int) -> list[Piece]:
    """Asks in the order to decode them: by length of the prompt, since equal lengths share a ubatch."""
    parts = []
    for sheet in sorted(sheets, key=lambda s: len(s.ask.prompt)):
        endings = range(len(sheet.ask.endings))
        for start in range(0, len(endings), sequences):
            chosen = tuple(endings[start : start + sequences])
            parts.append(Piece(index=sheet.index, ask=sheet.ask, endings=chosen))
    return parts


def make_waves(parts: Sequence[Piece], prefix: int, cells: int, sequences: int) -> Iterator[list[Piece]]:
    """As many parts as fit together; each is given its first sequence, counted from 1."""
    wave: list[Piece] = []
    free_cells = cells
    next_seq = 1
    for part in parts:
        if wave and (part.cells(prefix) > free_cells or next_seq + part.sequences - 1 > sequences):
            yield wave
            wave = []
            free_cells = cells
            next_seq = 1
        part.seq = next_seq
        next_seq += part.sequences
        free_cells -= part.cells(prefix)
        wave.append(part)
    if wave:
        yield wave


def cut_runs(runs: Sequence[Run], size: int, *, whole: bool) -> Iterator[list[Run]]:
    """Pieces of at most ``size`` tokens.

    Attention takes tokens of any sequences together, so runs are cut to fill every piece. Recurrent
    layers take equal lengths together, so there a run stays ``whole`` unless it is larger than a piece.
    """
    piece: list[Run] = []
    free = size
    for run in runs:
        if piece and (free == 0 or (whole and len(run.tokens) > free)):
            yield piece
            piece = []
            free = size
        while len(run.tokens) > free:
            head, run = _split(run, free)
            yield [*piece, head]
            piece = []
            free = size
        piece.append(run)
        free -= len(run.tokens)
    if piece:
        yield piece


def _split(run: Run, at: int) -> tuple[Run, Run]:
    head = Run(seq=run.seq, start=run.start, tokens=run.tokens[:at], outputs_from=run.outputs_from)
    tail = Run(
        seq=run.seq,
        start=run.start + at,
        tokens=run.tokens[at:],
        outputs_from=max(0, run.outputs_from - at),
    )
    return head, tail


def prompt_wants(sheets: Sequence[Sheet], part: Piece) -> list[tuple[Sheet, int, int]]:
    """The row after a prompt scores the first token of every ending."""
    return [(sheets[part.index], ending, 0) for ending in part.endings]
