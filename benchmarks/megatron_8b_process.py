"""One method's processes of ``megatron_8b.py``: several micro-batches, a JSON line for each.

``torchrun`` starts one for each GPU. They build the model once, by Megatron's own functions, and
drive its ``train_step`` as its training loop does, with one micro-batch size after the other. An
allocation that fails is a result. One process alone clears up and goes on; of several, one may
wait for the other inside a collective then, so they end, and ``megatron_8b.py`` starts new ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron_8b_job import MODELS, flags_of, method_of
from megatron_8b_training import Training
from micro_batches import next_size
from points import numbers

Row = dict[str, Any]
OUT_OF_MEMORY = 3
"""Exit status: the rows are written; what is left needs new processes."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in torch's allocator or below a library."""
    text = str(error).lower()
    words = ("out of memory", "out_of_memory", "alloc_failed", "memoryallocation")
    return isinstance(error, torch.OutOfMemoryError) or any(word in text for word in words)


def read_rows(path: Path) -> list[Row]:
    """The rows written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def found_of(rows: list[Row]) -> dict[int, float | None]:
    """Micro-batch → peak in GB, 0 where nothing counts it; None: does not fit."""
    measured = [row for row in rows if row["fits"] is not None]
    return {
        row["micro_batch"]: (row["peak_gb"] or 0.0) if row["fits"] else None for row in measured
    }


# -- one micro-batch ---------------------------------------------------------------------------


def measure(training: Training, micro_batch: int, options: argparse.Namespace) -> Row:
    """Peak, times and losses of one micro-batch size; the first steps are not measured."""
    from megatron_pretrain import random_tokens

    model, gpu = MODELS[options.model], options.device == "cuda"
    sequences = [
        random_tokens(index, model.sequence, model.vocabulary) for index in range(micro_batch)
    ]
    tokens = torch.stack(sequences).to(torch.device("cuda"))
    training.set_micro_batch(micro_batch)
    first = training.step(tokens)
    for _ in range(options.warm_up - 1):
        training.step(tokens)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    training.held.clear()
    before = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    times, last = [], first
    for _ in range(options.steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        last = training.step(tokens)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    retries = torch.cuda.memory_stats().get("num_alloc_retries", 0) - before
    found = [
        torch.cuda.max_memory_allocated(),
        torch.cuda.max_memory_reserved(),
        max(training.held),
        retries,
        *times,
    ]
    # The slowest and the largest rank's.
    worst = torch.tensor(found, dtype=torch.float64, device=torch.device("cuda"))
    torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
    peak, reserved, held, retries, *times = worst.tolist()
    weights = training.weights()
    elements = sum(weight.numel() for weight in weights)
    weight_bytes = sum(weight.nbytes for weight in weights)
    counted = training.counted_bytes()
    median = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 3 else [median] * 3
    row = {
        "fits": True,
        "peak_gb": peak / 1e9 if gpu else None,
        "reserved_gb": reserved / 1e9 if gpu else None,
        "held_gb": held / 1e9 if gpu else None,
        "alloc_retries": int(retries),
        "tokens_per_s": 1e3 * micro_batch * model.sequence / median,
        "step_ms": median,
        "step_ms_spread": (quartiles[2] - quartiles[0]) / median,
        "times_ms": [round(time_ms, 3) for time_ms in times],
        "optimizer_bytes_per_param": ((held - weight_bytes) if gpu else counted) / elements,
        "counted_bytes_per_param": counted / elements,
        "weight_bytes_per_param": weight_bytes / elements,
        "params_per_gpu": elements,
        "schedule": training.schedules(),
        "adam": training.adam(),
        "loss_first": first,
        "loss_last": last,
    }
    if not math.isfinite(last):
        row["problem"] = f"the last loss is {last}"
    elif not last < first:
        row["problem"] = f"the loss went from {first:.4f} to {last:.4f} on the same sequences"
    return row


def attempt(work: Callable[[], Row]) -> Row:
    """What ``work`` returns, or a row that says why there are no figures."""
    try:
        return work()
    except Exception as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0][:400]
        if out_of_memory(error):
            return {"fits": False, "peak_gb": None, "message": words}
        import traceback

        traceback.print_exc()
        return {"fits": None, "peak_gb": None, "problem": words}


def run(options: argparse.Namespace, write: Callable[[Row], None]) -> int:
    """Measure what the rows so far leave to do; the exit status."""
    method, rows = method_of(options.method), read_rows(options.rows)

    def following() -> int | None:
        return next_size(
            found_of(rows),
            options.micro_batches,
            search=options.search,
            limit=options.memory_limit_gb,
            most=options.most,
        )

    training: Training | None = None
    while (size := following()) is not None:

        def work(size: int = size) -> Row:
            nonlocal training
            if training is None:
                training = Training(method)
            return measure(training, size, options)

        row = {**method.row(size), **attempt(work)}
        rows.append(row)
        write(row)
        if row["fits"] is None:
            return 1
        if not row["fits"]:
            if training is None or options.tp > 1:
                return OUT_OF_MEMORY
            training.clear()
        # A larger or smaller size starts from the same allocator.
        gc.collect()
        torch.cuda.empty_cache()
        if not row["fits"] and training.grown():
            return OUT_OF_MEMORY
    return 0


def parse() -> argparse.Namespace:
    """The command line that ``megatron_8b.py`` gives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="takes the rows; what it has is not measured")
    parser.add_argument("--method", required=True, help="see megatron_8b.py --help")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--clip-grad", type=float, required=True)
    parser.add_argument("--memory-limit-gb", type=float, required=True)
    parser.add_argument("--micro-batches", type=numbers, default=[], metavar="N,...")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--most", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--more-flags", default="", help="Megatron's, for every method")
    return parser.parse_args()


def main() -> None:
    """Measure one method on this rank's device, and leave without waiting for other ranks."""
    options = parse()
    rank = int(os.environ.get("RANK", "0"))
    gpu = options.device == "cuda"
    if gpu:
        device = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, options.memory_limit_gb * 1e9 / total), device
        )
    else:
        from forge_train.megatron import cpu

        cpu.enable()
    first = (options.micro_batches or [1])[0]
    flags = flags_of(
        method_of(options.method), MODELS[options.model], layers=options.layers, tp=options.tp,
        clip=options.clip_grad, micro_batch=first, gpu=gpu,
    )  # fmt: skip
    sys.argv = [sys.argv[0], *flags, *options.more_flags.split()]

    def write(row: Row) -> None:
        # Where a rank has no figures, the others may be waiting for it.
        if rank == 0 or not row["fits"]:
            with options.rows.open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    status = run(options, write)
    sys.stdout.flush()
    sys.stderr.flush()
    # Past the destructors of process groups, which wait for ranks that may be gone.
    os._exit(status)


if __name__ == "__main__":
    main()
