"""Goes to and from the Hugging Face Hub: a source by its address, a finished run as a repository.

Everything is huggingface_hub's own: its requests and retries, its upload protocol, its settings
(`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`). Here is only what goes where.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlparse

import httpx2
import msgspec
from filelock import FileLock
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from cerebellum import files
from cerebellum.codec import Record, read_json
from cerebellum.errors import AnswerIsNo, BadInput
from cerebellum.files import is_own_file, is_plain_name, sha256_file
from cerebellum.folder import (
    BENCH,
    CARD,
    EVIDENCE,
    FURTHER_SIZES,
    LEDGER,
    MANIFEST,
    OF_ONE_SIZE,
    PUBLISHED,
    REPORT,
    VERIFY,
    RunFolder,
)
from cerebellum.ledger import Ledger
from cerebellum.settings import DATA
from cerebellum.source import SPLIT_NAME
from cerebellum.source.checkpoint import INDEX, beside, weight_files
from cerebellum.texts import read_text

SCHEME = "hf:"
_REPOSITORY = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?$", re.ASCII)
_ADDRESS = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?/(?P<file>.+\.gguf)$", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_PART_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_REPO = re.compile(r"^[\w.-]+/[\w.-]+$", re.ASCII)

UPLOADED = (CARD, REPORT, MANIFEST, *EVIDENCE, BENCH, LEDGER, PUBLISHED)
"""The artifacts that go up beside the model and its importance matrix, where they exist. Shards stay here,
and so do the settings, because they know where things lie on this disk."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Is one file of the repository: its name there, where it lies here, and its size in bytes."""

    name: str
    path: Path
    n_bytes: int


class PushedFile(Record, frozen=True, kw_only=True):
    """Names a file that was uploaded, or would be, by its path in the repository."""

    name: str
    bytes: int


class Pushed(Record, frozen=True, kw_only=True):
    """Holds the answer of `push --json`; ``url`` is the commit's page, or None after a dry run."""

    repo: str
    dry_run: bool
    files: tuple[PushedFile, ...]
    bytes: int
    url: str | None


@dataclass(frozen=True, kw_only=True)
class Repository:
    """Names a repository of the Hub, and the revision that was asked for, or None for the newest."""

    id: str
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Says where the files of a repository lie, as they were at one commit."""

    id: str
    commit: str
    folder: Path


def is_address(text: str) -> bool:
    """Says whether a source is on the Hub: `hf:owner/repo/file.gguf`, `hf:owner/repo` or `owner/repo`.

    The last may be a path as well; whoever asks looks for a file of that name first.
    """
    return text.startswith(SCHEME) or repository_of(text) is not None


def repository_of(text: str) -> Repository | None:
    """Returns the repository that an address stands for, or None where it names a file in one."""
    match = None if text.endswith(".gguf") else _REPOSITORY.match(text.removeprefix(SCHEME))
    if match is None or not all(map(is_plain_name, match["id"].split("/"))):
        return None
    return Repository(id=match["id"], revision=match["revision"])


def cache_folder() -> Path:
    """Returns the folder under `HF_HOME` that holds what is fetched and made here, and nothing else."""
    return Path(constants.HF_HOME) / "cerebellum"


def fetch_checkpoint(repository: Repository, tell: Callable[[str], None] = lambda _: None) -> Fetched:
    """Fetches the safetensors of a repository, and the small files that a converter reads.

    Program code and pickles are left where they are. What is here already is not fetched again, and a broken
    download goes on. Raises BadInput for what the Hub refuses, and where there are no safetensors.
    """
    with _told(repository.id):
        info = HfApi().model_info(repository.id, revision=repository.revision)
        commit = _checked_commit(repository, info.sha)
        names = [one.rfilename for one in info.siblings or [] if is_plain_name(one.rfilename)]
        _refuse_without_weights(repository, names)
        paths = [_fetch(repository.id, name, commit, tell) for name in beside(names)]
        index = next((path.read_bytes() for path in paths if path.name == INDEX), None)
        weights = weight_files(names, index, repository.id)
        paths += [_fetch(repository.id, name, commit, tell) for name in weights]
    folder = cache_folder() / repository.id.replace("/", "--") / commit
    astray = next((path for path in paths if path.parent != folder), None)
    if astray is not None:
        raise BadInput(
            f"{repository.id}: {astray.name} is too large for plain HTTP, or of another commit than {commit}; "
            "download the repository by hand and give its folder"
        )
    return Fetched(id=repository.id, commit=commit, folder=folder)


def _checked_commit(repository: Repository, commit: str | None) -> str:
    if commit is None or not _COMMIT.fullmatch(commit):
        raise BadInput(f"{repository.id}: names a commit that is none ({commit!a}); check HF_ENDPOINT")
    return commit


def _refuse_without_weights(repository: Repository, names: Sequence[str]) -> None:
    """Raises BadInput that says what a repository holds, where it holds no safetensors of its own."""
    if any(name.endswith(".safetensors") for name in names):
        return
    models = [name for name in names if name.endswith(".gguf")]
    if models:
        raise BadInput(
            f"{repository.id}: has GGUF files and no safetensors; name one: {SCHEME}{repository.id}/{models[0]}"
        )
    raise BadInput(f"{repository.id}: has no safetensors; see its page for another repository that has")


def download(address: str, tell: Callable[[str], None] = lambda _: None) -> Path:
    """Returns the path of an address's file, kept under `HF_HOME`; what is there already is not fetched
    again.

    ``tell`` hears what is fetched; on a terminal huggingface_hub draws its own bar too. Of a split model all
    parts are fetched and the first is returned. Raises BadInput for what is no address or what the Hub
    refuses.
    """
    match = _ADDRESS.match(address.removeprefix(SCHEME))
    if match is None or not all(map(is_plain_name, (*match["repo"].split("/"), *match["file"].split("/")))):
        raise BadInput(
            f"{address}: not an address on the Hub; wanted hf:owner/repo/file.gguf, or hf:owner/repo for safetensors"
        )
    with _told(address):
        paths = [_fetch(match["repo"], name, match["revision"], tell) for name in _parts(match["file"])]
    return paths[0]


def _parts(file: str) -> list[str]:
    """Returns the names of all splits that a file's name stands for, or the one name."""
    split = SPLIT_NAME.match(file)
    if split is None:
        return [file]
    n_files = int(split["count"])
    return [f"{split['stem']}-{number:05d}-of-{n_files:05d}.gguf" for number in range(1, n_files + 1)]


def _fetch(repo: str, name: str, revision: str | None, tell: Callable[[str], None]) -> Path:
    """Returns the path of one file, fetched from where an earlier try left off.

    huggingface_hub 2 starts a file anew after its process ended, so the part that is there is kept here and
    handed to its own downloader. Files beyond what the Hub gives over plain HTTP go through its usual way.
    """
    url = hf_hub_url(repo, name, revision=revision)
    seen = get_hf_file_metadata(url)
    if seen.size is None or seen.commit_hash is None or seen.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return Path(hf_hub_download(repo, name, revision=revision))
    if not _COMMIT.fullmatch(seen.commit_hash):
        raise BadInput(f"{url}: names a commit that is none ({seen.commit_hash!a}); check HF_ENDPOINT")
    folder = cache_folder() / repo.replace("/", "--") / seen.commit_hash
    target = folder / name
    if not target.exists():
        files.DISK.make_folder(target.parent)
        with FileLock(f"{target}.lock"):
            _resume(seen, url, target, tell)
    return target


def _resume(seen: HfFileMetadata, url: str, target: Path, tell: Callable[[str], None]) -> None:
    """Adds what is missing to the part that is there, and keeps it only if it is what the Hub named.

    Raises BadInput, and removes the part, where its SHA-256 is another one.
    """
    version = hashlib.sha256((seen.etag or "part").encode()).hexdigest()[:16]
    part = target.with_name(f"{target.name}.{version}.partial")
    have = _size_of_part(part, seen.size or 0, tell)
    tell(f"downloading {target.name}: {have:,} of {seen.size:,} bytes are here")
    with os.fdopen(os.open(part, _PART_FLAGS, 0o666), "r+b") as stream:
        stream.truncate(have)
        stream.seek(have)
        http_get(
            seen.location,
            stream,
            resume_size=have,
            headers=_headers(url, seen.location),
            expected_size=seen.size,
            displayed_filename=target.name,
        )
    if part.stat().st_size != seen.size:
        raise BadInput(f"{target.name}: {part.stat().st_size:,} of {seen.size:,} bytes came; try again")
    if seen.etag and _SHA256.fullmatch(seen.etag) and sha256_file(part) != seen.etag:
        files.DISK.unlink(part)
        raise BadInput(f"{target.name}: what was downloaded is damaged and was removed; try again")
    files.DISK.replace(part, target)


def _size_of_part(part: Path, wanted: int, tell: Callable[[str], None]) -> int:
    """Returns how many bytes of a file are here; a part that cannot be one of it is removed, and that is told."""
    if not os.path.lexists(part):
        return 0
    found = part.lstat()
    if stat.S_ISREG(found.st_mode) and found.st_size <= wanted:
        return found.st_size
    files.DISK.unlink(part)
    tell(f"{part}: was no part of a file of {wanted:,} bytes and was removed")
    return 0


def _headers(url: str, location: str) -> dict[str, str]:
    """Returns the request's headers; the token is for the Hub, never for the store that it sends us on to."""
    headers = build_hf_headers()
    if urlparse(url).netloc != urlparse(location).netloc:
        headers.pop("authorization", None)
    return headers


class _Named(msgspec.Struct, frozen=True):
    """Holds what the manifest says of one file: its name and its content's SHA-256."""

    file: str
    sha256: str


class _Result(_Named, frozen=True):
    """Holds a finished file; of one that is split ``parts`` has every split, and the hash is over all of them."""

    parts: tuple[_Named, ...] = ()

    def files(self) -> tuple[_Named, ...]:
        """Every file that belongs to it."""
        return self.parts or (self,)


class _Further(msgspec.Struct, frozen=True):
    """Holds a size of the run beyond the first."""

    label: str
    result: _Result


class _Encoder(msgspec.Struct, frozen=True):
    """Holds the second moments that an encoder fed errors back by, where it did."""

    moments: _Named | None = None


class _Manifest(msgspec.Struct, frozen=True):
    """Holds what of manifest.json an upload depends on; its other keys are of no concern here."""

    result: _Result
    imatrix: _Named
    encoder: _Encoder = _Encoder()
    further: tuple[_Further, ...] = ()
    projectors: tuple[_Named, ...] = ()
    texts: dict[str, str] = {}
    text_files: dict[str, str] = {}

    def models(self) -> tuple[_Named, ...]:
        """The finished files of all sizes with their splits, and the projectors that go with them."""
        results = (self.result, *(size.result for size in self.further))
        return (*(named for result in results for named in result.files()), *self.projectors)

    def inputs(self) -> tuple[_Named, ...]:
        """Files of the folder that the model is made from, beside the source."""
        return (self.imatrix, self.encoder.moments) if self.encoder.moments else (self.imatrix,)


class _Verified(msgspec.Struct, frozen=True):
    """Holds what of verify.json an upload depends on: whether the file passed."""

    ok: bool


_Json = TypeVar("_Json", _Manifest, _Verified)


def _read(path: Path, wanted: type[_Json]) -> _Json:
    """Returns what is wanted of an artifact; BadInput names the file where it is not there."""
    try:
        return msgspec.convert(read_json(path), wanted)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise BadInput(f"{path}: not as Cerebellum writes it ({error}); run its stage again") from error


def uploads(folder: Path, with_texts: bool = False) -> list[Upload]:
    """Returns what `push` uploads from a run folder: the models first, the charts, the answers and the evidence
    of further sizes, and last the texts: those that come with Cerebellum, and with ``with_texts`` the run's own.

    Raises AnswerIsNo where the file failed verification or is not the one that the evidence is about, and
    BadInput where an artifact is missing or damaged.
    """
    manifest = _read(folder / "manifest.json", _Manifest)
    _check(folder, manifest)
    more = [*(folder / "charts").glob("*.png"), *(folder / "bench").glob("*.jsonl")]
    deeper = sorted(path.relative_to(folder).as_posix() for path in more)
    deeper += [f"{FURTHER_SIZES}/{size.label}/{name}" for size in manifest.further for name in OF_ONE_SIZE]
    named = [named.file for named in (*manifest.models(), *manifest.inputs())]
    names = [*named, *UPLOADED, *deeper]
    found = [(name, folder / name) for name in names if os.path.lexists(folder / name)]
    for _, path in found:
        if not is_own_file(path, folder):
            raise BadInput(
                f"{path}: is a link or no file; only the folder's own files are uploaded, so copy it there"
            )
    taken = {name for name, _ in found}
    found += [text for text in _texts(folder, manifest, with_texts) if text[0] not in taken]
    return [Upload(name=name, path=path, n_bytes=path.stat().st_size) for name, path in found]


def _texts(folder: Path, manifest: _Manifest, with_texts: bool) -> list[tuple[str, Path]]:
    """Returns the texts behind the numbers that may go out, by the names under which `reproduce` looks for them.

    A text of the user's own may be nobody's business, so that it goes only where that was asked for, and only
    if it is still the one that was used.
    """
    own = []
    if with_texts:
        settings = RunFolder(folder).settings()
        texts = (*settings.select_texts, *settings.report_texts, *settings.imatrix_texts)
        own = [text.path for text in texts]
    found: dict[str, Path] = {}
    for part, name in manifest.text_files.items():
        ours = [DATA / name, DATA / "domains" / name] if is_plain_name(name) else []
        for path in (*ours, *(path for path in own if path.name == name)):
            if path.exists() and hashlib.sha256(read_text(path)).hexdigest() == manifest.texts.get(part):
                found.setdefault(name, path)
    return list(found.items())


def _check(folder: Path, manifest: _Manifest) -> None:
    """Makes sure that the card is about the files that go with it, and that every model passed."""
    named_files = (*manifest.models(), *manifest.inputs())
    for name in (*(named.file for named in named_files), *(size.label for size in manifest.further)):
        if not is_plain_name(name):
            raise BadInput(f"{folder}: its manifest names {name!a}, which is no file of it; do not trust it")
    places = [folder / VERIFY, *(folder / FURTHER_SIZES / size.label / VERIFY for size in manifest.further)]
    for place in places:
        if not _read(place, _Verified).ok:
            raise AnswerIsNo(f"{place}: says that its file failed verification; nothing was uploaded")
    run = RunFolder(folder)
    labels = [str(view.label) for view in run.results()[1:]]
    if labels != [size.label for size in manifest.further]:
        raise run.other_sizes(labels, [size.label for size in manifest.further])
    for named in named_files:
        path = folder / named.file
        if sha256_file(path) != named.sha256:
            raise AnswerIsNo(f"{path}: is not the file its manifest names; run the stages again")


def push(
    folder: Path,
    repo: str,
    render: Callable[[], object],
    dry_run: bool,
    private: bool,
    with_texts: bool = False,
) -> Pushed:
    """Makes the repository if there is none and uploads everything as one commit.

    ``render`` writes the card again, for this repository, before anything is read. With ``dry_run`` nothing
    is sent. Raises as ``uploads`` does, and BadInput for what the Hub refuses.
    """
    if not _REPO.match(repo):
        raise BadInput(f"{repo}: not a repository's name; wanted owner/name")
    render()
    if (folder / "ledger.sqlite").exists():
        with Ledger(folder / "ledger.sqlite") as ledger:
            ledger.settle()
    found = uploads(folder, with_texts)
    return Pushed(
        repo=repo,
        dry_run=dry_run,
        files=tuple(PushedFile(name=f.name, bytes=f.n_bytes) for f in found),
        bytes=sum(f.n_bytes for f in found),
        url=None if dry_run else _commit(repo, found, private),
    )


def _commit(repo: str, files: list[Upload], private: bool) -> str:
    api = HfApi()
    operations = [CommitOperationAdd(path_in_repo=f.name, path_or_fileobj=str(f.path)) for f in files]
    with _told(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        models = sum(f.name.endswith(".gguf") and "-Cerebellum-" in f.name for f in files)
        more = f" and {models - 1} more files" if models > 1 else ""
        message = f"{files[0].name}{more} with its evidence"
        done = api.create_commit(repo, operations, commit_message=message)
    return str(done.commit_url)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns the Hub's refusals into one line that says what to do."""
    try:
        yield
    except GatedRepoError as error:
        raise BadInput(f"{what}: access is asked for on its page; accept, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise BadInput(f"{what}: no such repository, or a private one; check it, or set HF_TOKEN") from error
    except (EntryNotFoundError, RevisionNotFoundError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise BadInput(f"{what}: the Hub cannot be reached and the file is not in its cache") from error
        raise BadInput(f"{what}: the repository has no such file or revision; see its page") from error
    except HFValidationError as error:
        raise BadInput(f"{what}: not a name the Hub takes ({error})") from error
    except HfHubHTTPError as error:
        raise BadInput(f"{what}: {_reason(error)}") from error
    except OfflineModeIsEnabled as error:
        raise BadInput(f"{what}: HF_HUB_OFFLINE is set; unset it, or give a file on this disk") from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise BadInput(f"{what}: the Hub cannot be reached ({type(error).__name__}); try again") from error
    except OSError as error:
        raise _no_file(what, error) from error


def _no_file(what: str, error: OSError) -> BadInput:
    """Tells a disk that takes no more from an answer of the Hub that is not the file it announced."""
    if error.errno is None:
        return BadInput(f"{what}: what came is not what the Hub announced ({error}); try again")
    where = error.filename or constants.HF_HOME
    return BadInput(
        f"{what}: {where} cannot be written ({error.strerror}); set HF_HOME to a folder with room"
    )


def _reason(error: HfHubHTTPError) -> str:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return f"the Hub refuses ({status}); set HF_TOKEN to a token that may do this"
    return f"the Hub answered {status or 'with an error'}; try again"
