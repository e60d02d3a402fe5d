"""Coverage-guided attacks on the GGUF reader and on the codec, by atheris (libFuzzer for Python).

    pip install atheris
    python -m tests.fuzz.guided reader --seconds 600
    python -m tests.fuzz.guided codec --seconds 600

Where `python -m tests.fuzz` makes inputs by what it knows of the formats, this one changes bytes, watches which
lines of Cerebellum run, and goes on from inputs that reach new ones. Anything that is no CerebellumError of one
printable line ends it, with the input in a file of the current folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["cerebellum"]):
    from cerebellum.errors import CerebellumError

    from .targets import Target, targets

_OF = {
    "reader": ("hybrid", "few", "imatrix"),
    "codec": (
        "settings",
        "source",
        "groups",
        "measurements",
        "curves",
        "plan",
        "verify",
        "manifest",
        "bench",
    ),
}
_SEEDS = 40  # inputs that it starts from, of each target
_LIMITS = ("-rss_limit_mb=4096", "-timeout=20", "-max_len=65536", "-print_final_stats=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=sorted(_OF))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    warnings.simplefilter("error")
    folder = Path(tempfile.mkdtemp(prefix="cerebellum-fuzz-"))
    chosen = _chosen(asked.what, folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, target in enumerate(chosen):
        for seed in range(_SEEDS):
            content = target.make(Random(f"{asked.seed}:{seed}"))
            (corpus / f"{number}-{seed}").write_bytes(bytes([number]) + content)
    limits = [*_LIMITS, f"-max_total_time={asked.seconds}", f"-seed={asked.seed}"]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], lambda content: attack(chosen, folder, content))
    atheris.Fuzz()


def _chosen(what: str, folder: Path) -> list[Target]:
    """Returns the targets whose inputs are read by the part that is attacked."""
    return [target for target in targets(folder) if target.name.startswith(_OF[what])]


def attack(chosen: list[Target], folder: Path, content: bytes) -> None:
    """Reads an input, whose first byte picks the target; raises what is no clear line."""
    if not content:
        return
    path = folder / "input"
    path.write_bytes(content[1:])
    try:
        chosen[content[0] % len(chosen)].read(path)
    except CerebellumError as error:
        if len(str(error).splitlines()) != 1 or not str(error).isprintable():
            raise AssertionError(f"not one clean line: {str(error)!r}") from error


if __name__ == "__main__":
    main()
