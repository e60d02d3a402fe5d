"""The run folder: every artifact's name, its reader, and the lock that keeps two runs apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from cerebellum.bench.artifacts import BenchResults
from cerebellum.codec import Artifact, read_artifact, write_artifact
from cerebellum.errors import BadInput
from cerebellum.files import remove_partials
from cerebellum.groups import Groups, SourceFile
from cerebellum.manifest import Manifest
from cerebellum.measure.artifacts import Curves, Measurements
from cerebellum.plan.artifacts import AnyPlan
from cerebellum.settings import Settings
from cerebellum.verify import Verified

A = TypeVar("A")

SETTINGS = "settings.json"
SOURCE = "source.json"
GROUPS = "groups.json"
MEASUREMENTS = "measurements.json"
CURVES = "curves.json"
PLAN = "plan.json"
VERIFY = "verify.json"
BENCH = "bench.json"
MANIFEST = "manifest.json"
LEDGER = "ledger.sqlite"
CARD = "README.md"
REPORT = "report.html"

EVIDENCE = (SOURCE, GROUPS, MEASUREMENTS, CURVES, PLAN, VERIFY)
"""What the manifest names by its hash, where it is there."""

_LOCK = ".lock"
_FOLDERS = ("shards", "predictions", "charts", "bench")


@dataclass(frozen=True)
class RunFolder:
    """A folder of artifacts; each is written by one stage and read, checked field by field, by later ones."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def settings(self) -> Settings:
        """What was asked; BadInput where this is no run folder."""
        if not (self / SETTINGS).exists():
            raise BadInput(f"{self.path}: not a run folder (no {SETTINGS}); start with `cerebellum run`")
        return self._read(SETTINGS, Settings, "start again with `cerebellum run` in another folder")

    def source(self) -> SourceFile:
        """What the source is."""
        return self._read(SOURCE, SourceFile, "run `cerebellum measure` again")

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
        """What to ship, of either goal."""
        return self._read(PLAN, AnyPlan, "run `cerebellum plan` again")  # type: ignore[arg-type]

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

    def write(self, name: str, artifact: Artifact) -> None:
        """Writes an artifact whole or not at all."""
        write_artifact(self / name, artifact)

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
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise BadInput(f"{self.path}: another Cerebellum is at work in it; wait, or use -o") from error
        except OSError as error:
            raise BadInput(
                f"{self.path}: cannot be written ({error.strerror}); choose another folder with -o"
            ) from error
        try:
            remove_partials([self.path, *(self / name for name in _FOLDERS)])
            yield
        finally:
            lock.release()
            if made:
                self._leave_nothing()

    def _leave_nothing(self) -> None:
        """Removes the lock, and the folder if nothing else is in it; it may be gone already."""
        with suppress(OSError):
            if [path.name for path in self.path.iterdir()] in ([_LOCK], []):
                (self / _LOCK).unlink(missing_ok=True)
                self.path.rmdir()
