"""A real llama-server for slow tests: the one that LLAMA_SERVER names, or built from the pinned package's source."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx2 as httpx
import pytest

PACKAGE = "llama-cpp-python"
_BUILD = (
    *(
        "-DCMAKE_BUILD_TYPE=Release",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",
    ),  # C has the kernels that matter
    *("-DBUILD_SHARED_LIBS=OFF", "-DGGML_OPENMP=OFF", "-DLLAMA_BUILD_SERVER=ON"),
    *("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF"),
)
_TYPES_IN_LOG = re.compile(r"llama_model_loader: - type +(\w+): +(\d+) tensors")
_WARNED = re.compile(r"^[\d.]+ [WE] .*$", re.MULTILINE)
_SLOWEST_START = 120.0  # seconds


def find_or_build(kept: Path) -> Path:
    """Returns a llama-server; one that is built is ``kept`` in a folder. Skips where neither works."""
    given = os.environ.get("LLAMA_SERVER")
    if given:
        assert Path(given).is_file(), f"LLAMA_SERVER={given}: there is no such file"
        return Path(given)
    made = kept / f"llama-server-{version(PACKAGE)}"
    if not made.exists():
        _build(kept, made)
    return made


def _build(kept: Path, made: Path) -> None:
    for tool in ("cmake", "cc"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} to build llama-server with; set LLAMA_SERVER")
    source = _source(kept)
    build = kept / "build"
    _run(["cmake", "-S", str(source), "-B", str(build), *_BUILD])
    _run(["cmake", "--build", str(build), "--target", "llama-server", "-j", str(min(4, os.cpu_count() or 1))])
    shutil.copy(build / "bin" / "llama-server", f"{made}.new")
    os.replace(f"{made}.new", made)
    shutil.rmtree(build)


def _source(kept: Path) -> Path:
    """Returns llama.cpp as the pinned package has it; skips where there is no network."""
    wanted = f"{PACKAGE}=={version(PACKAGE)}"
    pip = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "-d", str(kept)]
    done = subprocess.run([*pip, wanted], capture_output=True, text=True, timeout=600)
    archive = next(kept.glob("llama_cpp_python-*.tar.gz"), None)
    if done.returncode or archive is None:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        pytest.skip(f"no source of {wanted} ({reason}); set LLAMA_SERVER")
    with tarfile.open(archive) as packed:
        packed.extractall(kept, filter="data")
    source = kept / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    assert (source / "tools" / "server").is_dir()
    return source


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that is up; ``log`` is all that it said so far."""

    url: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def complete(self, prompt: str, n_tokens: int) -> tuple[str, list[int]]:
        """Returns the likeliest continuation as text and as tokens."""
        asked = {"prompt": prompt, "n_predict": n_tokens, "temperature": 0, "return_tokens": True}
        answer = httpx.post(f"{self.url}/completion", json=asked, timeout=120)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return found["content"], found["tokens"]

    def types(self) -> Counter[str]:
        """Returns how many tensors of each type it has found, as its log tells, by the names of GGUF."""
        return Counter({kind.upper(): int(count) for kind, count in _TYPES_IN_LOG.findall(self.log)})

    def complaints(self) -> list[str]:
        """Returns what it has warned of, but that it has no API key."""
        return [line for line in _WARNED.findall(self.log) if "no API key" not in line]


@contextmanager
def serving(binary: Path, model: Path, folder: Path) -> Iterator[Server]:
    """Starts a server of a model and waits until it is healthy; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"{model.stem}.server.log"
    place = ["--host", "127.0.0.1", "--port", str(port)]
    small = ["-c", "256", "-t", "1", "-np", "1", "-ngl", "0", "-lv", "4"]
    with log.open("wb") as said:
        process = subprocess.Popen([binary, "-m", model, *place, *small], stdout=said, stderr=said)
    server = Server(url=f"http://127.0.0.1:{port}", log_file=log)
    try:
        _wait_for(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    latest = time.monotonic() + _SLOWEST_START
    while time.monotonic() < latest:
        assert process.poll() is None, server.log[-2000:]
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"not healthy after {_SLOWEST_START} s: {server.log[-2000:]}")
