"""Tensor parallelism over torch.distributed's gloo: two processes against one."""

from __future__ import annotations

import pytest

_RANK = """
import sys
import conftest
import torch
import torch.distributed as dist
from forge_train import AdamW
from forge_train.native import Context, HostComm, Linear, LinearSpec

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
context = Context(threads=1)
comm = HostComm(context)
T, O, I, R = 12, 18, 10, dist.get_rank()


def shard(tensor, dim):
    return tensor.chunk(2, dim)[R].contiguous()


for dtype, weight_format, state_format in (
    (torch.float32, "fp32", "fp32"),
    (torch.float32, "fp32", "q8"),
    (torch.bfloat16, "bf16", "bf16"),
    (torch.bfloat16, "bf16+16", "fp32"),
):
    for parallel, sequence in (("column", 0), ("column", 1), ("row", 0), ("row", 1)):
        for mode in ("update", "keep"):
            generator = torch.Generator().manual_seed(3)
            I = 256 if state_format == "q8" else 10  # a q8 block never crosses a shard
            W, X, dY = (
                torch.randn(*shape, generator=generator).to(dtype)
                for shape in ((O, I), (T, I), (T, O))
            )
            def spec(**parallelism):
                return LinearSpec(
                    O, I, AdamW(lr=0.1), factor_dtype=dtype, weight_format=weight_format,
                    state_formats=state_format, parameter_id=9, **parallelism)
            one = Linear(spec(), context=context)
            whole = one.allocate(W.clone())
            want = one.backward(dY, X, whole, mode="update",
                                scalars=one.scalars({}, step=1, seed=4))
            dim = 0 if parallel == "column" else 1
            linear = Linear(spec(parallel=parallel, sequence_parallel=bool(sequence),
                                 reduce_dgrad=parallel == "column" and not sequence), comm=comm)
            mine = linear.allocate(shard(W, dim))
            dy, x = (shard(dY, 1), X) if parallel == "column" else (dY, shard(X, 1))
            if sequence:
                dy, x = (dy, shard(X, 0)) if parallel == "column" else (shard(dY, 0), x)
            scalars = linear.scalars({}, step=1, seed=4)
            got = linear.backward(dy, x, mine, mode=mode,
                                  scalars=scalars if mode == "update" else None)
            if mode == "keep":
                assert got.segment.dy.shape[0] == got.segment.x.shape[0] == T
                linear.update([got.segment], mine, scalars)
            where = (dtype, weight_format, state_format, parallel, sequence, mode)
            assert torch.equal(mine.weight, shard(whole.weight, dim)), where
            for a, b in zip(mine.states, whole.states):
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

dist.barrier()
dist.destroy_process_group()
print("ok")
"""

_ERROR = """
import sys
import conftest
import torch
import torch.distributed as dist
from forge_train import SGD
from forge_train.native import Context, HostComm, Linear, LinearSpec

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)


class Broken(Exception):
    pass


class BrokenComm(HostComm):
    def _all_reduce(self, *arguments):
        raise Broken("cable")


comm = BrokenComm(Context(threads=1))
linear = Linear(LinearSpec(8, 6, SGD(), parallel="column", reduce_dgrad=True), comm=comm)
storage = linear.allocate(torch.ones(4, 6))
try:
    linear.backward(torch.ones(3, 4), torch.ones(3, 6), storage, mode="update",
                    scalars=linear.scalars({}, step=1, seed=0))
except Broken as error:
    print("ok", error)
dist.barrier()
dist.destroy_process_group()
"""


def _two_ranks(run_script, tmp_path, script: str) -> list[str]:
    from concurrent.futures import ThreadPoolExecutor

    store = str(tmp_path / "store")
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: run_script(script, str(rank), store), range(2)))


@pytest.mark.distributed
def test_shards_equal_the_whole_bit_for_bit(run_script, tmp_path):
    assert all("ok" in out for out in _two_ranks(run_script, tmp_path, _RANK))


@pytest.mark.distributed
def test_an_exception_in_a_collective_is_raised_as_it_is(run_script, tmp_path):
    assert all("ok cable" in out for out in _two_ranks(run_script, tmp_path, _ERROR))
