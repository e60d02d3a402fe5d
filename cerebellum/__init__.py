"""Sensitivity-guided mixed-precision quantization of GGUF language models, with the evidence.

A stage is a file or a folder of this package, and meets the next only in files of the run folder:

    source -> groups -> imatrix -> base -> shards -> measure -> plan -> build -> verify -> bench -> card

``run`` goes the whole way; ``settings`` says what was asked, ``layout`` what the model is under any changes.
From Python: ``open_run(folder)`` reads a finished run as typed artifacts, ``compare(a, b)`` measures two files
on the same text, ``inspect(model)`` tells what a GGUF is made of.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cerebellum.comparison.pair import Comparison
    from cerebellum.engine.protocols import Engine
    from cerebellum.folder import RunFolder
    from cerebellum.groups import Description

__all__ = ["compare", "inspect", "open_run"]

try:
    __version__ = version("cerebellum-gguf")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def open_run(folder: str | Path) -> RunFolder:
    """Opens a run folder for reading: ``.plan()``, ``.measurements()``, ``.curves()``, ``.verified()`` and more.

    Every artifact comes as a typed record; nothing is loaded but the file that is asked for. Raises BadInput,
    with one line that names the file and the key, where an artifact is missing or damaged.
    """
    from cerebellum.folder import RunFolder

    return RunFolder(Path(folder))


def inspect(model: str | Path) -> Description:
    """Tells what a GGUF is made of: its facts, its groups, and the types that each group may take.

    Only the header is read. Raises BadInput where the file is no language model that llama.cpp knows.
    """
    from cerebellum.groups import describe, make_groups
    from cerebellum.source import open_source

    source = open_source(model, allow_requantize=True)
    return describe(source, make_groups(source))


def compare(
    a: str | Path,
    b: str | Path,
    *,
    text: str | Path | None = None,
    ctx: int = 512,
    chunks: int = 0,
    until_pct: float | None = None,
    engine: Engine | None = None,
) -> Comparison:
    """Measures B against A on the same tokens: change of perplexity, KL divergence, same top token, intervals.

    ``text`` is a UTF-8 file (WikiText-2 test where none is given), cut into chunks of ``ctx`` tokens; ``chunks``
    takes the first so many of them (0: all). With ``until_pct`` it stops as soon as the change is known to
    within so many percent. Raises BadInput where the files do not share a tokenizer.
    """
    from cerebellum.comparison.pair import ComparisonSettings
    from cerebellum.comparison.pair import compare as compared
    from cerebellum.llama.native import LlamaEngine
    from cerebellum.progress import Silent
    from cerebellum.settings import REPORT_TEXT

    settings = ComparisonSettings(
        text=Path(text) if text else REPORT_TEXT, ctx=ctx, chunks=chunks, until_pct=until_pct
    )
    return compared(engine or LlamaEngine(), Path(a), Path(b), settings, Silent())
