"""A Llama with the operations of the transformers package's, one by one, and its memory counted."""

from __future__ import annotations

from typing import Any

import torch
from memory_counter import flash
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from forge_train.estimate import Architecture


class _FusedNorm(torch.autograd.Function):
    """Saves what torch's fused RMSNorm saves on a GPU: its input, and one number of each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        root = x.new_ones(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, root)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(grad), torch.empty_like(ctx.saved_tensors[1])


class RMSNorm(torch.nn.Module):
    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.weight, self.fused = torch.nn.Parameter(torch.ones(width)), fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused and x.is_cuda:
            return functional.rms_norm(x, self.weight.shape, self.weight, 1e-5)
        if self.fused:
            return _FusedNorm.apply(x, self.weight)
        dtype, x = x.dtype, x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * x.to(dtype)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(torch.nn.Module):
    def __init__(self, found: Architecture, exact: bool, attention: str) -> None:
        super().__init__()
        h, bias = found.hidden, found.attention_bias
        self.found, self.exact, self.attention = found, exact, attention
        self.q_proj = torch.nn.Linear(h, found.query, bias=bias)
        self.k_proj = torch.nn.Linear(h, found.key, bias=bias)
        self.v_proj = torch.nn.Linear(h, found.key, bias=bias)
        self.o_proj = torch.nn.Linear(found.query, h, bias=found.output_bias)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            linear(x).view(batch, tokens, -1, self.found.head_dim).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        if self.attention == "eager":
            y = self._scores(q, k, v)
        elif self.exact:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = flash(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))

    def _scores(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        times = self.found.heads // self.found.key_value_heads
        k, v = (each.repeat_interleave(times, dim=1) if times > 1 else each for each in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * self.found.head_dim**-0.5
        scores = scores + torch.zeros(scores.shape[-2:], dtype=q.dtype, device=q.device)
        chances = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(chances, v).transpose(1, 2).contiguous().transpose(1, 2)


class MLP(torch.nn.Module):
    def __init__(self, found: Architecture) -> None:
        super().__init__()
        h, wide = found.hidden, found.intermediate
        self.gate_proj = torch.nn.Linear(h, wide, bias=False)
        self.up_proj = torch.nn.Linear(h, wide, bias=False)
        self.down_proj = torch.nn.Linear(wide, h, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(torch.nn.Module):
    def __init__(self, found: Architecture, exact: bool, attention: str, fused: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(found.hidden, fused)
        self.self_attn = Attention(found, exact, attention)
        self.post_attention_layernorm = RMSNorm(found.hidden, fused)
        self.mlp = MLP(found)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(torch.nn.Module):
    def __init__(self, found: Architecture, exact: bool, attention: str, fused: bool) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(found.vocabulary, found.hidden)
        self.layers = torch.nn.ModuleList(
            Layer(found, exact, attention, fused) for _ in range(found.layers)
        )
        self.norm = RMSNorm(found.hidden, fused)


class SmallLlama(torch.nn.Module):
    """The model; ``forward`` returns the loss.

    Args:
        found: sizes of the family ``llama`` or ``qwen2``.
        exact: attention that computes, for devices with numbers; else one that only has sizes.
        attention: ``sdpa`` or ``eager``.
        fused: norms as one operation; without a GPU they have only sizes.
        checkpointing: of each layer.
    """

    def __init__(
        self,
        found: Architecture,
        *,
        exact: bool = False,
        attention: str = "sdpa",
        fused: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.found, self.checkpointing = found, checkpointing
        self.model = Body(found, exact, attention, fused)
        self.lm_head = torch.nn.Linear(found.hidden, found.vocabulary, bias=False)
        if found.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(ids)
        even = torch.arange(0, self.found.head_dim, 2, dtype=torch.float32, device=ids.device)
        place = torch.arange(ids.shape[1], dtype=torch.float32, device=ids.device)
        angles = torch.outer(place, 10000.0 ** (-even / self.found.head_dim)).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        del angles
        for layer in self.model.layers:
            if self.checkpointing:
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin)
        logits = self.lm_head(self.model.norm(x))
        exact = logits.float()
        return functional.cross_entropy(exact.view(-1, exact.shape[-1]), ids.view(-1))
