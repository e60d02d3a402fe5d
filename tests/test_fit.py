"""`--fit`: the file that goes on a card, with what it takes there; on the 32B header and a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cerebellum
from sparse import write_sparse_granite

from cerebellum.cli import tables

PUBLISHED = Path(__file__).parent.parent / "examples" / "granite-4.0-h-small.json"
GIB = 1 << 30


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("header") / "granite-4.0-h-small.gguf"
    write_sparse_granite(path)
    return path


@pytest.mark.parametrize("card", [12, 16, 24])
def test_the_32b_plan_fills_the_card_and_no_more(header: Path, cerebellum: Cerebellum, card: int) -> None:
    asked = ("--measurements", PUBLISHED, "--fit", f"{card}GiB", "--ctx", 4096, "--json")
    ran = cerebellum("plan", header, *asked)
    assert ran.code == 0, ran.err
    plan, memory = ran.json, ran.json["memory"]
    assert memory["cache"] == 4 * 2 * 8 * 128 * 2 * 4096
    assert memory["state"] == 36 * 4 * (3 * (8192 + 2 * 128) + 128 * 8192)
    assert memory["weights"] == plan["tensor_bytes"], "tied embeddings: everything is on the card"
    parts = ("weights", "cache", "state", "compute", "reserve")
    assert sum(memory[part] for part in parts) == memory["total"] == card * GIB - memory["free"]
    assert 0 <= memory["free"] < 0.05 * card * GIB
    assert plan["file_bytes"] <= plan["budget_bytes"]


def test_the_server_is_started_as_it_was_planned_for() -> None:
    """Without -np llama-server keeps four recurrent states, which the plan did not count."""
    memory = {"context": 8192, "sequences": 1}
    assert tables.run_instructions(Path("m.gguf"), memory) == "llama-server -m m.gguf -ngl 99 -c 8192 -np 1"
    assert "-np" not in tables.run_instructions(Path("m.gguf"))


def test_a_longer_context_leaves_less_for_weights(header: Path, cerebellum: Cerebellum) -> None:
    asked = ("--measurements", PUBLISHED, "--fit", "16GiB", "--json")
    short, long = (cerebellum("plan", header, *asked, "--ctx", n).json for n in (4096, 65536))
    assert long["budget_bytes"] < short["budget_bytes"]
    assert long["memory"]["cache"] == 16 * short["memory"]["cache"]


def test_a_card_too_small_is_no(header: Path, cerebellum: Cerebellum) -> None:
    for size in ("8GiB", "1GiB"):
        ran = cerebellum("plan", header, "--measurements", PUBLISHED, "--fit", size)
        assert ran.code == 1 and ran.err.startswith("cerebellum: ") and len(ran.err.splitlines()) == 1


def test_a_size_that_is_none_is_said(header: Path, cerebellum: Cerebellum) -> None:
    ran = cerebellum("plan", header, "--measurements", PUBLISHED, "--fit", "big")
    assert ran.code == 2 and "--fit" in ran.err and len(ran.err.splitlines()) == 1
