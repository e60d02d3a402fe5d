"""A manifest and the source it names -> the same GGUF again, bit for bit, and what changed if not.

Nothing is measured and no model is run: source, importance matrix and tensor types decide every byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from cerebellum import encode, imatrix
from cerebellum.base import file_base, preset_base
from cerebellum.build import write_model
from cerebellum.codec import Record, read_artifact
from cerebellum.encode import moments
from cerebellum.encode.encoders import Encoder, OurEncoder
from cerebellum.engine.protocols import Engine
from cerebellum.errors import BadInput
from cerebellum.files import is_one_of, is_plain_name, make_folder, sha256_file, sha256_files
from cerebellum.folder import FURTHER_SIZES
from cerebellum.gguf import TensorSource, parse_type
from cerebellum.layout import Layout
from cerebellum.ledger import Ledger
from cerebellum.manifest import Manifest, ResultNamed
from cerebellum.progress import Reporter
from cerebellum.settings import DATA, OURS
from cerebellum.shards import Recipe, tensor_content
from cerebellum.source import SPLIT_NAME, Source, open_source
from cerebellum.texts import read_text

SAME = "same"
CHANGED = "changed"
ABSENT = "absent"


class Compared(Record, frozen=True, kw_only=True):
    """One thing that the manifest names, as it is now. ABSENT is no fault: it is not needed."""

    name: str
    status: str
    detail: str


class MadeAgain(Record, frozen=True, kw_only=True):
    """A file that was made again, the first split of one that is split, and whether it is the same bit for bit."""

    file: str
    sha256: str
    wanted_sha256: str
    bit_equal: bool


class Reproduced(Record, frozen=True, kw_only=True):
    """The answer: ``ok`` when every file is the same bit for bit and nothing that was named has changed.

    ``file`` and its hashes are of the size that was named first; ``further`` has the other sizes of the run.
    """

    ok: bool
    bit_equal: bool
    file: str | None
    sha256: str | None
    wanted_sha256: str
    changed: tuple[str, ...]
    compared: tuple[Compared, ...]
    further: tuple[MadeAgain, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What to reproduce from what. ``texts`` are by their part: selection, report."""

    manifest: Path
    source: Path
    out: Path
    base_file: Path | None
    texts: Mapping[str, Path]
    threads: int


def reproduce(request: Reproduction, engine: Engine, reporter: Reporter) -> Reproduced:
    """Builds the file again and compares it, and everything that the manifest names, with what was."""
    manifest = read_artifact(request.manifest, Manifest, "it cannot be reproduced; run the run again")
    source = open_source(request.source, allow_requantize=True)
    needed = [
        _source(manifest, source),
        _matrix(manifest, request.manifest.parent),
        *_encoder_rows(manifest, request.manifest.parent),
        *_base(manifest, request),
    ]
    beside = [*_texts(manifest, request), *_evidence(manifest, request.manifest.parent)]
    if any(row.status != SAME for row in needed):
        return _answer((), manifest, [*needed, *beside])
    wanted = [(manifest.result, manifest.tensor_types)]
    wanted += [(size.result, size.tensor_types) for size in manifest.further]
    outs = [_out(request, result, source) for result, _ in wanted]
    recipe = _recipe(manifest, request, source, engine)
    made = []
    for (result, tensor_types), out in zip(wanted, outs, strict=True):
        types = {name: parse_type(qtype) for name, qtype in tensor_types.items()}
        paths = _write(recipe, types, out, manifest.settings.split_above_bytes, reporter)
        made.append(_made_again(paths, result))
    return _answer(made, manifest, [*needed, *beside, _build(manifest, engine)])


def _made_again(paths: Sequence[Path], wanted: ResultNamed) -> MadeAgain:
    found = sha256_files(paths)
    return MadeAgain(
        file=str(paths[0]),
        sha256=found,
        wanted_sha256=wanted.sha256,
        bit_equal=found == wanted.sha256 and len(paths) == len(wanted.files),
    )


def _source(manifest: Manifest, source: Source) -> Compared:
    """Tells a changed header from changed tensors: the first is a conversion, the second a model."""
    wanted = manifest.source
    found = source.sha256()
    if found == wanted.sha256:
        return _same("source", found)
    same_header = source.header_sha256 == wanted.header_sha256
    part = "with the same header and other tensors" if same_header else "with another header"
    return _changed("source", f"{source.path.name} is another file, {part}")


def _matrix(manifest: Manifest, folder: Path) -> Compared:
    path = _inside(folder, manifest.imatrix.file)
    return _file("importance matrix", path, manifest.imatrix.sha256)


def _encoder_rows(manifest: Manifest, folder: Path) -> list[Compared]:
    """Compares our encoder's version and its second moments, where the file was rounded by it.

    Raises BadInput where this machine cannot encode at all.
    """
    wanted = manifest.encoder
    if wanted.name != OURS:
        return []
    reason = encode.unavailable_because()
    if reason is not None:
        raise BadInput(
            f"{folder}: its weights were rounded by our encoder, which cannot be had here: {reason}"
        )
    found = encode.ENCODER_VERSION
    detail = f"version {found}" + ("" if found == wanted.version else f"; it was {wanted.version}")
    rows = [Compared(name="encoder", status=SAME if found == wanted.version else CHANGED, detail=detail)]
    if wanted.moments is not None:
        rows.append(_file("second moments", _inside(folder, wanted.moments.file), wanted.moments.sha256))
    return rows


def _base(manifest: Manifest, request: Reproduction) -> list[Compared]:
    """Compares the base where it was a file of its own; presets are made from the source."""
    wanted = manifest.base
    if wanted.file is None:
        return []
    path = request.base_file or _inside(request.manifest.parent, wanted.file)
    if not path.exists():
        raise BadInput(f"{path}: the base this run was given is not here; point --base-file at it")
    return [_file("base", path, wanted.sha256 or "")]


def _texts(manifest: Manifest, request: Reproduction) -> Iterator[Compared]:
    """The texts decide no byte of the file, but the numbers on its card: named if they changed."""
    for part, wanted in manifest.texts.items():
        name = manifest.text_files[part]
        title = f"{part} text"
        path = request.texts.get(part) or _text_here(request.manifest.parent, name, wanted)
        if path is None:
            yield Compared(name=title, status=ABSENT, detail=f"{name} is not here; the file does not need it")
            continue
        found = _text_sha256(path)
        yield _same(title, found) if found == wanted else _changed(title, f"{path.name} is another text")


def _text_here(folder: Path, name: str, wanted: str) -> Path | None:
    """The text beside the manifest, or Cerebellum's own if that is the very one that was used."""
    beside = _inside(folder, name)
    if beside.exists():
        return beside
    places = (DATA, DATA / "domains")
    ours = (path for path in (_inside(place, name) for place in places) if path.exists())
    return next((path for path in ours if _text_sha256(path) == wanted), None)


def _text_sha256(path: Path) -> str:
    return hashlib.sha256(read_text(path)).hexdigest()


def _evidence(manifest: Manifest, folder: Path) -> Iterator[Compared]:
    for name, wanted in manifest.evidence.items():
        path = _inside(folder, name)
        if path.exists():
            yield _file(name, path, wanted)
    for size in manifest.further:
        own = _inside(_inside(folder, FURTHER_SIZES), size.label)
        for place, wanted in size.evidence.items():
            path = _inside(own, place.rpartition("/")[2])
            if path.exists():
                yield _file(place, path, wanted)
    ledger = folder / "ledger.sqlite"
    if ledger.exists():
        with Ledger(ledger) as opened:
            found = opened.digest()
        same = found == manifest.ledger_digest
        yield _same("ledger", found) if same else _changed("ledger", "holds other measurements")


def _build(manifest: Manifest, engine: Engine) -> Compared:
    """Compares the library that quantized; another one may well make the same bytes."""
    found = engine.build
    wanted = manifest.llama_cpp
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
    if not is_plain_name(name):
        raise BadInput(f"{folder}: its manifest names {name!r}, which is no file name; do not trust it")
    return folder / name


def _out(request: Reproduction, wanted: ResultNamed, source: Source) -> Path:
    """Where a new file goes, without the numbers of splits: never over the one it is compared with."""
    split = SPLIT_NAME.match(wanted.file)
    out = _inside(request.out, f"{split['stem']}.gguf" if split else wanted.file)
    inputs = [*source.paths, *([request.base_file] if request.base_file else [])]
    if any(is_one_of(_inside(request.out, named.file), inputs) for named in wanted.files):
        raise BadInput(
            f"{out}: is an input, and the manifest would have it replaced; choose another folder with -o"
        )
    if request.out.resolve() == request.manifest.parent.resolve():
        raise BadInput(f"{out}: would replace the file it is compared with; choose another folder with -o")
    make_folder(request.out)
    return out


def _recipe(manifest: Manifest, request: Reproduction, source: Source, engine: Engine) -> Recipe:
    """Returns everything that decides the bytes of the file."""
    folder = request.manifest.parent
    matrix = imatrix.read(_inside(folder, manifest.imatrix.file))
    if manifest.tensor_types.keys() != source.tensors.keys():
        raise BadInput(f"{request.manifest}: its tensors are not the source's; the manifest was changed")
    if manifest.base.file is None:
        base = preset_base(engine, source, manifest.settings.base, matrix)
    else:
        base = file_base(source, request.base_file or _inside(folder, manifest.base.file))
    return Recipe(
        source=source,
        layout=Layout(tensors=source.tensors, groups={}, base=base),
        matrix=matrix,
        engine=_encoder(manifest, folder, engine),
        folder=request.out,
        threads=request.threads,
    )


def _encoder(manifest: Manifest, folder: Path, engine: Engine) -> Encoder:
    """Returns who rounded the weights, with the second moments that lie beside the manifest."""
    named = manifest.encoder
    if named.name != OURS:
        return engine
    found = moments.read(_inside(folder, named.moments.file)) if named.moments else None
    return OurEncoder(engine=engine, moments=found)


def _write(
    recipe: Recipe,
    types: Mapping[str, GGMLQuantizationType],
    out: Path,
    split_above: int,
    reporter: Reporter,
) -> tuple[Path, ...]:
    base = recipe.layout.base
    with reporter.task("quantizing", len(types)) as tick:

        def content(name: str) -> Iterator[NDArray[np.uint8]]:
            yield from tensor_content(recipe, name, types[name])
            tick()

        tensors = [
            TensorSource(name=name, shape=tensor.shape, type=types[name], chunks=partial(content, name))
            for name, tensor in recipe.source.tensors.items()
        ]
        return write_model(out, base, tensors, split_above)


def _answer(made: Sequence[MadeAgain], manifest: Manifest, rows: list[Compared]) -> Reproduced:
    first = made[0] if made else None
    bit_equal = bool(made) and all(each.bit_equal for each in made)
    changed = tuple(row.name for row in rows if row.status == CHANGED)
    return Reproduced(
        ok=bit_equal and not changed,
        bit_equal=bit_equal,
        file=first.file if first else None,
        sha256=first.sha256 if first else None,
        wanted_sha256=manifest.result.sha256,
        changed=changed,
        compared=tuple(rows),
        further=tuple(made[1:]),
    )
