"""FORGE for Megatron-LM.

    import forge_train.megatron as forge_megatron

    fused = forge_megatron.fuse(model_chunks, rule="adamw")   # before DDP
    optimizer = fused.chain(get_megatron_optimizer(...))      # after it

:mod:`~forge_train.megatron.patch` holds the one place where Megatron's classes are changed.
``forge_train.megatron.cpu`` runs Megatron on machines without a GPU.
"""

from .chain import ForgeChainedOptimizer
from .fuse import Fused, fuse
from .optimizer import ForgeOptimizer
from .patch import install, installed, uninstall

__all__ = [
    "ForgeChainedOptimizer",
    "ForgeOptimizer",
    "Fused",
    "fuse",
    "install",
    "installed",
    "uninstall",
]
