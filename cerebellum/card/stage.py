"""Artifacts become README.md (the model card), report.html and the charts, in seconds and without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cerebellum import __version__, files
from cerebellum.card.budget_story import BudgetStory
from cerebellum.card.cells import (
    architecture,
    benchmark_cells,
    group_cells,
    memory_cells,
    perplexity_cells,
    provenance,
)
from cerebellum.card.commands import run_commands
from cerebellum.card.domains import domain_cells
from cerebellum.card.evidence import (
    read_budget_evidence,
    read_given_evidence,
    read_limit_evidence,
)
from cerebellum.card.frontmatter import checked, front_matter
from cerebellum.card.given_story import GivenStory
from cerebellum.card.limit_story import LimitStory
from cerebellum.card.numbers import bounds, percent, with_interval
from cerebellum.card.sizes import further_sizes, others_shipped, size_table
from cerebellum.card.story import KLD, Story
from cerebellum.files import atomic_write_bytes, atomic_write_text
from cerebellum.folder import CARD, REPORT, RunFolder
from cerebellum.groups import EMBEDDING_ROLE, HEAD_ROLE
from cerebellum.manifest import EncoderNamed, Manifest
from cerebellum.memory.shape import GPUS_GIB, ignores_window
from cerebellum.page.markdown import Code, Sentence
from cerebellum.page.pictures import Picture
from cerebellum.page.templates import render_html, render_markdown
from cerebellum.plan.artifacts import BudgetPlan, GivenPlan, LimitPlan
from cerebellum.source.origin import Origin
from cerebellum.units import size
from cerebellum.verify import TEMPLATE_CHECK, Report, Verified

CHARTS = "charts"


def make_card(folder: Path, repo: str | None = None) -> tuple[Path, ...]:
    """Writes the card, the report and the charts of a finished run, and returns what was written.

    ``repo`` is the Hub repository the card is for, where it is known.
    """
    stories = read_stories(folder)
    pictures = stories[0].drawings(others_shipped(stories))
    context = card_context(stories, pictures, repo)
    card = folder / CARD
    report = folder / REPORT
    atomic_write_text(card, checked(render_card(stories, context, repo), str(card)))
    atomic_write_text(report, render_html("report.html.j2", context))
    return (card, report, *_write_charts(folder / CHARTS, pictures))


def read_stories(folder: Path) -> tuple[Story, ...]:
    """Reads a finished run and returns the story of each of its sizes, in the order in which they were asked for."""
    return tuple(_read_story(view) for view in RunFolder(folder).finished_sizes())


def _read_story(artifacts: RunFolder) -> Story:
    """Returns the story of the run's goal: the one place in the stage that asks for it."""
    match artifacts.plan():
        case LimitPlan() as plan:
            return LimitStory(read_limit_evidence(artifacts, plan))
        case BudgetPlan() as plan:
            return BudgetStory(read_budget_evidence(artifacts, plan))
        case GivenPlan() as plan:
            return GivenStory(read_given_evidence(artifacts, plan))


def _write_charts(folder: Path, pictures: Mapping[str, Picture]) -> list[Path]:
    """Writes the charts that there are, and removes those that an earlier run left: a card must not
    show a chart of another file.
    """
    files.make_folder(folder)
    paths = [folder / f"{name}.png" for name in pictures]
    for old in set(folder.glob("*.png")) - set(paths):
        files.DISK.unlink(old)
    for path, drawn in zip(paths, pictures.values(), strict=True):
        atomic_write_bytes(path, drawn.png)
    return paths


def render_card(stories: Sequence[Story], context: Mapping[str, Any], repo: str | None) -> str:
    """Returns front matter and body as the Hub wants them.

    The front matter is the Hub's own YAML, so that its indexer reads what we wrote.
    """
    data = front_matter(stories[0].evidence, repo, _labels(stories)).to_yaml(line_break="\n")
    return f"---\n{data}\n---\n\n{render_markdown('card.md.j2', context)}"


def _labels(stories: Sequence[Story]) -> list[str]:
    return [story.evidence.plan.file_label for story in stories]


def card_context(
    stories: Sequence[Story], pictures: Mapping[str, Picture], repo: str | None
) -> dict[str, object]:
    """Returns everything that both templates show.

    They choose and place, and compute nothing, so that card and report can never disagree about a
    number. Of several sizes the first is told at length.
    """
    story = stories[0]
    evidence = story.evidence
    run = evidence.run
    return {
        "version": __version__,
        "label": evidence.plan.base,
        **_sizes(stories),
        "name": run.name,
        "report": run.report,
        "verified": run.verified,
        "manifest": run.manifest,
        "result": run.result,
        **_headline(story),
        **_groups(story),
        "words": story.wording(),
        "untouched": _untouched(story),
        "findings": story.findings(),
        "perplexities": perplexity_cells(evidence),
        "domains": domain_cells(run.report),
        "benchmarks": [benchmark_cells(bench) for bench in run.benchmarks],
        "architecture": architecture(run.source),
        "memory": memory_cells(evidence),
        "gpus": GPUS_GIB,
        "sliding_window": ignores_window(run.source.metadata),
        "commands": run_commands(evidence, repo),
        "method": _method(story),
        "limits": limits(story, stories),
        "pictures": pictures,
        "provenance": provenance(run),
        "style": Markup(resources.files("cerebellum").joinpath("card/report.css").read_text("utf-8")),
    }


def _sizes(stories: Sequence[Story]) -> dict[str, object]:
    """Returns what there is to say of several sizes; of one there is nothing but its label."""
    return {
        "labels": ", ".join(_labels(stories)),
        "first": stories[0].evidence.plan.file_label,
        "sizes": size_table(stories),
        "further": further_sizes(stories),
    }


def _headline(story: Story) -> dict[str, object]:
    """Returns what stands at the head of both pages: sizes, and the change on the report text."""
    plan = story.evidence.plan
    reported = story.evidence.run.reported
    return {
        "lead": _lead(story),
        "file_size": size(story.evidence.run.result.bytes),
        "base_tensors": size(plan.base_tensor_bytes),
        "tensors": size(plan.tensor_bytes),
        "saved_share": f"{100 * plan.bytes_saved / plan.base_tensor_bytes:.1f}%",
        "change": with_interval(reported),
        "change_mean": percent(reported.mean) if reported else "broken",
        "change_range": f"{' to '.join(bounds(reported))} at 95%" if reported else "not finite",
    }


def _groups(story: Story) -> dict[str, object]:
    """Returns the groups, changed and kept, and whether the divergence of any of them was measured."""
    rows = story.evidence.rows
    return {
        "changed": [group_cells(row, story) for row in rows if row.changed],
        "kept": [group_cells(row, story) for row in rows if not row.changed],
        "damages": (KLD,) if any(row.kld for row in rows) else (),
        "unit": story.evidence.unit.name,
    }


def _untouched(story: Story) -> list[Sentence]:
    """Says what was never touched: what the method protects, less what this run was told to plan, and MTP layers."""
    if story.wording().untouched:
        return [(story.wording().untouched,)]
    evidence = story.evidence
    planned = {row.role for row in evidence.plan.groups}
    sacred = ["Routers", "norms"]
    sacred += [] if EMBEDDING_ROLE in planned else ["embeddings"]
    tied = EMBEDDING_ROLE in planned and not evidence.has_head
    sacred += [] if HEAD_ROLE in planned or tied else ["the output head"]
    lines: list[Sentence] = [(f"{', '.join(sacred)} and every one-dimensional tensor are never touched.",)]
    if tied:
        lines.append((Code(EMBEDDING_ROLE), " is the embeddings and the output head at once."))
    if evidence.mtp_types:
        lines.append(
            (
                "The layers for multi-token prediction are kept, and not measured, for no perplexity run reads them: "
                f"{evidence.mtp_types}, as in the base.",
            )
        )
    return lines


def _lead(story: Story) -> Sentence:
    if not story.evidence.changed:
        return (f"llama.cpp's {story.evidence.plan.base}, unchanged: no group was found that could be.",)
    return story.lead()


def _method(story: Story) -> list[Sentence]:
    """Says how the file was made, with this run's own figures: the base, the measurements of its goal,
    and the report text.
    """
    report = story.evidence.run.report
    apart = "the same text, so the figures are too kind" if report.same_as_selection else "another text"
    return [
        (
            f"Everything is compared with {story.evidence.plan.base}, made from the source with an "
            "importance matrix (",
            Code(story.evidence.run.manifest.imatrix.file),
            ").",
        ),
        *_converted(story.evidence.run.manifest.source.origin),
        *_encoder(story.evidence.run.manifest.encoder),
        story.method(),
        *_texts(story.evidence.run.manifest),
        *_template(story.evidence.run.verified),
        *_left_as_they_were(story.evidence.run.manifest),
        (
            "What was shipped was measured whole, then read back from the finished file and measured on ",
            Code(report.text),
            f", {apart}: {_read(report)}.",
        ),
    ]


def _text_names(manifest: Manifest, use: str) -> str:
    """Returns the files of a text by what it was used for, those of several domains by comma."""
    return ", ".join(name for part, name in manifest.text_files.items() if part.partition(",")[0] == use)


def _texts(manifest: Manifest) -> list[Sentence]:
    """Names the texts behind the numbers, by which a stranger can ask for the same ones."""
    importance = _text_names(manifest, "importance")
    if not importance:
        return []
    return [
        (
            "The importance matrix was made from ",
            Code(importance),
            ", the types were chosen on ",
            Code(_text_names(manifest, "selection")),
            "; their hashes stand below.",
        )
    ]


def _template(verified: Verified) -> list[Sentence]:
    """Says that the chat template is what it was, with its hash; of a model without one nothing is said."""
    found = next((check for check in verified.checks if check.name == TEMPLATE_CHECK), None)
    return [(f"The chat template: {found.detail}.",)] if found else []


def _left_as_they_were(manifest: Manifest) -> list[Sentence]:
    """Names the projectors that lie beside the model; llama.cpp takes one with --mmproj."""
    return [
        (
            "For images or sound: ",
            Code(named.file),
            ", copied as it was; llama-server takes it with --mmproj.",
        )
        for named in manifest.projectors
    ]


def _read(report: Report) -> str:
    """Says how much of the report text was read, and how a part of it was chosen."""
    if report.chunks == report.of_chunks:
        return f"all {report.chunks:,} chunks"
    told = f"{report.chunks:,} of {report.of_chunks:,} chunks"
    if report.domains:
        return f"{told}, drawn at random (seed {report.seed}) of each domain in turn, so that domains count alike"
    return f"{told}, drawn at random (seed {report.seed}) to speak for all of it"


def _converted(origin: Origin | None) -> list[Sentence]:
    """Says what the source was converted from and by what; of a GGUF that was given nothing is said."""
    if origin is None:
        return []
    whence: Sentence = ("a folder of safetensors, ", Code(origin.name))
    if origin.repository and origin.commit:
        whence = (Code(origin.repository), " at commit ", Code(origin.commit))
    packages = f" with {', '.join(origin.packages)}" if origin.packages else ""
    return [
        (
            "The source was converted from ",
            *whence,
            f" to {origin.precision.upper()} by llama.cpp's converter ",
            Code(origin.converter),
            " (",
            Code(origin.converter_version),
            f"){packages}; manifest.json has the hashes of its {len(origin.files)} files.",
        )
    ]


def _encoder(encoder: EncoderNamed) -> list[Sentence]:
    """Says that our encoder rounded the weights and what it fed errors back by; of ggml's nothing is said."""
    if encoder.version is None:
        return []
    whose = (
        f"Weights were rounded by Cerebellum's own encoder (version {encoder.version}), base and result alike"
    )
    if encoder.moments is None:
        return [(whose + ".",)]
    fed = f"{whose}: columns make up for each other's errors, by second moments of the activations ("
    return [(fed, Code(encoder.moments.file), ").")]


def limits(story: Story, stories: Sequence[Story]) -> list[Sentence]:
    """Says what these numbers do not.

    Each line is there only if it is true of this run, so that readers have a reason to read them.
    """
    run = story.evidence.run
    lines: list[Sentence] = []
    for each in (one.evidence.run for one in stories if not one.evidence.run.verified.ok):
        failed = ", ".join(check.name for check in each.verified.checks if not check.ok)
        lines.append((f"Verification failed: {failed}. Do not use ", Code(each.result.file), "."))
    if run.report.same_as_selection:
        lines.append(("The text that selected is the text that reports: damage elsewhere may be larger.",))
    if run.source.requantized:
        lines.append(("The source was quantized already, so its own losses are in every figure.",))
    origin = run.manifest.source.origin
    if origin is not None and origin.quantization:
        lines.append(
            (
                "The checkpoint had been quantized before it was converted (",
                Code(origin.quantization),
                "), so its own losses are in every figure.",
            )
        )
    lines += story.doubts()
    lines.append(
        ("The intervals are about more of the same text; other languages, code or tasks may differ.",)
    )
    for problem in run.problems:
        lines.append((Code(problem.model), f" on {problem.where}: {problem.text}."))
    if not run.benchmarks:
        lines.append(("No question benchmark was run: perplexity is the only measure here.",))
    return lines
