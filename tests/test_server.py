"""A real llama-server loads what Cerebellum makes, finds the types that were planned, and answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from conftest import Finished
from llama_server import find_or_build, serving
from tiny import run_process

from cerebellum.gguf import read_gguf

PROMPT = "The history of the city"


@pytest.fixture(scope="session")
def llama_server(pytestconfig: pytest.Config) -> Path:
    assert pytestconfig.cache is not None
    return find_or_build(pytestconfig.cache.mkdir("llama-server"))


@pytest.fixture(scope="session")
def spent(tmp_path_factory: pytest.TempPathFactory, finished: Finished) -> Path:
    """The embedded model for a budget, with types of every kind."""
    out = tmp_path_factory.mktemp("spent") / "run"
    few = "--ctx 64 --imatrix-chunks 2 --report-chunks 3 --threads 1 --no-feedback"
    goal = "--budget Q3_K_M --types Q2_K,IQ3_XXS,Q4_K --no-fine-types --no-zoom"
    source = finished.arguments[1]
    texts = finished.arguments[finished.arguments.index("--select-text") :][:4]
    ran = run_process("run", source, "-o", out, *few.split(), *goal.split(), *texts, "--json")
    assert ran.code == 0, ran.err
    return Path(ran.json["file"])


def check_served(binary: Path, model: Path, folder: Path) -> None:
    """Loads, answers as llama.cpp's library does here, and warns of nothing."""
    from llama_cpp import Llama

    with serving(binary, model, folder) as server:
        text, tokens = server.complete(PROMPT, 8)
        assert len(tokens) == 8
        in_file = Counter(tensor.type.name for tensor in read_gguf(model).tensors)
        assert server.types() == in_file
        assert server.complaints() == []
    here = Llama(str(model), n_ctx=256, n_threads=1, verbose=False)
    assert here(PROMPT, max_tokens=8, temperature=0, repeat_penalty=1)["choices"][0]["text"] == text
    here.close()


@pytest.mark.slow
def test_llama_server_loads_a_run_by_limit_and_answers(
    llama_server: Path, finished: Finished, tmp_path: Path
) -> None:
    check_served(llama_server, finished.gguf, tmp_path)


@pytest.mark.slow
def test_llama_server_loads_a_run_for_a_budget_and_answers(
    llama_server: Path, spent: Path, tmp_path: Path
) -> None:
    check_served(llama_server, spent, tmp_path)


@pytest.mark.slow
def test_llama_server_refuses_a_type_that_it_does_not_know(
    llama_server: Path, finished: Finished, tmp_path: Path
) -> None:
    """So that a server that answers says something: one byte of a tensor's type is another here."""
    raw = bytearray(finished.gguf.read_bytes())
    name = b"blk.0.ffn_gate_exps.weight"
    at = raw.index(name) + len(name) + 4 + 3 * 8  # after the name: dimensions, then the type
    raw[at] = 200
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(raw)
    with pytest.raises(AssertionError, match="type"), serving(llama_server, broken, tmp_path):
        pass
