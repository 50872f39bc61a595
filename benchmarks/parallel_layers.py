"""Linears of a Llama-3.1-8B layer on several GPUs: FORGE's backward and update against stock's.

    python benchmarks/parallel_layers.py [--mode tp,dp] [--ranks 2] [--out FILE]
    python benchmarks/parallel_layers.py --device cpu --layers 64x48 --tokens 16 --repeats 2

One process for each GPU. Everything of a mode is measured in one run, method after method, in
bursts of ``--repeats`` calls between two barriers; a burst's time is the slowest rank's, a row has
the median of ``--bursts``.

``tp``: tensor and sequence parallelism. ``forge`` is one call: gather, dX and its reduction,
update. ``kernels`` is the same without communication (one rank's shard, factors gathered before),
``wire`` the same collectives alone, ``stock`` what Megatron does: the gather beside dX, the
reduction beside dW, dW in fp32, then torch's fused AdamW over fp32 masters, and the weight from the
master.

``dp``: data parallelism, ``--tokens`` being of all ranks. ``exchange`` and ``panels`` are FORGE's
reductions, W gathered at the end; ``all_reduce`` a bf16 gradient summed, then a fused AdamW on
every rank; ``distributed`` Megatron's distributed optimizer: an fp32 gradient reduce-scattered, a
fused AdamW over the shard, the bf16 weight gathered. ``single`` is FORGE on one rank with its own
tokens. Peak memory is of a method's own arrays and what it needs besides.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import parallel_model
import torch
import torch.distributed as dist
from environment import environment, slug, write_json

ROOT = Path(__file__).resolve().parents[1]
ROW_PARALLEL = ("proj", "fc2")
BF16 = torch.bfloat16
Call = Callable[[], None]


class Measure:
    """Times calls on all ranks together."""

    def __init__(self, device: torch.device, repeats: int, bursts: int) -> None:
        """Nothing runs yet."""
        self.device, self.repeats, self.bursts = device, repeats, bursts

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, call: Call) -> float:
        """Median of bursts; of each the slowest rank."""
        for _ in range(2):
            call()
        times = []
        for _ in range(self.bursts):
            self.wait()
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(self.repeats):
                call()
            self.wait()
            spent = torch.tensor((time.perf_counter() - begin) / self.repeats, device=self.device)
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            times.append(1e3 * float(spent))
        return statistics.median(times)

    def peak(self, make: Callable[[], Call]) -> tuple[Call, int | None]:
        """A method's call, and the most bytes that making and calling it once takes."""
        if self.device.type != "cuda":
            return make(), None
        self.wait()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call = make()
        call()
        self.wait()
        return call, torch.cuda.max_memory_allocated() - before


def normal(device: torch.device, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Random bf16 numbers, others on each rank."""
    return (torch.randn(*shape, device=device) * scale).to(BF16)


def forge_linear(device: torch.device, out: int, columns: int, **more: Any) -> tuple[Any, ...]:
    """A linear of FORGE with random weights: the linear, its storage, scalars, a report's row."""
    from forge_train import AdamW
    from forge_train._structs import DeviceStructs
    from forge_train.native import Linear, LinearSpec, default_context

    parallelism = {key: more.pop(key) for key in ("parallel", "sequence_parallel") if key in more}
    rule = AdamW(lr=1e-4)
    spec = LinearSpec(
        out, columns, rule, factor_dtype=BF16, weight_format="bf16+16", state_formats="fp32",
        **parallelism,
    )  # fmt: skip
    context = default_context(device)
    linear = Linear(spec, name="layer", context=context, **more)
    layout = linear.layout
    weight = normal(device, layout.out_local, layout.in_local, scale=columns**-0.5)
    dist.broadcast(weight, 0)
    storage = linear.allocate(weight)
    scalars = linear.scalars(rule.options, step=100, seed=1, grad_scale=1e-3)
    return linear, storage, scalars, DeviceStructs("forge_report", 1, device).rows[0]


class Stock:
    """An fp32 master and moments, and torch's fused AdamW over them."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Start from a bf16 weight, which a step writes."""
        self.weight, self.master = weight, weight.float()
        self.moments = [torch.zeros_like(self.master) for _ in range(2)]
        self.step_count = torch.tensor(0.0, device=weight.device)

    def step(self, gradient: torch.Tensor) -> None:
        """One step over the whole weight, in place."""
        first, second = self.moments
        torch._fused_adamw_(
            [self.master], [gradient], [first], [second], [], [self.step_count],
            lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False,
            maximize=False,
        )  # fmt: skip
        self.weight.copy_(self.master)


def fp32_product(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``dYᵀ X`` in fp32, as Megatron's fused accumulation leaves it."""
    if dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return torch.mm(dy.t(), x).float()


def tensor_parallel(
    name: str, shape: tuple[int, int], tokens: int, device: torch.device, comm: Any
) -> dict[str, Callable[[], Call]]:
    """The methods of ``tp`` for a linear."""
    (out, columns), ranks = shape, dist.get_world_size()
    row = name in ROW_PARALLEL
    rows, cols = (out, columns // ranks) if row else (out // ranks, columns)
    local = tokens // ranks
    whole_dy, whole_x = normal(device, tokens, rows), normal(device, tokens, cols)
    dy, x = (whole_dy[:local], whole_x) if row else (whole_dy, whole_x[:local])
    gathered = torch.empty_like(whole_dy if row else whole_x)

    def forge() -> Call:
        parallel = {"parallel": "row" if row else "column", "sequence_parallel": True}
        linear, storage, scalars, report = forge_linear(device, out, columns, comm=comm, **parallel)
        return lambda: linear.backward(
            dy, x, storage, mode="update", scalars=scalars, report=report
        )

    def kernels() -> Call:
        linear, storage, scalars, report = forge_linear(device, rows, cols)
        return lambda: linear.backward(
            whole_dy, whole_x, storage, mode="update", scalars=scalars, report=report
        )

    def wire() -> Call:
        partial, part = torch.empty_like(whole_x), torch.empty_like(whole_x[:local])

        def call() -> None:
            dist.all_gather_into_tensor(gathered, dy if row else x)
            if not row:
                dist.reduce_scatter_tensor(part, partial)

        return call

    def stock() -> Call:
        optimizer = Stock(normal(device, rows, cols, scale=columns**-0.5))
        part = torch.empty_like(whole_x[:local])

        def call() -> None:
            weight = optimizer.weight
            if row:
                dist.all_gather_into_tensor(gathered, dy)
                torch.mm(gathered, weight)
                optimizer.step(fp32_product(gathered, whole_x))
                return
            gather = dist.all_gather_into_tensor(gathered, x, async_op=True)
            partial = torch.mm(dy, weight)
            gather.wait()
            reduction = dist.reduce_scatter_tensor(part, partial, async_op=True)
            gradient = fp32_product(dy, gathered)
            reduction.wait()
            optimizer.step(gradient)

        return call

    return {"forge": forge, "kernels": kernels, "wire": wire, "stock": stock}


def data_parallel(
    shape: tuple[int, int], tokens: int, device: torch.device, comm: Any
) -> dict[str, Callable[[], Call]]:
    """The methods of ``dp`` for a linear."""
    (out, columns), ranks = shape, dist.get_world_size()
    own = tokens // ranks
    dy, x = normal(device, own, out), normal(device, own, columns)

    def forge(**more: Any) -> Call:
        linear, storage, scalars, report = forge_linear(device, out, columns, **more)
        others = more.get("data_parallel")

        def call() -> None:
            linear.backward(dy, x, storage, mode="update", scalars=scalars, report=report)
            if others is not None:
                others.wait()

        return call

    def all_reduce() -> Call:
        optimizer = Stock(normal(device, out, columns, scale=columns**-0.5))

        def call() -> None:
            torch.mm(dy, optimizer.weight)
            gradient = torch.mm(dy.t(), x)
            dist.all_reduce(gradient)
            optimizer.step(gradient.float())

        return call

    def distributed() -> Call:
        weight = normal(device, out, columns, scale=columns**-0.5)
        optimizer = Stock(weight[: out // ranks].clone())
        part = torch.empty(out // ranks, columns, device=device)

        def call() -> None:
            torch.mm(dy, weight)
            dist.reduce_scatter_tensor(part, fp32_product(dy, x))
            optimizer.step(part)
            dist.all_gather_into_tensor(weight, optimizer.weight)

        return call

    return {
        "single": forge,
        "exchange": lambda: forge(data_parallel=comm, reduction="exchange"),
        "panels": lambda: forge(data_parallel=comm, reduction="panels"),
        "all_reduce": all_reduce,
        "distributed": distributed,
    }


def wire_bytes(method: str, shape: tuple[int, int], tokens: int, ranks: int) -> float | None:
    """Bytes that a rank receives, of the methods of ``dp``."""
    gathered = parallel_model.gathered(*shape, ranks)
    return {
        "single": 0.0,
        "exchange": gathered + parallel_model.exchanged(*shape, tokens // ranks, ranks),
        "panels": gathered + parallel_model.panelled(*shape, ranks),
        "all_reduce": parallel_model.all_reduced(*shape, ranks),
        "distributed": parallel_model.distributed_optimizer(*shape, ranks),
    }.get(method)


def work(rank: int, options: argparse.Namespace, store: str) -> None:
    """One rank: all rows; rank 0 writes them."""
    cuda = options.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=options.ranks,
        timeout=timedelta(seconds=300),
    )
    from forge_train.native import comm_of, default_context

    comm = comm_of(default_context(device))
    measure = Measure(device, options.repeats, options.bursts)
    torch.manual_seed(rank)
    rows: list[dict[str, Any]] = []
    for mode in options.mode.split(","):
        for name, shape in options.layers.items():
            for tokens in options.tokens[mode]:
                common = {"mode": mode, "layer": name, "shape": list(shape), "tokens": tokens}
                if mode == "tp":
                    methods = tensor_parallel(name, shape, tokens, device, comm)
                else:
                    methods = data_parallel(shape, tokens, device, comm)
                for method, make in methods.items():
                    call, peak = measure.peak(make)
                    row = {**common, "method": method, "ms": measure.milliseconds(call)}
                    row["peak_bytes"] = peak
                    if mode == "dp":
                        row["wire_bytes"] = wire_bytes(method, shape, tokens, options.ranks)
                    rows.append(row)
                    del call
                if rank == 0:
                    save(options, rows)
    dist.barrier()
    dist.destroy_process_group()


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """What there is so far."""
    conditions = {"ranks": options.ranks, "repeats": options.repeats, "bursts": options.bursts}
    write_json(Path(options.out), {**environment(), "conditions": conditions, "rows": rows})
    last = rows[-1]
    same = [row for row in rows if (row["mode"], row["layer"], row["tokens"]) == _key(last)]
    times = ", ".join(f"{row['method']} {row['ms']:.3f}" for row in same)
    print(f"{last['mode']} {last['layer']} {last['tokens']} tokens, ms: {times}", flush=True)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["mode"], row["layer"], row["tokens"]


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Options, completed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mode", default="tp,dp")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", help="OUTxIN,… in place of the layer's four linears")
    parser.add_argument("--tokens", help="in place of each mode's own")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--bursts", type=int, default=7)
    parser.add_argument("--out", help="default: benchmarks/results/<gpu>-x<ranks>/")
    options = parser.parse_args(arguments)
    if options.layers:
        shapes = [tuple(map(int, text.split("x"))) for text in options.layers.split(",")]
        options.layers = {f"{out}x{columns}": (out, columns) for out, columns in shapes}
    else:
        options.layers = parallel_model.LAYER
    if options.tokens:
        asked = [int(text) for text in options.tokens.split(",")]
        options.tokens = {"tp": asked, "dp": asked}
    else:
        options.tokens = {"tp": [4096, 8192], "dp": [256, 1024, 4096, 16384]}
    if not options.out:
        folder = f"{slug(environment()['device'])}-x{options.ranks}"
        options.out = str(ROOT / "benchmarks" / "results" / folder / "parallel_layers.json")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Start the ranks; 1 where one of them failed."""
    options = parsed(arguments)
    if options.device == "cuda" and torch.cuda.device_count() < options.ranks:
        print(f"{torch.cuda.device_count()} GPUs; {options.ranks} are needed", file=sys.stderr)
        return 2
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=work, args=(rank, options, store))
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    return int(any(process.exitcode != 0 for process in ranks))


if __name__ == "__main__":
    sys.exit(main())
