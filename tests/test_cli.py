"""The command line: in order, one line for each trouble, JSON alone on stdout, exit codes that mean it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cerebellum, Finished
from filelock import FileLock
from tiny import Ran, command, is_root, ledger_rows, run_process, tiny_run, write_llama

from cerebellum import encode, imatrix
from cerebellum.folder import RunFolder
from cerebellum.imatrix import Entry
from cerebellum.settings import Limit
from cerebellum.source import open_source

PIPELINE = [
    *("demo", "run", "inspect", "imatrix", "measure", "plan", "build", "verify"),
    *("bench", "card", "compare", "perplexity", "doctor"),
]
NOT_YET = {"bench", "card"}


def test_a_command_loads_only_what_it_needs() -> None:
    """What draws and what integrates takes a second to load, and most commands do neither."""
    heavy = "{'scipy', 'matplotlib', 'jinja2', 'llama_cpp'}"
    code = f"import sys, cerebellum.cli.commands; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_without_arguments_the_pipeline_is_shown_in_order(cerebellum: Cerebellum) -> None:
    ran = cerebellum()
    assert ran.code == 0
    listed = ran.out[ran.out.index("Commands:") :].splitlines()[1:]
    shown = [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "]
    assert [name for name in shown if name in PIPELINE] == [n for n in PIPELINE if n in shown]
    assert set(PIPELINE) - set(shown) <= NOT_YET
    assert "source -> groups -> importance matrix" in " ".join(ran.out.split())


@pytest.mark.parametrize("name", [name for name in PIPELINE if name not in NOT_YET])
def test_every_command_has_help_and_json(cerebellum: Cerebellum, name: str) -> None:
    ran = cerebellum(name, "--help")
    assert ran.code == 0 and "--json" in ran.out and ran.err == ""


# ---- one line for each trouble ----


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Path:
    """A folder of files that no command should take."""
    folder = tmp_path_factory.mktemp("hostile")
    contents = {
        "truncated.gguf": embedded.read_bytes()[:2_000_000],
        "header-only.gguf": embedded.read_bytes()[:5_000],
        "magic.gguf": b"GGML" + embedded.read_bytes()[4:10_000],
        "empty.txt": b"",
        "blank.txt": b" \n\n ",
        "short.txt": b"too short",
        "latin1.txt": "caf\u00e9 ".encode("latin-1") * 500,
        "a-file": b"in the place of a folder",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def troubled(ran: Ran, *named: object) -> str:
    """Exit 2, nothing on stdout, one line of trouble that names what it is about."""
    assert ran.code == 2, (ran.code, ran.err)
    assert ran.out == ""
    line = ran.complaint
    for name in named:
        assert str(name) in line, line
    return line


@pytest.mark.parametrize(
    "name", ["truncated.gguf", "header-only.gguf", "magic.gguf", "missing.gguf", "a-file"]
)
@pytest.mark.parametrize("what", ["inspect", "perplexity", "run", "compare", "imatrix", "plan"])
def test_files_that_are_no_model(
    cerebellum: Cerebellum, hostile: Path, embedded: Path, tmp_path: Path, name: str, what: str
) -> None:
    model = hostile / name
    more = {
        "compare": [embedded],
        "run": ["-o", tmp_path / "run"],
        "imatrix": ["-o", tmp_path / "imatrix.gguf"],
        "plan": ["--measurements", hostile / "short.txt"],
    }
    ran = cerebellum(what, model, *more.get(what, []))
    troubled(ran, model)
    assert len(ran.err.splitlines()) == 1


def test_a_folder_is_no_model(cerebellum: Cerebellum, tmp_path: Path) -> None:
    assert len(cerebellum("inspect", tmp_path).err.splitlines()) == 1
    troubled(cerebellum("inspect", tmp_path), tmp_path)
    troubled(cerebellum("plan", tmp_path), tmp_path, "not a run folder")


@pytest.mark.parametrize("name", ["empty.txt", "blank.txt", "short.txt", "latin1.txt", "missing.txt"])
@pytest.mark.parametrize("option", ["perplexity --text", "imatrix --text", "run --select-text"])
def test_texts_that_are_none(
    cerebellum: Cerebellum, hostile: Path, embedded: Path, tmp_path: Path, name: str, option: str
) -> None:
    what, flag = option.split()
    text = hostile / name
    more = [] if what == "perplexity" else ["-o", tmp_path / "out"]
    ran = cerebellum(what, embedded, flag, text, "--ctx", 64, *more)
    line = troubled(ran, text)
    assert {"empty.txt": "empty", "blank.txt": "empty", "latin1.txt": "UTF-8"}.get(name, "") in line
    assert not (tmp_path / "out" / "imatrix.gguf").exists()


def test_a_bad_report_text_is_seen_before_hours_of_work(
    cerebellum: Cerebellum, hostile: Path, embedded: Path, select_text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    asked = tiny_run(embedded, folder, select_text, hostile / "missing.txt", "--demote", "Q8_0")
    troubled(cerebellum(*asked), hostile / "missing.txt")
    assert not (folder / "imatrix.gguf").exists()


def test_a_bad_preset_is_seen_before_hours_of_work(
    cerebellum: Cerebellum, embedded: Path, select_text: Path, tmp_path: Path
) -> None:
    asked = tiny_run(embedded, tmp_path / "run", select_text, select_text, "--base", "Q9_Z")
    troubled(cerebellum(*asked), "Q9_Z")
    assert not (tmp_path / "run" / "imatrix.gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "--demote", "Q9_Z"], ["Q9_Z", "Q2_K"]),
        (["run", "--max-increase", "lots"], ["--max-increase", "lots"]),
        (["run", "--max-increase", "-3%"], ["--max-increase"]),
        (["run", "--max-increase", "nan"], ["--max-increase"]),
        (["run", "--ctx", "0"], ["--ctx"]),
        (["run", "--ctx", "many"], ["--ctx"]),
        (["run", "--threads", "0"], ["--threads"]),
        (["run", "--chunks", "-1"], ["--chunks"]),
        (["run", "--no-such-option"], ["--no-such-option"]),
        (["perplexity", "--ctx", "7"], ["--ctx"]),
        (["perplexity", "--chunks", "x"], ["--chunks"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_make_no_sense(
    cerebellum: Cerebellum, embedded: Path, tmp_path: Path, arguments: list[str], named: list[str]
) -> None:
    what, *options = arguments
    out = ["-o", tmp_path / "run"] if what == "run" else []
    ran = cerebellum(what, embedded, *out, *options)
    troubled(ran, *named)
    assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_wrong_use(cerebellum: Cerebellum, embedded: Path) -> None:
    troubled(cerebellum("run", embedded), "--out")
    troubled(cerebellum("inspect"), "MODEL")
    troubled(cerebellum("frobnicate"), "frobnicate")
    troubled(cerebellum("inspect", embedded, "surplus"), "surplus")
    troubled(cerebellum("plan", embedded), embedded, "--measurements")


@pytest.mark.parametrize("kind", ["I8", "I32", "Q8_K", "Q8_1", "F64"])
def test_a_type_that_no_weight_can_have(
    cerebellum: Cerebellum, embedded: Path, tmp_path: Path, kind: str
) -> None:
    """`run MODEL --base F16 --demote I8` would end in ggml's abort."""
    ran = cerebellum("run", embedded, "-o", tmp_path / "run", "--base", "F16", "--demote", kind)
    assert ran.code == 2 and kind in ran.complaint and not (tmp_path / "run").exists()


def test_an_unknown_preset(cerebellum: Cerebellum, embedded: Path, select_text: Path, tmp_path: Path) -> None:
    asked = tiny_run(embedded, tmp_path / "run", select_text, select_text, "--base", "Q9_Z")
    troubled(cerebellum(*asked), "Q9_Z", "Q3_K_M")
    table = Path(__file__).parent.parent / "examples" / "granite-4.0-h-small.json"
    troubled(cerebellum("plan", embedded, "--measurements", table, "--base", "Q9_Z"), "Q9_Z", "Q3_K_M")


def test_a_base_file_of_another_model(
    cerebellum: Cerebellum, embedded: Path, select_text: Path, tmp_path: Path
) -> None:
    other = write_llama(tmp_path / "other.gguf", n_embd=192, n_ff=256, layers=1)
    asked = tiny_run(embedded, tmp_path / "run", select_text, select_text, "--base-file", other)
    troubled(cerebellum(*asked), other)


def matrix_for(model: Path, out: Path, columns: int = 0, prefix: str = "") -> Path:
    """An importance matrix of ones; ``columns`` more than fit, names with ``prefix``."""
    entries = {}
    for name, tensor in open_source(model).tensors.items():
        if name.startswith("blk.") and name.endswith("weight") and len(tensor.shape) > 1:
            n_experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
            sums = np.ones((n_experts, tensor.shape[0] + columns), np.float32)
            entries[prefix + name] = Entry(sums=sums, counts=np.ones(n_experts, np.int64))
    imatrix.write(out, entries, "ones", 1, 64)
    return out


def test_an_importance_matrix_of_another_size(
    cerebellum: Cerebellum, embedded: Path, select_text: Path, tmp_path: Path
) -> None:
    wrong = matrix_for(embedded, tmp_path / "wrong.gguf", columns=1)
    asked = tiny_run(embedded, tmp_path / "run", select_text, select_text, "--imatrix", wrong)
    line = troubled(cerebellum(*asked), "importance matrix", "blk.")
    assert "257" in line or "512" in line or "values" in line


def test_an_importance_matrix_of_other_names(
    cerebellum: Cerebellum, embedded: Path, select_text: Path, tmp_path: Path
) -> None:
    wrong = matrix_for(embedded, tmp_path / "wrong.gguf", prefix="other.")
    asked = tiny_run(embedded, tmp_path / "run", select_text, select_text, "--imatrix", wrong)
    troubled(cerebellum(*asked), wrong)


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"no matrix at all"])
def test_an_importance_matrix_that_is_none(
    cerebellum: Cerebellum, embedded: Path, select_text: Path, tmp_path: Path, content: bytes
) -> None:
    wrong = tmp_path / "wrong.dat"
    wrong.write_bytes(content)
    asked = tiny_run(embedded, tmp_path / "run", select_text, select_text, "--imatrix", wrong)
    troubled(cerebellum(*asked), wrong)


def test_a_file_in_place_of_the_run_folder(
    cerebellum: Cerebellum, hostile: Path, embedded: Path, select_text: Path
) -> None:
    ran = cerebellum(*tiny_run(embedded, hostile / "a-file", select_text, select_text))
    troubled(ran, hostile / "a-file", "-o")
    troubled(cerebellum(*tiny_run(embedded, hostile / "a-file" / "run", select_text, select_text)), "-o")
    assert len(ran.err.splitlines()) == 1


@pytest.mark.skipif(is_root(), reason="a mode does not bind root")
def test_a_read_only_folder(
    cerebellum: Cerebellum, embedded: Path, select_text: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    try:
        troubled(cerebellum(*tiny_run(embedded, tmp_path / "run", select_text, select_text)), tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_is_seen_before_any_work(
    cerebellum: Cerebellum, embedded: Path, select_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 10**7, 10**7))
    ran = cerebellum(*tiny_run(embedded, tmp_path / "run", select_text, select_text))
    troubled(ran, tmp_path / "run", "MB are needed", "10 MB are free")
    assert not list((tmp_path / "run").glob("shards/*.gguf"))


def limited(n_bytes: int) -> Any:
    """For preexec_fn: no file may grow beyond, which is what a full disk looks like from inside."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def test_a_disk_that_fills_up_in_the_middle(embedded: Path, select_text: Path, tmp_path: Path) -> None:
    asked = tiny_run(embedded, tmp_path / "run", select_text, select_text)
    ran = run_process(*asked, preexec_fn=limited(1 << 20))
    troubled(ran, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.partial"))


@pytest.mark.parametrize(
    ("cache", "named"),
    [
        pytest.param("0", "ledger.sqlite", id="ledger"),
        pytest.param("1GiB", "may not grow", id="predictions"),
    ],
)
def test_measurements_that_cannot_be_written(
    finished: Finished, tmp_path: Path, cache: str, named: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / "ledger.sqlite").unlink()
    asked = ["measure", finished.arguments[1], "-o", folder, *finished.arguments[4:], "--kld-cache", cache]
    troubled(run_process(*asked, preexec_fn=limited(400_000)), named)


def test_the_folder_of_another_model(
    cerebellum: Cerebellum, finished: Finished, tmp_path: Path, select_text: Path
) -> None:
    other = write_llama(tmp_path / "other.gguf", n_embd=192, n_ff=256, layers=1)
    before = finished.read("settings.json")
    troubled(cerebellum(*tiny_run(other, finished.folder, select_text, select_text)), finished.folder, "-o")
    assert finished.read("settings.json") == before


def test_two_runs_in_one_folder(
    cerebellum: Cerebellum, embedded: Path, select_text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(folder / ".lock"):
        ran = cerebellum(*tiny_run(embedded, folder, select_text, select_text))
    troubled(ran, folder, "-o")
    assert len(ran.err.splitlines()) == 1
    assert not (folder / "settings.json").exists()


# ---- stdout and stderr ----


def test_run_prints_json_alone_on_stdout(finished: Finished) -> None:
    assert set(finished.ran.json) >= {"file", "plan", "verify"}
    made = "importance matrix and second moments" if encode.available() else "importance matrix"
    assert f"{made}: 2 steps" in finished.ran.err
    assert "quantizing" in finished.ran.err and "{" not in finished.ran.err


def test_answers_in_json_and_in_words(
    cerebellum: Cerebellum, embedded: Path, finished: Finished, report_text: Path
) -> None:
    few = ["--text", report_text, "--ctx", 64, "--chunks", 3, "--threads", 2]
    found = cerebellum("perplexity", embedded, *few, "--json").json
    assert set(found) >= {"ppl", "se", "chunks", "tokens", "ctx"}
    assert (found["chunks"], found["tokens"], found["ctx"]) == (3, 3 * 31, 64)
    words = cerebellum("perplexity", embedded, *few)
    assert f"PPL = {found['ppl']:.4f}" in words.out and "perplexity: 3 steps" in words.err

    pair = cerebellum("compare", embedded, finished.gguf, *few, "--json").json
    keys = {"ppl_a", "ppl_b", "delta_pct", "ci_pct", "kld_mean", "kld_ci", "top1_agreement"}
    assert set(pair) >= keys | {"chunks", "tokens", "ctx"}
    assert pair["ppl_a"] == pytest.approx(found["ppl"], rel=1e-9)
    assert 100 * (pair["ppl_b"] / pair["ppl_a"] - 1) == pytest.approx(pair["delta_pct"], rel=1e-6)
    assert pair["kld_mean"] > 0 and pair["ci_pct"][0] <= pair["delta_pct"] <= pair["ci_pct"][1]
    same = cerebellum("compare", embedded, embedded, *few, "--json").json
    assert (same["delta_pct"], same["top1_agreement"]) == (0, 1)
    assert same["kld_mean"] == pytest.approx(0, abs=1e-6)


def test_models_of_different_vocabularies_are_not_compared(
    cerebellum: Cerebellum, embedded: Path, hybrid: Path
) -> None:
    troubled(cerebellum("compare", embedded, hybrid), "tokenizer")


@pytest.mark.parametrize("what", ["perplexity", "compare"])
def test_one_chunk_has_an_answer(
    cerebellum: Cerebellum, embedded: Path, report_text: Path, what: str
) -> None:
    models = [embedded, embedded] if what == "compare" else [embedded]
    ran = cerebellum(what, *models, "--text", report_text, "--ctx", 64, "--chunks", 1, "--json")
    assert ran.code == 0 and ran.json["chunks"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("ctx", [128, 512])
def test_perplexity_is_llama_perplexitys_to_four_decimals(
    cerebellum: Cerebellum, finished: Finished, report_text: Path, ctx: int
) -> None:
    tool = shutil.which("llama-perplexity")
    if tool is None:
        pytest.skip("llama-perplexity is not on the PATH")
    asked = ["-m", finished.gguf, "-f", report_text, "-c", ctx, "-b", ctx, "--chunks", 2, "-t", 2]
    done = subprocess.run([tool, *map(str, asked)], capture_output=True, text=True, check=True)
    theirs = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", done.stdout + done.stderr)
    assert theirs is not None
    few = ["--text", report_text, "--ctx", ctx, "--chunks", 2, "--threads", 2, "--json"]
    ours = cerebellum("perplexity", finished.gguf, *few).json
    assert (f"{ours['ppl']:.4f}", f"{ours['se']:.5f}") == theirs.groups()


def test_doctor_says_ready_or_what_is_missing(cerebellum: Cerebellum) -> None:
    ran = cerebellum("doctor", "--json")
    assert ran.code == (0 if ran.json["ok"] else 1)
    assert ran.json["ok"] == (not ran.json["problems"])
    assert ran.json["llama_cpp"] and ran.json["devices"]


def test_version_and_module() -> None:
    ran = run_process("--version")
    assert ran.code == 0 and ran.out.startswith("cerebellum")


def test_a_reader_that_leaves_is_no_trouble(embedded: Path) -> None:
    asked = command("inspect", embedded, "--json")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(asked, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


# ---- interrupted ----


def started(*asked: object) -> subprocess.Popen[str]:
    """A process that hears SIGINT: what a script starts in the background inherits that it is ignored."""

    def heard() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    return subprocess.Popen(command(*asked), stdout=pipe, stderr=pipe, text=True, preexec_fn=heard)


def test_an_interrupt_is_heard_where_the_tests_themselves_ignore_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = started("--version")
        assert process.wait() == 0
        process.communicate()
        status = Path(f"/proc/{os.getpid()}/status")
        if status.exists():
            sleeper = started("doctor")
            ignored = Path(f"/proc/{sleeper.pid}/status").read_text().split("SigIgn:")[1].split()[0]
            sleeper.kill()
            sleeper.communicate()
            assert not int(ignored, 16) & 1 << (signal.SIGINT - 1)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_130_and_one_line(
    embedded: Path, select_text: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    folder = tmp_path / "run"
    asked = ["measure", *tiny_run(embedded, folder, select_text, select_text, "--chunks", 24)[1:]]
    process = started(*asked)
    try:
        deadline = time.monotonic() + 120
        while len(ledger_rows(folder)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert Ran(code=130, out=out, err=err).complaint.startswith("cerebellum: interrupted")
    assert out == "" and not list(folder.rglob("*.partial"))
    assert len(ledger_rows(folder)) >= 3


def test_an_interrupt_while_the_matrix_is_made_is_130(embedded: Path, tmp_path: Path) -> None:
    """The signal arrives in the callback that llama.cpp calls, as often as not."""
    out = tmp_path / "imatrix.gguf"
    process = started("imatrix", embedded, "-o", out, "--ctx", 64, "--chunks", 2000, "--threads", 2)
    try:
        assert process.stderr is not None
        assert "importance matrix" in process.stderr.readline()
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("cerebellum: interrupted")
    assert not list(tmp_path.iterdir())


def test_settings_are_kept_for_the_stages_that_follow(finished: Finished) -> None:
    kept = RunFolder(finished.folder).settings()
    assert isinstance(kept.goal, Limit) and kept.goal.max_increase_pct == 999.0
    assert kept.ctx == 64 and kept.base == "Q3_K_M" and kept.goal.chunks == 4
    assert os.path.isabs(kept.source) and sys.version_info >= (3, 11)


def test_what_c_libraries_print_stays_off_stdout() -> None:
    """A line written to file descriptor 1 from under Python, as HiGHS does, must not spoil the JSON."""
    program = (
        "import os, sys; from cerebellum.cli import doctor; from cerebellum.cli import commands as cli\n"
        "real = doctor.examine\n"
        "def noisy(folder):\n    os.write(1, b'a line from C\\n'); return real(folder)\n"
        "doctor.examine = noisy; sys.argv = ['cerebellum', 'doctor', '--json']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "python" in json.loads(done.stdout)
    assert "a line from C" in done.stderr
