"""fp32 factors: FORGE's exact and split products against torch's, in time and in error.

    python benchmarks/fp32_products.py [--shape OUTxIN,...] [--tokens N,...] [--out FILE]

fp32 weight and states, AdamW. FORGE's update with either way of multiplying; torch's product in
fp32 and in TF32, each followed by torch's fused AdamW. Errors are of dW alone, the largest over
the root mean square of dW, against fp64. All in one run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment, slug, write_json
from measure import Meter, Timing

ROOT = Path(__file__).resolve().parents[1]


def forge(products: str, shape: tuple[int, int], factors: tuple[torch.Tensor, ...]) -> Any:
    """A call that updates, and one that gives dW."""
    from forge_train import AdamW
    from forge_train._lib import ffi
    from forge_train.native import Linear, LinearSpec, Segment

    rule = AdamW()
    spec = LinearSpec(*shape, rule, fp32_products=products)
    linear = Linear(spec, name=products, device=torch.device("cuda"))
    storage = linear.allocate(torch.randn(shape, device="cuda") * 0.02)
    segment = Segment.of(*factors)
    scalars = linear.scalars(rule.options, step=100, seed=1, grad_scale=1e-3)
    report = torch.zeros(ffi.sizeof("forge_report"), dtype=torch.uint8, device="cuda")

    def gradient() -> torch.Tensor:
        out = torch.zeros(shape, device="cuda")
        linear.accumulate([segment], out)
        return out

    return lambda _: linear.update([segment], storage, scalars, report=report), gradient


def pair(tf32: bool, shape: tuple[int, int], factors: tuple[torch.Tensor, ...]) -> Any:
    """The same of torch: a product, then its fused AdamW."""
    dy, x = factors
    weight = torch.nn.Parameter(torch.randn(shape, device="cuda") * 0.02)
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True, capturable=True)
    optimizer.step()

    def gradient() -> torch.Tensor:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        return torch.mm(dy.T, x, out=weight.grad)

    def step(_: int) -> None:
        gradient()
        optimizer.step()

    return step, gradient


def measure(shape: tuple[int, int], tokens: int) -> dict[str, Any]:
    """A row."""
    dy = torch.randn(tokens, shape[0], device="cuda") / math.sqrt(tokens)
    factors = (dy, torch.randn(tokens, shape[1], device="cuda"))
    ways: dict[str, tuple[Callable[[int], Any], Callable[[], torch.Tensor]]] = {
        "exact": forge("exact", shape, factors),
        "bf16x3": forge("bf16x3", shape, factors),
        "torch_fp32": pair(False, shape, factors),
        "torch_tf32": pair(True, shape, factors),
    }
    # A part of dW is enough to see the error of all.
    rows = slice(0, 256)
    exact = factors[0][:, rows].double().T @ factors[1].double()
    size = exact.square().mean().sqrt()
    meter = Meter(Timing(), None)
    row: dict[str, Any] = {"out": shape[0], "in": shape[1], "tokens": tokens}
    flops = 2.0 * shape[0] * shape[1] * tokens
    for name, (call, gradient) in ways.items():
        error = ((gradient()[rows].double() - exact).abs().max() / size).item()
        us = meter.burst(call).us
        row |= {f"{name}_us": us, f"{name}_error": error, f"{name}_tflops": flops / us / 1e6}
    del ways
    print(
        f"{shape[0]}x{shape[1]} {tokens:6d} tokens  "
        + "  ".join(
            f"{name} {row[f'{name}_us']:8.0f} µs {row[f'{name}_error']:.1e}"
            for name in ("exact", "bf16x3", "torch_fp32", "torch_tf32")
        ),
        flush=True,
    )
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096x4096,14336x4096", metavar="OUTxIN,...")
    parser.add_argument("--tokens", default="512,2048,8192", metavar="N,...")
    parser.add_argument("--out", type=Path, help="default: results/<device>/fp32_products.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("fp32_products.py: torch sees no GPU")
    head = environment()
    name = "fp32_products.json"
    path = arguments.out or ROOT / "benchmarks" / "results" / slug(head["device"]) / name
    rows = []
    for text in arguments.shape.split(","):
        out, columns = (int(size) for size in text.split("x"))
        for tokens in arguments.tokens.split(","):
            rows.append(measure((out, columns), int(tokens)))
            write_json(path, {**head, "conditions": Timing().conditions, "rows": rows})
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
