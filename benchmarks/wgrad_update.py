"""FORGE against the unfused pair: cuBLAS wgrad, then a perfect element-wise AdamW.

    python benchmarks/wgrad_update.py                       # the whole matrix, most wanted first
    python benchmarks/wgrad_update.py --quick               # a look at the main shapes
    python benchmarks/wgrad_update.py --shapes 28672x4096 --tokens 512,2048 --formats bf16/q8
    python benchmarks/wgrad_update.py --quick --mainloop sm80 --out sm80.json
    python benchmarks/wgrad_update.py --check results.json  # only compare with targets.py

For each shape, format, number of tokens and regime, all in this process:

- ``gemm_us``: cuBLAS wgrad to bf16 (``torch.mm``);
- ``update_us``, ``update_with_grad_us``: AdamW in one pass, without and with a bf16 gradient to
  read;
- ``torch_fused_us``: wgrad and torch's fused AdamW, where it takes the formats;
- ``forge_us``: FORGE.

``limit_us`` is the longer of ``gemm_us`` and ``update_us``: no fused kernel can be faster with this
GEMM and this memory. ``speedup`` is (``gemm_us`` + ``update_with_grad_us``) / ``forge_us``.

The GEMM does not depend on the formats, nor the update on the tokens: each is measured once.
Results are written after every row, so a run that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import targets
from environment import environment, slug, write_json
from points import Formats, Shape, formats, numbers, shapes

# torch and triton are imported where there is something to measure: --check needs neither.

TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
PRIMARY: tuple[Shape, ...] = ((28672, 4096), (4096, 14336))
SECONDARY: tuple[Shape, ...] = ((4096, 4096), (128256, 4096), (6144, 4096))
# TP=2: out is halved in column parallel layers, in in row parallel ones.
HALVES: tuple[Shape, ...] = (
    (14336, 4096),
    (4096, 7168),
    (2048, 4096),
    (4096, 2048),
    (64128, 4096),
    (3072, 4096),
)
MAIN_FORMATS: tuple[Formats, ...] = (("bf16", "bf16"), ("bf16", "fp32"))
Q8: Formats = ("bf16", "q8")
MORE_FORMATS: tuple[Formats, ...] = (
    ("fp32", "fp32"),
    ("bf16+16", "fp32"),
    ("bf16+16", "bf16"),
    ("bf16+16", "q8"),
    ("bf16+fp32", "fp32"),
)
METHODS = ("gemm", "gemm_fp32", "update", "update_with_grad", "torch_fused", "forge")


@dataclass(frozen=True)
class Point:
    """One row of the result."""

    shape: Shape
    formats: Formats
    tokens: int
    regime: str

    def __str__(self) -> str:
        """As the table has it."""
        shape = f"{self.shape[0]}x{self.shape[1]}"
        return f"{self.regime:<9} {shape:<11} {'/'.join(self.formats):<14} {self.tokens:>5}"


def default_points() -> list[Point]:
    """The whole matrix; what the targets ask about comes first, a format's tokens in a row."""

    def block(shapes: Any, formats: Any, tokens: Any, regime: str) -> list[Point]:
        ordered = itertools.product(formats, shapes, tokens)
        return [Point(shape, format_, t, regime) for format_, shape, t in ordered]

    three = (*MAIN_FORMATS, Q8)
    points = [
        *block(PRIMARY, MAIN_FORMATS, TOKENS[1:6], "burst"),
        *block(PRIMARY, MAIN_FORMATS, TOKENS[1:5], "sustained"),
        *block(PRIMARY, [Q8], TOKENS[:6], "burst"),
        *block(PRIMARY, MAIN_FORMATS, TOKENS, "burst"),
        *block(SECONDARY, three, TOKENS, "burst"),
        *block(HALVES, three, TOKENS, "burst"),
        *block(PRIMARY, [Q8, *MORE_FORMATS], TOKENS, "burst"),
        *block(PRIMARY, three, TOKENS, "sustained"),
        *block(SECONDARY, three, TOKENS, "sustained"),
        *block((*SECONDARY, *HALVES), MORE_FORMATS, TOKENS, "burst"),
        *block(HALVES, three, TOKENS, "sustained"),
    ]
    return list(dict.fromkeys(points))


QUICK = [
    Point(shape, formats, tokens, "burst")
    for formats in (*MAIN_FORMATS, Q8)
    for shape in PRIMARY
    for tokens in (512, 2048)
]


class Bench:
    """Buffers and cached results.

    Args:
        meter: how to measure.
        options: the command line.
    """

    def __init__(self, meter: Any, options: argparse.Namespace) -> None:
        """Measure the copy bandwidth."""
        import elementwise
        import layers
        import torch

        self.torch, self.layers, self.elementwise = torch, layers, elementwise
        self.meter, self.options = meter, options
        # A working set of twice the L2 leaves nothing of a buffer in it when its turn comes again.
        self.working_set = 2 * torch.cuda.get_device_properties().L2_cache_size
        self.samples: dict[Any, Any] = {}
        self.configs: dict[Formats, list[Any]] = {}
        self.shape: Shape | None = None
        self.factors: Any = None
        self.parameters: dict[Formats, list[Any]] = {}
        self.gradients: list[Any] = []
        self.copy_gb_s = {regime: self._copy_bandwidth(regime) for regime in ("burst", "sustained")}

    def _copy_bandwidth(self, regime: str) -> float:
        torch = self.torch
        size = 2**31
        source = torch.empty(size // 4, dtype=torch.float32, device="cuda").normal_()
        target = torch.empty_like(source)
        # A kernel: captured in a graph, `copy_` would go to the copy engine, which is slower.
        sample = self.meter.measure(lambda _index: torch.neg(source, out=target), regime)
        return 2e-3 * size / sample.us

    # -- buffers ------------------------------------------------------------------------------

    def _sets(self, set_bytes: float, most: int = 16) -> int:
        return max(1, min(most, math.ceil(self.working_set / set_bytes)))

    def _factor_sets(self, shape: Shape, tokens: int) -> int:
        out, columns = shape
        return self._sets(2 * tokens * (out + columns) + 2 * out * columns)

    def prepare(self, point: Point) -> None:
        """Have the buffers of a point's shape and format."""
        torch = self.torch
        if self.shape != point.shape:
            self.factors, self.gradients = None, []
            self.parameters.clear()
            gc.collect()
            torch.cuda.empty_cache()
            self.shape = point.shape
            rows = max(tokens * self._factor_sets(point.shape, tokens) for tokens in TOKENS)
            self.factors = self.layers.Factors(point.shape, max(rows, point.tokens))
        if point.formats not in self.parameters:
            self.parameters.clear()
            first = self.layers.Parameter(point.shape, *point.formats)
            more = self._sets(first.bytes) - 1
            others = [self.layers.Parameter(point.shape, *point.formats) for _ in range(more)]
            self.parameters[point.formats] = [first, *others]
        count = self._factor_sets(point.shape, min(TOKENS))
        while len(self.gradients) < count:
            empty = torch.empty(point.shape, dtype=torch.bfloat16, device="cuda")
            self.gradients.append(empty.normal_())
        for parameter in self.parameters[point.formats]:
            parameter.fill()

    # -- methods ------------------------------------------------------------------------------

    def _wgrad(self, point: Point, dtype: Any) -> Callable[[int], Any]:
        """Queue cuBLAS' wgrad; returns the gradient."""
        torch = self.torch
        count = self._factor_sets(point.shape, point.tokens)
        factors = self.factors.sets(point.tokens, count)
        if dtype == torch.bfloat16:
            gradients = self.gradients[:count]
        else:
            gradients = [torch.empty(point.shape, dtype=dtype, device="cuda") for _ in range(count)]

        def call(index: int) -> Any:
            dy, x = factors[index % len(factors)]
            gradient = gradients[index % len(gradients)]
            if dtype == torch.bfloat16:
                torch.mm(dy.t(), x, out=gradient)
            else:
                torch.ops.aten.mm.dtype_out(dy.t(), x, dtype, out=gradient)
            return gradient

        return call

    def _update(self, point: Point, gradient: bool, config: Any) -> Callable[[int], None]:
        launch = self.elementwise.launch
        arrays = [parameter.arrays() for parameter in self.parameters[point.formats]]

        def call(index: int) -> None:
            read = self.gradients[index % len(self.gradients)] if gradient else None
            launch(arrays[index % len(arrays)], read, config)

        return call

    def _config(self, point: Point, gradient: bool) -> Any:
        """The peer's fastest configuration for a format, by a short trial on the first shape."""

        def trial(config: Any, gradient: bool = False) -> float:
            call = self._update(point, gradient, config)
            return min(self.meter.estimate_us(call, warm_up=2, calls=6) for _ in range(3))

        if point.formats not in self.configs:
            ranked = self.elementwise.tune(trial, point.formats[1])
            reading = min(ranked[:3], key=lambda config: trial(config, True))
            self.configs[point.formats] = [ranked[0], reading]
        return self.configs[point.formats][gradient]

    def _torch_fused(self, point: Point) -> Callable[[int], None] | None:
        """wgrad, then the kernel of ``torch.optim.AdamW(fused=True)``; one dtype for all arrays."""
        torch = self.torch
        if point.formats not in (("bf16", "bf16"), ("fp32", "fp32")):
            return None
        parameters = self.parameters[point.formats]
        wgrad = self._wgrad(point, parameters[0].weight.dtype)
        steps = [torch.full((), 100.0, device="cuda") for _ in parameters]

        def call(index: int) -> None:
            gradient = wgrad(index)
            parameter = parameters[index % len(parameters)]
            step = steps[index % len(parameters)]
            torch._foreach_add_([step], 1)
            torch._fused_adamw_(
                [parameter.weight],
                [gradient],
                [parameter.moments[0]],
                [parameter.moments[1]],
                [],
                [step],
                lr=1e-3,
                beta1=0.9,
                beta2=0.95,
                weight_decay=0.1,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )

        return call

    def _cached(self, key: tuple[Any, ...], regime: str, make: Callable[[], Any]) -> Any:
        if (key, regime) not in self.samples:
            call = make()
            self.samples[key, regime] = call and self.meter.measure(call, regime)
        return self.samples[key, regime]

    def _forge(self, point: Point, row: dict[str, Any]) -> Any:
        factors = self.factors.sets(point.tokens, self._factor_sets(point.shape, point.tokens))
        parameters = self.parameters[point.formats]
        try:
            forge = self.layers.ForgeUpdate(
                point.shape, parameters, factors, self.options.rounding, self.options.state_rounding
            )
        except (ValueError, RuntimeError) as error:
            row["unsupported"] = str(error)
            return None
        try:
            problem = forge.check()
        except (ValueError, RuntimeError) as error:
            # Nothing can be measured after a fault of the device.
            self.torch.cuda.synchronize()
            row["problem"] = f"{type(error).__name__}: {error}"
            return None
        if problem:
            row["problem"] = problem
        kernels = forge.kernels(self.meter.stream) if self.meter.captures else []
        row["forge_path"] = self.layers.path_of(kernels)
        row["forge_kernels"] = sorted({name[:160] for name in kernels})
        return self.meter.measure(forge, point.regime)

    def measure(self, point: Point) -> dict[str, Any]:
        """One row."""
        torch = self.torch
        self.prepare(point)
        shape, tokens, regime = point.shape, point.tokens, point.regime
        row: dict[str, Any] = {"forge_path": None, "forge_kernels": []}
        samples = dict.fromkeys(METHODS)
        if not self.options.baselines_only:
            samples["forge"] = self._forge(point, row)
        samples["gemm"] = self._cached(
            ("gemm", shape, tokens), regime, lambda: self._wgrad(point, torch.bfloat16)
        )
        if self.options.gemm_fp32:
            samples["gemm_fp32"] = self._cached(
                ("gemm_fp32", shape, tokens), regime, lambda: self._wgrad(point, torch.float32)
            )
        for gradient, name in ((False, "update"), (True, "update_with_grad")):
            # Tuned first: choosing is no part of what is measured.
            config = self._config(point, gradient)
            samples[name] = self._cached(
                (name, shape, point.formats),
                regime,
                lambda g=gradient, c=config: self._update(point, g, c),
            )
        if not self.options.no_torch_fused:
            samples["torch_fused"] = self._cached(
                ("torch_fused", shape, tokens, point.formats),
                regime,
                lambda: self._torch_fused(point),
            )
        return self._row(point, samples, row)

    def _row(self, point: Point, samples: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        (out, columns), (weight_format, state_format) = point.shape, point.formats
        row = {
            "out": out,
            "in": columns,
            "tokens": point.tokens,
            "rule": "adamw",
            "weight_format": weight_format,
            "state_format": state_format,
            "regime": point.regime,
            **row,
        }
        for name, sample in samples.items():
            row[f"{name}_us"] = sample.us if sample else None
        for name, sample in samples.items():
            if sample and point.regime == "sustained":
                row[f"{name}_mj"], row[f"{name}_sm_mhz"] = sample.mj, sample.sm_mhz
                row[f"{name}_watts"] = sample.watts
            elif sample:
                row[f"{name}_spread"] = sample.spread
        gemm, update, reading, forge = (
            row[f"{name}_us"] for name in ("gemm", "update", "update_with_grad", "forge")
        )
        n = out * columns
        least = self.elementwise.update_bytes
        traffic = n * least(weight_format, state_format, False)
        traffic_reading = n * least(weight_format, state_format, True)
        factor_bytes = 2 * point.tokens * (out + columns)
        copy = self.copy_gb_s[point.regime]
        row["limit_us"] = max(gemm, update)
        row["pair_us"] = gemm + reading
        row["gemm_tflop_s"] = 2e-6 * n * point.tokens / gemm
        row["update_gb_s"] = 1e-3 * traffic / update
        row["update_of_copy"] = row["update_gb_s"] / copy
        row["update_with_grad_of_copy"] = 1e-3 * traffic_reading / reading / copy
        if row.get("gemm_mj") and row.get("update_with_grad_mj"):
            row["pair_mj"] = row["gemm_mj"] + row["update_with_grad_mj"]
        if forge:
            row["forge_tflop_s"] = 2e-6 * n * point.tokens / forge
            row["forge_gb_s"] = 1e-3 * (traffic + factor_bytes) / forge
            row["forge_over_limit"] = forge / row["limit_us"]
            row["speedup"] = row["pair_us"] / forge
            row["forge_launch"] = samples["forge"].launch
        return row


TABLE_HEAD = (
    f"{'regime':<9} {'shape':<11} {'formats':<14} {'tok':>5} | {'gemm':>7} {'TF/s':>4} | "
    f"{'update':>7} {'copy':>5} | {'+grad':>7} {'copy':>5} | {'torch':>7} | "
    f"{'FORGE':>7} {'path':<7} "
    f"{'/limit':>6} {'speed':>6} | {'pair':>6} {'FORGE':>6} mJ"
)


def table_line(point: Point, row: dict[str, Any]) -> str:
    """One row of the printed table."""

    def number(field: str, width: int, form: str = ".1f") -> str:
        value = row.get(field)
        return f"{'-' if value is None else format(value, form):>{width}}"

    return (
        f"{point} | {number('gemm_us', 7)} {number('gemm_tflop_s', 4, '.0f')} | "
        f"{number('update_us', 7)} {number('update_of_copy', 5, '.1%')} | "
        f"{number('update_with_grad_us', 7)} {number('update_with_grad_of_copy', 5, '.1%')} | "
        f"{number('torch_fused_us', 7)} | {number('forge_us', 7)} {row['forge_path'] or '-':<7} "
        f"{number('forge_over_limit', 6, '.3f')} {number('speedup', 6, '.3f')} | "
        f"{number('pair_mj', 6)} {number('forge_mj', 6)}"
        + "".join(f"\n          ! {row[key]}" for key in ("problem", "unsupported") if key in row)
    )


def read_rows(path: Path, commit: str) -> list[dict[str, Any]]:
    """The rows that an earlier run of this very commit left."""
    if not path.is_file():
        return []
    result = json.loads(path.read_text())
    if result["commit"] != commit:
        print(f"{path} is of commit {result['commit']}, this is {commit}: measured anew")
        return []
    return [row for row in result["rows"] if row["forge_us"]]


def point_of(row: dict[str, Any]) -> Point:
    """Which point a row is of."""
    formats = (row["weight_format"], row["state_format"])
    return Point((row["out"], row["in"]), formats, row["tokens"], row["regime"])


def select(options: argparse.Namespace) -> list[Point]:
    """The points that the command line asks for."""
    if options.quick:
        return QUICK
    points = default_points()
    regimes = options.regime or ["burst", "sustained"]
    if options.shapes or options.formats or options.tokens:
        # A selection may name what the matrix does not have.
        shapes = options.shapes or list(dict.fromkeys(point.shape for point in points))
        formats = options.formats or [*MAIN_FORMATS, Q8]
        tokens = options.tokens or TOKENS
        product = itertools.product(regimes, formats, shapes, tokens)
        points = [Point(s, f, t, regime) for regime, f, s, t in product]
    return [point for point in points if point.regime in regimes]


def run(options: argparse.Namespace, points: list[Point]) -> Path:
    """Measure the points until the time is up; returns the result's path."""
    begin = time.monotonic()
    if options.mainloop:
        os.environ["FORGE_MAINLOOP"] = options.mainloop
    import torch
    from measure import Meter, Timing, open_nvml

    if not torch.cuda.is_available():
        sys.exit("wgrad_update: no NVIDIA GPU that torch can use")
    timing = Timing(bursts=options.bursts, graph=not options.no_graph)
    nvml = open_nvml()
    meter = Meter(timing, nvml)
    result: dict[str, Any] = environment()
    path = options.out or (
        Path(__file__).parent / "results" / slug(result["device"]) / "wgrad_update.json"
    )
    result["conditions"] = {
        **timing.conditions,
        "data": "normal random numbers; buffers rotate over at least twice the L2",
        "rounding": f"FORGE: weights {options.rounding}, states {options.state_rounding}; "
        "the element-wise peer to the nearest",
        "gemm": "torch.mm to bf16, torch's defaults",
        "power_limit_w": nvml.power_limit_w() if nvml else None,
        "mainloop": os.environ.get("FORGE_MAINLOOP") or "the device's own",
    }
    done = (
        {point_of(row): row for row in read_rows(path, result["commit"])} if options.resume else {}
    )
    todo = [point for point in points if point not in done]
    left = len(todo)
    longest = 0.0
    with torch.cuda.stream(meter.stream), torch.no_grad():
        torch.manual_seed(1)
        bench = Bench(meter, options)
        result["copy_gb_s"] = bench.copy_gb_s["burst"]
        result["copy_gb_s_sustained"] = bench.copy_gb_s["sustained"]
        print(
            f"{result['device']}, driver {result['driver']}, commit {result['commit']}; copy "
            f"{result['copy_gb_s']:.0f} GB/s, sustained {result['copy_gb_s_sustained']:.0f}; "
            f"{left} points, ready after {time.monotonic() - begin:.1f} s\n{TABLE_HEAD}",
            flush=True,
        )
        for point in todo:
            started = time.monotonic()
            if started - begin + longest > options.budget_s:
                print(f"the budget of {options.budget_s:g} s is used up, {left} points are left")
                break
            row = bench.measure(point)
            done[point] = row
            left -= 1
            result["rows"] = list(done.values())
            write_json(path, result)
            print(table_line(point, row), flush=True)
            # The next one may be like the last, and a run must end by itself; a first one compiles.
            longest = min(time.monotonic() - started, 5.0)
    print(f"{path}: {len(done)} rows, {time.monotonic() - begin:.1f} s")
    if not done:
        sys.exit("wgrad_update: nothing was measured")
    return path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if not set(chosen) <= {"burst", "sustained"}:
            raise ValueError(text)
        return chosen

    parser.add_argument("--shapes", type=shapes, metavar="OUTxIN,...")
    parser.add_argument("--tokens", type=numbers, metavar="N,...")
    parser.add_argument("--formats", type=formats, metavar="WEIGHT/STATE,...")
    parser.add_argument("--regime", type=names, metavar="burst,sustained")
    parser.add_argument("--quick", action="store_true", help="12 points in the burst regime")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--bursts", type=int, default=7, help="bursts per method (default 7)")
    parser.add_argument(
        "--rounding",
        choices=("stochastic", "nearest"),
        default="stochastic",
        help="of bf16 weights",
    )
    parser.add_argument(
        "--state-rounding",
        choices=("stochastic", "nearest"),
        default="nearest",
        help="of bf16 and q8 states; the element-wise peer always rounds to the nearest",
    )
    parser.add_argument(
        "--mainloop",
        choices=("sm90", "sm80", "panel"),
        help="of FORGE, in place of the device's own; give --out as well",
    )
    parser.add_argument("--no-graph", action="store_true", help="direct calls, no CUDA graphs")
    parser.add_argument("--gemm-fp32", action="store_true", help="time wgrad to fp32 as well")
    parser.add_argument("--no-torch-fused", action="store_true")
    parser.add_argument("--baselines-only", action="store_true", help="without FORGE")
    parser.add_argument("--out", type=Path, help="default: results/<device>/wgrad_update.json")
    parser.add_argument("--resume", action="store_true", help="keep the rows that OUT has")
    parser.add_argument(
        "--check",
        type=Path,
        nargs="?",
        const=True,
        metavar="JSON",
        help="compare with targets.py: a result, measuring nothing, or what is measured now",
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, or compare a result with the targets."""
    options = parse()
    if isinstance(options.check, Path):
        sys.exit(not targets.check(options.check))
    path = run(options, select(options))
    if options.check and not targets.check(path, verbose=False):
        sys.exit(1)


if __name__ == "__main__":
    main()
