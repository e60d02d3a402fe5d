"""One contract for every engine: what llama.cpp does, the official fake does too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny import split_by_hand, write_hybrid

from cerebellum.engine.fake import FakeEngine
from cerebellum.engine.protocols import Engine, Tokens, scored_tokens
from cerebellum.errors import BadInput
from cerebellum.gguf import GGUFValueType, encode_kv, write_gguf
from cerebellum.llama.native import LlamaEngine

CTX = 64
TEXT = b"The quick brown fox jumps over the lazy dog. " * 20


@dataclass(frozen=True, kw_only=True)
class Subject:
    engine: Engine
    model: Path
    splits: tuple[Path, ...]


@pytest.fixture(scope="module", params=["fake", "llama"])
def subject(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    embedded: Path,
    llama_engine: LlamaEngine,
) -> Subject:
    folder = tmp_path_factory.mktemp("engine")
    fake = request.param == "fake"
    model = write_hybrid(folder / "hybrid.gguf") if fake else embedded
    splits = tuple(split_by_hand(model, folder, "split", 3))
    return Subject(engine=FakeEngine() if fake else llama_engine, model=model, splits=splits)


def chunk(subject: Subject, number: int) -> Tokens:
    tokens = subject.engine.tokenize(subject.model, TEXT).tokens
    return tokens[number : number + CTX].copy()


@pytest.mark.parametrize("ctx", [8, 63, 64])
def test_logits_cover_the_second_half_but_its_first(subject: Subject, ctx: int) -> None:
    tokens = chunk(subject, 0)[:ctx]
    with subject.engine.open([subject.model], ctx) as model:
        logits = model.logits(tokens)
        assert logits.shape == (ctx - ctx // 2 - 1, model.vocab_size)
        assert logits.shape[0] == scored_tokens(ctx)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()


def test_logits_are_fresh_memory(subject: Subject) -> None:
    with subject.engine.open([subject.model], CTX) as model:
        first = model.logits(chunk(subject, 0))
        before = first.copy()
        model.logits(chunk(subject, 7))
        assert np.array_equal(first, before)
        assert first.flags.owndata and first.flags.writeable
    assert np.array_equal(first, before)  # and it outlives the model


def test_a_chunk_knows_nothing_of_the_one_before(subject: Subject) -> None:
    """Attention's cache and the recurrent state are both cleared."""
    with subject.engine.open([subject.model], CTX) as model:
        alone = model.logits(chunk(subject, 0))
        model.logits(chunk(subject, 7))
        assert np.array_equal(model.logits(chunk(subject, 0)), alone)
    with subject.engine.open([subject.model], CTX) as model:
        assert np.array_equal(model.logits(chunk(subject, 0)), alone)


def test_different_chunks_give_different_logits(subject: Subject) -> None:
    with subject.engine.open([subject.model], CTX) as model:
        assert not np.array_equal(model.logits(chunk(subject, 0)), model.logits(chunk(subject, 7)))


def test_splits_are_the_single_file_bit_for_bit(subject: Subject) -> None:
    tokens = chunk(subject, 0)
    with subject.engine.open([subject.model], CTX) as whole:
        expected = whole.logits(tokens)
    with subject.engine.open(subject.splits, CTX) as split:
        assert np.array_equal(split.logits(tokens), expected)


def test_two_models_are_open_at_once(subject: Subject) -> None:
    tokens = chunk(subject, 0)
    with subject.engine.open([subject.model], CTX) as a, subject.engine.open(subject.splits, CTX) as b:
        one, other = a.logits(tokens), b.logits(tokens)
        assert np.array_equal(a.logits(tokens), one)
        assert np.array_equal(one, other)


def test_tokens_are_whole_deterministic_and_in_the_vocabulary(subject: Subject) -> None:
    found = subject.engine.tokenize(subject.model, TEXT)
    assert found.tokens.dtype == np.int32 and found.tokens.ndim == 1
    assert np.array_equal(found.tokens, subject.engine.tokenize(subject.splits[0], TEXT).tokens)
    with subject.engine.open([subject.model], CTX) as model:
        assert found.tokens.min() >= 0 and found.tokens.max() < model.vocab_size
    longer = subject.engine.tokenize(subject.model, TEXT + b" And more.")
    assert len(longer.tokens) > len(found.tokens)


def test_identity_names_the_engine(subject: Subject) -> None:
    assert subject.engine.identity
    assert subject.engine.identity == subject.engine.identity
    assert "\n" not in subject.engine.identity


@pytest.mark.parametrize("case", ["text", "missing", "truncated", "empty"])
@pytest.mark.parametrize("what", ["open", "tokenize"])
def test_what_is_no_model_is_refused_in_one_line(
    subject: Subject, tmp_path: Path, case: str, what: str
) -> None:
    path = tmp_path / f"{case}.gguf"
    contents = {"text": TEXT, "empty": b"", "truncated": subject.model.read_bytes()[:2000]}
    if case in contents:
        path.write_bytes(contents[case])
    with pytest.raises(BadInput) as caught:
        if what == "tokenize":
            subject.engine.tokenize(path, TEXT)
        else:
            with subject.engine.open([path], CTX):
                pass
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_llama_refuses_a_gguf_without_a_model(tmp_path: Path, llama_engine: LlamaEngine) -> None:
    path = tmp_path / "empty-but-sound.gguf"
    write_gguf(path, [encode_kv("general.architecture", "granitehybrid", GGUFValueType.STRING)], [])
    with pytest.raises(BadInput, match=r"empty-but-sound\.gguf: llama\.cpp cannot load it"):
        llama_engine.tokenize(path, TEXT)


def test_llama_says_nothing_on_stderr(
    embedded: Path, llama_engine: LlamaEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    with llama_engine.open([embedded], CTX) as model:
        model.logits(llama_engine.tokenize(embedded, TEXT).tokens[:CTX])
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_the_fake_counts_what_it_scored(hybrid: Path) -> None:
    engine = FakeEngine()
    tokens = engine.tokenize(hybrid, TEXT).tokens[:CTX]
    with engine.open([hybrid], CTX) as model:
        model.logits(tokens)
        model.logits(tokens)
    assert engine.opened == 1
    assert list(engine.scored.values()) == [2]


def test_the_speed_of_a_model_is_measured(llama_engine: LlamaEngine, embedded: Path) -> None:
    speed = llama_engine.speed([embedded])
    assert speed.prompt > speed.generation > 0
    low, high = speed.generation_range
    assert low <= speed.generation <= high and llama_engine.machine.endswith("threads")
