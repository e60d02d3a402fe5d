"""What is the user's is never replaced, and a file that changed on the disk is noticed where it is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cerebellum, Finished
from test_fake_run import workspace
from tiny import ledger_rows

from cerebellum.engine.fake import FakeEngine
from cerebellum.errors import BadInput
from cerebellum.gguf import read_gguf
from cerebellum.run import build_stage, measure_stage, run_all, verify_stage
from cerebellum.settings import Limit
from cerebellum.workspace import Workspace

DEMOTED = Limit(max_increase_pct=900.0, chunks=4)


def flip(path: Path, at: int) -> None:
    """Flips a bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def last_tensor(path: Path) -> int:
    """A place inside the last tensor's bytes."""
    return path.stat().st_size - 64


@pytest.fixture
def fed_back(tmp_path: Path) -> Workspace:
    """The same with our encoder, which feeds errors back by second moments."""
    opened = workspace(tmp_path, DEMOTED, encoder="ours")
    run_all(opened)
    assert opened.path("moments.gguf").exists()
    return opened


@pytest.fixture
def run(tmp_path: Path) -> Workspace:
    """A finished run on the fake engine, in which everything was demoted."""
    opened = workspace(tmp_path, DEMOTED)
    run_all(opened)
    return opened


def reopened(run: Workspace) -> Workspace:
    """The same folder, as a new process would open it."""
    return Workspace(run.folder, run.settings, FakeEngine(damage=run.engine.damage), run.reporter)  # type: ignore[attr-defined]


def result(run: Workspace) -> Path:
    return run.path(run.artifacts.manifest().result.file)


def test_a_flipped_bit_in_a_shard_that_ships_is_made_again_at_build(run: Workspace) -> None:
    good = result(run).read_bytes()
    shard = next(path for path in run.path("shards").glob("*.Q2_K.*"))
    flip(shard, last_tensor(shard))
    again = reopened(run)
    with again.locked():
        build_stage(again)
    assert result(run).read_bytes() == good
    assert any("changed on the disk" in note for note in again.reporter.notes)  # type: ignore[attr-defined]


def test_a_flipped_bit_in_the_finished_file_fails_verification_twice(run: Workspace) -> None:
    path = result(run)
    flip(path, last_tensor(path))
    again = reopened(run)
    with again.locked():
        (found,) = verify_stage(again)
    assert not found.ok
    assert next(check.name for check in found.checks if not check.ok) == "tensor bytes"


def test_the_sample_knows_damage_that_shard_and_file_share(run: Workspace) -> None:
    """Every tensor of the file is changed, and the shards with it: only the source tells."""
    path = result(run)
    for tensor in read_gguf(path).tensors:
        if tensor.name.startswith("blk.") and "exps" in tensor.name:
            file = read_gguf(path)
            data = file.data(tensor)
            content = bytearray(path.read_bytes())
            at = bytes(content).find(data.tobytes())
            for place in range(at, at + len(data)):
                content[place] ^= 0xFF
            path.write_bytes(content)
    again = reopened(run)
    with again.locked():
        (found,) = verify_stage(again)
    failed = {check.name: check.detail for check in found.checks if not check.ok}
    assert "sample made again" in failed and "exps" in failed["sample made again"]


def test_another_importance_matrix_is_refused_before_anything_is_quantized(run: Workspace) -> None:
    matrix = run.path("imatrix.gguf")
    flip(matrix, last_tensor(matrix))
    before = result(run).read_bytes()
    shards = {path.name for path in run.path("shards").iterdir()}
    for stage in (build_stage, verify_stage):
        again = reopened(run)
        with again.locked(), pytest.raises(BadInput, match="its bytes changed on the disk"):
            stage(again)
    assert result(run).read_bytes() == before
    assert {path.name for path in run.path("shards").iterdir()} == shards


def test_a_damaged_base_shard_never_names_itself_in_the_manifest(run: Workspace) -> None:
    from cerebellum.manifest import make_manifest

    before = run.artifacts.manifest().shards
    shard = next(path for path in run.path("shards").glob("01-*.base.*"))
    flip(shard, last_tensor(shard))
    again = reopened(run)
    with again.locked():
        assert make_manifest(again).shards == before


def test_an_importance_matrix_never_replaces_a_model(
    cerebellum: Cerebellum, embedded: Path, tmp_path: Path, select_text: Path
) -> None:
    model = tmp_path / "m.gguf"
    shutil.copyfile(embedded, model)
    asked = ["--text", select_text, "--ctx", 64, "--chunks", 1, "--threads", 1]
    ran = cerebellum("imatrix", model, "-o", model, *asked)
    assert ran.code == 2 and "--force" in ran.complaint
    assert model.read_bytes() == embedded.read_bytes()


def test_a_base_file_in_the_place_of_the_result_is_refused(
    cerebellum: Cerebellum, finished: Finished, tmp_path: Path, embedded: Path
) -> None:
    base = tmp_path / "run" / finished.gguf.name
    base.parent.mkdir()
    shutil.copyfile(finished.gguf, base)
    before = base.read_bytes()
    ran = cerebellum("run", embedded, "-o", base.parent, "--base-file", base)
    assert ran.code == 2 and str(base) in ran.complaint, ran.err
    assert base.read_bytes() == before


def test_a_result_that_no_run_of_the_folder_made_stays(
    cerebellum: Cerebellum, tmp_path: Path, embedded: Path
) -> None:
    mine = tmp_path / "run" / "cerebellum-demo-Cerebellum-Q3_K_M.gguf"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    ran = cerebellum("run", embedded, "-o", mine.parent)
    assert ran.code == 2 and mine.name in ran.complaint
    assert mine.read_bytes() == b"mine" and not (mine.parent / "settings.json").exists()


@pytest.mark.parametrize("name", ["moments.gguf", "imatrix.gguf"])
@pytest.mark.parametrize("stage", [build_stage, verify_stage, run_all])
def test_a_flipped_bit_in_what_rounding_rests_on_is_refused(
    fed_back: Workspace, name: str, stage: Callable[[Workspace], object]
) -> None:
    """Codes would be chosen by other values than were measured, and every shard made anew of them."""
    flip(fed_back.path(name), last_tensor(fed_back.path(name)))
    before = {path: path.read_bytes() for path in fed_back.folder.rglob("*.gguf")}
    again = reopened(fed_back)
    with pytest.raises(BadInput, match=rf"{name}: .*remove it"):
        if stage is run_all:
            stage(again)
        else:
            with again.locked():
                stage(again)
    assert {path: path.read_bytes() for path in fed_back.folder.rglob("*.gguf")} == before


@pytest.mark.parametrize("name", ["moments.gguf", "imatrix.gguf"])
def test_what_rounding_rests_on_is_made_again_where_it_was_removed(fed_back: Workspace, name: str) -> None:
    good = result(fed_back).read_bytes()
    measured = ledger_rows(fed_back.folder)
    fed_back.path(name).unlink()
    run_all(reopened(fed_back))
    assert result(fed_back).read_bytes() == good
    assert ledger_rows(fed_back.folder) == measured


@pytest.mark.parametrize("name", ["moments.gguf", "imatrix.gguf"])
def test_a_file_that_was_damaged_before_a_plan_was_made_is_noticed(name: str, tmp_path: Path) -> None:
    fed_back = workspace(tmp_path, DEMOTED, encoder="ours")
    measure_stage(fed_back)
    flip(fed_back.path(name), last_tensor(fed_back.path(name)))
    with pytest.raises(BadInput, match=rf"{name}: .*remove it"):
        run_all(reopened(fed_back))
    assert not list(fed_back.folder.glob("*-Cerebellum-*.gguf"))


def test_reproduce_names_moments_that_changed(fed_back: Workspace, cerebellum: Cerebellum) -> None:
    flip(fed_back.path("moments.gguf"), last_tensor(fed_back.path("moments.gguf")))
    source = fed_back.settings.source
    ran = cerebellum(
        "reproduce", fed_back.path("manifest.json"), "--source", source, "-o", fed_back.folder / "again.gguf"
    )
    assert ran.code != 0
    assert "second moments" in ran.out + ran.err
