"""Whole runs of both goals on the official fake engine: no llama.cpp is loaded, nothing takes longer than seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny import Recorder, ledger_rows, small_text, write_hybrid

from cerebellum import open_run
from cerebellum.engine.fake import FakeEngine
from cerebellum.engine.speed import Speeds, speed_of
from cerebellum.gguf import TensorInfo, bits_per_weight, is_quantized, read_gguf
from cerebellum.run import run_all
from cerebellum.settings import Budget, EncoderName, Goal, Limit, Preset, Settings
from cerebellum.workspace import Workspace


def damage(tensor: TensorInfo) -> float:
    """State-space tensors are forty times as sensitive as experts; error falls fourfold with each bit."""
    if not is_quantized(tensor.type):
        return 0.0
    worth = 2.0 if "ssm" in tensor.name else 0.05
    return worth * 4.0 ** -bits_per_weight(tensor.type)


def workspace(
    folder: Path, goal: Goal, engine: FakeEngine | None = None, encoder: EncoderName = "ggml"
) -> Workspace:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [folder / "select.txt", folder / "report.txt"]
    for seed, text in enumerate(texts):
        text.write_bytes(small_text(40 * 32, seed))
    settings = Settings(
        source=write_hybrid(folder / "hybrid.F16.gguf"),
        goal=goal,
        select_text=texts[0],
        report_text=texts[1],
        ctx=32,
        threads=2,
        encoder=encoder,
    )
    return Workspace(folder / "run", settings, engine or FakeEngine(damage=damage), Recorder())


@pytest.mark.parametrize(
    "goal", [Limit(max_increase_pct=1.0), Budget(sizes=(Preset(name="Q3_K_M"),))], ids=["limit", "budget"]
)
def test_a_whole_run_works_on_the_fake(tmp_path: Path, goal: Goal) -> None:
    opened = workspace(tmp_path, goal)
    manifest = run_all(opened)
    run = open_run(tmp_path / "run")
    plan = run.plan()
    assert run.verified().ok and plan.file_bytes == manifest.result.bytes
    found = {t.name: t.type.name for t in read_gguf(tmp_path / "run" / manifest.result.file).tensors}
    assert found == plan.tensor_types
    assert {row.name for row in plan.groups} <= {group.name for group in run.groups().groups}
    assert (tmp_path / "run" / "README.md").exists() and (tmp_path / "run" / "report.html").exists()


class Unaware(FakeEngine):
    """Cannot swap and does not say so, so that looks are those of an engine that can."""

    def can_swap(self, weights: int, staged: int) -> bool:
        """Says that it can."""
        return True


def test_looks_are_late_and_few_where_every_switch_opens_a_model(tmp_path: Path) -> None:
    opened = []
    for number, kind in enumerate((FakeEngine, Unaware)):
        engine = kind(damage=damage, cannot_swap="its weights lie on 2 devices")
        run_all(workspace(tmp_path / str(number), Limit(max_increase_pct=3.0), engine))
        opened.append(engine.opened)
        rows = open_run(tmp_path / str(number) / "run").measurements().measurements
        firsts = {row.trace[0].chunks for row in rows if row.trace}
        assert min(firsts) == (8 if kind is FakeEngine else 2)
    assert opened[0] < opened[1], opened


def test_a_budget_looks_late_where_every_switch_opens_a_model(tmp_path: Path) -> None:
    engine = FakeEngine(damage=damage, cannot_swap="its weights lie on 2 devices")
    run_all(workspace(tmp_path, Budget(sizes=(Preset(name="Q3_K_M"),)), engine))
    assert open_run(tmp_path / "run").curves().method.first_look == 8


class Small(FakeEngine):
    """Has room for a model of a little more than Q6_K."""

    def can_swap(self, weights: int, staged: int) -> bool:
        """Whether the model leaves room."""
        return weights < self.room

    room = 0


def test_a_smaller_anchor_is_proposed_where_only_that_fits(tmp_path: Path) -> None:
    engine = Small(damage=damage)
    (tmp_path / "run").mkdir()
    opened = workspace(tmp_path, Budget(sizes=(Preset(name="Q3_K_M"),)), engine)
    sizes = {qtype: opened.layout.file_bytes(opened.layout.anchored(qtype)) for qtype in ("Q8_0", "Q6_K")}
    engine.room = (sizes["Q8_0"] + sizes["Q6_K"]) // 2
    run_all(opened)
    [note] = [note for note in opened.reporter.notes if "--anchor" in note]  # type: ignore[attr-defined]
    assert "--anchor Q6_K" in note and "times as wide" in note


def test_verify_tells_how_sure_the_source_is_and_decodes_it_once(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=1.0))
    run_all(opened)
    corpus = opened.report_corpus
    with FakeEngine(damage=damage).open(opened.source.paths, corpus.ctx) as model:
        rows = [model.logits(corpus.inputs(chunk)) for chunk in range(corpus.n_chunks)]
    log_p = np.concatenate(rows).astype(np.float64)  # the fake's logits are normalized
    found = open_run(tmp_path / "run").verified().report
    assert found.confidence is not None and found.source.ppl is not None and found.result.ppl is not None
    assert found.confidence.entropy == pytest.approx(-(np.exp(log_p) * log_p).sum(axis=1).mean(), abs=1e-4)
    assert found.confidence.loss == pytest.approx(np.log(found.source.ppl))
    assert found.confidence.gap == pytest.approx(found.confidence.loss - found.confidence.entropy)
    assert found.confidence.loss_change == pytest.approx(np.log(found.result.ppl / found.source.ppl))
    assert isinstance(opened.engine, FakeEngine)
    names = tuple(path.name for path in opened.source.paths)
    reported = {corpus.inputs(chunk).tobytes() for chunk in range(corpus.n_chunks)}
    counts = [n for (paths, chunk), n in opened.engine.scored.items() if paths == names and chunk in reported]
    assert counts == [1] * corpus.n_chunks


def test_by_limit_the_sensitive_group_is_kept(tmp_path: Path) -> None:
    run_all(workspace(tmp_path, Limit(max_increase_pct=3.0)))
    rows = {row.name: row for row in open_run(tmp_path / "run").plan().groups}
    assert not rows["ssm_in"].changed and rows["ffn_gate_exps"].changed


def test_by_budget_the_sensitive_role_gets_more_bits(tmp_path: Path) -> None:
    run_all(workspace(tmp_path, Budget(sizes=(Preset(name="Q3_K_M"),))))
    plan = open_run(tmp_path / "run").plan()
    types = {row.role: row.chosen_type for row in plan.groups}
    assert types["ssm_in"] not in ("base", "Q2_K", "IQ2_XXS"), types
    assert plan.file_bytes <= plan.budget_bytes  # type: ignore[union-attr]


@pytest.mark.parametrize("goal", [Limit(), Budget(sizes=(Preset(name="Q3_K_M"),))], ids=["limit", "budget"])
def test_the_same_run_again_measures_nothing_and_ends_the_same(tmp_path: Path, goal: Goal) -> None:
    run_all(workspace(tmp_path, goal))
    rows = ledger_rows(tmp_path / "run")
    before = artifacts(tmp_path / "run")
    run_all(workspace(tmp_path, goal))
    assert ledger_rows(tmp_path / "run") == rows
    assert artifacts(tmp_path / "run") == before


@pytest.mark.parametrize("goal", [Limit(), Budget(sizes=(Preset(name="Q3_K_M"),))], ids=["limit", "budget"])
def test_what_only_measuring_needed_is_removed_and_never_made_again(tmp_path: Path, goal: Goal) -> None:
    run_all(workspace(tmp_path, goal))
    plan = open_run(tmp_path / "run").plan()
    n_groups = len([group for group in open_run(tmp_path / "run").groups().groups if not group.protected])
    left = {path.name for path in (tmp_path / "run" / "shards").glob("*.gguf")}
    assert len(left) == 1 + n_groups + len(plan.changes)
    again = workspace(tmp_path, goal)
    run_all(again)
    assert again.shards.weights_made == 0
    assert {path.name for path in (tmp_path / "run" / "shards").glob("*.gguf")} == left


def test_another_plan_makes_removed_shards_again(tmp_path: Path) -> None:
    run_all(workspace(tmp_path, Limit(max_increase_pct=0.2)))
    strict = open_run(tmp_path / "run").plan().changes
    wider = workspace(tmp_path, Limit(max_increase_pct=50.0))
    manifest = run_all(wider)
    assert len(open_run(tmp_path / "run").plan().changes) > len(strict)
    assert wider.shards.weights_made > 0 and open_run(tmp_path / "run").verified().ok
    assert set(manifest.shards) <= {path.name for path in (tmp_path / "run" / "shards").glob("*.gguf")}


def test_shards_are_kept_where_asked(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit())
    opened.settings = msgspec.structs.replace(opened.settings, keep_shards=True)
    run_all(opened)
    n_groups = len([group for group in opened.groups if not group.protected])
    assert len(list((tmp_path / "run" / "shards").glob("*.gguf"))) > n_groups + 1 + len(
        open_run(tmp_path / "run").plan().changes
    )


def artifacts(folder: Path) -> dict[str, bytes]:
    """Every artifact but the manifest, which says how long this run took."""
    return {path.name: path.read_bytes() for path in folder.glob("*.json") if path.name != "manifest.json"}


def test_no_llama_cpp_is_loaded(tmp_path: Path) -> None:
    """In a process where importing llama_cpp fails, as on a machine where it was never compiled."""
    program = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_fake_run import workspace, run_all, Limit, Budget, Preset\n"
        f"run_all(workspace(Path({str(tmp_path)!r}) / 'a', Limit(max_increase_pct=1.0)))\n"
        f"run_all(workspace(Path({str(tmp_path)!r}) / 'b', Budget(sizes=(Preset(name='Q3_K_M'),))))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_speeds_are_measured_where_asked_and_said_on_card_and_report(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=50.0))
    opened.settings = msgspec.structs.replace(opened.settings, tokens_per_second=True)
    run_all(opened)
    speeds = open_run(tmp_path / "run").verified().speeds
    assert speeds is not None and speeds.machine == "a fake machine"
    assert speeds.result.generation > speeds.base.generation  # fewer bytes, and a fake takes a time for each
    assert "% faster than the base" in speeds.told()
    told = f"{speeds.base.prompt:,.0f}, {speeds.base.generation:,.1f}"
    assert f"| tokens/s of a prompt, generated | {told} |" in (tmp_path / "run" / "README.md").read_text()
    assert "tokens/s of a prompt and" in (tmp_path / "run" / "report.html").read_text()


def test_a_speed_is_the_median_of_its_repeats() -> None:
    speed = speed_of([0.5, 1.0, 2.0], [64.0, 16.0, 32.0])
    assert (speed.prompt, speed.prompt_range) == (512.0, (256.0, 1024.0))
    assert (speed.generation, speed.generation_range) == (2.0, (1.0, 4.0))
    slow = speed_of([1.0] * 3, [64.0] * 3)
    assert "50% slower than the base, as IQ types are" in Speeds(machine="m", base=speed, result=slow).told()
    assert "slower" not in Speeds(machine="m", base=speed, result=speed).told()
