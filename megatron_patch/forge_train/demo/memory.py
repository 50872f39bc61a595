"""How many bytes of this rank hold what, measured at one training step.

Weights, gradients and optimizer states are the storages of the tensors that exist. The peak of the
step is the sum of those and of every allocation and release during the step, as torch's profiler
records them at the allocator (on a GPU: the caching allocator's own peak counter).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.profiler import profile

from forge_train.demo import forge_hook
from forge_train.demo.data import SampleStream
from forge_train.demo.trainer import Trainer


@dataclass(frozen=True)
class Breakdown:
    """Bytes on one rank at the step's peak; but for `fused_gradients` they add up to that peak."""

    weights: int  # model weights and fp32 master copies
    gradients: int  # DDP's gradient buffers; FORGE's accumulators under `accumulate`
    factors: int  # what FORGE keeps from the backward until the update (deferred)
    states: int  # moments and the like
    activations: int  # the rest of the peak: activations and temporaries
    fused_gradients: int  # of `gradients`: those of the weights that FORGE trains

    @property
    def total(self) -> int:
        """The peak itself."""
        return self.weights + self.gradients + self.factors + self.states + self.activations

    def as_dict(self) -> dict[str, int]:
        """The parts that add up, for JSON."""
        parts = asdict(self)
        del parts["fused_gradients"]
        return parts


class _Storages:
    """Adds up bytes, each storage once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def add(self, tensors: Iterable[torch.Tensor]) -> int:
        """Bytes of the storages among these tensors that were not added before."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen and storage.nbytes():
                self._seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total


def _tensors(root: Any) -> Iterator[torch.Tensor]:
    """All tensors reachable from an object through attributes and containers.

    Stops at modules and process groups, which belong to someone else.
    """
    stack, seen = [root], set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            stack += item
        elif isinstance(item, torch.nn.Module | type) or callable(item):
            continue
        else:
            stack += getattr(item, "__dict__", {}).values()
            slots = getattr(type(item), "__slots__", ())
            stack += [getattr(item, name, None) for name in slots]


def _standing(trainer: Trainer) -> dict[str, int]:
    """Bytes that outlive a step: weights, gradients, states, and workspaces (``activations``)."""
    count = _Storages()
    weights = count.add(trainer.module.parameters())
    gradients = count.add(buffer.grad_data for buffer in trainer.model.buffers)
    gradients += count.add(p.grad for p in trainer.module.parameters() if p.grad is not None)
    members = trainer.optimizer.chained_optimizers
    for member in members:
        # Copies of bf16 weights in fp32, or their low halves, are weights, not states.
        weights += count.add(_tensors(getattr(member, "fp32_from_float16_groups", [])))
    weights += count.add(forge_hook.weight_extras(trainer.optimizer))
    gradients += count.add(forge_hook.accumulators(trainer.optimizer))
    fused = _Storages().add(forge_hook.gradients(trainer.optimizer))
    states = sum(count.add(_tensors(member.optimizer.state)) for member in members)
    workspaces = sum(count.add(_tensors(member)) for member in members)
    return {
        "weights": weights,
        "gradients": gradients,
        "states": states,
        "activations": workspaces,
        "fused_gradients": fused,
    }


def _profiled_step(trainer: Trainer, stream: SampleStream) -> int:
    """One step; the most that allocations exceeded releases since its start, in bytes."""
    if trainer.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer.step(stream)
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as recorded:
        trainer.step(stream)
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def measure(trainer: Trainer, stream: SampleStream) -> Breakdown:
    """Train one more step and break down its peak. Collective; changes the weights."""
    parts = _standing(trainer)
    factors = 0
    optimizer_step = trainer.optimizer.step

    def count_factors_and_step() -> Any:
        nonlocal factors
        factors = forge_hook.factor_bytes(trainer.optimizer)
        return optimizer_step()

    trainer.optimizer.step = count_factors_and_step
    try:
        growth = _profiled_step(trainer, stream)
    finally:
        del trainer.optimizer.step
    # Factors are what is left of the step's own allocations when the update begins.
    factors = min(factors, growth)
    parts["activations"] += growth - factors
    return Breakdown(**parts, factors=factors)
