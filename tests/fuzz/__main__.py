"""Runs mutated inputs under a limit on memory and on time; whatever is no CerebellumError is a finding."""

from __future__ import annotations

import argparse
import json
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from cerebellum.errors import CerebellumError

from .targets import Target, targets

MEMORY_BYTES = 3 << 30
SECONDS = 5.0
"""Of processor time that one input may take."""


class TooSlow(Exception):
    """An input took more processor time than any file should."""


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise TooSlow(f"more than {SECONDS} s")


def attack(target: Target, seed: str, path: Path) -> str:
    """Returns "read", "refused", or what went wrong with its traceback."""
    path.write_bytes(target.make(Random(seed)))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.read(path)
    except CerebellumError as error:
        one_line = len(str(error).splitlines()) == 1 and str(error).isprintable()
        return "refused" if one_line else f"not one clean line: {str(error)!r}"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "read"


def attack_all(found: list[Target], folder: Path, seeds: list[str]) -> dict[str, Any]:
    """Attacks once with each seed, whose number picks the target, and returns figures and findings."""
    counts: Counter[str] = Counter()
    findings: dict[str, list[str]] = {}
    slowest = 0.0
    for seed in seeds:
        target = found[int(seed.split(":")[1]) % len(found)]
        started = time.process_time()
        outcome = attack(target, seed, folder / "input")
        slowest = max(slowest, time.process_time() - started)
        counts[outcome if outcome in ("read", "refused") else "FOUND"] += 1
        if outcome not in ("read", "refused"):
            last = outcome.strip().splitlines()[-1][:160]
            findings.setdefault(f"{target.name}: {last}", []).append(seed)
            if len(seeds) == 1:
                print(outcome)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {"counts": counts, "slowest_s": round(slowest, 2), "peak_mib": peak, "findings": findings}


def main() -> int:
    """Exit code 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="a seed that a finding named, to see it again")
    asked = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, _too_slow)
    warnings.simplefilter("error")
    seeds = [asked.only] if asked.only else [f"{asked.seed}:{number}" for number in range(asked.n)]
    with tempfile.TemporaryDirectory() as folder:
        answer = attack_all(targets(Path(folder)), Path(folder), seeds)
    print(json.dumps({"n": len(seeds)} | answer, indent=2))
    return 1 if answer["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
