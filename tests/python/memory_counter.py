"""Counts the bytes of every tensor that torch makes, as an allocator would, on any device.

On the ``meta`` device tensors have sizes and no memory, so that models of any size can be counted.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counter(TorchDispatchMode):
    """Bytes of storages that operations made since this began and that are still there.

    Attributes:
        live: now.
        peak: the most at any time, between operations.
    """

    def __init__(self, known: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        # Held for as long as the counter: a storage's identity must not be used again.
        self._known = [p.untyped_storage() for p in known.parameters()] if known else []
        for storage in self._known:
            self._seen[id(storage)] = weakref.ref(storage)

    def reset_peak(self) -> None:
        """Begin another phase."""
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen and self._seen[key]() is storage:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_reference: object) -> None:
            self._seen.pop(key, None)
            self.live -= size

        self._seen[key] = weakref.ref(storage, freed)


class _Flash(torch.autograd.Function):
    """Attention that saves what a flash kernel saves, in its layout; it computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, _ = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
        sums = q.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_options: Any) -> Any:
    """In place of ``scaled_dot_product_attention``, which has no kernel for the meta device."""
    return _Flash.apply(query, key, value)
