"""Trains the demo model: Muon for the hidden matrices, AdamW for the rest, cosine to zero.

Tokens are what a small CPU lacks, so the schedule follows whichever limit is nearer: the wall clock
(`--minutes`) or the text (`--passes`). Muon (Jordan 2024) is used because it learns more per token.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from model import Config, Model
from torch import Tensor


@torch.no_grad()
def orthogonalised(g: Tensor, steps: int = 5) -> Tensor:
    """Returns roughly the nearest semi-orthogonal matrix, by Newton-Schulz (Jordan 2024); a stack goes at
    once.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # the coefficients of Jordan's quintic
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16 if g.is_cuda else torch.float32)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Steps along the momentum, orthogonalised; a stack of expert matrices is orthogonalised matrix by
    matrix.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(momentum, group["momentum"]))
                shape_scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * shape_scale)


def optimizers(model: Model, a: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Returns Muon for the hidden matrices, and AdamW for embedding, router, convolution and vectors."""
    small = ("token_embd", "ffn_gate_inp", "conv1d")
    named = list(model.named_parameters())
    hidden = [p for n, p in named if p.ndim > 1 and not any(s in n for s in small)]
    rest = [p for n, p in named if not any(p is h for h in hidden)]
    adam = torch.optim.AdamW(rest, lr=a.lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    found: list[torch.optim.Optimizer] = [Muon(hidden, a.muon_lr, 0.95, a.weight_decay), adam]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return found


@dataclass
class Windows:
    """Gives every window of the text once per pass, in a seeded order that shifts and changes with the pass.

    ``length`` counts tokens in a window and ``used`` the windows given so far, which a checkpoint keeps.
    """

    tokens: np.ndarray
    length: int
    seed: int
    used: int = 0
    orders: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def per_pass(self) -> int:
        return (len(self.tokens) - self.length - 1) // self.length

    def order(self, index: int) -> np.ndarray:
        """Returns where the windows of pass ``index`` start, shuffled and shifted by less than one window."""
        if index not in self.orders:
            rng = np.random.default_rng((self.seed, index))
            starts = rng.permutation(self.per_pass) * self.length
            self.orders = {index: starts + rng.integers(self.length)}
        return self.orders[index]

    def batch(self, size: int) -> Tensor:
        """Returns (size, length + 1) tokens: the inputs and, shifted by one, the targets."""
        rows = []
        for i in range(self.used, self.used + size):
            start = self.order(i // self.per_pass)[i % self.per_pass]
            rows.append(self.tokens[start : start + self.length + 1].astype(np.int64))
        self.used += size
        return torch.from_numpy(np.stack(rows))

    @property
    def passes(self) -> float:
        return self.used / self.per_pass


def lr_factor(progress: float, warmup: float) -> float:
    """Returns the factor of the peak rate: linear warmup, then a cosine to zero; `progress`
    runs from 0 to 1.
    """
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class Trainer:
    """Holds everything that a checkpoint must hold for a run to go on as if it had not stopped."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.step = 0
        self.seconds = 0.0
        torch.manual_seed(a.seed)
        self.config = Config()
        self.model = Model(self.config, a.dropout).to(a.device)
        self.optimizers = optimizers(self.model, a)
        self.train = Windows(np.load(a.data / "train.npy"), a.length, a.seed)
        self.heldout = np.load(a.data / "heldout.npy")
        self.checkpoint = a.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.load()
        self.head = torch.compile(self.model.loss, dynamic=False) if a.compile else self.model.loss
        if a.compile:
            for block in self.model.blk:
                block.compile(dynamic=False)

    def save(self) -> None:
        state = {
            "config": asdict(self.config), "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step, "seconds": self.seconds, "used": self.train.used,
        }  # fmt: skip
        beside = self.checkpoint.with_suffix(".part")
        torch.save(state, beside)
        os.replace(beside, self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.a.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.train.used = state["used"]

    @property
    def progress(self) -> float:
        return max(self.seconds / (60 * self.a.minutes), self.train.passes / self.a.passes)

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean cross-entropy in nats per token, and the load-balancing loss."""
        tokens = tokens.to(self.a.device)
        with torch.autocast(self.a.device, torch.bfloat16, enabled=self.a.bf16):
            x, balance = self.model.hidden(tokens[:, :-1])
            return self.head(x, tokens[:, 1:]), balance

    def update(self) -> tuple[float, float]:
        """Takes one step of all optimizers over `micro` batches and returns the mean losses."""
        total = torch.zeros(2)
        for _ in range(self.a.micro):
            loss, balance = self.losses(self.train.batch(self.a.batch))
            ((loss + self.a.balance * balance) / self.a.micro).backward()
            total += torch.stack([loss.detach(), balance.detach()]).cpu() / self.a.micro
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = lr_factor(self.progress, self.a.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
        self.model.zero_grad()
        self.step += 1
        return float(total[0]), float(total[1])

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Returns the loss on a few held-out windows, for the log; check.py measures the final one on all of
        the text.
        """
        self.model.eval()
        n = self.a.batch * self.a.length
        parts = [self.heldout[i * n : (i + 1) * n + 1] for i in range(2)]
        rows = [
            np.lib.stride_tricks.sliding_window_view(p, self.a.length + 1)[:: self.a.length] for p in parts
        ]
        losses = [float(self.losses(torch.from_numpy(r.astype(np.int64)))[0]) for r in rows]
        self.model.train()
        return sum(losses) / len(losses)

    def log(self, line: str) -> None:
        print(line, flush=True)
        with open(self.a.log, "a", encoding="utf-8") as f:
            f.write(line + "\n")

    def run(self) -> None:
        n = sum(p.numel() for p in self.model.parameters())
        settings = {k: v for k, v in vars(self.a).items() if not isinstance(v, Path)}
        self.log(f"# {n} parameters, {self.train.per_pass * self.a.length} tokens a pass, {settings}")
        recent = []
        saved = time.monotonic()
        while self.progress < 1:
            began = time.monotonic()
            recent.append(self.update())
            self.seconds += time.monotonic() - began
            if self.step % self.a.log_every == 0:
                self.report(recent)
                recent = []
            if time.monotonic() - saved > 60 * self.a.save_minutes:
                self.save()
                self.log(f"checkpoint step {self.step} heldout {self.heldout_loss():.4f}")
                saved = time.monotonic()
        self.save()
        self.log(
            f"done step {self.step} tokens {self.train.used * self.a.length} heldout {self.heldout_loss():.4f}"
        )

    def report(self, recent: list[tuple[float, float]]) -> None:
        loss, balance = np.mean(recent, axis=0)
        tokens = self.train.used * self.a.length
        self.log(
            f"step {self.step} tokens {tokens} loss {loss:.4f} balance {balance:.3f} "
            f"progress {self.progress:.4f} passes {self.train.passes:.3f} "
            f"tok/s {tokens / self.seconds:.0f} {time.strftime('%H:%M:%S', time.gmtime())}"
        )


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("data", type=Path, help="folder with train.npy and heldout.npy")
    p.add_argument("out", type=Path, help="folder for checkpoint.pt; a run found there goes on")
    p.add_argument("--log", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=math.inf)
    p.add_argument("--passes", type=float, default=1.0)
    p.add_argument("--device", default="cpu")
    p.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="off on a CPU without AMX"
    )
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--batch", type=int, default=4, help="windows in one forward pass")
    p.add_argument("--micro", type=int, default=3, help="forward passes in one step")
    p.add_argument("--lr", type=float, default=3e-3, help="AdamW's peak")
    p.add_argument("--muon-lr", type=float, default=0.015, help="Muon's peak")
    p.add_argument("--weight-decay", type=float, default=0.05, help="of Muon's matrices")
    p.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    p.add_argument("--warmup", type=float, default=0.03, help="share of the run")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--save-minutes", type=float, default=5.0)
    return p.parse_args()


def main() -> None:
    a = arguments()
    a.out.mkdir(parents=True, exist_ok=True)
    Trainer(a).run()


if __name__ == "__main__":
    main()
