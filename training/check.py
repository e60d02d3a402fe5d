"""Proves that llama.cpp and torch compute the same model, and measures the model.

It gives three answers: whether both tokenizers agree, whether both engines agree on one chunk, and what the
loss and the mean predictive entropy (equal when calibrated) are on each text. Chunks are scored as
llama-perplexity does: 512 tokens, of which the first half is context.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from model import Config, Model
from tokenizers import Tokenizer

CHUNK = 512
MOST_CHARACTERS = 8  # a token's mean length is under 4: enough text for the chunks, without tokenizing 50 MB


@dataclass(frozen=True)
class Score:
    """Holds the mean loss and the mean entropy of a text in nats/token, over ``n_tokens`` scored tokens."""

    n_tokens: int
    nll_nats: float
    entropy_nats: float


def load_model(path: Path) -> Model:
    """Returns the model of a checkpoint on the CPU, ready to be asked and not to be trained."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = Model(Config(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def nll(logits_TV: np.ndarray, targets_T: np.ndarray) -> np.ndarray:
    """Returns the negative log-likelihood of each target in nats, (T,), computed in double precision."""
    log_probs = torch.from_numpy(logits_TV).double().log_softmax(-1)
    return -log_probs[torch.arange(len(targets_T)), torch.from_numpy(targets_T)].numpy()


def llama_logits(llama: llama_cpp.Llama, tokens: np.ndarray) -> np.ndarray:
    """Returns llama.cpp's logits after each token, (T, V), from an empty context."""
    llama.reset()
    llama.eval(tokens.tolist())
    return np.array(llama.scores[: len(tokens)], dtype=np.float32)


@torch.no_grad()
def torch_logits(model: Model, tokens_BL: np.ndarray) -> torch.Tensor:
    return model(torch.from_numpy(tokens_BL.astype(np.int64)))


def engine_difference(model: Model, llama: llama_cpp.Llama, tokens: np.ndarray) -> tuple[float, float]:
    """Returns the mean NLL of one chunk in torch less that in llama.cpp, and the largest difference of a
    token, in nats.
    """
    ours = nll(torch_logits(model, tokens[None, :-1])[0].numpy(), tokens[1:])
    theirs = nll(llama_logits(llama, tokens[:-1]), tokens[1:])
    return float(np.mean(ours - theirs)), float(np.abs(ours - theirs).max())


def tokenizers_agree(tokenizer: Tokenizer, llama: llama_cpp.Llama, text: str) -> bool:
    """Says whether the tokenizer that trained the model and llama.cpp's cut the text into the same tokens."""
    return tokenizer.encode(text).ids == llama.tokenize(text.encode(), add_bos=False, special=False)


def batches(tokens: np.ndarray, n_chunks: int) -> Iterator[np.ndarray]:
    """Yields the first ``n_chunks`` chunks of 512 tokens, eight at a time, (8, 512)."""
    chunks = tokens[: len(tokens) // CHUNK * CHUNK].reshape(-1, CHUNK)[:n_chunks]
    yield from (chunks[i : i + 8] for i in range(0, len(chunks), 8))


def score(model: Model, tokens: np.ndarray, n_chunks: int) -> Score:
    """Returns the loss and entropy over the second half of every chunk, which has the first as context."""
    nlls = []
    entropies = []
    for chunk in batches(tokens, n_chunks):
        log_probs = torch_logits(model, chunk)[:, CHUNK // 2 - 1 : -1].log_softmax(-1)
        targets = torch.from_numpy(chunk[:, CHUNK // 2 :].astype(np.int64))
        nlls.append(-log_probs.gather(-1, targets[..., None]).flatten())
        entropies.append(-(log_probs.exp() * log_probs).sum(-1).flatten())
    all_nll = torch.cat(nlls).double()
    return Score(len(all_nll), float(all_nll.mean()), float(torch.cat(entropies).double().mean()))


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("tokenizer", type=Path)
    p.add_argument("gguf", type=Path)
    p.add_argument("texts", type=Path, nargs="+", help="texts to score; the first is also compared")
    p.add_argument("--chunks", type=int, default=700, help="score at most the first N of each text")
    return p.parse_args()


def main() -> None:
    a = arguments()
    model = load_model(a.checkpoint)
    tokenizer = Tokenizer.from_file(str(a.tokenizer))
    llama = llama_cpp.Llama(str(a.gguf), n_ctx=CHUNK, n_batch=CHUNK, logits_all=True, verbose=False)
    texts = {path: path.read_text("utf-8")[: a.chunks * CHUNK * MOST_CHARACTERS] for path in a.texts}
    sample = texts[a.texts[0]][:200_000]
    print(f"tokenizers agree on {len(sample)} characters: {tokenizers_agree(tokenizer, llama, sample)}")
    first = np.array(tokenizer.encode(sample).ids[: CHUNK + 1])
    mean, largest = engine_difference(model, llama, first)
    print(f"torch - llama.cpp on one chunk: mean {mean:+.6f} nats, largest token {largest:.6f}")
    print(
        "\n| text | scored tokens | NLL (nats) | entropy (nats) | perplexity |\n| --- | --- | --- | --- | --- |"
    )
    for path, text in texts.items():
        s = score(model, np.array(tokenizer.encode(text).ids), a.chunks)
        print(
            f"| {path.name} | {s.n_tokens} | {s.nll_nats:.4f} | {s.entropy_nats:.4f} | {np.exp(s.nll_nats):.2f} |"
        )


if __name__ == "__main__":
    main()
