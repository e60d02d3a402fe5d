"""lm-evaluation-harness's own runner over our model class, offline, on local JSON tasks.

Skipped where the extra is not installed: pip install 'cerebellum-gguf[lm-eval]'.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cerebellum.bench.stage import BenchRequest, bench_files
from cerebellum.bench.tasks import SAMPLES, TASKS, load_questions
from cerebellum.engine.asking import Ask
from cerebellum.llama.asker import open_asker
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.progress import Silent
from cerebellum.settings import DEMO_MODEL

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the harness and its dependencies warn as they like
    pytest.mark.skipif(not find_spec("lm_eval"), reason="no lm-eval"),
]

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{options}}"
doc_to_target: gold
metric_list: [{metric: acc, higher_is_better: true}, {metric: acc_norm, higher_is_better: true}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
WRITING = """
task: local_writing
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TEXTS = ("The river is a tributary of the", "In 1990 , the game was released in the United States .")


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tasks")
    questions = load_questions(TASKS["arc_challenge"], SAMPLES)
    rows = [
        {"context": q.context, "options": list(q.options), "gold": q.golds["original"]} for q in questions
    ]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, content in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(content.replace("FOLDER", str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield _evaluate(folder)


def _evaluate(folder: Path) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import cerebellum.bench.lm_eval  # noqa: F401 - registers the class

    found = lm_eval.simple_evaluate(
        model="cerebellum",
        model_args={"path": str(DEMO_MODEL), "threads": 2},
        tasks=["local_choice", "local_rolling", "local_writing"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return dict(found)


def test_the_harness_and_our_bench_score_the_same(harness: dict[str, Any], tmp_path: Path) -> None:
    request = BenchRequest(tasks=("arc_challenge",), protocols=("loglikelihood",), data=SAMPLES)
    ours = bench_files([DEMO_MODEL], request, EngineSettings(threads=2), tmp_path, Silent())
    for row in ours.scores:
        if row.metric in ("acc", "acc_norm"):
            theirs = harness["results"]["local_choice"][f"{row.metric},none"]
            assert theirs == pytest.approx(row.accuracy_pct / 100)
    (path,) = tmp_path.glob("*.jsonl")
    records = {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}
    questions = load_questions(TASKS["arc_challenge"], SAMPLES)
    for question, sample in zip(questions, harness["samples"]["local_choice"], strict=True):
        totals = [math.fsum(row) for row in records[question.id]["token_log_probs"]]
        theirs = [float(reply[0]) for reply in sample["filtered_resps"]]
        assert totals == pytest.approx(theirs, abs=0.02)


def test_rolling_predicts_every_token_once(harness: dict[str, Any]) -> None:
    with open_asker(LlamaEngine(EngineSettings(threads=2)), [DEMO_MODEL]) as asker:
        total = 0.0
        for text in TEXTS:
            tokens = asker.tokenize(text, add_special=False)
            assert asker.vocabulary.bos is not None
            ((_, reply),) = asker.score([Ask(prompt=(asker.vocabulary.bos,), endings=(tokens,))])
            total += reply.endings[0].total
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    expected = math.exp(-total / n_bytes)
    assert harness["results"]["local_rolling"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-3)


def test_generation_is_ours_up_to_the_stop(harness: dict[str, Any]) -> None:
    with open_asker(LlamaEngine(EngineSettings(threads=2)), [DEMO_MODEL]) as asker:
        prompts = [asker.tokenize(text) for text in TEXTS]
        written = dict(asker.generate(prompts, 8, (".",)))
    samples = harness["samples"]["local_writing"]
    assert [sample["resps"][0][0] for sample in samples] == [written[0], written[1]]


def test_sampling_is_refused_and_a_wrong_path_is_one_line() -> None:
    from types import SimpleNamespace

    from cerebellum.bench.lm_eval import CerebellumLM, _by_settings, _fitted
    from cerebellum.errors import BadInput

    with pytest.raises(BadInput, match="generates greedily"):
        _by_settings([SimpleNamespace(args=("x", {"do_sample": True, "temperature": 0.7}))])
    with pytest.raises(BadInput, match="no such file"):
        CerebellumLM(path="/nowhere.gguf")
    assert _fitted((1, 2, 3, 4), (5, 6), 4) == ((2, 3, 4), (5, 6))
