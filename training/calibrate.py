"""Fits the one number that decides how sure the model is: Granite's logit scale.

After a short training the model is too modest (its entropy lies above its loss), and on a model whose entropy
and loss differ, perplexity and KL divergence can disagree about a quantization. The scale is chosen on
held-out articles (not the selection text) so that the two meet, by bisection, and written into a copy of the
checkpoint. The weights stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from check import CHUNK, batches, load_model, torch_logits
from tokenizers import Tokenizer
from torch import Tensor

LOW = 0.5  # the bisection's first bounds, as factors of every logit
HIGH = 2.0
STEPS = 12


def scored_logits(checkpoint: Path, tokens: np.ndarray, n_chunks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (logits, targets) of the second half of every chunk, flattened over positions."""
    model = load_model(checkpoint)
    for chunk in batches(tokens, n_chunks):
        logits = torch_logits(model, chunk)[:, CHUNK // 2 - 1 : -1]
        yield logits.flatten(0, 1), torch.from_numpy(chunk[:, CHUNK // 2 :].astype(np.int64)).flatten()


def loss_and_entropy(parts: list[tuple[Tensor, Tensor]], sharper: float) -> tuple[float, float]:
    """Returns the mean NLL and the mean entropy in nats/token, with every logit multiplied by ``sharper``."""
    nll = 0.0
    entropy = 0.0
    n = 0
    for logits, targets in parts:
        log_probs = (logits * sharper).log_softmax(-1)
        nll -= float(log_probs.gather(-1, targets[:, None]).sum())
        entropy -= float((log_probs.exp() * log_probs).sum())
        n += len(targets)
    return nll / n, entropy / n


def meeting_point(parts: list[tuple[Tensor, Tensor]]) -> float:
    """Returns the factor at which loss and entropy are equal, found by bisection.

    The entropy falls as the factor grows, and it falls faster than the loss moves, so there is one such
    point.
    """
    low = LOW
    high = HIGH
    for _ in range(STEPS):
        middle = (low + high) / 2
        nll, entropy = loss_and_entropy(parts, middle)
        if entropy > nll:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("tokenizer", type=Path)
    p.add_argument("heldout", type=Path, help="articles that neither trained the model nor select or report")
    p.add_argument("out", type=Path, help="the calibrated checkpoint")
    p.add_argument("--chunks", type=int, default=40)
    a = p.parse_args()
    tokens = np.array(Tokenizer.from_file(str(a.tokenizer)).encode(a.heldout.read_text("utf-8")).ids)
    with torch.no_grad():
        parts = list(scored_logits(a.checkpoint, tokens, a.chunks))
        sharper = meeting_point(parts)
        before = loss_and_entropy(parts, 1.0)
        after = loss_and_entropy(parts, sharper)
    state = torch.load(a.checkpoint, map_location="cpu", weights_only=True)
    state["config"]["logit_scale"] /= sharper
    torch.save({"model": state["model"], "config": state["config"]}, a.out)
    print(f"logits times {sharper:.4f}: loss, entropy {before} -> {after}")


if __name__ == "__main__":
    main()
