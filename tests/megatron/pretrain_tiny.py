"""A training script of somebody who has never heard of FORGE: a small GPT on mock data.

It is what ``python -m forge_train.megatron`` is given in the tests; every flag is Megatron's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences whose next token is often the one before plus one."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        self.count, self.length, self.vocabulary = count, length, vocabulary

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(int(index))
        tokens = torch.randint(0, self.vocabulary, (self.length + 1,), generator=generator)
        tokens[1::2] = (tokens[0::2][: len(tokens[1::2])] + 1) % self.vocabulary
        return {"tokens": tokens}


def datasets(counts: list[int], **_: Any) -> tuple[Tokens, None, None]:
    """Training data, and none to validate or test with."""
    args = get_args()
    return Tokens(counts[0], args.seq_length, args.vocab_size), None, None


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank builds its own


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total = output.float().sum()
    count = torch.tensor(output.numel(), dtype=torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
    """One micro-batch, the same on all ranks but the data-parallel ones."""
    tokens = next(batches)["tokens"]
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    length = inputs.shape[1]
    positions = torch.arange(length).expand_as(inputs)
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    return model(inputs, positions, mask, labels=labels), partial(_loss)


if __name__ == "__main__":
    given = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    configuration = pretrain_cfg_container_from_args(given, gpt_config_from_args(given))
    pretrain(configuration, datasets, ModelType.encoder_or_decoder, forward_step)
