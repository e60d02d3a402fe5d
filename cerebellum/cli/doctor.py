"""Is this machine ready? llama.cpp's build and devices, memory, disk, what is missing.

And, of one model: do variants that are swapped into it in place give the very logits of a fresh load?
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cerebellum import __version__
from cerebellum.engine.protocols import Bytes, CannotSwap, Logits, QuantizeJob
from cerebellum.errors import BadInput
from cerebellum.gguf import (
    GGMLQuantizationType,
    GGUFValueType,
    TensorSource,
    encode_kv,
    fits,
    parse_preset,
    parse_type,
    row_bytes,
    tensor_bytes,
    write_gguf,
)
from cerebellum.groups import Group, make_groups
from cerebellum.llama.library import build_id, devices, llama, system_info
from cerebellum.llama.native import LlamaEngine
from cerebellum.llama.presets import preset_types
from cerebellum.llama.quantize import quantize
from cerebellum.progress import Reporter
from cerebellum.settings import DEMO_MODEL, REPORT_TEXT, SELECTION_TEXT
from cerebellum.source import Source, open_source

PINNED_BINDINGS = "0.3.36"


def examine(folder: Path) -> dict[str, Any]:
    """Facts, and a list of problems in words; no problems means ready."""
    facts: dict[str, Any] = {
        "cerebellum": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "disk_free_bytes": shutil.disk_usage(folder).free,
    }
    problems = _missing_data()
    try:
        facts |= _engine_facts()
        problems += _engine_problems(facts)
    except BadInput as error:
        problems.append(str(error))
    return facts | {"problems": problems, "ok": not problems}


def _missing_data() -> list[str]:
    files = (DEMO_MODEL, SELECTION_TEXT, REPORT_TEXT)
    return [f"{path} is missing: install the package again" for path in files if not path.exists()]


def _engine_facts() -> dict[str, Any]:
    import llama_cpp

    found = devices()
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "llama_cpp": build_id(),
        "gpu_offload": bool(llama().llama_supports_gpu_offload()),
        "system_info": system_info(),
        "devices": [
            {"name": d.name, "description": d.description, "free_bytes": d.free, "total_bytes": d.total}
            for d in found
        ],
    }


def _engine_problems(facts: dict[str, Any]) -> list[str]:
    """A wrong version is a problem of its own: struct layouts and log lines are the pinned one's."""
    if facts["llama_cpp_python"] != PINNED_BINDINGS:
        found = facts["llama_cpp_python"]
        return [f"llama-cpp-python {found} found, {PINNED_BINDINGS} is what this release was tested with"]
    if DEMO_MODEL.exists():
        preset_types(DEMO_MODEL, parse_preset("Q3_K_M"), has_imatrix=True)
    return []


SWAP_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ3_S", "IQ4_XS")
"""What ``check_swaps`` tries. Q3_K and IQ3_S have rows of the same length, which deceives caches."""

_BASE_TYPE = "Q4_K"
_SWAP_CTX = 64
_SWAP_CHUNKS = 1
_SAMPLE_ROWS = 64  # that are quantized and then repeated: a check of swaps needs valid bytes, not good ones


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """``tried`` variants, ``wrong`` those whose logits were not bit for bit a fresh load's, ``refusal`` why
    nothing could be swapped."""

    tried: int
    wrong: tuple[str, ...]
    refusal: str = ""

    @property
    def ok(self) -> bool:
        return not self.wrong and not self.refusal

    def as_json(self) -> dict[str, Any]:
        return {"tried": self.tried, "wrong": list(self.wrong), "refusal": self.refusal, "ok": self.ok}


def check_swaps(
    model: Path, engine: LlamaEngine, reporter: Reporter, types: Sequence[str] = SWAP_TYPES, walk: int = 20
) -> SwapReport:
    """Swaps every group of a model at every type, whole plans and a random walk, against fresh loads.

    Each variant's logits are compared bit for bit with those of a model that was opened with it. Shards are
    made in a temporary folder from some rows of each tensor, repeated.
    """
    source = open_source(model, allow_requantize=True)
    with TemporaryDirectory(prefix="cerebellum-swap-") as folder:
        shards = _TrialShards(source, Path(folder), engine.settings.threads)
        return _Trial(shards, engine, reporter).run(types, walk)


class _TrialShards:
    """Shards of a model for trying swaps; a group at None is at the base's type."""

    def __init__(self, source: Source, folder: Path, threads: int) -> None:
        self._source = source
        self._folder = folder
        self._threads = threads
        self.model = source.path
        groups = make_groups(source, allocate=("head", "embd"))
        self._protected = tuple(t for group in groups if group.protected for t in group.tensors)
        self.groups = {group.name: group for group in groups if not group.protected}

    def takes(self, name: str, qtype: str) -> bool:
        shapes = (self._source.tensors[tensor].shape for tensor in self.groups[name].tensors)
        return all(fits(parse_type(qtype), shape) for shape in shapes)

    def paths(self, changes: Mapping[str, str]) -> list[Path]:
        """The shard list of a variant, made where missing."""
        first = self._write(0, "protected", "kept", self._protected, None)
        numbered = enumerate(self.groups.values(), start=1)
        return [first, *(self._group(number, group, changes.get(group.name)) for number, group in numbered)]

    def _group(self, number: int, group: Group, qtype: str | None) -> Path:
        if qtype is None and self.takes(group.name, _BASE_TYPE):
            qtype = _BASE_TYPE
        return self._write(number, group.name, qtype or "kept", group.tensors, qtype)

    def _write(self, number: int, name: str, label: str, tensors: Sequence[str], qtype: str | None) -> Path:
        path = self._folder / f"{number:02d}-{name}.{label}.gguf"
        if path.exists():
            return path
        records = () if number else tuple(_unsplit(self._source))
        split = (
            encode_kv("split.no", number, GGUFValueType.UINT16),
            encode_kv("split.count", len(self.groups) + 1, GGUFValueType.UINT16),
            encode_kv("split.tensors.count", len(self._source.tensors), GGUFValueType.INT32),
        )
        alignment = 32 if number else self._source.files[0].alignment
        write_gguf(path, (*records, *split), [self._tensor(tensor, qtype) for tensor in tensors], alignment)
        return path

    def _tensor(self, name: str, qtype: str | None) -> TensorSource:
        tensor = self._source.tensors[name]
        type_ = tensor.type if qtype is None else parse_type(qtype)
        chunks = (
            (lambda: iter([self._source.read(name)])) if qtype is None else (lambda: self._made(name, type_))
        )
        return TensorSource(name=name, shape=tensor.shape, type=type_, chunks=chunks)

    def _made(self, name: str, type_: GGMLQuantizationType) -> Iterator[Bytes]:
        """Some rows of a tensor at a type, again and again until it is full."""
        tensor = self._source.tensors[name]
        columns = tensor.shape[0]
        n_rows = min(_SAMPLE_ROWS, tensor.n_elements // columns)
        job = QuantizeJob(
            name=name,
            raw=self._source.read(name)[: n_rows * row_bytes(tensor.type, columns)],
            shape=(columns, n_rows),
            from_type=tensor.type,
            to_type=type_,
            importance=np.ones(columns, np.float32),
        )
        sample = np.concatenate(list(quantize(job, self._threads)))
        left = tensor_bytes(type_, tensor.shape)
        while left > 0:
            yield sample[:left]
            left -= sample.size


def _unsplit(source: Source) -> Iterator[bytes]:
    for key, record in source.files[0].kv_records.items():
        if not key.startswith("split."):
            yield record


class _Trial:
    """One resident model against fresh ones."""

    def __init__(self, shards: _TrialShards, engine: LlamaEngine, reporter: Reporter) -> None:
        self._shards = shards
        self._engine = engine
        self._reporter = reporter
        vocab = engine.vocab_size(shards.model)
        rng = np.random.default_rng(1)
        low = min(100, vocab // 2)
        self._chunks: NDArray[np.int32] = rng.integers(low, vocab, (_SWAP_CHUNKS, _SWAP_CTX), np.int32)
        self._fresh: dict[tuple[Path, ...], list[Logits]] = {}
        self._wrong: list[str] = []

    def run(self, types: Sequence[str], walk: int) -> SwapReport:
        variants = list(_trial_variants(self._shards, types, walk))
        base = self._shards.paths({})
        with (
            self._engine.resident(base, _SWAP_CTX) as model,
            self._reporter.task("swaps against fresh loads", len(variants)) as tick,
        ):
            for label, changes in variants:
                paths = self._shards.paths(changes)
                wanted = self._logits_of_fresh(paths)
                try:
                    model.swap([path for path, own in zip(paths, base, strict=True) if path != own])
                except CannotSwap as error:
                    return SwapReport(tried=0, wrong=(), refusal=str(error))
                found = [model.logits(chunk) for chunk in self._chunks]
                if not all(map(_same_bits, found, wanted)):
                    self._wrong.append(label)
                tick()
        return SwapReport(tried=len(variants), wrong=tuple(self._wrong))

    def _logits_of_fresh(self, paths: Sequence[Path]) -> list[Logits]:
        key = tuple(paths)
        if key not in self._fresh:
            with self._engine.open(paths, _SWAP_CTX) as model:
                self._fresh[key] = [model.logits(chunk) for chunk in self._chunks]
        return self._fresh[key]


def _trial_variants(
    shards: _TrialShards, types: Sequence[str], walk: int
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The base, every group at every type, whole plans, a walk over single swaps, and the base again."""
    yield "the base", {}
    singles = [(name, qtype) for name in shards.groups for qtype in types if shards.takes(name, qtype)]
    for name, qtype in singles:
        yield f"{name} at {qtype}", {name: qtype}
    for number, qtype in enumerate(types):
        turns = zip(shards.groups, islice(cycle(types), number, None), strict=False)
        for label, plan in (
            (f"all at {qtype}", dict.fromkeys(shards.groups, qtype)),
            (f"mix {number}", dict(turns)),
        ):
            yield label, {name: qtype for name, qtype in plan.items() if shards.takes(name, qtype)}
    rng = np.random.default_rng(7)
    for step in rng.integers(len(singles), size=walk):
        name, qtype = singles[step]
        yield f"walk to {name} at {qtype}", {name: qtype}
    yield "the base again", {}


def _same_bits(a: Logits, b: Logits) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))
