"""How much memory a training step takes, before there is a GPU to try it on.

::

    from forge_train.estimate import Options, architecture, estimate

    result = estimate(architecture("llama-3.1-8b"), Options(tokens=512, weight_format="bf16"))
    print(result.text())

A model is a tape of operations (:mod:`.transformer`); running it forwards and backwards with the
rules of autograd and of one optimizer (:mod:`.simulate`) gives the bytes that are alive at any
time. ``docs/estimate.md`` says what is counted and how well that fits.
"""

from .architecture import Architecture, Module
from .config import architecture, from_config, from_linears
from .options import Options
from .result import Estimate, Row, estimate

__all__ = [
    "Architecture",
    "Estimate",
    "Module",
    "Options",
    "Row",
    "architecture",
    "estimate",
    "from_config",
    "from_linears",
]
