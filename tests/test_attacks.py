"""What an attack on the program found: hostile models, names, terminals and disks, each now one line or no harm."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Cerebellum
from odd_gguf import any_kv
from test_fake_run import damage, workspace
from tiny import command, hybrid_shapes, ledger_rows, random_tensor, run_process, write_hybrid, write_llama

from cerebellum import files
from cerebellum.base import file_base
from cerebellum.cli import tables
from cerebellum.engine.fake import FakeEngine
from cerebellum.errors import AnswerIsNo, BadInput, visible
from cerebellum.gguf import GGMLQuantizationType, GGUFValueType, encode_kv, read_gguf, write_gguf
from cerebellum.ledger import Ledger, SeriesKey
from cerebellum.llama.guard import check_contents, try_opening
from cerebellum.page.templates import render_html
from cerebellum.run import card_stage, check, run_all, way_of
from cerebellum.settings import Limit
from cerebellum.source import open_source
from cerebellum.units import parse_size, size

T = GGMLQuantizationType
HOSTILE = "a\x1b[2J\u202eb\x9b[red][/b]"


# ---- models that llama.cpp ends the process over ----


def model(path: Path, kinds: dict[str, T], more: tuple[bytes, ...] = ()) -> Path:
    """The hybrid's header with some tensors of another type and some metadata more."""
    source = open_source(write_hybrid(path.with_suffix(".seed")), allow_requantize=True)
    records = [*source.kv_records.values()]
    changed = {record[8 : 8 + struct.unpack_from("<Q", record)[0]]: record for record in (*records, *more)}
    tensors = []
    for name, shape in hybrid_shapes().items():
        kind = kinds.get(name, source.tensors[name].type)
        n_bytes = int(np.prod(shape)) * {T.F64: 8, T.I8: 1, T.I32: 4, T.F32: 4}.get(kind, 2)
        tensor = random_tensor(name, shape, T.F16)
        tensors.append(
            type(tensor)(name=name, shape=shape, type=kind, chunks=lambda n=n_bytes: [bytes(n)])  # type: ignore[misc]
        )
    write_gguf(path, list(changed.values()), tensors)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("output_norm.weight", T.F16),
        ("blk.0.attn_norm.weight", T.BF16),
        ("blk.1.ffn_norm.weight", T.I32),
        ("blk.1.attn_q.weight", T.I8),
        ("blk.1.attn_q.weight", T.I32),
        ("token_embd.weight", T.F64),
    ],
)
def test_a_type_that_llama_cpp_cannot_bear_is_refused_by_the_header(
    tmp_path: Path, name: str, kind: T
) -> None:
    source = open_source(model(tmp_path / "m.gguf", {name: kind}), allow_requantize=True)
    with pytest.raises(BadInput, match="convert the model again") as refused:
        check_contents(source)
    assert name in str(refused.value) and kind.name in str(refused.value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (encode_kv("granitehybrid.block_count", 1000, GGUFValueType.UINT32), "block_count is 1,000"),
        (encode_kv("granitehybrid.expert_count", 1000, GGUFValueType.UINT32), "expert_count is 1,000"),
        (encode_kv("granitehybrid.rope.scaling.type", "wild", GGUFValueType.STRING), "rope.scaling.type"),
    ],
)
def test_a_number_that_llama_cpp_cannot_bear_is_refused_by_the_header(
    tmp_path: Path, record: bytes, said: str
) -> None:
    source = open_source(model(tmp_path / "m.gguf", {}, (record,)), allow_requantize=True)
    with pytest.raises(BadInput, match=said):
        check_contents(source)


def test_what_is_good_passes(tmp_path: Path, embedded: Path) -> None:
    check_contents(open_source(model(tmp_path / "m.gguf", {}), allow_requantize=True))
    check_contents(open_source(embedded))


def test_the_first_opening_is_in_a_process_of_its_own_and_says_the_first_reason(tmp_path: Path) -> None:
    """The hybrid's header lacks tensors that llama.cpp wants: its first error names one, its last does not."""
    path = write_hybrid(tmp_path / "m.gguf")
    with pytest.raises(BadInput) as refused:
        try_opening(path, path.stat().st_size)
    assert "llama.cpp" in str(refused.value) and "failed to load model" not in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_an_abort_of_llama_cpp_itself_ends_that_process_and_not_this_one(tmp_path: Path) -> None:
    """A norm in F16, past the look at the header: ggml aborts on it."""
    good = open_source(write_llama(tmp_path / "good.gguf"))
    norm = "blk.0.attn_norm.weight"
    shape = good.tensors[norm].shape
    tensors = [random_tensor(n, t.shape, T.F16 if n == norm else t.type) for n, t in good.tensors.items()]
    write_gguf(tmp_path / "bad.gguf", list(good.kv_records.values()), tensors)
    try_opening(good.path, good.n_bytes)
    with pytest.raises(BadInput, match=r"ends its process over it \(SIGABRT\): .*f16"):
        try_opening(tmp_path / "bad.gguf", shape[0])


def test_an_abort_in_that_process_is_a_line_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Python that logs two errors and aborts, as llama.cpp does."""
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/sh\necho 'said: llama_model_load: error loading model: wrong shape for x' >&2\n"
        "echo 'said: load: failed to load model' >&2\nkill -ABRT $$\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(BadInput, match=r"\(SIGABRT\): wrong shape for x$"):
        try_opening(tmp_path / "m.gguf", 1)


def test_a_source_that_the_run_has_opened_is_not_tried_again(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=1.0, chunks=2))
    tried: list[str] = []
    opened._admit = lambda source: tried.append(source.name)
    opened.admit_models()
    assert len(tried) == 1
    opened.folder.mkdir()
    opened.write_source()
    opened.admit_models()
    assert len(tried) == 1


def test_more_threads_than_ggml_takes_are_refused(cerebellum: Cerebellum, embedded: Path) -> None:
    ran = cerebellum("perplexity", embedded, "--threads", 100_000)
    assert ran.code == 2 and "--threads" in ran.complaint


# ---- late failures ----


def test_a_base_that_is_not_quantized_is_refused_at_the_start(tmp_path: Path) -> None:
    source = open_source(write_hybrid(tmp_path / "hybrid.F16.gguf"))
    other = write_hybrid(tmp_path / "base.F16.gguf")
    with pytest.raises(BadInput, match="is not quantized"):
        file_base(source, other)


def test_a_header_that_no_card_can_show_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=1.0, chunks=2))

    def broken(metadata: object) -> None:
        raise TypeError("'int' object is not iterable")

    monkeypatch.setattr("cerebellum.card.frontmatter._license", broken)
    with pytest.raises(BadInput, match="cannot be shown on a card"), opened.locked():
        check(opened, way_of(opened.settings.goal))
    assert opened.engine.scored == {} and not opened.folder.exists()  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [5, True, 0.5, "en"])
def test_languages_of_any_type_pass_the_rehearsal(tmp_path: Path, value: object) -> None:
    from cerebellum.card.rehearsal import rehearse

    opened = workspace(tmp_path, Limit())
    kind = {int: GGUFValueType.UINT32, bool: GGUFValueType.BOOL, float: GGUFValueType.FLOAT32}
    record = any_kv("general.languages", value, kind.get(type(value), GGUFValueType.STRING))
    file = opened.source.files[0]
    file.kv_records["general.languages"] = record
    rehearse(opened)


def test_a_card_that_fails_does_not_fail_a_run_whose_file_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=1.0, chunks=2))
    run = sys.modules["cerebellum.run"]
    monkeypatch.setattr(run, "rehearse", lambda workspace: None)

    def broken(folder: Path, repo: str | None = None) -> None:
        raise ZeroDivisionError("in a chart")

    monkeypatch.setattr(run, "card_stage", broken)
    manifest = run_all(opened)
    assert opened.path(manifest.result.file).exists() and opened.artifacts.verified().ok
    assert any("ZeroDivisionError" in note and "cerebellum card" in note for note in opened.reporter.notes)  # type: ignore[attr-defined]
    assert tables.card_line(opened.folder) == "no card was made"
    assert card_stage(opened.folder)[0].exists()


# ---- words and terminals ----


def test_what_acts_on_a_terminal_is_written_out() -> None:
    assert visible("a\x1b[2J\x9b\u202e\u2066\x00b") == r"a\x1b[2J\x9b\u202e\u2066\x00b"
    assert visible("größe 漢字 ±") == "größe 漢字 ±"
    assert str(BadInput(f"{HOSTILE}\n: no")).isprintable() and str(AnswerIsNo(HOSTILE)).isprintable()


def test_text_from_outside_is_never_markup_and_never_acts() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(f"[bold]{tables.shown('x [v2] [red] a[/b]')}[/] {tables.shown(HOSTILE)}")
        assert console.export_text().strip() == r"x [v2] [red] a[/b] a\x1b[2J\u202eb\x9b[red][/b]"


def test_a_model_in_a_folder_with_brackets_is_named_as_it_is(
    embedded: Path, tmp_path: Path, select_text: Path
) -> None:
    folder = tmp_path / "x [v2] [red]" / "a[/b]"
    folder.mkdir(parents=True)
    out = folder / "m.gguf"
    ran = run_process("imatrix", embedded, "-o", out, "--text", select_text, "--ctx", 64, "--chunks", 1)
    assert ran.code == 0, ran.err
    assert str(out) in ran.out


def test_the_line_for_llama_server_is_one_word_to_a_shell() -> None:
    line = tables.run_instructions(Path("/a b/$(touch x)/m.gguf"))
    assert line.startswith("llama-server -m '/a b/$(touch x)/m.gguf' -c")


def test_the_report_holds_no_escape_of_a_models_name() -> None:
    from cerebellum.page.templates import _html

    made = _html().from_string("{{ name }} {{ name | code }}").render(name=HOSTILE)
    assert "\x1b" not in made and "\u202e" not in made and "\x9b" not in made and render_html


STREAMS: dict[str, Callable[[list[str]], str]] = {
    "closed": lambda asked: f"{_quoted(asked)} >&-",
    "all closed": lambda asked: f"{_quoted(asked)} <&- >&- 2>&-",
    "head": lambda asked: f"set -o pipefail; {_quoted(asked)} | head -1",
    "ascii": lambda asked: f"PYTHONIOENCODING=ascii {_quoted(asked)}",
}


def _quoted(asked: list[str]) -> str:
    import shlex

    return shlex.join(asked)


@pytest.mark.parametrize("how", STREAMS)
def test_a_stdout_that_is_not_there_is_no_traceback(how: str, embedded: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", STREAMS[how](command("inspect", embedded))], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_stdout_is_one_line(more: list[str], embedded: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command("inspect", embedded), *more], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "stdout" in done.stderr, (
        done.stderr
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("--alpha", "nan"),
        ("--alpha", "0"),
        ("--budget", "9" * 400),
        ("--budget", "9" * 30 + "GiB"),
        ("-o", ""),
        ("--imatrix", ""),
        ("--max-increase", "nan"),
    ],
)
def test_a_value_that_is_none_is_one_line(
    cerebellum: Cerebellum, tmp_path: Path, flags: tuple[str, str]
) -> None:
    ran = cerebellum("run", tmp_path / "no.gguf", "-o", tmp_path / "run", *flags)
    assert ran.code == 2 and flags[0] in ran.complaint and "no.gguf" not in ran.complaint, ran.err


def test_sizes_say_something() -> None:
    assert size(24) == "24 B" and parse_size("24") == 24
    with pytest.raises(ValueError, match="more bytes than any disk"):
        parse_size("9" * 400)


# ---- the disk ----


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    (tmp_path / "out.gguf.partial").symlink_to(mine)
    names: list[str] = []
    real = files.DISK.create

    def create(path: Path) -> object:
        names.append(path.name)
        return real(path)

    files.DISK.create = create  # type: ignore[method-assign, assignment]
    try:
        for _ in range(2):
            files.atomic_write_bytes(tmp_path / "out.gguf", b"theirs")
    finally:
        del files.DISK.create  # type: ignore[attr-defined]
    assert mine.read_bytes() == b"mine" and (tmp_path / "out.gguf").read_bytes() == b"theirs"
    assert len(set(names)) == 2 and all(files.is_partial(name) for name in names)
    planted = tmp_path / "planted"
    planted.symlink_to(mine)
    with pytest.raises(FileExistsError):
        files.DISK.create(planted)


def test_what_a_killed_writer_left_is_removed_under_the_lock_and_nothing_else(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit())
    (opened.folder / "shards").mkdir(parents=True)
    left = opened.folder / "shards" / f"01-x.gguf.{'a' * 16}.partial"
    mine = opened.folder / "notes.partial"
    for path in (left, mine):
        path.write_bytes(b"x")
    with opened.locked():
        assert not left.exists() and mine.exists()


def test_a_folder_that_is_removed_while_a_file_is_written_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(BadInput, match="does not exist"), files.atomic_writer(folder / "a") as stream:
        stream.write(b"x")
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.mark.parametrize("blob", [b"", b"abc", b"\0" * 12, "text", None])
def test_a_measurement_of_the_wrong_length_is_one_line(tmp_path: Path, blob: object) -> None:
    import sqlite3

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        series = ledger.series(SeriesKey(variant="v", text="t", ctx=8, engine="e"))
        for chunk in range(2):
            ledger.record(series, chunk, np.ones(4))
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        database.execute("UPDATE chunk SET nll = ? WHERE chunk = 1", (blob if blob is not None else 7,))
    with Ledger(tmp_path / "ledger.sqlite") as ledger, pytest.raises(BadInput, match="is damaged"):
        ledger.nll(series, [0, 1])


def test_the_fuzzer_finds_nothing() -> None:
    """A few hundred of what `python -m tests.fuzz --n 100000` tries."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *(part for part in sys.path if part)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--n", "1500", "--seed", "3"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- kills ----

KILLED = """
import sys; sys.path.insert(0, {tests!r})
import faults
from pathlib import Path
kind = faults.CASES[{goal!r}]
case = kind.__new__(kind)  # without the undisturbed run that a new one makes
case.folder = Path({folder!r})
case.prepare()
print("ready", flush=True)
case.act(Path({out!r}))
"""


@pytest.mark.parametrize("goal", ["limit", "budget"])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(goal: str, tmp_path: Path) -> None:
    """Five kills on the way to one result; a step of the disk is the clock, so that a busy machine changes nothing."""
    rng = np.random.default_rng(5)
    out, whole = tmp_path / "killed", tmp_path / "whole"
    texts = {"tests": str(Path(__file__).parent), "folder": str(tmp_path), "goal": goal}
    assert _run(KILLED.format(**texts, out=str(whole)), None) == 0
    before: dict[object, bytes] = {}
    for _ in range(5):
        code = _run(KILLED.format(**texts, out=str(out)), float(rng.uniform(0.0, 0.5)))
        assert code in (0, -9)
        rows = ledger_rows(out) if (out / "ledger.sqlite").exists() else {}
        assert {key: rows[key] for key in before} == before  # type: ignore[index]
        before = dict(rows)
    assert _run(KILLED.format(**texts, out=str(out)), None) == 0
    assert ledger_rows(out) == ledger_rows(whole)
    (made,) = out.glob("*-Cerebellum-*.gguf")
    assert made.read_bytes() == (whole / made.name).read_bytes()
    assert not list(out.rglob("*.partial")) and read_gguf(made) and FakeEngine(damage=damage)


def _run(program: str, seconds: float | None) -> int:
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    return process.returncode


def test_half_of_a_surrogate_pair_is_one_line(tmp_path: Path) -> None:
    """Found by the fuzzer: JSON can name what UTF-8 cannot hold."""
    from cerebellum.codec import read_artifact
    from cerebellum.settings import Settings

    path = tmp_path / "settings.json"
    path.write_text('{"format": 3, "source": "/m.gguf", "\\ud800": 1}')
    with pytest.raises(BadInput, match="no Unicode"):
        read_artifact(path, Settings, "again")


@pytest.mark.parametrize("value", [5, "text"])
def test_an_importance_matrix_with_metadata_of_other_types_is_read(tmp_path: Path, value: object) -> None:
    """Found by the fuzzer: the names of texts and the count of chunks are for people only."""
    from cerebellum import imatrix

    path = tmp_path / "imatrix.gguf"
    entry = imatrix.Entry(sums=np.ones((1, 8), np.float32), counts=np.array([3]))
    imatrix.write(path, {"blk.0.attn_q.weight": entry}, "text.txt", 3, 8)
    kind = GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.STRING
    changed = {key: encode_kv(key, value, kind) for key in ("imatrix.datasets", "imatrix.chunk_count")}  # type: ignore[arg-type]
    file = read_gguf(path)
    tensors = [
        type(random_tensor("x", (8,), T.F32))(
            name=t.name,
            shape=t.shape,
            type=t.type,
            chunks=lambda t=t: [file.data(t)],  # type: ignore[misc]
        )
        for t in file.tensors
    ]
    write_gguf(tmp_path / "odd.gguf", list((file.kv_records | changed).values()), tensors)
    found = imatrix.read(tmp_path / "odd.gguf")
    assert found.datasets == () and found.chunk_count == (5 if value == 5 else 0)
