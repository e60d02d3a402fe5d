"""llama.cpp's speed on an open model, as llama-bench takes it: a prompt in one batch, then one token at a time."""

from __future__ import annotations

import time

import numpy as np

from cerebellum.engine.speed import GENERATED_TOKENS, PROMPT_TOKENS, REPEATS, Speed, speed_of
from cerebellum.llama.library import Pointer
from cerebellum.llama.model import Context, ContextShape

_SEED = 512  # of the tokens, which decide nothing: a model reads any as fast


def measure_speed(model: Pointer, threads: int) -> Speed:
    """Times prompts and generation on an open model; the first of each warms up and is not counted."""
    shape = ContextShape(
        ctx=PROMPT_TOKENS + GENERATED_TOKENS, sequences=1, ubatch=PROMPT_TOKENS, threads=threads
    )
    context = Context(model, shape)
    try:
        tokens = np.random.default_rng(_SEED).integers(0, context.vocab_size, shape.ctx, dtype=np.int32)
        prompts: list[float] = []
        generations: list[float] = []
        for repeat in range(1 + REPEATS):
            started = time.perf_counter()
            context.decode([tokens[:PROMPT_TOKENS]], PROMPT_TOKENS - 1)
            read = time.perf_counter()
            for position in range(PROMPT_TOKENS, shape.ctx):
                context.extend(int(tokens[position]), position)
            written = time.perf_counter()
            if repeat:
                prompts.append(read - started)
                generations.append(written - read)
        return speed_of(prompts, generations)
    finally:
        context.close()
