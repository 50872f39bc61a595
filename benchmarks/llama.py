"""A Llama causal language model, so that every method of a benchmark trains the very same one.

Parameter names, shapes and arithmetic are those of ``LlamaForCausalLM`` of Hugging Face's
``transformers`` (grouped-query attention, SwiGLU, RMSNorm, rotary positions with Llama 3.1's
scaling, logits in fp32 for the loss), so a ``state_dict`` goes either way. It needs torch alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of slow rotary frequencies, by its config's names."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes, by the names of a ``config.json``.

    Attributes:
        rope_scaling: None: plain rotary positions.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.hidden_size // self.num_attention_heads

    def linears(self) -> list[tuple[int, int]]:
        """``(out, in)`` of every linear, the head last."""
        hidden, wide = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        layer = [
            (queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries),
            (wide, hidden), (wide, hidden), (hidden, wide),
        ]  # fmt: skip
        return layer * self.num_hidden_layers + [(self.vocab_size, hidden)]

    def parameters(self) -> int:
        """Elements of all parameters."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        linears = sum(out * columns for out, columns in self.linears())
        return linears + norms + self.vocab_size * self.hidden_size


LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MODELS = {"llama-3.1-8b": LLAMA_3_1_8B, "tiny": TINY}


def rotary_frequencies(config: LlamaConfig, device: torch.device) -> torch.Tensor:
    """Radians per position, fp32 ``[head_dim / 2]``."""
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = 1.0 / config.rope_theta ** (even / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Waves longer than the old context are stretched, short ones are left, between them a blend.
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / scaling.factor)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x`` is ``[batch, heads, tokens, head_dim]``; halves of ``head_dim`` are the pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    """``x / rms(x) · weight``."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention; several queries share a key."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.grouped = queries != keys
        self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            projection(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.grouped
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """All but the head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens]`` ids to ``[batch, tokens, hidden_size]``."""
        x = self.embed_tokens(ids)
        position = torch.arange(ids.shape[1], dtype=torch.float32, device=ids.device)
        angle = torch.outer(position, rotary_frequencies(self.config, ids.device)).repeat(1, 2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Llama(nn.Module):
    """The model with its head; weights are uninitialised until :func:`build` has filled them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens]`` ids to ``[batch, tokens, vocab_size]`` of the weights' dtype."""
        return self.lm_head(self.model(ids))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy, in fp32, of ``[batch, tokens]`` labels, which are ids' successors."""
        logits = self.logits(ids).float()
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def build(
    config: LlamaConfig,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    std: float = 0.02,
) -> Llama:
    """A model of random weights, made on the device: normal with ``std``, norms 1.

    Args:
        config: sizes.
        device: where the weights are made; no copy exists elsewhere.
        dtype: of all parameters.
        seed: the same seed gives the same weights on devices of one kind.
        std: of linears and the embedding.
    """
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=std, generator=generator)
    return model
