"""Load the FORGE library and turn its statuses into Python exceptions.

The installed wheel carries ``forge_train._native`` (the shared library, and declarations that
maturin made from the generated C header). A working tree has no such module; there,
``FORGE_LIBRARY`` names a ``libforge.so`` and the declarations are read from ``include/forge.h``
itself (``FORGE_HEADER`` names another one), so that neither way can drift from the ABI.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ABI_VERSION = 1
"""The ``FORGE_ABI_VERSION`` this package is written against."""

_INTEGER_DEFINE = re.compile(r"#\s*define\s+\w+\s+\(?-?(0[xX][0-9a-fA-F]+|\d+)\)?\s*$")


class ForgeError(RuntimeError):
    """A call into FORGE failed; nothing was written.

    Attributes:
        status: the number of the C status.
        status_name: its name, such as ``FORGE_ERROR_SHARD``.
    """

    def __init__(self, message: str, status: int = 0, status_name: str = "") -> None:
        """Keep the status beside the message."""
        super().__init__(message)
        self.status = status
        self.status_name = status_name


class ForgeArgumentError(ForgeError, ValueError):
    """Statuses 1xx: the arguments of the call do not fit."""


class ForgeRuleError(ForgeError):
    """Statuses 2xx: a user's rule failed on the CPU; its own exception is the ``__cause__``.

    The tile it failed on is as it was; tiles before it are updated.
    """


class ForgeCommunicationError(ForgeError):
    """Statuses 3xx: a collective failed or the ranks disagree."""


class ForgeBackendError(ForgeError):
    """Statuses 4xx: the backend cannot be had on this machine."""


class ForgeInternalError(ForgeError):
    """Statuses 9xx: a defect of FORGE or no memory left."""


_BANDS: dict[int, type[ForgeError]] = {
    1: ForgeArgumentError,
    2: ForgeRuleError,
    3: ForgeCommunicationError,
    4: ForgeBackendError,
    9: ForgeInternalError,
}


def declarations(header: str) -> str:
    """Reduce C header text to what cffi parses: no preprocessor but integer ``#define``s.

    The header's conditions ask for C++ or C23; to a C99 compiler every ``#if`` of it is false
    and every ``#ifndef`` true, which needs no evaluation.
    """
    kept: list[str] = []
    active = [True]
    for line in header.splitlines():
        directive = line.strip().lstrip("#").split(maxsplit=1)[:1] if line[:1] == "#" else []
        if directive == ["endif"]:
            active.pop()
        elif directive == ["else"]:
            active[-1] = not active[-1]
        elif directive and directive[0] in ("if", "ifdef", "ifndef"):
            active.append(directive[0] == "ifndef")
        elif all(active) and (not directive or _INTEGER_DEFINE.match(line.strip())):
            kept.append(line)
    return "\n".join(kept)


def _find_header() -> Path:
    """The header beside this working tree, or the one that ``FORGE_HEADER`` names."""
    named = os.environ.get("FORGE_HEADER")
    path = Path(named) if named else Path(__file__).parents[2] / "include" / "forge.h"
    if not path.is_file():
        raise ImportError(
            f"FORGE_LIBRARY is set, but there is no header at {path}. "
            "Set FORGE_HEADER to the forge.h that belongs to the library."
        )
    return path


def _load() -> tuple[Any, Any]:
    """Return ``(ffi, lib)`` of ``FORGE_LIBRARY`` where it is set, else of the installed wheel."""
    library = os.environ.get("FORGE_LIBRARY")
    if library:
        import cffi

        loader = cffi.FFI()
        loader.cdef(declarations(_find_header().read_text(encoding="utf-8")))
        try:
            return loader, loader.dlopen(library)
        except OSError as error:
            raise ImportError(f"FORGE_LIBRARY={library} cannot be loaded: {error}") from error
    if find_spec(f"{__package__}._native") is None:
        raise ImportError(
            "forge_train has no native library. Install the wheel (pip install .), or build with "
            "`cargo build --release` and set FORGE_LIBRARY=target/release/libforge.so."
        )
    from . import _native  # type: ignore[attr-defined]

    return _native.ffi, _native.lib


ffi, lib = _load()

if lib.forge_abi_version() != ABI_VERSION:
    raise ImportError(
        f"forge_train needs ABI version {ABI_VERSION} of FORGE, the library at hand has "
        f"{lib.forge_abi_version()}. Install the library and the Python package of one version."
    )


def text(pointer: Any) -> str:
    """Decode a C string that FORGE owns; empty for NULL."""
    return ffi.string(pointer).decode("utf-8", "replace") if pointer != ffi.NULL else ""


rule_errors: list[BaseException] = []
"""What the CPU functions of users' rules raised in the call that is under way."""


def check(status: int, what: str = "") -> None:
    """Raise the exception of a status that is not ``FORGE_OK``.

    Args:
        status: what a ``forge_*`` function returned, on this same thread.
        what: the layer or object concerned; it leads the message.

    Raises:
        ForgeError: the subclass of the status' band, with ``forge_last_error()`` as its message.
    """
    if status == 0:
        return
    name = text(lib.forge_status_name(status))
    detail = text(lib.forge_last_error()) or "no detail was given"
    where = f"{what}: " if what else ""
    cause = rule_errors[0] if rule_errors else None
    rule_errors.clear()
    error = _BANDS.get(status // 100, ForgeError)
    raise error(f"{where}{detail} [{name}]", status, name) from cause


def new_struct(name: str) -> Any:
    """Allocate a zeroed C struct whose ``struct_size`` is filled in."""
    struct = ffi.new(f"{name} *")
    struct.struct_size = ffi.sizeof(name)
    return struct


def version() -> str:
    """The version of the loaded library."""
    return text(lib.forge_version())
