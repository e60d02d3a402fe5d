"""What was asked for becomes a GGUF on this disk: a path as it is, a checkpoint converted once and then kept.

Of the Hub or of this disk, a checkpoint is known by the content of its files; the converted GGUF is kept in the
cache under the hash of all that made it, with its origin beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from cerebellum import files, hub
from cerebellum.codec import write_artifact
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.files import atomic_write_text, make_folder, sha256_file
from cerebellum.folder import SETTINGS, RunFolder
from cerebellum.gguf import read_gguf
from cerebellum.progress import Reporter
from cerebellum.source import open_source
from cerebellum.source.checkpoint import Checkpoint, open_checkpoint
from cerebellum.source.converter import Chosen, Converter, find_converter, run_converter
from cerebellum.source.origin import Converted, FileNamed, Origin, origin_of, record_path

_HUB = "https://huggingface.co"
_UNFIT = re.compile(r"[^\w.-]+", re.ASCII)


def model_file(asked: str, chosen: Chosen, run_folder: Path, reporter: Reporter) -> Path:
    """Returns the GGUF that ``asked`` stands for: a path, a folder of safetensors, or something on the Hub.

    A run that goes on keeps the file it began with, even if the repository has moved on since.

    Raises:
        BadInput: there is no such thing, it cannot be fetched, or it cannot be converted.
    """
    path = Path(asked)
    if path.is_dir():
        return _converted(open_checkpoint(path), None, chosen, reporter)
    if path.exists() or not hub.is_address(asked):
        return path
    repository = hub.repository_of(asked)
    if repository is None:
        return hub.download(asked, reporter.note)
    if not asked.startswith(hub.SCHEME):
        reporter.note(f"{asked}: there is no such file or folder here; asking the Hub for it")
    before = _begun_with(run_folder, repository)
    if before is not None:
        reporter.note(f"going on with {before.name}, made of {repository.id} before")
        return before
    fetched = hub.fetch_checkpoint(repository, reporter.note)
    name = fetched.id.partition("/")[2]
    return _converted(open_checkpoint(fetched.folder, name), fetched, chosen, reporter)


def _begun_with(run_folder: Path, repository: hub.Repository) -> Path | None:
    """Returns the source of the run in a folder, where it was made of this repository and is still there."""
    if not (run_folder / SETTINGS).exists():
        return None
    with suppress(CerebellumError):
        source = RunFolder(run_folder).settings().source
        origin = origin_of(source, read_gguf(source).header_sha256)
        if origin is not None and origin.repository == repository.id:
            wanted = repository.revision
            if wanted is None or (origin.commit or "").startswith(wanted):
                return source
    return None


def _converted(
    checkpoint: Checkpoint, fetched: hub.Fetched | None, chosen: Chosen, reporter: Reporter
) -> Path:
    """Returns the GGUF of a checkpoint out of the cache, where it is made if it is not there."""
    cache = hub.cache_folder()
    converter = find_converter(chosen, cache, reporter)
    origin = _origin(checkpoint, fetched, converter, reporter)
    folder = cache / "converted" / origin.key[:32]
    stem = _UNFIT.sub("-", checkpoint.name).strip(".-") or "model"
    target = folder / f"{stem}.{checkpoint.precision.upper()}.gguf"
    make_folder(folder.parent)
    with FileLock(f"{folder}.lock"):
        if not (target.exists() and record_path(target).exists()):
            _convert(checkpoint, origin, converter, target, reporter)
        elif _home(folder).exists():  # it could not be removed when the conversion was done
            files.DISK.remove_tree(_home(folder))
    return target


def _home(folder: Path) -> Path:
    """Returns where a converter finds its model and writes what is not the result."""
    return folder / "home"


def _origin(
    checkpoint: Checkpoint, fetched: hub.Fetched | None, converter: Converter, reporter: Reporter
) -> Origin:
    """Returns what the converted file will be made of; every file of the checkpoint is read for its hash."""
    named = []
    with reporter.task(f"hashing {checkpoint.name}", len(checkpoint.files)) as tick:
        for path in checkpoint.files:
            named.append(FileNamed(file=path.name, sha256=sha256_file(path)))
            tick()
    return Origin(
        repository=fetched.id if fetched else None,
        commit=fetched.commit if fetched else None,
        name=checkpoint.name,
        converter=converter.name,
        converter_version=converter.version,
        packages=converter.packages,
        precision=checkpoint.precision,
        quantization=checkpoint.quantization,
        files=tuple(named),
    )


def _convert(
    checkpoint: Checkpoint, origin: Origin, converter: Converter, target: Path, reporter: Reporter
) -> None:
    """Converts beside the target's folder, which appears when all that belongs in it is there."""
    folder = target.parent
    work = folder.with_name(f"{folder.name}.partial")
    files.DISK.remove_tree(work)
    files.DISK.remove_tree(folder)
    make_folder(work)
    try:
        files.check_free_space(work / target.name, checkpoint.n_bytes)
        reporter.note(
            f"converting {checkpoint.name} to {checkpoint.precision.upper()} with {converter.name} "
            f"({converter.version}), run by {converter.command[0]}"
        )
        _make(checkpoint, origin, converter, work / target.name, reporter)
        files.DISK.replace(work, folder)
        files.DISK.sync_folder(folder.parent)
    except OSError as error:
        raise files.write_refusal(target, error, checkpoint.n_bytes) from error
    finally:
        files.DISK.remove_tree(work)


def _make(
    checkpoint: Checkpoint, origin: Origin, converter: Converter, out: Path, reporter: Reporter
) -> None:
    home = _home(out.parent)
    seen = home / checkpoint.name
    make_folder(seen)
    for path in checkpoint.files:  # links, so that nothing is seen of what else lies beside them
        files.DISK.link(seen / path.name, path.resolve())
    arguments = [str(seen), "--outfile", str(out), "--outtype", checkpoint.precision]
    run_converter(converter, [*arguments, *_told(origin, home)], out, checkpoint.n_bytes, home, reporter)
    if not out.is_file():
        raise BadInput(f"{converter.name} ({converter.version}) left no {out.name}; please report this")
    opened = open_source(out, allow_requantize=True)
    with out.open("rb+") as stream:
        files.DISK.sync(stream)
    write_artifact(record_path(out), Converted(header_sha256=opened.header_sha256, origin=origin))
    files.DISK.remove_tree(home)


def _told(origin: Origin, home: Path) -> Sequence[str]:
    """Returns what a converter is told of a repository: the model's name, and where it comes from."""
    if origin.repository is None:
        return ()
    metadata = home / "metadata.json"
    told = {"general.source.repo_url": f"{_HUB}/{origin.repository}"}
    atomic_write_text(metadata, json.dumps(told))
    return ("--model-name", origin.name, "--metadata", str(metadata))
