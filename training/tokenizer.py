"""Trains a byte-level BPE on the training articles and writes the token files that training reads.

The pre-tokenizer is GPT-2's regular expression, which llama.cpp implements as `tokenizer.ggml.pre = gpt-2`;
check.py proves that both split a real text the same way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from texts import articles
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"


def train(texts: list[str], n_vocab: int) -> Tokenizer:
    """Returns a byte-level BPE of ``n_vocab`` tokens, the end-of-text token and all 256 bytes among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_vocab, special_tokens=[EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Returns all articles in one row of uint16 tokens, each closed by the end-of-text token."""
    eos = [tokenizer.token_to_id(EOS)]
    rows = [np.array(e.ids + eos, dtype=np.uint16) for e in tokenizer.encode_batch(texts)]
    return np.concatenate(rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("folder", type=Path, help="has train.txt and heldout.txt; gets tokenizer.json and *.npy")
    p.add_argument("--vocab", type=int, default=4096)
    a = p.parse_args()
    texts = {name: articles((a.folder / f"{name}.txt").read_text("utf-8")) for name in ("train", "heldout")}
    tokenizer = train(texts["train"], a.vocab)
    tokenizer.save(str(a.folder / "tokenizer.json"))
    for name, part in texts.items():
        tokens = encode(tokenizer, part)
        np.save(a.folder / f"{name}.npy", tokens)
        print(
            f"{name}: {len(tokens)} tokens, {sum(len(t.encode()) for t in part) / len(tokens):.3f} bytes each"
        )


if __name__ == "__main__":
    main()
