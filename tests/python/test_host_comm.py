"""Tensor parallelism over torch.distributed's gloo: two processes against one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import device, on_ranks

from forge_train import SGD, AdamW
from forge_train.native import Comm, Context, HostComm, Linear, LinearSpec, comm_of

TOKENS, ROWS = 12, 18


def shard(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return tensor.chunk(2, dim)[dist.get_rank()].contiguous()


def shards(_: None) -> int:
    """Compare this rank's shard with one rank's whole, in every case; how many there were."""
    own = device()
    context = Context(threads=1) if own.type == "cpu" else Context(device=own)
    comm = comm_of(context)
    cases = 0
    for dtype, weight_format, state_format in (
        (torch.float32, "fp32", "fp32"),
        (torch.float32, "fp32", "q8"),
        (torch.bfloat16, "bf16", "bf16"),
        (torch.bfloat16, "bf16+16", "fp32"),
    ):
        for parallel, sequence in (("column", 0), ("column", 1), ("row", 0), ("row", 1)):
            for mode in ("update", "keep"):
                formats = (dtype, weight_format, state_format)
                compare(context, comm, formats, parallel, bool(sequence), mode)
                cases += 1
    return cases


def compare(
    context: Context,
    comm: Comm,
    formats: tuple[torch.dtype, str, str],
    parallel: str,
    sequence: bool,
    mode: str,
) -> None:
    dtype, weight_format, state_format = where = formats
    where += (parallel, sequence, mode)
    generator = torch.Generator().manual_seed(3)
    columns = 256 if state_format == "q8" else 10  # a q8 block never crosses a shard
    W, X, dY = (
        torch.randn(*shape, generator=generator).to(dtype).to(context.device)
        for shape in ((ROWS, columns), (TOKENS, columns), (TOKENS, ROWS))
    )

    def spec(**parallelism: Any) -> LinearSpec:
        return LinearSpec(
            ROWS, columns, AdamW(lr=0.1), factor_dtype=dtype, weight_format=weight_format,
            state_formats=state_format, parameter_id=9, **parallelism,
        )  # fmt: skip

    one = Linear(spec(), context=context)
    whole = one.allocate(W.clone())
    scalars = one.scalars({}, step=1, seed=4)
    want = one.backward(dY, X, whole, mode="update", scalars=scalars)
    dim = 0 if parallel == "column" else 1
    reduces = parallel == "column" and not sequence
    linear = Linear(
        spec(parallel=parallel, sequence_parallel=sequence, reduce_dgrad=reduces), comm=comm
    )
    mine = linear.allocate(shard(W, dim))
    dy, x = (shard(dY, 1), X) if parallel == "column" else (dY, shard(X, 1))
    if sequence:
        dy, x = (dy, shard(X, 0)) if parallel == "column" else (shard(dY, 0), x)
    scalars = linear.scalars({}, step=1, seed=4)
    given = scalars if mode == "update" else None
    got = linear.backward(dy, x, mine, mode=mode, scalars=given)
    if mode == "keep":
        assert got.segment.dy.shape[0] == got.segment.x.shape[0] == TOKENS
        linear.update([got.segment], mine, scalars)
    assert torch.equal(mine.weight, shard(whole.weight, dim)), where
    for a, b in zip(mine.states, whole.states, strict=True):
        assert torch.equal(a, shard(b, dim)), where
    dx = want.dx
    if parallel == "row":
        dx = shard(dx, 1)
    elif sequence:
        dx = shard(dx, 0)
    # In bf16 each rank rounds its part of the sum before it is reduced.
    tolerance = dx.abs().max().item() * (1e-5 if dtype == torch.float32 else 2**-6)
    assert got.dx.shape == dx.shape, where
    assert (got.dx.float() - dx.float()).abs().max() < tolerance, where


class Broken(Exception):
    pass


class BrokenComm(HostComm):
    def _all_reduce(self, *arguments: Any) -> None:
        raise Broken("cable")


def broken(_: None) -> str:
    comm = BrokenComm(Context(threads=1))
    linear = Linear(LinearSpec(8, 6, SGD(), parallel="column", reduce_dgrad=True), comm=comm)
    storage = linear.allocate(torch.ones(4, 6))
    scalars = linear.scalars({}, step=1, seed=0)
    try:
        linear.backward(torch.ones(3, 4), torch.ones(3, 6), storage, mode="update", scalars=scalars)
    except Broken as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.distributed
def test_shards_equal_the_whole_bit_for_bit() -> None:
    assert on_ranks(shards, 2, None) == [32, 32]


@pytest.mark.distributed
def test_an_exception_in_a_collective_is_raised_as_it_is() -> None:
    assert on_ranks(broken, 2, None) == ["cable", "cable"]
