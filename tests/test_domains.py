"""Texts of several domains: read apart, measured together, told one by one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Cerebellum
from msgspec.structs import replace
from run_folder import verify, write_run_folder
from test_fake_run import damage
from tiny import Recorder, ledger_rows, small_text, write_hybrid

from cerebellum import open_run
from cerebellum.build import output_path
from cerebellum.card.domains import across_domains, domain_cells, over_in_some
from cerebellum.card.stage import make_card
from cerebellum.cli.commands import cli
from cerebellum.cli.options import COME_ALONG, named_texts, settle_texts, source_options
from cerebellum.codec import read_artifact
from cerebellum.engine.fake import FakeEngine
from cerebellum.errors import BadInput
from cerebellum.gguf import read_gguf
from cerebellum.progress import Silent
from cerebellum.recipes.reproduce import SAME, Reproduction, reproduce
from cerebellum.run import check_output, run_all, verify_stage
from cerebellum.settings import (
    DOMAINS,
    REPORT_TEXT,
    SELECTION_TEXT,
    Budget,
    Domain,
    Goal,
    Limit,
    Preset,
    Settings,
    shipped_domains,
)
from cerebellum.texts import Corpus, load_corpora, load_corpus, read_text
from cerebellum.verify import Divergence, DomainReport, Measured
from cerebellum.workspace import Workspace

CTX = 32
N_CHUNKS = {"code": 5, "prose": 20, "tables": 9}


def texts(folder: Path, seed: int) -> tuple[Domain, ...]:
    """Three texts, each a few tokens longer than whole chunks."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, (name, n_chunks) in enumerate(N_CHUNKS.items()):
        path = folder / f"{name}-{seed}.txt"
        path.write_bytes(small_text(n_chunks * CTX + 7, seed * 10 + number))
        found.append(Domain(name=name, path=path))
    return tuple(found)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_hybrid(tmp_path / "hybrid.F16.gguf")


@pytest.fixture
def corpus(tmp_path: Path, model: Path) -> Corpus:
    return load_corpora(FakeEngine(damage=damage), model, texts(tmp_path, 1), CTX)


def test_no_chunk_has_tokens_of_two_domains(tmp_path: Path, model: Path, corpus: Corpus) -> None:
    assert [(part.domain, len(part.chunks)) for part in corpus.parts] == list(N_CHUNKS.items())
    engine = FakeEngine(damage=damage)
    for text, part in zip(texts(tmp_path, 1), corpus.parts, strict=True):
        alone = load_corpus(engine, model, text.path, CTX)
        assert np.array_equal(corpus.tokens_NT[part.chunks.start : part.chunks.stop], alone.tokens_NT)
        assert part.sha256 == alone.sha256
    assert corpus.n_chunks == sum(N_CHUNKS.values())
    assert corpus.name == "code + prose + tables"


def test_any_beginning_is_of_all_domains(corpus: Corpus) -> None:
    code, prose, tables = (part.chunks.start for part in corpus.parts)
    assert corpus.first(7) == (code, prose, tables, code + 1, prose + 1, tables + 1, code + 2)
    everything = corpus.first(corpus.n_chunks)
    assert sorted(everything) == list(range(corpus.n_chunks))
    assert everything[-1] == prose + 19


def test_a_sample_is_drawn_from_all_of_every_domain(corpus: Corpus) -> None:
    """Equally likely chunks, of the domains in turn, and a larger sample goes on where a smaller one ends."""
    seen: list[int] = []
    for seed in range(300):
        few, many = corpus.sample(6, seed), corpus.sample(20, seed)
        assert many[:6] == few and len(set(many)) == 20
        assert [sum(chunk in part.chunks for chunk in few) for part in corpus.parts] == [2, 2, 2]
        seen += few
    counts = np.bincount(seen, minlength=corpus.n_chunks)
    for part in corpus.parts:
        expected = 600 / len(part.chunks)
        off = counts[part.chunks.start : part.chunks.stop] - expected
        assert float((off**2).sum()) / expected < 3 * len(part.chunks)  # chi-square
    assert sorted(corpus.sample(corpus.n_chunks, 1)) == list(range(corpus.n_chunks))
    assert corpus.sample(6, 1) != corpus.sample(6, 2)


def test_one_text_is_read_as_ever(tmp_path: Path, model: Path) -> None:
    text = texts(tmp_path, 1)[1]
    engine = FakeEngine(damage=damage)
    alone = load_corpora(engine, model, [text], CTX)
    assert alone.parts == ()
    assert alone.sha256 == load_corpus(engine, model, text.path, CTX).sha256
    assert alone.first(3) == (0, 1, 2)


def test_a_text_of_any_domain_that_cannot_be_read_is_named(tmp_path: Path, model: Path) -> None:
    missing = Domain(name="chat", path=tmp_path / "chat.txt")
    with pytest.raises(BadInput, match=r"chat.txt: cannot be read"):
        load_corpora(FakeEngine(damage=damage), model, (*texts(tmp_path, 1), missing), CTX)


def workspace(folder: Path, goal: Goal, engine: FakeEngine | None = None) -> Workspace:
    settings = Settings(
        source=write_hybrid(folder / "hybrid.F16.gguf"),
        goal=goal,
        select_text=None,
        select_domains=texts(folder, 1),
        report_text=None,
        report_domains=texts(folder, 2),
        ctx=CTX,
        threads=2,
    )
    return Workspace(folder / "run", settings, engine or FakeEngine(damage=damage), Recorder())


@pytest.mark.parametrize(
    "goal", [Limit(max_increase_pct=1.0), Budget(sizes=(Preset(name="Q3_K_M"),))], ids=["limit", "budget"]
)
def test_a_run_tells_loss_and_divergence_of_every_domain(tmp_path: Path, goal: Goal) -> None:
    opened = workspace(tmp_path, goal)
    manifest = run_all(opened)
    report = open_run(tmp_path / "run").verified().report
    assert [(one.name, one.chunks, one.of_chunks) for one in report.domains] == [
        (name, n, n) for name, n in N_CHUNKS.items()
    ]
    assert report.chunks == sum(N_CHUNKS.values())
    assert not report.same_as_selection
    for domain in report.domains:
        assert domain.divergence is not None
        assert domain.divergence.chunks == domain.chunks
        assert domain.delta_pct is not None and domain.ci_pct[0] is not None
        known = (domain.divergence.base, domain.divergence.result, domain.divergence.change)
        base, result, change = (value or 0.0 for value in known)
        assert base > 0.0
        assert change == pytest.approx(result - base)
    whole = sum((one.delta_pct or 0.0) * one.chunks for one in report.domains) / report.chunks
    assert report.delta_pct == pytest.approx(whole, rel=0.05)
    assert set(manifest.texts) == {
        f"{use}, {name}" for use in ("selection", "report", "importance") for name in N_CHUNKS
    }
    assert manifest.settings.select_domains[0].path == Path("code-1.txt")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "## By domain" in card and "| tables | 9 of 9 |" in card
    assert "By domain" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "run" / "predictions").exists()


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    run_all(workspace(tmp_path, Limit(max_increase_pct=1.0)))
    before = ledger_rows(tmp_path / "run")
    again = workspace(tmp_path, Limit(max_increase_pct=1.0))
    with again.locked():
        verify_stage(again)
    assert ledger_rows(tmp_path / "run") == before
    assert isinstance(again.engine, FakeEngine)


def test_a_domain_that_decides_and_reports_is_said(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=1.0))
    shared = (opened.settings.select_domains[0], *opened.settings.report_domains[1:])
    opened.settings = replace(opened.settings, report_domains=shared)
    run_all(opened)
    assert open_run(tmp_path / "run").verified().report.same_as_selection


def test_few_report_chunks_are_of_all_domains(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=1.0))
    opened.settings = replace(opened.settings, report_chunks=7)
    run_all(opened)
    report = open_run(tmp_path / "run").verified().report
    assert [one.chunks for one in report.domains] == [3, 2, 2]
    assert report.seed == opened.settings.seed
    again = workspace(tmp_path, Limit(max_increase_pct=1.0))
    again.settings = replace(opened.settings, report_chunks=9)
    before = len(ledger_rows(tmp_path / "run"))
    with again.locked():
        verify_stage(again)
    assert len(ledger_rows(tmp_path / "run")) == before + 3 * 2  # two more, source, base and result


def test_a_reproduction_compares_every_text(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=1.0))
    run_all(opened)
    given = {f"selection, {text.name}": text.path for text in opened.settings.select_domains}
    request = Reproduction(
        manifest=tmp_path / "run" / "manifest.json",
        source=tmp_path / "hybrid.F16.gguf",
        out=tmp_path / "again",
        base_file=None,
        texts=given,
        threads=1,
    )
    found = reproduce(request, FakeEngine(damage=damage), Silent())
    assert found.bit_equal
    status = {row.name: row.status for row in found.compared}
    assert status["selection, code text"] == SAME
    assert status["report, code text"] != SAME


def domain(name: str, delta: float, half: float, kld: float = 0.0, n: int = 40) -> DomainReport:
    measured = Measured(ppl=10.0, se=0.1, tokens=n * 255)
    bounds = (None, None) if n < 2 else (delta - half, delta + half)
    divergence = Divergence(
        chunks=n,
        base=0.05,
        base_ci=(0.04, 0.06),
        result=0.05 + kld,
        result_ci=(0.04 + kld, 0.06 + kld),
        change=kld,
        change_ci=(kld - 0.001, kld + 0.001),
    )
    return DomainReport(
        name=name,
        text=f"{name}.txt",
        chunks=n,
        of_chunks=n,
        source=measured,
        base=measured,
        result=measured,
        delta_pct=delta,
        ci_pct=bounds,
        divergence=divergence,
    )


def told(*domains: DomainReport) -> list[str]:
    return list(across_domains(verify(domains=domains).report))


def test_a_gain_at_anothers_cost_is_said() -> None:
    lines = told(domain("prose", -1.0, 0.3, -0.01), domain("code", 2.0, 0.5, 0.02), domain("chat", 0.1, 1.0))
    assert lines[0] == (
        "It gains in some domains at the cost of others: against the base, perplexity falls on prose (−1.00% "
        "[−1.30%, −0.70%]) and rises on code (+2.00% [+1.50%, +2.50%])."
    )
    assert "KL divergence from the source falls on prose (−0.0100" in lines[1]
    assert "rises on code (+0.0200" in lines[1]


def test_costs_that_differ_are_said_and_those_that_do_not() -> None:
    assert "do not bear the change alike" in told(domain("prose", 1.0, 0.2), domain("code", 4.0, 0.5))[0]
    assert told(domain("prose", 1.0, 0.9), domain("code", 1.5, 0.9)) == [
        "No two of its 2 domains could be told apart by their change of perplexity."
    ]


def test_a_domain_over_the_limit_of_all_is_named(tmp_path: Path) -> None:
    """On the demo's model prose rose by 6% where all six domains together did not rise."""
    seen = (domain("prose", 6.0, 0.5), domain("code", -5.0, 4.0), domain("german", 4.0, 2.0))
    report = verify(domains=seen, delta_pct=0.1).report
    assert list(over_in_some(report, 3.0)) == [
        "The limit of +3% is about all domains together: perplexity surely rises by more on prose "
        "(+6.00% [+5.50%, +6.50%])."
    ]
    assert not list(over_in_some(report, 7.0))
    assert not list(over_in_some(verify(domains=seen, delta_pct=3.1).report, 3.0))
    make_card(write_run_folder(tmp_path / "a", verify=verify(domains=seen, delta_pct=0.1)))
    assert "is about all domains together" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")


def test_a_claim_holds_for_all_domains_together() -> None:
    """Each interval just excludes zero at its own 95%; of three such domains none is claimed."""
    close = [domain(name, sign * 1.0, 0.95) for name, sign in (("a", -1), ("b", 1), ("c", 1))]
    assert not any("at the cost of others" in line for line in told(*close))


def test_a_domain_of_one_chunk_claims_nothing() -> None:
    lines = told(domain("prose", -9.0, 0.0, n=1), domain("code", 2.0, 0.5))
    assert not any("at the cost" in line or "alike:" in line for line in lines[:1])
    report = verify(domains=(domain("prose", -9.0, 0.0, n=1), domain("code", 2.0, 0.5))).report
    assert domain_cells(report)[0].change.endswith("no interval")


def test_the_card_says_it_and_a_plain_run_has_no_table(tmp_path: Path) -> None:
    domains = (domain("prose", -1.0, 0.3), domain("co|de", 2.0, 0.5))
    make_card(write_run_folder(tmp_path / "a", verify=verify(domains=domains)))
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "gains in some domains at the cost of others" in card.partition("## What changed")[0]
    assert r"co\|de" in card
    make_card(write_run_folder(tmp_path / "b"))
    assert "By domain" not in (tmp_path / "b" / "README.md").read_text(encoding="utf-8")


def taken(*arguments: str) -> dict[str, object]:
    """What settings get of a command's texts."""
    caught: dict[str, object] = {}

    @click.command()
    @source_options
    def command(**asked: object) -> None:
        settle_texts(asked)
        caught.update(asked)

    ran = CliRunner().invoke(command, list(arguments), standalone_mode=False)
    if ran.exception is not None:
        raise ran.exception
    return {key: value for key, value in caught.items() if key.endswith(("_text", "_domains"))}


@pytest.mark.parametrize("which", COME_ALONG)
def test_the_default_is_as_if_it_had_been_named(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cerebellum.cli.options.DEFAULT_TEXTS", which)
    assert taken() == taken("--select-text", which, "--report-text", which)
    mine = taken("--select-text", "a.txt")
    assert mine["select_text"] == Path("a.txt").absolute() and mine["select_domains"] == ()


def test_texts_of_six_domains_select_and_report_where_none_is_named() -> None:
    assert taken() == {
        "select_text": None,
        "select_domains": shipped_domains("select"),
        "report_text": None,
        "report_domains": shipped_domains("report"),
        "imatrix_text": None,
        "imatrix_domains": (),
    }


def test_the_importance_matrix_takes_texts_as_the_selection_does() -> None:
    assert taken("--imatrix-text", "prose")["imatrix_text"] == SELECTION_TEXT
    assert taken("--imatrix-text", "domains")["imatrix_domains"] == shipped_domains("select")
    assert taken("--imatrix-text", "a.txt")["imatrix_text"] == Path("a.txt").absolute()
    several = taken("--imatrix-text", "code=a.txt", "--imatrix-text", "prose=b.txt")
    assert several["imatrix_text"] is None
    assert several["imatrix_domains"] == (
        Domain(name="code", path=Path("a.txt").absolute()),
        Domain(name="prose", path=Path("b.txt").absolute()),
    )
    with pytest.raises(click.UsageError, match=r"--imatrix-text: of several texts each needs a name"):
        taken("--imatrix-text", "a.txt", "--imatrix-text", "b.txt")


def test_an_importance_matrix_of_its_own_domains(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=1.0))
    mine = texts(tmp_path / "mine", 3)
    opened.settings = replace(opened.settings, imatrix_domains=mine, imatrix_chunks=5)
    assert opened.importance_corpus.name == "code + prose + tables"
    assert opened.importance_corpus.sha256 != opened.selection.sha256
    manifest = run_all(opened)
    assert manifest.texts["importance, code"] == hashlib.sha256(read_text(mine[0].path)).hexdigest()
    assert manifest.texts["importance, code"] != manifest.texts["selection, code"]
    assert manifest.settings.imatrix_domains[1] == Domain(name="prose", path=Path("prose-3.txt"))
    assert read_gguf(tmp_path / "run" / "imatrix.gguf").value("imatrix.datasets") == ["code + prose + tables"]


def test_a_result_replaces_no_text_of_the_matrix(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=1.0))
    out = output_path(opened.folder, opened.source, "Q3_K_M")
    out.parent.mkdir(parents=True)
    out.write_bytes(small_text(3 * CTX, 4))
    opened.settings = replace(opened.settings, imatrix_domains=(Domain(name="code", path=out),))
    with pytest.raises(BadInput, match="is an input of this run"):
        check_output(opened, ("Q3_K_M",))


def test_settings_of_older_folders_name_one_text_for_the_matrix_or_none(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"format": 3, "source": "/m.gguf", "imatrix_text": "/a.txt"}')
    assert read_artifact(path, Settings, "run it again").imatrix_texts == (Domain(path=Path("/a.txt")),)
    path.write_text('{"format": 3, "source": "/m.gguf", "imatrix_text": null}')
    assert read_artifact(path, Settings, "run it again").imatrix_texts == ()


def test_the_demo_keeps_the_prose_that_its_model_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr("cerebellum.cli.commands._workspace", lambda _out, asked, _hiring: seen.append(asked))
    monkeypatch.setattr("cerebellum.cli.commands._run", lambda *_: None)
    assert CliRunner().invoke(cli, ["demo", "-o", str(tmp_path), "--gpu-layers", "0"]).exit_code == 0
    assert [text.path for text in (*seen[0].select_texts, *seen[0].report_texts)] == [
        SELECTION_TEXT,
        REPORT_TEXT,
    ]


@pytest.mark.parametrize(
    ("flags", "name"), [((), " + ".join(DOMAINS)), (("--text", "prose"), SELECTION_TEXT.name)]
)
def test_an_importance_matrix_is_of_the_texts_that_select(
    cerebellum: Cerebellum, embedded: Path, tmp_path: Path, flags: tuple[str, ...], name: str
) -> None:
    out = tmp_path / "imatrix.gguf"
    few = ("--ctx", 64, "--chunks", 6, "--threads", 2)
    assert cerebellum("imatrix", embedded, "-o", out, *few, *flags).code == 0
    assert read_gguf(out).value("imatrix.datasets") == [name]


def test_an_importance_matrix_replaces_none_of_its_texts(
    cerebellum: Cerebellum, embedded: Path, tmp_path: Path
) -> None:
    text = texts(tmp_path, 1)[0].path
    ran = cerebellum("quantize", embedded, "Q8_0", "-o", text, "--text", f"code={text}", "--force")
    assert ran.code == 2 and "is an input" in ran.complaint


def test_one_text_several_or_those_that_come_along(tmp_path: Path) -> None:
    for half, path in (("select", SELECTION_TEXT), ("report", REPORT_TEXT)):
        assert taken(f"--{half}-text", "prose")[f"{half}_text"] == path
    assert taken("--select-text", "a.txt")["select_text"] == Path("a.txt").absolute()
    several = taken("--report-text", "code=a.txt", "--report-text", "prose=b.txt")
    assert several["report_text"] is None
    assert several["report_domains"] == (
        Domain(name="code", path=Path("a.txt").absolute()),
        Domain(name="prose", path=Path("b.txt").absolute()),
    )
    assert taken("--select-text", "domains")["select_domains"] == shipped_domains("select")
    assert taken("--report-text", "domains")["report_domains"] == shipped_domains("report")
    odd = tmp_path / "a=b.txt"
    odd.write_text("text")
    assert taken("--select-text", str(odd))["select_text"] == odd


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.txt", "code=b.txt"), "each needs a name"),
        (("code=a.txt", "code=b.txt"), "two texts are named code"),
        (("domains", "code=b.txt"), "two texts are named code"),
    ],
)
def test_texts_that_cannot_be_told_apart_are_wrong_use(arguments: tuple[str, ...], message: str) -> None:
    flags = [word for text in arguments for word in ("--select-text", text)]
    with pytest.raises(click.UsageError, match=message):
        taken(*flags)
    assert named_texts([], "--select-text") == ()


def test_the_halves_that_come_along_share_nothing_to_learn_from() -> None:
    """No line of some length is in both halves of a domain."""
    for name in DOMAINS:
        halves = [
            {line.strip() for line in text.path.read_text(encoding="utf-8").splitlines() if len(line) > 60}
            for half in (shipped_domains("select"), shipped_domains("report"))
            for text in half
            if text.name == name
        ]
        assert halves[0] and halves[1]
        assert not halves[0] & halves[1], name


def test_what_comes_along_is_small_and_named_in_the_licences() -> None:
    paths = [text.path for half in (shipped_domains("select"), shipped_domains("report")) for text in half]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}) == 2 * len(DOMAINS)
    assert 1_000_000 < sum(path.stat().st_size for path in paths) < 1_200_000
    licences = (paths[0].parents[1] / "LICENSES.md").read_text(encoding="utf-8")
    for name in DOMAINS:
        assert f"`domains/*-{name}.txt`" in licences


def test_settings_with_domains_are_read_back(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit())
    (tmp_path / "run").mkdir()
    opened.save_settings()
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["select_text"] is None
    assert open_run(tmp_path / "run").settings() == opened.settings
