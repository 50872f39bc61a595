"""Run unmodified megatron-core on a machine without a GPU.

megatron-core asks ``torch.cuda`` for the current device, for random-number states, for streams and
for ``device="cuda"`` tensors in a few dozen places, even with ``use_cpu_initialization``. None of
those places needs a GPU. :func:`enable` answers them with the CPU:

* factory calls and ``Tensor.to`` with ``device="cuda"`` use the CPU (a ``TorchFunctionMode``),
* ``Tensor.type()`` says ``torch.cuda.…``, since Megatron's optimizer compares those strings,
* the CUDA random-number state *is* the CPU generator's state,
* streams, events, ``synchronize`` and the memory counters do nothing.

Where a GPU is present :func:`enable` changes nothing. The mode is per thread (torch keeps its modes
per thread), the patched functions are per process.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _Gpu:
    """What Megatron asks of a GPU's properties."""

    major, minor = 8, 0
    name = "CPU"
    total_memory = 1 << 40
    multi_processor_count = 1


def _on_cpu(device: Any) -> Any:
    """Translate a CUDA device, in any spelling that torch accepts, to the CPU."""
    if isinstance(device, str) and device.startswith("cuda"):
        return _CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    return device


class _CudaIsCpu(TorchFunctionMode):
    """Rewrites the device of every torch call made under it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(arg) for arg in args)
        elif func is torch.Tensor.cuda:
            return args[0]
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Inert:
    """Stands in for a CUDA stream or event: everything is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def record_event(self, *args: Any) -> _Inert:
        """An event of this stream."""
        return _Inert()

    def query(self) -> bool:
        """Everything submitted to this stream has finished."""
        return True


def _seen_by_megatron(original: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    """A function that gives Megatron's own code another answer than everybody else."""

    def ask(*args: Any, **kwargs: Any) -> Any:
        # Above this are the caller's frame and that of `_distinct`.
        caller = sys._getframe(2).f_globals.get("__name__", "")
        return answer if caller.startswith("megatron.") else original(*args, **kwargs)

    return ask


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
    return torch.get_rng_state()


def _set_rng_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed, which seeds CUDA through the very functions that this one replaces.
    torch.default_generator.manual_seed(int(seed))


def _replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) of everything that is redirected."""
    # Imported here: its own import of torch.cuda names must not depend on who came first.
    from megatron.core.tensor_parallel import random as megatron_random

    cuda = torch.cuda
    table: list[tuple[Any, str, Any]] = [
        # megatron.training asserts that there is a GPU.
        (cuda, "is_available", _seen_by_megatron(cuda.is_available, True)),
        (cuda, "device_count", _seen_by_megatron(cuda.device_count, 1)),
        (cuda, "get_device_properties", _seen_by_megatron(cuda.get_device_properties, _Gpu())),
        (cuda, "get_device_capability", _seen_by_megatron(cuda.get_device_capability, (8, 0))),
        (cuda, "current_device", lambda: _CPU),
        (cuda, "set_device", _nothing),
        (cuda, "get_rng_state", _get_rng_state),
        (cuda, "set_rng_state", _set_rng_state),
        (cuda.random, "get_rng_state", _get_rng_state),
        (cuda.random, "set_rng_state", _set_rng_state),
        (cuda, "manual_seed", _manual_seed),
        (cuda, "manual_seed_all", _manual_seed),
        # These two go through torch.cuda's lazy initialisation, which would queue them for ever.
        (megatron_random, "_get_cuda_rng_state", _get_rng_state),
        (megatron_random, "_set_cuda_rng_state", _set_rng_state),
        (cuda, "Stream", _Inert),
        (cuda, "Event", _Inert),
        (cuda, "stream", _Inert),
        (cuda, "current_stream", _Inert),
        (cuda, "default_stream", _Inert),
        (cuda, "set_stream", _nothing),
        (torch.nn.Module, "cuda", lambda module, device=None: module),
    ]
    table += [(cuda, name, _nothing) for name in ("synchronize", "empty_cache", "ipc_collect")]
    table += [
        (cuda, name, _zero)
        for name in (
            "memory_allocated",
            "max_memory_allocated",
            "memory_reserved",
            "max_memory_reserved",
            "reset_peak_memory_stats",
        )
    ]
    table.append((cuda, "memory_stats", lambda device=None: collections.defaultdict(int)))
    # Each a function of its own: torch.compile has rules for torch's, by object and by name.
    return [
        (owner, name, new if isinstance(new, type) else _distinct(new))
        for owner, name, new in table
    ]


def _distinct(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as another object."""
    return lambda *args, **kwargs: function(*args, **kwargs)


class CpuRedirection(contextlib.AbstractContextManager["CpuRedirection"]):
    """What :func:`enable` put in place; :meth:`disable` takes it away again.

    Also a context manager: ``with enable(): ...``. Torch's modes form a stack, so disable it after
    any other mode that was entered later has been left.
    """

    def __init__(self, active: bool) -> None:
        self._originals: list[tuple[Any, str, Any]] = []
        self._mode: _CudaIsCpu | None = None
        if not active:
            return
        for owner, name, replacement in _replacements():
            self._originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, replacement)
        self._mode = _CudaIsCpu()
        self._mode.__enter__()

    @property
    def active(self) -> bool:
        """Whether CUDA calls are being redirected by this object."""
        return self._mode is not None

    def disable(self) -> None:
        """Restore everything. Safe to call more than once."""
        global _current
        if self._mode is None:
            return
        self._mode.__exit__(None, None, None)
        self._mode = None
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals.clear()
        if _current is self:
            _current = None

    def __exit__(self, *exc: Any) -> None:
        self.disable()


_current: CpuRedirection | None = None


def enable() -> CpuRedirection:
    """Redirect ``torch.cuda`` to the CPU for megatron-core, unless there is a GPU.

    Returns the redirection in force; a second call returns the same one. Call it once per process,
    in the thread that trains, before ``initialize_model_parallel``.
    """
    global _current
    if _current is None:
        redirection = CpuRedirection(active=not torch.cuda.is_available())
        if not redirection.active:
            return redirection
        _current = redirection
    return _current
