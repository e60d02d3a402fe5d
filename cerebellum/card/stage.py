"""Artifacts -> README.md (the model card), report.html and the charts, in seconds and without a model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cerebellum import __version__
from cerebellum.card.drawings import drawings
from cerebellum.card.evidence import Benchmark, Change, Evidence, GroupRow, read_evidence
from cerebellum.card.findings import findings, nats, percent, points, rate, unit_of, with_interval, yardstick
from cerebellum.card.frontmatter import checked, front_matter
from cerebellum.cli.tables import card_flags
from cerebellum.files import atomic_write_bytes, atomic_write_text
from cerebellum.memory.shape import CARDS_GIB, Shape, contexts, ignores_window, memory_shape
from cerebellum.page import Code, Picture, Sentence, render_html, render_markdown
from cerebellum.page.markdown import Markdown, one_line
from cerebellum.units import count, gib, size

CARD, REPORT, CHARTS = "README.md", "report.html", "charts"
_COLOURED = ("tolerant", "sensitive", "collapsed", "promoted", "demoted")


def make_card(folder: Path, repo: str | None = None) -> tuple[Path, ...]:
    """Writes the card, the report and the charts of a finished run, and returns what was written.

    ``repo`` is the Hub repository the card is for, where it is known.
    """
    evidence = read_evidence(folder)
    pictures = drawings(evidence)
    context = card_context(evidence, pictures, repo)
    card, report = folder / CARD, folder / REPORT
    atomic_write_text(card, checked(render_card(evidence, context, repo), str(card)))
    atomic_write_text(report, render_html("report.html.j2", context))
    return (card, report, *_write_charts(folder / CHARTS, pictures))


def _write_charts(folder: Path, pictures: Mapping[str, Picture]) -> list[Path]:
    """The charts that there are, and none that an earlier run left."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.png" for name in pictures]
    for old in set(folder.glob("*.png")) - set(paths):
        old.unlink()
    for path, drawn in zip(paths, pictures.values(), strict=True):
        atomic_write_bytes(path, drawn.png)
    return paths


def render_card(evidence: Evidence, context: Mapping[str, Any], repo: str | None) -> str:
    """Front matter and body, as the Hub wants them."""
    data = front_matter(evidence, repo).to_yaml(line_break="\n")
    return f"---\n{data}\n---\n\n{render_markdown('card.md.j2', context)}"


def card_context(evidence: Evidence, pictures: Mapping[str, Picture], repo: str | None) -> dict[str, Any]:
    """Everything both templates show; they choose, they do not compute."""
    _, unit = unit_of(evidence)
    shape = _shape(evidence)
    manifest, plan, verify = evidence.manifest, evidence.plan, evidence.verify
    return {
        "version": __version__,
        "name": evidence.source["name"],
        "label": plan["base"],
        "demote": plan.get("demote", ""),
        "limit": evidence.limit,
        "file": manifest["result"]["file"],
        "file_size": size(manifest["result"]["bytes"]),
        "base_tensors": size(plan["base_tensor_bytes"]),
        "tensors": size(plan["tensor_bytes"]),
        "saved": size(abs(plan["bytes_saved"])),
        "saved_share": f"{100 * plan['bytes_saved'] / plan['base_tensor_bytes']:.1f}%",
        "change": with_interval(evidence.reported),
        "change_mean": percent(evidence.reported.mean) if evidence.reported else "broken",
        "change_range": _range(evidence.reported) if evidence.reported else "not finite",
        "lead": _lead(evidence),
        "findings": findings(evidence),
        "changed": [_row(row, evidence) for row in evidence.rows if row.changed],
        "by_budget": bool(evidence.curves),
        "with_kld": any(row.kld for row in evidence.rows),
        "kept": [_row(row, evidence) for row in evidence.rows if not row.changed],
        "unit": unit,
        "scale": yardstick(evidence).noun,
        "report": evidence.report,
        "perplexities": _perplexities(evidence),
        "checks": verify["checks"],
        "verified": verify["ok"],
        "benchmarks": [_benchmark(bench) for bench in evidence.benchmarks],
        "architecture": architecture(evidence),
        "memory": _memory_rows(shape, evidence),
        "cards": CARDS_GIB,
        "sliding_window": ignores_window(evidence.source["metadata"]),
        "run": run_commands(evidence, repo),
        "method": _method(evidence),
        "limits": limits(evidence),
        "pictures": pictures,
        "provenance": _provenance(evidence),
        "shards": manifest.get("shards", {}),
        "style": Markup(files("cerebellum").joinpath("card/report.css").read_text("utf-8")),
    }


def _range(change: Change) -> str:
    """`+1.74 to +2.06`."""
    like = (change.mean, change.low, change.high)
    low, high = (percent(bound, like).removesuffix("%") for bound in (change.low, change.high))
    return f"{low} to {high} at 95%"


def _lead(evidence: Evidence) -> Sentence:
    """What the file is, in a sentence."""
    plan, n_rows = evidence.plan, len(evidence.rows)
    changed = f"{len(evidence.changed)} of {n_rows} tensor groups"
    kinds = sorted({row.chosen_type for row in evidence.changed})
    if not kinds:
        return (f"llama.cpp's {plan['base']}, unchanged: no group was found that could be.",)
    if evidence.curves:
        budget = size(plan["budget_bytes"])
        return (
            f"llama.cpp's {plan['base']} with {changed} at other types: the best file of at most {budget} "
            "that was measured.",
        )
    at = " and ".join(kinds)
    return (f"llama.cpp's {plan['base']} with {changed} at {at}, chosen by measuring each on real text.",)


def _row(row: GroupRow, evidence: Evidence) -> dict[str, Any]:
    """A group for the tables, with words where there is no number: a table has no blanks."""
    per, scale = rate(row, evidence), yardstick(evidence)
    types = row.base_type if not row.changed else f"{row.base_type} → {row.chosen_type}"
    return {
        "name": row.name,
        "tensors": row.tensors,
        "layers": _layers(row, evidence.source),
        "types": types,
        "tried": row.tried_type,
        "change": with_interval(row.change) if row.change else "not measured",
        "with": row.together_with,
        "chunks": f"{row.chunks:,}" if row.chunks else "none",
        "saves": size(row.bytes_saved) if row.bytes_saved >= 0 else f"adds {size(-row.bytes_saved)}",
        "rate": scale.told(per.mean) if per else "none",
        "verdict": f"{row.verdict} (near tie)" if row.near_tie else row.verdict,
        "class": f"v-{row.verdict}" if row.verdict in _COLOURED else "",
        "kld": nats(row.kld.mean) if row.kld else "not measured",
        "agreement": f"{100 * row.agreement:.1f}%" if row.agreement is not None else "",
    }


def _layers(row: GroupRow, source: Mapping[str, Any]) -> str:
    """All of them, all of one kind, or which."""
    found, attends = set(row.layers), set(source["attention_layers"])
    if not found:
        return "outside the layers"
    if len(found) == source["layers"]:
        return f"all {len(found)}"
    if found == attends:
        return f"attention ({len(found)})"
    if len(found) == source["recurrent_layers"] and not found & attends:
        return f"recurrent ({len(found)})"
    return spans(row.layers)


def spans(numbers: Sequence[int]) -> str:
    """0, 1, 3, 4 -> `0–1, 3–4`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in found)


def _perplexities(evidence: Evidence) -> list[dict[str, str]]:
    report, base = evidence.report, evidence.report["base"]["ppl"]
    source = report["source"]["ppl"]
    against = {
        "source": percent(100 * (source / base - 1)) if source and base else "not finite",
        "base": "the measure",
        "result": with_interval(evidence.reported),
    }
    titles = {"source": "source", "base": f"base ({evidence.plan['base']})", "result": "this file"}
    return [
        {
            "name": title,
            "ppl": _number(report[key]["ppl"]),
            "se": _number(report[key]["se"]),
            "change": against[key],
        }
        for key, title in titles.items()
    ]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _benchmark(bench: Benchmark) -> dict[str, str]:
    accuracy = bench.accuracy
    return {
        "task": bench.task,
        "protocol": f"{bench.protocol}, {bench.metric}",
        "n": f"{bench.n:,}",
        "accuracy": f"{accuracy.mean:.1f}% [{accuracy.low:.1f}, {accuracy.high:.1f}]",
        "base": f"{bench.base:.1f}%" if bench.base is not None else "not asked",
        "difference": points(bench.difference) if bench.difference else "not paired",
        "p": f"{bench.p:.2g}" if bench.p is not None else "not paired",
        "could_show": f"±{bench.detectable:.1f}" if bench.detectable is not None else "not known",
    }


def architecture(evidence: Evidence) -> list[tuple[str, str]]:
    """The model at a glance; rows that do not apply are left out."""
    source = evidence.source
    n_layers, attends = source["layers"], source["attention_layers"]
    experts = f"{source['experts']}, {source['experts_used']} used for a token" if source["experts"] else ""
    rows = [
        ("architecture", source["architecture"]),
        ("parameters", count(source["parameters"])),
        ("active for a token", count(source["active_parameters"])),
        ("layers", str(n_layers)),
        ("attention in layers", "all" if len(attends) == n_layers else spans(attends)),
        ("recurrent layers", str(source["recurrent_layers"] or "")),
        ("experts", experts),
        ("context", f"{source['context_length']:,} tokens" if source["context_length"] else ""),
        ("vocabulary", f"{source['metadata'].get('vocabulary', 0):,} tokens"),
        ("source file", size(source["bytes"])),
    ]
    return [(name, value) for name, value in rows if value]


def _shape(evidence: Evidence) -> Shape:
    source = evidence.source
    n_recurrent, weights = source["recurrent_layers"], evidence.plan["tensor_bytes"]
    return memory_shape(source["metadata"], source["attention_layers"], n_recurrent, weights)


def _memory_rows(shape: Shape, evidence: Evidence) -> list[dict[str, Any]]:
    rows = []
    for context in contexts(evidence.source["context_length"]):
        memory = shape.at(context)
        fits = [card for card in CARDS_GIB if memory.fits(card)]
        rows.append(
            {
                "context": f"{context:,}",
                "weights": gib(memory.weights),
                "cache": gib(memory.cache + memory.state),
                "compute": gib(memory.compute),
                "total": gib(memory.total),
                "fits": [card in fits for card in CARDS_GIB],
                "cards": f"{fits[0]} GB and more" if fits else f"none of {CARDS_GIB[-1]} GB or less",
            }
        )
    return rows


def run_commands(evidence: Evidence, repo: str | None) -> list[tuple[str, Markdown]]:
    """A command for each program people run GGUFs with, safe to paste whatever the file is called."""
    file = one_line(evidence.manifest["result"]["file"])
    path, label = shlex.quote(f"./{file}"), evidence.plan["base"]
    full = evidence.source["context_length"] or 4096
    chat = "" if evidence.source["metadata"].get("chat_template") else " -p 'Once upon a time' -n 128"
    model = f"-hf {repo}:{label}" if repo else f"-m {path}"
    name = shlex.quote(f"{Path(file).stem.lower()}")
    create = (
        f"printf 'FROM %s\\n' {path} > Modelfile && ollama create {name} -f Modelfile && ollama run {name}"
    )
    planned = evidence.plan.get("memory")
    flags = card_flags(planned) if planned else f"-ngl 99 -c {min(4096, full)}"
    commands = [
        ("llama-server", f"llama-server {model} {flags}"),
        ("llama-cli", f"llama-cli {model} -ngl 99 -c {min(4096, full)}{chat}"),
        ("Ollama", f"ollama run hf.co/{repo}:{label}" if repo else create),
        ("LM Studio", f"lms get https://huggingface.co/{repo}" if repo else f"lms import {path}"),
    ]
    return [(program, Markdown(command)) for program, command in commands]


def _method(evidence: Evidence) -> list[Sentence]:
    """How it was made, with this run's own figures."""
    report, label = evidence.report, evidence.plan["base"]
    matrix = Code(evidence.manifest["imatrix"]["file"])
    apart = "the same text, so the figures are too kind" if report["same_as_selection"] else "another text"
    return [
        (
            f"Everything is compared with {label}, made from the source with an importance matrix (",
            matrix,
            ").",
        ),
        _by_budget(evidence) if evidence.curves else _by_limit(evidence),
        (
            "What was shipped was measured whole, then read back from the finished file and measured on ",
            Code(report["text"]),
            f", {apart}: {report['chunks']:,} of {report['of_chunks']:,} chunks.",
        ),
    ]


def _by_limit(evidence: Evidence) -> Sentence:
    measured, alpha = evidence.measured, evidence.measured.get("alpha")
    tried = [row for row in evidence.rows if row.change is not None]
    chunks = [row.chunks for row in tried if row.chunks] or [0]
    least, most = min(chunks), max(chunks)
    read, sure = f"{most:,}", ""
    if least < most:
        read = f"{least:,} to {most:,}"
    if alpha and any(row.trace for row in tried):
        level = f"{100 - 100 * alpha:g}%"
        sure = f" A verdict stops as soon as it holds; all hold together with {level} confidence."
    return (
        f"{len(tried)} groups of tensors were each brought to another type alone and read {read} of "
        f"{measured['chunks_in_text']:,} chunks of {measured['ctx']} tokens of ",
        Code(measured["text"]),
        f", paired with the base chunk by chunk.{sure}",
    )


def _by_budget(evidence: Evidence) -> Sentence:
    measured, plan = evidence.measured, evidence.plan
    return (
        f"{len(measured['responses'])} parts of the model were each measured alone at a type, all else at "
        f"{measured['rounding']['anchor']}, on up to {measured['chunks']:,} chunks of {measured['ctx']} "
        "tokens of ",
        Code(measured["text"]),
        ", as KL divergence from the source. Types and layers between follow from the rounding error that "
        "each type makes, weighted by the importance matrix. A knapsack chose the best sum within "
        f"{size(plan['budget_bytes'])}; {_proposals(evidence)}",
    )


def _proposals(evidence: Evidence) -> str:
    """How many combinations were measured whole, the base not among them."""
    n = sum(bool(row.get("changes")) for row in evidence.plan["candidates"] if row.get("measured_kld"))
    if not n:
        return "it was shipped as it was foretold, not measured whole on the selection text."
    return f"{n} of its proposals were measured whole, and the best of those was shipped."


def limits(evidence: Evidence) -> list[Sentence]:
    """What these numbers do not say; each line is there only if it is true of this run."""
    report, lines = evidence.report, list[Sentence]()
    if not evidence.verify["ok"]:
        failed = [c["name"] for c in evidence.verify["checks"] if not c["ok"]]
        lines.append((f"Verification failed: {', '.join(failed)}. Do not use this file.",))
    if report["same_as_selection"]:
        lines.append(("The text that selected is the text that reports: damage elsewhere may be larger.",))
    if evidence.source.get("requantized"):
        lines.append(("The source was quantized already, so its own losses are in every figure.",))
    doubtful = [row for row in evidence.changed if evidence.limit is not None and row.verdict != "tolerant"]
    for row in doubtful:
        lines.append((Code(row.name), f" was changed although its verdict is {row.verdict}."))
    lines.append(
        ("The intervals are about more of the same text; other languages, code or tasks may differ.",)
    )
    for problem in evidence.problems:
        lines.append((Code(problem.model), f" on {problem.where}: {problem.text}."))
    if not evidence.benchmarks:
        lines.append(("No question benchmark was run: perplexity is the only measure here.",))
    return lines


def _provenance(evidence: Evidence) -> list[tuple[str, str, str]]:
    """What made what: part, name, sha256."""
    manifest = evidence.manifest
    names = manifest.get("text_files", {})
    return [
        (
            "source",
            ", ".join(manifest["source"].get("files", [manifest["source"]["name"]])),
            manifest["source"]["sha256"],
        ),
        ("importance matrix", manifest["imatrix"]["file"], manifest["imatrix"]["sha256"]),
        ("selection text", names.get("selection", ""), manifest["texts"]["selection"]),
        ("report text", names.get("report", ""), manifest["texts"]["report"]),
        ("measurements", "ledger.sqlite", manifest["ledger_digest"]),
        ("this file", manifest["result"]["file"], manifest["result"]["sha256"]),
    ]
