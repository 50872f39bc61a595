"""``tests/megatron/pretrain_tiny.py`` with every micro-batch's loss printed to the bit.

Megatron logs seven digits. ``EXACT_PACE`` slows micro-batches down by so many seconds, that a test
has the time to interfere.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "megatron"))

import pretrain_tiny
import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
    """As there; the loss is printed with the number of its step."""
    time.sleep(float(os.environ.get("EXACT_PACE", "0")))
    output, loss_of = pretrain_tiny.forward_step(batches, model)

    def printed(logits: torch.Tensor) -> Any:
        total, *others = loss_of(logits)
        print(f"exact {get_args().curr_iteration + 1} {total.item().hex()}", flush=True)
        return total, *others

    return output, printed


if __name__ == "__main__":
    given = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    configuration = pretrain_cfg_container_from_args(given, gpt_config_from_args(given))
    pretrain(configuration, pretrain_tiny.datasets, ModelType.encoder_or_decoder, forward_step)
