"""Any files of one model on several texts: their order until it is sure, who survives, and what is refused."""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from conftest import Cerebellum
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import Recorder, Shapes, hybrid_records, hybrid_shapes, random_tensor, small_text, write_hybrid

from cerebellum.cli.options import NamedTexts, take_texts
from cerebellum.codec import read_artifact
from cerebellum.comparison.conversations import load_text
from cerebellum.comparison.judge import JUDGE, Judging, judge, percentile
from cerebellum.comparison.judgement import LESS, MORE, OPEN, TIE, Judgement
from cerebellum.comparison.order import (
    Ordered,
    OrderSettings,
    PairOrder,
    order_files,
    stands,
)
from cerebellum.comparison.published import publish, survivors_rows
from cerebellum.engine.fake import FakeEngine, FakeModel
from cerebellum.engine.protocols import Tokenized
from cerebellum.errors import BadInput
from cerebellum.gguf import (
    GGMLQuantizationType,
    GGUFValueType,
    TensorInfo,
    TensorSource,
    encode_kv,
    tensor_bytes,
    write_gguf,
)
from cerebellum.page.charts import told_apart
from cerebellum.progress import Silent
from cerebellum.settings import DEMO_MODEL, shipped_domains
from cerebellum.source import TEMPLATE_KEY, open_source
from cerebellum.stats.paired import Interval
from cerebellum.stats.strata import Looks, StrataMean, Stratum
from cerebellum.verdicts import drive

T = GGMLQuantizationType
Vector = NDArray[np.float64]

# ---- the mean over texts ----


def test_a_text_read_to_its_end_has_no_error_left() -> None:
    values = np.array([1.0, 2.0, 6.0])
    found = StrataMean.of([Stratum(values_N=values, population=3), Stratum(values_N=values, population=3)])
    assert (found.mean, found.se, found.wrong_sign()) == (3.0, 0.0, 0.0)
    assert found.interval(0.01).low == found.interval(0.01).high == 3.0


def test_the_mean_over_texts_by_hand() -> None:
    """Two texts count alike, whatever their lengths; variances are s^2 (1/n - 1/N) / 4."""
    first, second = np.array([1.0, 3.0]), np.array([2.0, 4.0, 6.0])
    found = StrataMean.of([Stratum(values_N=first, population=4), Stratum(values_N=second, population=30)])
    assert found.mean == 3.0
    assert found.se == pytest.approx(math.sqrt((2 * (1 / 2 - 1 / 4) + 4 * (1 / 3 - 1 / 30)) / 4))


def test_one_chunk_says_nothing() -> None:
    found = StrataMean.of([Stratum(values_N=np.array([1.0]), population=9)])
    assert found.wrong_sign() == 1.0 and found.interval(0.3).high == math.inf


@given(st.integers(2, 60), st.integers(2, 900), st.integers(0, 900))
def test_the_shares_of_all_looks_are_the_level(first: int, limit: int, more: int) -> None:
    looks = Looks.planned(first, 1.5, limit, limit + more)
    assert looks.at[-1] == limit and all(np.diff(looks.at) > 0)
    assert sum(looks.shares) == pytest.approx(1.0 if more or len(looks.at) > 1 else 0.0)
    assert more or looks.shares[-1] == 0.0


# ---- the order, without I/O ----


def settings(files: int, populations: Sequence[int], **changed: float) -> OrderSettings:
    looks = Looks.planned(16, 1.5, max(populations), max(populations))
    values = {"alpha": 0.05, "tie": 0.02} | changed
    return OrderSettings(
        files=files, populations=tuple(populations), looks=looks, alpha=values["alpha"], tie=values["tie"]
    )


def ordered(vectors: Sequence[Sequence[Vector]], **changed: float) -> Ordered:
    """What is found of files whose divergence is known on every chunk, by file and text."""
    populations = [len(text) for text in vectors[0]]
    return drive(
        order_files(settings(len(vectors), populations, **changed)),
        lambda ask: {number: [text[: ask.n] for text in vectors[number]] for number in ask.files},
    )


def texts_of(mean: float, seed: int = 0, lengths: Sequence[int] = (300, 200)) -> list[Vector]:
    """Divergences whose spread is a fifth of their mean, the same for all files but for their mean."""
    rng = np.random.default_rng(seed)
    return [mean * rng.lognormal(-0.02, 0.2, n) for n in lengths]


def test_what_is_far_apart_is_settled_at_the_first_look() -> None:
    found = ordered([texts_of(0.1, 1), texts_of(0.2, 2), texts_of(0.4, 3)])
    assert found.sure and found.last_look == (0, 0, 0)
    assert [pair.order for pair in found.pairs] == [LESS, LESS, LESS]


def test_a_file_with_nothing_open_is_read_no_further() -> None:
    found = ordered([texts_of(0.1, 1), texts_of(0.106, 2), texts_of(0.4, 3)])
    assert found.last_look[2] == 0 and found.last_look[0] == found.last_look[1] > 0


def test_what_is_alike_is_a_tie_and_stops() -> None:
    same = texts_of(0.1, 1)
    found = ordered([same, [text * 1.0001 for text in same]])
    assert [pair.order for pair in found.pairs] == [TIE] and found.last_look == (0, 0)
    assert [pair.order for pair in ordered([same, same]).pairs] == [TIE]


def test_at_the_end_of_the_texts_the_order_is_exact() -> None:
    found = ordered([texts_of(0.1, 1), texts_of(0.1, 2)], tie=0.0)
    assert found.sure and found.pairs[0].order in (LESS, MORE)
    truth = sum(float(t.mean()) for t in texts_of(0.1, 1)) - sum(float(t.mean()) for t in texts_of(0.1, 2))
    assert (found.pairs[0].order == LESS) == (truth < 0)


def test_one_that_collapsed_is_set_apart() -> None:
    broken = [text.copy() for text in texts_of(0.3)]
    broken[1][3] = np.nan
    found = ordered([texts_of(0.1, 1), broken, texts_of(0.2, 2)])
    assert found.collapsed == {1} and {(pair.a, pair.b) for pair in found.pairs} == {(0, 2)}
    assert [stand.standing for stand in stands(found, [30, 20, 10])] == ["survives", "collapsed", "survives"]


def test_orders_are_as_sure_as_they_say() -> None:
    """Six files all alike but for chance, the hardest case: in 400 orders of the chunks at most 5% hold an error."""
    rng = np.random.default_rng(7)
    base = [rng.lognormal(-3, 0.6, n) for n in (120, 90)]
    files = [[text * rng.lognormal(0, 0.15, len(text)) for text in base] for _ in range(6)]
    means = [sum(float(text.mean()) for text in texts) for texts in files]
    wrong = 0
    for _ in range(400):
        shuffles = [rng.permutation(len(text)) for text in base]
        shuffled = [[text[order] for text, order in zip(f, shuffles, strict=True)] for f in files]
        found = ordered(shuffled, tie=0.0)
        claims = [(means[p.a] < means[p.b]) == (p.order == LESS) for p in found.pairs if p.order != OPEN]
        wrong += not all(claims)
    assert wrong <= 0.05 * 400 + 2 * math.sqrt(400 * 0.05 * 0.95)


# ---- who survives ----


def pair(a: int, b: int, order: str, wrong: float = 0.001) -> PairOrder:
    return PairOrder(
        a=a, b=b, order=order, difference=Interval(mean=0, low=0, high=0, n=1, population=1), wrong=wrong
    )  # type: ignore[arg-type]


def test_standings_by_hand() -> None:
    """0 is smallest; 1 is larger and worse; 2 is larger and better; 3 is as 2 and larger; 4 is not known."""
    pairs = (
        *(pair(0, 1, LESS, 0.01), pair(0, 2, MORE, 0.02), pair(0, 3, MORE), pair(0, 4, MORE)),
        *(pair(1, 2, MORE), pair(1, 3, MORE), pair(1, 4, MORE)),
        *(pair(2, 3, TIE), pair(2, 4, OPEN), pair(3, 4, OPEN)),
    )
    found = Ordered(pairs=pairs, last_look=(0,) * 5, collapsed=frozenset(), sure=False)
    standing = stands(found, [10, 20, 30, 40, 50])
    assert [each.standing for each in standing] == ["survives", "beaten", "survives", "matched", "open"]
    assert standing[0].confidence == 1.0
    assert standing[1].by == 0 and standing[1].confidence == pytest.approx(0.99)
    assert standing[2].confidence == pytest.approx(1 - 0.021)
    assert standing[3].by == 2 and set(standing[4].open_to) == {2, 3}


def test_of_two_of_one_size_the_better_survives() -> None:
    found = Ordered(pairs=(pair(0, 1, MORE),), last_look=(0, 0), collapsed=frozenset(), sure=True)
    assert [each.standing for each in stands(found, [10, 10])] == ["beaten", "survives"]


def test_the_percentile_and_its_bounds() -> None:
    values = np.random.default_rng(1).exponential(1.0, (200, 255)).astype(np.float32)
    at, bounds = percentile(values, 0.99, 0.025)
    assert bounds is not None and bounds[0] < at < bounds[1]
    assert at == pytest.approx(-math.log(0.01), rel=0.05) and bounds[1] - bounds[0] < 0.3
    hits = 0
    for seed in range(200):
        drawn = np.random.default_rng(seed).exponential(1.0, (60, 100)).astype(np.float32)
        low, high = percentile(drawn, 0.99, 0.025)[1] or (0, 0)
        hits += low < -math.log(0.01) < high
    assert 0.90 < hits / 200 < 0.99


# ---- whole judgements on the fake engine ----


def quantized(path: Path, qtype: GGMLQuantizationType, *, extra: Mapping[str, str] = {}) -> Path:
    """A file of the hybrid with its matrices in blocks at one type; the bytes mean nothing."""

    def tensor(name: str, shape: tuple[int, ...]) -> TensorSource:
        matrix = name.startswith("blk.") and len(shape) > 1 and shape[0] == 256 and "gate_inp" not in name
        if not matrix:
            return random_tensor(name, shape, T.F32 if len(shape) == 1 or shape[0] == 1 else T.F16)
        raw = bytes(tensor_bytes(qtype, shape))
        return TensorSource(name=name, shape=shape, type=qtype, chunks=lambda: [raw])

    shapes: Shapes = hybrid_shapes()
    records = [encode_kv(key, value, GGUFValueType.STRING) for key, value in extra.items()]
    write_gguf(path, [*hybrid_records(), *records], [tensor(n, s) for n, s in shapes.items()])
    return path


HARM = {T.Q2_K: 0.08, T.Q3_K: 0.03, T.Q4_K: 0.012, T.Q4_0: 0.2, T.Q6_K: 0.004, T.Q5_K: math.nan}


def harm(tensor: TensorInfo) -> float:
    """Q4_0 is larger than Q3_K and worse than all; Q5_K collapses."""
    return HARM.get(tensor.type, 0.0)


def request(folder: Path, *kinds: GGMLQuantizationType, chunks: int = 60) -> Judging:
    texts = {}
    for seed, name in enumerate(("prose", "code")):
        texts[name] = folder / f"{name}.txt"
        texts[name].write_bytes(small_text((chunks + 20 * seed) * 32, seed))
    files = tuple(quantized(folder / f"m-{kind.name}.gguf", kind) for kind in kinds)
    source = write_hybrid(folder / "source.gguf")
    return Judging(files=files, source=source, texts=texts, ctx=32)


def test_a_judgement_on_the_fake(tmp_path: Path) -> None:
    kinds = (T.Q4_0, T.Q2_K, T.Q6_K, T.Q3_K, T.Q5_K)
    asked = request(tmp_path, *kinds)
    found = judge(asked, FakeEngine(damage=harm), Silent(), tmp_path / "judged")
    standing = {file.name: file.standing for file in found.files}
    assert standing == {
        **{"m-Q2_K": "survives", "m-Q3_K": "survives", "m-Q6_K": "survives"},
        **{"m-Q4_0": "beaten", "m-Q5_K": "collapsed"},
    }
    assert found.sure and found.files[0].against in (("m-Q2_K",), ("m-Q3_K",))
    assert [text.name for text in found.texts] == ["prose", "code"]
    by_name = {file.name: file for file in found.files}
    worst, best = by_name["m-Q2_K"].texts[0], by_name["m-Q6_K"].texts[0]
    assert worst.kld_mean is not None and worst.kld_ci is not None and worst.kld_p99 is not None
    assert worst.kld_ci[0] < worst.kld_mean < worst.kld_ci[1] < worst.kld_p99
    assert (worst.delta_pct or 0) > (best.delta_pct or 0) > 0
    assert worst.ppl is not None and worst.source_ppl is not None
    assert 100 * (worst.ppl / worst.source_ppl - 1) == pytest.approx(worst.delta_pct)
    collapsed = by_name["m-Q5_K"].texts[0]
    assert collapsed.kld_mean is None and collapsed.ppl is None
    assert read_artifact(tmp_path / "judged" / JUDGE, Judgement, "") == found
    publish(tmp_path / "judged", found)
    assert (tmp_path / "judged" / "judge.png").read_bytes()[1:4] == b"PNG"
    page = (tmp_path / "judged" / "judge.md").read_text()
    assert "beaten by m-Q" in page and "collapsed" in page and "95% confidence" in page
    assert [row[0] for row in survivors_rows(found)][:2] == ["m-Q2_K", "m-Q3_K"]


def test_early_stopping_reads_less_than_the_texts_have(tmp_path: Path) -> None:
    found = judge(request(tmp_path, T.Q2_K, T.Q4_K, chunks=90), FakeEngine(damage=harm), Silent())
    assert found.sure and all(text.chunks < text.of_chunks for text in found.texts)
    assert found.tokens_scored == 3 * sum(text.chunks for text in found.texts) * 32


def test_a_fixed_number_of_chunks_is_one_look(tmp_path: Path) -> None:
    asked = replace(request(tmp_path, T.Q2_K, T.Q4_K), chunks=7)
    found = judge(asked, FakeEngine(damage=harm), Silent())
    assert {text.chunks for text in found.texts} == {7}


def test_the_same_again_reads_nothing_and_says_the_same(tmp_path: Path) -> None:
    asked = request(tmp_path, T.Q2_K, T.Q3_K)
    first = judge(asked, FakeEngine(damage=harm), Silent(), tmp_path / "judged")
    again = FakeEngine(damage=harm)
    assert judge(asked, again, Silent(), tmp_path / "judged") == first and not again.scored


def test_one_that_was_stopped_goes_on(tmp_path: Path) -> None:
    asked = request(tmp_path, T.Q2_K, T.Q3_K)

    class Stopping(Silent):
        def task(self, title: str, total: int):  # type: ignore[no-untyped-def]
            if title == "code: m-Q2_K":
                raise KeyboardInterrupt
            return super().task(title, total)

    with pytest.raises(KeyboardInterrupt):
        judge(asked, FakeEngine(damage=harm), Stopping(), tmp_path / "judged")
    assert not (tmp_path / "judged" / "predictions").exists()
    rest = FakeEngine(damage=harm)
    found = judge(asked, rest, Silent(), tmp_path / "judged")
    whole = FakeEngine(damage=harm)
    assert judge(asked, whole, Silent()) == found
    assert 0 < sum(rest.scored.values()) < sum(whole.scored.values())


def test_few_predictions_at_a_time_change_nothing(tmp_path: Path) -> None:
    asked = request(tmp_path, T.Q2_K, T.Q3_K)
    engine = FakeEngine(damage=harm)
    wide = judge(asked, engine, Silent())
    narrow = FakeEngine(damage=harm)
    assert (
        judge(replace(asked, prediction_bytes=1), narrow, Silent()) == wide and narrow.opened > engine.opened
    )


def test_what_cannot_be_judged_is_one_line(tmp_path: Path) -> None:
    asked = request(tmp_path, T.Q2_K, T.Q3_K)
    other = quantized(tmp_path / "other.gguf", T.Q4_K, extra={"tokenizer.ggml.model": "gpt2"})
    troubles = {
        "differ in tokenizer": (asked.files[0], other),
        "is given twice": (asked.files[0], asked.files[0]),
        "source.gguf: is given twice": (asked.files[0], asked.source),
        "nothing to be compared with": (asked.files[0],),
    }
    for says, files in troubles.items():
        with pytest.raises(BadInput, match=says):
            judge(
                Judging(files=files, source=asked.source, texts=asked.texts, ctx=32), FakeEngine(), Silent()
            )


def test_a_run_folder_is_no_place_for_a_judgement(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text("{}")
    with pytest.raises(BadInput, match="run folder"):
        judge(request(tmp_path, T.Q2_K, T.Q3_K), FakeEngine(), Recorder(), tmp_path / "run")


# ---- the command ----


def test_the_command_judges_presets(
    cerebellum: Cerebellum, tmp_path: Path, select_text: Path, report_text: Path
) -> None:
    files = [tmp_path / f"{preset}.gguf" for preset in ("Q2_K", "Q4_K_M")]
    for file in files:
        assert cerebellum("quantize", DEMO_MODEL, file.stem, "-o", file).code == 0
    few = ("--ctx", 64, "--chunks", 6, "--threads", 2)
    texts = ("--text", f"chosen={select_text}", "--text", report_text)
    asked = ("judge", *files, "--source", DEMO_MODEL, *texts, *few, "-o", tmp_path / "judged")
    found = cerebellum(*asked, "--json").json
    assert [text["name"] for text in found["texts"]] == ["chosen", report_text.stem]
    assert found["files"][0]["kld_mean"] > found["files"][1]["kld_mean"] > 0
    words = cerebellum(*asked)
    assert words.code == 0 and "Q4_K_M" in words.out and "judge.png" in words.out
    pair = cerebellum("compare", DEMO_MODEL, files[0], "--text", report_text, *few, "--json").json
    assert found["files"][0]["texts"][1]["chunks"] == pair["chunks"] == 6


# ---- files, texts and folders that are not what they should be ----


def judged(asked: Judging, folder: Path | None = None, engine: FakeEngine | None = None) -> Judgement:
    return judge(asked, engine or FakeEngine(damage=harm), Silent(), folder)


def test_the_same_bytes_twice_are_one_line(tmp_path: Path) -> None:
    """Twins would each be no better than the other, and a text would count as two."""
    asked = request(tmp_path, T.Q2_K, T.Q3_K)
    prose = asked.texts["prose"]
    for path in (asked.files[0], asked.source, prose):
        shutil.copyfile(path, tmp_path / f"copy-{path.name}")
    twins = replace(asked, files=(*asked.files, tmp_path / f"copy-{asked.files[0].name}"))
    of_source = replace(asked, files=(*asked.files, tmp_path / "copy-source.gguf"))
    texts = [replace(asked, texts={"a": prose, "b": path}) for path in (prose, tmp_path / "copy-prose.txt")]
    for wrong in (twins, of_source, *texts):
        with pytest.raises(BadInput, match="has the same bytes as"):
            judged(wrong, tmp_path / "judged")
    with pytest.raises(BadInput, match="no text"):
        judged(replace(asked, texts={}))
    assert not (tmp_path / "judged").exists()


def test_a_file_of_another_model_is_one_line(tmp_path: Path) -> None:
    asked = request(tmp_path, T.Q2_K, T.Q3_K)
    wide = write_hybrid(tmp_path / "wide.gguf", {**hybrid_shapes(), "blk.1.attn_q.weight": (256, 512)})
    with pytest.raises(BadInput, match=r"wide\.gguf: is no file of .*attn_q.*another shape"):
        judged(replace(asked, files=(*asked.files, wide)))
    records = [encode_kv("general.architecture", "llama", GGUFValueType.STRING), *hybrid_records()[1:]]
    tensors = [random_tensor(n, s, T.F32 if len(s) == 1 else T.F16) for n, s in hybrid_shapes().items()]
    write_gguf(tmp_path / "llama.gguf", records, tensors)
    with pytest.raises(BadInput, match="its architecture is llama"):
        judged(replace(asked, files=(*asked.files, tmp_path / "llama.gguf")))


def test_of_two_alike_in_size_and_damage_the_first_survives() -> None:
    found = Ordered(pairs=(pair(0, 1, TIE),), last_look=(0, 0), collapsed=frozenset(), sure=True)
    assert [each.standing for each in stands(found, [10, 10])] == ["survives", "matched"]


@pytest.mark.parametrize("which", [0, -1], ids=["file", "source"])
def test_a_file_that_changes_while_it_is_judged_is_one_line(tmp_path: Path, which: int) -> None:
    asked = request(tmp_path, T.Q2_K, T.Q3_K)
    path = (*asked.files, asked.source)[which]

    class Writing(FakeEngine):
        """Somebody writes to the file between its hash and its opening."""

        def open(self, paths: Sequence[Path], ctx: int) -> AbstractContextManager[FakeModel]:
            if paths[0] == path:
                os.utime(path, (1, 1))
            return super().open(paths, ctx)

    with pytest.raises(BadInput, match="changed while it was judged"):
        judged(asked, tmp_path / "judged", Writing(damage=harm))


def test_what_changed_between_two_judgements_is_read_anew(tmp_path: Path) -> None:
    asked = request(tmp_path, T.Q2_K, T.Q3_K)
    first = judged(asked, tmp_path / "judged")
    content = bytearray(asked.files[0].read_bytes())
    content[-64] ^= 1
    asked.files[0].write_bytes(content)
    engine = FakeEngine(damage=harm)
    again = judged(asked, tmp_path / "judged", engine)
    assert again.files[0].sha256 != first.files[0].sha256
    assert {names for names, _ in engine.scored} == {(asked.files[0].name,), ("source.gguf",)}


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("qwen-F16-Q2_K", "qwen-Cerebellum-Q2_K"), ["F16-Q2_K", "Cerebellum-Q2_K"]),
        (("demo.F16-Q4_K_S", "demo-Cerebellum-Q4_K_M"), ["F16-Q4_K_S", "Cerebellum-Q4_K_M"]),
        (("Q4_K_S", "Q4_K_M"), ["Q4_K_S", "Q4_K_M"]),
        (("a-1.5B", "a-1.7B"), ["1.5B", "1.7B"]),
        (("a-b", "a-b-c"), ["b", "b-c"]),
        (("alone-Q4_K_M",), ["alone-Q4_K_M"]),
        ((), []),
    ],
)
def test_the_picture_names_what_tells_files_apart(names: tuple[str, ...], labels: list[str]) -> None:
    assert told_apart(names) == labels


@pytest.mark.parametrize("name", ["judge.json", "judge.md", "judge.png", "predictions"])
def test_what_no_judgement_made_stays(tmp_path: Path, name: str) -> None:
    asked = request(tmp_path, T.Q2_K, T.Q3_K)
    mine = tmp_path / "judged" / name
    mine.parent.mkdir()
    if name == "predictions":
        mine.mkdir()
    else:
        mine.write_text("mine")
    with pytest.raises(BadInput, match="no judgement of this folder made it"):
        judged(asked, mine.parent)
    assert list(mine.parent.rglob("*")) == [mine]


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE chunk SET nll = CAST(zeroblob(56) || x'0000803f' AS BLOB) WHERE chunk = 3",
        "UPDATE divergence SET kld = CAST(zeroblob(56) || x'0000803f' AS BLOB) WHERE chunk = 3",
        "UPDATE divergence SET same = zeroblob(15) WHERE chunk = 3",
        "UPDATE divergence SET kld = substr(kld, 1, 8), same = substr(same, 1, 2)",
        "UPDATE series SET variant = CASE label WHEN 'm-Q2_K' THEN 'x' || text ELSE variant END",
        "UPDATE chunk SET nll = (SELECT nll FROM chunk c WHERE c.chunk != chunk.chunk LIMIT 1) WHERE chunk = 3",
    ],
)
def test_kept_scores_that_were_edited_are_refused_or_read_anew(tmp_path: Path, edit: str) -> None:
    asked = request(tmp_path, T.Q2_K, T.Q3_K)
    first = judged(asked, tmp_path / "judged")
    with closing(sqlite3.connect(tmp_path / "judged" / "ledger.sqlite")) as database, database:
        database.execute(edit)
    try:
        assert judged(asked, tmp_path / "judged") == first
    except BadInput as refused:
        assert "ledger.sqlite: is damaged" in str(refused) and "move it away" in str(refused)


# ---- conversations ----

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


class Special(FakeEngine):
    """Keeps the texts that it tokenizes with special tokens."""

    def tokenize(self, path: Path, text: bytes, *, special: bool = False) -> Tokenized:
        if special:
            self.notes = text
        return super().tokenize(path, text, special=special)

    notes: bytes = b""


def test_conversations_are_read_in_the_models_own_template(tmp_path: Path) -> None:
    asked = '{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b\\n"}]}\n'
    path = tmp_path / "chat.jsonl"
    path.write_text(asked * 40)
    model = quantized(tmp_path / "m.gguf", T.Q2_K, extra={TEMPLATE_KEY: TEMPLATE})
    engine = Special()
    corpus = load_text(engine, open_source(model, allow_requantize=True), path, 32)
    assert engine.notes == b"<user>a?<assistant>b\n" * 40
    assert corpus.n_chunks == len(engine.notes) // 32 and corpus.path == path


def test_what_is_no_conversation_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a?"}]}\n{"text": "b"}\n')
    model = quantized(tmp_path / "m.gguf", T.Q2_K, extra={TEMPLATE_KEY: TEMPLATE})
    with pytest.raises(BadInput, match="line 2 is no conversation"):
        load_text(FakeEngine(), open_source(model, allow_requantize=True), path, 32)
    bare = quantized(tmp_path / "bare.gguf", T.Q2_K)
    with pytest.raises(BadInput, match="has no chat template"):
        load_text(FakeEngine(), open_source(bare, allow_requantize=True), path, 32)


def test_without_a_text_the_domains_that_report_are_read() -> None:
    expected = {text.name: text.path for text in shipped_domains("report")}
    context = click.Context(click.Command("judge"))
    option = click.Option(["--text"])
    assert take_texts(context, option, ()) == expected
    named = [NamedTexts().convert(text, None, None) for text in ("domains", "chat=talks.jsonl")]
    assert take_texts(context, option, named) == expected | {"chat": Path("talks.jsonl")}


def test_a_name_that_is_there_twice_is_refused(cerebellum: Cerebellum, report_text: Path) -> None:
    twice = ("--text", f"a={report_text}", "--text", f"a={report_text}")
    ran = cerebellum("judge", DEMO_MODEL, DEMO_MODEL, "--source", DEMO_MODEL, *twice)
    assert ran.code == 2 and "two texts have one name" in ran.complaint
