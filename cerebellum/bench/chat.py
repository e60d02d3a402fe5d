"""Renders a model's own chat template as llama-server and transformers render it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cerebellum.engine.asking import Vocabulary
from cerebellum.errors import BadInput


def render_chat(vocabulary: Vocabulary, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
    """Returns the prompt up to where the answer begins, with thinking switched off where a template has a
    switch.

    A BOS that the tokenizer adds by itself is left out, so that no prompt starts with two. Raises BadInput
    where the model has no template or it cannot be rendered.
    """
    if vocabulary.chat_template is None:
        raise BadInput("the model has no chat template; ask with a plain prompt")
    try:
        text = _compiled(vocabulary.chat_template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=reply,
            bos_token=vocabulary.bos_text,
            eos_token=vocabulary.eos_text,
            enable_thinking=False,
            tools=None,
            strftime_now=lambda form: datetime(2026, 1, 1).strftime(form),  # the same prompt every day
        )
    except TemplateError as error:
        raise BadInput(f"the model's chat template cannot be rendered: {error}; ask plainly") from error
    return text.removeprefix(vocabulary.bos_text) if vocabulary.adds_bos else text


@cache
def _compiled(template: str) -> Template:
    """Compiles a template for a sandbox, because templates come from model files that anybody may have
    written.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, **options)
