"""The plan of one model on another's weights: applied, held to its promise, revised where it does not hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cerebellum, Finished
from test_fake_run import damage, workspace
from tiny import Recorder, hybrid_records, hybrid_shapes, ledger_rows, random_tensor, tensors_of, write_hybrid

from cerebellum import open_run
from cerebellum.codec import read_artifact
from cerebellum.engine.fake import FakeEngine
from cerebellum.errors import BadInput
from cerebellum.folder import TRANSFER
from cerebellum.gguf import (
    GGMLQuantizationType,
    GGUFValueType,
    TensorInfo,
    TensorSource,
    bits_per_weight,
    encode_kv,
    read_gguf,
    write_gguf,
)
from cerebellum.ledger import Ledger
from cerebellum.plan.artifacts import BudgetPlan, GivenPlan, LimitPlan
from cerebellum.recipes.transfer import Done, Finetune, transfer, transferred_settings
from cerebellum.recipes.transferred import BROKEN, HOLDS, Transferred
from cerebellum.run import run_all
from cerebellum.settings import DEMO_MODEL, Budget, Domain, Goal, Limit, Preset, Settings
from cerebellum.source import open_source
from cerebellum.workspace import Workspace

T = GGMLQuantizationType
LIMIT = Limit(max_increase_pct=3.0)
BUDGET = Budget(sizes=(Preset(name="Q3_K_M"),))


def finetune(path: Path) -> Path:
    """The hybrid with other weights: every value is a little off."""
    shapes = hybrid_shapes()
    kinds = {n: T.F32 if len(s) == 1 or s[0] == 1 or "gate_inp" in n else T.F16 for n, s in shapes.items()}

    def tuned(name: str, shape: tuple[int, ...]) -> TensorSource:
        made = random_tensor(name, shape, kinds[name])
        values = np.frombuffer(next(iter(made.chunks())), np.float32 if kinds[name] == T.F32 else np.float16)
        raw = (values * np.asarray(1.01, values.dtype)).tobytes()
        return TensorSource(name=name, shape=shape, type=kinds[name], chunks=lambda: [raw])

    write_gguf(path, hybrid_records(), [tuned(n, s) for n, s in shapes.items()])
    return path


def cheap(qtype: GGMLQuantizationType) -> bool:
    """Whether a type is below the base's Q3_K: Q2_K, and IQ types up to IQ3_XXS."""
    return bits_per_weight(qtype) < 3.2


def harmed(role: str, nats: float) -> Callable[[TensorInfo], float]:
    """Damages as before, but for one role, each of whose tensors below the base now costs ``nats``."""

    def found(tensor: TensorInfo) -> float:
        return nats if role in tensor.name and cheap(tensor.type) else damage(tensor)

    return found


def transferred(
    tmp_path: Path, goal: Goal, harm: Callable[[TensorInfo], float] = damage, *, revise: bool = True
) -> tuple[Done, FakeEngine]:
    """A run of the hybrid, and its plan on a finetune that takes damage in another way."""
    if not (tmp_path / "run" / "plan.json").exists():
        run_all(workspace(tmp_path, goal))
    run = open_run(tmp_path / "run")
    settings = transferred_settings(run, Finetune(source=finetune(tmp_path / "tuned.F16.gguf")))
    engine = FakeEngine(damage=harm)

    def opened(asked: Settings) -> Workspace:
        return Workspace(tmp_path / "tuned", asked, engine, Recorder())

    return transfer(run, settings, opened, 30, revise=revise), engine


@pytest.mark.parametrize("goal", [LIMIT, BUDGET], ids=["limit", "budget"])
def test_a_plan_that_holds_is_shipped_as_it_is(tmp_path: Path, goal: Goal) -> None:
    done, _ = transferred(tmp_path, goal)
    found = done.transferred
    assert found.verdict == HOLDS and found.fits and not found.revised and done.ok
    assert found.over.ci is not None and found.over.ci[1] < 0 and found.chunks == 30
    old = open_run(tmp_path / "run").plan()
    assert isinstance(done.plan, GivenPlan) and done.plan.tensor_types == old.tensor_types and old.changes
    out = tmp_path / "tuned" / done.manifest.result.file
    assert {t.name: t.type.name for t in read_gguf(out).tensors} == old.tensor_types
    assert read_artifact(tmp_path / "tuned" / TRANSFER, Transferred, "") == found
    assert "run-plan.json" in (tmp_path / "tuned" / "README.md").read_text()
    assert TRANSFER in done.manifest.evidence
    assert found.source_sha256 == open_run(tmp_path / "tuned").source().sha256 != found.run_source_sha256


def test_a_limit_that_is_broken_is_kept_by_what_was_measured_again(tmp_path: Path) -> None:
    done, _ = transferred(tmp_path, LIMIT, harmed("ffn_gate_exps", 0.1))
    found = done.transferred
    assert found.verdict == BROKEN and found.revised and done.ok
    assert found.over.ci is not None and found.over.ci[0] > 0
    again = {row.name: row for row in found.again}
    old = open_run(tmp_path / "run").plan()
    assert set(again) == set(old.changes) and again["ffn_gate_exps"].differs
    assert not any(row.differs for name, row in again.items() if name != "ffn_gate_exps")
    assert isinstance(done.plan, LimitPlan)
    assert set(done.plan.changes) == set(old.changes) - {"ffn_gate_exps"}
    assert done.plan.measured_delta_pct is not None and done.plan.measured_delta_pct < 3.0
    assert (tmp_path / "tuned" / "report.html").exists()


def test_a_budget_that_is_broken_is_planned_from_new_curves(tmp_path: Path) -> None:
    done, _ = transferred(tmp_path, BUDGET, harmed("ffn_down_exps", 0.2))
    old = open_run(tmp_path / "run").plan()
    found = done.transferred
    assert any("ffn_down_exps" in name for name in old.changes), "the case needs a plan that this harms"
    assert found.verdict == BROKEN and found.revised and isinstance(done.plan, BudgetPlan)
    assert (
        found.before_share is not None
        and found.now_share is not None
        and found.now_share > found.before_share
    )
    assert {row.name for row in found.again if row.differs} == {"ffn_down_exps"}
    assert done.plan.file_bytes <= done.plan.budget_bytes
    cheap = {
        name for name, qtype in done.plan.changes.items() if qtype in ("Q2_K", "IQ2_XXS", "IQ2_XS", "IQ2_S")
    }
    assert not any("ffn_down_exps" in name for name in cheap)


def test_texts_of_several_domains_take_the_place_of_the_runs(tmp_path: Path) -> None:
    before = workspace(tmp_path, LIMIT)
    (tmp_path / "run").mkdir()
    before.save_settings()
    run = open_run(tmp_path / "run")
    two = (Domain(name="code", path=tmp_path / "code.txt"), Domain(name="chat", path=tmp_path / "chat.txt"))
    found = transferred_settings(run, Finetune(source=tmp_path / "tuned.gguf", select_texts=two))
    assert found.select_texts == two and found.select_text is None
    assert found.report_texts == before.settings.report_texts
    one = transferred_settings(run, Finetune(source=tmp_path / "tuned.gguf", report_texts=two[:1]))
    assert one.report_texts == two[:1] and one.select_texts == before.settings.select_texts


def test_what_does_not_hold_is_a_no_where_nothing_may_be_revised(tmp_path: Path) -> None:
    done, _ = transferred(tmp_path, LIMIT, harmed("ffn_gate_exps", 0.1), revise=False)
    assert done.transferred.verdict == BROKEN and not done.transferred.revised and not done.ok
    assert isinstance(done.plan, GivenPlan)


@pytest.mark.parametrize("harm", [damage, harmed("ffn_gate_exps", 0.1)], ids=["holds", "revised"])
def test_the_same_again_measures_nothing(tmp_path: Path, harm: Callable[[TensorInfo], float]) -> None:
    first, _ = transferred(tmp_path, LIMIT, harm)
    again, engine = transferred(tmp_path, LIMIT, harm)
    assert again.transferred == first.transferred and again.plan == first.plan and not engine.scored


def test_what_cannot_be_transferred_is_one_line(tmp_path: Path) -> None:
    run_all(workspace(tmp_path, LIMIT))
    run = open_run(tmp_path / "run")
    shapes = hybrid_shapes()
    del shapes["blk.1.attn_q.weight"]
    smaller = write_hybrid(tmp_path / "smaller.gguf", shapes)
    wider = write_hybrid(tmp_path / "wider.gguf", hybrid_shapes() | {"blk.1.attn_q.weight": (256, 512)})
    for source, says in ((smaller, "attn_q"), (wider, "another number of parameters")):
        settings = transferred_settings(run, Finetune(source=source))
        opened = Workspace(tmp_path / "no", settings, FakeEngine(), Recorder())
        with pytest.raises(BadInput, match=says):
            transfer(run, settings, lambda asked, w=opened: w, 30, revise=True)  # type: ignore[misc]
    assert not (tmp_path / "no").exists()


def test_a_recipe_promises_nothing(tmp_path: Path) -> None:
    transferred(tmp_path, LIMIT)
    run = open_run(tmp_path / "tuned")
    with pytest.raises(BadInput, match="promises nothing"):
        transfer(run, run.settings(), lambda asked: None, 30, revise=True)  # type: ignore[arg-type,return-value]


# ---- runs and finetunes that are not what they should be ----


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".json", ".gguf", ".md")}


def carried(folder: Path, source: Path, out: Path) -> Done:
    run = open_run(folder)
    settings = transferred_settings(run, Finetune(source=source))

    def opened(asked: Settings) -> Workspace:
        return Workspace(out, asked, FakeEngine(damage=damage), Recorder())

    return transfer(run, settings, opened, 30, revise=True)


def edited(**changed: object) -> Callable[[dict[str, Any]], object]:
    return lambda artifact: artifact.update(changed)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("plan.json", edited(measured_delta_pct=0.0)),
        ("plan.json", edited(threshold_pct=99.0)),
        ("plan.json", edited(tensor_types={})),
        ("plan.json", lambda plan: plan["groups"][0].update(name="nonsense", chosen_type="Q2_K")),
        ("groups.json", edited(groups=[])),
        ("groups.json", lambda groups: groups["groups"][0].update(tensor_names=["none"])),
        ("settings.json", edited(seed=7)),
        ("settings.json", edited(seed=-1)),
        ("settings.json", edited(threads=0)),
        ("settings.json", edited(base="Q2_K")),
        ("settings.json", edited(ctx=16)),
        ("measurements.json", None),
        ("source.json", edited(sha256="0" * 64)),
    ],
)
def test_a_run_that_is_not_what_its_manifest_names_is_one_line(
    tmp_path: Path, name: str, edit: Callable[[dict[str, Any]], object] | None
) -> None:
    """What was edited promised nothing, and would be held to as if it had."""
    run_all(workspace(tmp_path, LIMIT))
    path = tmp_path / "run" / name
    artifact = json.loads(path.read_text())
    if edit is None:
        path.unlink()
    else:
        edit(artifact)
        path.write_text(json.dumps(artifact))
    with pytest.raises(BadInput, match=rf"{name}: .*manifest\.json.*put it back"):
        carried(tmp_path / "run", finetune(tmp_path / "tuned.gguf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_runs_plan_is_one_line(tmp_path: Path) -> None:
    run_all(workspace(tmp_path, LIMIT))
    run_all(workspace(tmp_path / "other", BUDGET))
    (tmp_path / "run" / "plan.json").write_bytes((tmp_path / "other" / "run" / "plan.json").read_bytes())
    with pytest.raises(BadInput, match=r"plan\.json: is not the one"):
        carried(tmp_path / "run", finetune(tmp_path / "tuned.gguf"), tmp_path / "out")


def test_a_run_is_never_written_over(tmp_path: Path) -> None:
    """Neither the one whose plan is carried over, nor one of the finetune, whose header may be the same."""
    run_all(workspace(tmp_path, LIMIT))
    run_all(workspace(tmp_path / "other", LIMIT))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "run")
    before = contents(tmp_path)
    tuned = finetune(tmp_path / "tuned.F16.gguf")
    for out in (tmp_path / "run", link, tmp_path / "other" / "run"):
        with pytest.raises(BadInput, match="give the finetune a folder of its own"):
            carried(tmp_path / "run", tuned, out)
    assert {path: path.read_bytes() for path in before} == before


def test_what_another_recipe_or_transfer_left_is_never_written_over(tmp_path: Path) -> None:
    """Not even of the very same finetune: a transfer goes on only in what a transfer of the same run began."""
    run_all(workspace(tmp_path, LIMIT))
    tuned = finetune(tmp_path / "tuned.F16.gguf")
    carried(tmp_path / "run", tuned, tmp_path / "tuned")
    before = contents(tmp_path / "tuned")
    (tmp_path / "run").rename(tmp_path / "another")
    for _ in range(2):
        with pytest.raises(BadInput, match="give the finetune a folder of its own"):
            carried(tmp_path / "another", tuned, tmp_path / "tuned")
        assert contents(tmp_path / "tuned") == before
        (tmp_path / "tuned" / TRANSFER).unlink(missing_ok=True)  # as where it was killed early
        before.pop(tmp_path / "tuned" / TRANSFER, None)


def _architecture(path: Path) -> Path:
    records = [encode_kv("general.architecture", "llama", GGUFValueType.STRING), *hybrid_records()[1:]]
    return _with_records(path, records)


def _vocabulary(path: Path) -> Path:
    return _with_records(
        path, [*hybrid_records(), encode_kv("tokenizer.ggml.model", "gpt2", GGUFValueType.STRING)]
    )


def _with_records(path: Path, records: list[bytes]) -> Path:
    source = open_source(finetune(path.with_suffix(".seed")))
    tensors = [
        TensorSource(name=name, shape=tensor.shape, type=tensor.type, chunks=lambda n=name: [source.read(n)])  # type: ignore[misc]
        for name, tensor in source.tensors.items()
    ]
    write_gguf(path, records, tensors)
    return path


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (_architecture, "architecture is 'llama'"),
        (_vocabulary, "its tokenizer.ggml.model is 'gpt2'"),
        (
            lambda p: write_hybrid(p, hybrid_shapes() | {"blk.1.attn_q.weight": (512, 128)}),
            "its shape of blk.1",
        ),
        (write_hybrid, "itself, byte for byte"),
    ],
)
def test_what_is_no_finetune_of_the_runs_model_is_one_line(
    tmp_path: Path, made: Callable[[Path], Path], says: str
) -> None:
    run_all(workspace(tmp_path, LIMIT))
    with pytest.raises(BadInput, match=says):
        carried(tmp_path / "run", made(tmp_path / "tuned.gguf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    """The process was killed here."""


@pytest.mark.parametrize("after", [0.3, 0.95])
@pytest.mark.parametrize("goal", [LIMIT, BUDGET], ids=["limit", "budget"])
def test_a_killed_transfer_ends_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goal: Goal, after: float
) -> None:
    harm = harmed("ffn_gate_exps", 0.1)
    transferred(tmp_path / "whole", goal, harm)
    wanted = ledger_rows(tmp_path / "whole" / "tuned")
    record = Ledger.record

    def mortal(ledger: Ledger, *arguments: Any) -> None:
        if ledger.n_chunks() >= after * len(wanted):
            raise Killed
        record(ledger, *arguments)

    run_all(workspace(tmp_path, goal))
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Ledger, "record", mortal)
        transferred(tmp_path, goal, harm)
    known = ledger_rows(tmp_path / "tuned")
    done, _ = transferred(tmp_path, goal, harm)
    rows = ledger_rows(tmp_path / "tuned")
    assert known.items() <= rows.items() and rows == wanted
    for name in (done.manifest.result.file, "plan.json", "transfer.json", "verify.json"):
        assert (tmp_path / "tuned" / name).read_bytes() == (tmp_path / "whole" / "tuned" / name).read_bytes()


# ---- the command, on llama.cpp ----


def tuned_demo(path: Path) -> Path:
    """The embedded model with every second value of its expert matrices a little off."""
    source = open_source(DEMO_MODEL)

    def content(name: str) -> TensorSource:
        tensor = source.tensors[name]
        raw = source.read(name)
        if "exps" in name:
            values = raw.view(np.float16).copy()
            values[::2] *= np.float16(1.02)
            raw = values.view(np.uint8)
        return TensorSource(name=name, shape=tensor.shape, type=tensor.type, chunks=lambda: [raw])

    write_gguf(path, list(source.kv_records.values()), [content(name) for name in source.tensors])
    return path


def test_the_command_carries_a_run_to_a_finetune(
    cerebellum: Cerebellum, finished: Finished, tmp_path: Path
) -> None:
    source = tuned_demo(tmp_path / "tuned.F16.gguf")
    asked = (
        "transfer",
        finished.folder,
        "--source",
        source,
        "-o",
        tmp_path / "out",
        "--chunks",
        6,
        "--threads",
        2,
    )
    ran = cerebellum(*asked, "--json")
    assert ran.code == 0 and ran.json["transfer"]["verdict"] == "holds", ran.err
    types = {name: qtype for name, (qtype, _) in tensors_of(Path(ran.json["file"])).items()}
    assert types == {name: qtype for name, (qtype, _) in tensors_of(finished.gguf).items()}
    assert ran.json["transfer"]["run_source"] == finished.read("source.json")["path"]
    words = cerebellum(*asked)
    assert words.code == 0 and "still holds on tuned.F16.gguf" in " ".join(words.out.split())
