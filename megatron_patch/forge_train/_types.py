"""The C ABI's names and structs as Python sees them: formats, layouts, factors, reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ._lib import lib
from .rules import Rule

WEIGHT_FORMATS = {
    "fp32": lib.FORGE_WEIGHT_F32,
    "bf16": lib.FORGE_WEIGHT_BF16,
    "bf16+fp32": lib.FORGE_WEIGHT_BF16_F32,
    "bf16+16": lib.FORGE_WEIGHT_BF16_16,
}
STATE_FORMATS = {
    "fp32": lib.FORGE_STATE_F32,
    "bf16": lib.FORGE_STATE_BF16,
    "q8": lib.FORGE_STATE_Q8,
}
ROUNDINGS = {
    "nearest": lib.FORGE_ROUNDING_NEAREST,
    "stochastic": lib.FORGE_ROUNDING_STOCHASTIC,
}
FP32_PRODUCTS = {
    "exact": lib.FORGE_FP32_EXACT,
    "bf16x3": lib.FORGE_FP32_BF16X3,
}
PARALLEL = {
    "none": lib.FORGE_PARALLEL_NONE,
    "column": lib.FORGE_PARALLEL_COLUMN,
    "row": lib.FORGE_PARALLEL_ROW,
}
SCHEDULES = {
    "auto": lib.FORGE_SCHEDULE_AUTO,
    "immediate": lib.FORGE_SCHEDULE_IMMEDIATE,
    "deferred": lib.FORGE_SCHEDULE_DEFERRED,
    "accumulate": lib.FORGE_SCHEDULE_ACCUMULATE,
}
REDUCTIONS = {
    "auto": lib.FORGE_REDUCTION_AUTO,
    "exchange": lib.FORGE_REDUCTION_EXCHANGE,
    "panels": lib.FORGE_REDUCTION_PANELS,
}
NORM_METHODS = {
    "auto": lib.FORGE_NORM_AUTO,
    "gram": lib.FORGE_NORM_GRAM,
    "tiles": lib.FORGE_NORM_TILES,
}


def choice(table: dict[str, int], argument: str, value: str) -> int:
    """The ABI's number for a name.

    Raises:
        ValueError: the name is not in the table; the message lists what is.
    """
    if value not in table:
        raise ValueError(f"{argument}={value!r} is not known; choose one of {', '.join(table)}")
    return table[value]


@dataclass(frozen=True)
class LinearSpec:
    """What a linear is; every name as the C ABI's ``forge_linear_config`` has it.

    Attributes:
        out_features: global rows of W.
        in_features: global columns of W.
        rule: the optimizer rule; its options give flags and first values.
        factor_dtype: dtype of X, dY and dX.
        weight_format: one of :data:`WEIGHT_FORMATS`.
        state_formats: one of :data:`STATE_FORMATS`, or one for each state.
        fp32_products: how a GPU multiplies fp32 factors for dW: ``exact`` or ``bf16x3``.
        parallel: which dimension of W is split over the communicator.
        sequence_parallel: column gathers X, row gathers dY in the backward.
        reduce_dgrad: column without sequence parallelism all-reduces dX.
        parameter_id: key of the rounding noise; the same in every run and on every rank.
    """

    out_features: int
    in_features: int
    rule: Rule
    factor_dtype: torch.dtype = torch.float32
    weight_format: str = "fp32"
    state_formats: str | Sequence[str] = "fp32"
    weight_rounding: str = "stochastic"
    state_rounding: str = "stochastic"
    fp32_products: str = "exact"
    parallel: str = "none"
    sequence_parallel: bool = False
    reduce_dgrad: bool = False
    parameter_id: int = 0

    def formats_of(self, n_states: int) -> list[str]:
        """The format of each of ``n_states`` states.

        Raises:
            ValueError: a tuple was given that is too short.
        """
        if isinstance(self.state_formats, str):
            return [self.state_formats] * n_states
        if len(self.state_formats) < n_states:
            raise ValueError(
                f"state_format={tuple(self.state_formats)!r} names {len(self.state_formats)} "
                f"formats, rule {self.rule.name!r} has {n_states} states; name one for each, or "
                "one for all"
            )
        return list(self.state_formats[:n_states])


@dataclass(frozen=True)
class ArrayLayout:
    """An array that the library wants allocated: shape, dtype, bytes."""

    rows: int
    cols: int
    dtype: torch.dtype
    bytes: int

    def zeros(self, device: torch.device) -> torch.Tensor:
        """Allocate it; zeroed arrays are what the library takes as a fresh state."""
        return torch.zeros(self.rows, self.cols, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Layout:
    """What belongs to this rank's shard ``[out_local, in_local]``.

    Of ``out_owned`` of its rows, from ``owned_offset`` on, this rank has states and makes updates:
    all of them, but for data parallelism.
    """

    out_local: int
    in_local: int
    row_offset: int
    col_offset: int
    out_owned: int
    owned_offset: int
    weight: ArrayLayout
    weight_extra: ArrayLayout | None
    states: tuple[ArrayLayout, ...]
    scales: tuple[ArrayLayout | None, ...]


@dataclass
class Storage:
    """The tensors of one shard. The library writes them in place; torch owns them."""

    weight: torch.Tensor
    weight_extra: torch.Tensor | None
    states: list[torch.Tensor]
    scales: list[torch.Tensor | None]

    @property
    def bytes(self) -> int:
        """Bytes of weight and states together."""
        tensors = [self.weight, self.weight_extra, *self.states, *self.scales]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True)
class Segment:
    """The factors of one micro-batch: dY ``[tokens, out_owned]`` and X ``[tokens, in_local]``."""

    dy: torch.Tensor
    x: torch.Tensor
    # Autograd and its users may write into a tensor that was handed on; the version tells.
    versions: tuple[int, int] = field(default=(0, 0))

    @classmethod
    def of(cls, dy: torch.Tensor, x: torch.Tensor) -> Segment:
        """Remember the factors and their versions."""
        return cls(dy, x, (dy._version, x._version))

    @property
    def bytes(self) -> int:
        """Bytes held by the two factors."""
        return self.dy.nbytes + self.x.nbytes

    @property
    def overwritten(self) -> bool:
        """Whether somebody wrote into a factor in place since :meth:`of`."""
        return (self.dy._version, self.x._version) != self.versions


@dataclass(frozen=True)
class Scalars:
    """One step's numbers. ``step`` counts from 1; ``hyper`` is in the library's order."""

    step: int
    seed: int
    grad_scale: float
    hyper: Sequence[float]


@dataclass(frozen=True)
class Report:
    """What an update saw: tiles, tiles left alone for inf or nan, and the sum of squares of dW."""

    tiles: int
    nonfinite_tiles: int
    sum_of_squares: float


@dataclass(frozen=True)
class Norm:
    """``Σ dW²`` of this shard, unscaled; ``method`` is ``gram`` or ``tiles``."""

    sum_of_squares: float
    nonfinite: bool
    method: str


@dataclass(frozen=True)
class Plan:
    """The schedule chosen for a layer and the bytes it was chosen by.

    ``reduction`` is how dW is summed over data-parallel ranks, and ``wire_bytes`` what a rank
    receives for that in a step.
    """

    schedule: str
    factor_bytes: int
    accumulator_bytes: int
    gradient_bytes: int
    reason: str
    reduction: str | None = None
    wire_bytes: int = 0


class BackwardResult(NamedTuple):
    """dX, dbias where asked for; the kept factors in ``keep`` mode; the report in ``update``."""

    dx: torch.Tensor | None
    dbias: torch.Tensor | None
    segment: Segment | None
    report: Report | None
