"""The official fake asker: tokens are characters, and the test says what every ending is worth."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cerebellum.engine.asking import Ask, Reply, Scored, TokenIds, Vocabulary, cut_at_stop

Worth = Callable[[str, str], float]
"""(prompt, ending) -> log-probability of the whole ending, nats."""

Writes = Callable[[str], str]
"""prompt -> what the model would generate."""

PLAIN = Vocabulary(bos=None, eos=0, bos_text="", eos_text="", adds_bos=False, chat_template=None)


def arbitrary(prompt: str, ending: str) -> float:
    """A worth that looks random and is always the same: a model that knows nothing."""
    digest = hashlib.sha256(f"{prompt}\0{ending}".encode()).digest()
    return -1.0 - int.from_bytes(digest[:4], "little") / 2**32 * len(ending)


@dataclass
class FakeAsker:
    """Counts what it was asked in ``asked``; stops with KeyboardInterrupt after ``stop_after`` replies.

    Each reply is off by up to ``mingling`` nats a token, by which asks are in the same call, as on a real engine.
    """

    worth: Worth = arbitrary
    writes: Writes = lambda _prompt: "A"
    vocabulary: Vocabulary = PLAIN
    context_length: int = 4096
    identity: str = "fake"
    asked: list[Ask] = field(default_factory=list)
    stop_after: int | None = None
    mingling: float = 0.0

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> TokenIds:
        return tuple(map(ord, text))

    def text(self, tokens: TokenIds) -> str:
        return "".join(map(chr, tokens))

    def score(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """Backwards, since callers must not count on an order."""
        company = self.mingling * zlib.crc32(repr(asks).encode()) / 2**32 if self.mingling else 0.0
        for index in reversed(range(len(asks))):
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(asks[index])
            yield index, self._reply(asks[index], company)

    def _reply(self, ask: Ask, company: float) -> Reply:
        prompt = self.text(ask.prompt)
        worths = [self.worth(prompt, self.text(ending)) for ending in ask.endings]
        best = worths.index(max(worths))
        endings = tuple(
            Scored(log_probs=(worth / len(ending) - company,) * len(ending), greedy=i == best)
            for i, (worth, ending) in enumerate(zip(worths, ask.endings, strict=True))
        )
        return Reply(endings=endings, top_token=ask.endings[best][0])

    def generate(
        self, prompts: Sequence[TokenIds], max_tokens: int, stops: Sequence[str] = ()
    ) -> Iterator[tuple[int, str]]:
        for index, prompt in enumerate(prompts):
            yield index, cut_at_stop(self.writes(self.text(prompt))[:max_tokens], stops)[0]

    @contextmanager
    def opened(self, _paths: Sequence[Path]) -> Iterator[FakeAsker]:
        """An opener for ``bench``."""
        yield self
