"""The run folder: every artifact's name, its reader, and the lock that keeps two runs apart.

A run for several sizes has one plan.json, verify.json and bench.json for each. Those of the size that was named
first lie where those of a run for one size lie; every further size has its own in ``sizes/LABEL/``, under the same
names, and sizes.json lists all of them. What the sizes have in common (source, groups, curves, ledger, shards,
manifest, card) is there once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from filelock import FileLock, Timeout

from cerebellum import files
from cerebellum.bench.artifacts import BenchResults
from cerebellum.codec import Artifact, Record, read_artifact, write_artifact
from cerebellum.errors import BadInput
from cerebellum.files import is_plain_name, make_folder, remove_partials, sha256_file
from cerebellum.groups import Groups, SourceFile
from cerebellum.manifest import Manifest, named_settings
from cerebellum.measure.artifacts import Curves, Measurements
from cerebellum.plan.artifacts import AnyPlan
from cerebellum.settings import Bytes, Gpu, Preset, Published, Settings
from cerebellum.verify import Verified

A = TypeVar("A")

SETTINGS = "settings.json"
SOURCE = "source.json"
GROUPS = "groups.json"
MEASUREMENTS = "measurements.json"
CURVES = "curves.json"
PLAN = "plan.json"
TRANSFER = "transfer.json"
VERIFY = "verify.json"
BENCH = "bench.json"
SIZES = "sizes.json"
PUBLISHED = "published.json"
MANIFEST = "manifest.json"
IMATRIX = "imatrix.gguf"
MOMENTS = "moments.gguf"
LEDGER = "ledger.sqlite"
CARD = "README.md"
REPORT = "report.html"

EVIDENCE = (SOURCE, GROUPS, MEASUREMENTS, CURVES, SIZES, PLAN, TRANSFER, VERIFY)
"""What the manifest names by its hash, where it is there."""

OF_ONE_SIZE = (PLAN, VERIFY, BENCH)
"""The artifacts that every size of a run has for itself."""

FURTHER_SIZES = "sizes"
"""The folder with a folder for each size but the first, named by its label."""

_LOCK = ".lock"
_FOLDERS = ("shards", "predictions", "charts", "bench")


class SizeRow(Record, frozen=True, kw_only=True):
    """One size of a run: what was asked for, the bytes that it comes to, its label, and where its artifacts lie.

    ``label`` is the quantization label in the name of its file. ``plan``, ``verify`` and ``bench`` are paths
    from the run folder; the last two are there once their stages have run.
    """

    label: str
    asked: Bytes | Preset | Gpu
    budget_bytes: int
    plan: str
    verify: str
    bench: str


class Sizes(Artifact, frozen=True, kw_only=True):
    """sizes.json: the sizes of a run in the order in which they were asked for; a run for one size has none."""

    format: Literal[1] = 1
    sizes: tuple[SizeRow, ...]


@dataclass(frozen=True)
class RunFolder:
    """A folder of artifacts; each is written by one stage and read, checked field by field, by later ones.

    With ``label`` it is the same folder as a further size sees it: plan, verification and benchmarks are its own.
    """

    path: Path
    label: str | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / self.place(name)

    def place(self, name: str) -> str:
        """Returns where an artifact lies, as a path from the run folder."""
        if self.label is None or name not in OF_ONE_SIZE:
            return name
        return f"{FURTHER_SIZES}/{self.label}/{name}"

    def results(self) -> tuple[RunFolder, ...]:
        """Returns this folder as each of its sizes sees it, in the order in which they were asked for.

        A run for one size, or against a limit, has just itself. Raises BadInput where sizes.json is not ours.
        """
        if not (self / SIZES).exists():
            return (self,)
        rows = self._read(SIZES, Sizes, "run `cerebellum plan` again").sizes
        strange = next((row.label for row in rows if not is_plain_name(row.label)), None)
        if strange is not None or not rows:
            raise BadInput(
                f"{self / SIZES}: names {strange!r}, which is no label; run `cerebellum plan` again"
            )
        views = (RunFolder(self.path), *(RunFolder(self.path, row.label) for row in rows[1:]))
        for row, view in zip(rows, views, strict=True):
            if row.plan != view.place(PLAN) or [other.label for other in rows].count(row.label) > 1:
                raise BadInput(
                    f"{self / SIZES}: {row.label!r} is there twice or has its plan at {row.plan!r}, not at "
                    f"{view.place(PLAN)!r}; run `cerebellum plan` again"
                )
            self._check_size(row, view)
        return views

    def _check_size(self, row: SizeRow, view: RunFolder) -> None:
        """Raises BadInput where a row of sizes.json says another size than its plan does."""
        plan = view.plan()
        planned = (plan.file_label, getattr(plan, "budget_bytes", None))
        if planned != (row.label, row.budget_bytes):
            raise BadInput(
                f"{self / SIZES}: says {row.label!r} of {row.budget_bytes} bytes, and {view / PLAN} is the plan of "
                f"{planned[0]!r} of {planned[1]} bytes; run `cerebellum plan` again"
            )

    def finished_sizes(self) -> tuple[RunFolder, ...]:
        """Returns what ``results`` does; BadInput where the manifest names other sizes, so that one is missing."""
        views = self.results()
        named = [size.label for size in self.manifest().further]
        found = [view.label for view in views[1:]]
        if named != found:
            raise self.other_sizes([str(label) for label in found], named)
        return views

    def other_sizes(self, found: list[str], named: list[str]) -> BadInput:
        """Returns the error for sizes that are not those that the manifest names; both are without the first."""
        return BadInput(
            f"{self / SIZES}: has {', '.join(found) or 'nothing'} beside the first size, and {self / MANIFEST} names "
            f"{', '.join(named) or 'nothing'}; run `cerebellum plan`, `build` and `verify` again, or put the list back"
        )

    def check_evidence(self) -> Manifest:
        """Returns the manifest of a finished run.

        Raises BadInput where an artifact or what was asked is not what the manifest names: it was edited or swapped,
        or a stage ran since and the ones after it did not.
        """
        manifest = self.manifest()
        for name in EVIDENCE:
            path = self.path / name
            found = sha256_file(path) if path.exists() else None
            if found != manifest.evidence.get(name):
                raise BadInput(
                    f"{path}: is not the one that {self / MANIFEST} names; put it back, or run `cerebellum run` again "
                    "in this folder"
                )
        if named_settings(self.settings()) != manifest.settings:
            raise BadInput(
                f"{self / SETTINGS}: says something else than {self / MANIFEST}; put it back, or run `cerebellum run` "
                "again in this folder"
            )
        return manifest

    def settings(self) -> Settings:
        """What was asked; BadInput where this is no run folder."""
        if not (self / SETTINGS).exists():
            raise BadInput(f"{self.path}: not a run folder (no {SETTINGS}); start with `cerebellum run`")
        return self._read(SETTINGS, Settings, "start again with `cerebellum run` in another folder")

    def source(self) -> SourceFile:
        """What the source is."""
        return self._read(SOURCE, SourceFile, "start again with `cerebellum run` in another folder")

    def groups(self) -> Groups:
        """The groups that the plan names."""
        return self._read(GROUPS, Groups, "run `cerebellum measure` again")

    def measurements(self) -> Measurements:
        """What every group did against a limit."""
        return self._read(MEASUREMENTS, Measurements, "run `cerebellum measure` again")

    def curves(self) -> Curves:
        """What every part did at every type, for a budget."""
        return self._read(CURVES, Curves, "run `cerebellum measure --budget` again in this folder")

    def plan(self) -> AnyPlan:
        """What to ship, of either goal; BadInput where a size has the plan of another one."""
        found: AnyPlan = self._read(PLAN, AnyPlan, "run `cerebellum plan` again")  # type: ignore[arg-type]
        if self.label is not None and found.file_label != self.label:
            raise BadInput(
                f"{self / PLAN}: is the plan of {found.file_label!r} and not of {self.label!r}; "
                "run `cerebellum plan` again"
            )
        return found

    def verified(self) -> Verified:
        """What was proved of the finished file."""
        return self._read(VERIFY, Verified, "run `cerebellum verify` again")

    def manifest(self) -> Manifest:
        """What made what."""
        return self._read(MANIFEST, Manifest, "run `cerebellum verify` again")

    def bench(self) -> BenchResults | None:
        """What the question benchmarks said, or None where none were asked."""
        if not (self / BENCH).exists():
            return None
        return self._read(BENCH, BenchResults, "run `cerebellum bench` again")

    def published(self) -> Published:
        """What was said of the model for its card; nothing where nobody said anything."""
        if not (self / PUBLISHED).exists():
            return Published()
        return self._read(PUBLISHED, Published, "run `cerebellum card` again with --base-model")

    def publish(self, said: Published) -> None:
        """Keeps what is said of the model, over what was said before."""
        before = self.published()
        if said.over(before) != before:
            self.write(PUBLISHED, said.over(before))

    def write(self, name: str, artifact: Artifact) -> None:
        """Writes an artifact whole or not at all."""
        path = self / name
        if path.parent != self.path:
            make_folder(path.parent)
        write_artifact(path, artifact)

    def _read(self, name: str, wanted: type[A], remedy: str) -> A:
        return read_artifact(self / name, wanted, remedy)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process, and makes it where it is missing.

        What a killed process left unfinished is removed, for under the lock nobody else can be at work on it.
        A block that leaves nothing in a folder that it made leaves no folder either.
        """
        made = not self.path.exists()
        lock = FileLock(self / _LOCK, timeout=0)
        try:
            files.DISK.make_folder(self.path)
            lock.acquire()
        except Timeout as error:
            raise BadInput(f"{self.path}: another Cerebellum is at work in it; wait, or use -o") from error
        except OSError as error:
            raise BadInput(
                f"{self.path}: cannot be written ({error.strerror}); choose another folder with -o"
            ) from error
        try:
            further = (self.path / FURTHER_SIZES).glob("*/")
            remove_partials([self.path, *(self / name for name in _FOLDERS), *further])
            yield
        finally:
            lock.release()
            if made:
                self._leave_nothing()

    def _leave_nothing(self) -> None:
        """Removes the lock, and the folder if nothing else is in it; it may be gone already."""
        with suppress(OSError):
            if [path.name for path in self.path.iterdir()] in ([_LOCK], []):
                if (self / _LOCK).exists():
                    files.DISK.unlink(self / _LOCK)
                files.DISK.remove_folder(self.path)
