"""C structs from Python objects and back; they hold bare pointers, so callers keep both alive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ._lib import ffi, lib, new_struct
from ._tensors import TORCH_DTYPE, fill_buffer, fill_matrix, require_device
from ._types import (
    NORM_METHODS,
    ArrayLayout,
    Layout,
    Norm,
    Report,
    Scalars,
    Segment,
    Storage,
)

T = TypeVar("T")
_NAME_OF_NORM = {number: name for name, number in NORM_METHODS.items()}


def parameter_struct(storage: Storage, device: torch.device, name: str) -> Any:
    """A ``forge_parameter`` over the tensors of a shard.

    Raises:
        ValueError: a tensor is not on the device or not contiguous.
    """
    parameter = new_struct("forge_parameter")
    fill_buffer(parameter.weight, storage.weight, device, f"{name}: weight")
    fill_buffer(parameter.weight_extra, storage.weight_extra, device, f"{name}: weight_extra")
    for index, (state, scale) in enumerate(zip(storage.states, storage.scales, strict=True)):
        fill_buffer(parameter.states[index], state, device, f"{name}: state {index}")
        fill_buffer(parameter.scales[index], scale, device, f"{name}: scale {index}")
    return parameter


# Weights whose numbers are the same are updated one after the other.
_last_step: tuple[Scalars | torch.Tensor | None, Any] = None, ffi.NULL


def step_struct(scalars: Scalars | torch.Tensor) -> Any:
    """A ``forge_step`` that carries its scalars by value, or points to :func:`scalars_bytes`."""
    global _last_step
    known, step = _last_step
    if scalars is not known:
        step = new_struct("forge_step")
        if isinstance(scalars, torch.Tensor):
            step.device_scalars = ffi.cast("forge_step_scalars *", scalars.data_ptr())
        else:
            _fill_scalars(step.scalars, scalars)
        _last_step = scalars, step
    return step


def scalars_bytes(scalars: Scalars) -> torch.Tensor:
    """A ``forge_step_scalars`` as a ``uint8`` tensor on the CPU, to be copied to a device."""
    struct = ffi.new("forge_step_scalars *")
    _fill_scalars(struct, scalars)
    return torch.frombuffer(bytearray(ffi.buffer(struct)), dtype=torch.uint8)


def _fill_scalars(struct: Any, scalars: Scalars) -> None:
    struct.step, struct.seed = scalars.step, scalars.seed
    struct.grad_scale = scalars.grad_scale
    for index, value in enumerate(scalars.hyper):
        struct.hyper[index] = value


def segment_array(segments: Sequence[Segment], device: torch.device, name: str) -> Any:
    """A ``forge_segment[]``; never empty, so that its address is valid.

    Raises:
        ValueError: a factor is not on the device.
    """
    array = ffi.new("forge_segment[]", max(len(segments), 1))
    for index, segment in enumerate(segments):
        require_device(segment.dy, device, f"{name}: dY")
        require_device(segment.x, device, f"{name}: X")
        array[index].tokens = segment.dy.shape[0]
        array[index].dy_stride = fill_matrix(array[index].dy, segment.dy)
        array[index].x_stride = fill_matrix(array[index].x, segment.x)
    return array


def report_of(report: Any) -> Report:
    """A ``forge_report``."""
    return Report(report.tiles, report.nonfinite_tiles, report.sum_of_squares)


def norm_of(norm: Any) -> Norm:
    """A ``forge_norm``."""
    return Norm(norm.sum_of_squares, bool(norm.nonfinite), _NAME_OF_NORM[norm.method])


class DeviceStructs:
    """An array of C structs in the backend's memory, for results that the host does not wait for.

    Args:
        name: the struct's C type.
        count: how many.
        device: of the backend.

    Attributes:
        rows: ``uint8 [count, sizeof(struct)]``; a row is where a call leaves its result.
    """

    def __init__(self, name: str, count: int, device: torch.device) -> None:
        """Allocate them, zeroed."""
        self.name = name
        self.rows = torch.zeros(count, ffi.sizeof(name), dtype=torch.uint8, device=device)

    @classmethod
    def of(cls, name: str, words: torch.Tensor) -> DeviceStructs:
        """One struct from its words, ``int64``."""
        structs = cls(name, 0, words.device)
        structs.rows = words.view(torch.uint8).view(1, -1)
        return structs

    def read(self, convert: Callable[[Any], T], rows: Sequence[int] | None = None) -> list[T]:
        """Wait for the current stream and convert structs, after one copy to the host.

        Args:
            convert: makes a struct something of Python's.
            rows: which; None: all.
        """
        host = self.rows.cpu()
        structs = ffi.cast(f"{self.name} *", host.data_ptr())
        return [convert(structs[row]) for row in (range(host.shape[0]) if rows is None else rows)]


def struct_at(row: torch.Tensor, name: str, device: torch.device, what: str) -> Any:
    """A pointer to the struct in a row of :class:`DeviceStructs`.

    Raises:
        ValueError: another size, or not on the device.
    """
    require_device(row, device, what)
    if row.nbytes != ffi.sizeof(name) or not row.is_contiguous():
        raise ValueError(f"{what} must be {ffi.sizeof(name)} contiguous bytes, a {name}")
    return ffi.cast(f"{name} *", row.data_ptr())


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
        out_owned=layout.out_owned,
        owned_offset=layout.owned_offset,
        weight=weight,
        weight_extra=_array(layout.weight_extra),
        states=tuple(state for state in states if state is not None),
        scales=tuple(_array(layout.scales[index]) for index in range(layout.n_states)),
    )
