"""Embeddings, output head and MTP layers: protected unless a budget is told to plan them, never lost in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cerebellum
from test_fake_run import workspace
from tiny import Recorder, hybrid_records, hybrid_shapes, write_hybrid

from cerebellum import open_run
from cerebellum.engine.fake import FakeEngine
from cerebellum.errors import BadInput
from cerebellum.gguf import (
    GGMLQuantizationType as T,
)
from cerebellum.gguf import GGUFValueType as V
from cerebellum.gguf import (
    TensorInfo,
    bits_per_weight,
    encode_kv,
    is_quantized,
    needs_imatrix,
    parse_type,
    read_gguf,
    write_gguf,
)
from cerebellum.groups import make_groups, mtp_layers
from cerebellum.plan.budget import check_allocated
from cerebellum.run import run_all
from cerebellum.settings import Allocated, Budget, Gpu, Limit, Preset, Settings
from cerebellum.source import open_source
from cerebellum.workspace import Workspace


def damage(tensor: TensorInfo) -> float:
    """The output head is what matters most; error falls fourfold with each bit."""
    if not is_quantized(tensor.type):
        return 0.0
    worth = 4.0 if tensor.name == "output.weight" else 0.05
    return worth * 4.0 ** -bits_per_weight(tensor.type)


def with_source(opened: Workspace, model: Path, engine: FakeEngine | None = None) -> Workspace:
    settings = opened.settings
    values = {name: getattr(settings, name) for name in settings.__struct_fields__} | {"source": model}
    return Workspace(opened.folder, Settings(**values), engine or opened.engine, Recorder())


def budget(*allocate: Allocated) -> Budget:
    return Budget(
        sizes=(Preset(name="Q4_K_M"),),
        types=("Q2_K", "Q4_K", "Q6_K"),
        fine_types=False,
        zoom=False,
        allocate=allocate,
    )


def untied(path: Path) -> Path:
    return write_hybrid(path, {**hybrid_shapes(), "output.weight": (256, 300)})


@pytest.mark.parametrize(
    ("allocate", "tied", "free"),
    [
        ((), True, set()),
        (("head",), True, {"token_embd"}),
        (("embd",), True, {"token_embd"}),
        ((), False, set()),
        (("head",), False, {"output"}),
        (("head", "embd"), False, {"output", "token_embd"}),
    ],
)
def test_only_what_is_named_is_free(
    tmp_path: Path, allocate: tuple[Allocated, ...], tied: bool, free: set[str]
) -> None:
    path = tmp_path / "m.F16.gguf"
    source = open_source(write_hybrid(path) if tied else untied(path))
    groups = {group.name: group for group in make_groups(source, allocate=allocate)}
    sacred = {"token_embd", "output"} & groups.keys()
    assert {name for name in sacred if not groups[name].protected} == free
    types = {qtype for name in free for qtype in groups[name].legal_types}
    assert not any(needs_imatrix(parse_type(qtype)) for qtype in types), "they have no entry in a matrix"


def test_a_head_that_matters_gets_more_bits_and_the_card_says_what_was_planned(tmp_path: Path) -> None:
    model = untied(tmp_path / "untied.F16.gguf")
    run = with_source(workspace(tmp_path, budget("head")), model, FakeEngine(damage=damage))
    manifest = run_all(run)
    plan = open_run(run.folder).plan()
    row = next(row for row in plan.groups if row.role == "output")
    assert row.verdict == "promoted", row
    found = {t.name: t.type for t in read_gguf(run.folder / manifest.result.file).tensors}
    assert (
        found["output.weight"] in (T.Q6_K, T.Q8_0) and plan.tensor_types["output.weight"] == row.chosen_type
    )
    assert found["token_embd.weight"] == run.base.types["token_embd.weight"], "not named, not touched"
    assert plan.file_bytes <= plan.budget_bytes  # type: ignore[union-attr]
    card = (run.folder / "README.md").read_text()
    assert "Routers, norms, embeddings and every one-dimensional tensor are never touched." in card


def test_tied_embeddings_are_said_to_be_both(tmp_path: Path) -> None:
    run = workspace(tmp_path, budget("head"))
    run_all(run)
    assert any("one tensor in this model" in note for note in run.reporter.notes)  # type: ignore[attr-defined]
    card = (run.folder / "README.md").read_text()
    assert "Routers, norms and every" in card or "Routers, norms" in card
    assert "`token_embd` is the embeddings and the output head at once." in card


def test_embeddings_off_the_card_are_not_planned_for_it(tmp_path: Path) -> None:
    goal = Budget(sizes=(Gpu(n_bytes=1 << 30),), allocate=("embd",))
    run = with_source(workspace(tmp_path, goal), untied(tmp_path / "untied.F16.gguf"))
    with pytest.raises(BadInput, match="stay in main memory"):
        check_allocated(run, goal)


def test_allocate_is_of_runs_with_a_size(cerebellum: Cerebellum, tmp_path: Path) -> None:
    ran = cerebellum("run", tmp_path / "no.gguf", "-o", tmp_path / "run", "--allocate", "head")
    assert ran.code == 2 and "--budget" in ran.complaint
    ran = cerebellum(
        "run", tmp_path / "no.gguf", "-o", tmp_path / "run", "--budget", "1MB", "--allocate", "x"
    )
    assert ran.code == 2 and "--allocate" in ran.complaint


# --- layers for multi-token prediction


def with_mtp(path: Path, counted: bool, named: bool) -> Path:
    """The hybrid with a third layer that predicts further tokens."""
    from tiny import _plain_type, random_tensor

    shapes = hybrid_shapes()
    further = {"attn_norm.weight": (256,), "attn_q.weight": (256, 256), "ffn_gate_exps.weight": (256, 256, 2)}
    shapes |= {f"blk.2.{rest}": shape for rest, shape in further.items()}
    shapes |= {"blk.2.nextn.eh_proj.weight": (512, 256)} if named else {}
    records = [record for record in hybrid_records() if b"block_count" not in record]
    records.append(encode_kv("granitehybrid.block_count", 3, V.UINT32))
    if counted:
        records.append(encode_kv("granitehybrid.nextn_predict_layers", 1, V.UINT32))
    write_gguf(path, records, [random_tensor(n, s, _plain_type(n, s)) for n, s in shapes.items()])
    return path


@pytest.mark.parametrize(("counted", "named"), [(True, True), (True, False), (False, True)])
def test_mtp_layers_are_known_by_metadata_or_by_name_and_protected(
    tmp_path: Path, counted: bool, named: bool
) -> None:
    source = open_source(with_mtp(tmp_path / "mtp.F16.gguf", counted, named))
    assert mtp_layers(source) == (2,)
    groups = make_groups(source)
    of_mtp = [group for group in groups if any(name.startswith("blk.2.") for name in group.tensors)]
    assert of_mtp and all(group.protected and group.name.startswith("mtp:") for group in of_mtp)
    assert all(layer != 2 for group in groups if not group.protected for layer in group.layers)
    assert {"attn_q", "ffn_gate_exps"} <= {group.name for group in groups if not group.protected}


def test_a_model_without_mtp_layers_has_none(tmp_path: Path) -> None:
    assert mtp_layers(open_source(write_hybrid(tmp_path / "m.F16.gguf"))) == ()


def test_mtp_layers_ship_as_the_base_has_them_and_the_card_says_so(tmp_path: Path) -> None:
    model = with_mtp(tmp_path / "mtp.F16.gguf", counted=True, named=True)
    run = with_source(workspace(tmp_path, Limit(max_increase_pct=900.0)), model)
    manifest = run_all(run)
    found = {t.name: t.type for t in read_gguf(run.folder / manifest.result.file).tensors}
    kept = {name for name in found if name.startswith("blk.2.")}
    assert len(kept) == 4 and all(found[name] == run.base.types[name] for name in kept)
    assert found["blk.1.attn_q.weight"] == T.Q2_K, "the same role elsewhere was demoted"
    card = (run.folder / "README.md").read_text()
    assert "multi-token prediction are kept, and not measured" in card and "Q3_K x 3, F32 x 1" in card
