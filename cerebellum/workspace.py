"""The run folder: what was asked, and everything the stages need, rebuilt from its files alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cerebellum import imatrix
from cerebellum.base import Base, file_base, preset_base
from cerebellum.errors import BadInput
from cerebellum.files import atomic_write_text
from cerebellum.gguf import parse_weight_type
from cerebellum.groups import Group, describe, make_groups
from cerebellum.ledger import Ledger
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.llama.presets import parse_preset
from cerebellum.measure.curves import ANCHOR, K_LADDER, KLD
from cerebellum.measure.race import Changes, Threshold
from cerebellum.memory.shape import plain_metadata
from cerebellum.plan.limit import Sizes
from cerebellum.progress import Reporter
from cerebellum.shards import Recipe, Shards, Variant
from cerebellum.source import Source, open_source
from cerebellum.texts import Corpus, load_corpus

DATA = Path(__file__).parent / "data"
DEMO_MODEL = DATA / "cerebellum-demo.F16.gguf"
SELECTION_TEXT = DATA / "selection.txt"
REPORT_TEXT = DATA / "report.txt"

_GIB = 1 << 30
_SPANS = 8  # of layers that a budget may treat apart: finer ones cost measurements and files, and gain little


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked. Everything here is in settings.json.

    ``chunks`` 0 stops each group as soon as its verdict is sure; N gives every group the same N.
    Elsewhere 0 chunks means all there are."""

    source: Path
    base: str = "Q3_K_M"
    base_file: Path | None = None
    demote: str = "Q2_K"
    max_increase_pct: float = 3.0
    indifference_pct: float = 0.2
    alpha: float = 0.05
    imatrix: Path | None = None
    imatrix_text: Path | None = None
    imatrix_chunks: int = 0
    select_text: Path = SELECTION_TEXT
    report_text: Path = REPORT_TEXT
    ctx: int = 512
    chunks: int = 0
    max_chunks: int = 0
    kld_cache_bytes: int | None = None
    report_chunks: int = 0
    threads: int = os.cpu_count() or 1
    gpu_layers: int = 0
    budget: str | None = None
    fit: str | None = None
    fit_ctx: int = 4096
    types: tuple[str, ...] = K_LADDER
    fine_types: bool = True
    zoom: bool = True
    objective: str = KLD
    anchor: str = ANCHOR
    curve_passes: float = 2.0
    seed: int = 1
    allow_requantize: bool = False

    @property
    def by_budget(self) -> bool:
        """Whether bytes are given, as a file's size or a card's, rather than a limit on damage."""
        return self.budget is not None or self.fit is not None

    @property
    def prediction_bytes(self) -> int:
        """Disk for predictions: a budget compares every part with them, a limit the first block of chunks."""
        if self.kld_cache_bytes is not None:
            return self.kld_cache_bytes
        return _GIB * (8 if self.by_budget else 1)

    @property
    def threshold(self) -> Threshold:
        return Threshold(limit_pct=self.max_increase_pct, indifference_pct=self.indifference_pct)

    def save(self, path: Path) -> None:
        write_json(path, {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()})

    @classmethod
    def load(cls, path: Path) -> Settings:
        raw = read_json(path)
        is_path = {f.name for f in fields(cls) if "Path" in str(f.type)}
        known = {f.name for f in fields(cls)}
        try:
            raw["types"] = tuple(raw.get("types", K_LADDER))
            given: dict[str, Any] = {
                k: Path(v) if k in is_path and v else v for k, v in raw.items() if k in known
            }
            return cls(**given)
        except TypeError as error:
            raise BadInput(f"{path}: not the settings of a run ({error})") from error


class Workspace:
    """A run folder, opened. Everything is made when first needed and then kept.

    Use ``with workspace.locked():`` around anything that writes, so that two runs never share a folder.
    With ``planning`` no weights are read: the source's hash is the one that the run recorded.
    """

    def __init__(
        self, folder: Path, settings: Settings, reporter: Reporter, *, planning: bool = False
    ) -> None:
        settings = replace(
            settings,
            demote=parse_weight_type(settings.demote).name,
            anchor=_named("--anchor", settings.anchor),
            types=tuple(_named("--types", kind) for kind in settings.types),
        )
        self.folder, self.settings, self.reporter, self.planning = folder, settings, reporter, planning
        self.engine = LlamaEngine(EngineSettings(threads=settings.threads, gpu_layers=settings.gpu_layers))
        if settings.base_file is None:
            parse_preset(settings.base)

    @classmethod
    def reopen(cls, folder: Path, reporter: Reporter, *, planning: bool = False, **changed: Any) -> Workspace:
        """A folder that ``run`` or ``measure`` made earlier, with other settings where given."""
        path = folder / "settings.json"
        if not path.exists():
            raise BadInput(f"{folder}: not a run folder (no settings.json); start with `cerebellum run`")
        return cls(folder, replace(Settings.load(path), **changed), reporter, planning=planning)

    def path(self, name: str) -> Path:
        return self.folder / name

    @contextmanager
    def locked(self, *, save: bool = True) -> Iterator[None]:
        """Holds the folder for this process; makes it and, unless told otherwise, saves the settings."""
        lock = FileLock(self.path(".lock"), timeout=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise BadInput(f"{self.folder}: another Cerebellum is at work in it; wait, or use -o") from error
        except OSError as error:
            raise BadInput(
                f"{self.folder}: cannot be written ({error.strerror}); choose another folder with -o"
            ) from error
        try:
            self._refuse_another_source()
            if save:
                self.save_settings()
            yield
        finally:
            if "ledger" in self.__dict__:
                self.__dict__.pop("ledger").close()
            lock.release()

    def save_settings(self) -> None:
        self.settings.save(self.path("settings.json"))

    def check_texts(self) -> None:
        """BadInput before any work where a text cannot be used."""
        _ = self.selection, self.report_corpus
        if self.settings.imatrix is None and self.settings.imatrix_text is not None:
            load_corpus(self.engine, self.source.path, self.settings.imatrix_text, self.settings.ctx)

    def _refuse_another_source(self) -> None:
        if not self.path("source.json").exists():
            return
        before = read_json(self.path("source.json")).get("header_sha256")
        if before != self.source.header_sha256:
            raise BadInput(f"{self.folder}: holds the run of another model; choose another folder with -o")

    @cached_property
    def source(self) -> Source:
        return open_source(self.settings.source, allow_requantize=self.settings.allow_requantize)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """By role; for a budget cut into spans of layers, so that a plan can treat them apart."""
        apart = self.settings.by_budget and self.settings.zoom
        return make_groups(self.source, has_imatrix=True, spans=_SPANS if apart else 1)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.path("ledger.sqlite"))

    @cached_property
    def source_sha256(self) -> str:
        """Full content hash, read once, with progress where it is long."""
        if self.planning and self.path("source.json").exists():
            return str(read_json(self.path("source.json"))["sha256"])
        mebibytes = max(1, self.source.n_bytes >> 20)
        with self.reporter.task("hashing the source", mebibytes) as tick:
            done = 0

            def progress(n_bytes: int, _total: int) -> None:
                nonlocal done
                while done < n_bytes >> 20:
                    tick()
                    done += 1

            return self.source.sha256(progress)

    @cached_property
    def matrix(self) -> imatrix.ImportanceMatrix:
        """The matrix given, or the one in the folder, or one made now."""
        if self.settings.imatrix is not None:
            given = imatrix.read(self.settings.imatrix)
            if not set(given.entries) & set(self.source.tensors):
                raise BadInput(f"{given.path}: has no entry for a tensor of this model; give its own matrix")
            return given
        text = self.settings.imatrix_text or self.settings.select_text
        corpus = load_corpus(self.engine, self.source.path, text, self.settings.ctx)
        return imatrix.compute_or_reuse(
            engine=self.engine,
            shards=[file.path for file in self.source.files],
            source_sha256=self.source_sha256,
            corpus=corpus,
            chunks=self.settings.imatrix_chunks or corpus.n_chunks,
            out=self.path("imatrix.gguf"),
            reporter=self.reporter,
        )

    @cached_property
    def base(self) -> Base:
        if self.settings.base_file is not None:
            return file_base(self.source, self.settings.base_file)
        return preset_base(self.source, self.settings.base, self.matrix)

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes.of(self.source, self.groups, self.base)

    @cached_property
    def shards(self) -> Shards:
        self.source_sha256  # noqa: B018 - hashed here, where progress can be shown
        recipe = Recipe(
            source=self.source,
            base=self.base,
            matrix=self.matrix,
            groups=self.groups,
            folder=self.path("shards"),
            threads=self.settings.threads,
        )
        return Shards(recipe, self.ledger, lambda what: self.reporter.note(f"quantizing {what}"))

    @cached_property
    def source_variant(self) -> Variant:
        """The source itself, to be measured like any variant."""
        paths = tuple(file.path for file in self.source.files)
        return Variant(label="source", paths=paths, digest=self.source_sha256)

    @cached_property
    def selection(self) -> Corpus:
        return load_corpus(self.engine, self.source.path, self.settings.select_text, self.settings.ctx)

    @cached_property
    def report_corpus(self) -> Corpus:
        return load_corpus(self.engine, self.source.path, self.settings.report_text, self.settings.ctx)

    def write_source(self) -> None:
        """source.json and groups.json."""
        described = describe(self.source, make_groups(self.source))
        groups = described.pop("groups")
        described |= {
            "path": self.source.path.name,
            "sha256": self.source_sha256,
            "header_sha256": self.source.header_sha256,
            "requantized": self.source.is_quantized,
            "metadata": plain_metadata(self.source.files[0]),
        }
        write_json(self.path("source.json"), described)
        write_json(self.path("groups.json"), groups)

    def check_space(self, tried: Iterable[Changes]) -> None:
        """BadInput before any work if base, result and a shard for every change cannot fit on the disk."""
        changed = sum(self.sizes.bytes_at(name, kind) for changes in tried for name, kind in changes.items())
        shards = self.path("shards")
        present = sum(p.stat().st_size for p in shards.glob("*.gguf")) if shards.exists() else 0
        wholes = 2 + (self.settings.by_budget and self.settings.fine_types)  # base, result, IQ types of plans
        needed = wholes * self.sizes.total({}) + changed - present
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise BadInput(
                f"{self.folder}: {needed / 1e9:.2f} GB are needed (base, result, every group at every type "
                f"tried), {free / 1e9:.2f} GB are free; choose a larger disk with -o"
                + (", or fewer --types" if self.settings.by_budget else "")
            )


def _named(flag: str, kind: str) -> str:
    try:
        return parse_weight_type(kind).name
    except BadInput as error:
        raise BadInput(f"{flag}: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all; floats that are not finite are refused rather than written as NaN."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


CURVES_FORMAT = 2
"""Of curves.json. 1: changes against the base, of roles and of some layers; 2: damages above an anchor,
rounding errors, and points of every group."""


def read_curves(folder: Path) -> Any:
    """curves.json of this version; BadInput where another made it."""
    path = folder / "curves.json"
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != CURVES_FORMAT:
        raise BadInput(f"{path}: an earlier version's; run `cerebellum run --budget` again in this folder")
    return found


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); run the stage that makes it") from error
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error}); remove it and run its stage again") from error
