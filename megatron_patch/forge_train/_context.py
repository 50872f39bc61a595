"""A backend with its threads."""

from __future__ import annotations

from functools import lru_cache

import torch

from ._lib import check, ffi, lib, new_struct


class Context:
    """Owns a ``forge_context`` of the CPU backend.

    Args:
        threads: worker threads; None takes ``torch.get_num_threads()``, so that FORGE and torch
            share the machine the same way.

    Raises:
        ForgeBackendError: the threads cannot be started.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Start the threads."""
        self.threads = torch.get_num_threads() if threads is None else threads
        config = new_struct("forge_context_config")
        config.backend = lib.FORGE_BACKEND_CPU
        config.threads = self.threads
        out = ffi.new("forge_context **")
        check(lib.forge_context_new(config, out), "context")
        self.handle = ffi.gc(out[0], lib.forge_context_free)


@lru_cache(maxsize=1)
def default_context() -> Context:
    """The process' own context, made on first use and shared by every linear."""
    return Context()
