"""The whole pipeline on the embedded model: artifacts, the file itself, proof that it is checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Cerebellum, Finished
from tiny import split_by_hand, tensors_of, tiny_run, write_llama

from cerebellum.gguf import parse_preset, read_gguf
from cerebellum.ledger import Ledger
from cerebellum.llama.native import LlamaEngine
from cerebellum.llama.presets import preset_types
from cerebellum.shards import shard_tensors
from cerebellum.source import open_source
from cerebellum.texts import load_corpus


def test_the_artifacts_of_the_contract_are_there(finished: Finished) -> None:
    source = finished.read("source.json")
    assert source["architecture"] == "granitehybrid" and source["experts"] > source["experts_used"] >= 2
    assert source["sha256"] == hashlib.sha256(Path(str(finished.arguments[1])).read_bytes()).hexdigest()
    groups = finished.read("groups.json")["groups"]
    assert {"ffn_gate_exps", "ssm_in", "attn_q"} <= {group["name"] for group in groups}
    plan = finished.read("plan.json")
    contract = {"mode", "threshold_pct", "base", "groups", "predicted_delta_pct", "measured_delta_pct"}
    assert contract | {"ci_pct"} <= set(plan) and plan["threshold_pct"] == 999.0
    row = {"name", "tensors", "base_type", "chosen_type", "bytes_saved", "delta_pct", "ci_pct"}
    assert all(row | {"chunks", "verdict"} <= set(group) for group in plan["groups"])
    verified = finished.read("verify.json")
    assert verified["ok"] and all(check["ok"] for check in verified["checks"])
    assert verified["report"]["chunks"] == 3 and not verified["report"]["same_as_selection"]
    assert not list(finished.folder.rglob("*.partial"))


def test_what_was_printed_is_what_was_written(finished: Finished) -> None:
    assert finished.answer["plan"] == finished.read("plan.json")
    assert finished.answer["verify"] == finished.read("verify.json")


def test_the_manifest_names_what_made_what(finished: Finished, select_text: Path, report_text: Path) -> None:
    manifest = finished.read("manifest.json")
    gguf = finished.gguf
    assert gguf.parent == finished.folder and gguf.name == "cerebellum-demo-Cerebellum-Q3_K_M.gguf"
    assert manifest["result"]["sha256"] == hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert manifest["result"]["bytes"] == gguf.stat().st_size
    assert manifest["source"]["sha256"] == finished.read("source.json")["sha256"]
    matrix = finished.folder / "imatrix.gguf"
    assert manifest["imatrix"]["sha256"] == hashlib.sha256(matrix.read_bytes()).hexdigest()
    for name, text in (("selection", select_text), ("report", report_text)):
        content = text.read_bytes().removesuffix(b"\n")
        assert manifest["texts"][name] == hashlib.sha256(content).hexdigest()
    for name, digest in manifest["shards"].items():
        assert hashlib.sha256((finished.folder / "shards" / name).read_bytes()).hexdigest() == digest
    with Ledger(finished.folder / "ledger.sqlite") as ledger:
        assert manifest["ledger_digest"] == ledger.digest()


def test_the_file_is_the_plan_bit_for_bit(finished: Finished) -> None:
    plan, found = finished.read("plan.json"), tensors_of(finished.gguf)
    assert {name: kind for name, (kind, _) in found.items()} == plan["tensor_types"]
    demoted = [group["name"] for group in plan["groups"] if group["chosen_type"] == "Q2_K"]
    assert demoted, "999% should let something through"
    shards = {}
    for path in (finished.folder / "shards").glob("*.gguf"):
        kind = path.name.split(".")[-3]
        shards[path.name.split(".")[0].split("-", 1)[1], kind] = shard_tensors(path)
    for group in plan["groups"]:
        kind = group["chosen_type"]
        for name, data in shards[group["name"], kind].items():
            assert data.tobytes() == found[name][1], name
    assert sum(len(data) for _, data in found.values()) == plan["tensor_bytes"]
    assert plan["base_tensor_bytes"] - plan["bytes_saved"] == plan["tensor_bytes"]


def test_metadata_is_copied_and_names_the_quantization(finished: Finished, embedded: Path) -> None:
    before, after = read_gguf(embedded), read_gguf(finished.gguf)
    changed = {"general.file_type", "general.quantization_version"}
    for key, record in before.kv_records.items():
        assert key in changed or after.kv_records[key] == record, key
    assert after.value("general.file_type") == int(parse_preset("Q3_K_M"))
    assert after.value("general.quantization_version") == 2
    assert after.value("quantize.imatrix.chunks_count") == 2
    assert not any(key.startswith("split.") for key in after.kv_records)
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]


def test_llama_cpp_loads_and_runs_it(finished: Finished, llama_engine: LlamaEngine) -> None:
    tokens = llama_engine.tokenize(finished.gguf, b"The history of the town begins " * 20).tokens[:64]
    with llama_engine.open([finished.gguf], 64) as model:
        assert np.isfinite(model.logits(tokens)).all()


def test_the_report_is_the_perplexity_of_the_file_itself(
    finished: Finished, embedded: Path, report_text: Path, llama_engine: LlamaEngine
) -> None:
    """On the three chunks that the seed draws, by the logits of the finished file opened as anybody opens it."""
    report = finished.read("verify.json")["report"]
    corpus = load_corpus(llama_engine, embedded, report_text, 64)
    drawn = corpus.sample(3, report["seed"])
    assert sorted(drawn) != [0, 1, 2]
    for model, key in ((finished.gguf, "result"), (embedded, "source")):
        with llama_engine.open([model], 64) as opened:
            nll = [_nll(opened.logits(corpus.inputs(chunk)), corpus.targets(chunk)) for chunk in drawn]
        assert np.exp(np.mean(nll)) == pytest.approx(report[key]["ppl"], rel=1e-5)
        assert report[key]["tokens"] == 3 * 31


def _nll(logits_SV: np.ndarray, targets_S: np.ndarray) -> np.ndarray:
    """Returns the NLL of each token, nats."""
    shifted = logits_SV.astype(np.float64) - logits_SV.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(targets_S)), targets_S]


# ---- a second time ----


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    """The finished run, to be spoilt."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    asked = list(finished.arguments)
    asked[asked.index("-o") + 1] = folder
    answer = {**finished.answer, "file": str(folder / finished.gguf.name)}
    return Finished(folder=folder, arguments=asked, ran=finished.ran, answer=answer)


def test_a_second_run_measures_nothing_and_changes_nothing(copied: Finished, cerebellum: Cerebellum) -> None:
    watched = ("plan.json", "verify.json", "measurements.json", copied.gguf.name, "imatrix.gguf")
    before = {name: (copied.folder / name).read_bytes() for name in watched}
    digest = copied.read("manifest.json")["ledger_digest"]
    ran = cerebellum(*copied.arguments, "--json")
    assert ran.code == 0, ran.err
    assert "quantizing" not in ran.err and "importance matrix" not in ran.err
    assert {name: (copied.folder / name).read_bytes() for name in watched} == before
    assert copied.read("manifest.json")["ledger_digest"] == digest
    counts = cerebellum("measure", *copied.arguments[1:], "--json").json
    assert counts["measured"] == 0 and counts["reused"] > 0


def flip(path: Path, tensor: str) -> None:
    """One bit of a quantized tensor's bytes, in the middle."""
    info = read_gguf(path).tensor(tensor)
    raw = bytearray(path.read_bytes())
    raw[info.offset + 3] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("group", ["demoted", "kept"])
def test_verify_sees_one_flipped_bit(copied: Finished, cerebellum: Cerebellum, group: str) -> None:
    plan = copied.read("plan.json")
    tensor = next(n for n, kind in plan["tensor_types"].items() if kind == "Q2_K")
    if group == "kept":
        tensor = "token_embd.weight"
    flip(copied.gguf, tensor)
    ran = cerebellum("verify", copied.folder, "--json")
    assert ran.code == 1, ran.err
    assert not ran.json["ok"]
    bad = [check for check in ran.json["checks"] if not check["ok"]]
    assert [check["name"] for check in bad] == ["tensor bytes"] and tensor in bad[0]["detail"]
    assert cerebellum("build", copied.folder).code == 0
    assert cerebellum("verify", copied.folder).code == 0


def test_verify_of_a_model_that_collapsed_says_no(copied: Finished, cerebellum: Cerebellum) -> None:
    """Not a traceback: the answer is no, with the check's name."""
    info = read_gguf(copied.gguf).tensor("token_embd.weight")
    assert info.type.name == "Q6_K"  # 210 bytes a block, the last two of them its float16 scale
    raw = bytearray(copied.gguf.read_bytes())
    raw[info.offset + 208 : info.offset + 210] = np.float16(np.nan).tobytes()
    copied.gguf.write_bytes(raw)
    ran = cerebellum("verify", copied.folder, "--json")
    assert ran.code == 1
    assert {"tensor bytes", "finite logits"} <= {c["name"] for c in ran.json["checks"] if not c["ok"]}


def test_verify_sees_a_truncated_and_a_missing_file(copied: Finished, cerebellum: Cerebellum) -> None:
    raw = copied.gguf.read_bytes()
    copied.gguf.write_bytes(raw[: len(raw) // 2])
    ran = cerebellum("verify", copied.folder)
    assert ran.code == 2 and copied.gguf.name in ran.complaint
    copied.gguf.unlink()
    assert "cerebellum build" in cerebellum("verify", copied.folder).complaint


def test_with_nothing_tolerant_the_file_is_the_base(
    copied: Finished, cerebellum: Cerebellum, tmp_path: Path
) -> None:
    """Measurements made by hand, everything far over the limit: plan, build and verify by themselves."""
    groups = [row["name"] for row in copied.read("plan.json")["groups"]]
    rows = [{"groups": [name], "type": "Q2_K", "delta_pct": 50.0} for name in groups]
    table = tmp_path / "hopeless.json"
    table.write_text(json.dumps({"measurements": rows}))
    asked = ["plan", copied.folder, "--measurements", table, "--max-increase", "0.001%", "--json"]
    plan = cerebellum(*asked).json
    assert plan["bytes_saved"] == 0 and {row["decision"] for row in plan["groups"]} == {"kept"}
    assert cerebellum("build", copied.folder).code == 0
    assert cerebellum("verify", copied.folder).code == 0
    base = {}
    for path in (copied.folder / "shards").glob("*.base.*.gguf"):
        base |= {name: data.tobytes() for name, data in shard_tensors(path).items()}
    assert {name: data for name, (_, data) in tensors_of(copied.gguf).items()} == base


# ---- other ways in ----


def run(cerebellum: Cerebellum, *asked: object) -> dict:
    ran = cerebellum(*asked, "--json")
    assert ran.code == 0, ran.err
    return ran.json


def test_a_type_that_saves_nothing_leaves_the_base(
    cerebellum: Cerebellum, embedded: Path, select_text: Path, report_text: Path, tmp_path: Path
) -> None:
    asked = tiny_run(embedded, tmp_path / "run", select_text, report_text, "--demote", "Q8_0")
    answer = run(cerebellum, *asked)
    assert {row["verdict"] for row in answer["plan"]["groups"]} == {"nothing to save"}
    types = preset_types(embedded, parse_preset("Q3_K_M"), has_imatrix=True)
    found = tensors_of(Path(answer["file"]))
    assert {name: kind for name, (kind, _) in found.items()} == {n: t.name for n, t in types.items()}
    report = answer["verify"]["report"]
    assert report["base"]["ppl"] == report["result"]["ppl"] and report["delta_pct"] == 0


def test_a_base_that_was_made_already(
    cerebellum: Cerebellum,
    finished: Finished,
    embedded: Path,
    select_text: Path,
    report_text: Path,
    tmp_path: Path,
) -> None:
    """The finished file as the base of the next: its bytes are kept, what saves nothing is not tried."""
    given = ["--base-file", finished.gguf, "--imatrix", finished.folder / "imatrix.gguf"]
    answer = run(cerebellum, *tiny_run(embedded, tmp_path / "run", select_text, report_text, *given))
    before, after = tensors_of(finished.gguf), tensors_of(Path(answer["file"]))
    kept = [row["name"] for row in answer["plan"]["groups"] if row["chosen_type"] == "base"]
    first = {row["name"]: row["chosen_type"] for row in finished.read("plan.json")["groups"]}
    assert {row["verdict"] for row in answer["plan"]["groups"] if first[row["name"]] == "Q2_K"} == {
        "nothing to save"
    }
    for name, (kind, data) in before.items():
        role = name.split(".")[2] if name.startswith("blk.") else name
        if role in kept or not name.startswith("blk."):
            assert after[name] == (kind, data), name
    beside = (tmp_path / "run" / "imatrix.gguf").read_bytes()
    assert beside == (finished.folder / "imatrix.gguf").read_bytes(), "the matrix given, for `reproduce`"


def test_a_split_source_gives_the_same_file(
    cerebellum: Cerebellum,
    finished: Finished,
    embedded: Path,
    select_text: Path,
    report_text: Path,
    tmp_path: Path,
) -> None:
    first, second = split_by_hand(embedded, tmp_path, "cerebellum-demo", 2)
    answer = run(cerebellum, *tiny_run(first, tmp_path / "run", select_text, report_text))
    assert tensors_of(Path(answer["file"])) == tensors_of(finished.gguf)
    assert answer["verify"]["report"]["source"] == finished.answer["verify"]["report"]["source"]
    assert [row["delta_pct"] for row in answer["plan"]["groups"]] == [
        row["delta_pct"] for row in finished.answer["plan"]["groups"]
    ]
    assert not any(key.startswith("split.") for key in read_gguf(answer["file"]).kv_records)
    assert second.exists()


def test_rows_that_take_no_256_are_said_to_be_illegal_and_the_rest_goes_on(
    cerebellum: Cerebellum, select_text: Path, report_text: Path, tmp_path: Path
) -> None:
    """SmolLM2's width of 576: only ffn_down, with rows of 1536, can be Q2_K."""
    model = write_llama(tmp_path / "tiny-576-F16.gguf")
    answer = run(cerebellum, *tiny_run(model, tmp_path / "run", select_text, report_text))
    rows = {row["name"]: row for row in answer["plan"]["groups"]}
    illegal = {name for name, row in rows.items() if row["verdict"] == "illegal"}
    assert illegal == {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"}
    assert all(rows[name]["bytes_saved"] == 0 and rows[name]["delta_pct"] is None for name in illegal)
    assert rows["ffn_down"]["delta_pct"] is not None and answer["verify"]["ok"]
    types = {name: tensor.type.name for name, tensor in open_source(answer["file"], True).tensors.items()}
    assert types["blk.0.attn_q.weight"] not in ("Q2_K", "Q3_K")
    assert Path(answer["file"]).name == "tiny-576-Cerebellum-Q3_K_M.gguf"


def test_one_chunk_is_enough_for_an_answer(
    cerebellum: Cerebellum, embedded: Path, select_text: Path, report_text: Path, tmp_path: Path
) -> None:
    """One chunk has no interval: the artifacts say none, in JSON that others can read."""
    few = ["--chunks", 1, "--report-chunks", 1]
    run(cerebellum, *tiny_run(embedded, tmp_path / "run", select_text, report_text, *few))
