"""What a finished run leaves for people: the plots, the comparison, the closing line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from forge_train.demo import plots
from forge_train.demo.config import RunConfig
from forge_train.demo.log import read_log

#: Optimizer states per parameter that stock Megatron keeps, in fp32.
_STOCK_STATES = {"sgd": 1, "adam": 2, "adamw": 2, "lion": 1}


def _summary(run: RunConfig) -> dict[str, Any]:
    return json.loads((run.directory / "summary.json").read_text())


def _stock(run: RunConfig) -> RunConfig:
    return dataclasses.replace(run, stock=True)


def computed_stock_memory(run: RunConfig) -> dict[str, int]:
    """What stock Megatron would hold on one rank, from the model's parameter count.

    Weights, fp32 gradients and fp32 states follow from the count; the activations are taken to be
    those measured in the FORGE run, which has the same model and batch.
    """
    summary = _summary(run)
    parameters = summary["parameters_per_rank"]
    weight_bytes = 2 + 4 if run.bf16 else 4  # a bf16 weight has an fp32 master copy
    return {
        "weights": weight_bytes * parameters,
        "gradients": 4 * parameters,
        "factors": 0,
        "states": 4 * _STOCK_STATES[run.rule] * parameters,
        "activations": summary["memory"]["activations"],
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}es"


def write_plots(run: RunConfig, compared: bool) -> list[Path]:
    """Draw ``loss.png`` and ``memory.png`` of a finished run into its folder."""
    summary, log = _summary(run), read_log(run.directory / "log.jsonl")
    kind = "stock" if run.stock else "FORGE"
    curves, bars = {f"{kind}, {run.rule}": log}, {f"{kind}\n(measured)": summary["memory"]}
    if compared:
        stock = _stock(run)
        curves = {
            f"stock Megatron, {run.rule}": read_log(stock.directory / "log.jsonl"),
            **curves,
        }
        bars = {"stock Megatron\n(measured)": _summary(stock)["memory"], **bars}
    elif not run.stock:
        bars = {"stock Megatron\n(computed)": computed_stock_memory(run), **bars}
    title = (
        f"{run.name}: {summary['parameters_per_rank'] / 1e6:.1f} M parameters per rank, TP={run.tp}"
        f"{' + SP' if run.sequence_parallel and run.tp > 1 else ''}, "
        f"{run.tokens_per_step} tokens per step in {_count(run.micro_batches, 'micro-batch')}\n"
        f"{run.rule}, weights {run.weight_format}, states {run.state_format}, "
        f"{'' if run.stock else f'schedule {run.schedule}, '}"
        f"clip {run.clip_grad:g}, {summary['device']}"
    )
    paths = [run.directory / "loss.png", run.directory / "memory.png"]
    plots.loss_plot(paths[0], title, curves)
    plots.memory_plot(paths[1], title, bars)
    return paths


def compare(run: RunConfig) -> dict[str, Any]:
    """Set a FORGE run beside the stock run of the same seed; writes ``compare.json``.

    Losses are compared in nats per byte, gradient norms relatively and where both runs have one.
    """
    stock = _stock(run)
    ours, theirs = (read_log(r.directory / "log.jsonl") for r in (run, stock))
    if len(ours) != len(theirs):
        raise RuntimeError(
            f"the runs in {run.directory} and {stock.directory} have {len(ours)} and "
            f"{len(theirs)} steps; run --compare again without --resume"
        )
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)]
    # NaN never compares as a maximum: a run that diverged must not look like a good match.
    worst = max(range(len(differences)), key=lambda i: _nan_is_infinite(differences[i]))
    norms = [
        abs(a["grad_norm"] - b["grad_norm"]) / max(abs(b["grad_norm"]), 1e-30)
        for a, b in zip(ours, theirs, strict=True)
        if a["grad_norm"] is not None and b["grad_norm"] is not None
    ]
    mine, its = _summary(run), _summary(stock)
    result = {
        "steps": len(ours),
        "max_abs_loss_difference": differences[worst],
        "at_step": ours[worst]["step"],
        "max_relative_grad_norm_difference": max(norms) if norms else None,
        "validation_loss": {
            "stock": its["validation_loss"],
            "forge": mine["validation_loss"],
        },
        "peak_bytes": {
            "stock": sum(its["memory"].values()),
            "forge": sum(mine["memory"].values()),
        },
        "gradient_bytes": {
            "stock": its["memory"]["gradients"],
            "forge": mine["memory"]["gradients"],
        },
        "tokens_per_second": {
            "stock": its["tokens_per_second"],
            "forge": mine["tokens_per_second"],
        },
    }
    (run.directory / "compare.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _nan_is_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def compare_line(result: dict[str, Any]) -> str:
    """The comparison in one line."""
    peak, speed = result["peak_bytes"], result["tokens_per_second"]
    return (
        f"compare: loss differs by at most {result['max_abs_loss_difference']:.2e} nats "
        f"(step {result['at_step']} of {result['steps']}); peak memory per rank "
        f"{peak['stock'] / 2**20:.1f} → {peak['forge'] / 2**20:.1f} MiB, of it gradients "
        f"{result['gradient_bytes']['stock'] / 2**20:.1f} → "
        f"{result['gradient_bytes']['forge'] / 2**20:.1f} MiB; "
        f"{speed['stock']:.0f} → {speed['forge']:.0f} tokens/s"
    )
