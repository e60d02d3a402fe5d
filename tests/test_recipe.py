"""Recipes: the types of a GGUF read out, for llama-quantize and for a run, and a run of them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
from pathlib import Path

import pytest
from conftest import Cerebellum
from hypothesis import given
from hypothesis import strategies as st
from test_fake_run import workspace
from tiny import hybrid_records, hybrid_shapes, random_tensor, tensors_of, write_hybrid

from cerebellum import open_run
from cerebellum.codec import read_artifact
from cerebellum.errors import BadInput
from cerebellum.gguf import GGMLQuantizationType, read_gguf, write_gguf
from cerebellum.llama.library import LOG, llama
from cerebellum.plan.artifacts import GivenPlan
from cerebellum.recipes.recipe import (
    Recipe,
    Rule,
    parse_spans,
    read_typed,
    recipe_of,
    spans,
    tensor_type_lines,
    write_recipe,
)
from cerebellum.run import run_all
from cerebellum.settings import DEMO_MODEL, Given
from cerebellum.source import Source, open_source

T = GGMLQuantizationType

TRAP = {
    "token_embd.weight": (256, 300),
    **{f"blk.{layer}.ffn_gate.weight": (256, 256) for layer in range(12)},
    **{f"blk.{layer}.ffn_gate_exps.weight": (256, 256, 2) for layer in range(12)},
    **{f"blk.{layer}.attn_norm.weight": (256,) for layer in range(12)},
    "output.weight": (256, 300),
}


def trap(path: Path) -> Source:
    """Twelve layers whose roles begin alike and whose layer numbers hold each other: 1, 10 and 11."""
    odd = {f"blk.{layer}.ffn_gate.weight": T.F32 for layer in (1, 3, 4, 5)}
    special = odd | {"output.weight": T.BF16}
    kinds = {name: special.get(name, T.F32 if "norm" in name else T.F16) for name in TRAP}
    write_gguf(path, hybrid_records(), [random_tensor(n, s, kinds[n]) for n, s in TRAP.items()])
    return open_source(path, allow_requantize=True)


def weights(source: Source) -> dict[str, str]:
    return {name: t.type.name for name, t in source.tensors.items() if "norm" not in name}


@given(st.sets(st.integers(0, 300), min_size=1))
def test_spans_are_read_as_they_are_written(numbers: set[int]) -> None:
    assert parse_spans(spans(numbers)) == sorted(numbers)


@pytest.mark.parametrize("text", ["", "3-1", "a", "1,,2", "-1", "0-99999", "1-2-3", "\u0661"])
def test_spans_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        parse_spans(text)


def test_every_tensor_is_found_by_one_line_alone(tmp_path: Path) -> None:
    source = trap(tmp_path / "trap.gguf")
    lines = [line.split("=") for line in tensor_type_lines(recipe_of(source))]
    assert len(lines) == 5  # embeddings, head, experts in one line, and the two types of ffn_gate
    for name, qtype in weights(source).items():
        found = [wanted for pattern, wanted in lines if re.search(pattern, name)]
        assert found == [qtype.lower()], name
    assert not any(re.search(pattern, f"a.{name}b") for pattern, _ in lines for name in source.tensors)


def test_all_three_forms_say_the_same(tmp_path: Path) -> None:
    source = trap(tmp_path / "trap.gguf")
    forms = [source.path, *write_recipe(recipe_of(source), tmp_path / "out")]
    for path in forms:
        assert read_typed(path).types(source) == weights(source), path
    assert read_artifact(forms[2], Recipe, "").rules == recipe_of(source).rules


def test_the_json_is_short(tmp_path: Path) -> None:
    rules = recipe_of(trap(tmp_path / "trap.gguf")).rules
    assert Rule(name="blk.*.ffn_gate_exps.weight", layers="0-11", type="F16", tensors=12) in rules
    assert Rule(name="blk.*.ffn_gate.weight", layers="1,3-5", type="F32", tensors=4) in rules
    assert sum(rule.tensors for rule in rules) == 26


def test_written_twice_is_the_same_and_nothing_else_is_replaced(tmp_path: Path) -> None:
    recipe = recipe_of(trap(tmp_path / "trap.gguf"))
    first = write_recipe(recipe, tmp_path)
    assert write_recipe(recipe, tmp_path) == first
    first[1].write_text("mine")
    first[0].unlink()
    with pytest.raises(BadInput, match=r"recipe\.json: is there already"):
        write_recipe(recipe, tmp_path)
    assert first[1].read_text() == "mine" and not first[0].exists()


def test_a_name_that_a_type_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    shapes = {"token_embd.weight": (256, 300), "blk.0.Odd_name.weight": (256, 256)}
    source = open_source(write_hybrid(tmp_path / "odd.gguf", shapes))
    with pytest.raises(BadInput, match="lower case"):
        tensor_type_lines(recipe_of(source))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ffn_gate", "line 1: 'ffn_gate' is not EXPRESSION=TYPE"),
        ("\nffn_(=q4_k", "line 2: .* no regular expression"),
        ("ffn_up=q9_z", "unknown tensor type"),
        ("ffn_up=i8", "I8 is no type"),
        ("attn_none=q4_k", "no expression is found"),
        ('{"format": 1}', "has no key"),
        ("\udcff", "neither a GGUF"),
    ],
)
def test_what_is_no_recipe_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInput, match=says):
        read_typed(path).types(trap(tmp_path / "trap.gguf"))


def test_the_first_expression_counts_and_case_does_not(tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    path.write_text("FFN_gate\\.=Q8_0 ffn_gate=q2_k\n")
    types = read_typed(path).types(trap(tmp_path / "trap.gguf"))
    assert types["blk.0.ffn_gate.weight"] == "Q8_0" and types["blk.0.ffn_gate_exps.weight"] == "Q2_K"
    assert "output.weight" not in types


def test_a_recipe_of_another_model_is_refused(tmp_path: Path) -> None:
    trap(tmp_path / "trap.gguf")
    hybrid = open_source(write_hybrid(tmp_path / "hybrid.gguf"))
    with pytest.raises(BadInput, match=r"names blk\.0\.ffn_gate\.weight"):
        read_typed(tmp_path / "trap.gguf").types(hybrid)


# ---- recipes from strangers ----


def written(path: Path, *rules: dict[str, object]) -> Path:
    head = {"format": 1, "made_from": "x", "architecture": "x", "preset": None, "bytes": 0}
    path.write_text(json.dumps(head | {"rules": rules}))
    return path


def gate(**changed: object) -> dict[str, object]:
    return {"name": "blk.*.ffn_gate.weight", "layers": "1,3", "type": "F32", "tensors": 2} | changed


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([gate(), gate(type="Q2_K")], "which another rule does too"),
        ([gate(layers="1,1")], "no span of layers"),
        ([gate(layers=",".join(["0-9999"] * 100_000))], "no span of layers"),
        ([gate(tensors=7)], "names 2 layers and says 7 tensors"),
        ([gate(name="blk.1.ffn_gate.weight")], "one star in its name"),
        ([gate(name="blk.*.*.weight")], "one star in its name"),
        ([], "names no tensor"),
        ([{"name": "blk.0.attn_norm.weight", "type": "Q8_0", "tensors": 1}], "no matrix of weights"),
        ([{"name": "blk.0.attn_norm.weight", "type": "F16", "tensors": 1}], "no matrix of weights"),
    ],
)
def test_rules_that_contradict_each_other_or_the_model_are_one_line(
    tmp_path: Path, rules: list[dict[str, object]], says: str
) -> None:
    with pytest.raises(BadInput, match=says) as refused:
        read_typed(written(tmp_path / "r.json", *rules)).types(trap(tmp_path / "trap.gguf"))
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("pattern", ["([a-z0-9_.]+)+$$x", "(.+.+)+y!", ".*" * 12 + "!", "(.+)+\\1\\1!"])
def test_an_expression_that_never_ends_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setattr("cerebellum.recipes.recipe._MOST_SECONDS", 0.3)
    before = signal.getsignal(signal.SIGVTALRM)
    (tmp_path / "t.txt").write_text(f"{pattern}=q4_k")
    with pytest.raises(BadInput, match="repeats of repeats"):
        read_typed(tmp_path / "t.txt").types(trap(tmp_path / "trap.gguf"))
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    "pattern",
    [
        "blk\\.[[:digit:]]+",
        "(?i)FFN",
        "(?<=blk)x",
        "f{,3}",
        "f++",
        "a{99999999999}",
        "(" * 3000 + "a" + ")" * 3000,
    ],
)
def test_what_llama_quantize_does_not_read_so_is_one_line(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "t.txt").write_text(f"{pattern}=q4_k")
    with pytest.raises(BadInput, match=r"t\.txt: line 1: "):
        read_typed(tmp_path / "t.txt")


def test_what_llama_quantize_leaves_alone_no_expression_changes(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(".*=q4_k")
    source = open_source(write_hybrid(tmp_path / "h.gguf"))
    types = read_typed(tmp_path / "t.txt").types(source)
    assert "blk.0.ssm_in.weight" in types and "blk.0.ffn_gate_inp.weight" not in types
    router = {"name": "blk.0.ffn_gate_inp.weight", "type": "Q8_0", "tensors": 1}
    with pytest.raises(BadInput, match="never quantized by llama"):
        read_typed(written(tmp_path / "r.json", router)).types(source)


def test_what_is_no_file_and_what_is_too_large_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(BadInput, match="is no file"):
            read_typed(path)
    with (tmp_path / "large.json").open("wb") as stream:
        stream.write(b"{")
        stream.truncate(9 << 20)
    with pytest.raises(BadInput, match="8 MiB at most"):
        read_typed(tmp_path / "large.json")


@pytest.mark.parametrize("layer", ["007", "10000", "99999999999999999999"])
def test_a_layer_that_is_written_oddly_is_a_name_like_any_other(tmp_path: Path, layer: str) -> None:
    name = f"blk.{layer}.ffn_up.weight"
    shapes = {"token_embd.weight": (256, 300), name: (256, 256), "blk.7.ffn_up.weight": (256, 256)}
    source = open_source(write_hybrid(tmp_path / "odd.gguf", shapes))
    for path in write_recipe(recipe_of(source), tmp_path / "out"):
        assert read_typed(path).types(source) == {each: "F16" for each in shapes}


def test_a_star_in_a_name_is_one_line(tmp_path: Path) -> None:
    shapes = {"token_embd.weight": (256, 300), "blk.*.ffn_up.weight": (256, 256)}
    with pytest.raises(BadInput, match="a star in the name"):
        recipe_of(open_source(write_hybrid(tmp_path / "odd.gguf", shapes)))


@pytest.mark.parametrize(
    ("types", "more", "says"),
    [
        ({"token_embd.weight": "IQ2_XXS"}, (), "needs an importance matrix"),
        ({"blk.0.attn_norm.weight": "Q4_K"}, (), "is a vector"),
        (
            {"blk.0.u.weight": "Q4_K", "blk.1.u.weight": "Q2_K", "blk.0.u.Q4_K.weight": "Q6_K"},
            ("blk.0.u.weight", "blk.1.u.weight", "blk.0.u.Q4_K.weight"),
            "two groups",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(
    tmp_path: Path, types: dict[str, str], more: tuple[str, ...], says: str
) -> None:
    opened = workspace(tmp_path, Given(recipe="r", types=types))
    write_hybrid(tmp_path / "hybrid.F16.gguf", hybrid_shapes() | dict.fromkeys(more, (256, 256)))
    with pytest.raises(BadInput, match=says):
        run_all(opened)
    assert not opened.engine.scored and not opened.path("settings.json").exists()  # type: ignore[attr-defined]


RECIPE = {
    "token_embd.weight": "Q8_0",
    "blk.0.ffn_gate_exps.weight": "Q2_K",
    "blk.1.ffn_gate_exps.weight": "Q4_K",
    "blk.0.ffn_down_exps.weight": "Q3_K",
    "blk.1.ffn_down_exps.weight": "Q3_K",
    "blk.0.ssm_in.weight": "Q6_K",
}


def test_a_run_gives_every_tensor_its_type_and_measures_the_whole(tmp_path: Path) -> None:
    manifest = run_all(workspace(tmp_path, Given(recipe="mine.json", types=RECIPE, chunks=10)))
    run = open_run(tmp_path / "run")
    plan = run.plan()
    assert isinstance(plan, GivenPlan) and run.verified().ok
    found = {t.name: t.type.name for t in read_gguf(tmp_path / "run" / manifest.result.file).tensors}
    assert {name: found[name] for name in RECIPE} == RECIPE
    assert found["blk.0.ffn_gate_shexp.weight"] == "Q3_K" and found["blk.0.ffn_norm.weight"] == "F32"
    assert manifest.result.bytes == plan.file_bytes
    assert (plan.chunks, plan.of_chunks) == (10, 40)
    assert plan.measured_delta_pct is not None and plan.ci_pct is not None
    assert plan.ci_pct[0] < plan.measured_delta_pct < plan.ci_pct[1] and (plan.kld_mean or 0) > 0
    rows = {row.name: row.decision for row in plan.groups}
    assert rows["ffn_gate_exps.Q2_K"] == "demoted" and rows["ffn_gate_exps.Q4_K"] == "promoted"
    assert rows["ffn_down_exps"] == "kept"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "mine.json" in card and "embeddings, the output head" not in card


def test_the_same_recipe_again_measures_nothing(tmp_path: Path) -> None:
    goal = Given(recipe="mine.json", types=RECIPE, chunks=10)
    run_all(workspace(tmp_path, goal))
    before = (tmp_path / "run" / "plan.json").read_bytes()
    again = workspace(tmp_path, goal)
    scored = again.engine.scored  # type: ignore[attr-defined]
    run_all(again)
    assert (tmp_path / "run" / "plan.json").read_bytes() == before and not scored


def test_the_bases_own_recipe_changes_nothing(tmp_path: Path) -> None:
    types = {name: "Q3_K" for name in RECIPE if "exps" in name}
    run_all(workspace(tmp_path, Given(recipe="base.json", types=types)))
    plan = open_run(tmp_path / "run").plan()
    assert not plan.changes and plan.measured_delta_pct == 0.0


def test_a_type_that_rows_cannot_take_is_refused_before_any_work(tmp_path: Path) -> None:
    shapes = {"token_embd.weight": (96, 300), "blk.0.ssm_in.weight": (96, 64)}
    opened = workspace(tmp_path, Given(recipe="r", types={"blk.0.ssm_in.weight": "Q2_K"}))
    write_hybrid(tmp_path / "hybrid.F16.gguf", shapes)
    with pytest.raises(BadInput, match="rows of 96 cannot be Q2_K"):
        run_all(opened)
    assert not (tmp_path / "run" / "shards").exists()


# ---- llama.cpp itself, and the command line ----


def quantized_types(source: Path, lines: list[str], preset: int) -> dict[str, str]:
    """What llama_model_quantize says that it would write with the lines of a --tensor-type-file."""
    from cerebellum.llama.presets import _LINE

    lib = llama()
    params = lib.llama_model_quantize_default_params()
    params.ftype = preset
    params.dry_run = True
    kind = lib.llama_model_tensor_override
    overrides = (kind * (len(lines) + 1))()
    for place, line in enumerate(lines):
        pattern, _, qtype = line.partition("=")
        overrides[place].pattern = pattern.encode()
        overrides[place].type = int(T[qtype.upper()])
    params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    with LOG.captured() as fragments:
        assert lib.llama_model_quantize(os.fsencode(source), b"", ctypes.byref(params)) == 0
    found = _LINE.finditer("".join(fragments))
    return {match["name"]: (match["target"] or match["source"]).upper() for match in found}


@pytest.mark.parametrize("preset", [12, 15])
def test_llama_quantize_gives_the_types_that_were_read_out(tmp_path: Path, preset: int) -> None:
    """Also where a wanted type is the preset's own default, and for embeddings: of Q3_K_M (12) and Q4_K_M."""
    demo = open_source(DEMO_MODEL)
    ladder = ("Q3_K", "Q4_K", "Q6_K", "Q8_0")
    names = [n for n, t in demo.tensors.items() if n.startswith(("blk", "token")) and t.type == T.F16]
    wanted = {name: ladder[place % 4] for place, name in enumerate(names)}
    rules = tuple(Rule(name=name, type=qtype, tensors=1) for name, qtype in wanted.items())
    recipe = Recipe(made_from="x.gguf", architecture="", preset=None, bytes=0, rules=rules)
    found = quantized_types(DEMO_MODEL, tensor_type_lines(recipe), preset)
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("line", [".*=q4_k", "ffn=q2_k", "ssm=q8_0", "gate=q8_0"])
def test_expressions_are_read_as_llama_quantize_reads_them(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.txt").write_text(line)
    found = quantized_types(DEMO_MODEL, [line], 15)
    ours = read_typed(tmp_path / "t.txt").types(open_source(DEMO_MODEL))
    assert ours and {name: found[name] for name in ours} == ours


def test_the_command_writes_what_a_run_and_a_plan_take(
    cerebellum: Cerebellum, tmp_path: Path, select_text: Path, report_text: Path
) -> None:
    quantized = tmp_path / "demo.Q3_K_M.gguf"
    assert cerebellum("quantize", DEMO_MODEL, "Q3_K_M", "-o", quantized).code == 0
    lines = cerebellum("recipe", quantized).out.splitlines()
    out = cerebellum("recipe", quantized, "-o", tmp_path)
    assert out.code == 0 and (tmp_path / "demo.Q3_K_M.tensor-types.txt").read_text().splitlines() == lines
    assert cerebellum("recipe", quantized, "--json").json["preset"] == "Q3_K_M"
    recipe = tmp_path / "demo.Q3_K_M.recipe.json"
    planned = cerebellum("plan", DEMO_MODEL, "--recipe", recipe, "--base", "Q4_K_M", "--json").json
    assert planned["mode"] == "given" and planned["bytes_saved"] > 0
    texts = ("--select-text", select_text, "--report-text", report_text)
    few = ("--ctx", 64, "--chunks", 4, "--imatrix-chunks", 2, "--report-chunks", 3, "--threads", 2)
    asked = ("--recipe", quantized, "--base", "Q2_K", *texts, *few)
    ran = cerebellum("run", DEMO_MODEL, "-o", tmp_path / "run", *asked, "--json")
    assert ran.code == 0 and ran.json["plan"]["chunks"] == 4
    wanted = {name: qtype for name, (qtype, _) in tensors_of(quantized).items()}
    assert {name: qtype for name, (qtype, _) in tensors_of(Path(ran.json["file"])).items()} == wanted


def test_a_recipe_and_a_size_exclude_each_other(cerebellum: Cerebellum, tmp_path: Path) -> None:
    both = ("--recipe", DEMO_MODEL, "--budget", "Q3_K_M")
    assert "--recipe and --budget" in cerebellum("run", DEMO_MODEL, "-o", tmp_path / "r", *both).complaint
    assert "--recipe and --max-increase" in (
        cerebellum("plan", DEMO_MODEL, "--recipe", DEMO_MODEL, "--max-increase", "2%").complaint
    )
