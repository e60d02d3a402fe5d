"""Several sizes in one run: one set of curves, a plan, a file and a verification for each, distinct labels."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cerebellum
from hypothesis import given
from hypothesis import strategies as st
from test_fake_run import damage, workspace
from tiny import ledger_rows

from cerebellum import open_run
from cerebellum.base import USUAL_PRESETS
from cerebellum.card.sizes import others_shipped
from cerebellum.card.stage import read_stories
from cerebellum.engine.fake import FakeEngine
from cerebellum.errors import AnswerIsNo, BadInput
from cerebellum.gguf import read_gguf
from cerebellum.hub import uploads
from cerebellum.ledger import Ledger
from cerebellum.plan.labels import labels_by_size
from cerebellum.recipes.reproduce import Reproduction, reproduce
from cerebellum.run import build_stage, card_stage, run_all, verify_stage, way_of
from cerebellum.settings import Budget, Bytes, Limit, Preset, Settings, Size
from cerebellum.source import open_source
from cerebellum.workspace import Workspace

HUB_QUANT = re.compile(rf"(?:UD-)?(?:{'|'.join(('F32', 'F16', 'Q4_0', *USUAL_PRESETS))})(?:_[A-Z]+)?")
"""How the Hub finds the label in a file's name, as its huggingface.js has it: the last match counts."""


def hub_label(name: str) -> str:
    return HUB_QUANT.findall(name.upper())[-1]


def budget(*sizes: Size) -> Budget:
    return Budget(sizes=sizes, types=("Q2_K", "Q4_K", "Q6_K"), fine_types=False, zoom=False)


THREE = budget(Preset(name="Q3_K_M"), Preset(name="Q4_K_M"), Preset(name="Q6_K"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A finished run for three sizes on the fake engine. Leave its files alone."""
    opened = workspace(tmp_path_factory.mktemp("three"), THREE)
    run_all(opened)
    return opened


def copied(finished: Workspace, folder: Path, settings: Settings | None = None) -> Workspace:
    """The finished folder somewhere else, as another process would open it."""
    shutil.copytree(finished.folder, folder / "run")
    engine = FakeEngine(damage=damage)
    return Workspace(folder / "run", settings or finished.settings, engine, finished.reporter)


# --- labels


@pytest.mark.parametrize(
    ("sizes", "given", "wanted"),
    [
        ([10, 13], [None, None], ["Q2_K", "Q3_K_M"]),
        ([13, 14], ["Q3_K_M", None], ["Q3_K_M", "Q4_K_M"]),
        ([12, 13], [None, "Q3_K_M"], ["Q2_K", "Q3_K_M"]),
        ([13, 13], [None, None], ["Q3_K_M", "Q4_K_M"]),
        ([99, 1], [None, None], ["Q8_0", "Q2_K"]),
    ],
)
def test_a_size_is_named_after_the_nearest_preset_that_is_free(
    sizes: list[int], given: list[str | None], wanted: list[str]
) -> None:
    presets = {"Q2_K": 10, "Q3_K_M": 13, "Q4_K_M": 16, "Q8_0": 30}
    assert labels_by_size(sizes, given, presets) == wanted


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=8))
def test_no_two_sizes_share_a_label_and_labels_follow_the_sizes(sizes: list[int]) -> None:
    presets = {name: 10**10 + 10**9 * place for place, name in enumerate(USUAL_PRESETS)}
    labels = labels_by_size(sizes, [None] * len(sizes), presets)
    assert len(set(labels)) == len(sizes)
    order = sorted(range(len(sizes)), key=lambda index: sizes[index])
    places = [USUAL_PRESETS.index(labels[index]) for index in order]
    assert places == sorted(places)
    names = [f"model-Q8_0-Cerebellum-{label}.gguf" for label in labels]
    assert [hub_label(name) for name in names] == labels


def test_more_sizes_than_labels_are_refused() -> None:
    with pytest.raises(BadInput, match="more sizes than labels"):
        labels_by_size([10, 11, 12], ["Q2_K", None, "Q3_K_M"], {"Q2_K": 10, "Q3_K_M": 12})


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--budget", "Q3_K_M,q3_k_m"), "named twice"),
        (("--budget", "6MB,6000000"), "named twice"),
        (("--budget", "6MB,"), "neither a size"),
        (("--fit", "8GiB,8"), "8GiB?"),
        (("--split-above", "much"), "--split-above"),
    ],
)
def test_wrong_lists_of_sizes_are_refused_at_the_door(
    cerebellum: Cerebellum, tmp_path: Path, flags: tuple[str, ...], told: str
) -> None:
    ran = cerebellum("run", tmp_path / "no.gguf", "-o", tmp_path / "run", *flags)
    assert ran.code == 2 and told in ran.complaint, ran.err


# --- the run


def test_every_size_has_its_file_plan_and_verification(finished: Workspace) -> None:
    run = open_run(finished.folder)
    views = run.results()
    manifest = run.manifest()
    assert [view.plan().file_label for view in views] == ["Q3_K_M", "Q4_K_M", "Q6_K"]
    assert all(view.verified().ok for view in views)
    for view, result in zip(views, manifest.results, strict=True):
        plan = view.plan()
        assert hub_label(result.file) == plan.file_label
        path = finished.folder / result.file
        assert path.stat().st_size == plan.file_bytes == result.bytes
        assert plan.file_bytes <= plan.budget_bytes  # type: ignore[union-attr]
        assert {t.name: t.type.name for t in read_gguf(path).tensors} == plan.tensor_types
    assert len({result.sha256 for result in manifest.results}) == 3


def test_a_program_finds_all_sizes_and_the_first_lies_where_it_always_did(finished: Workspace) -> None:
    listed = json.loads((finished.folder / "sizes.json").read_text())["sizes"]
    assert [row["label"] for row in listed] == ["Q3_K_M", "Q4_K_M", "Q6_K"]
    assert [row["plan"] for row in listed] == [
        "plan.json",
        "sizes/Q4_K_M/plan.json",
        "sizes/Q6_K/plan.json",
    ]
    for row in listed:
        plan = json.loads((finished.folder / row["plan"]).read_text())
        assert plan["budget_bytes"] == row["budget_bytes"] and plan["label"] == row["label"]
        assert json.loads((finished.folder / row["verify"]).read_text())["ok"]


def test_a_size_is_planned_alike_whether_alone_or_among_others(finished: Workspace, tmp_path: Path) -> None:
    run_all(workspace(tmp_path, budget(Preset(name="Q4_K_M"))))
    alone = open_run(tmp_path / "run")
    assert alone.results() == (alone,) and not (tmp_path / "run" / "sizes.json").exists()
    assert alone.plan() == open_run(finished.folder).results()[1].plan()
    curves = [(folder / "curves.json").read_bytes() for folder in (tmp_path / "run", finished.folder)]
    assert curves[0] == curves[1]


def test_the_same_run_again_measures_nothing_and_ends_the_same(finished: Workspace, tmp_path: Path) -> None:
    again = copied(finished, tmp_path)
    rows = ledger_rows(again.folder)
    before = {
        path: path.read_bytes() for path in again.folder.rglob("*.json") if path.name != "manifest.json"
    }
    run_all(again)
    assert ledger_rows(again.folder) == rows
    assert {path: path.read_bytes() for path in before} == before


class Killed(Exception):
    """The process was killed here."""


@pytest.mark.parametrize("after", [40, 90, 125, 135])
def test_a_killed_run_goes_on_and_measures_nothing_twice(
    tmp_path: Path, finished: Workspace, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """It is killed after so many measured chunks; then it runs to the end, and ends as if nothing had been."""
    record = Ledger.record

    def mortal(ledger: Ledger, *arguments: Any) -> None:
        if ledger.n_chunks() >= after:
            raise Killed
        record(ledger, *arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Ledger, "record", mortal)
        run_all(workspace(tmp_path, THREE))
    known = ledger_rows(tmp_path / "run")
    assert known
    again = workspace(tmp_path, THREE)
    run_all(again)
    rows = ledger_rows(tmp_path / "run")
    assert known.items() <= rows.items() and rows.keys() == ledger_rows(finished.folder).keys()
    for view, wanted in zip(again.artifacts.results(), open_run(finished.folder).results(), strict=True):
        assert view.plan() == wanted.plan() and view.verified() == wanted.verified()


def test_build_and_verify_work_on_every_size(finished: Workspace, tmp_path: Path) -> None:
    again = copied(finished, tmp_path)
    results = again.artifacts.manifest().results
    for result in results:
        again.path(result.file).unlink()
    with again.locked():
        built = build_stage(again)
        content = bytearray(built[1].read_bytes())
        content[-40] ^= 1
        built[1].write_bytes(content)
        found = verify_stage(again)
    assert [path.name for path in built] == [result.file for result in results]
    assert [each.ok for each in found] == [True, False, True]
    assert not again.artifacts.results()[1].verified().ok


def test_one_size_out_of_reach_stops_the_run_before_any_work(tmp_path: Path) -> None:
    opened = workspace(tmp_path, budget(Preset(name="Q3_K_M"), Bytes(n_bytes=1000)))
    with pytest.raises(AnswerIsNo, match="1,000 bytes cannot be reached"):
        run_all(opened)
    assert not (tmp_path / "run").exists()


def test_sizes_with_room_for_everything_are_one_file(tmp_path: Path) -> None:
    opened = workspace(tmp_path, budget(Bytes(n_bytes=1 << 30), Bytes(n_bytes=1 << 31)))
    run_all(opened)
    assert len(opened.artifacts.results()) == 1
    assert any("one file is made for them" in note for note in opened.reporter.notes)  # type: ignore[attr-defined]


def test_planning_one_size_again_leaves_no_list_of_sizes(finished: Workspace, tmp_path: Path) -> None:
    settings = finished.settings
    goal = budget(Preset(name="Q4_K_M"))
    again = copied(finished, tmp_path)
    again.settings = type(settings)(
        **{name: getattr(settings, name) for name in settings.__struct_fields__} | {"goal": goal}
    )
    with again.locked():
        (plan,) = way_of(goal).replan(again, None)
    assert again.artifacts.results() == (again.artifacts,) and again.artifacts.plan() == plan


def test_reproduce_makes_every_size_again(finished: Workspace, tmp_path: Path) -> None:
    request = Reproduction(
        manifest=finished.folder / "manifest.json",
        source=finished.settings.source,
        out=tmp_path / "again",
        base_file=None,
        texts={},
        threads=2,
    )
    found = reproduce(request, FakeEngine(), finished.reporter)
    assert found.bit_equal and len(found.further) == 2, found
    for result in finished.artifacts.manifest().results:
        made = (tmp_path / "again" / result.file).read_bytes()
        assert made == (finished.folder / result.file).read_bytes()


def test_a_changed_plan_of_a_further_size_is_named(finished: Workspace, tmp_path: Path) -> None:
    again = copied(finished, tmp_path)
    plan = again.folder / "sizes" / "Q4_K_M" / "plan.json"
    plan.write_text(plan.read_text() + " ")
    request = Reproduction(
        manifest=again.folder / "manifest.json",
        source=again.settings.source,
        out=tmp_path / "again",
        base_file=None,
        texts={},
        threads=2,
    )
    found = reproduce(request, FakeEngine(), again.reporter)
    assert not found.ok and found.changed == ("sizes/Q4_K_M/plan.json",)


def test_push_takes_every_size_and_its_evidence(finished: Workspace) -> None:
    names = {upload.name for upload in uploads(finished.folder)}
    files = {result.file for result in finished.artifacts.manifest().results}
    assert files <= names and {"imatrix.gguf", "sizes.json", "plan.json", "README.md"} <= names
    assert {"sizes/Q4_K_M/plan.json", "sizes/Q4_K_M/verify.json"} <= names


def test_push_refuses_where_one_size_failed_or_changed(finished: Workspace, tmp_path: Path) -> None:
    again = copied(finished, tmp_path)
    verify = again.folder / "sizes" / "Q4_K_M" / "verify.json"
    good = verify.read_text()
    verify.write_text(json.dumps(json.loads(good) | {"ok": False}))
    with pytest.raises(AnswerIsNo, match="failed verification"):
        uploads(again.folder)
    verify.write_text(good)
    path = again.folder / again.artifacts.manifest().results[2].file
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(AnswerIsNo, match="is not the file"):
        uploads(again.folder)


def test_one_card_has_the_table_of_all_sizes(finished: Workspace) -> None:
    card = (finished.folder / "README.md").read_text()
    for result in finished.artifacts.manifest().results:
        assert card.count(result.file) >= 2, "in the table and in the provenance"
    assert "· Q3_K_M, Q4_K_M, Q6_K by Cerebellum" in card
    assert "What changed in Q4_K_M" in card and "charts/frontier.png" in card
    assert card.count("charts/frontier.png") == 1
    report = (finished.folder / "report.html").read_text()
    assert "All sizes" in report and "What changed in Q6_K" in report


def test_the_frontier_marks_every_size(finished: Workspace) -> None:
    stories = read_stories(finished.folder)
    others = others_shipped(stories)
    assert [one.label for one in others] == ["Q4_K_M", "Q6_K"]
    assert [one.n_bytes for one in others] == [r.bytes for r in finished.artifacts.manifest().results[1:]]
    assert all(one.kld < other.kld for one, other in zip(others[1:], others, strict=False))
    drawn = stories[0].drawings(others)["frontier"].wide
    assert all(label in drawn for label in ("Q3_K_M", "Q4_K_M")), (
        "a divergence of nothing has no place on the axis"
    )


@pytest.mark.parametrize("label", ["../..", "", "a/b"])
def test_a_list_of_sizes_that_leads_out_of_the_folder_is_refused(
    finished: Workspace, tmp_path: Path, label: str
) -> None:
    again = copied(finished, tmp_path)
    listed = json.loads((again.folder / "sizes.json").read_text())
    listed["sizes"][1]["label"] = label
    (again.folder / "sizes.json").write_text(json.dumps(listed))
    with pytest.raises(BadInput, match="no label"):
        again.artifacts.results()


def _twice(folder: Path, listed: dict[str, Any]) -> None:
    listed["sizes"][2] = listed["sizes"][1]


def _the_first_again(folder: Path, listed: dict[str, Any]) -> None:
    listed["sizes"][1] = listed["sizes"][0]


def _another_place(folder: Path, listed: dict[str, Any]) -> None:
    listed["sizes"][1]["plan"] = "plan.json"


def _plans_swapped(folder: Path, listed: dict[str, Any]) -> None:
    one, other = (folder / row["plan"] for row in listed["sizes"][1:])
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _the_firsts_plan(folder: Path, listed: dict[str, Any]) -> None:
    first, second = (folder / row["plan"] for row in listed["sizes"][:2])
    second.write_bytes(first.read_bytes())


@pytest.mark.parametrize(
    "damage", [_twice, _the_first_again, _another_place, _plans_swapped, _the_firsts_plan]
)
@pytest.mark.parametrize("stage", [build_stage, verify_stage])
def test_sizes_that_were_mixed_up_are_one_line(
    finished: Workspace,
    tmp_path: Path,
    damage: Callable[[Path, dict[str, Any]], None],
    stage: Callable[[Workspace], object],
) -> None:
    """Else a size would be left out in silence, or built twice and never as itself."""
    again = copied(finished, tmp_path)
    listed = json.loads((again.folder / "sizes.json").read_text())
    damage(again.folder, listed)
    (again.folder / "sizes.json").write_text(json.dumps(listed))
    with again.locked(), pytest.raises(BadInput, match="run `cerebellum plan` again"):
        stage(again)


def _row_removed(folder: Path, listed: dict[str, Any]) -> None:
    del listed["sizes"][1]


def _list_removed(folder: Path, listed: dict[str, Any]) -> None:
    (folder / "sizes.json").unlink()


def _another_budget(folder: Path, listed: dict[str, Any]) -> None:
    listed["sizes"][1]["budget_bytes"] += 1


def _another_first_label(folder: Path, listed: dict[str, Any]) -> None:
    listed["sizes"][0]["label"] = "Q8_0"


def _the_plans_budget(folder: Path, listed: dict[str, Any]) -> None:
    path = folder / listed["sizes"][2]["plan"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"budget_bytes": 1}))


def _plan_removed(folder: Path, listed: dict[str, Any]) -> None:
    (folder / listed["sizes"][1]["plan"]).unlink()


@pytest.mark.parametrize(
    "damage",
    [_row_removed, _list_removed, _another_budget, _another_first_label, _the_plans_budget, _plan_removed],
)
@pytest.mark.parametrize("command", ["build", "verify", "card", "push"])
def test_a_size_that_was_removed_or_edited_is_named(
    finished: Workspace, tmp_path: Path, damage: Callable[[Path, dict[str, Any]], None], command: str
) -> None:
    """Else the run would count as one of fewer sizes, and go out so."""
    again = copied(finished, tmp_path)
    listed = json.loads((again.folder / "sizes.json").read_text())
    damage(again.folder, listed)
    if (again.folder / "sizes.json").exists():
        (again.folder / "sizes.json").write_text(json.dumps(listed))
    before = {
        path: path.read_bytes() for path in again.folder.rglob("*.*") if path.suffix in (".json", ".md")
    }
    with pytest.raises(BadInput, match=r"run `cerebellum plan`|run the stage") as refused:
        if command in ("build", "verify"):
            with again.locked():
                (build_stage if command == "build" else verify_stage)(again)
        else:
            (card_stage if command == "card" else uploads)(again.folder)
    assert refused.value.exit_code == 2
    assert {path: path.read_bytes() for path in before} == before


# --- splits


@pytest.mark.parametrize("goal", [Limit(max_increase_pct=1.0), THREE], ids=["limit", "budget"])
def test_a_large_result_is_split_as_llama_cpp_splits(tmp_path: Path, goal: Limit | Budget) -> None:
    opened = workspace(tmp_path, goal)
    settings = opened.settings
    opened.settings = type(settings)(
        **{name: getattr(settings, name) for name in settings.__struct_fields__}
        | {"split_above_bytes": 150_000}
    )
    manifest = run_all(opened)
    for view, result in zip(opened.artifacts.results(), manifest.results, strict=True):
        n = len(result.parts)
        assert n > 1 and view.verified().ok
        stem = result.file.removesuffix(f"-00001-of-{n:05d}.gguf")
        assert [part.file for part in result.parts] == [
            f"{stem}-{k + 1:05d}-of-{n:05d}.gguf" for k in range(n)
        ]
        paths = [opened.folder / part.file for part in result.parts]
        assert max(path.stat().st_size for path in paths) <= 150_000
        wanted = getattr(view.plan(), "budget_bytes", result.bytes)
        assert sum(path.stat().st_size for path in paths) == result.bytes <= wanted
        assert hub_label(result.file) == view.plan().file_label
        found = open_source(paths[0], allow_requantize=True)
        assert {name: t.type.name for name, t in found.tensors.items()} == view.plan().tensor_types
        assert [f.value("split.no") for f in found.files] == list(range(n))
        assert found.files[0].value("split.tensors.count") == len(found.tensors)
    names = {upload.name for upload in uploads(opened.folder)}
    parts = [part for result in manifest.results for part in result.parts]
    assert {part.file for part in parts} <= names
    request = Reproduction(
        manifest=opened.folder / "manifest.json",
        source=opened.settings.source,
        out=tmp_path / "again",
        base_file=None,
        texts={},
        threads=2,
    )
    assert reproduce(request, FakeEngine(), opened.reporter).bit_equal
    for part in parts:
        assert (tmp_path / "again" / part.file).read_bytes() == (opened.folder / part.file).read_bytes()


def test_a_result_that_is_split_no_more_leaves_no_splits(tmp_path: Path) -> None:
    opened = workspace(tmp_path, budget(Preset(name="Q3_K_M")))
    whole = opened.settings
    opened.settings = type(whole)(
        **{name: getattr(whole, name) for name in whole.__struct_fields__} | {"split_above_bytes": 150_000}
    )
    run_all(opened)
    assert len(list(opened.folder.glob("*-of-*.gguf"))) > 1
    again = workspace(tmp_path, budget(Preset(name="Q3_K_M")))
    run_all(again)
    assert [path.name for path in again.folder.glob("*Cerebellum*.gguf")] == [
        again.artifacts.manifest().result.file
    ]
