"""What Cerebellum adds to llama.cpp's own time: the wall time of `measure` over that inside llama_decode.

One process, one run: every call of llama_decode is timed to the end of its computation, and the peak
resident memory is the kernel's own account.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

from common import save

from cerebellum.llama import native
from cerebellum.llama.library import llama
from cerebellum.progress import Silent
from cerebellum.run import measure_stage
from cerebellum.settings import DEMO_MODEL, Limit, Settings
from cerebellum.workspace import Workspace


class Clock:
    """Seconds spent in llama_decode, and how often it was called."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def install(self) -> None:
        original, clock = native.LlamaModel._decode, self

        def timed(self: native.LlamaModel, tokens: native.Tokens, first: int) -> None:
            start = time.perf_counter()
            original(self, tokens, first)
            llama().llama_synchronize(self._context)
            clock.seconds += time.perf_counter() - start
            clock.calls += 1

        native.LlamaModel._decode = timed  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--chunks", type=int, default=80)
    asked = parser.parse_args()
    clock = Clock()
    clock.install()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(source=asked.model, goal=Limit(chunks=asked.chunks), imatrix_chunks=20)
        engine = native.LlamaEngine(native.EngineSettings(threads=settings.threads))
        workspace = Workspace(Path(folder), settings, engine, Silent())
        with workspace.locked():
            workspace.matrix  # noqa: B018 - made before the clock starts: it is another stage's work
            clock.seconds, clock.calls = 0.0, 0
            start = time.perf_counter()
            measure_stage(workspace)
            wall = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "chunks_decoded": clock.calls,
        "wall_seconds": wall,
        "llama_decode_seconds": clock.seconds,
        "ratio": wall / clock.seconds,
        "peak_bytes": peak,
        "model_bytes": asked.model.stat().st_size,
        "peak_above_model_bytes": peak - asked.model.stat().st_size,
    }
    save("overhead", result)
    for key, value in result.items():
        print(f"{key}: {value:,.3f}" if isinstance(value, float) else f"{key}: {value:,}")


if __name__ == "__main__":
    main()
