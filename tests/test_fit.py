"""`--fit`: the file that goes on a GPU, with what it takes there; on the header of a 32B model."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cerebellum
from sparse import write_sparse_granite

from cerebellum.base import preset_base
from cerebellum.cli import tables
from cerebellum.groups import make_groups
from cerebellum.layout import Layout
from cerebellum.llama.native import LlamaEngine
from cerebellum.plan.target import Target, target_of
from cerebellum.settings import Bytes, Gpu, Preset
from cerebellum.source import open_source
from cerebellum.verdicts import NOTHING

PUBLISHED = Path(__file__).parent.parent / "examples" / "granite-4.0-h-small.json"
GIB = 1 << 30


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("header") / "granite-4.0-h-small.gguf"
    write_sparse_granite(path)
    return path


@pytest.mark.parametrize("gpu", [12, 16, 24])
def test_the_32b_plan_fills_the_gpu_and_no_more(header: Path, cerebellum: Cerebellum, gpu: int) -> None:
    asked = ("--measurements", PUBLISHED, "--fit", f"{gpu}GiB", "--context", 4096, "--json")
    ran = cerebellum("plan", header, *asked)
    assert ran.code == 0, ran.err
    plan, memory = ran.json, ran.json["memory"]
    assert memory["cache"] == 4 * 2 * 8 * 128 * 2 * 4096
    assert memory["state"] == 36 * 4 * (3 * (8192 + 2 * 128) + 128 * 8192)
    assert memory["weights"] == plan["tensor_bytes"], "tied embeddings: everything is on the GPU"
    parts = ("weights", "cache", "state", "compute", "reserve")
    assert sum(memory[part] for part in parts) == memory["total"] == gpu * GIB - memory["free"]
    assert 0 <= memory["free"] < 0.05 * gpu * GIB
    assert plan["file_bytes"] <= plan["budget_bytes"]


def test_the_server_is_started_as_it_was_planned_for(header: Path) -> None:
    """Without -np llama-server keeps four recurrent states, which the plan did not count."""
    memory = target(header, Gpu(n_bytes=16 * GIB, context=8192)).memory(NOTHING)
    told = tables.run_instructions(Path("m.gguf"), memory)
    assert told == "llama-server -m m.gguf -ngl 99 -c 8192 -np 1"
    assert "-np" not in tables.run_instructions(Path("m.gguf"))


def target(header: Path, size: Bytes | Preset | Gpu) -> Target:
    """The target of a size on the header's Q3_K_M."""
    engine, source = LlamaEngine(), open_source(header)
    layout = Layout.of(source, make_groups(source), preset_base(engine, source, "Q3_K_M", None))
    return target_of(size, engine, source, layout)


def test_a_size_in_bytes_and_a_presets_size_are_their_bytes(header: Path) -> None:
    source = open_source(header)
    wanted = {name: preset_base(LlamaEngine(), source, name, None) for name in ("Q3_K_M", "Q2_K")}
    for name, base in wanted.items():
        found = target(header, Preset(name=name))
        assert found.file_bytes == Layout.of(source, make_groups(source), base).file_bytes()
        assert found.memory(NOTHING) is None, "no GPU was named"
    assert target(header, Bytes(n_bytes=123)) == Target(file_bytes=123)


def test_changes_of_the_plan_are_counted_on_the_gpu(header: Path) -> None:
    found = target(header, Gpu(n_bytes=16 * GIB))
    base, smaller = found.memory(NOTHING), found.memory({"ffn_down_exps": "Q2_K"})
    assert base is not None and smaller is not None and base.context == 4096
    assert smaller.free - base.free == base.weights - smaller.weights > 10**9


def test_a_longer_context_leaves_less_for_weights(header: Path, cerebellum: Cerebellum) -> None:
    asked = ("--measurements", PUBLISHED, "--fit", "16GiB", "--json")
    short, long = (cerebellum("plan", header, *asked, "--context", n).json for n in (4096, 65536))
    assert long["budget_bytes"] < short["budget_bytes"]
    assert long["memory"]["cache"] == 16 * short["memory"]["cache"]


def test_a_gpu_too_small_is_no(header: Path, cerebellum: Cerebellum) -> None:
    for size in ("8GiB", "1GiB"):
        ran = cerebellum("plan", header, "--measurements", PUBLISHED, "--fit", size)
        assert ran.code == 1 and ran.err.startswith("cerebellum: ") and len(ran.err.splitlines()) == 1


def test_a_size_that_is_none_is_said(header: Path, cerebellum: Cerebellum) -> None:
    ran = cerebellum("plan", header, "--measurements", PUBLISHED, "--fit", "big")
    assert ran.code == 2 and "--fit" in ran.err and len(ran.err.splitlines()) == 1
