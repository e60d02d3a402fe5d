"""Splits the Wikipedia text: 97% of the articles train, the last 3% never do.

The held-out articles give the selection text (the package measures demotions on it) and a rest that only
measures the held-out loss, so no text both trains the model and judges it.
"""

from __future__ import annotations

import argparse
import gzip
import re
from pathlib import Path

TITLE = re.compile(r"(?m)^(?= = [^=\n][^\n]* = *$)")


def articles(text: str) -> list[str]:
    """Returns the articles in order, each from its ` = Title = ` line on; sub-headings have more than one
    `=`.
    """
    starts = [m.start() for m in TITLE.finditer(text)]
    return [text[a:b] for a, b in zip(starts, starts[1:] + [len(text)])]


def take_bytes(parts: list[str], limit: int) -> int:
    """Returns how many whole articles from the start fit in `limit` bytes of UTF-8."""
    used = 0
    for i, part in enumerate(parts):
        used += len(part.encode())
        if used > limit:
            return i
    return len(parts)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("source", type=Path, help="the Wikipedia text, gzipped")
    p.add_argument("out", type=Path, help="folder for train.txt, selection.txt and heldout.txt")
    p.add_argument("--heldout", type=float, default=0.03, help="share of the articles, from the end")
    p.add_argument("--selection-bytes", type=int, default=1_000_000)
    a = p.parse_args()
    found = articles(gzip.open(a.source, "rt", encoding="utf-8").read())
    n_train = round(len(found) * (1 - a.heldout))
    n_selection = take_bytes(found[n_train:], a.selection_bytes)
    cuts = {
        "train": found[:n_train],
        "selection": found[n_train : n_train + n_selection],
        "heldout": found[n_train + n_selection :],
    }
    a.out.mkdir(parents=True, exist_ok=True)
    for name, part in cuts.items():
        (a.out / f"{name}.txt").write_text("".join(part), encoding="utf-8", newline="")
        print(f"{name}: {len(part)} articles, {sum(len(x.encode()) for x in part)} bytes")


if __name__ == "__main__":
    main()
