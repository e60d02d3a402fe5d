"""The published 32B table, spent by budget instead of by threshold, at the same size.

Only the demotions were ever measured. What a promotion would gain follows from the model that
`cerebellum plan HEADER --measurements F --budget SIZE` states (cerebellum/recorded.py). The point is not the
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
from cerebellum.measure.curves import BASE, PPL, base_kinds
from cerebellum.measure.race import Threshold
from cerebellum.plan.budget import Allocation
from cerebellum.plan.limit import Sizes, plan_from, read_measurements
from cerebellum.plan.recorded import MODEL, recorded_points
from cerebellum.source import open_source
from cerebellum.stats.paired import as_percent

EXAMPLE = Path(__file__).parent.parent / "examples" / "granite-4.0-h-small.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("header", type=Path, help="granite-4.0-h-small, F16 or BF16; its header is read")
    parser.add_argument("--measurements", type=Path, default=EXAMPLE)
    asked = parser.parse_args()
    source = open_source(asked.header)
    base = preset_base(source, "Q3_K_M", None, has_imatrix=True)
    sizes = Sizes.of(source, make_groups(source), base)
    recorded = read_measurements(asked.measurements)
    threshold = plan_from(recorded, sizes, "Q2_K", Threshold(limit_pct=3.0))
    budget = sizes.whole_file_bytes(threshold.changes)
    plan = Allocation(recorded_points(recorded, sizes), sizes, PPL).best(budget)
    assert plan is not None
    table = Table(
        "group", "base", "threshold plan", "budget plan", "bytes against the base", "change", "% per GB"
    )
    for point in plan.points:
        name, kind = point.part.name, point.kind
        assert point.nll is not None
        moved = point.n_bytes - sizes.file_bytes(name, BASE)
        change = as_percent(point.nll.mean)
        table.add_row(
            name,
            "+".join(sorted(base_kinds(point.part, sizes))),
            threshold.changes.get(name, "-"),
            kind if kind != BASE else "-",
            f"{moved:+,}",
            f"{change:+.2f}%",
            f"{abs(change / moved * 1e9):.1f}" if moved else "",
        )
    Console(width=110).print(table)
    saved = sizes.bytes_saved(threshold.changes)
    at_threshold = threshold.predicted_nats
    print(f"both files within {budget:,} bytes, {saved / 1e9:.3f} GB under the preset")
    recorded, modelled = as_percent(at_threshold), as_percent(plan.predicted)
    print(f"threshold plan {recorded:+.2f}% (recorded), budget plan {modelled:+.2f}% (modelled)")
    save(
        "published_budget",
        {
            "budget_bytes": budget,
            "threshold_nats": at_threshold,
            "budget_nats": plan.predicted,
            "changes": dict(plan.changes),
            "model": MODEL,
        },
    )


if __name__ == "__main__":
    main()
