"""Writes files that are whole or not there: write beside, fsync, rename, fsync the folder.

A reader never sees half a file, whenever the writer was stopped. A disk that is full or a folder that cannot
be written gives one line that names the place and, where it helps, the bytes needed. Whatever changes a disk
goes through ``DISK``, so that a test can let any one of these steps fail and see what is left.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from cerebellum.engine.timings import timed
from cerebellum.errors import BadInput

Done = TypeVar("Done")
Started = TypeVar("Started")

PARTIAL_SUFFIX = ".partial"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as a long read goes on."""

_HASH_BLOCK_BYTES = 4 << 20
_PIECE_BYTES = 64 << 20
_MOST_HASHING = 16  # threads; more wait for the memory
_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

# Only these can be the fault of the file being written while a caller fills it; any other OSError
# in there comes from elsewhere (a source that cannot be read, say) and keeps its own words.
_WRITE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


class Disk:
    """Takes every step that changes something outside this process, one method a step.

    Tests put another one in its place that fails at the n-th step, or stops there as a crash would, because
    that is the only way to know what each of these moments leaves behind. A step that a signal interrupts is
    taken again: Python sees to that itself for opening, writing and syncing (PEP 475), and not for renaming,
    removing and making folders, which network file systems interrupt.
    """

    def before(self, step: str) -> None:
        """Hears of every step just before it is taken, and each time that it is taken again."""

    def create(self, path: Path) -> BinaryIO:
        """Opens a new file for writing; a file or a link that is there already is never written through."""
        return self._take("create", lambda: os.fdopen(os.open(path, _NEW_FILE, 0o666), "wb"))

    def sync(self, stream: BinaryIO) -> None:
        """Waits until all that was written to a file is on the disk."""
        stream.flush()
        self._take("sync", lambda: os.fsync(stream.fileno()))

    def replace(self, source: Path, target: Path) -> None:
        """Gives a file another name, in place of whatever had it before."""
        self._take("replace", partial(os.replace, source, target), partial(_must_exist, target))

    def unlink(self, path: Path) -> None:
        """Removes a file, or a link and not what it points at."""
        self._take("unlink", path.unlink, _done)

    def link(self, path: Path, target: Path) -> None:
        """Makes a symbolic link at ``path`` that points at ``target``."""
        self._take("link", lambda: path.symlink_to(target))

    def make_folder(self, path: Path) -> None:
        """Makes a folder with all that it lies in; one that is there already is left as it is."""
        self._take("make_folder", lambda: path.mkdir(parents=True, exist_ok=True))

    def remove_folder(self, path: Path) -> None:
        """Removes a folder that is empty."""
        self._take("remove_folder", path.rmdir, _done)

    def remove_tree(self, path: Path) -> None:
        """Removes a folder of ours with all that is in it, as far as that goes."""
        with suppress(OSError):
            self._take("remove_tree", lambda: _remove_all(path))

    def sync_folder(self, path: Path) -> None:
        """Makes a rename outlive a power cut; a file system that cannot do that is left alone."""
        with suppress(OSError):
            self._take("sync_folder", lambda: _sync_folder(path))

    def commit(self, path: Path) -> None:
        """Hears that a transaction is about to be committed: SQLite does its own writing, and does it well."""
        self.before("commit")

    def spawn(self, start: Callable[[], Started]) -> Started:
        """Starts another program by calling ``start``; what that one writes is its own affair."""
        return self._take("spawn", start)

    def _take(self, step: str, act: Callable[[], Done], instead: Callable[[], Done] | None = None) -> Done:
        """Takes a step, again for as long as a signal interrupts it.

        A network file system may have carried out the call that was interrupted: where the next one finds no file
        to work on, ``instead`` is called, which raises if the first one did not do it either.
        """
        interrupted = False
        while True:
            try:
                self.before(step)
                return act()
            except InterruptedError:
                interrupted = True
            except FileNotFoundError:
                if instead is None or not interrupted:
                    raise
                return instead()


def own_environment(**more: str) -> dict[str, str]:
    """Returns the environment of another Python that is to find the same packages as this one, and ``more``."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)} | more


def _done() -> None:
    """Stands for a removal that was carried out before it was said to be interrupted."""


def _must_exist(path: Path) -> None:
    os.lstat(path)


def _remove_all(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except InterruptedError:
        raise
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


DISK = Disk()
"""The disk that this process writes to."""


@contextmanager
def atomic_writer(path: str | os.PathLike[str], n_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Opens `path`'s partial file for writing and renames it to `path` when the block ends well.

    On any failure, an interrupt included, the partial file is removed and `path` is as it was. Its name cannot
    be guessed, so that nobody can put a link in its place. `n_bytes`, when known, is checked against the free
    space before the first byte is written.

    Raises:
        BadInput: the folder is missing or cannot be written, or the disk is full.
    """
    target = Path(path)
    if os.path.isdir(target):
        raise BadInput(f"{target}: is a folder, not a file; name a file to write")
    check_free_space(target, n_bytes)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    try:
        stream = DISK.create(partial)
    except OSError as error:
        raise write_refusal(target, error, n_bytes) from error
    try:
        with stream:
            yield stream
            _finish(stream, target, n_bytes)
        _rename(partial, target, n_bytes)
    except BaseException as error:
        with suppress(OSError):
            DISK.unlink(partial)
        if isinstance(error, OSError) and error.errno in _WRITE_ERRNOS:
            raise write_refusal(target, error, n_bytes) from error
        raise


def _finish(stream: BinaryIO, target: Path, n_bytes: int | None) -> None:
    try:
        DISK.sync(stream)
    except OSError as error:
        raise write_refusal(target, error, n_bytes) from error


def _rename(partial: Path, target: Path, n_bytes: int | None) -> None:
    """Gives the finished file its name; a folder that was removed meanwhile is one line like any other."""
    try:
        DISK.replace(partial, target)
    except OSError as error:
        raise write_refusal(target, error, n_bytes) from error
    DISK.sync_folder(target.parent)


def is_partial(name: str) -> bool:
    """Says whether a file's name is one that ``atomic_writer`` gives to what is not finished."""
    return _PARTIAL.search(name[-25:]) is not None and name.endswith(PARTIAL_SUFFIX)


def remove_partials(folders: Iterable[Path]) -> None:
    """Removes what killed writers left unfinished in some folders; call it where nobody else writes there."""
    for folder in folders:
        with suppress(OSError):
            for path in folder.iterdir():
                if is_partial(path.name):
                    DISK.unlink(path)


def make_folder(path: Path) -> None:
    """Makes a folder with all that it lies in; BadInput where it cannot be made."""
    try:
        DISK.make_folder(path)
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be made ({error.strerror or error}); choose another place with -o"
        ) from error


def is_plain_name(name: str) -> bool:
    """Says whether a name is that of a file in a folder: no path, and nothing that leads out of the folder."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def is_own_file(path: Path, folder: Path) -> bool:
    """Says whether ``path`` is a regular file inside ``folder``, reached without following any link."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        return path.resolve(strict=True) == folder.resolve(strict=True) / path.relative_to(folder)
    except (OSError, ValueError):
        return False


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to `path`, whole or not at all; see `atomic_writer` for its refusals."""
    with atomic_writer(path, len(content)) as stream:
        stream.write(content)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` as UTF-8 with the line breaks it has, whole or not at all."""
    atomic_write_bytes(path, text.encode("utf-8"))


def is_one_of(path: Path, inputs: Iterable[Path]) -> bool:
    """Says whether ``path`` is one of some files, under whatever name: links and other spellings count too."""
    for other in inputs:
        if path.resolve() == other.resolve():
            return True
        with suppress(OSError):
            if os.path.samefile(path, other):
                return True
    return False


def sha256_file(path: str | os.PathLike[str], progress: Progress | None = None) -> str:
    """Returns the SHA-256 of a file's bytes in hex, as sha256sum prints it.

    ``progress`` hears of the bytes read so far, because a large model takes minutes.

    Raises:
        BadInput: the file cannot be read.
    """
    return sha256_files([path], progress)


def fingerprint_files(paths: Sequence[str | os.PathLike[str]]) -> str:
    """Returns a SHA-256 over the SHA-256s of all pieces of 64 MiB of the files, in hex, read on several threads.

    It names the content as surely as ``sha256_files`` does and takes a fraction of the time, but no other program
    prints it. Raises BadInput where a file cannot be read.
    """
    pieces = []
    path: str | os.PathLike[str] = ""
    try:
        for path in paths:
            n_bytes = os.stat(path).st_size
            pieces += [(path, start) for start in range(0, n_bytes, _PIECE_BYTES)]
            pieces.append((path, n_bytes))  # an empty piece, so that two files are not one
    except OSError as error:
        raise read_refusal(path, error) from error
    with timed("hashing"), ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, _MOST_HASHING)) as pool:
        return hashlib.sha256(b"".join(pool.map(_hash_piece, pieces))).hexdigest()


def _hash_piece(piece: tuple[str | os.PathLike[str], int]) -> bytes:
    path, start = piece
    digest = hashlib.sha256()
    block = bytearray(_HASH_BLOCK_BYTES)
    left = _PIECE_BYTES
    try:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(start)
            while left and (n_read := stream.readinto(memoryview(block)[:left])):
                digest.update(memoryview(block)[:n_read])
                left -= n_read
    except OSError as error:
        raise read_refusal(path, error) from error
    return digest.digest()


def sha256_files(paths: Sequence[str | os.PathLike[str]], progress: Progress | None = None) -> str:
    """Returns the SHA-256 of the files' bytes one after the other, in hex, as if they were one file.

    Raises:
        BadInput: a file cannot be read.
    """
    digest = hashlib.sha256()
    block = bytearray(_HASH_BLOCK_BYTES)
    n_done = 0
    path: str | os.PathLike[str] = ""
    try:
        n_total = 0
        for path in paths:
            n_total += os.stat(path).st_size
        for path in paths:
            with timed("hashing"), open(path, "rb", buffering=0) as stream:
                while n_read := stream.readinto(block):
                    digest.update(memoryview(block)[:n_read])
                    n_done += n_read
                    if progress is not None:
                        progress(n_done, n_total)
    except OSError as error:
        raise read_refusal(path, error) from error
    return digest.hexdigest()


def read_refusal(path: str | os.PathLike[str], error: OSError) -> BadInput:
    """Returns the BadInput that says in one line why `path` cannot be read and what to do."""
    where = os.fspath(path)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return BadInput(f"{where}: no such file; check the path")
    if error.errno in (errno.EACCES, errno.EPERM):
        return BadInput(f"{where}: no permission to read it; change its mode or run as its owner")
    if error.errno == errno.EISDIR:
        return BadInput(f"{where}: is a folder, not a file; name a file in it")
    return BadInput(f"{where}: cannot be read ({error.strerror or error}); check the disk")


def write_refusal(path: str | os.PathLike[str], error: OSError, n_bytes: int | None = None) -> BadInput:
    """Returns the BadInput that says in one line why `path` cannot be written and what to do.

    ``n_bytes`` is named where the disk is full and the size of what was to be written is known.
    """
    where = os.fspath(path)
    folder = os.fspath(Path(path).parent)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        needed = "" if n_bytes is None else f": {n_bytes:,} bytes are needed in {folder}"
        too_big = error.errno == errno.EFBIG
        reason = "a file may not grow that big" if too_big else "the disk is full"
        return BadInput(f"{where}: {reason}{needed}; free space or write elsewhere")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return BadInput(f"{where}: no permission to write in {folder}; choose another folder")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return BadInput(f"{where}: the folder {folder} does not exist; create it first")
    return BadInput(f"{where}: cannot be written ({error.strerror or error}); check the disk")


def check_free_space(target: Path, n_bytes: int | None) -> None:
    """Raises BadInput, before the first byte is written, when the folder's disk has less than `n_bytes` free."""
    if n_bytes is None:
        return
    try:
        n_free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise write_refusal(target, error, n_bytes) from error
    if n_bytes > n_free:
        raise BadInput(
            f"{target}: the disk is full: {n_bytes:,} bytes are needed in {target.parent} and "
            f"{n_free:,} are free; free space or write elsewhere"
        )
