"""The card's front matter, made by the Hub's own classes: it is what the Hub indexes a model by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cerebellum.card.evidence import Benchmark, Evidence
from cerebellum.card.licenses import LICENSES
from cerebellum.card.origin import base_model
from cerebellum.errors import BadInput
from cerebellum.page.markdown import one_line

_DATASETS = {
    "hellaswag": "Rowan/hellaswag",
    "arc-challenge": "allenai/ai2_arc",
    "mmlu-redux": "edinburgh-dawg/mmlu-redux-2.0",
}


def front_matter(evidence: Evidence, repo: str | None, labels: Sequence[str]) -> ModelCardData:
    """Returns license, base model, tags and results; ``labels`` are those of all files of the repository.

    What the metadata does not tell is left out and not guessed, for the Hub would index the guess.
    """
    metadata = evidence.run.source.metadata
    said = evidence.run.published
    base = said.base_model or base_model(metadata)
    return ModelCardData(
        **_license({**metadata, "general.license": said.license} if said.license else metadata),
        model_name=one_line(evidence.run.name),
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="gguf",
        pipeline_tag="text-generation",
        language=_languages(metadata.get("general.languages")),
        tags=_tags(evidence, labels),
        quantized_by=repo.partition("/")[0] if repo else "Cerebellum",
        eval_results=list(_results(evidence)),
    )


def checked(content: str, path: str) -> str:
    """Returns the card once the Hub's own reader has read its front matter back; BadInput, naming
    ``path``, where it cannot, so that no broken card is ever written.
    """
    try:
        ModelCard(content, ignore_metadata_errors=False)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path}: its front matter would not be accepted ({error}); please report this"
        ) from error
    return content


def _license(metadata: Mapping[str, object]) -> dict[str, Any]:
    """Returns an identifier that the Hub knows, or ``other`` with the name and link that the file
    gives; a license that nobody stated is not stated here either.
    """
    given = str(metadata.get("general.license", "")).strip()
    if given.lower() in LICENSES:
        return {"license": given.lower()}
    found = {"license": "other"} if given else {}
    name = metadata.get("general.license.name") or given
    link = str(metadata.get("general.license.link", ""))
    slug = re.sub(r"[^a-z0-9.]+", "-", str(name).lower()).strip("-")[:64]
    if found and slug:
        found |= {"license_name": slug}
    if found and link.startswith("https://"):
        found |= {"license_link": link}
    return found


def _tags(evidence: Evidence, labels: Sequence[str]) -> list[str]:
    """Returns what people filter models by on the Hub: the format, how it was made, its architecture,
    the base, the labels of its files, and what kind of model it is.
    """
    source = evidence.run.source
    tags = ["gguf", "quantized", "cerebellum", "mixed-precision", "imatrix", "llama.cpp"]
    tags += dict.fromkeys((source.architecture, evidence.plan.base, *labels))
    tags += ["moe"] if source.experts else []
    tags += ["hybrid"] if source.recurrent_layers and source.attention_layers else []
    tags += ["conversational"] if source.metadata.get("chat_template") else []
    return tags


def _languages(value: object) -> list[str] | None:
    """Returns those of a list that are language codes; None where there is none, or no list."""
    given = value if isinstance(value, list) else []
    words = [w for w in given if isinstance(w, str) and re.fullmatch(r"[a-z]{2,3}", w)]
    return words or None


def _results(evidence: Evidence) -> Iterator[EvalResult]:
    """Yields the perplexity on the report text, where it is finite, and each benchmark in percent."""
    report = evidence.run.report
    if report.result.ppl is not None:
        yield EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type="text",
            dataset_name=one_line(report.text),
            dataset_args={"chunks": report.chunks, "ctx": evidence.measured.ctx},
            metric_type="perplexity",
            metric_name="Perplexity",
            metric_value=round(report.result.ppl, 4),
        )
    for bench in evidence.run.benchmarks:
        yield _benchmark(bench)


def _benchmark(bench: Benchmark) -> EvalResult:
    known = next((d for key, d in _DATASETS.items() if key in bench.task.lower().replace("_", "-")), None)
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=known or bench.task.lower(),
        dataset_name=bench.task,
        metric_type="accuracy",
        metric_name=f"Accuracy ({bench.protocol}, {bench.metric})",
        metric_value=round(bench.accuracy.mean, 2),
    )
