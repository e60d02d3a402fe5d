"""What made what -> manifest.json: enough to make the same file again, and to see what changed since.

It goes out with the file, so it names files and never says where on somebody's disk they lie.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from cerebellum import __version__
from cerebellum.codec import Artifact, Record
from cerebellum.engine.timetable import TimeTable
from cerebellum.files import atomic_writer, sha256_file, sha256_files
from cerebellum.settings import GGML, OURS, Domain, EncoderName, Settings
from cerebellum.source.origin import Origin, origin_of
from cerebellum.verdicts import NOTHING

if TYPE_CHECKING:  # whoever only reads a manifest needs no engine
    from cerebellum.folder import RunFolder
    from cerebellum.plan.artifacts import AnyPlan
    from cerebellum.texts import Corpus, Part
    from cerebellum.workspace import Workspace

_PACKAGES = ("gguf", "llama-cpp-python", "numpy", "scipy")


class NamedFile(Record, frozen=True, kw_only=True):
    """A file by its name and content."""

    file: str
    sha256: str


class SourceNamed(Record, frozen=True, kw_only=True):
    """The source: its name, its files in order, and the hash of all of them one after the other.

    ``origin`` is the checkpoint that it was converted from, and the converter, where that was done here.
    """

    name: str
    files: tuple[str, ...]
    sha256: str
    header_sha256: str
    origin: Origin | None = None


class BaseNamed(Record, frozen=True, kw_only=True):
    """The base: a preset is made again from the source; a file that was given is named by its hash."""

    label: str
    file: str | None
    sha256: str | None


class ResultNamed(NamedFile, frozen=True, kw_only=True):
    """A finished file. Of one that is split, ``file`` is the first split, ``sha256`` is over all of them one after
    the other, ``bytes`` counts all, and ``parts`` has each of them; else it is empty.
    """

    bytes: int
    parts: tuple[NamedFile, ...] = ()

    @property
    def files(self) -> tuple[NamedFile, ...]:
        """Every file that belongs to it, with its own hash."""
        return self.parts or (NamedFile(file=self.file, sha256=self.sha256),)


class FurtherSize(Record, frozen=True, kw_only=True):
    """A further size of the run: its label, the types of its tensors, its artifacts' hashes, its finished file.

    ``evidence`` is by the artifact's path in the run folder.
    """

    label: str
    tensor_types: dict[str, str]
    evidence: dict[str, str]
    result: ResultNamed


class EncoderNamed(Record, frozen=True, kw_only=True):
    """Who rounded the weights in fact: ours with its version and the second moments it fed errors back by, or
    ggml's, whose version is llama.cpp's.
    """

    name: EncoderName = GGML
    version: str | None = None
    moments: NamedFile | None = None


class Manifest(Artifact, frozen=True, kw_only=True):
    """manifest.json. Paths in ``settings`` are names only; ``shards`` and ``evidence`` are hashes by file name.

    ``tensor_types`` and ``result`` are those of the size that was named first; ``further`` has the other sizes.
    ``projectors`` are files for a model that sees or hears, copied beside the result as they were.
    ``texts`` and ``text_files`` are by what a text was for, "selection" or "report"; of several domains each is
    named too: "report, code".
    Format 1 had hashes and settings, 2 tensor types, base and file names too, 3 settings by goal, 4 has settings
    of format 3; one without an ``encoder`` is of ggml's.
    """

    format: Literal[4] = 4
    cerebellum: str
    llama_cpp: str
    versions: dict[str, str]
    settings: Settings
    seed: int
    source: SourceNamed
    imatrix: NamedFile
    base: BaseNamed
    texts: dict[str, str]
    text_files: dict[str, str]
    tensor_types: dict[str, str]
    shards: dict[str, str]
    evidence: dict[str, str]
    ledger_digest: str
    result: ResultNamed
    timings: TimeTable | None = None
    encoder: EncoderNamed = EncoderNamed()
    further: tuple[FurtherSize, ...] = ()
    projectors: tuple[NamedFile, ...] = ()

    @property
    def results(self) -> tuple[ResultNamed, ...]:
        """The finished files of all sizes, in the order in which they were asked for."""
        return (self.result, *(size.result for size in self.further))


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a manifest says that is only known when all is done; a rehearsal makes it up."""

    source_sha256: str
    matrix: NamedFile
    base: BaseNamed
    tensor_types: dict[str, str]
    shards: dict[str, str]
    artifacts: dict[str, str]
    ledger_digest: str
    result: ResultNamed
    encoder: EncoderNamed
    timings: TimeTable | None = None
    further: tuple[FurtherSize, ...] = ()
    projectors: tuple[NamedFile, ...] = ()


def make_manifest(workspace: Workspace, timings: TimeTable | None = None) -> Manifest:
    """Writes manifest.json of a finished run; a matrix from elsewhere is put beside it."""
    from cerebellum.folder import EVIDENCE, MANIFEST

    workspace.finish_source()
    first, *further = workspace.artifacts.results()
    plan = first.plan()
    matrix = _beside(workspace.matrix.path, workspace.folder)
    artifacts = [workspace.path(name) for name in EVIDENCE]
    shards = workspace.shards.hashes(NOTHING)
    for view in (first, *further):
        shards |= workspace.shards.hashes(view.plan().changes)
    evidence = Evidence(
        source_sha256=workspace.source_sha256,
        matrix=NamedFile(file=matrix.name, sha256=workspace.matrix.sha256),
        base=_base(workspace),
        tensor_types=plan.tensor_types,
        shards=dict(sorted(shards.items())),
        artifacts={path.name: sha256_file(path) for path in artifacts if path.exists()},
        ledger_digest=workspace.ledger.digest(),
        result=_result(workspace, plan),
        encoder=_encoder(workspace),
        timings=timings,
        further=tuple(_further(workspace, view) for view in further),
        projectors=_projectors(workspace),
    )
    manifest = manifest_of(workspace, evidence)
    workspace.artifacts.write(MANIFEST, manifest)
    return manifest


def _further(workspace: Workspace, view: RunFolder) -> FurtherSize:
    """Names a size that is not the first."""
    from cerebellum.folder import PLAN, VERIFY

    plan = view.plan()
    places = [view.place(name) for name in (PLAN, VERIFY)]
    return FurtherSize(
        label=plan.file_label,
        tensor_types=plan.tensor_types,
        evidence={
            place: sha256_file(workspace.path(place)) for place in places if workspace.path(place).exists()
        },
        result=_result(workspace, plan),
    )


def _result(workspace: Workspace, plan: AnyPlan) -> ResultNamed:
    """Names the finished file of a plan, with the splits that it may have."""
    from cerebellum.build import output_path, result_paths

    out = output_path(workspace.folder, workspace.source, plan.file_label)
    paths = result_paths(out) or (out,)
    parts = tuple(NamedFile(file=path.name, sha256=sha256_file(path)) for path in paths)
    return ResultNamed(
        file=paths[0].name,
        sha256=parts[0].sha256 if len(paths) == 1 else sha256_files(paths),
        bytes=sum(path.stat().st_size for path in paths),
        parts=parts if len(paths) > 1 else (),
    )


def manifest_of(workspace: Workspace, evidence: Evidence) -> Manifest:
    """Returns the manifest of a run with this evidence; nothing is read or written."""
    texts = _texts(workspace)
    return Manifest(
        cerebellum=__version__,
        llama_cpp=workspace.engine.build,
        versions={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        settings=named_settings(workspace.settings),
        seed=workspace.settings.seed,
        source=SourceNamed(
            name=workspace.source.name,
            files=tuple(file.path.name for file in workspace.source.files),
            sha256=evidence.source_sha256,
            header_sha256=workspace.source.header_sha256,
            origin=origin_of(workspace.source.path, workspace.source.header_sha256),
        ),
        imatrix=evidence.matrix,
        base=evidence.base,
        texts={part: text.sha256 for part, text in texts.items()},
        text_files={part: text.path.name for part, text in texts.items()},
        tensor_types=evidence.tensor_types,
        shards=evidence.shards,
        evidence=evidence.artifacts,
        ledger_digest=evidence.ledger_digest,
        result=evidence.result,
        timings=evidence.timings,
        encoder=evidence.encoder,
        further=evidence.further,
        projectors=evidence.projectors,
    )


def text_part(use: str, domain: str) -> str:
    """Returns what a manifest calls a text: what it was used for, and its domain where there are several."""
    return f"{use}, {domain}" if domain else use


def _texts(workspace: Workspace) -> dict[str, Part | Corpus]:
    """Returns the texts by what they were used for; a matrix that was given was made from a text nobody knows here."""
    texts = _parts("selection", workspace.selection) | _parts("report", workspace.report_corpus)
    if workspace.settings.imatrix is None:
        texts |= _parts("importance", workspace.importance_corpus)
    return texts


def _parts(use: str, corpus: Corpus) -> dict[str, Part | Corpus]:
    """Returns a corpus by what it was used for, or each of its domains."""
    return {text_part(use, part.domain): part for part in corpus.parts} or {use: corpus}


def named_settings(settings: Settings) -> Settings:
    """Returns the settings with every path cut down to its name."""
    values = {name: getattr(settings, name) for name in settings.__struct_fields__}
    paths = {name: Path(value.name) for name, value in values.items() if isinstance(value, Path)}
    return msgspec.structs.replace(
        settings,
        **paths,
        select_domains=_domains_named(settings.select_domains),
        report_domains=_domains_named(settings.report_domains),
        imatrix_domains=_domains_named(settings.imatrix_domains),
    )


def _domains_named(domains: Sequence[Domain]) -> tuple[Domain, ...]:
    return tuple(Domain(name=domain.name, path=Path(domain.path.name)) for domain in domains)


def _encoder(workspace: Workspace) -> EncoderNamed:
    from cerebellum.encode import ENCODER_VERSION
    from cerebellum.encode.encoders import OurEncoder

    encoder = workspace.encoder
    if not isinstance(encoder, OurEncoder):
        return EncoderNamed()
    moments = encoder.moments
    named = NamedFile(file=moments.path.name, sha256=moments.sha256) if moments else None
    return EncoderNamed(name=OURS, version=ENCODER_VERSION, moments=named)


def _base(workspace: Workspace) -> BaseNamed:
    file = workspace.base.file
    return BaseNamed(
        label=workspace.base.label,
        file=file.path.name if file else None,
        sha256=file.sha256() if file else None,
    )


def _projectors(workspace: Workspace) -> tuple[NamedFile, ...]:
    """Copies the projectors that lie beside the source and are of this model, and names them."""
    copies = [_beside(path, workspace.folder) for path in workspace.projectors]
    return tuple(NamedFile(file=path.name, sha256=sha256_file(path)) for path in copies)


def _beside(path: Path, folder: Path) -> Path:
    """Returns ``path`` if it lies in ``folder``, else a copy of it there under the same name."""
    target = folder / path.name
    if path.resolve() != target.resolve():
        with path.open("rb") as source, atomic_writer(target, path.stat().st_size) as stream:
            shutil.copyfileobj(source, stream)
    return target
