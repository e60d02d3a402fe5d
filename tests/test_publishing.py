"""What a repository on the Hub says of a model: its base model, its license, its texts, how to run it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from conftest import Cerebellum
from huggingface_hub import ModelCard
from msgspec.structs import replace
from run_folder import manifest, source, verify, write_run_folder
from test_fake_run import workspace
from test_hub import run_folder
from tiny import Recorder

from cerebellum.card.stage import make_card
from cerebellum.folder import RunFolder
from cerebellum.gguf import GGUFValueType as V
from cerebellum.gguf import TensorSource, encode_kv, read_gguf, write_gguf
from cerebellum.hub import uploads
from cerebellum.manifest import NamedFile
from cerebellum.run import run_all, tell_unknown_origin, verify_stage
from cerebellum.settings import REPORT_TEXT, SELECTION_TEXT, Domain, Limit, Published, Settings
from cerebellum.source import open_source
from cerebellum.texts import read_text
from cerebellum.verify import TEMPLATE_CHECK, Check
from cerebellum.workspace import Workspace


def front_matter(folder: Path) -> object:
    make_card(folder)
    return ModelCard((folder / "README.md").read_text(), ignore_metadata_errors=False).data


def with_records(model: Path, out: Path, *records: bytes) -> Path:
    """The model with further metadata."""
    file = read_gguf(model)
    tensors = [
        TensorSource(name=t.name, shape=t.shape, type=t.type, chunks=lambda t=t: [file.data(t)])  # type: ignore[misc]
        for t in file.tensors
    ]
    write_gguf(out, [*file.kv_records.values(), *records], tensors)
    return out


def with_source(opened: Workspace, model: Path) -> Workspace:
    settings = opened.settings
    values = {name: getattr(settings, name) for name in settings.__struct_fields__} | {"source": model}
    return Workspace(opened.folder, Settings(**values), opened.engine, Recorder())


# --- base model, license, name


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--base-model", "granite"), "owner/name"),
        (("--base-model", "a/b/c"), "owner/name"),
        (("--base-model", "../x"), "owner/name"),
        (("--license", "Apache 2"), "apache-2.0"),
    ],
)
def test_what_the_hub_would_not_take_is_refused_at_the_door(
    cerebellum: Cerebellum, tmp_path: Path, flags: tuple[str, ...], told: str
) -> None:
    for command in (("run", tmp_path / "no.gguf", "-o", tmp_path / "run"), ("card", tmp_path)):
        ran = cerebellum(*command, *flags)
        assert ran.code == 2 and told in ran.complaint, ran.err


def test_what_people_say_comes_before_the_metadata_and_stays(cerebellum: Cerebellum, tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run")
    address = "https://huggingface.co/someone/finetune"
    ran = cerebellum("card", folder, "--base-model", address, "--license", "MIT", "--name", "My *Tune*")
    assert ran.code == 0, ran.err
    for _ in range(2):  # the second time nothing is given
        data = front_matter(folder)
        assert (data.base_model, data.license, data.model_name) == (  # type: ignore[attr-defined]
            "someone/finetune",
            "mit",
            "My *Tune*",
        )
    assert "# My \\*Tune\\* · Q3_K_M" in (folder / "README.md").read_text()
    cerebellum("card", folder, "--license", "other")
    assert RunFolder(folder).published() == Published(
        base_model="someone/finetune", license="other", name="My *Tune*"
    )


def test_a_missing_base_model_is_one_line_at_the_start(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit())
    tell_unknown_origin(opened)
    (note,) = opened.reporter.notes  # type: ignore[attr-defined]
    assert "no base model" in note and "--base-model OWNER/NAME" in note and "--license" in note
    named = with_records(
        opened.settings.source,
        tmp_path / "named.F16.gguf",
        encode_kv("general.source.huggingface.repository", "a/b", V.STRING),
        encode_kv("general.license", "mit", V.STRING),
    )
    again = with_source(opened, named)
    tell_unknown_origin(again)
    assert again.reporter.notes == []  # type: ignore[attr-defined]


def test_a_run_keeps_what_it_was_told_for_card_and_push(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=1.0))
    settings = opened.settings
    values = {name: getattr(settings, name) for name in settings.__struct_fields__}
    told = Settings(**values | {"published": Published(base_model="a/b", license="mit")})
    run_all(Workspace(opened.folder, told, opened.engine, Recorder()))
    assert "base_model: a/b" in (opened.folder / "README.md").read_text()
    assert "published.json" in {upload.name for upload in uploads(opened.folder)}


# --- how to run it


def commands(folder: Path, repo: str | None) -> str:
    make_card(folder, repo)
    return (folder / "README.md").read_text().partition("## How to run")[2].partition("\n## ")[0]


def test_the_programs_get_the_label_of_the_file(tmp_path: Path) -> None:
    told = commands(write_run_folder(tmp_path / "run"), "someone/granite-GGUF")
    assert "ollama run hf.co/someone/granite-GGUF:Q3_K_M" in told
    assert "llama-server -hf someone/granite-GGUF:Q3_K_M" in told
    assert '"$HOME"/.lmstudio/models/someone/granite-GGUF' in told


def test_a_split_file_is_not_promised_to_ollama(tmp_path: Path) -> None:
    names = manifest()
    parts = tuple(NamedFile(file=f"m-0000{k}-of-00002.gguf", sha256="0" * 64) for k in (1, 2))
    split = replace(names, result=replace(names.result, file=parts[0].file, parts=parts))
    told = commands(write_run_folder(tmp_path / "run", manifest=split), "someone/x")
    assert "ollama" not in told and "m-00002-of-00002.gguf" in told


# --- the chat template


def test_the_chat_template_is_proved_and_named_by_its_hash(tmp_path: Path) -> None:
    opened = workspace(tmp_path, Limit(max_increase_pct=1.0))
    template = encode_kv("tokenizer.chat_template", "{{ messages }}", V.STRING)
    run = with_source(opened, with_records(opened.settings.source, tmp_path / "chat.F16.gguf", template))
    run_all(run)
    check = next(check for check in run.artifacts.verified().checks if check.name == TEMPLATE_CHECK)
    digest = hashlib.sha256(b"{{ messages }}").hexdigest()
    assert check.ok and check.detail == f"copied unchanged, the source's, sha256 {digest}"
    assert "copied unchanged" in (run.folder / "README.md").read_text()
    (made,) = run.folder.glob("*-Cerebellum-*.gguf")
    broken = made.read_bytes().replace(b"{{ messages }}", b"{{ massages }}")
    made.write_bytes(broken)
    with run.locked():
        (found,) = verify_stage(run)
    assert [c.ok for c in found.checks if c.name == TEMPLATE_CHECK] == [False] and not found.ok


def test_a_card_of_a_model_without_a_template_says_nothing_of_one(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run")
    make_card(folder)
    assert "chat template" not in (folder / "README.md").read_text()
    checks = (*verify().checks, Check(name=TEMPLATE_CHECK, ok=True, detail="copied unchanged, sha256 ab"))
    write_run_folder(folder, verify=replace(verify(), checks=checks))
    make_card(folder)
    assert "The chat template: copied unchanged, sha256 ab." in (folder / "README.md").read_text()


# --- texts


def test_texts_that_come_along_are_published_and_others_only_if_asked(tmp_path: Path) -> None:
    mine = tmp_path / "secret.txt"
    mine.write_text("mine")
    digests = {
        "selection": hashlib.sha256(mine.read_bytes()).hexdigest(),
        "report": hashlib.sha256(read_text(REPORT_TEXT)).hexdigest(),
    }
    folder = run_folder(tmp_path / "run")
    made = RunFolder(folder).manifest()
    files = {"selection": mine.name, "report": REPORT_TEXT.name}
    RunFolder(folder).write("manifest.json", replace(made, texts=digests, text_files=files))
    RunFolder(folder).write("settings.json", Settings(source=Path("/m.gguf"), select_text=mine))
    names = {upload.name for upload in uploads(folder)}
    assert REPORT_TEXT.name in names and mine.name not in names and SELECTION_TEXT.name not in names
    assert mine.name in {upload.name for upload in uploads(folder, with_texts=True)}
    of_matrix = (Domain(name="code", path=mine),)
    RunFolder(folder).write("settings.json", Settings(source=Path("/m.gguf"), imatrix_domains=of_matrix))
    assert mine.name in {upload.name for upload in uploads(folder, with_texts=True)}
    mine.write_text("another")
    assert mine.name not in {upload.name for upload in uploads(folder, with_texts=True)}


# --- projectors


def projector(path: Path, width: int) -> Path:
    records = [
        encode_kv("general.type", "mmproj", V.STRING),
        encode_kv("general.architecture", "clip", V.STRING),
        encode_kv("clip.vision.projection_dim", width, V.UINT32),
    ]
    write_gguf(path, records, [])
    return path


def test_the_projector_of_this_model_goes_along_and_no_other(tmp_path: Path) -> None:
    plain = workspace(tmp_path, Limit(max_increase_pct=1.0))
    architecture = open_source(plain.settings.source).architecture
    width = 256
    record = encode_kv(f"{architecture}.embedding_length", width, V.UINT32)
    opened = with_source(plain, with_records(plain.settings.source, tmp_path / "sees.F16.gguf", record))
    mine = projector(tmp_path / "mmproj-hybrid-F16.gguf", width)
    projector(tmp_path / "mmproj-other.gguf", width + 1)
    (tmp_path / "mmproj-broken.gguf").write_bytes(b"GGUF")
    result = run_all(opened)
    assert [named.file for named in result.projectors] == [mine.name]
    assert (opened.folder / mine.name).read_bytes() == mine.read_bytes()
    names = {upload.name for upload in uploads(opened.folder)}
    assert mine.name in names and "mmproj-other.gguf" not in names
    card = (opened.folder / "README.md").read_text()
    assert f"For images or sound: `{mine.name}`" in card and f"projector | `{mine.name}`" in card


def test_the_answer_of_card_names_what_it_wrote(cerebellum: Cerebellum, tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run", source=source())
    ran = cerebellum("card", folder, "--json")
    assert ran.code == 0 and str(folder / "README.md") in json.loads(ran.out)["files"]
    assert not (folder / "published.json").exists()
