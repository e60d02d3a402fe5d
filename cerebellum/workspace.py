"""A run folder, opened with an engine: what the stages need, made when it is first needed and then kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

from cerebellum import imatrix
from cerebellum.base import Base, all_presets, file_base, preset_base
from cerebellum.codec import write_artifact
from cerebellum.encode import moments
from cerebellum.encode.encoders import Encoder, choose, watched_inputs
from cerebellum.engine.protocols import Engine
from cerebellum.engine.timings import timed
from cerebellum.errors import BadInput
from cerebellum.folder import GROUPS, IMATRIX, LEDGER, MOMENTS, SETTINGS, SOURCE, RunFolder
from cerebellum.groups import Group, Groups, given_groups, make_groups, record_of, source_file
from cerebellum.layout import Layout
from cerebellum.ledger import Ledger
from cerebellum.progress import Reporter
from cerebellum.settings import Domain, Given, Settings
from cerebellum.shards import Recipe, Shards, Variant
from cerebellum.source import Source, open_source, projectors_beside
from cerebellum.source.hashing import Hashing
from cerebellum.texts import Corpus, load_corpora
from cerebellum.units import size
from cerebellum.verdicts import Changes

if TYPE_CHECKING:
    from cerebellum.engine.workers import Pool
    from cerebellum.measure.crew import Crew
    from cerebellum.measure.worker import PackedRecipe

_SPANS = 8  # of layers that a budget may treat apart: finer ones cost measurements and files, and gain little

_TOLD_SECONDS = 0.2  # how often the progress of hashing is looked at

EngineFor = Callable[[Settings], Engine]
"""Makes the engine that settings ask for."""

Hire = Callable[["PackedRecipe"], "Pool"]
"""Starts workers that make shards by a recipe and score them."""

Admission = Callable[[Source], None]
"""Raises BadInput for a model that the engine must not open."""


class Workspace:
    """A run folder with its settings and an engine.

    Use ``with workspace.locked():`` around anything that writes, so that two runs never share a folder.
    With ``planning`` no weights are read: the source's hash is the one that the run recorded. ``admit`` is asked
    about every model from outside before the engine opens it. ``hire`` starts workers where some are wanted; what
    they measure and make is what one process would have.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        engine: Engine,
        reporter: Reporter,
        *,
        planning: bool = False,
        admit: Admission = lambda model: None,
        hire: Hire | None = None,
    ) -> None:
        self.folder = folder
        self.artifacts = RunFolder(folder)
        self.settings = settings
        self.engine = engine
        self.reporter = reporter
        self._planning = planning
        self._admit = admit
        self._hire = hire
        self._moments_before: str | None = None
        self._corpora: dict[tuple[Domain, ...], Corpus] = {}

    @classmethod
    def reopen(
        cls,
        folder: Path,
        engine_for: EngineFor,
        reporter: Reporter,
        *,
        planning: bool = False,
        changed: Callable[[Settings], Settings] = lambda settings: settings,
        hire: Hire | None = None,
    ) -> Workspace:
        """Opens a folder that ``run`` or ``measure`` made earlier, with settings ``changed`` where asked."""
        settings = changed(RunFolder(folder).settings())
        return cls(folder, settings, engine_for(settings), reporter, planning=planning, hire=hire)

    def path(self, name: str) -> Path:
        """Returns the path of a file in the folder."""
        return self.folder / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process; BadInput where it holds the run of another model."""
        with self.artifacts.locked():
            try:
                self._refuse_another_source()
                yield
            finally:
                self._close_crew()
                self._close_ledger()

    def _close_crew(self) -> None:
        crew = self.__dict__.pop("crew", None)
        if crew is not None:
            crew.close()

    def _close_ledger(self) -> None:
        ledger = self.__dict__.pop("ledger", None)
        if ledger is not None:
            ledger.close()

    def save_settings(self) -> None:
        """Writes settings.json, for the stages that follow; a run does so once it is surely under way."""
        write_artifact(self.path(SETTINGS), self.settings)

    def admit_models(self) -> None:
        """Asks whether the engine may open the models from outside.

        A source that this folder's run has opened before, which source.json tells by its header, is not asked
        about again; a base that was given is.
        """
        if not self.path(SOURCE).exists():
            self._admit(self.source)
        if self.settings.base_file is not None:
            self._admit(open_source(self.settings.base_file, allow_requantize=True))

    def check_texts(self) -> None:
        """Tokenizes every text; raises BadInput before any work where one cannot be used."""
        texts = [self.selection, self.report_corpus]
        if self.settings.imatrix is None and self.settings.imatrix_texts:
            texts.append(self.importance_corpus)

    def _refuse_another_source(self) -> None:
        if not self.path(SOURCE).exists():
            return
        if self.artifacts.source().header_sha256 != self.source.header_sha256:
            raise BadInput(f"{self.folder}: holds the run of another model; choose another folder with -o")

    @cached_property
    def source(self) -> Source:
        """The model everything is made from."""
        return open_source(self.settings.source, allow_requantize=self.settings.allow_requantize)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups by role; for a budget cut into spans of layers, so that a plan can treat them apart.

        Where types are given, they are what a recipe tells apart.
        """
        match self.settings.goal:
            case Given(types=types):
                return given_groups(self.source, types)
            case goal:
                spans = _SPANS if goal.layers_apart else 1
                return make_groups(self.source, has_imatrix=True, spans=spans, allocate=goal.allocate)

    @cached_property
    def ledger(self) -> Ledger:
        """Every measurement; open until the lock is given up."""
        return Ledger(self.path(LEDGER))

    @cached_property
    def source_fingerprint(self) -> str:
        """Names the content of the source, every byte of it, wherever something that was made of it is kept."""
        if self._planning and self.path(SOURCE).exists():
            return self.artifacts.source().fingerprint
        with self.reporter.task("reading the source", 1) as tick, timed("hashing"):
            found = self._hashing.fingerprint.result()
            tick()
        return found

    @cached_property
    def source_sha256(self) -> str:
        """The SHA-256 of the source, as sha256sum prints it, for those who look at the results."""
        if self._planning and self.path(SOURCE).exists() and (known := self.artifacts.source().sha256):
            return known
        hashing = self._hashing
        with self.reporter.task("hashing the source", max(1, self.source.n_bytes >> 20)) as tick:
            told = 0
            with timed("hashing"):
                while not hashing.sha256.done():
                    wait([hashing.sha256], timeout=_TOLD_SECONDS)
                    for _ in range(told, hashing.n_bytes >> 20):
                        tick()
                    told = hashing.n_bytes >> 20
        return hashing.sha256.result()

    def begin_hashing(self) -> None:
        """Begins to read the source on threads of its own: what comes first needs a model, and no hash."""
        if not (self._planning and self.path(SOURCE).exists()):
            _ = self._hashing

    @cached_property
    def _hashing(self) -> Hashing:
        return Hashing(self.source)

    @cached_property
    def matrix(self) -> imatrix.ImportanceMatrix:
        """The matrix given, or the one in the folder, or one made now."""
        if self.settings.imatrix is not None:
            given = imatrix.read(self.settings.imatrix)
            if not set(given.entries) & set(self.source.tensors):
                raise BadInput(f"{given.path}: has no entry for a tensor of this model; give its own matrix")
            return given
        corpus = self.importance_corpus
        before = imatrix.recipe_of(self.path(IMATRIX))
        made = imatrix.compute_or_reuse(
            engine=self.engine,
            shards=self.source.paths,
            fingerprint=lambda: self.source_fingerprint,
            corpus=corpus,
            chunks=self.settings.imatrix_chunks or corpus.n_chunks,
            out=self.path(IMATRIX),
            reporter=self.reporter,
            beside=self._moments_asked,
        )
        self._check_as_made(made.path, before, imatrix.recipe_of(made.path) or "", made.sha256)
        return made

    @cached_property
    def importance_corpus(self) -> Corpus:
        """The text that the importance matrix and second moments are made from."""
        return self._corpus(self.settings.imatrix_texts or self.settings.select_texts)

    @cached_property
    def encoder(self) -> Encoder:
        """Whoever makes the bytes of shards: the engine itself, or ours with the moments that it feeds back by."""
        return choose(self.settings.encoder, self.engine, self.moments, self.reporter)

    @cached_property
    def watched(self) -> moments.Watched | None:
        """What second moments are wanted of, or None where no errors are fed back; nothing is decoded for it."""
        return watched_inputs(self.settings.encoder, self.settings.feedback, self.source.tensors)

    @cached_property
    def _moments_asked(self) -> moments.Asked | None:
        """Which second moments are wanted, or None where no errors are fed back."""
        if self.watched is None or not self.watched.weights:
            return None
        corpus = self.importance_corpus
        self._moments_before = moments.recipe_of(self.path(MOMENTS))
        return moments.Asked(
            watched=self.watched,
            fingerprint=lambda: self.source_fingerprint,
            corpus=corpus,
            chunks=self.settings.imatrix_chunks or corpus.n_chunks,
            engine=self.engine.identity,
            out=self.path(MOMENTS),
        )

    @cached_property
    def moments(self) -> moments.Moments | None:
        """The second moments in the folder, or those made now from the text and chunks of the importance matrix."""
        if self._moments_asked is None:
            return None
        made = moments.compute_or_reuse(
            self._moments_asked, engine=self.engine, shards=self.source.paths, reporter=self.reporter
        )
        self._check_as_made(made.path, self._moments_before, moments.recipe_of(made.path) or "", made.sha256)
        return made

    def _check_as_made(self, path: Path, before: str | None, recipe: str, sha256: str) -> None:
        """Raises BadInput where a file that weights are rounded by is another one than the ledger remembers.

        ``recipe`` is what it was made from, and ``before`` what the file that was there was made from. One that was
        made just now is remembered: where it comes out otherwise than before it was removed, as on some GPUs, all
        that rests on it is measured anew.
        """
        known = self.ledger.content_hash(path.name, recipe)
        if known is None or recipe != before:
            self.ledger.record_content_hash(path.name, recipe, sha256)
        elif known != sha256:
            raise BadInput(
                f"{path}: its bytes changed on the disk since it was made, and weights would be rounded by other "
                "values than were measured; remove it and run `cerebellum run` again, which makes it anew"
            )

    @cached_property
    def base(self) -> Base:
        """The base that was given, or the preset made with the matrix."""
        if self.settings.base_file is not None:
            return file_base(self.source, self.settings.base_file)
        return preset_base(self.engine, self.source, self.settings.base, self.matrix)

    @cached_property
    def base_of_shapes(self) -> Base:
        """The base as far as shapes tell it: types and sizes, without an importance matrix being made."""
        return self.base if "matrix" in self.__dict__ else self.base_without_matrix

    @cached_property
    def base_without_matrix(self) -> Base:
        """The base whose metadata names no importance matrix: the same before the run and after it."""
        if self.settings.base_file is not None:
            return self.base
        return preset_base(self.engine, self.source, self.settings.base, None)

    @cached_property
    def layout(self) -> Layout:
        """Groups, types and exact bytes under any changes of the base."""
        return Layout.of(self.source, self.groups, self.base)

    @property
    def layout_of_shapes(self) -> Layout:
        """The layout as far as shapes tell it, so that sizes are known before anything is made."""
        return Layout.of(self.source, self.groups, self.base_of_shapes)

    @cached_property
    def recipe(self) -> Recipe:
        """What shards are made from."""
        return Recipe(
            source=self.source,
            layout=self.layout,
            matrix=self.matrix,
            engine=self.encoder,
            folder=self.path("shards"),
            threads=self.settings.threads,
        )

    @cached_property
    def presets(self) -> dict[str, dict[str, GGMLQuantizationType]]:
        """The types that llama.cpp's presets give this model's tensors, by preset."""
        return all_presets(self.engine, self.source)

    @cached_property
    def shards(self) -> Shards:
        """Every group at every type, made on demand."""
        self._hash_with_progress()
        return Shards(self.recipe, self.ledger, lambda what: self.reporter.note(f"quantizing {what}"))

    @cached_property
    def crew(self) -> Crew | None:
        """The workers, started on first use; None where none are wanted."""
        if self._hire is None:
            return None
        from cerebellum.measure.crew import Crew
        from cerebellum.measure.measurer import base_anchors
        from cerebellum.measure.worker import PackedRecipe

        shards = self.shards  # makes the folder, and the matrix, before workers look for them
        pool = self._hire(PackedRecipe.of(self.recipe))
        return Crew(pool, self.reporter, lambda: base_anchors(self), lambda: shards)

    @contextmanager
    def shards_ahead(self, wanted: Iterable[Changes]) -> Iterator[None]:
        """Makes the shards of these variants beside the block where a GPU measures and the processor would idle."""
        here = self.engine.on_gpu and self._hire is None  # workers make their own
        with self.shards.made_ahead(wanted) if here else nullcontext():
            yield

    def _hash_with_progress(self) -> str:
        """Reads the source here, where progress can be shown, before others ask for its fingerprint."""
        return self.source_fingerprint

    @cached_property
    def projectors(self) -> tuple[Path, ...]:
        """The vision and audio projectors beside the source that are of this model."""
        return projectors_beside(self.source)

    @cached_property
    def source_variant(self) -> Variant:
        """The source itself, to be measured like any variant."""
        return Variant(label="source", paths=self.source.paths, digest=self.source_fingerprint)

    @cached_property
    def selection(self) -> Corpus:
        """The text that decides."""
        return self._corpus(self.settings.select_texts)

    @cached_property
    def report_corpus(self) -> Corpus:
        """The text that reports."""
        return self._corpus(self.settings.report_texts)

    def _corpus(self, texts: Sequence[Domain]) -> Corpus:
        """Tokenizes texts once, whatever they are used for: a large vocabulary makes that seconds."""
        key = tuple(texts)
        if key not in self._corpora:
            self._corpora[key] = load_corpora(self.engine, self.source.path, texts, self.settings.ctx)
        return self._corpora[key]

    def write_source(self) -> None:
        """Writes source.json, and groups.json with the groups that a plan will name; no SHA-256 is waited for."""
        if not self._planning:
            done = self._hashing.sha256.done()
            self._write_source(self._hashing.sha256.result() if done else self._known_sha256())
        self.write_groups()

    def _known_sha256(self) -> str | None:
        """The SHA-256 that an earlier run of this folder found for the same content, if one did."""
        if not self.path(SOURCE).exists():
            return None
        before = self.artifacts.source()
        return before.sha256 if before.fingerprint == self.source_fingerprint else None

    def finish_source(self) -> None:
        """Writes source.json with its SHA-256, which a run has had the time to work out by now."""
        self._write_source(self.source_sha256)

    def _write_source(self, sha256: str | None) -> None:
        self.artifacts.write(SOURCE, source_file(self.source, self.source_fingerprint, sha256))

    def write_groups(self) -> None:
        """Writes groups.json; it follows the goal, since a budget cuts roles into spans of layers."""
        self.artifacts.write(GROUPS, Groups(groups=tuple(record_of(group) for group in self.groups)))

    def can_swap(self, model: Changes, tried: Iterable[Changes]) -> bool:
        """Whether changes are expected to be swapped in place into a model with the changes ``model``.

        It depends on sizes and on the engine alone, never on what was measured.
        """
        staged = (
            self.layout.group_bytes(name, qtype) for changes in tried for name, qtype in changes.items()
        )
        return self.engine.can_swap(self.layout.file_bytes(model), max(staged, default=0))

    def tell_memory(self) -> None:
        """Notes it where the source is larger than this machine's memory, and weights are read over and over."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.source.n_bytes > memory and not self.engine.on_gpu:
            self.reporter.note(
                f"memory: the source takes {size(self.source.n_bytes)}, this machine has {size(memory)}; while the "
                "source itself runs, its weights are read from the disk for every batch"
            )

    def check_space(self, tried: Iterable[Changes]) -> None:
        """Raises BadInput before any work if base, result and a shard for every change cannot fit on the disk."""
        layout = self.layout_of_shapes
        changed = sum(layout.raw_bytes(name, qtype) for changes in tried for name, qtype in changes.items())
        shards = self.path("shards")
        present = sum(p.stat().st_size for p in shards.glob("*.gguf")) if shards.exists() else 0
        fed = self.watched.n_bytes if self.watched and not self.path(MOMENTS).exists() else 0
        needed = self.settings.goal.wholes * layout.tensor_bytes() + changed + fed - present
        free = shutil.disk_usage(self.folder).free
        self.reporter.note(f"disk: up to {size(max(needed, 0))} more in {self.folder}, {size(free)} are free")
        if needed > free:
            raise BadInput(
                f"{self.folder}: {size(needed)} are needed (base, result, every group at every type "
                f"tried), {size(free)} are free; choose a larger disk with -o, or try fewer types"
            )
