"""The ways to train one model that ``llama_step.py`` compares, each behind the same ``step``.

A method is named ``adamw_fused``, ``flashoptim_release:bf16/q8`` or
``forge:bf16+16/q8:deferred:clip:graph``: who updates, formats of weights and states, schedule, and
whether the global norm is clipped and the step replayed from a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

BETAS, EPS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 1e-8, 0.1, 1.0
FORGE_FORMATS = (
    ("bf16", "bf16"),
    ("bf16", "q8"),
    ("bf16+16", "q8"),
    ("bf16", "fp32"),
    ("bf16+16", "fp32"),
)
FLASHOPTIM_BITS: dict[str, int | None] = {"bf16": None, "bf16+8": 24, "bf16+16": 32}
REFERENCES = ("adamw_fused", "adamw_fused:clip")
"""What the others are held against; measured in every run."""


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        kind: ``frozen``: no weight gradient and no update, what forward and backward take without;
            ``adamw``, ``adamw_foreach``, ``adamw_fused``: torch's after the backward;
            ``adamw_in_backward``: torch's fused one in a hook on each gradient;
            ``flashoptim_release``: FlashOptim's with gradient release; ``forge``.
        weight_format: ``bf16``; ``bf16+8``, ``bf16+16``: with 8 or 16 more bits beside it.
        state_format: ``bf16``, ``fp32``, ``q8``.
        schedule: ``step``: after the backward, from stored gradients; ``immediate``: inside the
            backward; ``deferred``: at the step, from factors.
        clip: by the global norm over all parameters.
        graph: the whole step is one CUDA graph.
        rest: for FORGE: who updates embeddings and norms. ``forge``: what ``fuse`` does by itself;
            ``torch``: torch's fused AdamW, whose gradients are in no norm of FORGE's.
    """

    kind: str
    weight_format: str = "bf16"
    state_format: str = "bf16"
    schedule: str = "step"
    clip: bool = False
    graph: bool = False
    rest: str = "forge"

    def __str__(self) -> str:
        """The name on the command line; torch's formats and schedules are given by the kind."""
        words = [self.kind]
        if self.kind in ("flashoptim_release", "forge"):
            words.append(f"{self.weight_format}/{self.state_format}")
        if self.kind == "forge":
            words.append(self.schedule)
        words += [flag for flag in ("clip", "graph") if getattr(self, flag)]
        words += [] if self.rest == "forge" else [f"rest-{self.rest}"]
        return ":".join(words)


def all_methods() -> list[Method]:
    """Every method, what the targets ask about first."""
    fused, hooks = Method("adamw_fused"), Method("adamw_in_backward", schedule="immediate")
    immediate = [Method("forge", w, s, "immediate") for w, s in FORGE_FORMATS]
    deferred = [Method("forge", w, s, "deferred") for w, s in FORGE_FORMATS]
    clipped = [replace(method, clip=True) for method in deferred]
    flash = [Method("flashoptim_release", weight, "q8", "immediate") for weight in FLASHOPTIM_BITS]
    return [
        fused,
        replace(fused, clip=True),
        *immediate[:3],
        clipped[0],
        Method("frozen"),
        replace(immediate[0], graph=True),
        replace(fused, graph=True),
        *flash,
        hooks,
        deferred[0],
        *clipped[1:3],
        Method("adamw_foreach"),
        Method("adamw"),
        *(replace(method, rest="torch") for method in immediate[:3]),
        *deferred[1:3],
        *(replace(method, graph=True) for method in (immediate[1], clipped[0])),
        *immediate[3:],
        *deferred[3:],
        *clipped[3:],
    ]


def select(patterns: list[str]) -> list[Method]:
    """The methods that any of the patterns names; ``*`` stands for anything.

    Raises:
        ValueError: a pattern names none; the message lists the methods.
    """
    methods = all_methods()
    names = [str(method) for method in methods]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--methods: {pattern!r} names none of {', '.join(names)}")
    return [m for m in methods if any(fnmatchcase(str(m), pattern) for pattern in patterns)]


Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CAPTURE_WARM_UP = 3


class Training:
    """A model with a method's optimizer.

    Args:
        method: as above.
        model: takes ids and labels, returns the loss; it is trained in place.
        lr: learning rate.

    Raises:
        ValueError: the method is not known, or clips where its updates come too early.
        ImportError: a package is missing.
    """

    def __init__(self, method: Method, model: nn.Module, lr: float) -> None:
        self.method, self.model, self.lr = method, model, lr
        if method.clip and method.schedule == "immediate":
            raise ValueError(f"{method}: updates inside the backward come before the norm is known")
        make = {
            "frozen": _frozen,
            "adamw": _torch_adamw,
            "adamw_foreach": _torch_adamw,
            "adamw_fused": _torch_adamw,
            "adamw_in_backward": _in_backward,
            "flashoptim_release": _flashoptim,
            "forge": _forge,
        }.get(method.kind)
        if make is None:
            raise ValueError(f"kind={method.kind!r} of a method is not known")
        clip_here = method.clip and method.kind != "forge"
        self._clipped = list(model.parameters()) if clip_here else []
        # What works in hooks has nothing left to do at the step, but has to stay alive.
        self.optimizers, self._kept = make(method, model, _options(lr))

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Forward, backward, clipping, update; returns the detached loss, not waited for.

        Args:
            ids: ``[batch, tokens]``.
            labels: ``[batch, tokens]``, the ids' successors.
        """
        loss = self.model(ids, labels)
        loss.backward()
        if self._clipped:
            nn.utils.clip_grad_norm_(self._clipped, MAX_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def captured(self, ids: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Make a CUDA graph of :meth:`step` on these tensors, after some steps as they are.

        Returns:
            A function that replays it and returns the graph's loss tensor.

        Raises:
            RuntimeError: the step waits for the device, or does something else no graph can hold.
        """
        if self.method.kind != "forge":
            return _captured(self.step, ids, labels)
        import forge_train

        step = forge_train.capture(self.step, self.optimizers[0], warmup=CAPTURE_WARM_UP)
        for _ in range(CAPTURE_WARM_UP + 1):
            step(ids, labels)
        return lambda: step(ids, labels)


Options = dict[str, Any]
Made = tuple[list[Any], Any]
"""Optimizers to step, and what else must not be collected."""


def _options(lr: float) -> Options:
    return {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


def _adamw(
    method: Method, parameters: list[nn.Parameter], options: Options, **kind: bool
) -> torch.optim.AdamW:
    # Torch refuses to step in a capture without `capturable`.
    return torch.optim.AdamW(parameters, **options, **kind, capturable=method.graph)


def _torch_adamw(method: Method, model: nn.Module, options: Options) -> Made:
    foreach, fused = method.kind == "adamw_foreach", method.kind == "adamw_fused"
    parameters = list(model.parameters())
    return [_adamw(method, parameters, options, foreach=foreach, fused=fused)], None


def _frozen(method: Method, model: nn.Module, options: Options) -> Made:
    model.requires_grad_(False)
    # Every dX is computed all the same, down to the first layer's, which the embedding would want.
    embedding = model.get_submodule("model.embed_tokens")
    hook = embedding.register_forward_hook(lambda _module, _ids, found: found.requires_grad_())
    return [], hook


def _in_backward(method: Method, model: nn.Module, options: Options) -> Made:
    def hook_of(optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
        def update(_parameter: torch.Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return update

    for parameter in model.parameters():
        optimizer = _adamw(method, [parameter], options, fused=True)
        parameter.register_post_accumulate_grad_hook(hook_of(optimizer))
    return [], None


def _flashoptim(method: Method, model: nn.Module, options: Options) -> Made:
    try:
        import flashoptim
    except ImportError as error:
        raise ImportError(f"{method}: pip install flashoptim ({error})") from error
    optimizer = flashoptim.FlashAdamW(
        model.parameters(), **options, master_weight_bits=FLASHOPTIM_BITS[method.weight_format]
    )
    # The hooks step, and let go of each gradient; step and zero_grad do nothing then. They refer to
    # the optimizer weakly: without the handle no weight would be updated, and nothing would say so.
    return [], flashoptim.enable_gradient_release(model, optimizer)


def _forge(method: Method, model: nn.Module, options: Options) -> Made:
    import forge_train

    if method.rest == "torch" and method.clip:
        raise ValueError(f"{method}: what torch updates would be left out of the norm")
    # Only where it is asked for: numbers that stay on the device are another way through a step.
    capturable = {"capturable": True} if method.graph else {}
    fused = forge_train.fuse(
        model,
        forge_train.AdamW(**options),
        weight_format=method.weight_format,
        state_format=method.state_format,
        schedule=method.schedule,
        max_norm=MAX_NORM if method.clip else None,
        rest=method.rest == "forge",
        rest_state_format=method.state_format,
        **capturable,
    )
    if method.rest == "forge":
        return [fused.optimizer], fused
    linears = {weight.parameter for weight in fused.engine.fused}
    left = [parameter for parameter in model.parameters() if parameter not in linears]
    return [fused.optimizer, _adamw(method, left, options, fused=True)], fused


def _captured(step: Step, ids: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The step on these tensors as a CUDA graph; called, it replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARM_UP):
            step(ids, labels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(ids, labels)

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay


def batches(
    tokens: list[int], vocabulary: int, device: torch.device, seed: int = 1
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """``(tokens, ids, labels)`` of one seeded sequence each: ``[1, tokens]`` int64."""
    for count in tokens:
        generator = torch.Generator("cpu").manual_seed(seed + count)
        ids = torch.randint(vocabulary, (1, count + 1), generator=generator).to(device)
        yield count, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
