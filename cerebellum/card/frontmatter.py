"""The card's front matter, by the Hub's own classes: what the Hub indexes a model by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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


def front_matter(evidence: Evidence, repo: str | None) -> ModelCardData:
    """License, base model, tags and results; what the metadata does not tell is left out."""
    metadata = evidence.source["metadata"]
    name = one_line(evidence.source["name"])
    return ModelCardData(
        **_license(metadata),
        model_name=name,
        base_model=base_model(metadata),
        base_model_relation="quantized" if base_model(metadata) else None,
        library_name="gguf",
        pipeline_tag="text-generation",
        language=_words(metadata.get("general.languages")),
        tags=_tags(evidence),
        quantized_by=repo.partition("/")[0] if repo else "Cerebellum",
        eval_results=list(_results(evidence)),
    )


def checked(content: str, path: str) -> str:
    """The card, once the Hub's own reader has read its front matter back without an error."""
    try:
        ModelCard(content, ignore_metadata_errors=False)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path}: its front matter would not be accepted ({error}); please report this"
        ) from error
    return content


def base_model(metadata: Mapping[str, Any]) -> str | None:
    """The Hub's id of what was quantized, or None where the file does not tell a usable one."""
    given = [metadata.get(key) for key in _SOURCES]
    owner, name = (metadata.get(f"general.base_model.0.{part}") for part in ("organization", "name"))
    if owner and name:
        given.append(f"{owner}/{name}".replace(" ", "-"))
    return next((repo for value in given if (repo := _repo_id(value))), None)


def _repo_id(value: Any) -> str | None:
    match = _HUB.match(value) if isinstance(value, str) else None
    if match is None:
        return None
    try:
        validate_repo_id(match[1])
    except HFValidationError:
        return None
    return match[1]


def _license(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """An identifier that the Hub knows, or ``other`` with the name and link that the file gives."""
    given = str(metadata.get("general.license", "")).strip()
    if given.lower() in _LICENSES:
        return {"license": given.lower()}
    found = {"license": "other"} if given else {}
    name = metadata.get("general.license.name") or given
    link = metadata.get("general.license.link", "")
    slug = re.sub(r"[^a-z0-9.]+", "-", str(name).lower()).strip("-")[:64]
    if found and slug:
        found["license_name"] = slug
    if found and str(link).startswith("https://"):
        found["license_link"] = str(link)
    return found


def _tags(evidence: Evidence) -> list[str]:
    tags = ["gguf", "quantized", "cerebellum", "mixed-precision", "imatrix", "llama.cpp"]
    source = evidence.source
    tags += [source["architecture"], evidence.plan["base"]]
    tags += ["moe"] if source["experts"] else []
    tags += ["hybrid"] if source["recurrent_layers"] and source["attention_layers"] else []
    if source["metadata"].get("chat_template"):
        tags.append("conversational")
    return tags


def _words(value: Any) -> list[str] | None:
    words = [w for w in value or () if isinstance(w, str) and re.fullmatch(r"[a-z]{2,3}", w)]
    return words or None


def _results(evidence: Evidence) -> Iterator[EvalResult]:
    """Perplexity on the report text, where there is one, and each benchmark in percent."""
    report = evidence.report
    if report["result"]["ppl"] is not None:
        yield EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type="text",
            dataset_name=one_line(report["text"]),
            dataset_args={"chunks": report["chunks"], "ctx": evidence.measured["ctx"]},
            metric_type="perplexity",
            metric_name="Perplexity",
            metric_value=round(report["result"]["ppl"], 4),
        )
    for bench in evidence.benchmarks:
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
