"""Messages of the errors by which ``immediate`` refuses to update a weight twice in one step."""

from __future__ import annotations


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
