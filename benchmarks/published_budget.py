"""The published 32B table, spent by budget instead of by threshold, at the same size.

Only the demotions were ever measured. What a promotion would gain follows from the model that
`cerebellum plan HEADER --measurements F --budget SIZE` states (cerebellum/plan/recorded.py). The point is not the
number it predicts but where the bytes go.
"""

from __future__ import annotations

import argparse
from pathlib import Path

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

EXAMPLE = Path(__file__).parent.parent / "examples" / "granite-4.0-h-small.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("header", type=Path, help="granite-4.0-h-small, F16 or BF16; its header is read")
    parser.add_argument("--measurements", type=Path, default=EXAMPLE)
    asked = parser.parse_args()
    source = open_source(asked.header)
    base = preset_base(LlamaEngine(), source, "Q3_K_M", None)
    layout = Layout.of(source, make_groups(source), base)
    recorded = read_recorded(asked.measurements)
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
    save(
        "published_budget",
        {
            "budget_bytes": budget,
            "threshold_nats": threshold.predicted_nats,
            "budget_nats": as_nats(plan.predicted_delta_pct),
            "changes": dict(plan.changes),
            "model": plan.model,
        },
    )


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
