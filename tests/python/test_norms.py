"""Norms of factors: by the backward that keeps them if they are all of a step, or by the step."""

from __future__ import annotations

import pytest
import torch

import forge_train
from forge_train import AdamW
from forge_train.native import Linear

STEPS = 3


class Model(torch.nn.Module):
    """Two linears, and a norm that is not fused."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.first, self.second = (torch.nn.Linear(24, 24, bias=False) for _ in range(2))
        self.norm = torch.nn.LayerNorm(24)

    def forward(self, x):
        return self.second(self.norm(self.first(x).relu()))


@pytest.fixture
def at_steps(monkeypatch):
    """Names of the layers whose norm a step computes."""
    names = []
    real = Linear.norm

    def norm(self, *arguments, **named):
        names.append(self.name)
        return real(self, *arguments, **named)

    monkeypatch.setattr(Linear, "norm", norm)
    return names


def _trained(micro_batches=1, backwards=1, early=True, monkeypatch=None, **options):
    model = Model()
    fused = forge_train.fuse(
        model, AdamW(lr=1e-2), micro_batches=micro_batches, **{"max_norm": 0.1, **options}
    )
    if not early:
        monkeypatch.setattr(type(fused.engine), "_normed_at_once", lambda *_: False)
    generator = torch.Generator().manual_seed(2)
    told = []
    for _ in range(STEPS):
        for _ in range(backwards):
            model(torch.randn(5, 24, generator=generator)).square().mean().backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
        told.append(fused.optimizer.last)
    return model, fused, told


def _same(ours, theirs):
    assert [last.norm for last in ours[2]] == [last.norm for last in theirs[2]]
    for left, right in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("max_norm", [0.1, None])
def test_the_backward_takes_the_norm_that_the_step_would(monkeypatch, at_steps, max_norm):
    ours = _trained(schedule="deferred", max_norm=max_norm)
    assert set(at_steps) == {"norm.weight", "norm.bias"}
    _same(
        ours, _trained(early=False, monkeypatch=monkeypatch, schedule="deferred", max_norm=max_norm)
    )
    assert at_steps.count("first.weight") == STEPS


def test_the_sum_over_all_takes_what_the_backward_has_taken(at_steps):
    model = Model()
    fused = forge_train.fuse(model, AdamW(lr=1e-2), schedule="deferred", max_norm=0.1)
    model(torch.ones(3, 24)).square().mean().backward()
    total, nonfinite = fused.engine.sum_of_squares()
    assert set(at_steps) == {"norm.weight", "norm.bias"} and nonfinite == ()
    fused.optimizer.step()
    assert fused.optimizer.last.norm == pytest.approx(total**0.5, rel=1e-12)


def test_a_second_backward_makes_the_first_norm_useless(monkeypatch, at_steps):
    ours = _trained(backwards=2, schedule="deferred")
    # The norm of both is the step's, and no backward takes one any more.
    assert at_steps.count("first.weight") == at_steps.count("second.weight") == STEPS
    assert all(weight.kept_more for weight in ours[1].engine.fused)
    _same(ours, _trained(backwards=2, early=False, monkeypatch=monkeypatch, schedule="deferred"))


def test_micro_batches_are_normed_by_the_step(at_steps):
    _trained(micro_batches=2, backwards=2, schedule="deferred")
    assert at_steps.count("first.weight") == STEPS


def test_nothing_is_normed_for_nobody(at_steps):
    _, fused, told = _trained(schedule="deferred", max_norm=None, check_finite=False)
    assert not at_steps and not fused.engine.norms._taken
    assert [last.norm for last in told] == [None] * STEPS


def test_a_layer_without_a_gradient_is_left_out():
    model = Model()
    fused = forge_train.fuse(model, AdamW(lr=1e-2), max_norm=0.1, schedule="deferred")
    norms = []
    for _ in range(2):
        model.second(torch.ones(3, 24)).square().mean().backward()
        want = torch.nn.functional.linear(torch.ones(3, 24), model.second.weight)
        want = torch.linalg.norm(2 * want.t() @ torch.ones(3, 24) / want.numel())
        fused.optimizer.step()
        fused.optimizer.zero_grad()
        norms.append(fused.optimizer.last.norm)
        assert norms[-1] == pytest.approx(want.item(), rel=1e-5)
    assert norms[0] != norms[1]


def test_rows_that_move_within_a_step_are_filled_again():
    norms = []
    for grows in (False, True):
        model = Model()
        fused = forge_train.fuse(model, AdamW(lr=1e-2), max_norm=0.1, schedule="deferred")
        model(torch.ones(3, 24)).square().mean().backward()
        if grows:
            # As if this weight had been added since the backward.
            del fused.engine.norms._rows[id(fused.engine.weights[1])]
        fused.optimizer.step()
        norms.append(fused.optimizer.last.norm)
    assert norms[0] == norms[1]


def test_a_discarded_backward_leaves_no_norm():
    model = Model()
    fused = forge_train.fuse(model, AdamW(lr=1e-2), max_norm=0.1, schedule="deferred")
    x = torch.ones(3, 24)
    model(x).square().mean().backward()
    fused.optimizer.zero_grad()
    model(x).square().mean().mul(4).backward()
    fused.optimizer.step()
    other = Model()
    forge_train.fuse(other, AdamW(lr=1e-2), max_norm=0.1, schedule="deferred")
    other(x).square().mean().mul(4).backward()
    weight = other.first.weight
    assert weight.grad is None
    want = _norm_of(other)
    assert fused.optimizer.last.norm == pytest.approx(want, rel=1e-5)


def _norm_of(model):
    plain = Model()
    plain.load_state_dict(model.state_dict())
    plain(torch.ones(3, 24)).square().mean().mul(4).backward()
    return torch.linalg.norm(torch.stack([p.grad.norm() for p in plain.parameters()])).item()
