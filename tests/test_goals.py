"""What is asked for is one goal, parsed at the door: no option is ignored, no size is wrong in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cerebellum

from cerebellum.base import base_for
from cerebellum.codec import read_artifact
from cerebellum.errors import BadInput
from cerebellum.settings import Budget, Bytes, Gpu, Limit, Preset, Settings
from cerebellum.workspace import Workspace


@pytest.mark.parametrize(
    ("sizes", "base"),
    [
        (("Q2_K",), "Q2_K"),
        (("IQ3_XXS",), "Q2_K"),
        (("IQ2_M",), "Q2_K"),
        (("Q3_K_S",), "Q3_K_S"),
        (("IQ3_M",), "Q3_K_S"),
        (("Q3_K_M",), "Q3_K_M"),
        (("Q6_K",), "Q3_K_M"),
        (("Q2_K", "Q4_K_M"), "Q3_K_M"),
    ],
)
def test_the_base_of_one_size_is_no_larger_than_a_preset_of_that_size(
    sizes: tuple[str, ...], base: str
) -> None:
    assert base_for(Budget(sizes=tuple(Preset(name=name) for name in sizes))) == base
    assert base_for(Budget(sizes=(Bytes(n_bytes=6_000_000),))) == base_for(Limit()) == "Q3_K_M"


@pytest.mark.parametrize(
    ("flags", "base"),
    [
        (("--budget", "Q2_K"), "Q2_K"),
        (("--budget", "Q2_K", "--base", "Q4_K_M"), "Q4_K_M"),
        (("--budget", "6MB"), "Q3_K_M"),
        (("--max-increase", "2%"), "Q3_K_M"),
    ],
)
def test_a_run_has_that_base_unless_another_is_named(
    cerebellum: Cerebellum,
    embedded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    base: str,
) -> None:
    def stopped(workspace: Workspace, _request: object) -> None:
        raise BadInput(f"the base is {workspace.settings.base}")

    monkeypatch.setattr("cerebellum.run.run_all", stopped)
    assert f"the base is {base}" in cerebellum("run", embedded, "-o", tmp_path / "run", *flags).complaint


@pytest.mark.parametrize("flags", [(), ("--base", "Q3_K_M")])
def test_a_plan_from_a_table_has_the_base_that_tables_are_of(
    cerebellum: Cerebellum, embedded: Path, flags: tuple[str, ...]
) -> None:
    table = Path(__file__).parent.parent / "docs" / "demo" / "measurements.json"
    ran = cerebellum("plan", embedded, "--measurements", table, "--budget", "Q2_K", *flags, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["base"] == "Q3_K_M"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--budget", "Q3_K_M", "--max-increase", "2%"), ("--budget", "--max-increase")),
        (("--budget", "13GiB", "--demote", "Q2_K"), ("--budget", "--demote")),
        (("--budget", "13GiB", "--alpha", "0.1"), ("--budget", "--alpha")),
        (("--budget", "13GiB", "--chunks", "4"), ("--budget", "--chunks")),
        (("--fit", "24GiB", "--max-chunks", "4"), ("--fit", "--max-chunks")),
        (("--fit", "24GiB", "--budget", "13GiB"), ("--fit", "--budget")),
        (("--types", "Q2_K"), ("--types", "--budget")),
        (("--no-zoom",), ("--zoom", "--budget")),
        (("--context", "8192"), ("--context", "--fit")),
        (("--chunks", "4", "--max-chunks", "8"), ("--chunks", "--max-chunks")),
    ],
)
def test_an_option_of_the_other_goal_is_refused_and_both_are_named(
    cerebellum: Cerebellum, embedded: Path, tmp_path: Path, flags: tuple[str, ...], named: tuple[str, str]
) -> None:
    ran = cerebellum("run", embedded, "-o", tmp_path / "run", *flags)
    assert ran.code == 2
    assert all(flag in ran.complaint for flag in named), ran.err
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--budget", "12GiBB"), "neither a size"),
        (("--budget", ""), "neither a size"),
        (("--budget", "Q9_Z"), "neither a size"),
        (("--fit", "24"), "24GiB?"),
        (("--fit", "much"), "size"),
        (("--seed", "-1"), "--seed"),
        (("--base", "Q9_Z"), "Q9_Z"),
        (("--demote", "I8"), "I8"),
    ],
)
def test_a_wrong_size_is_refused_before_any_text_is_read(
    cerebellum: Cerebellum, tmp_path: Path, flags: tuple[str, ...], told: str
) -> None:
    """The model does not even exist: nothing was opened when the size was refused."""
    ran = cerebellum("run", tmp_path / "no.gguf", "-o", tmp_path / "run", *flags)
    assert ran.code == 2 and told in ran.complaint, ran.err


def written(tmp_path: Path, goal: Limit | Budget) -> Path:
    from cerebellum.codec import write_artifact

    path = tmp_path / "settings.json"
    write_artifact(path, Settings(source=Path("/m.gguf"), goal=goal))
    return path


@pytest.mark.parametrize(
    "goal",
    [
        Limit(max_increase_pct=5.0, chunks=3),
        Budget(sizes=(Bytes(n_bytes=7),), types=("Q2_K", "Q4_K")),
        Budget(sizes=(Preset(name="Q3_K_M"),), zoom=False),
        Budget(sizes=(Gpu(n_bytes=24 << 30, context=32768),)),
    ],
)
def test_settings_come_back_as_they_were_written(tmp_path: Path, goal: Limit | Budget) -> None:
    found = read_artifact(written(tmp_path, goal), Settings, "again")
    assert found == Settings(source=Path("/m.gguf"), goal=goal)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ctx": "512"}, "ctx: wanted int, got str"),
        ({"ctxx": 512}, "unknown key 'ctxx'"),
        ({"format": 1}, "format 1, this version reads format 3"),
        ({"goal": {"goal": "hope"}}, "goal.goal"),
        ({"goal": []}, "goal: wanted object, got array"),
        ({"source": None}, "source"),
    ],
)
def test_settings_that_were_tampered_with_are_named(
    tmp_path: Path, cerebellum: Cerebellum, change: dict[str, object], told: str
) -> None:
    path = written(tmp_path, Limit())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    ran = cerebellum("build", tmp_path)
    assert ran.code == 2 and told in ran.complaint and str(path) in ran.complaint


@pytest.mark.parametrize("content", ["[]", "{}", "3", "null", '"x"', "[" * 5000])
@pytest.mark.parametrize("name", ["plan.json", "source.json", "settings.json"])
def test_any_other_json_is_one_line(
    tmp_path: Path, cerebellum: Cerebellum, embedded: Path, name: str, content: str
) -> None:
    settings = Settings(source=embedded)
    from cerebellum.codec import write_artifact

    write_artifact(tmp_path / "settings.json", settings)
    (tmp_path / name).write_text(content)
    for command in ("build", "verify", "card"):
        ran = cerebellum(command, tmp_path)
        assert ran.code == 2 and "Traceback" not in ran.err and ran.complaint, (command, ran.err)


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity"])
def test_a_number_that_json_has_not_is_one_line(tmp_path: Path, number: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"format": 2, "source": "a.gguf", "seed": ' + number + "}")
    with pytest.raises(BadInput, match=f"{path}: not JSON .{number} is no number"):
        read_artifact(path, Settings, "make it again")
