"""A ``forge_linear_config`` from a :class:`LinearSpec`."""

from __future__ import annotations

from typing import Any

import torch

from ._lib import ffi, new_struct
from ._tensors import FORGE_DTYPE
from ._types import (
    FP32_PRODUCTS,
    PARALLEL,
    ROUNDINGS,
    STATE_FORMATS,
    WEIGHT_FORMATS,
    LinearSpec,
    choice,
)
from .rules import rule_flags, rule_info

_FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_config(spec: LinearSpec, name: str = "") -> tuple[Any, Any]:
    """The struct, and the string that it points to: keep both alive over the call.

    Raises:
        ForgeArgumentError: the rule does not take one of the options.
        ValueError: an unknown format, rounding or dtype.
    """
    if spec.factor_dtype not in _FACTOR_DTYPES:
        raise ValueError(
            f"{name}: factors of {spec.factor_dtype} are not supported; "
            "use torch.float32, torch.bfloat16 or torch.float16"
        )
    flags = rule_flags(spec.rule.name, spec.rule.options)
    formats = spec.formats_of(len(rule_info(spec.rule.name, flags).state_names))
    rule_name = ffi.new("char[]", spec.rule.name.encode())
    config = new_struct("forge_linear_config")
    config.factor_dtype = FORGE_DTYPE[spec.factor_dtype]
    config.out_features, config.in_features = spec.out_features, spec.in_features
    config.parallel = choice(PARALLEL, "parallel", spec.parallel)
    config.sequence_parallel = spec.sequence_parallel
    config.reduce_dgrad = spec.reduce_dgrad
    config.weight_format = choice(WEIGHT_FORMATS, "weight_format", spec.weight_format)
    config.weight_rounding = choice(ROUNDINGS, "weight_rounding", spec.weight_rounding)
    config.state_rounding = choice(ROUNDINGS, "state_rounding", spec.state_rounding)
    for index, state_format in enumerate(formats):
        config.state_formats[index] = choice(STATE_FORMATS, "state_format", state_format)
    config.fp32_products = choice(FP32_PRODUCTS, "fp32_products", spec.fp32_products)
    config.rule_flags = flags
    config.parameter_id = spec.parameter_id
    config.rule = rule_name
    return config, rule_name
