"""How fast a model reads and writes on this machine: what a size in bytes does not say."""

from __future__ import annotations

from cerebellum.codec import Record

PROMPT_TOKENS = 512
GENERATED_TOKENS = 64
REPEATS = 3

_NOTICED = 0.05  # of the base's speed: less is within what a busy machine makes of two runs


class Speed(Record, frozen=True, kw_only=True):
    """Tokens a second, each the median of ``repeats`` after one that warmed up, and the slowest and fastest of them.

    ``prompt`` is a batch of ``prompt_tokens``; ``generation`` is one token after the other, ``generated_tokens`` of
    them behind that prompt.
    """

    prompt: float
    prompt_range: tuple[float, float]
    generation: float
    generation_range: tuple[float, float]
    prompt_tokens: int = PROMPT_TOKENS
    generated_tokens: int = GENERATED_TOKENS
    repeats: int = REPEATS


class Speeds(Record, frozen=True, kw_only=True):
    """The finished file's speed beside its base's, measured one after the other on ``machine``."""

    machine: str
    base: Speed
    result: Speed

    def told(self) -> str:
        """Says both in a sentence, and whether the finished file generates noticeably slower or faster."""
        change = self.result.generation / self.base.generation - 1
        text = (
            f"{self.result.prompt:,.0f} tokens/s of a prompt and {self.result.generation:,.1f} generated; the base "
            f"{self.base.prompt:,.0f} and {self.base.generation:,.1f} ({self.machine})"
        )
        if change < -_NOTICED:
            return f"{text}: {-100 * change:.0f}% slower than the base, as IQ types are where they take more arithmetic"
        if change > _NOTICED:
            return f"{text}: {100 * change:.0f}% faster than the base"
        return text


def speed_of(prompts: list[float], generations: list[float]) -> Speed:
    """Returns the speeds from the seconds that each repeat took of a prompt and of all generated tokens."""
    prompt = sorted(PROMPT_TOKENS / seconds for seconds in prompts)
    generation = sorted(GENERATED_TOKENS / seconds for seconds in generations)
    middle = len(prompt) // 2
    return Speed(
        prompt=prompt[middle],
        prompt_range=(prompt[0], prompt[-1]),
        generation=generation[middle],
        generation_range=(generation[0], generation[-1]),
    )
