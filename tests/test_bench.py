"""The bench on the official fake: prompts, scores, pairs, audit, and no question asked twice."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from cerebellum.bench.answers import encode_pair
from cerebellum.bench.artifacts import (
    BenchResults,
    DataFile,
    LetterAnswer,
    LoglikelihoodAnswer,
    ScoreRow,
    Where,
)
from cerebellum.bench.audit import audit, is_mojibake
from cerebellum.bench.chat import render_chat
from cerebellum.bench.evidence import Answers, held
from cerebellum.bench.scores import Examinee
from cerebellum.bench.stage import BenchRequest, bench, distinct
from cerebellum.bench.tasks import (
    SAMPLES,
    TASKS,
    choose,
    letter_prompt,
    load_questions,
    read_letter,
    rotated,
)
from cerebellum.cli import commands as cli
from cerebellum.cli.bench_tables import bench_tables
from cerebellum.codec import as_json, read_artifact, write_artifact
from cerebellum.engine.asking import Vocabulary
from cerebellum.engine.fake_asker import PLAIN, FakeAsker, arbitrary
from cerebellum.errors import BadInput
from cerebellum.progress import Silent

REQUEST = BenchRequest(data=SAMPLES)
GOOD = Examinee(name="good", paths=(Path("good.gguf"),), sha256="a" * 64)
BASE = Examinee(name="base", paths=(Path("base.gguf"),), sha256="b" * 64)


def run(
    tmp_path: Path, asker: FakeAsker, request: BenchRequest = REQUEST, *examinees: Examinee
) -> BenchResults:
    return bench(examinees or (GOOD,), request, asker.opened, tmp_path, Silent())


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"{name}.*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(found: BenchResults, task: str, metric: str, labels: str = "original") -> ScoreRow:
    (row,) = [r for r in found.scores if (r.task, r.metric, r.labels) == (task, metric, labels)]
    return row


def knows(task: str) -> Callable[[str, str], float]:
    """A model that knows the right option wherever it is shown, by letter and by text."""
    questions = load_questions(TASKS[task], SAMPLES)
    right = {q.stem: q.options[q.golds["original"]] for q in questions}
    contexts = {q.context.rstrip(): q.options[q.golds["original"]] for q in questions}

    def worth(prompt: str, ending: str) -> float:
        if prompt in contexts:
            return -0.1 if ending.strip() == contexts[prompt].strip() else -50.0
        gold = next(option for stem, option in right.items() if f"\n\n{stem}\n\n" in prompt)
        shown = prompt.split("\n\n")[-2 if prompt.endswith("Answer:") else -1]
        return -0.1 if f"{ending.strip()}. {gold.strip()}" in shown.split("\n") else -9.0

    return worth


@pytest.mark.parametrize("task", list(TASKS))
def test_a_model_that_knows_is_right_in_both_protocols(task: str, tmp_path: Path) -> None:
    request = BenchRequest(data=SAMPLES, tasks=(task,), rotations=4)
    found = run(tmp_path, FakeAsker(worth=knows(task)), request)
    for metric in ("letter", "letter_rotated", "acc", "acc_norm", "acc_token"):
        assert score(found, task, metric).accuracy_pct == 100.0
    assert found.audit.ok


def test_turned_options_change_no_answer_of_a_model_that_knows(tmp_path: Path) -> None:
    """Nothing in prompt or reading prefers a letter: wherever an option stands, it is chosen the same."""
    request = BenchRequest(data=SAMPLES, tasks=("arc_challenge",), protocols=("letter",), rotations=5)
    found = run(tmp_path, FakeAsker(worth=knows("arc_challenge")), request)
    check = found.audit.checks[0]
    assert check.letter_bias == check.turned.letter_shares == (0.25,) * 4
    assert check.turned.accuracy_pct == (100.0,) * 4 and check.turned.same_option_pct == 100.0
    for record in lines(tmp_path, "arc_challenge.letter"):
        chosen = [
            (row.index(max(row)) + turn) % len(record["options"])
            for turn, row in enumerate(record["letter_log_probs"])
        ]
        assert set(chosen) == {record["golds"]["original"]}
        assert len(record["letter_log_probs"]) == min(5, len(record["options"]))


def test_a_model_that_says_a_letter_is_at_chance_once_turned(tmp_path: Path) -> None:
    request = BenchRequest(data=SAMPLES, tasks=("mmlu_redux",), protocols=("letter",), rotations=4)
    asker = FakeAsker(worth=lambda _p, ending: -0.1 if ending.strip() == "B" else -4.0)
    found = run(tmp_path, asker, request)
    (check,) = found.audit.checks
    assert check.chosen_shares["letter"][1] == 1.0
    assert check.turned.letter_shares == (0.0, 1.0, 0.0, 0.0)
    assert sum(check.turned.accuracy_pct) == pytest.approx(100)  # each option stood at B once
    assert any("says A 0%, B 100%" in str(shown) for shown in bench_tables(found))
    assert check.letter_bias == pytest.approx([0.0193, 0.942, 0.0193, 0.0193], abs=1e-3)
    assert any("option B is chosen 100% of the time" in problem for problem in check.problems)
    for record in lines(tmp_path, "mmlu_redux.letter"):
        totals = [0.0] * 4
        for turn, row in enumerate(record["letter_log_probs"]):
            for place, value in enumerate(row):
                totals[(place + turn) % 4] += math.exp(value)
        assert max(totals) - min(totals) < 1e-6


def test_no_question_is_asked_twice(tmp_path: Path) -> None:
    request = BenchRequest(data=SAMPLES, tasks=("hellaswag",), protocols=("loglikelihood",))
    first = FakeAsker(stop_after=17)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first, request)
    second = FakeAsker()
    found = run(tmp_path, second, request)
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked) == 17 and len(second.asked) == 23
    assert found.session[0].reused == 17
    third = FakeAsker()
    again = run(tmp_path, third, request)
    assert third.asked == [] and again.scores == found.scores


def test_answers_do_not_depend_on_the_interruption(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", FakeAsker(stop_after=50))
    resumed = run(tmp_path / "a", FakeAsker())
    straight = run(tmp_path / "b", FakeAsker())
    for key in ("scores", "audit", "models"):
        assert getattr(resumed, key) == getattr(straight, key)


def test_a_torn_line_is_asked_again_and_no_other(tmp_path: Path) -> None:
    request = BenchRequest(data=SAMPLES, tasks=("hellaswag",), protocols=("letter",))
    run(tmp_path, FakeAsker(), request)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-40])
    second = FakeAsker()
    run(tmp_path, second, request)
    assert len(second.asked) == 1
    assert len({record["id"] for record in lines(tmp_path, "hellaswag.letter")}) == 40


def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    request = BenchRequest(data=SAMPLES, tasks=("hellaswag",), protocols=("letter",))
    run(tmp_path, FakeAsker(), request)
    (path,) = tmp_path.glob("*.jsonl")
    content = path.read_text().splitlines(keepends=True)
    path.write_text("".join([content[0], "{broken\n", *content[2:]]))
    with pytest.raises(BadInput, match="line 2 is damaged"):
        run(tmp_path, FakeAsker(), request)


def test_a_folder_is_for_one_bench_at_a_time(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(BadInput, match="another bench is at work"):
        run(tmp_path, FakeAsker())


def test_another_model_shares_no_answers(tmp_path: Path) -> None:
    run(tmp_path, FakeAsker())
    second = FakeAsker()
    run(tmp_path, second, REQUEST, BASE)
    assert len(second.asked) == 2 * 3 * 40


def test_a_larger_limit_only_adds_questions(tmp_path: Path) -> None:
    run(tmp_path, FakeAsker(), BenchRequest(data=SAMPLES, limit=10))
    second = FakeAsker()
    found = run(tmp_path, second, BenchRequest(data=SAMPLES, limit=25))
    assert len(second.asked) == 2 * 3 * 15
    assert score(found, "hellaswag", "acc").n == 25


def test_paired_differences_count_what_only_one_has_right(tmp_path: Path) -> None:
    request = BenchRequest(data=SAMPLES, tasks=("arc_challenge",), protocols=("loglikelihood",))
    run(tmp_path, FakeAsker(worth=knows("arc_challenge")), request, GOOD)
    run(tmp_path, FakeAsker(), request, BASE)
    found = run(tmp_path, FakeAsker(stop_after=0), request, GOOD, BASE)
    base = next(r for r in found.scores if r.model == "base" and r.metric == "acc")
    (row,) = [r for r in found.paired if r.metric == "acc"]
    assert (row.only_model, row.only_against) == (40 - base.correct, 0)
    assert row.difference_pct == pytest.approx(100 - base.accuracy_pct)
    assert row.ci_pct[0] < row.difference_pct and row.p_value < 1e-6
    assert row.detectable_pct > 5
    assert len(bench_tables(found)) >= 2


def test_no_artifact_says_where_things_lie(tmp_path: Path) -> None:
    found = run(tmp_path, FakeAsker(), BenchRequest(data=SAMPLES, tasks=("hellaswag", "mmlu_redux")))
    name = "hellaswag_val.jsonl"
    digest = hashlib.sha256((SAMPLES / name).read_bytes()).hexdigest()
    assert found.request.data["hellaswag"] == DataFile(file=name, sha256=digest)
    written = [json.dumps(as_json(found)), *(path.read_text() for path in tmp_path.glob("*.json*"))]
    assert not any(str(folder) in text for text in written for folder in (tmp_path, SAMPLES.parent))


def test_models_of_one_name_are_told_apart() -> None:
    models = [GOOD, BASE, Examinee(name="good", paths=(Path("other/good.gguf"),), sha256="c" * 64)]
    assert [c.name for c in distinct(models)] == ["good aaaaaaaa", "base", "good cccccccc"]


def test_mmlu_redux_is_scored_on_both_sets_of_labels_by_subject(tmp_path: Path) -> None:
    request = BenchRequest(data=SAMPLES, tasks=("mmlu_redux",), protocols=("loglikelihood",))
    found = run(tmp_path, FakeAsker(worth=knows("mmlu_redux")), request)
    original, corrected = (score(found, "mmlu_redux", "acc", labels) for labels in ("original", "corrected"))
    assert (original.n, original.correct) == (40, 40)
    assert (corrected.n, corrected.correct) == (38, 37)  # 2 broken left out, 1 wrong label fixed
    assert sum(s.n for s in corrected.by_subject.values()) == 38


def test_loglikelihood_metrics_are_the_harness_and_llama_perplexity_ones(tmp_path: Path) -> None:
    request = BenchRequest(data=SAMPLES, tasks=("hellaswag",), protocols=("loglikelihood",))
    run(tmp_path, FakeAsker(), request)
    questions = {q.id: q for q in load_questions(TASKS["hellaswag"], SAMPLES)}
    for record in lines(tmp_path, "hellaswag.loglikelihood"):
        question = questions[record["id"]]
        totals = [arbitrary(question.context.rstrip(), " " + option) for option in question.options]
        norms = [total / len(option) for total, option in zip(totals, question.options, strict=True)]
        assert record["answers"]["acc"] == totals.index(max(totals))
        assert record["answers"]["acc_norm"] == norms.index(max(norms))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b", None),
        ("(C)", "C"),
        ("**D.** because", "D"),
        ("The correct answer is: A", "A"),
        ("The answer is (B).", "B"),
        ("Answer: **C**", "C"),
        ("I think so.\nD. The last", "D"),
        ("$\\boxed{A}$", "A"),
        ("<think>maybe A or B</think>\n\nC", "C"),
        ("```\nB\n```", "B"),
        ("A planet turns", None),
        ("The answer is a planet", None),
        ("B: the second", "B"),
        ("Because of gravity", None),
        ("I'd say it turns", None),
        ("E", None),
        ("", None),
    ],
)
def test_letters_are_read_from_generated_text(text: str, letter: str | None) -> None:
    assert read_letter(text, "ABCD") == letter


def test_generated_answers_are_kept_raw_and_audited(tmp_path: Path) -> None:
    request = BenchRequest(data=SAMPLES, tasks=("hellaswag",), protocols=("letter",), generate=16)
    found = run(tmp_path, FakeAsker(writes=lambda _p: "¯\\_(ツ)_/¯"), request)
    assert score(found, "hellaswag", "generated").correct == 0
    assert {record["raw"] for record in lines(tmp_path, "hellaswag.letter")} == {"¯\\_(ツ)_/¯"}
    assert any("40 of 40 answers could not be read" in p for p in found.audit.checks[0].problems)


def answer(**changed: Any) -> LetterAnswer:
    fields = {
        "id": "q", "subject": None, "prompt_sha256": "", "prompt_tokens": 1, "letters": "ABCD",
        "top_tokens": (), "correct": {}, "options": tuple("wxyz"), "golds": {"original": 0},
        "answers": {"letter": 0}, "raw": "A", "finite": True, "truncated": False, "mojibake": False,
        "letter_log_probs": ((-1.0,) * 4,),
    }  # fmt: skip
    return LetterAnswer(**(fields | changed))


def problems(answers: list[LetterAnswer]) -> tuple[str, ...]:
    return audit(Where(model="m", task="t", protocol="letter"), answers).problems


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"finite": False, "answers": {"letter": None}}, "collapsed"),
        ({"truncated": True}, "longer than the model's context"),
        ({"raw": " "}, "empty"),
        ({"raw": "cafÃ©"}, "damaged characters"),
        ({"mojibake": True}, "prompts hold damaged characters"),
        ({"letter_log_probs": ((-9.0,) * 4,)}, "could not be read"),
    ],
)
def test_every_check_of_the_audit_can_fail(changed: dict[str, Any], words: str) -> None:
    good = [{"golds": {"original": i % 4}, "answers": {"letter": i % 4}} for i in range(40)]
    assert problems([answer(**fields) for fields in good]) == ()
    found = problems([answer(**(fields | changed)) for fields in good])
    assert any(words in problem for problem in found)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_a_place_that_has_the_short_options_may_be_chosen_more(metric: str) -> None:
    """acc adds up log-probabilities, so the shortest wins; per character there is no such excuse."""
    by_length = answer(options=("a", "bbb", "cc", "dddd"), answers={metric: 0}, golds={"original": 1})
    elsewhere = [
        answer(options=("aaaa", "bbb", "cc", "d"), answers={metric: i % 4}, golds={"original": i % 3 + 1})
        for i in range(24)
    ]
    found = problems([by_length] * 32 + elsewhere)
    assert [problem.startswith(f"{metric}: option A") for problem in found] == ([True] * (metric != "acc"))


# A line as the first release wrote it.
OLD_LINE = {
    "id": "arc/1", "subject": None, "prompt_sha256": "0" * 64, "prompt_tokens": 12, "truncated": False,
    "mojibake": False, "options": ["a", "b"], "golds": {"original": 1},
    "token_log_probs": [[-1.5], [-2, -0.5]], "shared_tokens": 0, "finite": True,
    "answers": {"acc": 0, "acc_norm": None}, "correct": {"acc": False},
}  # fmt: skip


def test_evidence_of_the_first_release_opens(tmp_path: Path) -> None:
    with Answers(tmp_path, "arc.loglikelihood", {}, LoglikelihoodAnswer) as empty:
        path = empty.path
    path.write_text(json.dumps(OLD_LINE) + "\n")
    with Answers(tmp_path, "arc.loglikelihood", {}, LoglikelihoodAnswer) as found:
        assert found.known["arc/1"] == ("0" * 64, {"original": 1})
        (kept,) = found.by_id.values()
        found.append(kept)
    first, second = path.read_text().splitlines()
    assert json.loads(first) == OLD_LINE == json.loads(second)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"options": None}, "line 1 is damaged"),
        ({"golds": {"original": "B"}}, "line 1 is damaged"),
        ({"letters": "AB"}, "line 1 is damaged"),
    ],
)
def test_a_line_of_another_shape_is_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    with Answers(tmp_path, "arc.loglikelihood", {}, LoglikelihoodAnswer) as empty:
        path = empty.path
    path.write_text(json.dumps(OLD_LINE | changed) + "\n")
    with pytest.raises(BadInput, match=words):
        Answers(tmp_path, "arc.loglikelihood", {}, LoglikelihoodAnswer)


def test_bench_json_is_read_back_as_written(tmp_path: Path) -> None:
    found = run(tmp_path, FakeAsker(), BenchRequest(data=SAMPLES, limit=4, rotations=4), GOOD, BASE)
    write_artifact(tmp_path / "bench.json", found)
    assert read_artifact(tmp_path / "bench.json", BenchResults, "run it again") == found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: [raw], "holds an array where an object was wanted; run it again"),
        (lambda raw: raw | {"format": 0}, "has format 0, this version reads format 1"),
        (lambda raw: {k: v for k, v in raw.items() if k != "audit"}, "has no key 'audit'"),
        (lambda raw: raw | {"audit": {"ok": True}}, "audit: has no key 'checks'"),
        (lambda raw: raw | {"scores": {}}, "scores: wanted array, got object"),
        (
            lambda raw: raw | {"scores": [raw["scores"][0] | {"n": "4"}]},
            r"scores\[0\]\.n: wanted int, got str",
        ),
        (lambda raw: raw | {"models": [{"name": "good"}]}, r"models\[0\]: has no key 'sha256'"),
    ],
)
def test_a_damaged_bench_json_is_one_line(tmp_path: Path, change: Callable[[Any], Any], words: str) -> None:
    path = tmp_path / "bench.json"
    write_artifact(path, run(tmp_path, FakeAsker(), BenchRequest(data=SAMPLES, limit=2)))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BadInput, match=words) as caught:
        read_artifact(path, BenchResults, "run it again")
    assert str(caught.value).startswith(f"{path}: ")


def test_mojibake_is_told_from_honest_accents() -> None:
    assert is_mojibake("the worldâ€™s") and is_mojibake("caf\ufffd") and is_mojibake("cafÃ©")
    assert not is_mojibake("café, naïve, Ångström, São Paulo, 12 °C, “quoted”")


def test_prompts_longer_than_the_context_are_cut_and_told(tmp_path: Path) -> None:
    found = run(tmp_path, FakeAsker(context_length=150), BenchRequest(data=SAMPLES, tasks=("hellaswag",)))
    assert not found.audit.ok


def test_the_chat_template_is_the_models_own() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    vocabulary = Vocabulary(
        bos=1, eos=2, bos_text="<s>", eos_text="</s>", adds_bos=True, chat_template="<s>" + template
    )
    question = load_questions(TASKS["arc_challenge"], SAMPLES)[0]
    text = letter_prompt(TASKS["arc_challenge"], question, vocabulary)
    assert text.startswith("<|user|>Answer the science question.") and text.endswith("<|assistant|>")
    assert letter_prompt(TASKS["arc_challenge"], question, PLAIN).endswith("\n\nAnswer:")


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}"]
)
def test_a_broken_or_hostile_template_is_one_line(template: str) -> None:
    vocabulary = Vocabulary(
        bos=None, eos=None, bos_text="", eos_text="", adds_bos=False, chat_template=template
    )
    with pytest.raises(BadInput, match="chat template"):
        render_chat(vocabulary, [{"role": "user", "content": "hi"}])


def test_options_turn_in_a_circle() -> None:
    question = load_questions(TASKS["arc_challenge"], SAMPLES)[0]
    assert rotated(question, 0) == question.options
    assert rotated(question, 1)[0] == question.options[1]
    assert rotated(question, len(question.options)) == question.options


def test_spaces_before_an_ending_go_with_it() -> None:
    prompt, ending = encode_pair(FakeAsker(), "Question:  ", "yes")
    assert FakeAsker().text(prompt) == "Question:" and FakeAsker().text(ending) == "  yes"


def test_a_sample_is_seeded_and_nested() -> None:
    questions = load_questions(TASKS["mmlu_redux"], SAMPLES)
    assert choose(questions, 5, 1) == choose(questions, 20, 1)[:5]
    assert choose(questions, 20, 1) != choose(questions, 20, 2)
    assert sorted(q.id for q in choose(questions, 0, 1)) == sorted(q.id for q in questions)


def test_the_hub_has_the_same_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for `datasets` with the Hub's own field names."""
    local = {name: load_questions(task, SAMPLES) for name, task in TASKS.items()}
    monkeypatch.setitem(sys.modules, "datasets", _hub())
    monkeypatch.delenv("CEREBELLUM_DATA", raising=False)
    arc = load_questions(TASKS["arc_challenge"])
    assert arc == local["arc_challenge"]
    fetched = {(q.stem, q.options): dict(q.golds) for q in load_questions(TASKS["mmlu_redux"])}
    for question in local["mmlu_redux"]:
        expected = {k: v for k, v in question.golds.items() if k != "published_subset"}
        assert fetched[question.stem, question.options] == expected


def _hub() -> SimpleNamespace:
    rows = {
        name: [
            json.loads(line)
            for line in (SAMPLES / task.file).with_suffix("").read_text("utf-8").split("\n")
            if line
        ]
        for name, task in TASKS.items()
    }

    def load_dataset(path: str, name: str | None = None, split: str = "") -> list[dict[str, Any]]:
        if path == "allenai/ai2_arc":
            return [
                {
                    "id": r["id"],
                    "question": r["question"],
                    "choices": {"text": r["choices"], "label": r["labels"]},
                    "answerKey": r["answerKey"],
                }
                for r in rows["arc_challenge"]
            ]
        return [
            {
                "question": r["question"],
                "choices": r["choices"],
                "answer": r["answer"],
                "error_type": r["error_type"],
                "correct_answer": r["correct_answer_raw"],
            }
            for r in rows["mmlu_redux"]
            if r["subject"] == name
        ]

    subjects = sorted({r["subject"] for r in rows["mmlu_redux"]})
    return SimpleNamespace(load_dataset=load_dataset, get_dataset_config_names=lambda _path: subjects)


def test_no_data_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CEREBELLUM_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match="--data DIR or set CEREBELLUM_DATA"):
        load_questions(TASKS["hellaswag"])
    with pytest.raises(BadInput, match="no such file"):
        load_questions(TASKS["hellaswag"], tmp_path)
    (tmp_path / "hellaswag_val.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(BadInput, match="cannot be read"):
        load_questions(TASKS["hellaswag"], tmp_path)
    (tmp_path / "arc_challenge_test.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(BadInput, match="not the questions of arc_challenge"):
        load_questions(TASKS["arc_challenge"], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--tasks", "winogrande"], "no such benchmark"), (["--data", "/nowhere"], "no such file")],
)
def test_wrong_use_is_one_line(arguments: list[str], words: str) -> None:
    from cerebellum.settings import DEMO_MODEL

    result = CliRunner().invoke(cli.cli, ["bench", str(DEMO_MODEL), *arguments])
    assert isinstance(result.exception, BadInput) and words in str(result.exception)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ 'a' * 99999999999 }}", "MemoryError"),
        ("{{ 2.0 ** 99999 }}", "OverflowError"),
        ("{{ '%d' % 'x' }}", "cannot be rendered"),
        ("{{ raise_exception('no system') }}", "no system"),
        ("{% if %}", "cannot be rendered"),
        ("{{ strftime_now('\ud800') }}", "cannot be rendered"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 3 s"),
        ("{{ 'abcdefgh' * 9999999 }}", "79,999,992 characters"),
    ],
)
def test_whatever_a_template_does_is_one_line(template: str, said: str) -> None:
    vocabulary = Vocabulary(
        bos=None, eos=None, bos_text="", eos_text="", adds_bos=False, chat_template=template
    )
    with pytest.raises(BadInput, match="template cannot be rendered") as refused:
        render_chat(vocabulary, [{"role": "user", "content": "hi"}])
    assert said in str(refused.value) and len(str(refused.value).splitlines()) == 1
    plain = Vocabulary(
        bos=None,
        eos=None,
        bos_text="",
        eos_text="",
        adds_bos=False,
        chat_template="{{ messages[0].content }}",
    )
    assert render_chat(plain, [{"role": "user", "content": "hi"}]) == "hi", "the next prompt goes on"
