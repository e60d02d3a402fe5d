"""The manifest of a run, and the same file again from it. No model is run here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from run_folder import verify

from cerebellum import imatrix
from cerebellum.cli.commands import main
from cerebellum.codec import as_json, write_artifact, write_json
from cerebellum.errors import BadInput
from cerebellum.imatrix import Entry
from cerebellum.llama.native import LlamaEngine
from cerebellum.manifest import make_manifest
from cerebellum.progress import Silent
from cerebellum.recipes.reproduce import Reproduction, reproduce
from cerebellum.run import build_stage, way_of
from cerebellum.settings import DEMO_MODEL, Settings
from cerebellum.source import open_source
from cerebellum.workspace import Workspace

DEMOTED = {"ffn_down_exps": 0.5, "ssm_out": 0.9}


def finished_run(folder: Path, elsewhere: Path, **changed: Any) -> Path:
    """A run folder as `run` leaves it, with an importance matrix and measurements made up."""
    texts = [_text(elsewhere / f"{name}.txt", name) for name in ("choose", "report")]
    settings = Settings(
        source=DEMO_MODEL,
        imatrix=_matrix(elsewhere / "given.gguf"),
        select_text=texts[0],
        report_text=texts[1],
        ctx=32,
    )
    workspace = Workspace(folder, structs.replace(settings, **changed), LlamaEngine(), Silent())
    with workspace.locked():
        workspace.write_source()
        workspace.save_settings()
        write_json(folder / "measurements.json", _measurements())
        write_artifact(folder / "verify.json", verify())
        way_of(workspace.settings.goal).replan(workspace, folder / "measurements.json")
        build_stage(workspace)
        make_manifest(workspace)
    return folder


def _text(path: Path, word: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"The {word} of a small text that is read for its tokens only . \n" * 40)
    return path


def _matrix(path: Path) -> Path:
    """Importances that differ by column, for every matrix of the demo model."""
    random = np.random.default_rng(7)
    entries = {}
    for name, tensor in open_source(DEMO_MODEL).tensors.items():
        if len(tensor.shape) > 1 and name.startswith("blk."):
            experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
            sums = random.uniform(0.5, 2, (experts, tensor.shape[0])).astype(np.float32)
            entries[name] = Entry(sums=sums, counts=np.ones(experts, np.int64))
    imatrix.write(path, entries, "made-up", 1, 32)
    return path


def _measurements() -> dict[str, Any]:
    rows = [
        {"groups": [name], "type": "Q2_K", "delta_pct": delta, "ci_pct": [delta, delta], "chunks": 4}
        for name, delta in DEMOTED.items()
    ]
    return {"measurements": rows}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("reproduce")
    return finished_run(top / "run", top / "elsewhere")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil, without the shards, as it would be fetched from the Hub."""
    copy = tmp_path / "fetched"
    shutil.copytree(made, copy, ignore=shutil.ignore_patterns("shards", "settings.json", ".lock"))
    return copy


def again(run: Path, source: Path = DEMO_MODEL, **changed: Any) -> dict[str, Any]:
    texts = {"selection": run.parent / "choose.txt", "report": run.parent / "report.txt"}
    for word, path in zip(("choose", "report"), texts.values(), strict=True):
        if not path.exists():
            _text(path, word)
    request = Reproduction(
        manifest=run / "manifest.json",
        source=source,
        out=run / "reproduced",
        base_file=None,
        texts=texts,
        threads=2,
    )
    return as_json(reproduce(replace(request, **changed), LlamaEngine(), Silent()))


def details(found: Mapping[str, Any]) -> dict[str, str]:
    return {row["name"]: row["detail"] for row in found["compared"]}


def test_the_same_file_bit_for_bit(run: Path) -> None:
    found = again(run)
    assert (found["ok"], found["bit_equal"], found["changed"]) == (True, True, [])
    original = run / json.loads((run / "manifest.json").read_text())["result"]["file"]
    assert Path(found["file"]).read_bytes() == original.read_bytes()
    names = {row["name"] for row in found["compared"]}
    assert {"source", "importance matrix", "selection text", "report text", "plan.json", "ledger"} <= names


def test_the_file_is_mixed(run: Path) -> None:
    """What is compared above is worth comparing: both demotions are in it."""
    types = json.loads((run / "manifest.json").read_text())["tensor_types"]
    assert {types["blk.0.ffn_down_exps.weight"], types["blk.0.ssm_out.weight"]} == {"Q2_K"}
    assert types["blk.0.ffn_gate_exps.weight"] == "Q3_K"


def test_the_matrix_given_from_elsewhere_goes_with_the_run(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert (run / manifest["imatrix"]["file"]).exists()


def test_nothing_tells_where_files_lay(made: Path) -> None:
    for name in ("manifest.json", "source.json", "groups.json", "plan.json"):
        assert str(made.parent) not in (made / name).read_text()
        assert str(DEMO_MODEL.parent) not in (made / name).read_text()


def test_another_model_is_named_and_nothing_is_built(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    content = bytearray(DEMO_MODEL.read_bytes())
    content[-5] ^= 1
    other.write_bytes(content)
    found = again(run, source=other)
    assert (found["ok"], found["file"], found["changed"]) == (False, None, ["source"])
    assert details(found)["source"] == "other.gguf is another file, with the same header and other tensors"


def test_another_matrix_is_named(run: Path) -> None:
    matrix = run / "given.gguf"
    content = bytearray(matrix.read_bytes())
    content[-3] ^= 1
    matrix.write_bytes(content)
    found = again(run)
    assert (found["file"], found["changed"]) == (None, ["importance matrix"])


def test_another_text_is_named_though_the_file_is_the_same(run: Path) -> None:
    (run.parent / "report.txt").write_text("Another text .")
    found = again(run)
    assert (found["ok"], found["bit_equal"], found["changed"]) == (False, True, ["report text"])


def test_a_text_that_is_not_here_is_no_fault(run: Path) -> None:
    found = again(run, texts={})
    assert found["ok"]
    assert "is not here" in details(found)["selection text"]


@pytest.mark.parametrize("name", ["plan.json", "measurements.json"])
def test_changed_evidence_is_named(run: Path, name: str) -> None:
    (run / name).write_text((run / name).read_text().replace("0.5", "0.4"))
    assert again(run)["changed"] == [name]


def test_the_original_is_never_written_over(run: Path) -> None:
    with pytest.raises(BadInput, match="choose another folder"):
        again(run, out=run)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "", ".."])
def test_a_manifest_cannot_point_out_of_its_folder(run: Path, name: str) -> None:
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["imatrix"]["file"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="is no file name"):
        again(run)


def test_an_older_manifest_is_told_apart(run: Path) -> None:
    (run / "manifest.json").write_text('{"source": {}}')
    with pytest.raises(BadInput, match="it cannot be reproduced"):
        again(run)


def test_a_base_that_was_given(made: Path, tmp_path: Path) -> None:
    """The base is somebody's file: its own bytes where a type stays, and it must be the same file."""
    base = tmp_path / "base.gguf"
    shutil.copy(next(made.glob("*Cerebellum*.gguf")), base)
    folder = finished_run(tmp_path / "run", tmp_path / "elsewhere", base_file=base)
    with pytest.raises(BadInput, match="--base-file"):
        again(folder, texts={}, out=tmp_path / "out")
    found = again(folder, texts={}, out=tmp_path / "out", base_file=base)
    assert (found["bit_equal"], found["changed"]) == (True, [])


@pytest.mark.parametrize(("spoil", "code"), [(False, 0), (True, 1)])
def test_the_command_says_so(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spoil: bool, code: int
) -> None:
    if spoil:
        (run / "given.gguf").write_bytes(b"GGUF")
    command = ["cerebellum", "reproduce", str(run / "manifest.json"), "--source", str(DEMO_MODEL), "--json"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == code
    assert json.loads(capsys.readouterr().out)["bit_equal"] is not spoil
