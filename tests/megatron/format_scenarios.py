"""Every weight format with every state format under every schedule, against stock."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

from gpt import Case, Run
from registry import close, scenario, tp

_STATES = ("fp32", "bf16", "q8")
_WEIGHTS = ("fp32", "bf16", "bf16+16", "bf16+fp32")
_LOSS = {"fp32": 1e-5, "bf16": 1e-3}
"""How far losses may be from stock's, which fall by 0.02 and more: exact formats, rounded ones."""


def _follow(case: Case) -> None:
    expected, _ = Run(case.stock()).train()
    assert expected[0] - expected[-1] > 0.02
    for state in _STATES:
        run = Run(replace(case, state_format=state))
        losses, _ = run.train()
        exact = case.weight_format == "fp32" and state == "fp32"
        close(losses, expected, _LOSS["fp32" if exact else "bf16"])
        for layer in run.fused.layers:
            assert set(layer.fused.linear.state_formats) == {state}


@scenario(1, 2)
def every_format_under_every_schedule_follows_stock(_: Path) -> None:
    clipped = Case(steps=3, clip_grad=1.0, micro_batches=2, sequence_parallel=tp() > 1)
    cases = {
        "immediate": replace(clipped, clip_grad=0.0, micro_batches=1),
        "deferred": clipped,
        "accumulate": clipped,
    }
    for weight, (schedule, case) in product(_WEIGHTS, cases.items()):
        _follow(replace(case, bf16=weight != "fp32", weight_format=weight, schedule=schedule))
    if tp() > 1:
        for schedule, case in cases.items():
            _follow(replace(case, schedule=schedule, sequence_parallel=False))
