"""What real.py found, as Markdown for the documents, and its picture: KL divergence from the source by size.

    python benchmarks/real_table.py             # prints the tables, draws docs/real.png

Nothing is measured here; results/real.json holds every number.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from common import RESULTS
from matplotlib.figure import Figure
from PIL import Image

PICTURE = Path(__file__).parent.parent / "docs" / "real.png"
SHOWN = {  # makers in the picture, with their colours; the others are in the tables
    "preset": "#b4532a",
    "preset, our codes": "#d99a7c",
    "Cerebellum": "#1f6f8b",
    "depth bands": "#8a8578",
    "weighted MSE": "#c0a060",
}
Found = dict[str, Any]


def tables(found: Found) -> Iterator[str]:
    """Yields a table for every text and size, presets first, as they were measured."""
    for text, sizes in found.get("quality", {}).items():
        for size, rows in sizes.items():
            n = rows[0]["chunks"]
            yield (
                f"\n| {text}, size of {size}, {n} chunks of {rows[0]['documents']} documents | bytes | loss, nats "
                "| against the preset, nats | KL, nats | less KL, 95% interval |"
            )
            yield "| --- | --- | --- | --- | --- | --- |"
            yield from (_row(row) for row in rows)


def _row(row: Found) -> str:
    change = [_number(value, "+.5f") for value in row["loss_change_nats"]]
    less = [_number(value, ".1f") for value in row["less_kld_pct"]]
    name = f"**{row['maker']}**" if row["maker"] == "Cerebellum" else row["maker"]
    cells = [name, f"{row['bytes']:,}", f"{row['loss_nats']:.5f}", "", f"{row['kld_nats']:.5f}", ""]
    if row["maker"] != "preset":
        cells[3] = f"{change[0]} [{change[1]}, {change[2]}]"
        cells[5] = f"{less[0]}% [{less[1]}, {less[2]}]"
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str) -> str:
    """Writes a number; one without end, which JSON has not, as a question mark."""
    return "?" if value is None else format(value, form)


def speeds(found: Found) -> Iterator[str]:
    """Yields tokens a second of a prompt and of generation, file by file; nothing where no speed was measured."""
    if not found.get("speed"):
        return
    yield "\n| file | bytes | prompt, tokens/s | generated, tokens/s |\n| --- | --- | --- | --- |"
    for name, row in found["speed"].items():
        yield f"| {name} | {row['bytes']:,} | {row['prompt']:,.0f} | {row['generation']:.1f} |"


def questions(found: Found) -> Iterator[str]:
    """Yields accuracies, then paired differences with McNemar's p and what the questions could have shown."""
    asked = found.get("questions")
    if not asked:
        return
    names = asked["models"]
    yield "\n| model | benchmark | metric | right | accuracy |\n| --- | --- | --- | --- | --- |"
    for row in asked["scores"]:
        low, high = row["ci_pct"]
        where = f"{row['task']} ({row['protocol']}, {row['labels']})"
        yield (
            f"| {names.get(row['model'], row['model'])} | {where} | {row['metric']} | {row['correct']:,} of "
            f"{row['n']:,} | {row['accuracy_pct']:.1f}% [{low:.1f}, {high:.1f}] |"
        )
    yield "\n| against | benchmark | metric | difference | p | by Holm | could show |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in asked["paired"]:
        low, high = row["ci_pct"]
        where = f"{row['task']} ({row['protocol']}, {row['labels']})"
        sure = "significant" if row["significant_by_holm"] else "no"
        yield (
            f"| {names.get(row['against'], row['against'])} | {where} | {row['metric']} | "
            f"{row['difference_pct']:+.1f} [{low:+.1f}, {high:+.1f}] | {row['p_value']:.3g} | {sure} | "
            f"±{row['detectable_pct']:.1f} |"
        )


def picture(found: Found) -> Figure:
    """Draws the files of some makers, a panel for each text, the presets' sizes along the axis."""
    matplotlib.rcParams["svg.hashsalt"] = "cerebellum"
    texts = found["quality"]
    drawn = Figure(figsize=(1.5 + 5.5 * len(texts), 4.5), dpi=100, layout="constrained")
    panels = drawn.subplots(1, len(texts), squeeze=False, sharey=True)[0]
    for axes, (text, sizes) in zip(panels, texts.items(), strict=True):
        for maker, colour in SHOWN.items():
            rows = [row for size in sizes.values() for row in size if row["maker"] == maker]
            places = sorted((row["bytes"] / 1e6, row["kld_nats"]) for row in rows)
            if places:
                axes.plot(*zip(*places, strict=True), "o-", color=colour, linewidth=1, label=maker)
        for size, rows in sizes.items():
            at = rows[0]["bytes"] / 1e6
            axes.axvline(at, color="#bbbbbb", linewidth=0.6, linestyle=":", zorder=0)
            above = axes.get_xaxis_transform()
            axes.text(at, 1.02, size, transform=above, rotation=45, va="bottom", fontsize=8)
        axes.set_yscale("log")
        chunks = sorted({rows[0]["chunks"] for rows in sizes.values()})
        axes.set_title(f"{text}, {' to '.join(map(str, chunks))} chunks", fontsize=10, pad=44)
        axes.set_xlabel("file, MB")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("KL divergence from the source, nats a token")
    panels[-1].legend(frameon=False)
    return drawn


def draw(found: Found, path: Path) -> None:
    """Writes the picture with as few colours as it needs, so that the file is small."""
    drawn = io.BytesIO()
    picture(found).savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(32).save(path, optimize=True)


def told(found: Found) -> Iterable[str]:
    """Returns all lines of Markdown, with what they are of first."""
    yield f"{found['model']} (types {', '.join(found['source_types'])}), {found['devices']}, {found['build']}"
    for name, text in found.get("texts", {}).items():
        yield f"- {name}: {text['file']}, {text['documents']} documents, sha256 {text['sha256']}"
    yield from tables(found)
    yield from speeds(found)
    yield from questions(found)
    yield f"\nMinutes by part: {found.get('minutes')}. {found.get('broken_off', '')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--name", default="real", help="of the JSON in results/")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    asked = parser.parse_args()
    found = json.loads((RESULTS / f"{asked.name}.json").read_text())
    print("\n".join(told(found)))
    if found.get("quality"):
        draw(found, asked.picture)


if __name__ == "__main__":
    main()
