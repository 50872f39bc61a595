"""The optimizers that FORGE is compared with: torch's, FlashOptim's, Megatron's."""

from __future__ import annotations

from collections.abc import Sequence

from .memory import Block, Memory
from .methods import (
    EXTRA,
    GRADIENTS,
    STATES,
    TEMPORARY,
    WEIGHTS,
    Method,
    Parameter,
)
from .options import Options

_FP32 = 4
_FLASHOPTIM_GROUP = 32
"""Elements of an 8-bit state of FlashOptim that share one fp16 scale."""


class AdamW(Method):
    """``torch.optim.AdamW``: both moments in the parameter's dtype.

    Args:
        how: ``loop`` (``foreach=False``), ``foreach`` (torch's default on a GPU) or ``fused``.
        parameters: as for :class:`Method`.
        options: of the run.
    """

    def __init__(self, how: str, parameters: Sequence[Parameter], options: Options) -> None:
        title = {"loop": "for-loop AdamW", "foreach": "for-each AdamW", "fused": "fused AdamW"}
        super().__init__(
            f"adamw-{how}", title[how], parameters, options.clip, options.micro_batches
        )
        self.how = how

    def persistent(self) -> dict[str, int]:
        """Weights and two moments."""
        return {**super().persistent(), STATES: 2 * self.weight_bytes}

    def step(self, memory: Memory) -> None:
        """The denominator is a tensor: of all parameters at once, or of one, twice."""
        sizes = [parameter.bytes for parameter in self.parameters]
        if self.how == "foreach":
            memory.scratch(sum(sizes), TEMPORARY)
        elif self.how == "loop":
            memory.scratch(2 * max(sizes), TEMPORARY)


class Release(Method):
    """Updates a weight inside the backward and frees its gradient there."""

    def __init__(
        self, key: str, title: str, parameters: Sequence[Parameter], options: Options
    ) -> None:
        super().__init__(key, title, parameters, options.clip, options.micro_batches)
        if options.clip:
            self.refused = "weights are updated before the global norm is known"
        elif options.micro_batches > 1:
            self.refused = "weights are updated at every backward"

    def persistent(self) -> dict[str, int]:
        """Weights and two moments, as torch's AdamW."""
        return {**super().persistent(), STATES: 2 * self.weight_bytes}

    def accumulate(self, memory: Memory, name: str, gradient: Block) -> None:
        """The update, after which the gradient is gone."""
        memory.release(gradient)


class FlashOptim(Release):
    """FlashOptim's AdamW: 8-bit moments, and by default 8 more bits for each 16-bit weight.

    Args:
        bits: of its master weights: 16, which is none, 24 or 32.
        release: whether gradients are released inside the backward.
        parameters: as for :class:`Method`.
        options: of the run.
    """

    def __init__(
        self, bits: int, release: bool, parameters: Sequence[Parameter], options: Options
    ) -> None:
        key = "flashoptim-release" if release else "flashoptim"
        title = f"FlashOptim {bits} bits{', release' if release else ''}"
        super().__init__(key, title, parameters, options)
        self.release, self.more = release, bits // 8 - options.element
        extra = {0: "", 1: "+8", 2: "+16"}.get(self.more, "")
        self.weight_format, self.state_format = f"{options.dtype}{extra}", "q8"
        if not release:
            self.refused = ""

    def persistent(self) -> dict[str, int]:
        """Codes and scales of two moments; the bits below a 16-bit weight."""
        states = extra = 0
        for parameter in self.parameters:
            groups = -(-parameter.elements // _FLASHOPTIM_GROUP)
            states += 2 * (parameter.elements + 2 * groups)
            extra += max(self.more, 0) * parameter.elements
        return {**super().persistent(), EXTRA: extra, STATES: states}

    def accumulate(self, memory: Memory, name: str, gradient: Block) -> None:
        """At once, or with the step."""
        if self.release:
            super().accumulate(memory, name, gradient)
        else:
            Method.accumulate(self, memory, name, gradient)


class Megatron(Method):
    """Megatron-core's mixed precision: fp32 main gradients, fp32 master and moments.

    Args:
        distributed: whether the distributed optimizer shares master and moments out over the
            data-parallel ranks.
        parameters: as for :class:`Method`.
        options: of the run.
    """

    def __init__(
        self, distributed: bool, parameters: Sequence[Parameter], options: Options
    ) -> None:
        key = "megatron-distributed" if distributed else "megatron"
        title = f"Megatron, distributed, dp={options.dp}" if distributed else "Megatron"
        super().__init__(key, title, parameters, options.clip, options.micro_batches)
        self.ranks = options.dp if distributed else 1

    def persistent(self) -> dict[str, int]:
        """18 bytes of a 16-bit parameter, 16 of an fp32 one, which is its own master."""
        elements = sum(parameter.elements for parameter in self.parameters)
        narrow = self.weight_bytes < _FP32 * elements
        fixed = super().persistent()
        return {
            **fixed,
            WEIGHTS: self.weight_bytes,
            EXTRA: _FP32 * elements // self.ranks if narrow else 0,
            STATES: 2 * _FP32 * elements // self.ranks,
            GRADIENTS: _FP32 * elements,
        }

    def weight_gradient(
        self, memory: Memory, name: str, size: int, dy: Block, x: Block | None
    ) -> Block | None:
        """A linear adds to the buffer inside its product; autograd hands on the others."""
        return None if x is not None else memory.allocate(size, TEMPORARY)

    def accumulate(self, memory: Memory, name: str, gradient: Block) -> None:
        """Added to the buffer, and freed."""
        memory.release(gradient)


def stock_methods(
    parameters: Sequence[Parameter], options: Options, all_formats: bool = False
) -> list[Method]:
    """All of them, in the order of a report; ``all_formats``: of FlashOptim as well."""
    bits = (16, 24, 32) if all_formats and options.dtype == "bf16" else (24,)
    if options.dtype == "fp32":
        bits = (32,)
    return [
        AdamW("loop", parameters, options),
        AdamW("foreach", parameters, options),
        AdamW("fused", parameters, options),
        Release("hooks-fused", "fused AdamW in hooks", parameters, options),
        *(
            FlashOptim(each, release, parameters, options)
            for release in (False, True)
            for each in bits
        ),
        Megatron(False, parameters, options),
        Megatron(True, parameters, options),
    ]
