"""The list of scenarios, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from gpt import Run
from megatron.core import dist_checkpointing, parallel_state

SCENARIOS: dict[str, tuple[tuple[int, ...], Callable[[Path], None]]] = {}


def scenario(*worlds: int) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a function under its name for these world sizes."""

    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        SCENARIOS[function.__name__] = (worlds, function)
        return function

    return register


def tp() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


def close(ours: list[float], theirs: list[float], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert abs(mine - other) <= tolerance, (ours, theirs)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def states(run: Run) -> dict[str, torch.Tensor]:
    assert run.fused is not None
    return {
        f"{layer.name}.{name}": tensor.clone()
        for layer in run.fused.layers
        for name, tensor in layer.raw().items()
    }


METADATA: dict[str, object] = {"chained_optim_avoid_prefix": True}


def save(run: Run, folder: Path, metadata: dict[str, object] = METADATA) -> None:
    """Write model, optimizer and scheduler with dist_checkpointing; collective."""
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    model = run.model.sharded_state_dict()
    optimizer = run.optimizer.sharded_state_dict(model, metadata=metadata)
    state = {"model": model, "optimizer": optimizer, "step": run.step}
    dist_checkpointing.save({**state, "scheduler": run.scheduler.state_dict()}, str(folder))
    torch.distributed.barrier()


def load(run: Run, folder: Path, metadata: dict[str, object] = METADATA) -> None:
    """Load into a freshly built run; collective."""
    model = run.model.sharded_state_dict()
    optimizer = run.optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)
    state = dist_checkpointing.load({"model": model, "optimizer": optimizer}, str(folder))
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    run.step = state["step"]
