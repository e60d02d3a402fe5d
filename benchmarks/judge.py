"""llama.cpp's presets and Cerebellum's files of one model, judged on prose, code, German and chat.

    python benchmarks/judge.py MODEL --ours RUN/*Cerebellum*.gguf --imatrix RUN/imatrix.gguf --gpu-layers -1

Presets are made from the model with the matrix, by ggml's encoder (the bytes that llama-quantize writes). Without
--ours, one `cerebellum run --budget` of the sizes of --budgets makes them first. `cerebellum judge` then reads all
files until their order is sure, on texts that chose none of them: the halves of the domains that report, and the
questions and answers among them as conversations in the model's own chat template, where it has one. What it leaves,
table, picture and JSON, goes into results/. A folder that is kept goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import ON_PROSE, RESULTS, cerebellum
from rich.console import Console
from rich.markdown import Markdown

from cerebellum.settings import DEMO_MODEL, shipped_domains
from cerebellum.source import TEMPLATE_KEY, open_source

PRESETS = ("Q2_K", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M")
TEXTS = ("prose", "code", "german")
CHATTED = "questions"

_PAIR = re.compile(r"(?ms)^Question: (?P<question>.+?)\n\nAnswer: (?P<answer>.+?)(?=\n+Question: |\Z)")


def conversations(text: str) -> str:
    """Returns questions and answers as JSON Lines of messages, the form that `judge` reads."""
    found = [
        {
            "messages": [
                {"role": "user", "content": pair["question"].strip()},
                {"role": "assistant", "content": pair["answer"].strip()},
            ]
        }
        for pair in _PAIR.finditer(text)
    ]
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in found)


def texts(model: Path, folder: Path) -> list[str]:
    """Returns the options that name the texts; questions and answers as chat, where the model has a template."""
    paths = {text.name: text.path for text in shipped_domains("report")}
    found = [f"{name}={paths[name]}" for name in TEXTS]
    if open_source(model, allow_requantize=True).value(TEMPLATE_KEY) is None:
        found.append(f"{CHATTED}={paths[CHATTED]}")
    else:
        chat = folder / "chat.jsonl"
        chat.write_text(conversations(paths[CHATTED].read_text(encoding="utf-8")), encoding="utf-8")
        found.append(f"chat={chat}")
    return [word for text in found for word in ("--text", text)]


def ours(asked: argparse.Namespace, folder: Path) -> list[Path]:
    """Makes a file of every size with one run; returns them."""
    options = ["--budget", ",".join(asked.budgets), "--imatrix-chunks", "100", "--report-chunks", "8"]
    machine = ["--threads", str(asked.threads), "--gpu-layers", str(asked.gpu_layers), "--allow-requantize"]
    answer, _ = cerebellum("run", asked.model, "-o", folder / "run", *options, *ON_PROSE, *machine)
    return [Path(size["file"]) for size in answer.get("sizes") or [answer]]


def preset(asked: argparse.Namespace, folder: Path, name: str, imatrix: Path) -> Path:
    """Makes a preset as llama-quantize does, unless it is there."""
    out = folder / f"{asked.model.stem}-{name}.gguf"
    if not out.exists():
        how: list[str | Path] = ["--encoder", "ggml", "--imatrix", imatrix, "--threads", str(asked.threads)]
        cerebellum("quantize", asked.model, name, "-o", out, "--allow-requantize", *how)
    return out


def judged(asked: argparse.Namespace, folder: Path, files: Sequence[Path]) -> None:
    """Judges the files, and copies what that leaves into results/."""
    machine = ["--threads", str(asked.threads), "--gpu-layers", str(asked.gpu_layers)]
    most = ["--max-chunks", str(asked.max_chunks), "--kld-cache", asked.kld_cache]
    out = folder / "judged"
    command: list[str | Path] = [
        *files,
        "--source",
        asked.model,
        *texts(asked.model, folder),
        *most,
        *machine,
        "-o",
        out,
    ]
    found, seconds = cerebellum("judge", *command)
    RESULTS.mkdir(exist_ok=True)
    for suffix in (".json", ".png"):
        shutil.copyfile(out / f"judge{suffix}", RESULTS / f"{asked.name}{suffix}")
    page = (out / "judge.md").read_text().replace("(judge.png)", f"({asked.name}.png)")
    (RESULTS / f"{asked.name}.md").write_text(page)
    Console(width=130).print(Markdown(page))
    print(f"{found['tokens_scored']:,} tokens, {seconds:.0f} s; {RESULTS / asked.name}.*", file=sys.stderr)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO_MODEL)
    parser.add_argument("--ours", type=Path, nargs="+", help="files of runs; without it they are made")
    parser.add_argument("--budgets", nargs="+", default=["Q2_K", "Q3_K_M", "Q4_K_M"], help="sizes of ours")
    parser.add_argument("--imatrix", type=Path, help="with --ours: the matrix of the presets")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--max-chunks", type=int, default=0, help="of each text")
    parser.add_argument("--kld-cache", default="8GiB")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where files go [default: a temporary one]")
    parser.add_argument("--name", default="judge", help="of what is left in results/")
    asked = parser.parse_args()
    if bool(asked.ours) != bool(asked.imatrix):
        parser.error("--ours and --imatrix go together: presets get the matrix that ours were made with")
    return asked


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        made = asked.ours or ours(asked, folder)
        imatrix = asked.imatrix or folder / "run" / "imatrix.gguf"
        presets = [preset(asked, folder, name, imatrix) for name in asked.presets]
        judged(asked, folder, [*presets, *made])


if __name__ == "__main__":
    main()
