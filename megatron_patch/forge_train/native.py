"""The C ABI as Python objects: everything that the schedules and the Megatron side build on."""

from ._comm import Comm, HostComm, NcclComm, comm_of
from ._context import Context, default_context
from ._lib import (
    ForgeArgumentError,
    ForgeBackendError,
    ForgeCommunicationError,
    ForgeError,
    ForgeInternalError,
    ForgeRuleError,
    version,
)
from ._linear import Linear, update_together
from ._types import (
    Layout,
    LinearSpec,
    Norm,
    Plan,
    Report,
    Scalars,
    Segment,
    Storage,
)

__all__ = [
    "Comm",
    "Context",
    "ForgeArgumentError",
    "ForgeBackendError",
    "ForgeCommunicationError",
    "ForgeError",
    "ForgeInternalError",
    "ForgeRuleError",
    "HostComm",
    "Layout",
    "Linear",
    "LinearSpec",
    "NcclComm",
    "Norm",
    "Plan",
    "Report",
    "Scalars",
    "Segment",
    "Storage",
    "comm_of",
    "default_context",
    "update_together",
    "version",
]
