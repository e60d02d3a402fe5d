"""The published 32B table, spent by budget instead of by threshold, at the same size.

Only the demotions were ever measured. What a promotion would gain follows from the model that
`cerebellum plan HEADER --measurements F --budget SIZE` states (cerebellum/plan/recorded.py). The point is not the
number it predicts but where the bytes go. Then a plan for each usual size of graphics card, with the memory that it
takes part by part, as a table in Markdown: the one in docs/CARDS.md.

Without a HEADER it makes one of the published shapes, whose 60 GiB of weights are holes and take a few MB of disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import save
from rich.console import Console
from rich.table import Table

from cerebellum.base import preset_base
from cerebellum.groups import make_groups
from cerebellum.layout import Layout
from cerebellum.llama.native import LlamaEngine
from cerebellum.measure.artifacts import read_recorded
from cerebellum.plan.artifacts import BudgetPlan
from cerebellum.plan.limit import plan_from
from cerebellum.plan.recorded import plan_recorded
from cerebellum.plan.target import Target
from cerebellum.settings import Limit
from cerebellum.source import open_source
from cerebellum.stats.paired import as_nats, as_percent
from cerebellum.verdicts import Changes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from sparse import write_sparse_granite  # noqa: E402 - the tests make the published shapes

EXAMPLE = Path(__file__).parent.parent / "examples" / "granite-4.0-h-small.json"


CARDS = ("8GiB", "12GiB", "16GiB", "24GiB")
CONTEXTS = (4096, 32_768)
PARTS = ("weights", "cache", "state", "compute", "reserve", "free")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("header", type=Path, nargs="?", help="granite-4.0-h-small, F16 or BF16")
    parser.add_argument("--measurements", type=Path, default=EXAMPLE)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        header = asked.header or write_sparse_granite(Path(scratch) / "granite-4.0-h-small.gguf")
        found = at_published_size(header, asked.measurements)
        rows = cards(header, asked.measurements)
    print(markdown(rows))
    print(save("published_budget", found | {"cards": rows}))


def at_published_size(header: Path, measurements: Path) -> dict[str, Any]:
    """Plans by threshold as it was published, and by budget at the same size."""
    source = open_source(header)
    base = preset_base(LlamaEngine(), source, "Q3_K_M", None)
    layout = Layout.of(source, make_groups(source), base)
    recorded = read_recorded(measurements)
    threshold = plan_from(recorded, layout, Limit(max_increase_pct=3.0))
    budget = layout.file_bytes(threshold.changes)
    plan = plan_recorded(recorded, layout, Target(file_bytes=budget))
    assert plan.predicted_delta_pct is not None
    show(plan, threshold.changes)
    saved = layout.bytes_saved(threshold.changes)
    print(f"both files within {budget:,} bytes, {saved / 1e9:.3f} GB under the preset")
    at_threshold = as_percent(threshold.predicted_nats)
    print(
        f"threshold plan {at_threshold:+.2f}% (recorded), budget plan {plan.predicted_delta_pct:+.2f}% (modelled)"
    )
    return {
        "budget_bytes": budget,
        "threshold_nats": threshold.predicted_nats,
        "budget_nats": as_nats(plan.predicted_delta_pct),
        "changes": dict(plan.changes),
        "model": plan.model,
    }


def cards(header: Path, measurements: Path) -> list[dict[str, Any]]:
    """Returns a plan for every card and context, with its memory in bytes; a card without room for one says so."""
    rows = []
    for context in CONTEXTS:
        for card in CARDS:
            asked = ("--measurements", measurements, "--fit", card, "--context", str(context), "--json")
            done = subprocess.run(
                [sys.executable, "-m", "cerebellum", "plan", str(header), *map(str, asked)],
                capture_output=True,
                text=True,
            )
            row: dict[str, Any] = {"card": card, "context": context}
            if done.returncode:
                rows.append(row | {"answer": done.stderr.strip().splitlines()[-1]})
                continue
            plan = json.loads(done.stdout)
            kept = ("file_bytes", "predicted_delta_pct", "memory")
            changed = {group["name"]: group["chosen_type"] for group in plan["groups"]}
            rows.append(row | {key: plan[key] for key in kept} | {"types": changed})
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the plans as a table in Markdown, memory in GiB."""
    lines = [
        f"| card | context | file | {' | '.join(PARTS)} | against Q3_K_M, modelled |",
        "|" + " --- |" * (len(PARTS) + 4),
    ]
    for row in rows:
        where = f"| {row['card']} | {row['context']:,} |"
        if "memory" not in row:
            lines.append(f"{where} does not fit |{' |' * (len(PARTS) + 1)}")
            continue
        parts = " | ".join(f"{row['memory'][part] / 2**30:.3f}" for part in PARTS)
        told = f"{row['predicted_delta_pct']:+.1f}%"
        lines.append(f"{where} {row['file_bytes'] / 2**30:.3f} | {parts} | {told} |")
    return "\n".join(lines)


def show(plan: BudgetPlan, threshold: Changes) -> None:
    """Prints where the bytes of both plans go, and what each group gains for them."""
    table = Table(
        "group", "base", "threshold plan", "budget plan", "bytes against the base", "change", "% per GB"
    )
    for row in plan.groups:
        assert row.delta_pct is not None
        added = -row.bytes_saved
        table.add_row(
            row.name,
            row.base_type,
            threshold.get(row.name, "-"),
            row.chosen_type if row.changed else "-",
            f"{added:+,}",
            f"{row.delta_pct:+.2f}%",
            f"{abs(row.delta_pct / added * 1e9):.1f}" if added else "",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
