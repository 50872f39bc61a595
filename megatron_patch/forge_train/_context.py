"""A backend: the CPU with its threads, or one GPU."""

from __future__ import annotations

import contextlib
from functools import cache
from os import PathLike, fspath
from typing import Any

import torch

from . import _cuda_libraries
from ._lib import ForgeBackendError, check, ffi, lib, new_struct

_NO_GUARD = contextlib.nullcontext()


def canonical(device: torch.device | str | int) -> torch.device:
    """A device with its index, by which devices compare.

    Raises:
        ValueError: neither a CPU nor an NVIDIA GPU.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"FORGE computes on CPUs and NVIDIA GPUs, not on {device}")
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return torch.device("cuda", index)


class Context:
    """Owns a ``forge_context``.

    Args:
        threads: worker threads of the CPU backend; None takes ``torch.get_num_threads()``, so that
            FORGE and torch share the machine the same way.
        device: where the tensors are: the CPU, or one GPU.
        cache_dir: of the compiled GPU kernels; None: ``$FORGE_CACHE_DIR``, else
            ``$XDG_CACHE_HOME/forge``, else ``~/.cache/forge``.

    Attributes:
        device: with its index.
        asynchronous: whether results are left in the device's memory, so that the host need not
            wait.
        workspace: a ``torch.uint8`` tensor that the backend uses as scratch for as long as this
            object lives; None on the CPU.

    Raises:
        ForgeBackendError: the threads cannot be started; no GPU, driver or NVRTC; a GPU too old.
        ValueError: a device that is neither a CPU nor an NVIDIA GPU.
    """

    def __init__(
        self,
        threads: int | None = None,
        *,
        device: torch.device | str = "cpu",
        cache_dir: str | PathLike[str] | None = None,
    ) -> None:
        """Start the threads, or take the GPU and allocate the workspace."""
        self.device = canonical(device)
        self.asynchronous = self.device.type == "cuda"
        self.threads = torch.get_num_threads() if threads is None else threads
        self.workspace: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        # Of `_stream`: its handle, as torch and as C name it.
        self._raw_stream, self._handle_of_stream = -1, ffi.NULL
        config = new_struct("forge_context_config")
        if self.asynchronous:
            count = torch.cuda.device_count()
            if self.device.index >= count:
                raise ForgeBackendError(f"context: no {self.device}; torch sees {count} GPU(s)")
            _cuda_libraries.load()
            torch.empty(1, device=self.device)  # makes the primary context, which FORGE shares
            config.backend, config.device = lib.FORGE_BACKEND_CUDA, self.device.index
            folder = ffi.new("char[]", fspath(cache_dir).encode()) if cache_dir else ffi.NULL
            config.cache_dir = folder
        else:
            config.backend, config.threads = lib.FORGE_BACKEND_CPU, self.threads
        out = ffi.new("forge_context **")
        with self.current():
            check(lib.forge_context_new(config, out), "context")
            self.handle = ffi.gc(out[0], lib.forge_context_free)
            if self.asynchronous:
                self._lend_workspace()

    def _lend_workspace(self) -> None:
        size, buffer = ffi.new("uint64_t *"), ffi.new("forge_buffer *")
        check(lib.forge_context_workspace_bytes(self.handle, size), "context")
        if not size[0]:
            return
        self.workspace = torch.empty(size[0], dtype=torch.uint8, device=self.device)
        buffer.data, buffer.bytes = ffi.cast("void *", self.workspace.data_ptr()), size[0]
        # The allocator may give out memory that the stream has yet to be done with.
        torch.cuda.current_stream(self.device).synchronize()
        check(lib.forge_context_set_workspace(self.handle, buffer[0]), "context")
        self._follow(torch.cuda.current_stream(self.device))

    def _follow(self, stream: torch.cuda.Stream) -> None:
        """Note the stream of the last call."""
        self._stream, self._raw_stream = stream, stream.cuda_stream
        self._handle_of_stream = ffi.cast("void *", self._raw_stream)

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the device torch's current one, and the one before it current again at the end."""
        if self.device.type == "cpu" or torch.cuda.current_device() == self.device.index:
            return _NO_GUARD
        return torch.cuda.device(self.device)

    def stream(self) -> Any:
        """The ``stream`` argument of a call: torch's current stream; NULL on the CPU.

        The workspace serves one stream at a time, so a stream that is not the last call's waits for
        that one. While a graph is captured it does not: the capture began with a synchronisation,
        and whoever replays the graph orders it.
        """
        if self.device.type == "cpu":
            return ffi.NULL
        if torch._C._cuda_getCurrentRawStream(self.device.index) == self._raw_stream:
            return self._handle_of_stream
        stream = torch.cuda.current_stream(self.device)
        if torch.cuda.is_current_stream_capturing():
            return ffi.cast("void *", stream.cuda_stream)
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._follow(stream)
        return self._handle_of_stream

    def hold(self, *tensors: torch.Tensor) -> None:
        """Keep memory from reuse until the current stream has read it, whoever lets go of it."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            for tensor in tensors:
                tensor.record_stream(stream)


@cache
def _shared(device: torch.device) -> Context:
    return Context(device=device)


def default_context(device: torch.device | str = "cpu") -> Context:
    """The process' own context of a device, made on first use and shared by every linear.

    Raises:
        ForgeBackendError: see :class:`Context`.
        ValueError: a device that is neither a CPU nor an NVIDIA GPU.
    """
    return _shared(canonical(device))
