"""``python -m forge_train estimate``: flags, and a table or JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ._arguments import positive_count
from ._types import SCHEDULES, STATE_FORMATS, WEIGHT_FORMATS

_DESCRIPTION = """\
Predict the peak memory of a training step: torch's AdamW, FlashOptim, Megatron and FORGE side by
side, and what FORGE does with each weight. Needs neither a GPU nor the model's weights. Sizes are
what torch.cuda.max_memory_allocated() would say; the driver's own memory comes on top.
"""
_EXAMPLES = """\
examples:
  a model by name
      %(prog)s --model llama-3.1-8b --tokens 512 --weight-format bf16 --state-format q8
  any model's config.json, clipped, in every format
      %(prog)s --model config.json --tokens 4096 --clip --all
  one rank of a tensor-parallel run
      %(prog)s --model llama-3.1-8b --tokens 8192 --tp 4 --sp --micro-batches 8
  linears alone
      %(prog)s --linear 14336x4096*64 --linear 4096x14336*32 --tokens 512
"""


def add_to(tools: Any) -> None:
    """Add the tool to those of the command line."""
    tool = tools.add_parser(
        "estimate",
        help="predict the peak memory of a training step",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = tool.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="NAME|CONFIG.JSON", help="a known model, or any config")
    model.add_argument(
        "--linear",
        action="append",
        metavar="OUTxIN*COUNT",
        help="linears by hand, with their inputs as activations; more than once",
    )
    tool.add_argument(
        "--tokens",
        type=positive_count,
        required=True,
        help="of a micro-batch, all sequences together",
    )
    tool.add_argument("--batch", type=positive_count, default=1, help="sequences that they are")
    tool.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the model")
    tool.add_argument("--weight-format", choices=("auto", *WEIGHT_FORMATS), default="auto")
    tool.add_argument("--state-format", choices=STATE_FORMATS, default="fp32")
    tool.add_argument(
        "--all", action="store_true", help="FORGE and FlashOptim in every format of the dtype"
    )
    tool.add_argument("--schedule", choices=SCHEDULES, default="auto")
    tool.add_argument("--clip", action="store_true", help="clip the global gradient norm")
    tool.add_argument(
        "--micro-batches", type=positive_count, default=1, metavar="N", help="per step"
    )
    tool.add_argument("--tp", type=positive_count, default=1, help="ranks of tensor parallelism")
    tool.add_argument("--sp", action="store_true", help="sequence parallelism among them")
    tool.add_argument("--dp", type=positive_count, default=1, help="ranks of data parallelism")
    tool.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="each layer is computed again in the backward",
    )
    tool.add_argument(
        "--attention",
        choices=("sdpa", "eager"),
        default="sdpa",
        help="sdpa keeps no scores (default: sdpa)",
    )
    tool.add_argument(
        "--norm",
        choices=("separate", "fused"),
        default="separate",
        help="RMSNorm in separate operations, as transformers has it, or torch.nn.RMSNorm",
    )
    tool.add_argument(
        "--rest",
        choices=("forge", "torch"),
        default="forge",
        help="who updates embeddings and norms beside FORGE: fuse itself, or torch's fused AdamW",
    )
    tool.add_argument(
        "--rest-state-format", choices=STATE_FORMATS, default="fp32", help="of what fuse steps so"
    )
    tool.add_argument("--json", action="store_true", help="everything, in bytes")
    tool.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the estimate; 0."""
    # Not with the other tools' start: it brings in torch's tensors without memory.
    from .estimate import Options, architecture, estimate, from_linears

    found = from_linears(arguments.linear) if arguments.linear else architecture(arguments.model)
    options = Options(
        tokens=arguments.tokens,
        batch=arguments.batch,
        dtype=arguments.dtype,
        weight_format=arguments.weight_format,
        state_format=arguments.state_format,
        schedule=arguments.schedule,
        clip=arguments.clip,
        micro_batches=arguments.micro_batches,
        tp=arguments.tp,
        sp=arguments.sp,
        dp=arguments.dp,
        checkpointing=arguments.activation_checkpointing,
        attention=arguments.attention,
        norm=arguments.norm,
        rest=arguments.rest,
        rest_state_format=arguments.rest_state_format,
    )
    result = estimate(found, options, all_formats=arguments.all)
    print(json.dumps(result.json(), indent=1) if arguments.json else result.text())
    return 0
