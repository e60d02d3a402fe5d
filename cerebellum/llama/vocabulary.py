"""A model's vocabulary as llama.cpp has it: text to tokens and back, special tokens, chat template."""

from __future__ import annotations

import ctypes

from cerebellum.engine.asking import TokenIds, Vocabulary
from cerebellum.errors import CerebellumError
from cerebellum.llama.library import Bindings, Pointer


def tokens_of(
    lib: Bindings, vocab: Pointer, text: str, *, add_special: bool, parse_special: bool
) -> TokenIds:
    raw = text.encode()
    room = len(raw) + 4
    buffer = (ctypes.c_int32 * room)()
    count = lib.llama_tokenize(vocab, raw, len(raw), buffer, room, add_special, parse_special)
    if count < 0:
        raise CerebellumError(f"llama_tokenize wants room for {-count} tokens, had {room}")
    return tuple(buffer[:count])


def text_of(lib: Bindings, vocab: Pointer, tokens: TokenIds) -> str:
    """The tokens as text, special ones left out; bytes that are no UTF-8 become U+FFFD."""
    return b"".join(_piece(lib, vocab, token) for token in tokens).decode("utf-8", "replace")


def _piece(lib: Bindings, vocab: Pointer, token: int) -> bytes:
    room = 64
    while True:
        buffer = ctypes.create_string_buffer(room)
        count = lib.llama_token_to_piece(vocab, token, buffer, room, 0, False)
        if count >= 0:
            return buffer.raw[:count]
        room = -count


def read_vocabulary(lib: Bindings, model: Pointer, vocab: Pointer) -> Vocabulary:
    bos = int(lib.llama_vocab_bos(vocab))
    eos = int(lib.llama_vocab_eos(vocab))
    template = lib.llama_model_chat_template(model, None)
    return Vocabulary(
        bos=bos if bos >= 0 else None,
        eos=eos if eos >= 0 else None,
        bos_text=_special_text(lib, vocab, bos),
        eos_text=_special_text(lib, vocab, eos),
        adds_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
        chat_template=template.decode("utf-8", "replace") if template else None,
    )


def _special_text(lib: Bindings, vocab: Pointer, token: int) -> str:
    return lib.llama_vocab_get_text(vocab, token).decode("utf-8", "replace") if token >= 0 else ""
