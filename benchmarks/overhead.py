"""What Cerebellum adds to llama.cpp's own time: the wall time of `measure` over that inside llama_decode.

One process, one run: every call of llama_decode is timed to the end of its computation, and the peak
resident memory is the kernel's own account.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import save

from cerebellum.engine.protocols import Tokens
from cerebellum.llama.model import Context
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.progress import Silent
from cerebellum.run import measure_stage
from cerebellum.settings import (
    DEFAULT_ENCODER,
    DEMO_MODEL,
    ENCODERS,
    REPORT_TEXT,
    SELECTION_TEXT,
    Limit,
    Settings,
)
from cerebellum.workspace import Workspace


class Clock:
    """Seconds spent in llama_decode, how often it was called, and the chunks that it took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = self.chunks = 0

    def install(self) -> None:
        """Times every decode of every context from now on; a decode ends when its computation does."""
        original, clock = Context.decode, self

        def timed(self: Context, chunks: Sequence[Tokens], first: int) -> None:
            start = time.perf_counter()
            original(self, chunks, first)
            clock.seconds += time.perf_counter() - start
            clock.calls += 1
            clock.chunks += len(chunks)

        Context.decode = timed  # type: ignore[method-assign]

    def reset(self) -> None:
        """Forgets what was timed."""
        self.seconds = 0.0
        self.calls = self.chunks = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--chunks", type=int, default=80)
    parser.add_argument("--imatrix-chunks", type=int, default=20)
    parser.add_argument("--encoder", choices=ENCODERS, default=DEFAULT_ENCODER)
    asked = parser.parse_args()
    clock = Clock()
    clock.install()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            source=asked.model,
            goal=Limit(chunks=asked.chunks),
            select_text=SELECTION_TEXT,
            report_text=REPORT_TEXT,
            imatrix_chunks=asked.imatrix_chunks,
            encoder=asked.encoder,
        )
        engine = LlamaEngine(EngineSettings(threads=settings.threads))
        workspace = Workspace(Path(folder), settings, engine, Silent())
        with workspace.locked():  # made before the clock starts: both are another stage's work
            workspace.matrix  # noqa: B018
            workspace.moments  # noqa: B018
        clock.reset()
        start = time.perf_counter()
        measure_stage(workspace)
        wall = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "encoder": asked.encoder,
        "chunks_decoded": clock.chunks,
        "decodes": clock.calls,
        "wall_seconds": wall,
        "llama_decode_seconds": clock.seconds,
        "ratio": wall / clock.seconds,
        "peak_bytes": peak,
        "model_bytes": asked.model.stat().st_size,
        "peak_above_model_bytes": peak - asked.model.stat().st_size,
    }
    save("overhead", result)
    for key, value in result.items():
        print(f"{key}: {value:,.3f}" if isinstance(value, float) else f"{key}: {value}")


if __name__ == "__main__":
    main()
