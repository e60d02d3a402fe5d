"""The card's front matter, made by the Hub's own classes: it is what the Hub indexes a model by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from cerebellum.card.evidence import Benchmark, Evidence
from cerebellum.errors import BadInput
from cerebellum.page.markdown import one_line

_HUB = re.compile(r"^(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)/?$", re.ASCII)
_HUB_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda
cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0
postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community
gemma unknown other
"""
_LICENSES = frozenset(_HUB_LICENSES.split())
"""The identifiers the Hub knows (huggingface.co/docs/hub/repositories-licenses); others are `other`."""

_DATASETS = {
    "hellaswag": "Rowan/hellaswag",
    "arc-challenge": "allenai/ai2_arc",
    "mmlu-redux": "edinburgh-dawg/mmlu-redux-2.0",
}
_SOURCES = (
    "general.source.huggingface.repository",
    "general.source.repo_url",
    "general.source.url",
    "general.repo_url",
    "general.base_model.0.repo_url",
)
"""Where a GGUF says what it was made from: the repository of the very weights before its ancestors."""


def front_matter(evidence: Evidence, repo: str | None, labels: Sequence[str]) -> ModelCardData:
    """Returns license, base model, tags and results; ``labels`` are those of all files of the repository.

    What the metadata does not tell is left out and not guessed, for the Hub would index the guess.
    """
    metadata = evidence.run.source.metadata
    name = one_line(evidence.run.source.name)
    return ModelCardData(
        **_license(metadata),
        model_name=name,
        base_model=base_model(metadata),
        base_model_relation="quantized" if base_model(metadata) else None,
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


def base_model(metadata: Mapping[str, object]) -> str | None:
    """Returns the Hub's id of what was quantized, or None where the file does not tell a usable one.

    Any text may stand in a GGUF, so only a valid id passes.
    """
    given = [metadata.get(key) for key in _SOURCES]
    owner, name = (metadata.get(f"general.base_model.0.{part}") for part in ("organization", "name"))
    if owner and name:
        given.append(f"{owner}/{name}".replace(" ", "-"))
    return next((repo for value in given if (repo := _repo_id(value))), None)


def _repo_id(value: object) -> str | None:
    """Returns ``owner/name`` of a value that is that or an address on the Hub, if the Hub would take it."""
    match = _HUB.match(value) if isinstance(value, str) else None
    if match is None:
        return None
    try:
        validate_repo_id(match[1])
    except HFValidationError:
        return None
    return match[1]


def _license(metadata: Mapping[str, object]) -> dict[str, Any]:
    """Returns an identifier that the Hub knows, or ``other`` with the name and link that the file
    gives; a license that nobody stated is not stated here either.
    """
    given = str(metadata.get("general.license", "")).strip()
    if given.lower() in _LICENSES:
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
