"""Kernels for repacked weights that end the process are noticed elsewhere, and models run without them here."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cerebellum import files
from cerebellum.llama import repack
from cerebellum.llama.graphs import ggml
from cerebellum.llama.library import cpu_device
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.settings import DEMO_MODEL


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """No test sees what another found."""
    yield
    repack.repacking_works.cache_clear()


def a_build_with_amx(monkeypatch: pytest.MonkeyPatch, code: int) -> list[int]:
    """Pretends that the build has kernels for AMX, whose trial ends with ``code``; returns what counts trials."""
    tried: list[int] = []

    def spawn(_start: object) -> subprocess.CompletedProcess[bytes]:
        tried.append(code)
        return subprocess.CompletedProcess([], code)

    repack.repacking_works.cache_clear()
    monkeypatch.setattr(repack, "system_info", lambda: "CPU : AVX512 = 1 | AMX_INT8 = 1 | REPACK = 1")
    monkeypatch.setattr(files.DISK, "spawn", spawn)
    return tried


def test_kernels_that_end_the_process_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = a_build_with_amx(monkeypatch, -11)
    notes: list[str] = []
    engine = LlamaEngine(EngineSettings(threads=1), notes.append)
    for _ in range(2):
        with engine.open([DEMO_MODEL], 8) as model:
            assert np.isfinite(model.logits(np.zeros(2, np.int32))).all()
    assert engine.identity.endswith(", weights not repacked")
    assert notes == [repack.NOTE] and tried == [-11]


def test_kernels_that_pass_the_trial_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = a_build_with_amx(monkeypatch, 0)
    assert repack.repacking_works() and tried == [0]
    assert "repacked" not in LlamaEngine(EngineSettings(threads=1)).identity


def test_a_build_without_them_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = a_build_with_amx(monkeypatch, -11)
    monkeypatch.setattr(repack, "system_info", lambda: "CPU : AVX2 = 1 | REPACK = 1")
    assert repack.repacking_works() and tried == []


def test_the_trial_is_a_program_that_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ggml().ggml_backend_dev_buffer_type(cpu_device())
    assert repack.product_is_right(plain)
    monkeypatch.setattr(repack, "_COLUMNS", 512)  # of a matrix of ones, whose rows are then twice as long
    assert repack.product_is_right(plain)
    monkeypatch.setattr(np, "ones", lambda shape, dtype: np.full(shape, 2, dtype))
    assert not repack.product_is_right(plain)


def test_the_trial_ends_like_any_program_where_the_kernels_work_or_are_missing() -> None:
    if not repack.repacking_works():
        pytest.skip("this build's kernels for AMX end the process, which is what the trial is there to find")
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-m", "cerebellum.llama.repack"], cwd=root, capture_output=True)
    assert done.returncode == 0, done.stderr
