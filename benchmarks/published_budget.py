"""The published 32B table, spent by budget instead of by threshold, at the same size.

Only the demotions were ever measured. What a promotion would gain is a *model*, stated here: damage falls
by a factor of four with every bit of weight, as squared rounding error does, and is fixed by the recorded
demotion of the same group. The point is not the number it predicts but where the bytes go.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import save
from rich.console import Console
from rich.table import Table

from cerebellum.base import preset_base
from cerebellum.budget import Allocation
from cerebellum.curves import BASE, K_LADDER, Point
from cerebellum.gguf import bits_per_weight, parse_type, tensor_bytes
from cerebellum.groups import make_groups
from cerebellum.plan import Sizes, make_units, plan_from, read_measurements
from cerebellum.source import open_source
from cerebellum.stats.paired import Interval, as_percent
from cerebellum.sweep import Threshold

EXAMPLE = Path(__file__).parent.parent / "examples" / "granite-4.0-h-small.json"


def error_at(sizes: Sizes, name: str, kind: str) -> float:
    """Mean over a group's weights of 4^-bits, the model's unit of damage."""
    types = sizes.base_types(name)
    if kind != BASE:
        types = dict.fromkeys(types, parse_type(kind))
    weights = {tensor: tensor_bytes(parse_type("F32"), sizes.tensors[tensor].shape) for tensor in types}
    total = sum(weights[t] * 4.0 ** -bits_per_weight(kind_) for t, kind_ in types.items())
    return total / sum(weights.values())


def modelled_points(sizes: Sizes, demotion: dict[str, float]) -> list[Point]:
    """Every group at every K-quant: recorded where it was recorded, modelled elsewhere, nats/token."""
    points = []
    for name in sizes.groups:
        kinds = [kind for kind in K_LADDER if sizes.legal(name, kind)] if name in demotion else []
        unit = error_at(sizes, name, "Q2_K") - error_at(sizes, name, BASE)
        for kind in (BASE, *kinds):
            change = (error_at(sizes, name, kind) - error_at(sizes, name, BASE)) / unit
            damage = change * demotion[name] if kind != BASE else 0.0
            delta = Interval(mean=damage, low=damage, high=damage, n=0, population=0)
            n_bytes = sizes.file_bytes(name, kind)
            points.append(Point(group=name, kind=kind, n_bytes=n_bytes, kld=delta, nll=delta))
    return points


def recorded_demotions(sizes: Sizes, path: Path) -> dict[str, float]:
    """Nats of each group at Q2_K; a joint record is shared out by the bytes it saved."""
    found: dict[str, float] = {}
    for unit in make_units(read_measurements(path), sizes):
        assert unit.measurement.delta is not None
        for name, kind in unit.changes.items():
            share = sizes.bytes_saved({name: kind}) / unit.bytes_saved
            found[name] = unit.measurement.delta.mean * share
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("header", type=Path, help="granite-4.0-h-small, F16 or BF16; its header is read")
    parser.add_argument("--measurements", type=Path, default=EXAMPLE)
    asked = parser.parse_args()
    source = open_source(asked.header)
    base = preset_base(source, "Q3_K_M", None, has_imatrix=True)
    groups = {group.name: group for group in make_groups(source) if not group.protected}
    sizes = Sizes(tensors=source.tensors, groups=groups, base=base)
    demotion = recorded_demotions(sizes, asked.measurements)
    threshold = plan_from(read_measurements(asked.measurements), sizes, "Q2_K", Threshold(limit_pct=3.0))
    budget = sizes.whole_file_bytes(threshold.changes)
    found = Allocation(modelled_points(sizes, demotion), sizes).best(budget)
    assert found is not None
    plan = found[1]
    table = Table(
        "group", "base", "threshold plan", "budget plan", "bytes against the base", "modelled change"
    )
    for name in sizes.groups:
        kind = plan.changes.get(name, BASE)
        alone = next(p for p in modelled_points(sizes, demotion) if (p.group, p.kind) == (name, kind))
        assert alone.kld is not None
        table.add_row(
            name,
            "+".join(sorted({t.name for t in sizes.base_types(name).values()})),
            threshold.changes.get(name, "-"),
            kind if kind != BASE else "-",
            f"{sizes.file_bytes(name, kind) - sizes.file_bytes(name, BASE):+,}",
            f"{as_percent(alone.kld.mean):+.2f}%",
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
            "model": "damage proportional to 4^-bits, fixed by the recorded demotion of each group",
        },
    )


if __name__ == "__main__":
    main()
