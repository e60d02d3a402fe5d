"""A manifest and the source it names -> the same GGUF again, bit for bit, and what changed if not.

Nothing is measured and no model is run: source, importance matrix and tensor types decide every byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from cerebellum import imatrix
from cerebellum.base import file_base, preset_records
from cerebellum.errors import BadInput
from cerebellum.files import sha256_file
from cerebellum.gguf import TensorSource, parse_type, write_gguf
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.ledger import Ledger
from cerebellum.llama.library import build_id
from cerebellum.llama.presets import parse_preset
from cerebellum.llama.quantize import QuantizeJob, quantize
from cerebellum.progress import Reporter, Tick
from cerebellum.source import Source, open_source
from cerebellum.texts import read_text
from cerebellum.workspace import DATA, read_json

SAME, CHANGED, ABSENT = "same", "changed", "absent"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One thing that the manifest names, as it is now. ABSENT is no fault: it is not needed."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to reproduce from what. ``texts`` are by their part: selection, report."""

    manifest: Path
    source: Path
    out: Path
    base_file: Path | None
    texts: Mapping[str, Path]
    threads: int


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """Everything that decides the bytes of the file."""

    source: Source
    base: Source | None
    records: tuple[bytes, ...]
    types: Mapping[str, GGMLQuantizationType]
    matrix: ImportanceMatrix
    threads: int


def reproduce(request: Request, reporter: Reporter) -> dict[str, Any]:
    """The answer as JSON: ``ok`` when the file is the same and nothing that was named has changed."""
    manifest = _read(request.manifest)
    source = open_source(request.source, allow_requantize=True)
    needed = [
        _source(manifest, source),
        _matrix(manifest, request.manifest.parent),
        *_base(manifest, request),
    ]
    beside = [*_texts(manifest, request), *_evidence(manifest, request.manifest.parent)]
    if any(row.status != SAME for row in needed):
        return _answer(None, manifest, [*needed, *beside])
    out = _out(request, manifest)
    _write(_recipe(manifest, request, source), out, reporter)
    return _answer(out, manifest, [*needed, *beside, _build(manifest)])


def _read(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    wanted = {"source", "imatrix", "base", "tensor_types", "texts", "text_files", "settings", "result"}
    missing = sorted(wanted - manifest.keys()) if isinstance(manifest, dict) else ["everything"]
    if missing:
        raise BadInput(f"{path}: not a manifest that can be reproduced (no {missing[0]}); run it again")
    return dict(manifest)


def _source(manifest: Mapping[str, Any], source: Source) -> Compared:
    """Tells a changed header from changed tensors: the first is a conversion, the second a model."""
    wanted = manifest["source"]
    found = source.sha256()
    if found == wanted["sha256"]:
        return _same("source", found)
    same_header = source.header_sha256 == wanted.get("header_sha256")
    part = "with the same header and other tensors" if same_header else "with another header"
    return _changed("source", f"{source.path.name} is another file, {part}")


def _matrix(manifest: Mapping[str, Any], folder: Path) -> Compared:
    path = _inside(folder, manifest["imatrix"]["file"])
    return _file("importance matrix", path, manifest["imatrix"]["sha256"])


def _base(manifest: Mapping[str, Any], request: Request) -> list[Compared]:
    """A row where the base was a file of its own; presets are made from the source."""
    wanted = manifest["base"]
    if wanted["file"] is None:
        return []
    path = request.base_file or _inside(request.manifest.parent, wanted["file"])
    if not path.exists():
        raise BadInput(f"{path}: the base this run was given is not here; point --base-file at it")
    return [_file("base", path, wanted["sha256"])]


def _texts(manifest: Mapping[str, Any], request: Request) -> Iterator[Compared]:
    """The texts decide no byte of the file, but the numbers on its card: named if they changed."""
    for part, wanted in manifest["texts"].items():
        name, title = manifest["text_files"][part], f"{part} text"
        path = request.texts.get(part) or _text_here(request.manifest.parent, name, wanted)
        if path is None:
            yield Compared(name=title, status=ABSENT, detail=f"{name} is not here; the file does not need it")
            continue
        found = _text_sha256(path)
        yield _same(title, found) if found == wanted else _changed(title, f"{path.name} is another text")


def _text_here(folder: Path, name: str, wanted: str) -> Path | None:
    """The text beside the manifest, or Cerebellum's own if that is the very one that was used."""
    beside, ours = _inside(folder, name), _inside(DATA, name)
    if beside.exists():
        return beside
    return ours if ours.exists() and _text_sha256(ours) == wanted else None


def _text_sha256(path: Path) -> str:
    return hashlib.sha256(read_text(path)).hexdigest()


def _evidence(manifest: Mapping[str, Any], folder: Path) -> Iterator[Compared]:
    for name, wanted in manifest.get("evidence", {}).items():
        path = _inside(folder, name)
        if path.exists():
            yield _file(name, path, wanted)
    ledger = folder / "ledger.sqlite"
    if ledger.exists():
        with Ledger(ledger) as opened:
            found = opened.digest()
        same = found == manifest.get("ledger_digest")
        yield _same("ledger", found) if same else _changed("ledger", "holds other measurements")


def _build(manifest: Mapping[str, Any]) -> Compared:
    found, wanted = build_id(), manifest.get("llama_cpp")
    detail = found if found == wanted else f"{found}; it was {wanted}"
    return Compared(name="llama.cpp", status=SAME if found == wanted else ABSENT, detail=detail)


def _file(title: str, path: Path, wanted: str) -> Compared:
    found = sha256_file(path)
    return _same(title, found) if found == wanted else _changed(title, f"{path.name} is another file")


def _same(name: str, digest: str) -> Compared:
    return Compared(name=name, status=SAME, detail=f"sha256 {digest[:16]}")


def _changed(name: str, detail: str) -> Compared:
    return Compared(name=name, status=CHANGED, detail=detail)


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder; a manifest that points elsewhere was not written by Cerebellum."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise BadInput(f"{folder}: its manifest names {name!r}, which is no file name; do not trust it")
    return folder / name


def _out(request: Request, manifest: Mapping[str, Any]) -> Path:
    """Where the new file goes: never over the one it is compared with."""
    out = _inside(request.out, manifest["result"]["file"])
    if request.out.resolve() == request.manifest.parent.resolve():
        raise BadInput(f"{out}: would replace the file it is compared with; choose another folder with -o")
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{request.out}: cannot be made ({error.strerror}); choose another with -o") from error
    return out


def _recipe(manifest: Mapping[str, Any], request: Request, source: Source) -> _Recipe:
    folder, given = request.manifest.parent, manifest["base"]["file"]
    matrix = imatrix.read(_inside(folder, manifest["imatrix"]["file"]))
    types = {name: parse_type(kind) for name, kind in manifest["tensor_types"].items()}
    if types.keys() != source.tensors.keys():
        raise BadInput(f"{request.manifest}: its tensors are not the source's; the manifest was changed")
    if given is None:
        records, base = preset_records(source, parse_preset(manifest["settings"]["base"]), matrix), None
    else:
        found = file_base(source, request.base_file or _inside(folder, given))
        records, base = found.records, found.file
    return _Recipe(
        source=source, base=base, records=records, types=types, matrix=matrix, threads=request.threads
    )


def _write(recipe: _Recipe, out: Path, reporter: Reporter) -> None:
    alignment = (recipe.base or recipe.source).files[0].alignment
    with reporter.task("quantizing", len(recipe.types)) as tick:
        tensors = [_tensor(recipe, name, tick) for name in recipe.source.tensors]
        write_gguf(out, recipe.records, tensors, alignment)


def _tensor(recipe: _Recipe, name: str, tick: Tick) -> TensorSource:
    shape, kind = recipe.source.tensors[name].shape, recipe.types[name]

    def chunks() -> Iterator[NDArray[np.uint8]]:
        yield from _bytes(recipe, name)
        tick()

    return TensorSource(name=name, shape=shape, type=kind, chunks=chunks)


def _bytes(recipe: _Recipe, name: str) -> Iterator[NDArray[np.uint8]]:
    """As the shards were made: a given base's own bytes where its type stays, else from the source."""
    kind = recipe.types[name]
    if recipe.base is not None and recipe.base.tensors[name].type == kind:
        yield recipe.base.read(name)
        return
    job = QuantizeJob(
        name=name,
        raw=recipe.source.read(name),
        shape=recipe.source.tensors[name].shape,
        from_type=recipe.source.tensors[name].type,
        to_type=kind,
        importance=recipe.matrix.importance(name),
    )
    yield from quantize(job, recipe.threads)


def _answer(out: Path | None, manifest: Mapping[str, Any], rows: list[Compared]) -> dict[str, Any]:
    found = sha256_file(out) if out else None
    bit_equal = found == manifest["result"]["sha256"]
    return {
        "ok": bit_equal and all(row.status != CHANGED for row in rows),
        "bit_equal": bit_equal,
        "file": str(out) if out else None,
        "sha256": found,
        "wanted_sha256": manifest["result"]["sha256"],
        "changed": [row.name for row in rows if row.status == CHANGED],
        "compared": [asdict(row) for row in rows],
    }
