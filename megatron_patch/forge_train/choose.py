"""Which parameters of a model can be fused, and why the others cannot."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import torch

from .linear_function import FusedTorchLinear

DTYPE_OF_FORMAT = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16+fp32": torch.bfloat16,
    "bf16+16": torch.bfloat16,
}
AUTO_FORMAT = {torch.float32: "fp32", torch.bfloat16: "bf16+16"}


@dataclass(frozen=True)
class Choice:
    """One parameter and what is to become of it.

    Attributes:
        name: its first name in the model.
        parameter: itself.
        module: the linear to fuse; None if it is left to ordinary gradients.
        why: the reason it is left; empty where it is fused.
    """

    name: str
    parameter: torch.nn.Parameter
    module: torch.nn.Linear | None
    why: str


@dataclass(frozen=True)
class Place:
    """One of the places in which a parameter is registered."""

    name: str
    module: torch.nn.Module
    local: str


def places_of(model: torch.nn.Module) -> dict[torch.nn.Parameter, list[Place]]:
    """Every place of each parameter, in the order of ``model.parameters()``."""
    places: dict[torch.nn.Parameter, list[Place]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{local}" if prefix else local
                places.setdefault(parameter, []).append(Place(name, module, local))
    return places


def choose(
    model: torch.nn.Module,
    covered: Container[torch.nn.Parameter],
    exclude: Iterable[str],
    weight_format: str,
    replicas: int = 1,
) -> list[Choice]:
    """Decide for every parameter of a model.

    Args:
        model: nothing in it is changed.
        covered: the parameters that are in a param group.
        exclude: names of modules or parameters to leave alone.
        weight_format: as for ``fuse``.
        replicas: data-parallel ranks.

    Raises:
        ValueError: an unknown format, a model that is fused already, or a name in ``exclude``
            that is not in the model.
    """
    if weight_format != "auto" and weight_format not in DTYPE_OF_FORMAT:
        raise ValueError(
            f"weight_format={weight_format!r} is not known; choose one of auto, "
            f"{', '.join(DTYPE_OF_FORMAT)}"
        )
    for name, module in model.named_modules():
        if getattr(module, "_forge", None) is not None:
            raise ValueError(
                f"{name} is already fused; call remove() on what fuse() returned first"
            )
    places = places_of(model)
    excluded = tuple(exclude)
    for name in excluded:
        if not any(_below(place.name, (name,)) for found in places.values() for place in found):
            raise ValueError(
                f"exclude={name!r} is neither a parameter nor a module with parameters; names are "
                "those of model.named_modules()"
            )
    choices = []
    for parameter, found in places.items():
        linear = next((p.module for p in found if _is_linear_weight(p)), None)
        if isinstance(linear, torch.nn.Linear):
            why = _why_not_fused(linear, found, excluded, covered, weight_format)
            if not why and linear.out_features % replicas:
                why = f"{linear.out_features} rows do not divide by {replicas} data-parallel ranks"
        else:
            why = _why_ordinary(found[0], parameter)
        module = linear if isinstance(linear, torch.nn.Linear) and not why else None
        choices.append(Choice(found[0].name, parameter, module, why))
    return choices


def _below(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a parameter's name is one of the names or below one of them."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _is_linear_weight(place: Place) -> bool:
    return place.local == "weight" and isinstance(place.module, torch.nn.Linear)


def _why_not_fused(
    module: torch.nn.Linear,
    found: Sequence[Place],
    excluded: Sequence[str],
    covered: Container[torch.nn.Parameter],
    weight_format: str,
) -> str:
    """Why a linear's weight keeps its gradient; empty if it can be fused."""
    weight = module.weight
    want = DTYPE_OF_FORMAT.get(weight_format, weight.dtype)
    hooks = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    reasons = (
        (any(_below(place.name, excluded) for place in found), "excluded by the caller"),
        (not weight.requires_grad, "frozen (requires_grad is False)"),
        (len(found) > 1, f"tied: one parameter under {', '.join(p.name for p in found)}"),
        (weight not in covered, "in no param group"),
        (
            type(module) not in (torch.nn.Linear, FusedTorchLinear),
            f"{type(module).__name__} may use its weight outside torch.nn.Linear.forward",
        ),
        ("forward" in vars(module), "forward is replaced on the instance"),
        (bool(hooks), "a hook on the weight wants its gradient"),
        (weight.dtype not in AUTO_FORMAT, f"{weight.dtype} is not supported"),
        (
            weight.dtype != want,
            f"weight_format={weight_format!r} needs {want}, it is {weight.dtype}",
        ),
        (
            weight.device.type not in ("cpu", "cuda"),
            f"on {weight.device}, FORGE computes on CPUs and NVIDIA GPUs",
        ),
        (not weight.is_contiguous(), "not contiguous"),
        (weight.numel() == 0, "empty"),
    )
    return next((reason for holds, reason in reasons if holds), "")


def _why_ordinary(place: Place, parameter: torch.nn.Parameter) -> str:
    """Why a parameter that is no linear's weight has an ordinary gradient."""
    if not parameter.requires_grad:
        return "frozen (requires_grad is False)"
    if place.local == "bias":
        return "bias"
    if isinstance(place.module, torch.nn.Embedding | torch.nn.EmbeddingBag):
        return "embedding"
    return f"not the weight of a torch.nn.Linear but of a {type(place.module).__name__}"
