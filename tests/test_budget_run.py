"""`run --budget` from end to end on the embedded model: curves, layers apart, a plan, the file, its card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Cerebellum
from tiny import ledger_rows, run_process

from cerebellum.gguf import bits_per_weight, parse_type, read_gguf
from cerebellum.settings import SELECTION_TEXT


@dataclass(frozen=True, kw_only=True)
class Budgeted:
    """A finished run, and how it was asked for."""

    folder: Path
    arguments: list[object]
    answer: dict[str, Any]

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="module")
def budgeted(tmp_path_factory: pytest.TempPathFactory, embedded: Path, report_text: Path) -> Budgeted:
    """At the size of Q3_K_M, from two types for each group, in a process of its own."""
    folder = tmp_path_factory.mktemp("budgeted") / "run"
    text = folder.parent / "select.txt"
    text.write_text(SELECTION_TEXT.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    flags = "--ctx 64 --imatrix-chunks 2 --report-chunks 3 --threads 2 --budget Q3_K_M --types Q2_K,Q4_K"
    texts = ("--select-text", text, "--report-text", report_text)
    arguments = ["run", embedded, "-o", folder, *flags.split(), "--no-fine-types", *texts]
    ran = run_process(*arguments, "--json")
    assert ran.code == 0, ran.err
    return Budgeted(folder=folder, arguments=arguments, answer=ran.json)


def test_the_file_is_within_the_budget_to_the_byte(budgeted: Budgeted) -> None:
    plan, path = budgeted.read("plan.json"), Path(budgeted.answer["file"])
    assert path.stat().st_size == plan["file_bytes"] <= plan["budget_bytes"]
    types = {tensor.name: tensor.type.name for tensor in read_gguf(path).tensors}
    assert types == plan["tensor_types"]
    assert budgeted.answer["verify"]["ok"]


def test_the_curves_cost_two_passes_at_most_and_layers_were_told_apart(budgeted: Budgeted) -> None:
    curves = budgeted.read("curves.json")
    assert 0 < curves["passes"] <= 2
    assert {len(row["groups"]) for row in curves["responses"]} >= {1, 2, 3, 6}
    assert all(row["kld"]["n"] <= curves["chunks"] for row in curves["responses"])
    groups = {point["group"] for point in budgeted.read("plan.json")["points"]}
    assert {"ffn_up_exps.0", "ssm_in.4", "attn_q.5"} <= groups and len(groups) == 52


def test_the_sum_of_the_parts_foretells_the_whole(budgeted: Budgeted) -> None:
    """KL divergence from the source, all of it: within a quarter on these few tokens."""
    plan = budgeted.read("plan.json")
    for row in plan["candidates"]:
        predicted, measured = (plan["base_kld"] + row[key] for key in ("predicted_kld", "measured_kld"))
        assert predicted == pytest.approx(measured, rel=0.25)


def test_what_shipped_was_measured_whole_and_is_the_best_of_what_was(budgeted: Budgeted) -> None:
    plan = budgeted.read("plan.json")
    measured = [row["measured_kld"] for row in plan["candidates"]]
    assert plan["measured_kld"] == min(measured) and plan["kld_ci"] and plan["ci_pct"]
    assert any(row["how"] == "the base itself" for row in plan["candidates"])
    names = [row["name"] for row in plan["groups"]]
    assert len(names) == len(set(names)) == 52, "a row a group of the layout, no group twice"
    assert set(names) <= {group["name"] for group in budgeted.read("groups.json")["groups"]}


def test_the_same_command_again_measures_nothing_and_decides_the_same(
    budgeted: Budgeted, cerebellum: Cerebellum
) -> None:
    plan, rows = budgeted.read("plan.json"), ledger_rows(budgeted.folder)
    ran = cerebellum(*budgeted.arguments, "--json")
    assert ran.code == 0, ran.err
    assert ledger_rows(budgeted.folder) == rows
    assert ran.json["plan"] == plan


def test_another_budget_needs_no_model(budgeted: Budgeted, cerebellum: Cerebellum) -> None:
    before, rows = (budgeted.folder / "plan.json").read_bytes(), ledger_rows(budgeted.folder)
    smaller = cerebellum("plan", budgeted.folder, "--budget", "6.5MB", "--json").json
    assert smaller["file_bytes"] <= 6_500_000 and smaller["measured_kld"] is None
    frontier = cerebellum("plan", budgeted.folder, "--frontier", "--json").json
    damages = [row["predicted"] for row in frontier]
    assert damages == sorted(damages, reverse=True) and len(frontier) > 5
    assert ledger_rows(budgeted.folder) == rows
    (budgeted.folder / "plan.json").write_bytes(before)


def test_an_unreachable_budget_is_no_and_leaves_the_plan(budgeted: Budgeted, cerebellum: Cerebellum) -> None:
    before = (budgeted.folder / "plan.json").read_bytes()
    ran = cerebellum("plan", budgeted.folder, "--budget", "1MB")
    assert ran.code == 1 and "the smallest file" in ran.err and len(ran.err.splitlines()) == 1
    assert (budgeted.folder / "plan.json").read_bytes() == before


def test_a_card_and_a_report_tell_it(budgeted: Budgeted) -> None:
    card = (budgeted.folder / "README.md").read_text()
    assert "knapsack" in card
    for row in budgeted.read("plan.json")["groups"]:
        assert row["role"] in card
    assert (budgeted.folder / "report.html").stat().st_size > 10_000


def test_the_file_can_be_made_again_bit_for_bit(
    budgeted: Budgeted, cerebellum: Cerebellum, tmp_path: Path, embedded: Path
) -> None:
    manifest = budgeted.folder / "manifest.json"
    ran = cerebellum("reproduce", manifest, "--source", embedded, "-o", tmp_path, "--json")
    assert ran.code == 0 and ran.json["ok"], ran.out


@pytest.mark.parametrize("n_bytes", [500, 2500])
def test_short_texts_cost_more_passes_and_break_nothing(
    embedded: Path, report_text: Path, cerebellum: Cerebellum, tmp_path: Path, n_bytes: int
) -> None:
    text = tmp_path / "select.txt"
    text.write_text(SELECTION_TEXT.read_text(encoding="utf-8")[:n_bytes], encoding="utf-8")
    flags = "--ctx 64 --imatrix-chunks 2 --report-chunks 2 --threads 2 --budget Q3_K_M --types Q2_K,q4_k"
    texts = ("--select-text", text, "--report-text", report_text, "--anchor", "q8_0")
    plain = ("--no-zoom", "--no-fine-types")
    ran = cerebellum("run", embedded, "-o", tmp_path / "run", *flags.split(), *texts, *plain, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["plan"]["file_bytes"] <= ran.json["plan"]["budget_bytes"]


def test_a_text_of_one_chunk_is_refused(
    embedded: Path, report_text: Path, cerebellum: Cerebellum, tmp_path: Path
) -> None:
    text = tmp_path / "select.txt"
    text.write_text(SELECTION_TEXT.read_text(encoding="utf-8")[:300], encoding="utf-8")
    texts = ("--select-text", text, "--report-text", report_text, "--imatrix-chunks", 1)
    ran = cerebellum("run", embedded, "-o", tmp_path / "run", "--ctx", 64, "--budget", "Q3_K_M", *texts)
    assert ran.code == 2 and "--select-text" in ran.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--budget", "12XB"), "neither a size"),
        (("--budget", "Q3_K_M", "--anchor", "F16"), "--anchor"),
        (("--budget", "Q3_K_M", "--types", "Q2_K,Q9"), "--types"),
        (("--budget", "Q3_K_M", "--types", "Q8_0", "--no-fine-types"), "--types"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_line(
    embedded: Path, cerebellum: Cerebellum, tmp_path: Path, flags: tuple[str, ...], told: str
) -> None:
    ran = cerebellum("run", embedded, "-o", tmp_path / "run", "--imatrix-chunks", 1, *flags)
    assert ran.code == 2 and told in ran.err.splitlines()[-1], ran.err


def test_curves_of_an_earlier_version_are_refused(
    budgeted: Budgeted, cerebellum: Cerebellum, tmp_path: Path
) -> None:
    for name in ("settings.json", "source.json", "imatrix.gguf"):
        (tmp_path / name).write_bytes((budgeted.folder / name).read_bytes())
    (tmp_path / "curves.json").write_text('{"points": []}')
    for flags in (("--budget", "7MB"), ("--frontier",)):
        ran = cerebellum("plan", tmp_path, *flags)
        assert ran.code == 2 and "no format number" in ran.err and len(ran.err.splitlines()) == 1


def test_a_plan_that_fails_leaves_the_folder_as_it_was(budgeted: Budgeted, cerebellum: Cerebellum) -> None:
    before = (budgeted.folder / "settings.json").read_bytes()
    assert cerebellum("plan", budgeted.folder, "--budget", "1MB").code == 1
    assert (budgeted.folder / "settings.json").read_bytes() == before


def test_a_budget_no_type_can_reach_is_refused_before_any_work(
    embedded: Path, cerebellum: Cerebellum, tmp_path: Path
) -> None:
    ran = cerebellum("run", embedded, "-o", tmp_path / "run", "--budget", "3MB")
    assert ran.code == 1 and "the smallest file" in ran.err and len(ran.err.splitlines()) == 1
    assert not list((tmp_path / "run").glob("*.gguf")) and not (tmp_path / "run" / "curves.json").exists()


def test_a_plan_does_not_depend_on_which_was_planned_before(
    budgeted: Budgeted, cerebellum: Cerebellum, tmp_path: Path
) -> None:
    """Planning writes plan.json and nothing that another plan starts from."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(budgeted.folder, folder)
    curves = (folder / "curves.json").read_bytes()
    alone = cerebellum("plan", folder, "--budget", "7MB", "--json").json
    cerebellum("plan", folder, "--budget", "6.5MB", "--json")
    again = cerebellum("plan", folder, "--budget", "7MB", "--json").json
    assert again == alone and (folder / "curves.json").read_bytes() == curves


def test_stages_of_a_budget_meet_in_the_folder(
    budgeted: Budgeted, cerebellum: Cerebellum, embedded: Path, tmp_path: Path
) -> None:
    """`measure --budget`, `plan` and `build` go on from each other, without `run`."""
    arguments = [str(argument) for argument in budgeted.arguments]
    arguments[0] = "measure"
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("ledger.sqlite", "imatrix.gguf", "rounding.json"):  # what takes the time
        (folder / name).write_bytes((budgeted.folder / name).read_bytes())
    arguments[arguments.index("-o") + 1] = str(folder)
    measured = cerebellum(*arguments, "--json")
    assert measured.code == 0, measured.err
    counts = {"measured": 0, "reused": len(ledger_rows(folder))}
    assert measured.json == json.loads((folder / "curves.json").read_text()) | counts
    planned = cerebellum("plan", folder, "--json")
    assert planned.code == 0 and planned.json["measured_kld"] is None, planned.err
    built = cerebellum("build", folder, "--json")
    assert built.code == 0, built.err
    assert Path(built.json["path"]).stat().st_size == planned.json["file_bytes"]


@pytest.mark.slow
def test_no_bytes_go_into_types_finer_than_a_quantized_source_has(
    tmp_path: Path, embedded: Path, report_text: Path, cerebellum: Cerebellum
) -> None:
    """A tensor at the source's own type is copied and loses nothing: at a finer one it would lose, and cost more."""
    source = tmp_path / "source-Q4_K_M.gguf"
    assert cerebellum("quantize", embedded, "Q4_K_M", "-o", source, "--encoder", "ggml").code == 0
    text = tmp_path / "select.txt"
    text.write_text(SELECTION_TEXT.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    flags = "--ctx 64 --imatrix-chunks 2 --report-chunks 3 --threads 2 --no-fine-types --allow-requantize"
    texts = ("--select-text", text, "--report-text", report_text, "--budget", "Q5_K_M")
    ran = run_process(
        *("run", source, "-o", tmp_path / "run", *flags.split(), *texts, "--types", "Q4_K,Q5_K,Q6_K"),
        "--json",
    )
    assert ran.code == 0, ran.err
    plan = ran.json["plan"]
    had = {tensor.name: bits_per_weight(tensor.type) for tensor in read_gguf(source).tensors}
    finer = [
        name for name, qtype in plan["tensor_types"].items() if bits_per_weight(parse_type(qtype)) > had[name]
    ]
    assert finer == []
