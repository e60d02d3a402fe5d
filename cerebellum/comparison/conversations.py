"""Reads conversations and writes them as the judged model sees them: in its own chat template.

A file of conversations is JSON Lines, each line ``{"messages": [{"role": "user", "content": "..."}, ...]}``, the form
in which the Hub has them. What the template writes as special tokens is tokenized as such.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from cerebellum.bench.chat import render_chat
from cerebellum.engine.asking import Vocabulary
from cerebellum.engine.protocols import Engine
from cerebellum.errors import BadInput
from cerebellum.source import TEMPLATE_KEY, Source
from cerebellum.texts import Corpus, cut, load_corpus, read_text

SUFFIX = ".jsonl"


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: str


class _Conversation(msgspec.Struct, frozen=True):
    messages: tuple[_Message, ...]


def load_text(engine: Engine, source: Source, path: Path, ctx: int) -> Corpus:
    """Reads a text, or the conversations of a .jsonl file in the model's chat template, and cuts it into chunks.

    Raises BadInput where a line is no conversation, the model has no template or the template refuses one, or the
    text cannot be used.
    """
    if path.suffix != SUFFIX:
        return load_corpus(engine, source.path, path, ctx)
    vocabulary = _vocabulary(engine, source)
    if vocabulary.chat_template is None:
        raise BadInput(
            f"{path}: {source.path.name} has no chat template to write conversations in; give a text"
        )
    written = [
        render_chat(
            vocabulary,
            [{"role": message.role, "content": message.content} for message in conversation.messages],
            reply=False,
        )
        for conversation in _conversations(path)
    ]
    return cut(engine, source.path, path, "".join(written).encode(), ctx, special=True)


def _conversations(path: Path) -> list[_Conversation]:
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            found.append(msgspec.json.decode(line, type=_Conversation))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadInput(
                f'{path}: line {number} is no conversation ({error}); want {{"messages": [{{"role": "user", '
                '"content": "..."}]} on each line'
            ) from error
    return found


def _vocabulary(engine: Engine, source: Source) -> Vocabulary:
    """Returns what a template is told of special tokens, from the model's metadata."""
    tokens = source.value("tokenizer.ggml.tokens", [])

    def named(key: str) -> tuple[int | None, str]:
        found = source.value(f"tokenizer.ggml.{key}_token_id", None)
        return (found, tokens[found]) if found is not None and found < len(tokens) else (None, "")

    bos, bos_text = named("bos")
    eos, eos_text = named("eos")
    return Vocabulary(
        bos=bos,
        eos=eos,
        bos_text=bos_text,
        eos_text=eos_text,
        adds_bos=engine.tokenize(source.path, b"a").bos is not None,
        chat_template=source.value(TEMPLATE_KEY, None),
    )
