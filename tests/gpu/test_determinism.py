"""The same bits: run after run beside other work, over shards, on other streams, in a graph."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import (
    DEVICE,
    Case,
    assert_same_bits,
    factors,
    initial,
    linear_on,
    needs_gpu,
    tensors,
    to_gpu,
)

from forge_train._context import default_context
from forge_train._lib import ffi
from forge_train._structs import DeviceStructs, report_of
from forge_train.native import Comm, Linear, Segment, Storage

pytestmark = needs_gpu

CASES = [Case("adamw", "bf16", "bf16"), Case("adamw", "bf16", "q8"), Case("adamw", "fp32", "fp32")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_hundred_runs_beside_other_work_give_the_same_bits(case):
    rows, cols, tokens = (1024, 1536, 700) if case.weight == "bf16" else (512, 768, 300)
    segments = to_gpu([factors(tokens, rows, cols, case.factor_dtype)])
    linear = linear_on(DEVICE, case.spec(rows, cols))
    start = initial(linear)
    scalars = linear.scalars({}, step=2, seed=3)
    structs = DeviceStructs("forge_report", 1, linear.device)
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
    first: list[torch.Tensor] | None = None
    differs = torch.zeros((), dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    for _ in range(100):
        with torch.cuda.stream(other):
            for _ in range(3):
                noise = torch.nn.functional.normalize(noise @ noise)
        storage = _copy(start)
        linear.update(segments, storage, scalars, report=structs.rows[0])
        found = [*tensors(storage), structs.rows.clone()]
        if first is None:
            first = found
        for a, b in zip(first, found, strict=True):
            differs += (a.view(torch.uint8) != b.view(torch.uint8)).sum()
    assert differs.item() == 0
    assert structs.read(report_of)[0].nonfinite_tiles == 0


def _copy(storage: Storage) -> Storage:
    return Storage(
        storage.weight.clone(),
        None if storage.weight_extra is None else storage.weight_extra.clone(),
        [t.clone() for t in storage.states],
        [None if t is None else t.clone() for t in storage.scales],
    )


class _Silent(Comm):
    """Rank ``rank`` of ``size``, whose updates need no collective; each collective fails."""

    def __init__(self, rank: int, size: int) -> None:
        from forge_train._comm import _GATHER, _REDUCE
        from forge_train._lib import check, lib, new_struct

        self.context, self.rank, self.size = default_context(DEVICE), rank, size
        self._fail = [
            ffi.callback(_GATHER, lambda *_: 1),
            ffi.callback(_REDUCE, lambda *_: 1),
        ]
        collectives, out = new_struct("forge_host_collectives"), ffi.new("forge_comm **")
        collectives.all_gather = collectives.reduce_scatter = self._fail[0]
        collectives.all_reduce = self._fail[1]
        handle = self.context.handle
        check(lib.forge_comm_new_host(handle, rank, size, collectives, out), "communicator")
        self.handle = ffi.gc(out[0], lib.forge_comm_free)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("parallel", ["column", "row"])
@pytest.mark.parametrize("size", [2, 4])
def test_shards_put_together_are_the_whole(case, parallel, size):
    """With stochastic rounding: so draws depend on the global index."""
    rows, cols, tokens = 512, 1024, 200
    dim = 0 if parallel == "column" else 1
    (segment,) = to_gpu([factors(tokens, rows, cols, case.factor_dtype)])
    spec = case.spec(rows, cols)
    one = linear_on(DEVICE, spec)
    whole = initial(one, warm=False)
    parts = [part.contiguous() for part in whole.weight.clone().chunk(size, dim)]
    for step in (1, 2):
        one.update([segment], whole, one.scalars({}, step=step, seed=4))
    for rank, part in enumerate(parts):
        linear = Linear(
            case.spec(rows, cols, parallel=parallel), comm=_Silent(rank, size), name="shard"
        )
        storage = linear.allocate(part)
        dy, x = segment.dy, segment.x
        if dim == 0:
            dy = dy.chunk(size, 1)[rank].contiguous()
        else:
            x = x.chunk(size, 1)[rank].contiguous()
        for step in (1, 2):
            scalars = linear.scalars({}, step=step, seed=4)
            linear.update([Segment.of(dy, x)], storage, scalars)
        assert torch.equal(storage.weight, whole.weight.chunk(size, dim)[rank]), rank
        for state, other in zip(storage.states, whole.states, strict=True):
            assert torch.equal(state, other.chunk(size, dim)[rank]), rank


def test_another_stream_waits_for_the_workspace():
    """Updates on two streams in turn, without the caller ordering FORGE's scratch."""
    case, rows, cols = CASES[0], 1024, 1024
    linear = linear_on(DEVICE, case.spec(rows, cols))
    segments = [to_gpu([factors(512, rows, cols, torch.bfloat16, seed=i)]) for i in range(2)]
    scalars = linear.scalars({}, step=1, seed=3)
    want = [initial(linear, seed=i) for i in range(2)]
    for storage, factor in zip(want, segments, strict=True):
        linear.update(factor, storage, scalars)
    got = [initial(linear, seed=i) for i in range(2)]
    structs = DeviceStructs("forge_report", 2, linear.device)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream, storage, factor, row in zip(streams, got, segments, structs.rows, strict=True):
        with torch.cuda.stream(stream):
            linear.update(factor, storage, scalars, report=row)
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_captured_update_reads_its_scalars_when_it_runs(case):
    rows, cols = 512, 768
    segments = to_gpu([factors(256, rows, cols, case.factor_dtype)])
    linear = linear_on(DEVICE, case.spec(rows, cols))
    steps = [linear.scalars({"lr": 1e-2 / s}, step=s, seed=3) for s in (1, 2, 3)]
    want = initial(linear, warm=False)
    for scalars in steps:
        linear.update(segments, want, scalars)

    storage = initial(linear, warm=False)
    structs = DeviceStructs("forge_report", 1, linear.device)
    numbers = linear.device_scalars(steps[0])
    # Once before the capture, so that kernels are compiled and loaded.
    linear.update(segments, _copy(storage), numbers, report=structs.rows[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear.update(segments, storage, numbers, report=structs.rows[0])
    for scalars in steps:
        numbers.copy_(linear.device_scalars(scalars))
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(storage, want)
    assert structs.read(report_of)[0].nonfinite_tiles == 0
