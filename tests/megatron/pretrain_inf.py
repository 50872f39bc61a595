"""``pretrain_tiny.py`` whose last step has an infinite gradient in one layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pretrain_tiny
import torch
from megatron.core.enums import ModelType
from megatron.core.utils import unwrap_model
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
    """The first linear's dY is infinite, so that no other linear's is."""
    args = get_args()
    whole = unwrap_model(model)
    if not whole.pre_process:
        return pretrain_tiny.forward_step(batches, model)  # a later pipeline stage
    layer = whole.decoder.layers[0].self_attention.linear_qkv

    def hook(_module: object, _inputs: object, output: tuple[torch.Tensor, object]) -> None:
        if args.curr_iteration == args.train_iters - 1:
            output[0].register_hook(lambda gradient: gradient * math.inf)

    handle = layer.register_forward_hook(hook)
    try:
        return pretrain_tiny.forward_step(batches, model)
    finally:
        handle.remove()


if __name__ == "__main__":
    given = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    configuration = pretrain_cfg_container_from_args(given, gpt_config_from_args(given))
    kind = ModelType.encoder_or_decoder
    pretrain(configuration, pretrain_tiny.datasets, kind, forward_step)
