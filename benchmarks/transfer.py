"""A finished run's plan on a finetune that was trained for a minute: does its promise hold?

    python benchmarks/transfer.py --seconds 90 --name transfer

The embedded model is trained further on the code of Python's standard library (training/finetune.py, which needs
torch), without the modules that the texts of several domains have. Two runs of the embedded model, the demo's limit of
3% and a budget of Q3_K_M's size, are then transferred to it with `cerebellum transfer`, checked on the run's own prose
and on code. A folder that is kept goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from common import ON_PROSE, cerebellum, save
from rich.console import Console
from rich.table import Table

from cerebellum.codec import as_json, read_artifact
from cerebellum.llama.native import LlamaEngine
from cerebellum.recipes.transferred import Figure, Transferred
from cerebellum.settings import DATA, DEMO_MODEL

TRAINING = Path(__file__).parent.parent / "training"
MODULES = (
    *("argparse", "ast", "configparser", "dataclasses", "difflib", "doctest", "enum", "functools", "gettext"),
    *("inspect", "ipaddress", "locale", "mailbox", "mimetypes", "optparse", "pdb", "pickle", "platform"),
    *(
        "plistlib",
        "poplib",
        "pydoc",
        "shutil",
        "smtplib",
        "socket",
        "ssl",
        "subprocess",
        "tarfile",
        "tempfile",
    ),
    *("threading", "traceback", "typing", "uuid", "zipfile"),
)
RUNS = {
    "limit 3%": ["--max-increase", "3%"],
    "budget Q3_K_M": ["--budget", "Q3_K_M"],
}
TEXTS: dict[str, list[str]] = {
    "prose, the run's": [],
    "code": [
        *("--select-text", str(DATA / "domains" / "select-code.txt")),
        *("--report-text", str(DATA / "domains" / "report-code.txt")),
    ],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=90, help="of training")
    parser.add_argument("--chunks", type=int, default=300, help="that a plan is checked on")
    parser.add_argument("--report-chunks", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch and gguf")
    parser.add_argument("--folder", type=Path, help="where models and runs go [default: a temporary one]")
    parser.add_argument("--name", default="transfer", help="of the JSON in results/")
    return parser.parse_args()


def finetuned(asked: argparse.Namespace, folder: Path) -> Path:
    """Trains the embedded model on code, unless that was done; returns the finetune and keeps the trainer's words."""
    out = folder / "finetuned.F16.gguf"
    if not out.exists():
        library = Path(sysconfig.get_path("stdlib"))
        paths = [library / f"{module}.py" for module in MODULES]
        text = "\n\n".join(path.read_text(encoding="utf-8") for path in paths if path.exists())
        tokens = folder / "tokens.npy"
        np.save(tokens, LlamaEngine().tokenize(DEMO_MODEL, text.encode()).tokens)
        command = [asked.torch_python, "finetune.py", tokens, DEMO_MODEL, out, "--seconds", asked.seconds]
        done = subprocess.run(
            list(map(str, command)), cwd=TRAINING, stdout=subprocess.PIPE, text=True, check=True
        )
        (folder / "finetune.log").write_text(done.stdout)
    return out


def transferred(
    asked: argparse.Namespace, run: Path, finetune: Path, out: Path, texts: Sequence[str]
) -> Transferred:
    """Runs `cerebellum transfer`, whose answer may be no; returns transfer.json."""
    machine = ["--threads", asked.threads, "--gpu-layers", asked.gpu_layers, "--chunks", asked.chunks]
    command = [sys.executable, "-m", "cerebellum", "transfer", run, "--source", finetune, "-o", out]
    done = subprocess.run(list(map(str, [*command, *texts, *machine])), stdout=subprocess.DEVNULL)
    if done.returncode > 1:
        sys.exit(f"cerebellum transfer ended with {done.returncode}")
    return read_artifact(out / "transfer.json", Transferred, "remove the folder")


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        finetune = finetuned(asked, folder)
        machine = ["--threads", str(asked.threads), "--gpu-layers", str(asked.gpu_layers)]
        few = ["--imatrix-chunks", "100", "--report-chunks", str(asked.report_chunks)]
        found: dict[str, Transferred] = {}
        for name, goal in RUNS.items():
            run = folder / name.replace(" ", "-").replace("%", "")
            cerebellum("run", DEMO_MODEL, "-o", run, *goal, *few, *ON_PROSE, *machine)
            for text, flags in TEXTS.items():
                out = run.with_name(f"{run.name}-on-{text.split(',')[0]}")
                found[f"{name}, {text}"] = transferred(asked, run, finetune, out, flags)
        log = (folder / "finetune.log").read_text().strip()
    show(log, found)
    print(
        save(asked.name, {"training": log, "transfers": {name: as_json(one) for name, one in found.items()}})
    )


def show(training: str, found: Mapping[str, Transferred]) -> None:
    table = Table(
        "plan, checked on", "verdict", "over the promise, nats", "before", "on the finetune", title=training
    )
    for name, told in found.items():
        verdict = f"{told.verdict}, revised" if told.revised else told.verdict
        pct = (percent(told.before_pct), percent(told.now_pct))
        table.add_row(name, verdict, written(told.over, "+.5f"), *pct)
    Console(width=130).print(table)


def percent(figure: Figure) -> str:
    return written(figure, "+.2f") + "%"


def written(figure: Figure, form: str) -> str:
    if figure.mean is None or figure.ci is None:
        return "not finite"
    low, high = figure.ci
    return f"{figure.mean:{form}} [{low:{form}}, {high:{form}}]"


if __name__ == "__main__":
    main()
