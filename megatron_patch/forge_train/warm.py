"""GPU kernels compiled ahead of time: before a run, or on a machine that has no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from . import _cuda_libraries
from ._config import linear_config
from ._context import Context
from ._lib import check, ffi, lib, new_struct, text
from ._types import LinearSpec

_CALLBACK = "void(void *, const char *, const char *, uint32_t, double)"


@dataclass(frozen=True)
class Kernel:
    """One kernel that was made ready.

    Attributes:
        what: names it.
        path: its file in the cache directory.
        compiled: whether it had to be compiled.
        seconds: how long that took.
    """

    what: str
    path: Path
    compiled: bool
    seconds: float


@dataclass(frozen=True)
class Warmed:
    """What warming did. A run finds the kernels with the same version of NVRTC only."""

    compiled: int
    present: int
    nvrtc: tuple[int, int]


def warm(
    spec: LinearSpec,
    target: str | Context,
    *,
    cache_dir: str | PathLike[str] | None = None,
    sm_count: int = 0,
    ranks: int = 1,
    tokens: int = 0,
    micro_batches: int = 0,
    device_scalars: bool = True,
    threads: int = 0,
    progress: Callable[[Kernel], None] | None = None,
) -> Warmed:
    """Compile the kernels that a linear will need and keep them in the cache directory.

    What is there already is left. Several processes may fill one directory at once.

    Args:
        spec: the linear; ``out_features`` and ``in_features`` of 0: any shape.
        target: an architecture, such as ``sm_90a``, whose GPU need not be here, or a GPU's context.
        cache_dir: as for :class:`Context`; a context has its own.
        sm_count: multiprocessors of the GPU, which decide on tiles; 0: as most of the architecture.
        ranks: that share out W where ``spec.parallel`` says so.
        tokens: of a micro-batch; 0: any number.
        micro_batches: that one update sums; 0: any number.
        device_scalars: whether updates will read their numbers from the GPU's memory: those of
            steps that may be skipped or clipped, and captured ones.
        threads: that compile; 0: one for each core.
        progress: told of each kernel, maybe from another thread.

    Raises:
        ForgeBackendError: no NVRTC, or one that does not know the architecture; a directory that is
            refused or cannot be written.
        ForgeArgumentError: no such architecture, or a linear that cannot be.
        ValueError: an unknown format, rounding or dtype.
    """
    config, out = new_struct("forge_warm_config"), new_struct("forge_warm_report")
    linear, _rule = linear_config(spec, "warm")
    config.linear = linear
    config.sm_count, config.ranks, config.threads = sm_count, ranks, threads
    config.tokens, config.micro_batches = tokens, micro_batches
    config.device_scalars = device_scalars
    failure: list[BaseException] = []

    def told(_user: Any, what: Any, path: Any, compiled: int, seconds: float) -> None:
        # No exception may cross C.
        try:
            if progress is not None:
                progress(Kernel(text(what), Path(text(path)), bool(compiled), seconds))
        except BaseException as error:
            failure.append(error)

    callback = ffi.callback(_CALLBACK, told)
    config.progress = callback
    # The struct holds pointers only: these names keep their targets alive over the call.
    folder = ffi.new("char[]", fspath(cache_dir).encode()) if cache_dir else ffi.NULL
    config.cache_dir = folder
    if isinstance(target, Context):
        with target.current():
            status = lib.forge_context_warm(target.handle, config, out)
    else:
        architecture = ffi.new("char[]", target.encode())
        config.architecture = architecture
        _cuda_libraries.load()
        status = lib.forge_warm(config, out)
    if failure:
        raise failure[0]
    check(status)
    return Warmed(out.compiled, out.present, (out.nvrtc // 1000, out.nvrtc % 1000 // 10))
