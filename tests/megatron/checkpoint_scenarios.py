"""Saving, resuming, resharding, and exchanging checkpoints with stock Megatron."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpt import Case, Run
from registry import close, equal, load, save, scenario, states, tp

_FORMATS = {
    "fp32": Case(clip_grad=1.0, micro_batches=2),
    "bf16+16-fp32": Case(bf16=True, weight_format="bf16+16", clip_grad=1.0),
    "bf16-bf16": Case(bf16=True, weight_format="bf16", state_format="bf16"),
    "bf16+16-q8": Case(bf16=True, weight_format="bf16+16", state_format="q8", clip_grad=1.0),
}


@scenario(1, 2)
def a_resumed_run_is_the_same_run_bit_for_bit(tmp: Path) -> None:
    for name, case in _FORMATS.items():
        whole = Run(case)
        whole.train(2)
        save(whole, tmp / f"resume-{name}-{tp()}")
        expected = whole.train(3)
        resumed = Run(case, seed=99)
        load(resumed, tmp / f"resume-{name}-{tp()}")
        assert resumed.train(3) == expected, name
        equal(resumed.weights(), whole.weights())
        equal(states(resumed), states(whole))


@scenario(1)
def the_local_state_dict_restores_every_bit(_: Path) -> None:
    case = _FORMATS["bf16+16-q8"]
    whole = Run(case)
    whole.train(2)
    weights, state = whole.weights(), whole.optimizer.state_dict()
    state = from_file(state)
    scheduler = whole.scheduler.state_dict()
    expected = whole.train(2)
    resumed = Run(case, seed=99)
    resumed.model.load_state_dict(weights, strict=False)
    resumed.optimizer.load_state_dict(state)
    resumed.scheduler.load_state_dict(scheduler)
    resumed.step = 2
    assert resumed.train(2) == expected


def from_file(state: object) -> object:
    """A deep copy that clones tensors, as a file would."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@scenario(1, 2)
def stock_checkpoints_continue_under_forge_and_back(tmp: Path) -> None:
    for name, tolerance in (("fp32", 1e-5), ("bf16+16-fp32", 2e-3)):
        case = _FORMATS[name]
        for source, target in ((case.stock(), case), (case, case.stock())):
            first = Run(source)
            first.train(2)
            folder = tmp / f"swap-{name}-{tp()}-{source.forge}"
            save(first, folder)
            losses, norms = first.train(3)
            second = Run(target, seed=99)
            load(second, folder)
            theirs = second.train(3)
            close(theirs[0], losses, tolerance)
            close(theirs[1], norms, 3 * tolerance)


@scenario(2)
def write_checkpoints_for_another_tp(tmp: Path) -> None:
    for name, case in _FORMATS.items():
        run = Run(replace(case, sequence_parallel=True))
        run.train(2)
        folder = tmp / f"reshard-{name}"
        save(run, folder)
        losses, _norms = run.train(3)
        if torch.distributed.get_rank() == 0:
            (tmp / f"reshard-{name}.json").write_text(json.dumps(losses))


@scenario(1)
def checkpoints_of_tp2_continue_at_tp1(tmp: Path) -> None:
    tolerances = {"fp32": 1e-5, "bf16+16-fp32": 3e-3, "bf16-bf16": 1e-2, "bf16+16-q8": 1e-2}
    for name, case in _FORMATS.items():
        run = Run(case, seed=99)
        load(run, tmp / f"reshard-{name}")
        losses, _norms = run.train(3)
        close(losses, json.loads((tmp / f"reshard-{name}.json").read_text()), tolerances[name])


@scenario(1)
def a_checkpoint_of_another_rule_is_refused(tmp: Path) -> None:
    run = Run(Case())
    run.train(2)
    save(run, tmp / "rule")
    other = Run(Case(rule="adam"))
    with pytest.raises(ValueError, match="written with rule 'adamw'"):
        load(other, tmp / "rule")
