"""Models small enough for a test, their data, and how they are compared."""

from __future__ import annotations

import torch


class Block(torch.nn.Module):
    """One pre-norm transformer layer with causal attention, QKV in one linear."""

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
        self.proj = torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 56), torch.nn.Linear(56, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.view(batch, tokens, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(torch.nn.Module):
    """Embedding, two blocks, an output layer."""

    def __init__(self, vocabulary: int = 40, width: int = 24) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.blocks = torch.nn.Sequential(Block(width), Block(width))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def mlp() -> torch.nn.Sequential:
    """19 → 33 → 7 with a norm between: odd sizes, one linear with and one without bias."""
    return torch.nn.Sequential(
        torch.nn.Linear(19, 33),
        torch.nn.GELU(),
        torch.nn.LayerNorm(33),
        torch.nn.Linear(33, 7, bias=False),
    )


def mlp_batches(count: int, tokens: int = 29, seed: int = 1) -> list[tuple[torch.Tensor, ...]]:
    """Inputs and targets of :func:`mlp`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(tokens, 19, generator=generator), torch.randn(tokens, 7, generator=generator))
        for _ in range(count)
    ]


def mlp_loss(model: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean squared error in the model's dtype."""
    dtype = next(model.parameters()).dtype
    x, y = (t.to(dtype) for t in batch)
    return torch.nn.functional.mse_loss(model(x), y)


def tokens_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token cross entropy of ``tokens [batch, length]``."""
    logits = model(tokens[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def worst(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """The largest difference of any weight, as a part of the largest weight of its tensor."""
    return max(
        ((p.double() - q.double()).abs().max() / q.double().abs().max()).item()
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def assert_same_bits(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Every parameter equal, bit for bit."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
