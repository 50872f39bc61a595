"""FORGE inside ``megatron.training``: the places where ``--forge`` takes effect.

These functions are wrapped, each of which Megatron looks up in its module when it calls it:

| function | what is added |
|---|---|
| ``arguments.add_megatron_arguments`` | the flags |
| ``arguments.validate_args`` | refusal of flags that do not go with them |
| ``training.wrap_model_chunks_with_ddp``, ``models.dist_utils._ddp_wrap`` | ``fuse`` of the model chunks, which have their final dtype and device there and no gradient buffers yet |
| ``training.get_megatron_optimizer`` | ``chain`` |
| ``training.training_log`` | what only FORGE knows, see :mod:`forge_train.megatron.metrics` |
| ``megatron.core.datasets.utils.compile_helpers`` | nothing is compiled where the wheel has brought what would be: it lacks the Makefile |

Without ``--forge`` they do what they did.
"""  # noqa: E501  (a table)

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

from . import arguments
from .fuse import Fused, fuse
from .metrics import Metrics, arguments_of

_log = logging.getLogger("forge_train")
_MARKER = "__forge_training__"
_PACKAGE = "megatron"


class _Session:
    """What ``--forge`` has made so far in this process."""

    fused: Fused | None = None
    metrics: Metrics | None = None


def fused() -> Fused | None:
    """What ``--forge`` has fused; None before, and without the flag."""
    return _Session.fused


def _with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: Any, *rest: Any, **more: Any) -> Any:
        return arguments.readable(arguments.add_arguments(original(parser, *rest, **more)))

    return add_megatron_arguments


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_args(args: Any, *rest: Any, **more: Any) -> Any:
        result = original(args, *rest, **more)
        arguments.check(args)
        return result

    return validate_args


def _fusing(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrap(model_chunks: Sequence[torch.nn.Module], *rest: Any, **more: Any) -> Any:
        from megatron.training import get_args

        args = get_args()
        if arguments.asked(args):
            _Session.fused = fuse_by(args, list(model_chunks))
        return original(model_chunks, *rest, **more)

    return wrap


def _chaining(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_megatron_optimizer(*given: Any, **more: Any) -> Any:
        optimizer = original(*given, **more)
        done = _Session.fused
        if done is None or done.optimizer is not None:
            return optimizer
        from megatron.training import get_args, get_timers

        chained = done.chain(optimizer, more.get("config_overrides"))
        _Session.metrics = Metrics(done, get_args(), get_timers())
        return chained

    return get_megatron_optimizer


def _logging(original: Callable[..., Any]) -> Callable[..., Any]:
    def training_log(*given: Any, **more: Any) -> Any:
        if _Session.metrics is not None:
            from megatron.training import get_tensorboard_writer, get_wandb_writer

            told = arguments_of(original, given, more)
            counts = told["total_loss_dict"]
            before = ("advanced iterations", "skipped iterations")
            _Session.metrics.log(
                told["iteration"],
                told["skipped_iter"],
                1 + sum(counts.get(key, 0) for key in before),
                get_tensorboard_writer(),
                get_wandb_writer(),
            )
        return original(*given, **more)

    return training_log


def _compiled(original: Callable[..., Any]) -> Callable[..., Any]:
    def compile_helpers() -> None:
        package = importlib.import_module("megatron.core.datasets")
        makefile = Path(package.__path__[0]) / "Makefile"
        there = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
        if makefile.exists() or not there:
            original()

    return compile_helpers


def fuse_by(args: Any, model_chunks: list[torch.nn.Module]) -> Fused:
    """``fuse`` as the flags say.

    Raises:
        ValueError: see :func:`forge_train.megatron.fuse`; or linears are left, under
            ``--forge-left refuse``.
    """
    arguments.check(args)
    context = int(getattr(args, "context_parallel_size", 1) or 1)
    done = fuse(
        model_chunks,
        arguments.rule_of(args),
        weight_format=arguments.weight_format_of(args),
        state_format=args.forge_state_format,
        schedule=args.forge_schedule,
        clip_grad=float(args.clip_grad),
        micro_batches=get_num_microbatches() or 1,
        tokens_per_micro_batch=args.seq_length * args.micro_batch_size // context,
        seed=args.seed if args.forge_seed is None else args.forge_seed,
        weight_rounding=args.forge_weight_rounding,
        state_rounding=args.forge_state_rounding,
        data_parallel_reduction=args.forge_data_parallel_reduction,
        repeatable=getattr(args, "rerun_mode", "disabled") != "disabled"
        or bool(getattr(args, "rampup_batch_size", None)),
    )
    if args.forge_left == "refuse":
        linears = [item for item in done.left if item.linear]
        if linears:
            done.remove()
            names = ", ".join(f"{item.name} ({item.reason})" for item in linears[:4])
            raise ValueError(f"--forge-left refuse: FORGE leaves {len(linears)} linears: {names}")
    if not done.layers:
        _log.warning("--forge: no weight of this rank is fused")
    if args.forge_report and torch.distributed.get_rank() == 0:
        print(done.summary(), flush=True)
    return done


_WRAPPED: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("training.arguments", "add_megatron_arguments", _with_flags),
    ("training.arguments", "validate_args", _checked),
    ("training.training", "wrap_model_chunks_with_ddp", _fusing),
    ("training.models.dist_utils", "_ddp_wrap", _fusing),
    ("training.training", "get_megatron_optimizer", _chaining),
    ("training.training", "training_log", _logging),
    ("core.datasets.utils", "compile_helpers", _compiled),
)


def install() -> None:
    """Wrap the functions. Calling it again changes nothing.

    Raises:
        ImportError: there is no ``megatron.training``, or a function is not where it is expected;
            nothing is wrapped then.
    """
    places = []
    for module_name, name, wrap in _WRAPPED:
        try:
            module = importlib.import_module(f"{_PACKAGE}.{module_name}")
        except ImportError as error:
            raise ImportError(
                f"--forge needs {_PACKAGE}.{module_name}, which cannot be imported ({error}). It "
                "comes with megatron-core since 0.19 and with Megatron-LM's repository: put that "
                "on PYTHONPATH, or call forge_train.megatron.fuse and chain in your own script."
            ) from error
        original = getattr(module, name, None)
        if original is None:
            raise ImportError(
                f"{_PACKAGE}.{module_name} has no {name}, where --forge takes effect: it has "
                "moved. Use megatron-core 0.19.2, or a newer forge_train."
            )
        places.append((module, name, original, wrap))
    for module, name, original, wrap in places:
        if not hasattr(original, _MARKER):
            replacement = functools.wraps(original)(wrap(original))
            setattr(replacement, _MARKER, True)
            setattr(module, name, replacement)


def uninstall() -> None:
    """Put Megatron's own functions back. Calling it again changes nothing."""
    import sys

    for module_name, name, _ in _WRAPPED:
        module = sys.modules.get(f"{_PACKAGE}.{module_name}")
        current = getattr(module, name, None)
        if hasattr(current, _MARKER):
            setattr(module, name, current.__wrapped__)
    _Session.fused = _Session.metrics = None
