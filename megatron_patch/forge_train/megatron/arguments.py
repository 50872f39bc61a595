"""The ``--forge*`` flags, and what of Megatron's other flags cannot go with them."""

from __future__ import annotations

import argparse
from typing import Any

from .._types import REDUCTIONS, ROUNDINGS, SCHEDULES, STATE_FORMATS, WEIGHT_FORMATS

_RULES = {"adam": "adamw", "sgd": "sgd", "lion": "lion"}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group; Megatron's parser shows it in ``--help``."""
    group = parser.add_argument_group(
        title="FORGE",
        description="weight gradients of linears are consumed by the optimizer where they are "
        "produced; https://arxiv.org/abs/2606.22932",
    )
    add = group.add_argument
    add("--forge", action="store_true", help="train column- and row-parallel linears with FORGE")
    add(
        "--forge-weight-format",
        choices=("auto", *WEIGHT_FORMATS),
        default="auto",
        help="auto: fp32 of fp32 models, of --bf16 ones bf16+16: the bits of an fp32 master in "
        "half its bytes",
    )
    add(
        "--forge-state-format",
        choices=tuple(STATE_FORMATS),
        default="fp32",
        help="of the optimizer's states",
    )
    add(
        "--forge-schedule",
        choices=tuple(SCHEDULES),
        default="auto",
        help="when updates happen; auto: for each weight by the bytes that it keeps",
    )
    add("--forge-weight-rounding", choices=tuple(ROUNDINGS), default="stochastic")
    add("--forge-state-rounding", choices=tuple(ROUNDINGS), default="stochastic")
    add(
        "--forge-seed",
        type=int,
        default=None,
        help="key of the stochastic rounding; default: --seed",
    )
    add(
        "--forge-data-parallel-reduction",
        choices=tuple(REDUCTIONS),
        default="auto",
        help="how dW is summed over data-parallel ranks",
    )
    add(
        "--forge-left",
        choices=("keep", "refuse"),
        default="keep",
        help="linears that FORGE cannot take: keep them with the stock optimizer, or refuse to "
        "start. A table at start says which they are, and why",
    )
    add(
        "--no-forge-report",
        action="store_false",
        dest="forge_report",
        help="do not print that table",
    )
    return parser


def readable(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Mend texts that argparse cannot format: a bare ``%`` of Megatron's ends its ``--help``."""
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (KeyError, TypeError, ValueError):
            action.help = str(action.help).replace("%", "%%")
    return parser


def asked(args: Any) -> bool:
    """Whether ``--forge`` was given."""
    return bool(getattr(args, "forge", False))


def rule_of(args: Any) -> str:
    """The rule of ``--optimizer``.

    Raises:
        ValueError: it is none that goes element by element.
    """
    name = str(args.optimizer)
    if name not in _RULES:
        raise ValueError(
            f"--forge with --optimizer {name}: FORGE has element-wise rules only; use "
            f"--optimizer {' or '.join(_RULES)}."
        )
    if name == "adam" and not getattr(args, "decoupled_weight_decay", True):
        return "adam"
    return _RULES[name]


def weight_format_of(args: Any) -> str:
    """``--forge-weight-format``, chosen by the model's precision where it is ``auto``."""
    if args.forge_weight_format != "auto":
        return str(args.forge_weight_format)
    return "bf16+16" if args.bf16 else "fp32"


def check(args: Any) -> None:
    """Refuse flags that could not be honoured, before anything is built.

    Raises:
        ValueError: names the flag, why, and the one to use.
    """
    if not asked(args):
        return
    rule_of(args)

    def given(name: str, *harmless: Any) -> bool:
        value = getattr(args, name, None)
        return value not in (None, False, 0, *harmless)

    fsdp = "FORGE's weights are whole on every rank; leave it out: states are shared out anyway"
    reasons = {
        "--fp16": (given("fp16"), "its loss scale changes with every overflow; use --bf16"),
        "--use-torch-fsdp2": (given("use_torch_fsdp2"), fsdp),
        "--use-megatron-fsdp": (given("use_megatron_fsdp"), fsdp),
        "--transformer-impl transformer_engine": (
            getattr(args, "transformer_impl", "local") != "local",
            "its linears keep their gradients, so that little would be saved; use "
            "--transformer-impl local",
        ),
        "--forge-schedule immediate with --calculate-per-token-loss": (
            getattr(args, "forge_schedule", None) == "immediate"
            and given("calculate_per_token_loss"),
            "it updates before the tokens of a step are counted; use --forge-schedule deferred",
        ),
        "--defer-embedding-wgrad-compute": (
            given("defer_embedding_wgrad_compute"),
            "it keeps a weight gradient that FORGE never forms; leave it out",
        ),
        "--cuda-graph-impl": (
            given("cuda_graph_impl", "none"),
            "a replayed graph would not see the engine's decisions; leave it out",
        ),
        "--log-num-zeros-in-grad": (
            given("log_num_zeros_in_grad"),
            "a gradient that is never formed has no zeros to count; leave it out",
        ),
        "--save-wgrads-interval": (
            given("save_wgrads_interval"),
            "a gradient that is never formed cannot be saved; leave it out",
        ),
        "--moe-use-upcycling": (
            given("moe_use_upcycling"),
            "it builds a second model; convert the checkpoint without --forge, then go on with it",
        ),
        f"--ckpt-format {getattr(args, 'ckpt_format', None)}": (
            getattr(args, "ckpt_format", None) in ("torch", "torch_dcp")
            and int(getattr(args, "data_parallel_size", 1))
            * int(getattr(args, "context_parallel_size", 1))
            > 1,
            "it saves the states of one data-parallel rank; use --ckpt-format torch_dist",
        ),
        "--rampup-batch-size": (
            args.forge_schedule == "immediate" and given("rampup_batch_size"),
            "--forge-schedule immediate takes one micro-batch, and there will be more; use "
            "--forge-schedule deferred or auto",
        ),
        "--forge-schedule immediate": (
            args.forge_schedule == "immediate" and given("rerun_mode", "disabled"),
            f"--rerun-mode {getattr(args, 'rerun_mode', None)} may run a step again, which weights "
            "that were updated inside the backward cannot; use --rerun-mode disabled, or "
            "--forge-schedule deferred",
        ),
    }
    for flag, (holds, why) in reasons.items():
        if holds:
            raise ValueError(f"--forge cannot be used with {flag}: {why}.")
    precisions = {"fp32": False, "auto": args.bf16}
    if bool(args.bf16) != precisions.get(args.forge_weight_format, True):
        raise ValueError(
            f"--forge-weight-format {args.forge_weight_format} is not for this model: it is "
            f"{'bf16: use bf16, bf16+16 or bf16+fp32' if args.bf16 else 'fp32: use fp32'}."
        )
