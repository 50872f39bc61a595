"""Torch tensors as the C ABI's buffers, checked before a pointer leaves Python."""

from __future__ import annotations

from typing import Any

import torch

from ._lib import ffi, lib

# The 16 low bits of a `bf16+16` weight travel as int16: torch has few operations for uint16, and
# only the bits matter.
TORCH_DTYPE: dict[int, torch.dtype] = {
    lib.FORGE_DTYPE_F32: torch.float32,
    lib.FORGE_DTYPE_BF16: torch.bfloat16,
    lib.FORGE_DTYPE_F16: torch.float16,
    lib.FORGE_DTYPE_U8: torch.uint8,
    lib.FORGE_DTYPE_U16: torch.int16,
}
FORGE_DTYPE: dict[torch.dtype, int] = {torch_: forge for forge, torch_ in TORCH_DTYPE.items()}


def require_device(tensor: torch.Tensor, device: torch.device, what: str) -> None:
    """Refuse a tensor that the backend cannot read.

    Raises:
        ValueError: the tensor lives elsewhere.
    """
    if tensor.device != device:
        raise ValueError(
            f"{what} is on {tensor.device}, but the layer was made for {device}. Bring both to one "
            f"device: tensor.to({str(device)!r}), or move the model before fuse()."
        )


def fill_buffer(buffer: Any, tensor: torch.Tensor | None, device: torch.device, what: str) -> None:
    """Point a ``forge_buffer`` or ``forge_const_buffer`` at a contiguous tensor (None: NULL).

    The caller keeps the tensor alive for the duration of the call.

    Raises:
        ValueError: the tensor is not contiguous or not on the device.
    """
    if tensor is None:
        buffer.data, buffer.bytes = ffi.NULL, 0
        return
    require_device(tensor, device, what)
    if not tensor.is_contiguous():
        raise ValueError(
            f"{what} must be contiguous, has strides {tensor.stride()}; pass tensor.contiguous()"
        )
    buffer.data = ffi.cast("void *", tensor.data_ptr())
    buffer.bytes = tensor.nbytes


def fill_matrix(buffer: Any, matrix: torch.Tensor) -> int:
    """Point a buffer at a factor made by :func:`as_factor`.

    Returns:
        The elements between two rows; 0: contiguous.
    """
    buffer.data = ffi.cast("void *", matrix.data_ptr())
    if matrix.is_contiguous():
        buffer.bytes = matrix.nbytes
        return 0
    rows, cols = matrix.shape
    stride = matrix.stride(0)
    buffer.bytes = ((rows - 1) * stride + cols) * matrix.element_size()
    return int(stride)


def as_factor(
    tensor: torch.Tensor, cols: int, dtype: torch.dtype, device: torch.device, what: str
) -> torch.Tensor:
    """View a tensor ``[..., cols]`` as a factor ``[tokens, cols]`` that the library can read.

    Rows may be apart (a slice of columns); the elements of a row may not, such tensors are copied.

    Raises:
        ValueError: last dimension, dtype or device do not fit.
    """
    if tensor.dtype == dtype and tensor.device == device and tensor.is_contiguous():
        # As most are.
        shape = tensor.shape
        if shape and shape[-1] == cols:
            return tensor if len(shape) == 2 else tensor.view(-1, cols)
    require_device(tensor, device, what)
    if tensor.dim() == 0 or tensor.shape[-1] != cols:
        raise ValueError(
            f"{what} has shape {tuple(tensor.shape)}, its last dimension must be {cols}"
        )
    if tensor.dtype != dtype:
        raise ValueError(
            f"{what} is {tensor.dtype}, but the layer was fused with {dtype} factors. "
            f"Cast the input to {dtype}, or call fuse() after converting the model."
        )
    matrix = tensor.reshape(-1, cols)
    rows = matrix.shape[0]
    if (cols > 1 and matrix.stride(1) != 1) or (rows > 1 and matrix.stride(0) < cols):
        matrix = matrix.contiguous()
    return matrix
