"""Trains a GGUF of the demo's model further for a minute or two on any text: a finetune to try `transfer` with.

    python finetune.py tokens.npy demo.F16.gguf finetuned.F16.gguf --seconds 90

`tokens.npy` holds token ids, (n,) int32, of the model's own vocabulary:

    from cerebellum.llama.native import LlamaEngine
    numpy.save("tokens.npy", LlamaEngine().tokenize(Path("demo.F16.gguf"), text).tokens)
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gguf
import numpy as np
import torch
from export import gguf_tensors
from model import Config, Model

BATCH, LENGTH = 8, 256


def load(path: Path) -> tuple[Model, gguf.GGUFReader]:
    """Returns the model with the weights of a GGUF: the way of export.py, backwards."""
    reader = gguf.GGUFReader(path)
    value = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in reader.tensors}
    logit_scale = float(reader.get_field("granitehybrid.logit_scale").contents())
    model = Model(Config(logit_scale=logit_scale))
    state = model.state_dict()
    for name, tensor in state.items():
        stored = name.removesuffix("_log").replace("ssm_dt_bias", "ssm_dt.bias")
        found = value[stored]
        found = np.log(-found) if name.endswith("ssm_a_log") else found
        tensor.copy_(torch.from_numpy(found.reshape(tensor.shape)))
    return model, reader


def train(model: Model, tokens: np.ndarray, seconds: float, rate: float) -> list[float]:
    """Trains on random windows until the time is over; returns the loss of every step, nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    rng = np.random.default_rng(1)
    losses: list[float] = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        starts = rng.integers(0, len(tokens) - LENGTH - 1, BATCH)
        windows = torch.from_numpy(np.stack([tokens[s : s + LENGTH + 1] for s in starts]).astype(np.int64))
        logits = model(windows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def write(model: Model, reader: gguf.GGUFReader, source: Path, out: Path) -> None:
    """Writes a copy of the GGUF with the trained weights: the header stays byte for byte what it was."""
    trained = dict(gguf_tensors({name: value.detach() for name, value in model.state_dict().items()}))
    content = bytearray(source.read_bytes())
    for tensor in reader.tensors:
        value = trained[tensor.name].tobytes()
        assert len(value) == tensor.n_bytes, tensor.name
        content[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = value
    out.write_bytes(content)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tokens", type=Path)
    p.add_argument("source", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--seconds", type=float, default=90)
    p.add_argument("--rate", type=float, default=3e-4)
    a = p.parse_args()
    model, reader = load(a.source)
    losses = train(model, np.load(a.tokens), a.seconds, a.rate)
    write(model, reader, a.source, a.out)
    print(f"{len(losses)} steps, loss {np.mean(losses[:10]):.3f} -> {np.mean(losses[-10:]):.3f}")


if __name__ == "__main__":
    main()
