"""FORGE for Megatron-LM.

    import forge_train.megatron as forge_megatron

    fused = forge_megatron.fuse(model_chunks, rule="adamw")   # before DDP
    optimizer = fused.chain(get_megatron_optimizer(...))      # after it

or, for scripts that call ``megatron.training.pretrain``, ``install()`` and the flag ``--forge``; or
such a script unedited, by ``python -m forge_train.megatron SCRIPT FLAGS --forge``.

:mod:`~forge_train.megatron.patch` holds the one place where Megatron's classes are changed.
``forge_train.megatron.cpu`` runs Megatron on machines without a GPU.
"""

import importlib.util

from . import patch, token_loss
from .chain import ForgeChainedOptimizer
from .fuse import Fused, fuse
from .optimizer import ForgeOptimizer
from .patch import installed


def install() -> None:
    """Patch the two linears, and give ``megatron.training``, if it is there, the ``--forge`` flags.

    Call it before Megatron parses its arguments. Calling it again changes nothing.

    Raises:
        ImportError: something is not where it is expected; nothing is patched then.
    """
    patch.linear_classes()
    if importlib.util.find_spec("megatron.training") is not None:
        from . import training

        training.install()
    patch.install()


def uninstall() -> None:
    """Put Megatron's own methods and functions back. Calling it again changes nothing.

    Raises:
        RuntimeError: see :func:`forge_train.megatron.patch.uninstall`.
    """
    patch.uninstall()
    token_loss.uninstall()
    if importlib.util.find_spec("megatron.training") is not None:
        from . import training

        training.uninstall()


__all__ = [
    "ForgeChainedOptimizer",
    "ForgeOptimizer",
    "Fused",
    "fuse",
    "install",
    "installed",
    "uninstall",
]
