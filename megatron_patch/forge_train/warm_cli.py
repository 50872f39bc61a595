"""``python -m forge_train warm``: flags, and a table of what was compiled."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import rules
from ._arguments import positive_count
from ._types import FP32_PRODUCTS, ROUNDINGS, STATE_FORMATS, WEIGHT_FORMATS, LinearSpec
from .model_shapes import Shape, shapes_of
from .warm import Kernel, warm

_DESCRIPTION = """\
Compile the GPU kernels that a run will need, ahead of time and without a GPU: on a login node of a
cluster whose nodes have no compiler, or once for all ranks. Give the run the same --cache-dir (or
FORGE_CACHE_DIR), or a copy of it. It finds the kernels if it has the same version of FORGE, and the
same version of NVRTC or none; both are part of each file's name.
"""
_EXAMPLES = """\
examples:
  every shape, batch and schedule, for an H100 or H200
      %(prog)s --arch sm_90a --rule adamw --weight-format bf16 --state-format q8
  two linears, one batch size: fewer kernels
      %(prog)s --arch sm_90a --weight-format bf16 --shape 4096x4096 --shape 14336x4096 --tokens 8192
  every linear of a model, shared out over 8 GPUs
      %(prog)s --arch sm_90a --model config.json --tp 8
"""
_FACTORS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _shape(text: str) -> Shape:
    out, cross, features = text.partition("x")
    if not (cross and out.isdigit() and features.isdigit() and int(out) and int(features)):
        raise argparse.ArgumentTypeError(f"{text!r} is not OUTxIN, such as 14336x4096")
    return int(out), int(features)


def add_to(tools: Any) -> None:
    """Add the tool to those of the command line."""
    tool = tools.add_parser(
        "warm",
        help="compile GPU kernels ahead of time",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tool.add_argument("--arch", required=True, help="of the GPUs: sm_80, sm_90a, sm_100a")
    tool.add_argument(
        "--rule", choices=sorted(rules.built_in()), default="adamw", help="(default: adamw)"
    )
    tool.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="of the rule, where it adds a state or a branch: momentum=0.9, nesterov, amsgrad",
    )
    tool.add_argument("--weight-format", choices=WEIGHT_FORMATS, default="bf16+16")
    tool.add_argument("--state-format", choices=STATE_FORMATS, default="fp32")
    tool.add_argument("--weight-rounding", choices=ROUNDINGS, default="stochastic")
    tool.add_argument("--state-rounding", choices=ROUNDINGS, default="stochastic")
    tool.add_argument(
        "--factor", choices=_FACTORS, help="of X and dY (default: as the model weight)"
    )
    tool.add_argument(
        "--fp32-products",
        choices=FP32_PRODUCTS,
        default="exact",
        help="of fp32 factors (default: exact)",
    )
    tool.add_argument(
        "--shape",
        type=_shape,
        action="append",
        default=[],
        metavar="OUTxIN",
        help="of a weight, before it is shared out; more than once (default: any shape)",
    )
    tool.add_argument("--model", type=Path, metavar="CONFIG.JSON", help="the shapes of a model")
    tool.add_argument("--tp", type=positive_count, default=1, help="ranks that share out a weight")
    tool.add_argument(
        "--tokens",
        type=positive_count,
        action="append",
        metavar="N",
        help="of a micro-batch; more than once (default: any number)",
    )
    tool.add_argument(
        "--micro-batches",
        type=positive_count,
        default=1,
        metavar="N",
        help="that one update sums under the schedule 'deferred' (default: 1)",
    )
    tool.add_argument(
        "--by-value",
        action="store_true",
        help="only updates whose numbers the host knows: the schedule 'immediate', or "
        "check_finite=False without clipping, and no CUDA graphs; fewer kernels",
    )
    tool.add_argument(
        "--all",
        action="store_true",
        help="any shape, tokens and micro-batches",
    )
    tool.add_argument(
        "--sm-count",
        type=positive_count,
        help="multiprocessors (default: as most GPUs of --arch have)",
    )
    tool.add_argument("--cache-dir", type=Path, help="(default: as a run's)")
    tool.add_argument(
        "--threads", type=positive_count, default=None, help="(default: one for each core)"
    )
    tool.set_defaults(run=run)


def _rule(name: str, options: Sequence[str]) -> rules.Rule:
    """A rule with ``NAME=VALUE`` options.

    Raises:
        ValueError: an option that it does not have, or a value that is none.
    """
    rule = rules.built_in()[name]
    known = [field.name for field in dataclasses.fields(rule)]
    values = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in known:
            raise ValueError(f"--option {key}: {name} has {', '.join(known)}")
        try:
            values[key] = ast.literal_eval(value) if equals else True
        except (ValueError, SyntaxError):
            raise ValueError(f"--option {option}: {value!r} is not a number") from None
    return rule(**values)


def _specs(arguments: argparse.Namespace) -> Iterator[LinearSpec]:
    """The linears, each as it may be shared out."""
    shapes: list[Shape] = list(arguments.shape)
    if arguments.model is not None:
        shapes += shapes_of(arguments.model)
    if arguments.all or not shapes:
        shapes = [(0, 0)]
    factor = arguments.factor or ("fp32" if arguments.weight_format == "fp32" else "bf16")
    shared = arguments.tp > 1 and shapes != [(0, 0)]
    for out_features, in_features in dict.fromkeys(shapes):
        for parallel in ("column", "row") if shared else ("none",):
            # Of a model's linears each is shared out one way; the other need not be possible.
            divided = out_features if parallel == "column" else in_features
            if arguments.model is not None and shared and divided % arguments.tp:
                continue
            yield LinearSpec(
                out_features=out_features,
                in_features=in_features,
                rule=_rule(arguments.rule, arguments.option),
                factor_dtype=_FACTORS[factor],
                weight_format=arguments.weight_format,
                state_formats=arguments.state_format,
                weight_rounding=arguments.weight_rounding,
                state_rounding=arguments.state_rounding,
                fp32_products=arguments.fp32_products,
                parallel=parallel,
            )


class _Table:
    """Prints a row for each kernel, once, as it is ready."""

    def __init__(self) -> None:
        self.kernels: dict[Path, Kernel] = {}

    def add(self, kernel: Kernel) -> None:
        if kernel.path in self.kernels:
            return
        if not self.kernels:
            print(f"{'':8} {'s':>6}  kernel")
        self.kernels[kernel.path] = kernel
        did = "compiled" if kernel.compiled else "present"
        seconds = f"{kernel.seconds:.1f}" if kernel.compiled else ""
        print(f"{did:8} {seconds:>6}  {kernel.what}", flush=True)


def run(arguments: argparse.Namespace) -> int:
    """Compile, and print what was compiled; 0."""
    begin = time.monotonic()
    table, nvrtc = _Table(), (0, 0)
    for spec in _specs(arguments):
        for tokens in (arguments.tokens or [0]) if not arguments.all else [0]:
            nvrtc = warm(
                spec,
                arguments.arch,
                cache_dir=arguments.cache_dir,
                sm_count=arguments.sm_count or 0,
                ranks=arguments.tp,
                tokens=tokens,
                micro_batches=0 if arguments.all else arguments.micro_batches,
                device_scalars=arguments.all or not arguments.by_value,
                threads=arguments.threads or 0,
                progress=table.add,
            ).nvrtc
    kernels = table.kernels.values()
    compiled = sum(kernel.compiled for kernel in kernels)
    directory = next(iter(table.kernels)).parent
    print(
        f"{compiled} compiled, {len(kernels) - compiled} present, "
        f"{time.monotonic() - begin:.1f} s; NVRTC {nvrtc[0]}.{nvrtc[1]}; {directory}"
    )
    return 0
