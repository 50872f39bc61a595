"""Ranks that train copies of one model on different tokens, without a gradient of any linear.

Each rank owns as many rows of every fused weight: it has their states, and updates them over the
tokens of all ranks; the library sums and gathers (``docs/parallelism.md``). This module keeps the
group: what its ranks must have in common, the gradients of what is not fused, and whole arrays for
checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ._comm import Comm, comm_of
from ._context import Context
from ._lib import version
from ._types import REDUCTIONS, LinearSpec
from ._types import choice as number_of
from .choose import Choice

if TYPE_CHECKING:
    from .engine import Engine

_SAME_MODEL = "Every rank must fuse the same model with the same arguments."
_WAY_OUT = {
    "backward": "Every rank must have as many tokens in a backward: pad the batch, or drop it.",
}
_BUCKET = 64 << 20
"""Bytes of gradients that are reduced together."""


class Replicas:
    """The data-parallel ranks.

    Args:
        group: their process group: gloo for models on the CPU, NCCL on GPUs; None: the default one.
        reduction: how dW is summed: ``exchange`` of factors, ``panels`` of dW, or ``auto``, for
            each layer the one that moves fewer bytes.

    Attributes:
        rank: this process' rank in the group.
        size: ranks in the group.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: an unknown reduction.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, reduction: str = "auto") -> None:
        """Ask the group; nothing is communicated."""
        if not dist.is_initialized():
            raise RuntimeError(
                "data_parallel: torch.distributed is not initialised; start the processes by "
                "torchrun and call torch.distributed.init_process_group() first"
            )
        number_of(REDUCTIONS, "data_parallel_reduction", reduction)
        self.group, self.reduction = group, reduction
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._comms: dict[Context, Comm] = {}

    def comm(self, context: Context) -> Comm:
        """The library's communicator over the group. All ranks ask for the first at the same time.

        Raises:
            ForgeBackendError: there is no NCCL for a GPU's.
        """
        if context not in self._comms:
            self._comms[context] = comm_of(context, self.group)
        return self._comms[context]

    def wait(self) -> None:
        """Let what reads weights from now on come after they were gathered; a GPU's host goes on.

        Raises:
            ForgeCommunicationError: a rank was lost; weights may differ between ranks.
        """
        for comm in self._comms.values():
            comm.wait()

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank rank 0's values, in place; collective."""
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        for tensor in tensors:
            dist.broadcast(tensor.detach(), source, group=self.group)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor, in place; a GPU's host does not wait."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace gradients by their sum over ranks; a GPU's host does not wait.

        Args:
            parameters: each with a gradient, in the same order on every rank.
        """
        works: list[tuple[Any, torch.Tensor, list[torch.Tensor]]] = []
        for bucket in _buckets([_gradient(parameter) for parameter in parameters]):
            alone = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0] if alone else torch.cat([gradient.reshape(-1) for gradient in bucket])
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            works.append((work, flat, [] if alone else bucket))
        for work, flat, bucket in works:
            work.wait()
            at = 0
            for gradient in bucket:
                gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
                at += gradient.numel()

    def whole(self, owned: torch.Tensor, dim: int) -> torch.Tensor:
        """Every rank's part, put together along a dimension, on the CPU; collective."""
        part = owned.contiguous()
        parts = torch.empty((self.size, *part.shape), dtype=part.dtype, device=part.device)
        flat = parts.view(-1).view(torch.uint8)
        dist.all_gather_into_tensor(flat, part.view(-1).view(torch.uint8), group=self.group)
        return torch.cat(parts.cpu().unbind(), dim)


def replicas_of(data_parallel: bool | dist.ProcessGroup, reduction: str) -> Replicas | None:
    """The ranks that ``fuse`` was told of; None: this one alone."""
    if data_parallel is False or data_parallel is None:
        number_of(REDUCTIONS, "data_parallel_reduction", reduction)
        return None
    return Replicas(None if data_parallel is True else data_parallel, reduction)


def engine_facts(engine: Engine) -> dict[str, object]:
    """What of an engine's settings all ranks must have alike, and the library's version."""
    reduction = engine.replicas.reduction if engine.replicas is not None else None
    return {
        "FORGE": version(),
        "data_parallel_reduction": reduction,
        "schedule": engine.schedule,
        "micro_batches": engine.micro_batches,
        "check_finite": engine.check_finite,
        "seed": engine.seed,
    }


def agree(group: dist.ProcessGroup | None, facts: Mapping[str, object], among: str) -> None:
    """Compare what ranks are about to do; collective.

    Args:
        group: the ranks; None: all.
        facts: names and values that all of them must have alike, as text.
        among: what the ranks are to each other, for the message.

    Raises:
        ValueError: on every rank, with the first difference and the rank of the group that has it.
    """
    mine = {name: str(value) for name, value in facts.items()}
    size = dist.get_world_size(group)
    # Of a thousand ranks only digests are sent, as long as these are the same.
    digests: list[Any] = [None] * size
    text = repr(list(mine.items())).encode()
    dist.all_gather_object(digests, hashlib.sha256(text).hexdigest(), group=group)
    if len(set(digests)) == 1:
        return
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, mine, group=group)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for name in dict.fromkeys([*first, *other]):
            here, there = first.get(name, "nothing"), other.get(name, "nothing")
            if here != there:
                way_out = _WAY_OUT.get(among, _SAME_MODEL)
                raise ValueError(
                    f"{among}: rank {rank} has {name}: {there}, but rank 0 has {here}. {way_out}"
                )
    raise ValueError(f"{among}: ranks have the same weights in another order")


def facts_of(
    choices: Sequence[Choice],
    engine: Engine,
    groups: Sequence[Mapping[str, Any]],
    base: LinearSpec,
    weight_format: str,
    max_norm: float | None,
    rest_state_format: str | Sequence[str],
) -> dict[str, object]:
    """All that decides what a step of ``fuse`` computes."""
    facts: dict[str, object] = {
        **engine_facts(engine),
        "rule": base.rule.name,
        "weight_format": weight_format,
        "state_format": base.state_formats,
        "weight_rounding": base.weight_rounding,
        "state_rounding": base.state_rounding,
        "fp32_products": base.fp32_products,
        "max_norm": max_norm,
        "rest_state_format": rest_state_format,
    }
    for index, group in enumerate(groups):
        options = {key: value for key, value in group.items() if key != "params"}
        facts |= {f"{key} of param group {index}": value for key, value in options.items()}
        facts[f"parameters of param group {index}"] = len(group["params"])
    for choice in choices:
        parameter = choice.parameter
        kind = choice.why or "fused"
        what = f"{tuple(parameter.shape)} of {parameter.dtype} on a {parameter.device.type}, {kind}"
        facts[choice.name] = what
    return facts


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A dense gradient.

    Raises:
        RuntimeError: there is none, or it is sparse.
    """
    gradient = parameter.grad
    if gradient is None or gradient.is_sparse:
        what = "no" if gradient is None else "a sparse"
        raise RuntimeError(f"a parameter of {tuple(parameter.shape)} has {what} gradient to reduce")
    return gradient


def _buckets(gradients: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Neighbours of one dtype, as many as fit; what is larger alone is alone."""
    buckets: list[list[torch.Tensor]] = []
    used = _BUCKET
    for gradient in gradients:
        fits = buckets and buckets[-1][0].dtype == gradient.dtype
        if not fits or used + gradient.nbytes > _BUCKET:
            buckets.append([])
            used = 0
        buckets[-1].append(gradient)
        used += gradient.nbytes
    return buckets
