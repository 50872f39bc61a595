"""How long the first use of a kernel takes: compiled, and loaded from the cache on disk.

    python benchmarks/compile_time.py [--out FILE]

Two processes run one update of each specialisation, one after the other: the first finds an empty
cache and compiles, the second finds it filled. The library logs how long it took to compile or to
load an image; where it does not, the time is that of the first call less that of the second.
``first_call_ms`` is the host's time for the whole first call, in which a process' very first one
also loads NVRTC.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import environment, slug, write_json

# weight format, state format, factors, tokens
CASES = (
    ("bf16", "bf16", "bf16", 512),
    ("bf16", "fp32", "bf16", 512),
    ("bf16", "q8", "bf16", 512),
    ("bf16+16", "fp32", "bf16", 512),
    ("bf16+16", "q8", "bf16", 512),
    ("bf16", "bf16", "bf16", 4096),
    ("bf16", "fp32", "bf16", 4096),
    ("fp32", "fp32", "fp32", 512),
)
SHAPE = (4096, 4096)
_UNIT_MS = {"ns": 1e-6, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_DURATION = re.compile(r"(loaded|compiled) in ([\d.]+)(ns|µs|ms|s)\b")


def logged_ms(lines: list[str], word: str) -> float | None:
    """Sum of the times that the library logged for loading or compiling."""
    found = [match for line in lines if (match := _DURATION.search(line)) and match[1] == word]
    return sum(float(match[2]) * _UNIT_MS[match[3]] for match in found) if found else None


def run_case(case: tuple[str, str, str, int], log: list[str]) -> dict[str, Any]:
    """The first two updates of a new layer."""
    import torch

    from forge_train import AdamW
    from forge_train.native import Linear, LinearSpec, Segment

    weight_format, state_format, factor, tokens = case
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    rule = AdamW(lr=1e-3)
    spec = LinearSpec(
        *SHAPE,
        rule,
        factor_dtype=dtypes[factor],
        weight_format=weight_format,
        state_formats=state_format,
    )
    linear = Linear(spec, name="benchmark", device=torch.device("cuda"))
    weight = torch.randn(SHAPE, device="cuda").mul_(0.02).to(linear.layout.weight.dtype)
    log.clear()
    storage = linear.allocate(weight)
    dy = torch.randn(tokens, SHAPE[0], device="cuda").to(dtypes[factor])
    x = torch.randn(tokens, SHAPE[1], device="cuda").to(dtypes[factor])
    scalars = linear.scalars(rule.options, step=1, seed=1)
    segments = [Segment.of(dy, x)]
    torch.cuda.synchronize()
    # A master or low half is made by kernels of its own, which are not what is measured.
    log.clear()
    calls = []
    for _ in range(2):
        begin = time.perf_counter()
        linear.update(segments, storage, scalars)
        torch.cuda.synchronize()
        calls.append(1e3 * (time.perf_counter() - begin))
    first, second = calls
    return {
        "first_call_ms": first,
        "second_call_ms": second,
        "compile_ms": logged_ms(log, "compiled"),
        "load_ms": logged_ms(log, "loaded"),
        "log": list(log),
    }


def child() -> None:
    """Run all cases in this process and print what was measured."""
    from forge_train._lib import ffi, lib

    log: list[str] = []

    def receive(_user: Any, _level: int, _target: Any, message: Any) -> None:
        log.append(ffi.string(message).decode("utf-8", "replace"))

    signature = "void(void *, uint32_t, const char *, const char *)"
    callback = ffi.callback(signature, receive)
    lib.forge_set_log_callback(callback, ffi.NULL, 4)
    rows = []
    for case in CASES:
        try:
            rows.append(run_case(case, log))
        except (ValueError, RuntimeError) as error:
            rows.append({"problem": f"{type(error).__name__}: {error}"})
    lib.forge_set_log_callback(ffi.NULL, ffi.NULL, 0)
    print("RESULT " + json.dumps(rows))


def in_child(cache: str) -> list[dict[str, Any]]:
    """The rows of a fresh process that uses this cache."""
    process = subprocess.run(
        [sys.executable, __file__, "--child"],
        env={**os.environ, "FORGE_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    results = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    if process.returncode or not results:
        sys.exit(f"compile_time: a process ended with status {process.returncode}")
    return json.loads(results[-1].removeprefix("RESULT "))


def main() -> None:
    """Compile, load, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="default: results/<device>/compile_time.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child()
        return
    result = environment()
    if result["driver"] is None:
        sys.exit("compile_time: no NVIDIA GPU that torch can use")
    with tempfile.TemporaryDirectory(prefix="forge-cache-") as cache:
        compiled, loaded = in_child(cache), in_child(cache)
    result["conditions"] = (
        f"{SHAPE[0]}x{SHAPE[1]}, AdamW, an update of each in order, two processes"
    )
    result["rows"] = rows = []
    for case, first, second in zip(CASES, compiled, loaded, strict=True):
        weight_format, state_format, factor, tokens = case
        row: dict[str, Any] = {
            "name": f"{weight_format}/{state_format} {factor} factors {tokens} tokens",
            "problem": first.get("problem") or second.get("problem"),
            "compile_ms": None,
            "cached_load_ms": None,
        }
        if not row["problem"]:
            row["compile_first_call_ms"] = first["first_call_ms"]
            row["cached_first_call_ms"] = second["first_call_ms"]
            row["call_ms"] = second["second_call_ms"]
            # No line is logged where the process has the image already.
            reused = second["load_ms"] is None and bool(loaded[0].get("log"))
            less = second["first_call_ms"] - second["second_call_ms"]
            row["compile_ms"] = first["compile_ms"]
            row["cached_load_ms"] = None if reused else second["load_ms"] or less
            if row["compile_ms"] is None and not compiled[0].get("log"):
                row["compile_ms"] = first["first_call_ms"] - first["second_call_ms"]
            row["log"] = [*first["log"], *second["log"]]
        rows.append(row)

        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.1f}"

        print(
            f"{row['name']:<40} compile {number(row['compile_ms']):>8} ms, load "
            f"{number(row['cached_load_ms']):>7} ms, whole cached first call "
            f"{number(row.get('cached_first_call_ms')):>7} ms {row['problem'] or ''}"
        )
    folder = Path(__file__).parent / "results" / slug(result["device"])
    write_json(options.out or folder / "compile_time.json", result)


if __name__ == "__main__":
    main()
