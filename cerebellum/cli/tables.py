"""Results as tables a person can read. Everything here takes the JSON artifacts, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cerebellum.units import count, gib, nats, number, percent, size

_VERDICT_STYLES = {"tolerant": "green", "sensitive": "red", "collapsed": "bold red"}


def verdict(name: str) -> Text:
    return Text(name, style=_VERDICT_STYLES.get(name.split()[0], "yellow"))


def inspect_tables(described: Mapping[str, Any]) -> list[Table]:
    """The model at a glance, and its groups."""
    facts = Table(show_header=False, box=None)
    experts = "none"
    if described["experts"]:
        experts = f"{described['experts_used']} of {described['experts']} used"
    rows = [
        ("architecture", escape(described["architecture"])),
        ("parameters", count(described["parameters"])),
        ("active", count(described["active_parameters"])),
        ("layers", str(described["layers"])),
        ("experts", experts),
        ("attention layers", _layers(described["attention_layers"], described["layers"])),
        ("recurrent layers", str(described["recurrent_layers"])),
        ("context", f"{described['context_length']:,} tokens"),
        ("size", size(described["bytes"])),
    ]
    for name, value in rows:
        facts.add_row(f"[bold]{name}", value)
    return [facts, _groups_table(described["groups"])]


def _layers(layers: Sequence[int], total: int) -> str:
    if len(layers) == total:
        return "all"
    return ", ".join(str(layer) for layer in layers) or "none"


def _groups_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("group", "tensors", "parameters", "size", "types", "may become", title="Groups")
    for column in (1, 2, 3):
        table.columns[column].justify = "right"
    for group in groups:
        types = ", ".join(f"{name} x{n}" for name, n in group["types"].items())
        legal = "protected" if group["protected"] else " ".join(group["legal_types"]) or "nothing cheaper"
        table.add_row(
            escape(group["name"]),
            str(group["tensors"]),
            count(group["parameters"]),
            size(group["bytes"]),
            types,
            legal,
            style="dim" if group["protected"] else "",
        )
    return table


def measurements_table(measured: Mapping[str, Any]) -> Table:
    """What measure found."""
    title = f"To {measured['demote']} from {measured['base']}, one at a time"
    table = Table("groups", "type", "delta", "KL divergence", "chunks", "verdict", title=title)
    for row in measured["measurements"]:
        table.add_row(
            escape(" + ".join(row["groups"])),
            str(row["type"]),
            percent(row["delta_pct"], row["ci_pct"]),
            "-" if row["kld_mean"] is None else f"{row['kld_mean']:.5f}",
            str(row["chunks"] or "-"),
            verdict(row["verdict"] + (" (near tie)" if row["near_tie"] else "")),
        )
    return table


def tokens_saved(measured: Mapping[str, Any]) -> str:
    """How much of the usual way's scoring was needed."""
    scored, full = measured["tokens_scored"], measured["tokens_full"]
    return (
        f"{scored:,} tokens scored where scoring every variant on the whole text takes {full:,}: "
        f"{full / max(scored, 1):.1f}x fewer"
    )


def plan_table(plan: Mapping[str, Any]) -> Table:
    """The plan, a row a group."""
    title = f"Base {plan['base']}, demoting to {plan['demote']}, limit +{plan['threshold_pct']:g}%"
    table = Table("group", "tensors", "base", "saves", "delta", "verdict", "decision", title=title)
    table.columns[0].no_wrap = table.columns[4].no_wrap = True
    for column in (1, 3):
        table.columns[column].justify = "right"
    for row in plan["groups"]:
        note = f" for {1 + len(row['measured_with'])} together" if row["measured_with"] else ""
        table.add_row(
            escape(row["name"]),
            str(row["tensors"]),
            row["base_type"],
            size(row["bytes_saved"]),
            percent(row["delta_pct"], row["ci_pct"]) + note,
            verdict(row["verdict"]),
            Text(row["decision"], style="bold green" if row["decision"] == "demoted" else "dim"),
        )
    return table


def planned_tables(plan: Mapping[str, Any]) -> tuple[Any, ...]:
    """A plan of either mode, and what it comes to."""
    if plan["mode"] == "budget":
        return budget_tables(plan)
    return plan_table(plan), plan_summary(plan)


def budget_tables(plan: Mapping[str, Any]) -> tuple[Any, ...]:
    """The plan in budget mode, what it comes to, and the memory it takes where a card was given."""
    memory = (memory_table(plan["memory"]),) if plan.get("memory") else ()
    return budget_table(plan), budget_summary(plan), *memory


def budget_table(plan: Mapping[str, Any]) -> Table:
    """The plan in budget mode, a row a group."""
    title = f"Best within {size(plan['budget_bytes'])}, from base {plan['base']}"
    table = Table("group", "tensors", "base", "chosen", "saves", "KL change", "perplexity", title=title)
    for row in plan["groups"]:
        kld = row["kld_change"]
        style = {"demoted": "green", "promoted": "cyan"}.get(row["decision"], "dim")
        table.add_row(
            escape(row["name"]),
            str(row["tensors"]),
            row["base_type"],
            Text(row["chosen_type"], style=style),
            size(row["bytes_saved"]),
            "-" if kld is None else f"{kld:+.5f}",
            percent(row["delta_pct"], row["ci_pct"]),
        )
    return table


def budget_summary(plan: Mapping[str, Any]) -> str:
    """Bytes against the budget, and the sum of the parts against the whole."""
    text = f"file {plan['file_bytes']:,} bytes of {plan['budget_bytes']:,}; "
    if plan["measured_kld"] is None:
        return text + f"{_predicted(plan)}, not measured" + _stated_model(plan)
    low, high = plan["kld_ci"]
    base = plan["base_kld"] or 0.0
    text += f"{_predicted_kld(plan)}, "
    text += f"measured {base + plan['measured_kld']:.5f} [{base + low:.5f}, {base + high:.5f}] nats; "
    text += f"perplexity against the base {percent(plan['measured_delta_pct'], plan['ci_pct'])}"
    return text + (f"\n[yellow]note:[/] {plan['tradeoff']}" if plan.get("tradeoff") else "")


def _predicted(plan: Mapping[str, Any]) -> str:
    if plan["predicted_kld"] is None:
        return f"predicted perplexity against the base {percent(plan['predicted_delta_pct'])}"
    return f"{_predicted_kld(plan)} nats"


def _predicted_kld(plan: Mapping[str, Any]) -> str:
    base = plan["base_kld"] or 0.0
    predicted = base + plan["predicted_kld"]
    return f"KL divergence from the source: base {base:z.5f}, predicted {predicted:z.5f}"


def _stated_model(plan: Mapping[str, Any]) -> str:
    return f"; types that nobody measured: {plan['model']}" if plan.get("model") else ""


def memory_table(memory: Mapping[str, Any]) -> Table:
    """A card and what takes its room."""
    tokens, slots = f"{memory['context']:,} tokens", memory["sequences"]
    title = f"On {gib(memory['card'])} with {tokens}" + (f" in {slots} slots" if slots > 1 else "")
    table = Table("part", "memory", "what", title=title)
    table.columns[1].justify = "right"
    found = {"llama.cpp": "as llama.cpp reports it", "bound": "an upper bound"}
    rows = [
        ("weights", "the tensors on the card"),
        ("cache", _cache_words(memory)),
        ("state", _state_words(memory)),
        ("compute", f"a batch of 512 tokens, {found[memory['compute_from']]}"),
        ("reserve", "set aside for the driver and a display"),
        ("total", ""),
        ("free", ""),
    ]
    for name, words in rows:
        table.add_row(name, gib(memory[name]), words, end_section=name == "reserve")
    return table


def _state_words(memory: Mapping[str, Any]) -> str:
    text = f"{memory['recurrent_layers']} recurrent layers, F32"
    if memory["state"] and memory["sequences"] < memory["server_sequences"]:
        text += f"; llama-server without -np keeps {memory['server_sequences']} of them"
    return text


def _cache_words(memory: Mapping[str, Any]) -> str:
    n_whole = memory["attention_layers"] - memory["window_layers"]
    text = f"{n_whole} attention layers, F16, {memory['cache_bytes_per_token']:,} bytes a token"
    if memory["window_layers"]:
        text += f"; {memory['window_layers']} that see {memory['window']:,} tokens"
    return text


def frontier_table(curve: Sequence[Mapping[str, Any]]) -> Table:
    """Size against predicted damage."""
    table = Table("file", "KL divergence from the source, predicted", title="Frontier")
    for row in curve:
        kld = row["predicted_kld"]
        told = f"{row['predicted']:+.5f} nats of NLL" if kld is None else f"{kld:.5f}"
        table.add_row(size(row["file_bytes"]), told)
    return table


def plan_summary(plan: Mapping[str, Any]) -> str:
    """One paragraph: bytes before and after, predicted and measured."""
    return (
        f"tensors {gib(plan['base_tensor_bytes'])} -> {gib(plan['tensor_bytes'])}, "
        f"{size(plan['bytes_saved'])} saved; predicted {percent(plan['predicted_delta_pct'])}, "
        f"measured together {percent(plan['measured_delta_pct'], plan['ci_pct'])}"
    )


def verify_table(found: Mapping[str, Any]) -> Table:
    """Checks of the finished file."""
    table = Table("check", "", "what was seen", title="Verification")
    for check in found["checks"]:
        mark = Text("ok", style="green") if check["ok"] else Text("FAILED", style="bold red")
        table.add_row(check["name"], mark, escape(check["detail"]))
    return table


def report_table(found: Mapping[str, Any]) -> Table:
    """Perplexities on the report text."""
    report = found["report"]
    title = f"Perplexity on {escape(report['text'])}, {report['chunks']} of {report['of_chunks']} chunks"
    table = Table("model", "perplexity", "against the base", title=title)
    for name, key in (("source", "source"), ("base", "base"), ("Cerebellum", "result")):
        change = percent(report["delta_pct"], report["ci_pct"]) if key == "result" else ""
        table.add_row(name, f"{number(report[key]['ppl'])} ± {number(report[key]['se'])}", change)
    return table


def run_instructions(path: Path, memory: Mapping[str, Any] | None = None) -> str:
    """How to use the file, with stock llama.cpp; on a card as it was planned for."""
    if memory:
        return f"llama-server -m {path} {card_flags(memory)}"
    return f"llama-server -m {path} -c 4096        # or: llama-cli -m {path} -p 'Once upon a time'"


def card_flags(memory: Mapping[str, Any]) -> str:
    """All layers on the card, the context and the slots that were planned: llama-server takes four slots
    without ``-np``, each with a recurrent state of its own."""
    return f"-ngl 99 -c {memory['context']} -np {memory['sequences']}"


def comparison_table(found: Mapping[str, Any]) -> Table:
    """compare's answer."""
    table = Table(show_header=False, box=None)
    rows = [
        ("perplexity A", f"{found['ppl_a']:.4f}"),
        ("perplexity B", f"{found['ppl_b']:.4f}"),
        ("B against A", percent(found["delta_pct"], found["ci_pct"])),
        ("KL divergence", nats(found["kld_mean"], found["kld_ci"])),
        ("same top token", f"{100 * found['top1_agreement']:.2f}%"),
        ("over", f"{found['chunks']} chunks of {found['ctx']}, {found['tokens']:,} tokens scored"),
    ]
    for name, value in rows:
        table.add_row(f"[bold]{name}", value)
    return table


def reproduced_table(found: Mapping[str, Any]) -> Table:
    """What reproduce compared."""
    styles = {"same": "green", "changed": "bold red"}
    table = Table("what", "", "seen", title="Against the manifest")
    for row in found["compared"]:
        status = Text(row["status"], style=styles.get(row["status"], "yellow"))
        table.add_row(escape(row["name"]), status, escape(row["detail"]))
    return table


def reproduced_line(found: Mapping[str, Any]) -> str:
    """The answer in one line."""
    changed = f"; changed: {escape(', '.join(found['changed']))}" if found["changed"] else ""
    if found["file"] is None:
        return f"[red]not rebuilt[/]{changed}"
    said = "[green]bit for bit the same[/]" if found["bit_equal"] else "[red]another file[/]"
    return f"{escape(found['file'])}: {said}, sha256 {found['sha256']}{changed}"


def upload_table(found: Mapping[str, Any]) -> Table:
    """What push uploads."""
    table = Table("file", "size", title=f"To {escape(found['repo'])}, {size(found['bytes'])}")
    table.columns[1].justify = "right"
    for row in found["files"]:
        table.add_row(escape(row["name"]), size(row["bytes"]))
    return table
