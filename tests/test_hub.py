"""`hf:` sources and `push`, against a server on this machine that speaks the Hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub, fake_hub
from msgspec.structs import replace
from run_folder import manifest, verify, write_run_folder

REPO = "someone/tiny-GGUF"
MODEL = os.urandom(24_000_000)  # huggingface_hub writes a download in pieces of 10 MB
DOWNLOAD = "import sys; from cerebellum.hub import download as d; print(d(sys.argv[1], sys.stderr.write))"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as server:
        server.repos.add(REPO)
        server.files[REPO, "tiny.F16.gguf"] = MODEL
        yield server


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    """huggingface_hub reads its settings when imported, so each test runs it in a process of its own."""
    return os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def python(code: str, *args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, timeout=900
    )


def cerebellum(*args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cerebellum", *args], env=env, capture_output=True, text=True, timeout=900
    )


def test_downloads_once_and_tells(hub: FakeHub, environment: dict[str, str]) -> None:
    address = f"hf:{REPO}/tiny.F16.gguf"
    done = python(DOWNLOAD, address, env=environment)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == MODEL
    assert path.name == "tiny.F16.gguf"
    assert "downloading tiny.F16.gguf: 0 of 24,000,000 bytes are here" in done.stderr
    n_gets = sum(method == "GET" for method, _, _ in hub.requests)
    assert python(DOWNLOAD, address, env=environment).stdout.strip() == str(path)
    assert sum(method == "GET" for method, _, _ in hub.requests) == n_gets


def test_goes_on_where_a_broken_download_stopped(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    """The line goes dead after 15 MB and the process gives up; a new one fetches the rest."""
    hub.cut_after = 15_000_000
    address = f"hf:{REPO}/tiny.F16.gguf"
    broken = python(f"import time; time.sleep = lambda _: None; {DOWNLOAD}", address, env=environment)
    assert broken.returncode != 0
    (part,) = (tmp_path / "hf").rglob("*.partial")
    have = part.stat().st_size
    assert 0 < have <= 15_000_000
    hub.dead = False
    done = python(DOWNLOAD, address, env=environment)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == MODEL
    assert hub.requests[-1][2] == f"bytes={have}-"
    assert not list((tmp_path / "hf").rglob("*.partial"))


def test_what_is_not_what_the_hub_named_is_not_kept(hub: FakeHub, environment: dict[str, str]) -> None:
    hub.wrong_bytes = True
    done = python(DOWNLOAD, f"hf:{REPO}/tiny.F16.gguf", env=environment)
    assert "is damaged and was removed" in done.stderr
    assert not list(Path(environment["HF_HOME"]).rglob("*.gguf"))


def test_all_parts_of_a_split_model(hub: FakeHub, environment: dict[str, str]) -> None:
    for number in (1, 2):
        hub.files[REPO, f"big-0000{number}-of-00002.gguf"] = f"part {number}".encode()
    done = python(DOWNLOAD, f"hf:{REPO}@main/big-00001-of-00002.gguf", env=environment)
    first = Path(done.stdout.strip())
    assert first.name == "big-00001-of-00002.gguf"
    assert first.with_name("big-00002-of-00002.gguf").read_bytes() == b"part 2"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"hf:{REPO}/absent.gguf", "no such file or revision"),
        ("hf:someone/absent/x.gguf", "no such repository"),
        ("hf:someone/x.gguf", "wanted hf:owner/repo/file.gguf"),
        (f"hf:{REPO}/../../x.gguf", "wanted hf:owner/repo/file.gguf"),
        ("hf:../../x.gguf", "wanted hf:owner/repo/file.gguf"),
    ],
)
def test_refusals_are_one_line(environment: dict[str, str], tmp_path: Path, address: str, said: str) -> None:
    done = cerebellum("run", address, "-o", str(tmp_path / "run"), env=environment)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("file", ["/tmp/x.gguf", "a//b/x.gguf", "./x.gguf", "a/../../x.gguf"])
def test_a_file_that_is_no_path_inside_its_repository_is_refused(
    hub: FakeHub, environment: dict[str, str], file: str
) -> None:
    done = python(DOWNLOAD, f"hf:{REPO}/{file}", env=environment)
    assert "wanted hf:owner/repo/file.gguf" in done.stderr and hub.requests == []


def test_no_hub_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    nowhere = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = cerebellum("run", f"hf:{REPO}/tiny.F16.gguf", "-o", str(tmp_path / "run"), env=nowhere)
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def run_folder(folder: Path, **changed: Any) -> Path:
    """A finished run whose manifest names the files that are there, and one that must stay at home."""
    model, matrix = b"GGUF the model", b"GGUF the matrix"
    names = manifest()
    digests = [hashlib.sha256(content).hexdigest() for content in (model, matrix)]
    names = replace(
        names,
        result=replace(names.result, file="m-Cerebellum-Q3_K_M.gguf", sha256=digests[0]),
        imatrix=replace(names.imatrix, sha256=digests[1]),
    )
    write_run_folder(folder, **({"manifest": names} | changed))
    (folder / "m-Cerebellum-Q3_K_M.gguf").write_bytes(model)
    (folder / "imatrix.gguf").write_bytes(matrix)
    (folder / "settings.json").write_text('{"source": "/home/someone/secret/model.gguf"}')
    (folder / "shards").mkdir()
    (folder / "shards" / "00.gguf").write_bytes(b"shard")
    return folder


def test_push_uploads_model_card_and_evidence(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.token = "hf_secret"
    folder = run_folder(tmp_path / "run")
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE t (x)")
    done = cerebellum("push", str(folder), "someone/granite-GGUF", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["url"].endswith(COMMIT)
    there = {name: content for (repo, name), content in hub.files.items() if repo == "someone/granite-GGUF"}
    assert {row["name"] for row in answer["files"]} == set(there)
    assert {"m-Cerebellum-Q3_K_M.gguf", "imatrix.gguf", "README.md", "report.html"} <= set(there)
    assert {"manifest.json", "ledger.sqlite", "bench.json", "charts/sensitivity.png"} <= set(there)
    assert not {"settings.json", "shards/00.gguf"} & set(there)
    assert there["m-Cerebellum-Q3_K_M.gguf"] == b"GGUF the model"
    card = there["README.md"].decode()
    assert "quantized_by: someone" in card
    assert "llama-server -hf someone/granite-GGUF:Q3_K_M" in card
    assert hub.commits[0]["summary"] == "m-Cerebellum-Q3_K_M.gguf with its evidence"


def test_dry_run_asks_the_hub_nothing(hub: FakeHub, environment: dict[str, str], tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    done = cerebellum("push", str(folder), "someone/x", "--dry-run", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["url"] is None
    assert answer["files"][0] == {"name": "m-Cerebellum-Q3_K_M.gguf", "bytes": 14}
    assert hub.requests == []


def test_push_refuses_a_file_its_evidence_is_not_of(environment: dict[str, str], tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "m-Cerebellum-Q3_K_M.gguf").write_bytes(b"GGUF another one")
    done = cerebellum("push", str(folder), "someone/x", "--dry-run", env=environment)
    assert (done.returncode, "is not the file its manifest names" in done.stderr) == (1, True)


def test_push_refuses_what_failed_verification(environment: dict[str, str], tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", verify=verify(ok=False))
    done = cerebellum("push", str(folder), "someone/x", "--dry-run", env=environment)
    assert (done.returncode, "failed verification" in done.stderr) == (1, True)


def test_push_without_a_token_says_so(hub: FakeHub, environment: dict[str, str], tmp_path: Path) -> None:
    hub.token = "another"
    done = cerebellum("push", str(run_folder(tmp_path / "run")), "someone/x", env=environment)
    assert done.returncode == 2
    assert "HF_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"commit": "../../.."}, "names a commit that is none"),
        ({"commit": "/tmp/elsewhere"}, "names a commit that is none"),
        ({"body": MODEL[:-5]}, "try again"),
        ({"body": MODEL + b"more"}, "try again"),
    ],
)
def test_an_answer_that_is_not_what_was_announced_is_one_line(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path, knobs: dict[str, Any], said: str
) -> None:
    for name, value in knobs.items():
        setattr(hub, name, value)
    quick = f"import time; time.sleep = lambda _: None; {DOWNLOAD}"
    done = python(quick, f"hf:{REPO}/tiny.F16.gguf", env=environment)
    assert done.returncode != 0 and said in done.stderr, done.stderr
    assert "cerebellum.errors.BadInput" in done.stderr, "and that is the line that the command line prints"
    assert not list(tmp_path.rglob("*.gguf"))


def test_an_etag_with_slashes_is_a_name_like_any_other(hub: FakeHub, environment: dict[str, str]) -> None:
    hub.etag = "../../../" + "x" * 300
    done = python(DOWNLOAD, f"hf:{REPO}/tiny.F16.gguf", env=environment)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == MODEL


def test_a_part_that_is_longer_than_the_file_is_removed_and_told(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.cut_after = 15_000_000
    address = f"hf:{REPO}/tiny.F16.gguf"
    python(f"import time; time.sleep = lambda _: None; {DOWNLOAD}", address, env=environment)
    (part,) = (tmp_path / "hf").rglob("*.partial")
    part.write_bytes(MODEL + b"more")
    hub.dead = False
    done = python(DOWNLOAD, address, env=environment)
    assert done.returncode == 0 and "was removed" in done.stderr, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == MODEL


def test_a_link_in_the_place_of_a_part_is_not_written_through(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.cut_after = 15_000_000
    address = f"hf:{REPO}/tiny.F16.gguf"
    python(f"import time; time.sleep = lambda _: None; {DOWNLOAD}", address, env=environment)
    (part,) = (tmp_path / "hf").rglob("*.partial")
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    part.unlink()
    part.symlink_to(mine)
    hub.dead = False
    done = python(DOWNLOAD, address, env=environment)
    assert done.returncode == 0 and mine.read_bytes() == b"mine", done.stderr


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="no disk that refuses")
def test_a_home_that_takes_nothing_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = cerebellum(
        "run",
        f"hf:{REPO}/tiny.F16.gguf",
        "-o",
        str(tmp_path / "run"),
        env=environment | {"HF_HOME": str(tmp_path / "file" / "hf")},
    )
    assert done.returncode == 2 and "HF_HOME" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("planted", ["README.md", "bench/a.jsonl", "charts", "ledger.sqlite"])
def test_push_follows_no_link(environment: dict[str, str], tmp_path: Path, planted: str) -> None:
    folder = run_folder(tmp_path / "run")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "x.png").write_text("secret")
    path = folder / planted
    path.parent.mkdir(exist_ok=True)
    done = python(UPLOADS.format(make=_link(path, secret)), str(folder), env=environment)
    assert "is a link or no file" in done.stderr, done.stderr


UPLOADS = (
    "import sys, os; from pathlib import Path; from cerebellum.hub import uploads; "
    "{make}; uploads(Path(sys.argv[1]))"
)


def _link(path: Path, secret: Path) -> str:
    target = secret if path.suffix == "" else secret / "x.png"
    return f"os.symlink({str(target)!r}, {str(path)!r})"


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "bench/../../secret"])
def test_push_takes_no_name_out_of_the_folder(environment: dict[str, str], tmp_path: Path, name: str) -> None:
    folder = run_folder(tmp_path / "run")
    (tmp_path / "secret").write_text("secret")
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["imatrix"]["file"] = name
    path.write_text(json.dumps(content))
    done = python(UPLOADS.format(make="pass"), str(folder), env=environment)
    assert "which is no file of it" in done.stderr, done.stderr
