"""What a worker has and does: it scores chunks, makes shards and works out rounding errors, and writes no ledger.

Everything here travels: a room's recipe to the worker when it starts, tasks whenever there is something to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cerebellum.encode import moments
from cerebellum.encode.encoders import Encoder, OurEncoder
from cerebellum.engine.asking import Asker, KeptAsker
from cerebellum.engine.predictions import PredictionCache
from cerebellum.engine.protocols import Engine, Tokens
from cerebellum.engine.workers import HOST, MODEL, Lane, Room
from cerebellum.errors import BadInput
from cerebellum.imatrix import ImportanceMatrix
from cerebellum.layout import Layout
from cerebellum.measure.bundles import Bundle
from cerebellum.measure.scorer import Compared, Found, Scorer
from cerebellum.shards import Recipe, ShardJob, Variant, write_shard
from cerebellum.source import open_source

MakeEngine = Callable[[Callable[[str], None]], Engine]
"""Makes the engine of a worker, which tells its notes to what it is given."""


@dataclass(frozen=True, kw_only=True)
class PackedRecipe:
    """A recipe fit to travel: files are named, and opened again where it arrives."""

    source: Path
    header_sha256: str
    layout: Layout
    base_file: Path | None
    matrix: ImportanceMatrix | None
    ours: bool
    moments: Path | None
    folder: Path

    @classmethod
    def of(cls, recipe: Recipe) -> PackedRecipe:
        """Packs a recipe."""
        base = recipe.layout.base
        encoder = recipe.engine
        fed = encoder.moments if isinstance(encoder, OurEncoder) else None
        return cls(
            source=recipe.source.path,
            header_sha256=recipe.source.header_sha256,
            layout=replace(recipe.layout, base=replace(base, file=None)),
            base_file=base.file.path if base.file else None,
            matrix=recipe.matrix,
            ours=isinstance(encoder, OurEncoder),
            moments=fed.path if fed else None,
            folder=recipe.folder,
        )

    def unpacked(self, engine: Engine, threads: int) -> Recipe:
        """Opens what the recipe names; BadInput where this machine lacks it, or has another model there."""
        source = open_source(self.source, allow_requantize=True)
        if source.header_sha256 != self.header_sha256:
            raise BadInput(f"{self.source}: is another model on this machine than where the run was started")
        if not self.folder.is_dir():
            raise BadInput(
                f"{self.folder}: is not there on this machine; put the run folder on a disk that all machines share"
            )
        file = open_source(self.base_file, allow_requantize=True) if self.base_file else None
        fed = moments.read(self.moments) if self.moments else None
        encoder: Encoder = OurEncoder(engine=engine, moments=fed) if self.ours else engine
        return Recipe(
            source=source,
            layout=replace(self.layout, base=replace(self.layout.base, file=file)),
            matrix=self.matrix,
            engine=encoder,
            folder=self.folder,
            threads=threads,
        )


class EngineRoom:
    """A worker's engine, and the notes that it made since they were last taken."""

    def __init__(self, make_engine: MakeEngine) -> None:
        self._notes: list[str] = []
        self.engine = make_engine(self._notes.append)

    @property
    def identity(self) -> str:
        """Names everything that can change a number of this worker."""
        return self.engine.identity

    def take_notes(self) -> tuple[str, ...]:
        """Returns what the engine had to say since the last time."""
        notes = tuple(self._notes)
        self._notes.clear()
        return notes


class WorkRoom(EngineRoom):
    """A worker's engine, its resident model, the predictions that it keeps, and what shards are made from."""

    def __init__(self, packed: PackedRecipe, make_engine: MakeEngine, threads: int) -> None:
        super().__init__(make_engine)
        self.recipe = packed.unpacked(self.engine, threads)
        self._scorer = Scorer(self.engine, self._notes.append)
        self._asked = KeptAsker(self.engine.asker)
        self._kept: KeptOf | None = None
        self._cache: PredictionCache | None = None

    @property
    def scorer(self) -> Scorer:
        """Scores chunks. A model that was asked questions is closed before another one is opened beside it."""
        self._asked.close()
        return self._scorer

    def asker(self, paths: Sequence[Path]) -> Asker:
        """Returns the model of these files, open to be asked questions.

        The model that measures and the predictions on the card are freed before: two models need not fit.
        """
        self._forget()
        self._scorer.close()
        return self._asked.of(paths)

    def compared(self, kept: KeptOf | None) -> Compared | None:
        """Returns what to compare with; predictions on the graphics card are freed where that is another reference."""
        if kept is None:
            return None
        if self._cache is None or kept != self._kept:
            self._forget()
            self._kept = kept
            self._cache = PredictionCache(kept.folder, tuple(kept.chunks), 1, len(kept.chunks))
        return Compared(reference=kept.reference, cache=self._cache)

    def _forget(self) -> None:
        if self._cache is not None:
            self._cache.forget()
            self._cache = None

    def close(self) -> None:
        """Frees the model and what is kept on the graphics card."""
        self._forget()
        self.scorer.close()  # and with it the model that was asked


@dataclass(frozen=True, kw_only=True)
class MakeWorkRoom:
    """Makes a worker's room, in the worker, which uses so many threads of the processor."""

    packed: PackedRecipe
    make_engine: MakeEngine
    threads: int

    def __call__(self) -> WorkRoom:
        """Opens what the recipe names."""
        return WorkRoom(self.packed, self.make_engine, self.threads)


@dataclass(frozen=True, kw_only=True)
class KeptOf:
    """A reference on one text, and the chunks for which its predictions are kept in ``folder``, or on the card."""

    reference: Variant
    text: str
    folder: Path
    chunks: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a ScoreTask gives: all chunks of its decodes."""

    found: tuple[Found, ...]


@dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """Decode ``bundles`` of chunks on a variant; ``inputs`` are what the model is fed, (chunks, ctx) tokens, and
    ``entropy`` asks how unsure its predictions are.
    """

    variant: Variant
    bundles: tuple[Bundle, ...]
    inputs: Tokens
    kept: KeptOf | None
    entropy: bool = False

    @property
    def chunks(self) -> tuple[int, ...]:
        """The chunks of all its decodes, in the order of ``inputs``."""
        return tuple(chunk for bundle in self.bundles for chunk in bundle)

    @property
    def lane(self) -> Lane:
        """A model runs."""
        return MODEL

    def run(self, room: Room) -> Scored:
        """Returns the chunks as scored."""
        assert isinstance(room, WorkRoom)
        numbered = dict(zip(self.chunks, self.inputs, strict=True))
        ctx = int(self.inputs.shape[1])
        against = room.compared(self.kept)
        found = room.scorer.score(
            self.variant, self.bundles, numbered.__getitem__, ctx, against, entropy=self.entropy
        )
        return Scored(found=tuple(found))


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Make a shard, where it is not there; the name of its file says what it is made from."""

    job: ShardJob

    @property
    def lane(self) -> Lane:
        """The processor alone is busy."""
        return HOST

    def run(self, room: Room) -> str | None:
        """Returns the SHA-256 of the file, or None where it was there already."""
        assert isinstance(room, WorkRoom)
        return None if self.job.path.exists() else write_shard(room.recipe, self.job)
