"""Memory that a whole backward takes above weights, states, factors and dX.

    python benchmarks/peak_memory.py [--out FILE]

``allocator_mib`` is the peak of torch's allocator, with the workspace that the backend was lent.
``driver_mib`` adds what the driver gives to anybody but torch during a backward: what the library
might allocate by itself. The first backward loads code, cuBLASLt's above all, which stays and is no
part of that: ``loaded_mib`` is what the driver has given out since before FORGE was in use.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from environment import environment, slug, write_json
from layers import Parameter

MIB = 2.0**20
SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096))
FORMATS = (("bf16", "bf16"), ("bf16", "fp32"), ("bf16", "q8"))
# The largest number may go another way through the library than the smallest.
TOKENS = (512, 16384)


def outside_torch_mib() -> float:
    """Memory of the device that is in use, but not by torch's allocator."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / MIB


def load_cublas() -> None:
    """Run the two products of a backward in torch."""
    dy = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.mm(dy, w)
    torch.mm(dy.t(), dy)


def measure(
    shape: tuple[int, int], formats: tuple[str, str], tokens: int, outside_before: float
) -> dict[str, Any]:
    """One row."""
    from forge_train import AdamW
    from forge_train.native import Linear, LinearSpec, Storage

    rule = AdamW(lr=1e-3)
    spec = LinearSpec(
        *shape,
        rule,
        factor_dtype=torch.bfloat16,
        weight_format=formats[0],
        state_formats=formats[1],
    )
    linear = Linear(spec, name="benchmark", device=torch.device("cuda"))
    parameter = Parameter(shape, *formats)
    parameter.fill()
    moments, scales = list(parameter.moments), list(parameter.scales or (None, None))
    storage = Storage(parameter.weight, parameter.extra, moments, scales)
    scalars = linear.scalars(rule.options, step=1, seed=1)
    dy = torch.randn(tokens, shape[0], device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)

    def backward() -> None:
        linear.backward(dy, x, storage, mode="update", scalars=scalars)
        torch.cuda.synchronize()

    backward()
    gc.collect()
    torch.cuda.empty_cache()
    outside = outside_torch_mib()
    lent = linear.context.workspace
    workspace = 0.0 if lent is None else lent.nbytes / MIB
    before = torch.cuda.memory_allocated() / MIB
    torch.cuda.reset_peak_memory_stats()
    backward()
    peak = torch.cuda.max_memory_allocated() / MIB - before
    dx = x.nbytes / MIB
    allocator = peak - dx + workspace
    return {
        "out": shape[0],
        "in": shape[1],
        "tokens": tokens,
        "weight_format": formats[0],
        "state_format": formats[1],
        "workspace_mib": workspace,
        "dx_mib": dx,
        "allocator_mib": allocator,
        "driver_mib": allocator + outside_torch_mib() - outside,
        "loaded_mib": outside - outside_before,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="default: results/<device>/peak_memory.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("peak_memory: no NVIDIA GPU that torch can use")
    result = environment()
    result["conditions"] = "AdamW, update with dX; above weights, states, factors and dX"
    path = options.out or Path(__file__).parent / "results" / slug(result["device"])
    if options.out is None:
        path = path / "peak_memory.json"
    result["rows"] = []
    load_cublas()
    outside_before = outside_torch_mib()
    for shape in SHAPES:
        for formats in FORMATS:
            for tokens in TOKENS:
                row = measure(shape, formats, tokens, outside_before)
                gc.collect()
                torch.cuda.empty_cache()
                result["rows"].append(row)
                write_json(path, result)
                print(
                    f"{shape[0]}x{shape[1]:<6} {'/'.join(formats):<10} {tokens:>6} tokens: "
                    f"allocator {row['allocator_mib']:6.1f} MiB, "
                    f"driver {row['driver_mib']:6.1f} MiB, loaded {row['loaded_mib']:6.1f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
