"""Where two features meet: autocast and ranks, replays and reports, checkpoints and open steps."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import mlp, mlp_batches, mlp_loss

import forge_train
from forge_train import AdamW, fused_linear
from forge_train._comm import Place
from forge_train._context import default_context
from forge_train.engine import Engine
from forge_train.native import Linear, LinearSpec
from forge_train.weights import FusedWeight


def _step(model, fused, batch):
    mlp_loss(model, batch).backward()
    fused.optimizer.step()
    fused.optimizer.zero_grad()


def test_autocast_of_a_shard_is_refused_before_anything_is_computed():
    context = default_context("cpu")
    spec = LinearSpec(16, 8, AdamW(), parallel="column", reduce_dgrad=True)
    linear = Linear(spec, name="layer", comm=Place(context, 0, 2))
    weight = FusedWeight("layer", torch.nn.Parameter(torch.randn(8, 8)), linear)
    engine = Engine(schedule="deferred")
    engine.add([weight])
    x = torch.randn(4, 8, requires_grad=True)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"layer: torch\.autocast is not supported under tensor"),
    ):
        fused_linear(x, weight)
    assert not weight.uses


def test_a_report_is_that_of_the_latest_replay():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred", capturable=True)
    _step(model, fused, mlp_batches(1)[0])
    weight, engine = fused.engine.weights[0], fused.engine
    before = weight.report
    # A replay writes the rows without any of Python's calls.
    engine.reports._structs.rows.view(torch.float64)[:, 3].fill_(7.0)
    assert weight.report == before
    engine.replayed(1)
    assert weight.report.sum_of_squares == 7.0


@pytest.mark.parametrize("schedule", ["immediate", "deferred"])
def test_a_checkpoint_that_is_loaded_within_a_step_keeps_its_count(schedule):
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule=schedule)
    batches = mlp_batches(4)
    for batch in batches[:2]:
        _step(model, fused, batch)
    saved = fused.optimizer.state_dict()
    mlp_loss(model, batches[2]).backward()
    fused.optimizer.load_state_dict(saved)
    weights = fused.engine.fused
    assert {weight.step for weight in weights} == {2}
    if schedule == "deferred":
        fused.optimizer.zero_grad()
    fused.optimizer.step()
    assert {weight.step for weight in weights} == {2}
    _step(model, fused, batches[3])
    assert {weight.step for weight in weights} == {3}


def test_an_optimizer_around_the_fused_one_may_step():
    class Around(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner
            super().__init__(inner.param_groups, {})

        def step(self, closure=None):
            self.inner.step()

    model = mlp()
    fused = forge_train.fuse(model, AdamW())
    around = Around(fused.optimizer)
    before = next(model.parameters()).detach().clone()
    mlp_loss(model, mlp_batches(1)[0]).backward()
    around.step()
    assert not torch.equal(before, next(model.parameters()))


def test_a_model_that_is_dropped_is_freed():
    model = mlp()
    fused = forge_train.fuse(model, AdamW())
    _step(model, fused, mlp_batches(1)[0])
    alive = [weakref.ref(weight) for weight in fused.engine.fused]
    assert alive
    del model, fused
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_a_captured_input_that_requires_a_gradient_is_refused():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), capturable=True)
    step = forge_train.capture(lambda x: x, fused.optimizer)
    with pytest.raises(ValueError, match="input 0 requires a gradient"):
        step(torch.ones(2, requires_grad=True))
