"""What each optimizer holds: bytes of a parameter, and when its gradient is there.

A method answers the simulation's questions; :mod:`.stock` has the optimizers of others and
:mod:`.fused` has FORGE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .memory import Block, Memory

WEIGHTS, EXTRA, STATES = "weights", "master or extra bits", "optimizer states"
GRADIENTS, FACTORS, ACCUMULATORS = "gradients", "kept factors", "accumulators"
WORKSPACES, TEMPORARY = "workspaces", "temporary"

CATEGORIES = (
    WEIGHTS, EXTRA, STATES, GRADIENTS, FACTORS, ACCUMULATORS, "activations", "logits and loss",
    WORKSPACES, TEMPORARY,
)  # fmt: skip

CUBLAS_BYTES = 2 * (32 << 20)
"""torch lends cuBLAS 32 MiB on Hopper, for the forward's thread and for the backward's."""


@dataclass(frozen=True)
class Parameter:
    """One weight of this rank: its name, elements and bytes."""

    name: str
    elements: int
    bytes: int


class Method:
    """One way to hold and update weights; this one keeps a gradient for each until the step.

    Args:
        key: names it on a command line and in JSON.
        title: names it in a table.
        parameters: of this rank.
        clip: whether the step clips the global norm.
        micro_batches: backwards per step.

    Attributes:
        refused: why it cannot do what was asked; empty if it can.
        distinct_micro_batches: after how many the memory of further ones is the same again.
        weight_format, state_format, schedule: where there are several; else empty.
    """

    distinct_micro_batches = 3
    weight_format = state_format = schedule = ""

    def __init__(
        self, key: str, title: str, parameters: Sequence[Parameter], clip: bool, micro_batches: int
    ) -> None:
        self.key, self.title, self.parameters = key, title, parameters
        self.clip, self.micro_batches = clip, micro_batches
        self.refused = ""
        self.gradients: dict[str, Block] = {}

    @property
    def weight_bytes(self) -> int:
        """Of all parameters."""
        return sum(parameter.bytes for parameter in self.parameters)

    def persistent(self) -> dict[str, int]:
        """Bytes that are there all the time, by category."""
        return {WEIGHTS: self.weight_bytes, WORKSPACES: CUBLAS_BYTES}

    def fuses(self, name: str) -> bool:
        """Whether a weight has no gradient, because FORGE updates it."""
        return False

    def weight_gradient(
        self, memory: Memory, name: str, size: int, dy: Block, x: Block | None
    ) -> Block | None:
        """A backward has dY and, of a linear, X: the gradient that it makes; None: none."""
        return memory.allocate(size, GRADIENTS)

    def accumulate(self, memory: Memory, name: str, gradient: Block) -> None:
        """Take the gradient of a whole backward."""
        if name in self.gradients:
            memory.release(gradient)
        else:
            self.gradients[name] = gradient

    def end_of_backward(self, memory: Memory) -> None:
        """A micro-batch has ended."""

    def step(self, memory: Memory) -> None:
        """Update."""
