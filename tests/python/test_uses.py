"""Weights used more than once, recomputed, abandoned or used elsewhere."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from conftest import assert_same_bits, mlp, mlp_batches, mlp_loss, worst
from torch.utils.checkpoint import checkpoint

import forge_train
from forge_train import SGD, AdamW


class Twice(torch.nn.Module):
    """One linear used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = torch.nn.Linear(9, 9), torch.nn.Linear(9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Checkpointed(torch.nn.Module):
    """Two linears, each in a checkpoint."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Tanh())
        self.second = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.first, x, use_reentrant=self.reentrant)
        return checkpoint(self.second, x, use_reentrant=self.reentrant)


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_immediate_refuses_a_second_use_before_any_update():
    model = Twice()
    forge_train.fuse(model, SGD(lr=0.1), schedule="immediate")
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"shared\.weight is used a second time.*deferred"):
        model(torch.randn(5, 9))
    assert_same_bits(model, before)


@pytest.mark.parametrize("schedule", ["deferred", "accumulate", "auto"])
def test_other_schedules_sum_all_uses(schedule):
    stock_model = Twice()
    model = copy.deepcopy(stock_model)
    fused = forge_train.fuse(model, SGD(lr=0.05), schedule=schedule)
    stock = torch.optim.SGD(stock_model.parameters(), lr=0.05)
    for _ in range(10):
        x = torch.randn(5, 9)
        step(stock_model, stock, x)
        step(model, fused.optimizer, x)
    assert worst(model, stock_model) < 2e-6


@pytest.mark.parametrize("schedule", ["immediate", "deferred", "accumulate", "auto"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_no_second_use(schedule, reentrant):
    stock_model = Checkpointed(reentrant)
    model = copy.deepcopy(stock_model)
    fused = forge_train.fuse(model, SGD(lr=0.05), schedule=schedule)
    stock = torch.optim.SGD(stock_model.parameters(), lr=0.05)
    for _ in range(10):
        x = torch.randn(5, 9, requires_grad=True)
        step(stock_model, stock, x)
        step(model, fused.optimizer, x)
    assert len(fused.engine.fused) == 2
    assert worst(model, stock_model) < 2e-6


class SharedInCheckpoints(torch.nn.Module):
    """The same block checkpointed twice."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.block = reentrant, torch.nn.Sequential(torch.nn.Linear(9, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def test_reuse_across_checkpoints_is_refused():
    x = torch.randn(5, 9, requires_grad=True)
    model = SharedInCheckpoints(reentrant=False)
    before = copy.deepcopy(model)
    forge_train.fuse(model, SGD(lr=0.1), schedule="immediate")
    with pytest.raises(RuntimeError, match="a second time"):
        model(x)
    assert_same_bits(model, before)
    # Reentrant checkpoints run their first forward under no_grad, where nothing can be counted.
    model = SharedInCheckpoints(reentrant=True)
    forge_train.fuse(model, SGD(lr=0.1), schedule="immediate")
    with pytest.raises(RuntimeError, match="several checkpointed segments"):
        model(x).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_deferred_takes_reuse_across_checkpoints(reentrant):
    stock_model = SharedInCheckpoints(reentrant)
    model = copy.deepcopy(stock_model)
    fused = forge_train.fuse(model, SGD(lr=0.05), schedule="deferred")
    stock = torch.optim.SGD(stock_model.parameters(), lr=0.05)
    for _ in range(5):
        x = torch.randn(5, 9, requires_grad=True)
        step(stock_model, stock, x)
        step(model, fused.optimizer, x)
    assert worst(model, stock_model) < 2e-6


def test_an_abandoned_graph_does_not_count():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="immediate")
    for batch in mlp_batches(3):
        mlp_loss(model, batch)  # never differentiated, and dropped at once
        gc.collect()
        fused.optimizer.zero_grad()
        mlp_loss(model, batch).backward()
        fused.optimizer.step()


def test_evaluation_does_not_count():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="immediate")
    batch = mlp_batches(1)[0]
    loss = mlp_loss(model, batch)
    with torch.no_grad():
        evaluated = mlp_loss(model, batch)
    assert torch.equal(loss, evaluated)
    loss.backward()
    fused.optimizer.step()


def test_immediate_refuses_a_second_backward_before_step():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="immediate")
    first, second = mlp_batches(2)
    mlp_loss(model, first).backward()
    after = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"second backward before optimizer\.step\(\).*deferred"):
        mlp_loss(model, second).backward()
    assert torch.equal(after[3].weight, model[3].weight)
    with pytest.raises(RuntimeError, match="zero_grad"):
        fused.optimizer.zero_grad()
    fused.optimizer.step()
    fused.optimizer.zero_grad()
    mlp_loss(model, second).backward()


def test_a_graph_older_than_the_weight_is_refused():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    first, second = mlp_batches(2)
    stale = mlp_loss(model, first)
    mlp_loss(model, second).backward()
    fused.optimizer.step()
    with pytest.raises(RuntimeError, match="updated after this graph's forward"):
        stale.backward()


def test_zero_grad_forgets_factors():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    before = copy.deepcopy(model)
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.optimizer.zero_grad()
    fused.optimizer.step()
    assert_same_bits(model, before)


def test_a_weight_used_outside_its_linear_is_refused():
    model = mlp()
    forge_train.fuse(model, AdamW(), schedule="deferred")
    loss = mlp_loss(model, mlp_batches(1)[0]) + model[0].weight.square().sum()
    with pytest.raises(RuntimeError, match=r"0\.weight got an ordinary gradient.*exclude"):
        loss.backward()
    assert model[0].weight.grad is None


def test_factors_written_in_place_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    before = copy.deepcopy(model)
    x = torch.randn(3, 4)
    model(x).square().sum().backward()
    x.zero_()
    with pytest.raises(RuntimeError, match=r"0\.weight.*in place"):
        fused.optimizer.step()
    assert_same_bits(model, before)


def test_freezing_after_fuse_stops_the_update():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred")
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.optimizer.step()
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[3].weight, before[3].weight)


def test_retain_graph_sums_under_deferred():
    stock_model = mlp()
    model = copy.deepcopy(stock_model)
    fused = forge_train.fuse(model, SGD(lr=0.05), schedule="deferred")
    stock = torch.optim.SGD(stock_model.parameters(), lr=0.05)
    for net in (stock_model, model):
        loss = mlp_loss(net, mlp_batches(1)[0])
        loss.backward(retain_graph=True)
        loss.backward()
    stock.step()
    fused.optimizer.step()
    assert worst(model, stock_model) < 2e-6


def test_double_backward_is_refused():
    model = mlp()
    forge_train.fuse(model, AdamW(), schedule="deferred")
    x = torch.randn(3, 19, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()
