"""Results as tables that a person can read. Everything here takes an artifact or a typed answer."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape as escape_markup
from rich.table import Table
from rich.text import Text

from cerebellum.card.commands import gpu_flags
from cerebellum.card.domains import across_domains, domain_cells
from cerebellum.card.merged import merged_rows
from cerebellum.errors import visible
from cerebellum.folder import CARD, REPORT
from cerebellum.groups import Description, GroupRecord
from cerebellum.measure.artifacts import Curves, Measurements
from cerebellum.plan.artifacts import AnyPlan, BudgetPlan, FrontierRow, GivenPlan, GpuMemory, LimitPlan, Plan
from cerebellum.settings import GGML
from cerebellum.units import count, gib, nats, number, percent, size
from cerebellum.verify import Verified

if TYPE_CHECKING:  # a command loads what it needs, and no other one's
    from cerebellum.cli.quantize import Quantized
    from cerebellum.comparison.pair import Comparison
    from cerebellum.hub import Pushed
    from cerebellum.recipes.recipe import Recipe
    from cerebellum.recipes.reproduce import Reproduced

_VERDICT_STYLES = {"tolerant": "green", "sensitive": "red", "collapsed": "bold red"}
_DECISION_STYLES = {"demoted": "green", "promoted": "cyan"}


def shown(text: str) -> str:
    """Returns text from outside as a console may print it: it is never markup, and never moves the cursor."""
    return escape_markup(visible(text))


def verdict(name: str) -> Text:
    """Colours a verdict by its first word, so that a near tie keeps the colour of what it leans to."""
    return Text(name, style=_VERDICT_STYLES.get(name.split()[0], "yellow"))


def inspect_tables(source: Description) -> list[Table]:
    """Shows the model at a glance, and below it every group with the types that it may become."""
    facts = Table(show_header=False, box=None)
    rows = [
        ("architecture", shown(source.architecture)),
        ("parameters", count(source.parameters)),
        ("active", count(source.active_parameters)),
        ("layers", str(source.layers)),
        ("experts", f"{source.experts_used} of {source.experts} used" if source.experts else "none"),
        ("attention layers", _layers(source.attention_layers, source.layers)),
        ("recurrent layers", str(source.recurrent_layers)),
        ("context", f"{source.context_length:,} tokens"),
        ("size", size(source.bytes)),
    ]
    for name, value in rows:
        facts.add_row(f"[bold]{name}", value)
    return [facts, _groups_table(source.groups)]


def _layers(layers: Sequence[int], total: int) -> str:
    if len(layers) == total:
        return "all"
    return ", ".join(str(layer) for layer in layers) or "none"


def _groups_table(groups: Sequence[GroupRecord]) -> Table:
    table = Table("group", "tensors", "parameters", "size", "types", "may become", title="Groups")
    for column in (1, 2, 3):
        table.columns[column].justify = "right"
    for group in groups:
        table.add_row(
            shown(group.name),
            str(group.tensors),
            count(group.parameters),
            size(group.bytes),
            ", ".join(f"{name} x{n}" for name, n in group.types.items()),
            "protected" if group.protected else " ".join(group.legal_types) or "nothing cheaper",
            style="dim" if group.protected else "",
        )
    return table


def measurements_table(measured: Measurements) -> Table:
    """Shows every measurement against the base: the change of perplexity with its interval, the
    divergence in nats a token, the chunks read, and the verdict.
    """
    title = f"To {shown(measured.demote)} from {shown(measured.base)}, one at a time"
    table = Table("groups", "type", "delta", "KL divergence", "chunks", "verdict", title=title)
    alpha_pct = 100 * measured.alpha
    table.caption = (
        f"verdicts hold together at {100 - alpha_pct:g}%, their intervals at {100 - 2 * alpha_pct:g}%"
    )
    for row in measured.measurements:
        table.add_row(
            shown(" + ".join(row.groups)),
            shown(str(row.type)),
            percent(row.delta_pct, row.ci_pct),
            "-" if row.kld_mean is None else f"{row.kld_mean:.5f}",
            str(row.chunks or "-"),
            verdict(row.verdict + (" (near tie)" if row.near_tie else "")),
        )
    return table


def measured_tables(measured: Measurements | Curves) -> tuple[RenderableType, ...]:
    """Shows what the measure stage found for either goal, and how many tokens it took."""
    match measured:
        case Measurements():
            return measurements_table(measured), tokens_saved(measured)
        case Curves():
            return responses_table(measured), _passes(measured)


def responses_table(curves: Curves) -> Table:
    """Shows every part at every type it was measured at: its damage above the anchor's, nats a token."""
    title = f"Alone at a type, all else at {shown(curves.rounding.anchor)}"
    table = Table("part", "type", "KL divergence", "chunks", title=title)
    for response in curves.responses:
        kld = response.kld
        table.add_row(
            shown(response.part),
            shown(response.type),
            "collapsed" if kld is None else f"{kld.mean:.5f}",
            "-" if kld is None else str(kld.n),
        )
    return table


def _passes(curves: Curves) -> str:
    return f"{curves.tokens_scored:,} tokens scored, {curves.passes:.2f} passes over {shown(curves.text)}"


def tokens_saved(measured: Measurements) -> str:
    """Says how many tokens were scored where the usual way scores every variant on the whole text: what
    stopping early saved.
    """
    scored = measured.tokens_scored
    return (
        f"{scored:,} tokens scored where scoring every variant on the whole text takes "
        f"{measured.tokens_full:,}: {measured.tokens_full / max(scored, 1):.1f}x fewer"
    )


def planned_tables(plan: AnyPlan) -> tuple[RenderableType, ...]:
    """Shows a plan and what it comes to; of a plan that was made for a gpu also the memory that it
    takes there.
    """
    match plan:
        case LimitPlan():
            return plan_table(plan), plan_summary(plan)
        case BudgetPlan():
            memory = (memory_table(plan.memory),) if plan.memory else ()
            return budget_table(plan), budget_summary(plan), *memory
        case GivenPlan():
            return given_table(plan), given_summary(plan)


def given_table(plan: GivenPlan) -> Table:
    """Shows the types of a recipe, a row for the tensors of a role that get one type."""
    title = f"As {shown(plan.recipe)} says, against {shown(plan.base)}"
    table = Table("group", "tensors", "base", "recipe", "saves", "", title=title)
    for column in (1, 4):
        table.columns[column].justify = "right"
    for row in plan.groups:
        table.add_row(
            shown(row.name),
            str(row.tensors),
            shown(row.base_type),
            row.chosen_type if row.changed else "the same",
            size(row.bytes_saved),
            Text(row.decision, style=_DECISION_STYLES.get(row.decision, "dim")),
        )
    return table


def given_summary(plan: GivenPlan) -> str:
    """Says how large a recipe's file is and, where that was measured, what it does to the base's predictions."""
    text = (
        f"file {plan.file_bytes:,} bytes, tensors {gib(plan.base_tensor_bytes)} -> {gib(plan.tensor_bytes)}; "
    )
    if not plan.chunks:
        return text + "nothing measured"
    text += f"perplexity against the base {percent(plan.measured_delta_pct, plan.ci_pct)}"
    if plan.kld_mean is not None:
        text += f", KL divergence from it {nats(plan.kld_mean, plan.kld_ci or (None, None))}"
    return f"{text}, on {plan.chunks} of {plan.of_chunks} chunks of {shown(plan.text)}"


def plan_table(plan: LimitPlan) -> Table:
    """Shows a plan under a limit, a row a group.

    Figures that are of several groups together say so, for they must not be added up.
    """
    title = f"Base {shown(plan.base)}, demoting to {shown(plan.demote)}, limit +{plan.threshold_pct:g}%"
    table = Table("group", "tensors", "base", "saves", "delta", "verdict", "decision", title=title)
    for column in (0, 4):
        table.columns[column].no_wrap = True
    for column in (1, 3):
        table.columns[column].justify = "right"
    for row in plan.groups:
        note = f" for {1 + len(row.measured_with)} together" if row.measured_with else ""
        table.add_row(
            shown(row.name),
            str(row.tensors),
            shown(row.base_type),
            size(row.bytes_saved),
            percent(row.delta_pct, row.ci_pct) + note,
            verdict(row.verdict),
            Text(row.decision, style="bold green" if row.decision == "demoted" else "dim"),
        )
    return table


def plan_summary(plan: Plan) -> str:
    """Says in a line how many bytes the tensors take before and after, and what that does to perplexity."""
    return (
        f"tensors {gib(plan.base_tensor_bytes)} -> {gib(plan.tensor_bytes)}, "
        f"{size(plan.bytes_saved)} saved; predicted {percent(plan.predicted_delta_pct)}, "
        f"measured together {percent(plan.measured_delta_pct, plan.ci_pct)}"
    )


def budget_table(plan: BudgetPlan) -> Table:
    """Shows a plan for a budget.

    Neighbouring layers of a role that are treated alike share a row, as on the card.
    """
    title = f"Best within {size(plan.budget_bytes)}, from base {shown(plan.base)}"
    table = Table("group", "tensors", "base", "chosen", "saves", "KL change", "perplexity", title=title)
    for row in (merged.row for merged in merged_rows(plan)):
        table.add_row(
            shown(row.name),
            str(row.tensors),
            shown(row.base_type),
            Text(row.chosen_type, style=_DECISION_STYLES.get(row.decision, "dim")),
            size(row.bytes_saved),
            "-" if row.kld_change is None else f"{row.kld_change:+.5f}",
            percent(row.delta_pct, row.ci_pct),
        )
    return table


def budget_summary(plan: BudgetPlan) -> str:
    """Says how much of the budget the file takes, and sets the sum of the parts against the whole.

    Divergences are from the source, so the base's own is added to both.
    """
    text = f"file {plan.file_bytes:,} bytes of {plan.budget_bytes:,}; "
    if plan.measured_kld is None or plan.predicted_kld is None:
        stated = f"; types that nobody measured: {shown(plan.model)}" if plan.model else ""
        return f"{text}{_predicted(plan)}, not measured{stated}"
    base = plan.base_kld or 0.0
    bounds = tuple(base + bound for bound in plan.kld_ci) if plan.kld_ci else None
    measured = f"{base + plan.measured_kld:.5f}" + (f" [{bounds[0]:.5f}, {bounds[1]:.5f}]" if bounds else "")
    text += f"{_predicted_kld(base, plan.predicted_kld)}, measured {measured} nats; "
    text += f"perplexity against the base {percent(plan.measured_delta_pct, plan.ci_pct)}"
    return text + (f"\n[yellow]note:[/] {shown(plan.tradeoff)}" if plan.tradeoff else "")


def _predicted(plan: BudgetPlan) -> str:
    if plan.predicted_kld is None:
        return f"predicted perplexity against the base {percent(plan.predicted_delta_pct)}"
    return f"{_predicted_kld(plan.base_kld or 0.0, plan.predicted_kld)} nats"


def _predicted_kld(base: float, change: float) -> str:
    return f"KL divergence from the source: base {base:z.5f}, predicted {base + change:z.5f}"


def memory_table(memory: GpuMemory) -> Table:
    """Shows a gpu and what takes its room, part by part, and which of the figures are llama.cpp's own
    and which a bound.
    """
    slots = f" in {memory.sequences} slots" if memory.sequences > 1 else ""
    title = f"On {gib(memory.card)} with {memory.context:,} tokens{slots}"
    table = Table("part", "memory", "what", title=title)
    table.columns[1].justify = "right"
    said = "as llama.cpp reports it" if memory.compute_from == "llama.cpp" else "an upper bound"
    rows = [
        ("weights", memory.weights, "the tensors on the GPU"),
        ("cache", memory.cache, _cache_words(memory)),
        ("state", memory.state, _state_words(memory)),
        ("compute", memory.compute, f"a batch of 512 tokens, {said}"),
        ("reserve", memory.reserve, "set aside for the driver and a display"),
        ("total", memory.total, ""),
        ("free", memory.free, ""),
    ]
    for name, n_bytes, words in rows:
        table.add_row(name, gib(n_bytes), words, end_section=name == "reserve")
    return table


def _state_words(memory: GpuMemory) -> str:
    text = f"{memory.recurrent_layers} recurrent layers, F32"
    if memory.state and memory.sequences < memory.server_sequences:
        text += f"; llama-server without -np keeps {memory.server_sequences} of them"
    return text


def _cache_words(memory: GpuMemory) -> str:
    text = f"{memory.attention_layers} attention layers, F16"
    if not memory.window:
        return f"{text}, {memory.cache_bytes_per_token:,} bytes a token"
    seen = f"{text}, some of which see {memory.window:,} tokens"
    return f"{seen}, as llama.cpp reports it" if memory.cache_from == "llama.cpp" else f"{seen}: a bound"


def frontier_table(frontier: Sequence[FrontierRow]) -> Table:
    """Shows the size of the best file against its foretold damage, from the smallest to the largest;
    nobody measured these.
    """
    table = Table("file", "KL divergence from the source, predicted", title="Frontier")
    for row in frontier:
        of_nll = f"{row.predicted:+.5f} nats of NLL"
        table.add_row(
            size(row.file_bytes), of_nll if row.predicted_kld is None else f"{row.predicted_kld:.5f}"
        )
    return table


def verify_table(verified: Verified) -> Table:
    """Shows the checks of the finished file, each with what was seen, so that a failure says where to
    look.
    """
    table = Table("check", "", "what was seen", title="Verification")
    for check in verified.checks:
        mark = Text("ok", style="green") if check.ok else Text("FAILED", style="bold red")
        table.add_row(check.name, mark, shown(check.detail))
    return table


def report_table(verified: Verified) -> Table:
    """Shows the perplexities on the report text with their standard errors; only the finished file has
    a paired change, which is known far better.
    """
    report = verified.report
    title = f"Perplexity on {shown(report.text)}, {report.chunks} of {report.of_chunks} chunks"
    table = Table("model", "perplexity", "against the base", title=title)
    rows = [
        ("source", report.source, ""),
        ("base", report.base, ""),
        ("Cerebellum", report.result, percent(report.delta_pct, report.ci_pct)),
    ]
    for name, measured, change in rows:
        table.add_row(name, f"{number(measured.ppl)} ± {number(measured.se)}", change)
    return table


def sizes_table(plans: Sequence[AnyPlan], verified: Sequence[Verified]) -> Table:
    """Shows the sizes of a run beside each other, the smallest file first."""
    table = Table("label", "file", "predicted and measured", "perplexity on the report text", title="Sizes")
    for plan, proved in sorted(zip(plans, verified, strict=True), key=lambda pair: pair[0].file_bytes):
        report = proved.report
        change = percent(report.delta_pct, report.ci_pct)
        whole = percent(plan.measured_delta_pct, plan.ci_pct)
        told = f"{percent(plan.predicted_delta_pct)}, {whole}"
        table.add_row(
            shown(plan.file_label), size(plan.file_bytes), told, f"{number(report.result.ppl)}, {change}"
        )
    return table


def domain_tables(verified: Verified) -> tuple[Table | str, ...]:
    """Shows each domain of the report text, and says where one gains at another's cost; of one text nothing."""
    report = verified.report
    if not report.domains:
        return ()
    table = Table("domain", "chunks", "base", "Cerebellum", "change", "change of KL", title="By domain")
    for row in domain_cells(report):
        table.add_row(shown(row.name), row.chunks, row.base, row.result, row.change, row.kld_change)
    return (table, *map(shown, across_domains(report)))


def card_line(folder: Path) -> str:
    """Names the card and the report where they are; a run whose card failed has said why already."""
    paths = {"card": folder / CARD, "report": folder / REPORT}
    found = [f"{what} {shown(str(path))}" for what, path in paths.items() if path.exists()]
    return ", ".join(found) or "no card was made"


def matrix_line(path: Path, entries: int, chunks: int, ctx: int) -> str:
    """Says where an importance matrix was written, and how much text it has seen."""
    return f"{shown(str(path))}: {entries} entries from {chunks} chunks of {ctx}"


def run_instructions(path: Path, memory: GpuMemory | None = None) -> str:
    """Says how to use the file with stock llama.cpp; on a gpu with the context and slots that it was
    planned for. The lines are for a shell, so a path with spaces or a dollar sign is quoted as one word.
    """
    model = shown(shlex.quote(str(path)))
    if memory:
        return f"llama-server -m {model} {gpu_flags(memory)}"
    return f"llama-server -m {model} -c 4096        # or: llama-cli -m {model} -p 'Once upon a time'"


def comparison_table(found: Comparison) -> Table:
    """Shows what compare found of two files on one text: both perplexities, the paired change, and how
    far the predictions are apart.
    """
    table = Table(show_header=False, box=None)
    rows = [
        ("perplexity A", f"{found.ppl_a:.4f}"),
        ("perplexity B", f"{found.ppl_b:.4f}"),
        ("B against A", percent(found.delta_pct, found.ci_pct)),
        ("KL divergence", nats(found.kld_mean, found.kld_ci)),
        ("same top token", f"{100 * found.top1_agreement:.2f}%"),
        ("over", f"{found.chunks} chunks of {found.ctx}, {found.tokens:,} tokens scored"),
    ]
    for name, value in rows:
        table.add_row(f"[bold]{name}", value)
    return table


def reproduced_table(found: Reproduced) -> Table:
    """Shows each thing that the manifest names, and whether it is the same today, changed, or not at
    hand.
    """
    styles = {"same": "green", "changed": "bold red"}
    table = Table("what", "", "seen", title="Against the manifest")
    for row in found.compared:
        status = Text(row.status, style=styles.get(row.status, "yellow"))
        table.add_row(shown(row.name), status, shown(row.detail))
    return table


def reproduced_line(found: Reproduced) -> str:
    """Says in a line whether the same file came out, bit for bit, and what of all that the manifest
    names has changed.
    """
    changed = f"; changed: {shown(', '.join(found.changed))}" if found.changed else ""
    if found.file is None:
        return f"[red]not rebuilt[/]{changed}"
    first = _made_again(found.file, found.sha256 or "", found.sha256 == found.wanted_sha256)
    further = [_made_again(each.file, each.sha256, each.bit_equal) for each in found.further]
    return "\n".join([first, *further]) + changed


def _made_again(file: str, digest: str, bit_equal: bool) -> str:
    said = "[green]bit for bit the same[/]" if bit_equal else "[red]another file[/]"
    return f"{shown(file)}: {said}, sha256 {digest}"


def quantized_line(found: Quantized) -> str:
    """Says in a line what was written, how large it is against its source, and whose encoder rounded it."""
    fed = f", errors fed back by {shown(found.moments)}" if found.moments else ""
    whose = "ggml's encoder" if found.encoder == GGML else f"Cerebellum's encoder{fed}"
    sizes = f"{size(found.source_bytes)} -> {size(found.bytes)}"
    return (
        f"{shown(found.path)}: {found.preset}, {sizes}, {whose}, {found.seconds:.1f} s, sha256 {found.sha256}"
    )


def recipe_lines(found: Recipe, type_file: Path, json_file: Path) -> list[str]:
    """Says where a recipe was written, what it holds, and how llama-quantize and this program use it."""
    tensors = sum(rule.tensors for rule in found.rules)
    preset = found.preset or "Q4_K_M"
    given = shown(shlex.quote(str(type_file)))
    return [
        f"{shown(found.made_from)}: {tensors} tensors in {len(found.rules)} rules",
        f"llama-quantize --imatrix IMATRIX --tensor-type-file {given} SOURCE.gguf OUT.gguf {shown(preset)}",
        f"cerebellum run SOURCE.gguf -o DIR --recipe {shown(shlex.quote(str(json_file)))}",
    ]


def upload_table(found: Pushed) -> Table:
    """Shows the files that push uploads, or would upload, with their sizes; what is not listed stays at
    home.
    """
    table = Table("file", "size", title=f"To {shown(found.repo)}, {size(found.bytes)}")
    table.columns[1].justify = "right"
    for row in found.files:
        table.add_row(shown(row.name), size(row.bytes))
    return table
