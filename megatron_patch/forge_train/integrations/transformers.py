"""FORGE in ``transformers.Trainer``: clipping, accumulation and weight decay from its arguments.

::

    from forge_train.integrations.transformers import connect, fuse_for_trainer

    fused = fuse_for_trainer(model, args, weight_format="bf16+16", state_format="q8")
    trainer = Trainer(model, args, train_dataset=data, optimizers=(fused.optimizer, None))
    connect(trainer, fused)
    trainer.train()
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..fuse import Fused, fuse
from ..rules import AdamW, Rule

_TAKEN_OVER = "_forge_max_norm"


def fuse_for_trainer(
    model: torch.nn.Module, args: TrainingArguments, rule: Rule | None = None, **options: Any
) -> Fused:
    """Fuse a model as the Trainer's arguments say.

    ``max_grad_norm`` becomes ``max_norm`` and is set to 0 in ``args``: the Trainer clips gradients,
    and fused weights have none. ``gradient_accumulation_steps`` becomes ``micro_batches``. Biases
    and norms have no weight decay, by the Trainer's own choice of names.

    Args:
        model: moved to ``args.device`` before it is fused, which the Trainer would do too late.
        args: the Trainer's; pass the same object to it.
        rule: None: AdamW with the learning rate, betas, epsilon and weight decay of ``args``.
        options: of :func:`forge_train.fuse`, but for those that ``args`` has.

    Returns:
        A handle; its ``optimizer`` is what the Trainer gets.

    Raises:
        ValueError: a Trainer with these arguments cannot train a fused model; or an option that
            ``args`` has.
    """
    for name, argument in (
        ("max_norm", "max_grad_norm"),
        ("micro_batches", "gradient_accumulation_steps"),
    ):
        if name in options:
            raise ValueError(
                f"{name}={options[name]!r}: set TrainingArguments({argument}=...) instead, which "
                "the Trainer reads, too"
            )
    _check_arguments(args)
    if rule is None:
        rule = AdamW(
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
    model.to(args.device)
    if "groups" not in options and "weight_decay" in rule.options:
        options["groups"] = _decay_groups(model, rule)
    # A second model with these arguments is to be clipped as the first.
    max_norm = args.max_grad_norm or getattr(args, _TAKEN_OVER, 0.0)
    fused = fuse(
        model,
        rule,
        max_norm=max_norm or None,
        micro_batches=args.gradient_accumulation_steps,
        **options,
    )
    setattr(args, _TAKEN_OVER, max_norm)
    args.max_grad_norm = 0.0
    return fused


def connect(trainer: Trainer, fused: Fused) -> None:
    """Have the Trainer log the norm of all gradients, and check that it fits the fused model.

    Without it, the Trainer logs as ``grad_norm`` the norm of what is not fused.

    Args:
        trainer: made with ``optimizers=(fused.optimizer, ...)``, before ``train()``.
        fused: from :func:`fuse_for_trainer`, or from ``fuse``.

    Raises:
        ValueError: the Trainer has another optimizer, would clip a second time, or accumulates
            another number of micro-batches.
    """
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer is not fused.optimizer:
        raise ValueError(
            f"the Trainer's optimizer is {type(optimizer).__name__}, not that of the fused model: "
            "Trainer(..., optimizers=(fused.optimizer, None))"
        )
    callback = FusedCallback(fused)
    callback.check(trainer.args)
    # Before the callbacks that report to files and services, which read the same dict.
    trainer.callback_handler.callbacks.insert(0, callback)


class FusedCallback(TrainerCallback):
    """What :func:`connect` adds: checks when training begins, and the norm in every log."""

    def __init__(self, fused: Fused) -> None:
        """Hold the fused model."""
        self.fused = fused

    def check(self, args: TrainingArguments) -> None:
        """Raise ``ValueError`` where a Trainer with these arguments would train something else."""
        _check_arguments(args)
        engine = self.fused.engine
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm}: the Trainer would clip the gradients of what "
                "is not fused by their own norm. Call fuse_for_trainer(model, args), or "
                "fuse(max_norm=...) with TrainingArguments(max_grad_norm=0)."
            )
        if args.gradient_accumulation_steps != engine.micro_batches:
            raise ValueError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}, but the model "
                f"was fused with micro_batches={engine.micro_batches}; they must be equal"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check again: arguments may have changed since :func:`connect`."""
        self.check(args)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Put the norm before clipping in place of the Trainer's, or none where none was taken."""
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None and "grad_norm" in entry:
                norm = self.fused.optimizer.last_grad_norm
                del entry["grad_norm"]
                if norm is not None:
                    entry["grad_norm"] = float(norm)


def _check_arguments(args: TrainingArguments) -> None:
    """Refuse what no fused model can do."""
    refused = (
        (args.fp16, "fp16=True", "its loss scale needs gradients that FORGE does not make; bf16"),
        (args.n_gpu > 1, f"n_gpu={args.n_gpu}", "DataParallel copies the model; one visible GPU"),
        (args.world_size > 1, f"world_size={args.world_size}", "one process"),
        (bool(args.deepspeed), "deepspeed", "no deepspeed"),
        (bool(args.fsdp), f"fsdp={args.fsdp!r}", "no fsdp"),
    )
    for holds, what, instead in refused:
        if holds:
            raise ValueError(f"TrainingArguments with {what} cannot train a fused model: {instead}")


def _decay_groups(model: torch.nn.Module, rule: Rule) -> list[dict[str, Any]]:
    """The Trainer's two groups: with the rule's weight decay, and without."""
    # An instance method that reads nothing of the instance.
    names = set(Trainer.get_decay_parameter_names(None, model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in names]},
        {"params": [p for name, p in trained if name not in names], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
