"""What one rank does from start to end: set up, resume, train, log, save, validate."""

from __future__ import annotations

import json
import logging
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from forge_train.demo import checkpoint, checkpoint_files, forge_hook, memory
from forge_train.demo.config import RunConfig
from forge_train.demo.data import SampleStream, build_datasets, prepare
from forge_train.demo.log import cut_log, read_log
from forge_train.demo.progress import Progress
from forge_train.demo.trainer import StepResult, Trainer, initialize_ranks
from forge_train.megatron import cpu

#: Sequences of the validation set that the final validation loss is averaged over.
VALIDATION_SEQUENCES = 64

#: The reported final training loss is the mean over this many last steps.
FINAL_STEPS = 20


def train_rank(run: RunConfig, rank: int, resume: bool, store: torch.distributed.Store) -> None:
    """Train one rank. Rank 0 writes ``log.jsonl``, ``memory.json`` and ``summary.json``."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    cpu.enable()
    initialize_ranks(run, rank, store)
    trainer = Trainer(run)
    if rank == 0:
        prepare(Path(run.out) / "data")
    torch.distributed.barrier()
    train_data, valid_data = build_datasets(run, prepare(Path(run.out) / "data"))
    stream = SampleStream(train_data, run)
    checkpoints = run.directory / "checkpoints"
    start = checkpoint_files.latest(checkpoints) if resume else None
    if start is not None:
        checkpoint.load(trainer, stream, start)
    if rank == 0:
        _announce(trainer, start)

    first_step = trainer.steps_done
    begin = time.perf_counter()
    with _log(run, rank, trainer.steps_done) as log:
        _train(trainer, stream, log, checkpoints)
    seconds = time.perf_counter() - begin

    validation = trainer.validate(
        SampleStream(valid_data, run), max(1, VALIDATION_SEQUENCES // run.micro_batch_size)
    )
    unsaved = trainer.steps_done > first_step and run.steps % max(1, run.save_interval)
    if run.save_interval and unsaved:
        checkpoint.save(trainer, stream, checkpoints)
    # Last, as it trains one more step: what it does must not reach a checkpoint or the log.
    measured = memory.measure(trainer, stream)
    if rank == 0:
        _summarise(trainer, validation, seconds, measured)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def parameter_count(trainer: Trainer) -> int:
    """Parameters of this rank's shard."""
    return sum(parameter.numel() for parameter in trainer.module.parameters())


def _announce(trainer: Trainer, start: Path | None) -> None:
    run = trainer.run
    parallel = f"TP={run.tp}"
    if trainer.module.config.sequence_parallel:
        parallel += " + sequence parallel"
    print(
        f"{'stock Megatron' if run.stock else 'FORGE'}: "
        f"{parameter_count(trainer) / 1e6:.1f} M parameters per rank, {parallel}, "
        f"{run.tokens_per_step} tokens per step, {run.rule}, weights {run.weight_format}, "
        f"{_device_name()}, {torch.get_num_threads()} thread(s) per rank"
    )
    if trainer.fused is not None:
        print(trainer.fused.summary())
        if hint := forge_hook.hint(trainer.fused):
            print(hint)
    if start is not None:
        print(f"resumed from {start} (step {trainer.steps_done})")
    sys.stdout.flush()


def _train(trainer: Trainer, stream: SampleStream, log: TextIO | None, checkpoints: Path) -> None:
    """Step until ``run.steps``; every rank saves, the one with a log reports."""
    run = trainer.run
    label = "stock" if run.stock else "forge"
    with Progress(label, trainer.steps_done, run.steps, enabled=log is not None) as progress:
        while trainer.steps_done < run.steps:
            lr = trainer.lr
            begin = time.perf_counter()
            result = trainer.step(stream)
            seconds = time.perf_counter() - begin
            if log is not None:
                record = _record(trainer, result, lr, seconds)
                log.write(json.dumps(record) + "\n")
                log.flush()
                progress.advance(record)
            if run.save_interval and trainer.steps_done % run.save_interval == 0:
                checkpoint.save(trainer, stream, checkpoints)


def _record(trainer: Trainer, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
    """One line of the log. `memory_bytes` is this rank's peak so far: GPU memory, else resident."""
    return {
        "step": trainer.steps_done,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "skipped": result.skipped,
        "seconds": seconds,
        "tokens_per_second": trainer.run.tokens_per_step / seconds,
        "memory_bytes": peak_memory(),
    }


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def peak_memory() -> int:
    """This process's largest memory use so far, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def _log(run: RunConfig, rank: int, steps_done: int) -> Iterator[TextIO | None]:
    """Rank 0's ``log.jsonl``, cut back to the steps that the checkpoint holds."""
    if rank != 0:
        yield None
        return
    path = run.directory / "log.jsonl"
    cut_log(path, steps_done)
    with path.open("a") as log:
        yield log


def _summarise(
    trainer: Trainer, validation: float, seconds: float, measured: memory.Breakdown
) -> None:
    run = trainer.run
    records = read_log(run.directory / "log.jsonl")
    final = [record["loss"] for record in records[-FINAL_STEPS:]]
    summary = {
        "steps": run.steps,
        "parameters_per_rank": parameter_count(trainer),
        "device": _device_name(),
        "first_loss": records[0]["loss"],
        "final_loss": sum(final) / len(final),
        "final_loss_steps": len(final),
        "validation_loss": validation,
        "seconds_training": seconds,
        "tokens_per_second": run.tokens_per_step
        / statistics.median(record["seconds"] for record in records),
        "peak_memory_bytes": records[-1]["memory_bytes"],
        "memory": measured.as_dict(),
        "fused_gradient_bytes": None if run.stock else measured.fused_gradients,
    }
    (run.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"{'stock' if run.stock else 'FORGE'}: loss {summary['first_loss']:.3f} → "
        f"{summary['final_loss']:.3f} nats per byte (mean of the last {len(final)} steps), "
        f"validation {validation:.3f}, {seconds:.0f} s",
        flush=True,
    )
