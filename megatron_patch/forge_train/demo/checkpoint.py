"""Checkpoints of the whole training state, in Megatron's distributed format (``torch_dist``).

Weights and optimizer states are stored by their place in the unsharded model, so a run may resume
with another ``--tp``.
"""

from __future__ import annotations

import queue
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from forge_train.demo import checkpoint_files
from forge_train.demo.data import SampleStream
from forge_train.demo.trainer import Trainer

#: Optimizer states keep the names that a single, unchained optimizer would give them.
_METADATA = {"chained_optim_avoid_prefix": True}


def _rng_state() -> dict[str, Any]:
    """Every random-number generator that training could draw from, of this rank."""
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _state(trainer: Trainer, loading: bool, with_rng: bool) -> dict[str, Any]:
    """The sharded state dict: what to save, or the template to load into."""
    model = trainer.module.sharded_state_dict()
    state = {
        "model": model,
        "optimizer": trainer.optimizer.sharded_state_dict(
            model, is_loading=loading, metadata=_METADATA
        ),
        "scheduler": trainer.scheduler.state_dict(),
    }
    if with_rng:
        # One object per TP rank, apart from the rest: another TP size or
        # device simply leaves them unread.
        tp = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        state["rng"] = ShardedObject("rng", _rng_state(), (tp,), (rank,), replica_id=0)
    return state


def _results_in_this_process() -> None:
    """Let Megatron hand a synchronous save's results over in memory.

    Its own queue lives in a server process, which takes seconds to start and, when the rank is
    killed, stays for ever. Synchronous saves write in threads of this process.
    """
    if getattr(filesystem_async, "_results_queue", filesystem_async) is None:
        filesystem_async._results_queue = queue.Queue()


def save(trainer: Trainer, stream: SampleStream, folder: Path) -> None:
    """Write a checkpoint of the current step; collective."""
    _results_in_this_process()
    rank = torch.distributed.get_rank()
    if rank == 0:
        checkpoint_files.begin(folder, trainer.steps_done)
    torch.distributed.barrier()
    state = _state(trainer, loading=False, with_rng=True)
    state["steps_done"] = trainer.steps_done
    state["samples_consumed"] = stream.consumed
    state["tp"] = trainer.run.tp
    state["device"] = trainer.run.device
    dist_checkpointing.save(state, str(checkpoint_files.scratch(folder, trainer.steps_done)))
    torch.distributed.barrier()
    if rank == 0:
        checkpoint_files.publish(folder, trainer.steps_done)
    torch.distributed.barrier()


def load(trainer: Trainer, stream: SampleStream, checkpoint: Path) -> None:
    """Bring a freshly built trainer to the state that was saved; collective."""
    saved = dist_checkpointing.load_common_state_dict(str(checkpoint))
    # A GPU's generators have another kind of state than the CPU's.
    same_ranks = (saved["tp"], saved.get("device", "cpu")) == (trainer.run.tp, trainer.run.device)
    state = dist_checkpointing.load(
        _state(trainer, loading=True, with_rng=same_ranks), str(checkpoint)
    )
    trainer.module.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    trainer.steps_done = state["steps_done"]
    stream.consumed = state["samples_consumed"]
    if same_ranks:
        _set_rng_state(state["rng"])
    # Else the generators stay as seeded: this model has no dropout, nothing draws from them.
