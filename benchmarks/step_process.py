"""One method's process of ``llama_step.py``: several numbers of tokens, a JSON line for each.

It ends as soon as its lines are written, with all device memory, so that the next method finds the
device as this one did.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from llama import MODELS, build
from points import numbers
from training_methods import Method, Training, batches, select

Row = dict[str, Any]


def row_of(method: Method, tokens: int) -> Row:
    """A row without figures."""
    formats = {"weight_format": method.weight_format, "state_format": method.state_format}
    flags = {"schedule": method.schedule, "clip": method.clip, "graph": method.graph}
    name = {"name": str(method), "method": method.kind, "tokens": tokens}
    own = method.kind == "forge" and method.rest == "forge"
    rest = {"rest": method.rest, "rest_state_format": method.state_format if own else ""}
    return {**name, **formats, **flags, **rest}


def step_times(
    step: Callable[[], torch.Tensor], steps: int, device: torch.device
) -> tuple[list[float], float]:
    """Milliseconds of each step, launched as fast as Python can, and the last loss."""
    if device.type != "cuda":
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            loss = step()
            times.append(1e3 * (time.perf_counter() - begin))
        return times, loss.item()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        loss = step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)], loss.item()


def measure(
    training: Training, ids: torch.Tensor, labels: torch.Tensor, options: argparse.Namespace
) -> Row:
    """Peak, times and losses of one sequence length; the first steps are not measured."""
    device = ids.device
    gpu = device.type == "cuda"

    def step() -> torch.Tensor:
        return training.step(ids, labels)

    first = step().item()
    for _ in range(options.warm_up - 1):
        step()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of a shorter sequence
        torch.cuda.reset_peak_memory_stats()
    call = training.captured(ids, labels) if training.method.graph else step
    times, last = step_times(call, options.steps, device)
    found: Row = {
        # A replay allocates nothing; its memory is what the capture took, which is in the peak.
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if gpu else None,
        "loss_first": first,
        "loss_last": last,
        "times_ms": times,
    }
    if not math.isfinite(last):
        found["problem"] = f"the last loss is {last}"
    elif training.method.kind != "frozen" and not last < first:
        found["problem"] = f"the loss went from {first:.4f} to {last:.4f} on one sequence"
    return found


def run(method: Method, options: argparse.Namespace) -> None:
    """Measure every number of tokens; a refusal is a row, too."""
    device, config = torch.device(options.device), MODELS[options.model]
    training, refusal = None, ""
    try:
        model = build(config, device=device)
        # Small enough that the loss falls from the first step on, whatever the width.
        training = Training(method, model, 0.04 / config.hidden_size)
    except Exception as error:  # a package, a format or memory is missing
        refusal = f"{type(error).__name__}: {error}"
    for tokens, ids, labels in batches(options.tokens, config.vocab_size, device):
        row = row_of(method, tokens)
        if training is not None:
            try:
                row |= measure(training, ids, labels, options)
            except Exception as error:
                # Whatever followed in this process would be measured in its wreckage.
                refusal, training = f"{type(error).__name__}: {error}", None
        if refusal:
            row["unsupported"] = refusal.splitlines()[0][:300]
        with options.lines.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


def main() -> None:
    """Measure one method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=Path, help="takes the rows, appended one by one")
    parser.add_argument("--method", required=True, help="a name from llama_step.py --list")
    parser.add_argument("--tokens", type=numbers, required=True, metavar="N,...")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    options = parser.parse_args()
    (method,) = select([options.method])
    run(method, options)


if __name__ == "__main__":
    main()
