"""Renders a model's own chat template as llama-server and transformers render it, in a process of its own."""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from cerebellum import files
from cerebellum.engine.asking import Vocabulary
from cerebellum.errors import BadInput

_PROGRAM = Path(__file__).with_name("template.py")


def render_chat(vocabulary: Vocabulary, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
    """Returns the prompt up to where the answer begins, with thinking switched off where a template has a
    switch.

    A BOS that the tokenizer adds by itself is left out, so that no prompt starts with two. Raises BadInput
    where the model has no template, or it raises anything, or takes too much time or memory.
    """
    if vocabulary.chat_template is None:
        raise BadInput("the model has no chat template; ask with a plain prompt")
    values = {
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": reply,
        "bos_token": vocabulary.bos_text,
        "eos_token": vocabulary.eos_text,
        "enable_thinking": False,
        "tools": None,
    }
    text = RENDERER.render(vocabulary.chat_template, values)
    return text.removeprefix(vocabulary.bos_text) if vocabulary.adds_bos else text


class Renderer:
    """Owns the process that renders; it is started for the first prompt and again after one that ended it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """Returns the rendered text; BadInput says in a line what the template did instead."""
        with self._lock:
            answer = self._answer(json.dumps({"template": template, "values": values}))
        if "text" not in answer:
            raise BadInput(f"the model's chat template cannot be rendered: {answer['error']}; ask plainly")
        return answer["text"]

    def _answer(self, request: str) -> dict[str, str]:
        process = self._process = self._process or _started()
        assert process.stdin is not None and process.stdout is not None
        line = ""
        with suppress(BrokenPipeError):
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if line.endswith("\n"):
            found: dict[str, str] = json.loads(line)
            return found
        self.close()
        return {"error": _why(process.returncode)}

    def close(self) -> None:
        """Ends the process, if there is one."""
        process = self._process
        self._process = None
        if process is None:
            return
        with suppress(BrokenPipeError):
            process.communicate()


def _started() -> subprocess.Popen[str]:
    try:
        return files.DISK.spawn(
            lambda: subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=files.own_environment(),
                text=True,
                encoding="utf-8",
            )
        )
    except OSError as error:
        raise BadInput(
            f"{sys.executable}: cannot be started to render chat templates ({error.strerror or error}); run again"
        ) from error


def _why(code: int) -> str:
    if code == -getattr(signal, "SIGPROF", 0):
        return "it takes more than 3 s"
    return f"it ended its process (exit {code}), as too much memory does"


RENDERER = Renderer()
"""The one process that renders for this one."""

atexit.register(RENDERER.close)
