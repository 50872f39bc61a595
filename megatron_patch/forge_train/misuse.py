"""Messages of errors that a training script's author can mend."""

from __future__ import annotations

import torch


def reused(name: str) -> str:
    """A second forward while the first is pending."""
    return (
        f"{name} is used a second time before the backward of its first use: "
        "schedule='immediate' would update it twice in one step. No weight has changed. Use "
        "schedule='deferred', which sums all uses, or exclude the layer from fuse(). If the first "
        "output is not to be differentiated, compute it under torch.no_grad() or delete it."
    )


def recomputed(name: str) -> str:
    """A recomputation of a weight that has been updated."""
    return (
        f"{name} is recomputed by activation checkpointing after schedule='immediate' has updated "
        "it in this step: it is used in several checkpointed segments. Use schedule='deferred', "
        "and restore the weights, for this step is spoilt."
    )


def second_backward(name: str) -> str:
    """A second backward before the step."""
    return (
        f"{name}: a second backward before optimizer.step(), but schedule='immediate' has already "
        "made this step's update. Call optimizer.step() after every backward, or use "
        "schedule='deferred' (or 'auto' with micro_batches=N) to sum several."
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory; on a CPU it has no class of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def no_memory(name: str, needed: int, device: torch.device) -> str:
    """No memory for a weight's states of ``needed`` bytes."""
    return (
        f"{name}: no memory on {device} for the {needed / 2**20:.1f} MiB that its optimizer states "
        "take beside the weight. The model has not changed. Use state_format='q8' or 'bf16', "
        "weight_format='bf16' (no master), or exclude layers."
    )
