"""The method's first published table, replayed through the command line on a 32B model's header."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cerebellum
from sparse import write_sparse_granite

TABLE = Path(__file__).parent.parent / "examples" / "granite-4.0-h-small.json"

SHARED = {"ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}
PUBLISHED = {
    **dict.fromkeys(SHARED, 1.90),
    "ffn_gate_exps": 4.95,
    "ssm_out": 5.01,
    "ffn_up_exps": 6.04,
    "ffn_down_exps": 10.63,
    "ssm_in": 12.85,
}


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_granite(tmp_path_factory.mktemp("published") / "granite-4.0-h-small.gguf")


def test_the_example_is_the_published_table() -> None:
    rows = json.loads(TABLE.read_text())["measurements"]
    assert {name: row["delta_pct"] for row in rows for name in row["groups"]} == PUBLISHED
    assert len(rows) == 6 and set(rows[0]["groups"]) == SHARED


def test_at_three_percent_only_the_shared_experts_go_down(granite: Path, cerebellum: Cerebellum) -> None:
    ran = cerebellum("plan", granite, "--measurements", TABLE, "--max-increase", "3%", "--json")
    assert ran.code == 0, ran.err
    plan = ran.json
    rows = {row["name"]: row for row in plan["groups"]}
    assert {name for name, row in rows.items() if row["decision"] == "demoted"} == SHARED
    assert {name for name, row in rows.items() if row["chosen_type"] == "Q2_K"} == SHARED
    assert sum(rows[name]["tensors"] for name in SHARED) == 120
    demoted = [name for name, kind in plan["tensor_types"].items() if kind == "Q2_K"]
    assert len(demoted) == 120 and all("shexp" in name for name in demoted)
    assert all(rows[name]["decision"] == "kept" for name in PUBLISHED.keys() - SHARED)
    for name, delta in PUBLISHED.items():
        assert rows[name]["delta_pct"] == pytest.approx(delta)


def test_the_bytes_are_the_cards(granite: Path, cerebellum: Cerebellum) -> None:
    plan = cerebellum("plan", granite, "--measurements", TABLE, "--json").json
    assert plan["base"] == "Q3_K_M" and plan["demote"] == "Q2_K" and plan["threshold_pct"] == 3.0
    assert f"{plan['base_tensor_bytes'] / 2**20:.2f}" == "14645.13"
    assert f"{plan['tensor_bytes'] / 2**30:.3f}" == "14.198"
    assert f"{plan['bytes_saved'] / 1e9:.3f}" == "0.112"
    assert plan["base_tensor_bytes"] - plan["tensor_bytes"] == plan["bytes_saved"]
    assert plan["measured_delta_pct"] == pytest.approx(1.90)
    saved = {row["name"]: row["bytes_saved"] / 1e9 for row in plan["groups"]}
    card = {"ffn_down_exps": 2.180, "ffn_gate_exps": 0.920, "ffn_up_exps": 0.920, "ssm_out": 0.123}
    assert {name: round(saved[name], 3) for name in card} == card
    # The shared experts by hand, per block of 256: Q3_K 110 bytes, Q4_K 144, Q5_K 176 (the first two
    # layers of ffn_down), Q2_K 84.
    blocks = 4096 * 1536 // 256
    by_hand = {row["name"]: row["bytes_saved"] for row in plan["groups"] if row["name"] in SHARED}
    assert by_hand == {
        "ffn_gate_shexp": 40 * blocks * (110 - 84),
        "ffn_up_shexp": 40 * blocks * (110 - 84),
        "ffn_down_shexp": 38 * blocks * (144 - 84) + 2 * blocks * (176 - 84),
    }


def test_a_lower_limit_keeps_everything_and_a_higher_one_says_what_was_not_measured(
    granite: Path, cerebellum: Cerebellum
) -> None:
    strict = cerebellum("plan", granite, "--measurements", TABLE, "--max-increase", "1%", "--json").json
    assert strict["bytes_saved"] == 0 and strict["measured_delta_pct"] == 0.0
    loose = cerebellum("plan", granite, "--measurements", TABLE, "--max-increase", "5.005%", "--json").json
    assert {row["name"] for row in loose["groups"] if row["decision"] == "demoted"} >= SHARED
    assert loose["measured_delta_pct"] is None
    assert loose["predicted_delta_pct"] > 1.90


def test_the_table_is_shown_to_people(granite: Path, cerebellum: Cerebellum) -> None:
    ran = cerebellum("plan", granite, "--measurements", TABLE)
    assert ran.code == 0
    assert "13.639" not in ran.out and "14.302 GiB -> 14.198 GiB" in ran.out
    assert "+1.90%" in ran.out and "ffn_gate_shexp" in ran.out


def test_inspect_of_the_header(granite: Path, cerebellum: Cerebellum) -> None:
    ran = cerebellum("inspect", granite, "--json")
    assert ran.code == 0 and ran.err == ""
    found = ran.json
    assert found["architecture"] == "granitehybrid"
    assert found["parameters"] / 1e9 == pytest.approx(32.2, abs=0.05)
    assert found["active_parameters"] / 1e9 == pytest.approx(9, abs=0.5)
    assert (found["layers"], found["experts"], found["experts_used"]) == (40, 72, 10)
    assert found["attention_layers"] == [5, 15, 25, 35] and found["recurrent_layers"] == 36
    assert found["context_length"] == 131_072
    assert found["bytes"] == granite.stat().st_size
    groups = {group["name"]: group for group in found["groups"]}
    keys = {"name", "role", "layers", "tensors", "parameters", "bytes", "types", "protected", "legal_types"}
    assert all(keys <= set(group) for group in found["groups"])
    assert {name: groups[name]["tensors"] for name in PUBLISHED} == {
        name: 36 if name.startswith("ssm") else 40 for name in PUBLISHED
    }
    for name in ("ffn_gate_inp", "token_embd", "output_norm", "ssm_a", "ssm_conv1d"):
        assert groups[name]["protected"] and groups[name]["legal_types"] == []
    assert all("Q2_K" in groups[name]["legal_types"] for name in PUBLISHED)
