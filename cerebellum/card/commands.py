"""Commands that run the finished file, safe to paste whatever the file is called."""

from __future__ import annotations

import shlex
from pathlib import Path

from cerebellum.card.evidence import Evidence
from cerebellum.page.markdown import Markdown, one_line
from cerebellum.plan.artifacts import GpuMemory


def gpu_flags(memory: GpuMemory) -> str:
    """Returns llama-server's flags for all layers on the gpu, with the context and the slots that were
    planned. Without ``-np`` it takes four slots, each with a recurrent state of its own, which the plan
    did not count.
    """
    return f"-ngl 99 -c {memory.context} -np {memory.sequences}"


def run_commands(evidence: Evidence, repo: str | None) -> list[tuple[str, Markdown]]:
    """Returns a command for each program that people run GGUFs with.

    Where the Hub's repository is known the commands take the file from there, by its label, else from the folder.
    """
    source = evidence.run.source
    file = one_line(evidence.run.result.file)
    path = shlex.quote(f"./{file}")
    label = evidence.plan.file_label
    context = min(4096, source.context_length or 4096)
    chat = "" if source.metadata.get("chat_template") else " -p 'Once upon a time' -n 128"
    model = f"-hf {repo}:{label}" if repo else f"-m {path}"
    planned = evidence.planned_memory
    flags = gpu_flags(planned) if planned else f"-ngl 99 -c {context}"
    commands = [
        ("llama-server", f"llama-server {model} {flags}"),
        ("llama-cli", f"llama-cli {model} -ngl 99 -c {context}{chat}"),
        *_ollama(evidence, repo, file, path),
        ("LM Studio", f"lms get https://huggingface.co/{repo}" if repo else f"lms import {path}"),
        ("LM Studio, by hand", _lm_studio(evidence, repo)),
    ]
    return [(program, Markdown(command)) for program, command in commands]


def _lm_studio(evidence: Evidence, repo: str | None) -> str:
    """Returns what puts the file where LM Studio looks for it: a folder of the publisher with one of the model.

    A model that lies elsewhere in its folder is not seen.
    """
    files = [*evidence.run.result.files, *evidence.run.manifest.projectors]
    names = [shlex.quote(f"./{one_line(named.file)}") for named in files]
    folder = repo or f"cerebellum/{Path(names[0].strip(chr(39))).stem}"
    target = f'"$HOME"/.lmstudio/models/{shlex.quote(folder)}'
    return f"mkdir -p {target} && cp {' '.join(names)} {target}/"


def _ollama(evidence: Evidence, repo: str | None, file: str, path: str) -> list[tuple[str, str]]:
    """Returns what runs the file in Ollama, which pulls no model that is split."""
    if evidence.run.result.parts:
        return []
    label = evidence.plan.file_label
    return [("Ollama", f"ollama run hf.co/{repo}:{label}" if repo else _modelfile(file, path))]


def _modelfile(file: str, path: str) -> str:
    """Returns what makes a model of a local file for Ollama, which knows no file without a Modelfile."""
    name = shlex.quote(Path(file).stem.lower())
    return f"printf 'FROM %s\\n' {path} > Modelfile && ollama create {name} -f Modelfile && ollama run {name}"
