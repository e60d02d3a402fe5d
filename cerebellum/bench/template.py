"""Renders chat templates in a process of its own: `python template.py`, a JSON line in, a JSON line out.

A template is a program that came with a model, so anybody may have written it. The sandbox keeps it from Python's
insides; it does not keep it from loops without end or strings without bound. Those end this process alone, by a
limit on the processor time of each rendering and one on its memory. Nothing of Cerebellum is imported here.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable
from datetime import datetime
from functools import cache
from typing import Any, NoReturn, TextIO

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

PROCESSOR_SECONDS = 3.0
"""Processor time that one prompt may take: real templates take milliseconds."""

MEMORY_BYTES = 1 << 30
"""Address space of the whole process, of which Python and jinja2 take about a tenth."""

LONGEST_PROMPT = 1 << 22
"""Characters of a prompt; no context holds more."""


def serve(requests: Iterable[str], out: TextIO) -> None:
    """Answers each request with a line that holds either the ``text`` or, in words, the ``error``."""
    limit_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    for request in requests:
        limit_time(PROCESSOR_SECONDS)
        answer = rendered(json.loads(request))
        limit_time(0.0)
        out.write(json.dumps(answer) + "\n")
        out.flush()


def rendered(asked: dict[str, Any]) -> dict[str, str]:
    """Renders one prompt. Whatever a template raises is its own fault and comes back as words."""
    try:
        form = compiled(asked["template"])
        text = form.render(asked["values"], strftime_now=_the_same_day)
    except Exception as error:
        return {
            "error": str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        }
    if len(text) > LONGEST_PROMPT:
        return {"error": f"it makes a prompt of {len(text):,} characters"}
    return {"text": text}


@cache
def compiled(template: str) -> Template:
    """Compiles a template for a sandbox in which nothing that it is given can be changed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _the_same_day(form: str) -> str:
    """Says a date, the same every day, because a benchmark's prompts must not change over night."""
    return datetime(2026, 1, 1).strftime(form)


def limit_time(seconds: float) -> None:
    """Ends this process when it has worked for so long; time in which it was stopped does not count."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_memory() -> None:
    """Bounds what this process can take, where the system lets it."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
