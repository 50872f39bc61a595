"""NVIDIA's libraries where the FORGE library's ``dlopen`` finds them.

torch's wheels bring NVRTC and cuBLASLt in directories that the loader does not search. A library
that is loaded already is found by its name from anywhere, so the ones beside torch are loaded
first; where there are none, the FORGE library searches the system by itself.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

# In this order: NVRTC opens its builtins by name at the first compilation.
_NAMES = ("libnvrtc-builtins.so", "libnvrtc.so", "libcublasLt.so")


def _directories() -> list[Path]:
    """Where the wheels of torch's own CUDA version put libraries."""
    spec = find_spec("nvidia")
    major = (torch.version.cuda or "").partition(".")[0]
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    # One directory for all (CUDA 13), or one for each library (CUDA 12). A torch without CUDA has
    # no version, and NVRTC beside it was installed by hand, to warm a cache: the newest.
    below = [f"cu{major}/lib"] if major else ["cu[1-9]*/lib"]
    below += ["cuda_nvrtc/lib", "cublas/lib"]
    return [found for root in roots for path in below for found in sorted(root.glob(path))[::-1]]


@cache
def load() -> tuple[str, ...]:
    """Load NVRTC and cuBLASLt of torch's wheels into the process.

    Returns:
        The files that were loaded; empty where the libraries are the system's.
    """
    loaded = []
    for name in _NAMES:
        found = [path for folder in _directories() for path in sorted(folder.glob(f"{name}.*"))]
        for path in found:
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue  # the next one; else the FORGE library searches, and says what it lacks
            loaded.append(str(path))
            break
    return tuple(loaded)
