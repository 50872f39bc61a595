"""FORGE: train linear layers without ever holding a weight gradient.

::

    import forge_train

    fused = forge_train.fuse(model, forge_train.AdamW(lr=3e-4), max_norm=1.0)
    print(fused)                      # what was fused, what was not, and why
    optimizer = fused.optimizer       # a torch.optim.Optimizer

``forge_train.megatron`` does the same for Megatron-LM, and ``python -m forge_train.megatron`` for
its training scripts.
"""

from .capture import CapturedStep, capture
from .dense import DenseWeight
from .engine import Engine, StepResult
from .fuse import Fused, Row, fuse
from .linear_function import fused_linear
from .native import (
    Comm,
    Context,
    ForgeArgumentError,
    ForgeBackendError,
    ForgeCommunicationError,
    ForgeError,
    ForgeInternalError,
    ForgeRuleError,
    HostComm,
    Linear,
    LinearSpec,
    NcclComm,
    version,
)
from .optimizer import FusedOptimizer
from .rules import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    AdEMAMix,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    Rule,
    Signum,
)
from .user_rule import UserRule
from .warm import Kernel, Warmed, warm
from .weights import FusedWeight

__version__ = version()

__all__ = [
    "ASGD",
    "SGD",
    "AdEMAMix",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "CapturedStep",
    "Comm",
    "Context",
    "DenseWeight",
    "Engine",
    "ForgeArgumentError",
    "ForgeBackendError",
    "ForgeCommunicationError",
    "ForgeError",
    "ForgeInternalError",
    "ForgeRuleError",
    "Fused",
    "FusedOptimizer",
    "FusedWeight",
    "HostComm",
    "Kernel",
    "Linear",
    "LinearSpec",
    "Lion",
    "NAdam",
    "NcclComm",
    "RAdam",
    "RMSprop",
    "Row",
    "Rprop",
    "Rule",
    "Signum",
    "StepResult",
    "UserRule",
    "Warmed",
    "capture",
    "fuse",
    "fused_linear",
    "version",
    "warm",
]
