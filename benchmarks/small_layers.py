"""Many small linears against one with as many parameters: a whole backward and update of each.

    python benchmarks/small_layers.py [--layers N] [--size N] [--tokens N,...] [--out FILE]

The small ones are a chain: layer after layer dX = dY·W, then one call that updates them all. The
peer is a single linear with the same number of parameters: dX, then its update. Both are captured
into CUDA graphs, as a training step of so many small kernels has to be to keep a GPU busy; both are
also timed as Python queues them call by call. bf16 weights and factors, bf16 states, AdamW. All of
it in one run, bursts of one after bursts of the other.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment, slug, write_json
from measure import Meter, Timing

ROOT = Path(__file__).resolve().parents[1]
TARGET = 1.3
PARTS = ("both", "backward", "update")


class Chain:
    """Layers of one shape, each on top of the other; calling it queues a backward and an update."""

    def __init__(self, layers: int, out: int, columns: int, tokens: int) -> None:
        """Allocate weights, states, each layer's input, and the gradient of the last output."""
        from forge_train import AdamW
        from forge_train.native import Linear, LinearSpec

        device = torch.device("cuda")
        rule = AdamW()
        self.linears, self.storages, self.inputs = [], [], []
        for index in range(layers):
            spec = LinearSpec(
                out, columns, rule, factor_dtype=torch.bfloat16, weight_format="bf16",
                state_formats="bf16", parameter_id=index,
            )  # fmt: skip
            linear = Linear(spec, name=f"layer {index}", device=device)
            weight = torch.empty(out, columns, dtype=torch.bfloat16, device=device)
            self.linears.append(linear)
            # So that gradients neither vanish nor grow along the chain.
            self.storages.append(linear.allocate(weight.normal_(std=columns**-0.5)))
            self.inputs.append(torch.randn(tokens, columns, device=device).bfloat16())
        self.dy = torch.randn(tokens, out, device=device).bfloat16()
        scale = 1.0 / math.sqrt(tokens)
        first = self.linears[0]
        self.scalars = first.scalars(rule.options, step=100, seed=1, grad_scale=scale)
        self.segments: list[Any] = [None] * layers
        self.backward()

    def backward(self) -> None:
        """Queue dX of all layers, from the last; what each update needs is kept."""
        dy = self.dy
        for index in reversed(range(len(self.linears))):
            linear, x = self.linears[index], self.inputs[index]
            result = linear.backward(dy, x, self.storages[index], mode="keep")
            self.segments[index] = result.segment
            dy = result.dx

    def update(self) -> None:
        """Queue the update of all layers, in one call."""
        from forge_train.native import update_together

        calls, kept = [], []
        for linear, storage, segment in zip(
            self.linears, self.storages, self.segments, strict=True
        ):
            call, pointed_to = linear.update_struct([segment], storage, self.scalars)
            calls.append(call)
            kept.append(pointed_to)
        update_together(self.linears, calls)

    def both(self) -> None:
        """Queue a backward and an update."""
        self.backward()
        self.update()

    def queued_us(self, repeats: int = 5) -> float:
        """Median time of a step that Python queues call by call, to its end on the GPU."""
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.both()
            torch.cuda.synchronize()
            times.append(1e6 * (time.perf_counter() - start))
        return statistics.median(times)


def measure(layers: int, size: int, one: tuple[int, int], tokens: int) -> dict[str, Any]:
    """The row of a number of tokens."""
    meter = Meter(Timing(), None)
    many, single = Chain(layers, size, size, tokens), Chain(1, *one, tokens)
    row: dict[str, Any] = {
        "layers": layers, "out": size, "in": size, "peer_out": one[0], "peer_in": one[1],
        "tokens": tokens,
    }  # fmt: skip
    for part in PARTS:
        calls = [getattr(chain, part) for chain in (many, single)]
        # One after the other, twice: a drift of the clock meets both.
        us = [meter.burst(lambda _, call=call: call()).us for call in calls * 2]
        ours, theirs = (us[0] + us[2]) / 2, (us[1] + us[3]) / 2
        row |= {f"{part}_us": ours, f"{part}_peer_us": theirs, f"{part}_ratio": ours / theirs}
    row |= {"queued_us": many.queued_us(), "queued_peer_us": single.queued_us()}
    row |= {"target": TARGET, "met": row["both_ratio"] <= TARGET}
    parts = "   ".join(
        f"{part} {row[f'{part}_us']:7.0f} / {row[f'{part}_peer_us']:6.0f} = "
        f"{row[f'{part}_ratio']:.2f}"
        for part in PARTS
    )
    queued = f"queued {row['queued_us']:7.0f} / {row['queued_peer_us']:6.0f}"
    print(f"{tokens:6d} tokens   {parts}   {queued} µs", flush=True)
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--size", type=int, default=512, help="of a layer: size × size")
    parser.add_argument("--tokens", default="512,2048,8192,16384", metavar="N,...")
    parser.add_argument("--out", type=Path, help="default: results/<device>/small_layers.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("small_layers.py: torch sees no GPU")
    # About square, of multiples of 128: 6400 × 8192 for 200 of 512 × 512.
    parameters = arguments.layers * arguments.size**2
    sides = (n for n in range(128, math.isqrt(parameters) + 1, 128) if parameters % (128 * n) == 0)
    out = max(sides)
    head = environment()
    name = "small_layers.json"
    path = arguments.out or ROOT / "benchmarks" / "results" / slug(head["device"]) / name
    rows = []
    for tokens in arguments.tokens.split(","):
        one = (out, parameters // out)
        rows.append(measure(arguments.layers, arguments.size, one, int(tokens)))
        write_json(path, {**head, "conditions": Timing().conditions, "rows": rows})
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
