"""C structs from Python objects and back; they hold bare pointers, so callers keep both alive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._lib import ffi, lib, new_struct
from ._tensors import TORCH_DTYPE, fill_buffer, fill_matrix
from ._types import ArrayLayout, Layout, Report, Scalars, Segment, Storage


def parameter_struct(storage: Storage, name: str) -> Any:
    """A ``forge_parameter`` over the tensors of a shard."""
    parameter = new_struct("forge_parameter")
    fill_buffer(parameter.weight, storage.weight, f"{name}: weight")
    fill_buffer(parameter.weight_extra, storage.weight_extra, f"{name}: weight_extra")
    for index, (state, scale) in enumerate(zip(storage.states, storage.scales, strict=True)):
        fill_buffer(parameter.states[index], state, f"{name}: state {index}")
        fill_buffer(parameter.scales[index], scale, f"{name}: scale {index}")
    return parameter


def step_struct(scalars: Scalars) -> Any:
    """A ``forge_step`` that carries its scalars by value."""
    step = new_struct("forge_step")
    step.scalars.step, step.scalars.seed = scalars.step, scalars.seed
    step.scalars.grad_scale = scalars.grad_scale
    for index, value in enumerate(scalars.hyper):
        step.scalars.hyper[index] = value
    return step


def segment_array(segments: Sequence[Segment]) -> Any:
    """A ``forge_segment[]``; never empty, so that its address is valid."""
    array = ffi.new("forge_segment[]", max(len(segments), 1))
    for index, segment in enumerate(segments):
        array[index].tokens = segment.dy.shape[0]
        array[index].dy_stride = fill_matrix(array[index].dy, segment.dy)
        array[index].x_stride = fill_matrix(array[index].x, segment.x)
    return array


def report_of(report: Any) -> Report:
    """A ``forge_report``."""
    return Report(report.tiles, report.nonfinite_tiles, report.sum_of_squares)


def _array(layout: Any) -> ArrayLayout | None:
    """A ``forge_array_layout``; None where there is nothing to allocate."""
    if layout.bytes == 0 or layout.dtype == lib.FORGE_DTYPE_NONE:
        return None
    return ArrayLayout(layout.rows, layout.cols, TORCH_DTYPE[layout.dtype], layout.bytes)


def layout_of(layout: Any) -> Layout:
    """A ``forge_layout``.

    Raises:
        RuntimeError: it lacks the weight or a state.
    """
    weight = _array(layout.weight)
    states = tuple(_array(layout.states[index]) for index in range(layout.n_states))
    if weight is None or None in states:
        raise RuntimeError("the library reports an empty weight or state")
    return Layout(
        out_local=layout.out_local,
        in_local=layout.in_local,
        row_offset=layout.row_offset,
        col_offset=layout.col_offset,
        weight=weight,
        weight_extra=_array(layout.weight_extra),
        states=tuple(state for state in states if state is not None),
        scales=tuple(_array(layout.scales[index]) for index in range(layout.n_states)),
    )
