"""Computes a miniature of Granite-4.0-H-Small exactly as llama.cpp's `granitehybrid` does.

Modules are named like the GGUF tensors they become (`blk.0.ssm_in.weight`), so the exporter is a copy and a
mismatch of names cannot hide. Mamba-2 runs in its chunked matmul form: on a CPU, dense products over chunks
of 64 are the only form of the scan that trains at a useful speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Config:
    """Holds the model's shape and Granite's multipliers.

    Row lengths are multiples of 256, so that every k-quant is legal for the matrices.
    """

    n_vocab: int = 4096
    n_embd: int = 256
    n_layer: int = 6
    attention_layers: tuple[int, ...] = (2, 5)
    n_head: int = 4
    n_head_kv: int = 2
    d_head: int = 64
    d_inner: int = 512
    d_state: int = 64
    d_conv: int = 4
    d_ssm_head: int = 64
    ssm_chunk: int = 64
    n_expert: int = 8
    n_expert_used: int = 2
    n_ff_exp: int = 256
    n_ff_shexp: int = 512
    embedding_scale: float = 12.0
    residual_scale: float = 0.22
    attention_scale: float = 1 / 64
    logit_scale: float = 4.0
    rms_eps: float = 1e-5

    @property
    def n_ssm_head(self) -> int:
        return self.d_inner // self.d_ssm_head

    @property
    def d_conv_channels(self) -> int:
        """Returns the channels of the convolution, which runs over x, B and C together (one group)."""
        return self.d_inner + 2 * self.d_state


class Weight(nn.Module):
    """Holds a bare `.weight`: a norm's gain, or the matrices of all experts stacked."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


def linear(n_in: int, n_out: int) -> nn.Linear:
    """Returns a layer without a bias whose outputs have about the variance of its inputs."""
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=n_in**-0.5)
    return layer


def experts(n: int, n_in: int, n_out: int) -> Weight:
    """Returns the matrices of ``n`` experts in one stack, (n, n_out, n_in), as GGUF keeps them."""
    return Weight(torch.randn(n, n_out, n_in) * n_in**-0.5)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Returns ``x`` divided by its root mean square over the last dimension, times ``gain``, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


class Permute(torch.autograd.Function):
    """Reorders rows by a permutation.

    The backward is a gather by the inverse too, because index_add, the default, is serial on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def run_all_experts(x_TD: Tensor, chosen_TK: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Returns the outputs (T, K, D) of the chosen experts by running every expert on every token.

    On a GPU four times the products cost less than sorting, whose counts the host must wait for.
    """
    hidden_ETF = F.silu(x_TD @ gate.mT) * (x_TD @ up.mT)
    outs_TED = (hidden_ETF @ down.mT).transpose(0, 1)
    return outs_TED.gather(1, chosen_TK[..., None].expand(-1, -1, x_TD.shape[-1]))


@torch.compiler.disable
def run_experts(x_TD: Tensor, chosen_TK: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Returns the outputs (T, K, D) of the chosen experts: rows sorted by expert, then one product for each
    expert.
    """
    n_tokens, n_used = chosen_TK.shape
    flat = chosen_TK.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = flat.bincount(minlength=len(gate)).tolist()
    repeated = x_TD[:, None].expand(-1, n_used, -1).reshape(n_tokens * n_used, -1)
    parts = Permute.apply(repeated, order, inverse).split(counts)
    outs = [(F.silu(p @ g.T) * (p @ u.T)) @ d.T for p, g, u, d in zip(parts, gate, up, down)]
    return Permute.apply(torch.cat(outs), inverse, order).view(n_tokens, n_used, -1)


def balance_loss(probs_TE: Tensor, chosen_TK: Tensor) -> Tensor:
    """Returns Switch Transformer's load-balancing loss (Fedus et al. 2021, eq. 4), which is 1
    when balanced.
    """
    n_expert = probs_TE.shape[-1]
    share = F.one_hot(chosen_TK, n_expert).float().mean((0, 1))
    return n_expert * (share * probs_TE.mean(0)).sum()


class Block(nn.Module):
    """Is a layer: a mixer, then routed experts plus one shared expert, each added at `residual_scale`."""

    def __init__(self, c: Config, dropout: float) -> None:
        super().__init__()
        self.c = c
        self.dropout = nn.Dropout(dropout)
        self.attn_norm = Weight(torch.ones(c.n_embd))
        self.ffn_norm = Weight(torch.ones(c.n_embd))
        self.ffn_gate_inp = linear(c.n_embd, c.n_expert)
        self.ffn_gate_exps = experts(c.n_expert, c.n_embd, c.n_ff_exp)
        self.ffn_up_exps = experts(c.n_expert, c.n_embd, c.n_ff_exp)
        self.ffn_down_exps = experts(c.n_expert, c.n_ff_exp, c.n_embd)
        self.ffn_gate_shexp = linear(c.n_embd, c.n_ff_shexp)
        self.ffn_up_shexp = linear(c.n_embd, c.n_ff_shexp)
        self.ffn_down_shexp = linear(c.n_ff_shexp, c.n_embd)

    def mix(self, x_BLD: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.mix(rms_norm(x_BLD, self.attn_norm.weight, self.c.rms_eps))
        x_BLD = x_BLD + self.c.residual_scale * self.dropout(mixed)
        fed, balance = self.feed(rms_norm(x_BLD, self.ffn_norm.weight, self.c.rms_eps))
        return x_BLD + self.c.residual_scale * self.dropout(fed), balance

    def feed(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the experts' output and the load-balancing loss.

        The softmax is over the selected logits only: llama.cpp's softmax over all, renormalised, is the same.
        """
        x_TD = x_BLD.flatten(0, 1)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD, self.ffn_gate_inp.weight)
        top, chosen = logits_TE.topk(self.c.n_expert_used, dim=-1)
        weights_TK = top.softmax(-1)
        x_low = x_TD.to(working_dtype(x_TD))
        stacks = [
            w.weight.to(x_low.dtype) for w in (self.ffn_gate_exps, self.ffn_up_exps, self.ffn_down_exps)
        ]
        run = run_all_experts if x_low.is_cuda else run_experts
        routed = (run(x_low, chosen, *stacks) * weights_TK[..., None]).sum(1)
        shared = self.ffn_down_shexp(F.silu(self.ffn_gate_shexp(x_low)) * self.ffn_up_shexp(x_low))
        return (routed + shared).view_as(x_BLD), balance_loss(logits_TE.softmax(-1), chosen)


def working_dtype(x: Tensor) -> torch.dtype:
    """Returns the type that matrix products run in: autocast's where it is on, else the type of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class AttentionBlock(Block):
    """Mixes by grouped-query attention without positions, because the Mamba layers below it
    carry the order.
    """

    def __init__(self, c: Config, dropout: float) -> None:
        super().__init__(c, dropout)
        self.attn_q = linear(c.n_embd, c.n_head * c.d_head)
        self.attn_k = linear(c.n_embd, c.n_head_kv * c.d_head)
        self.attn_v = linear(c.n_embd, c.n_head_kv * c.d_head)
        self.attn_output = linear(c.n_head * c.d_head, c.n_embd)

    def heads(self, x_BLF: Tensor) -> Tensor:
        return x_BLF.unflatten(-1, (-1, self.c.d_head)).transpose(1, 2)

    def mix(self, x_BLD: Tensor) -> Tensor:
        q, k, v = (self.heads(f(x_BLD)) for f in (self.attn_q, self.attn_k, self.attn_v))
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.c.attention_scale, enable_gqa=True
        )
        return self.attn_output(y.transpose(1, 2).flatten(2))


def inverse_softplus(y: Tensor) -> Tensor:
    """Returns the x whose softplus is ``y``, so that a time step can be initialised by its value."""
    return y + torch.log(-torch.expm1(-y))


class MambaBlock(Block):
    """Mixes by Mamba-2 with one group, initialised as in Dao & Gu 2024 (A in 1..16, dt in 1e-3..1e-1)."""

    def __init__(self, c: Config, dropout: float) -> None:
        super().__init__(c, dropout)
        self.ssm_in = linear(c.n_embd, c.d_inner + c.d_conv_channels + c.n_ssm_head)
        self.ssm_conv1d = nn.Conv1d(c.d_conv_channels, c.d_conv_channels, c.d_conv, groups=c.d_conv_channels)
        self.ssm_a_log = nn.Parameter(torch.empty(c.n_ssm_head).uniform_(1, 16).log())
        self.ssm_d = nn.Parameter(torch.ones(c.n_ssm_head))
        dt = torch.exp(torch.empty(c.n_ssm_head).uniform_(-6.9078, -2.3026))
        self.ssm_dt_bias = nn.Parameter(inverse_softplus(dt))
        self.ssm_norm = Weight(torch.ones(c.d_inner))
        self.ssm_out = linear(c.d_inner, c.n_embd)

    def convolve(self, x_BLC: Tensor) -> Tensor:
        """Returns the causal depthwise convolution as shifted sums, which a compiler fuses into its
        neighbours.
        """
        length, kernel = x_BLC.shape[1], self.ssm_conv1d.weight
        padded = F.pad(x_BLC, (0, 0, self.c.d_conv - 1, 0))
        taps = [padded[:, k : k + length] * kernel[:, 0, k] for k in range(self.c.d_conv)]
        return F.silu(sum(taps) + self.ssm_conv1d.bias)

    def mix(self, x_BLD: Tensor) -> Tensor:
        c = self.c
        z, xbc, dt = self.ssm_in(x_BLD).split((c.d_inner, c.d_conv_channels, c.n_ssm_head), dim=-1)
        x, b, c_ = self.convolve(xbc).split((c.d_inner, c.d_state, c.d_state), dim=-1)
        x_BLHP = x.unflatten(-1, (c.n_ssm_head, c.d_ssm_head))
        dt_BLH = F.softplus(dt.float() + self.ssm_dt_bias)
        y = scan(x_BLHP, dt_BLH, -self.ssm_a_log.exp(), b, c_, c.ssm_chunk)
        y = (y + x_BLHP * self.ssm_d[:, None]).flatten(2)
        # The gate comes before the norm, as in Mamba-2's gated RMSNorm.
        return self.ssm_out(rms_norm(y * F.silu(z), self.ssm_norm.weight, c.rms_eps))


def scan(x_BLHP: Tensor, dt_BLH: Tensor, a_H: Tensor, b_BLN: Tensor, c_BLN: Tensor, chunk: int) -> Tensor:
    """Returns y of h = exp(dt a) h + dt b x, y = c h, in chunks of Q steps (Dao & Gu 2024, listing 1).

    Sizes: B sequences, K chunks of Q steps, H heads of P, state N; decays stay in float32.
    """
    length = x_BLHP.shape[1]
    x_BLHP = x_BLHP * dt_BLH[..., None]
    pad = -length % chunk
    x = F.pad(x_BLHP, (0, 0, 0, 0, 0, pad))
    decay = F.pad(dt_BLH * a_H, (0, 0, 0, pad))
    b, c = (F.pad(t, (0, 0, 0, pad)).unflatten(1, (-1, chunk)) for t in (b_BLN, c_BLN))
    x_BKHQP = x.unflatten(1, (-1, chunk)).transpose(2, 3)
    sums_BKHQ = decay.unflatten(1, (-1, chunk)).transpose(2, 3).cumsum(-1)
    inside = ((c @ b.transpose(-1, -2))[:, :, None] * lower_decay(sums_BKHQ)) @ x_BKHQP
    to_end = torch.exp(sums_BKHQ[..., -1:] - sums_BKHQ)
    states_BKHNP = b.transpose(-1, -2)[:, :, None] @ (x_BKHQP * to_end[..., None])
    before = carried(states_BKHNP, sums_BKHQ[..., -1])
    outside = (c[:, :, None] @ before) * sums_BKHQ.exp()[..., None]
    return (inside + outside).transpose(2, 3).flatten(1, 2)[:, :length]


def lower_decay(sums: Tensor) -> Tensor:
    """Returns exp(sums[i] - sums[j]) for j <= i and 0 elsewhere.

    The mask comes before exp, which would overflow above the diagonal.
    """
    n = sums.shape[-1]
    keep = torch.ones(n, n, dtype=torch.bool, device=sums.device).tril()
    return torch.exp((sums[..., :, None] - sums[..., None, :]).masked_fill(~keep, -torch.inf))


def carried(states_BKHNP: Tensor, decay_BKH: Tensor) -> Tensor:
    """Returns the state before each chunk, by a loop.

    There are 8 chunks, and for so few a loop is cheaper than a product over all of them.
    """
    state = torch.zeros_like(states_BKHNP[:, 0])
    before = []
    for k in range(states_BKHNP.shape[1]):
        before.append(state)
        state = state * decay_BKH[:, k, :, None, None].exp() + states_BKHNP[:, k]
    return torch.stack(before, 1)


class Model(nn.Module):
    """Is the whole model: embedding, blocks, norm, and an output head that shares the embedding's matrix."""

    def __init__(self, c: Config, dropout: float = 0.0) -> None:
        super().__init__()
        self.c = c
        self.token_embd = nn.Embedding(c.n_vocab, c.n_embd)
        nn.init.normal_(self.token_embd.weight, std=0.05)
        blocks = [AttentionBlock if i in c.attention_layers else MambaBlock for i in range(c.n_layer)]
        self.blk = nn.ModuleList(block(c, dropout) for block in blocks)
        self.output_norm = Weight(torch.ones(c.n_embd))

    def hidden(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the residual stream after the last block, and the mean load-balancing loss of
        the layers.
        """
        x = self.token_embd(tokens_BL) * self.c.embedding_scale
        balances = []
        for block in self.blk:
            x, balance = block(x)
            balances.append(balance)
        return x, torch.stack(balances).mean()

    def logits(self, x_BLD: Tensor) -> Tensor:
        """Returns the logits, (B, L, V).

        The scale divides the 256 inputs and not the 4,096 outputs: the value is the same for far less memory
        traffic.
        """
        x_BLD = rms_norm(x_BLD, self.output_norm.weight, self.c.rms_eps)
        return F.linear(x_BLD / self.c.logit_scale, self.token_embd.weight)

    def loss(self, x_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        """Returns the mean cross-entropy of the targets in nats per token."""
        return F.cross_entropy(self.logits(x_BLD).float().flatten(0, 1), targets_BL.flatten())

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens_BL)[0])
