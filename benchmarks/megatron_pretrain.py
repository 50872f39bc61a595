"""A Megatron-LM training script on random tokens; every flag is Megatron's.

    torchrun --nproc-per-node 2 megatron_pretrain.py FLAGS
    torchrun --nproc-per-node 2 -m forge_train.megatron megatron_pretrain.py FLAGS --forge

``megatron_8b.py --flags METHOD`` prints the flags that it measures with. From megatron-core's wheel
start it by the second line, with or without ``--forge``: the wheel lacks the Makefile that Megatron
wants to run at start, and the launcher leaves that out.
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

Batch = dict[str, torch.Tensor]


def random_tokens(index: int, length: int, vocabulary: int) -> torch.Tensor:
    """The ``index``-th sequence, ``length + 1`` ids, the same on all ranks."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, vocabulary, (length + 1,), generator=generator)


class RandomTokens(torch.utils.data.Dataset[Batch]):
    """Sequences of random tokens."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        self.count, self.length, self.vocabulary = count, length, vocabulary

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        return {"tokens": random_tokens(int(index), self.length, self.vocabulary)}


def datasets(counts: list[int], **_: Any) -> tuple[RandomTokens, None, None]:
    """Training data, and none to validate or test with."""
    args = get_args()
    return RandomTokens(counts[0], args.seq_length, args.vocab_size), None, None


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank builds its own


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    total = output.float().sum()
    count = torch.tensor(output.numel(), dtype=torch.int, device=output.device)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> Any:
    """One micro-batch; the attention of ``megatron_layers`` is causal without a mask."""
    tokens = next(batches)["tokens"].to(torch.device("cuda"), non_blocking=True)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    return model(inputs, positions, None, labels=labels), partial(_loss)


def configuration() -> Any:
    """What Megatron makes of the command line."""
    given = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    return pretrain_cfg_container_from_args(given, gpt_config_from_args(given))


if __name__ == "__main__":
    pretrain(configuration(), datasets, ModelType.encoder_or_decoder, forward_step)
