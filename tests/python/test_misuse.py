"""Mistakes in a training script: each is a clear error before anything changes, or simply works."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from conftest import Transformer, assert_same_bits, mlp, mlp_batches, mlp_loss, tokens_loss, worst

import forge_train
from forge_train import SGD, AdamW
from forge_train._types import ArrayLayout

MORE_THAN_THERE_IS = 2**46


@pytest.mark.parametrize("allowed", [0, 1, 4])
def test_out_of_memory_in_fuse(monkeypatch, allowed):
    model = mlp()
    before, calls = copy.deepcopy(model), []
    zeros = ArrayLayout.zeros

    def scarce(self, device):
        calls.append(self)
        return zeros(self, device) if len(calls) <= allowed else torch.empty(MORE_THAN_THERE_IS)

    with monkeypatch.context() as patch:
        patch.setattr(ArrayLayout, "zeros", scarce)
        with pytest.raises(torch.OutOfMemoryError, match=r"(0|2|3)\.\w+: no memory on cpu.*q8"):
            forge_train.fuse(model, AdamW())
    assert len(calls) == allowed + 1
    assert type(model[0]) is type(model[3]) is torch.nn.Linear
    assert not model._load_state_dict_post_hooks
    assert_same_bits(model, before)
    assert len(forge_train.fuse(model, AdamW()).engine.fused) == 2


@pytest.mark.parametrize("schedule", ["immediate", "deferred"])
def test_out_of_memory_in_a_backward(monkeypatch, schedule):
    stock, model = mlp(), mlp()
    model.load_state_dict(stock.state_dict())
    fused = forge_train.fuse(model, SGD(lr=0.1), schedule=schedule)
    before, batch = copy.deepcopy(model), mlp_batches(1)[0]
    loss = mlp_loss(model, batch)
    empty = torch.empty
    with monkeypatch.context() as patch:
        # dX of the last layer, which is the first thing that its backward allocates.
        patch.setattr(torch, "empty_like", lambda *_a, **_k: empty(MORE_THAN_THERE_IS))
        with pytest.raises(RuntimeError, match="allocate memory"):
            loss.backward()
    assert_same_bits(model, before)
    del loss
    fused.optimizer.zero_grad()
    optimizer = torch.optim.SGD(stock.parameters(), lr=0.1)
    for net, each in ((model, fused.optimizer), (stock, optimizer)):
        mlp_loss(net, batch).backward()
        each.step()
    assert worst(model, stock) < 2e-6


def test_numbers_of_a_backward_that_failed_are_read_again(monkeypatch):
    model = mlp()
    fused = forge_train.fuse(model, SGD(lr=0.1), schedule="immediate")
    before, batch = copy.deepcopy(model), mlp_batches(1)[0]
    loss = mlp_loss(model, batch)
    with monkeypatch.context() as patch:
        empty = torch.empty
        patch.setattr(torch, "empty_like", lambda *_a, **_k: empty(MORE_THAN_THERE_IS))
        with pytest.raises(RuntimeError, match="allocate memory"):
            loss.backward()
    del loss
    fused.optimizer.zero_grad()
    fused.optimizer.param_groups[0]["lr"] = 0.0
    mlp_loss(model, batch).backward()
    fused.optimizer.step()
    assert_same_bits(model, before)


def test_out_of_memory_for_an_accumulator(monkeypatch):
    model = mlp()
    fused = forge_train.fuse(model, SGD(lr=0.1), schedule="accumulate", micro_batches=2)
    before, (first, second) = copy.deepcopy(model), mlp_batches(2, tokens=2)
    mlp_loss(model, first).backward()
    zeros = torch.zeros
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *_a, **_k: zeros(MORE_THAN_THERE_IS))
        with pytest.raises(RuntimeError, match="allocate memory"):
            mlp_loss(model, second).backward()
    assert_same_bits(model, before)
    fused.optimizer.zero_grad()
    fused.optimizer.step()
    assert_same_bits(model, before)


def test_a_tied_head_and_a_frozen_layer_train_as_in_torch():
    stock = Transformer()
    stock.head.weight = stock.embedding.weight
    stock.blocks[0].up.weight.requires_grad_(False)
    model = copy.deepcopy(stock)
    assert model.head.weight is model.embedding.weight
    fused = forge_train.fuse(model, SGD(lr=0.1), schedule="deferred", max_norm=1.0)
    notes = {row.name: row.note for row in fused.rows}
    assert "tied: one parameter under embedding.weight, head.weight" in notes["embedding.weight"]
    assert "frozen" in notes["blocks.0.up.weight"] and "head.weight" not in notes
    frozen = model.blocks[0].up.weight.clone()
    trained = [p for p in stock.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(5):
        tokens = torch.randint(0, 40, (2, 9))
        for net, each in ((stock, optimizer), (model, fused.optimizer)):
            each.zero_grad()
            tokens_loss(net, tokens).backward()
            if net is stock:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
            each.step()
    assert worst(model, stock) < 1e-5
    assert torch.equal(model.blocks[0].up.weight, frozen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_an_unsupported_dtype(dtype):
    model = mlp().to(dtype)
    with pytest.raises(ValueError, match=rf"0\.weight is {dtype}.*fp32 and bf16.*rest=False"):
        forge_train.fuse(model, AdamW())
    assert type(model[0]) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_an_input_of_another_dtype(dtype):
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="immediate")
    before = copy.deepcopy(model)
    message = rf"0\.weight is torch\.float32, but its input is {dtype}.*autocast"
    with pytest.raises(RuntimeError, match=message):
        model(torch.randn(3, 19, dtype=dtype))
    assert_same_bits(model, before)
    # The refused forward is no use.
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.optimizer.step()


def test_an_input_on_another_device():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="immediate")
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"0\.weight is on cpu, but its input is on meta: x\.to"):
        model(torch.randn(3, 19, device="meta"))
    assert_same_bits(model, before)
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.optimizer.step()


def test_a_parameter_on_another_device():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"1\.weight|meta"):
        forge_train.fuse(model, AdamW())
    assert type(model[0]) is torch.nn.Linear
    fused = forge_train.fuse(model, AdamW(), rest=False)
    assert [row.name for row in fused.rows if row.fused] == ["0.weight"]


@pytest.mark.parametrize("made", ["before", "after"])
def test_a_second_optimizer_of_the_same_weights(made):
    model = mlp()
    second = torch.optim.AdamW(model.parameters(), lr=0.1) if made == "before" else None
    fused = forge_train.fuse(model, SGD(lr=0.1), schedule="deferred")
    second = second or torch.optim.AdamW(model.parameters(), lr=0.1)
    mlp_loss(model, mlp_batches(1)[0]).backward()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"0\.weight is stepped by fused\.optimizer.*AdamW"):
        second.step()
    assert_same_bits(model, before) and not second.state
    fused.optimizer.step()
    # Free again after remove(), and after the fused optimizer's end.
    fused.remove()
    mlp_loss(model, mlp_batches(1)[0]).backward()
    second.step()


def test_an_optimizer_of_other_parameters_is_left_alone():
    model, other = mlp(), mlp()
    fused = forge_train.fuse(model, SGD(lr=0.1), rest=False, schedule="deferred")
    left = {row.name for row in fused.rows if not row.fused}
    rest = torch.optim.AdamW([p for name, p in model.named_parameters() if name in left], lr=0.1)
    elsewhere = torch.optim.AdamW(other.parameters())
    before = copy.deepcopy(model)
    mlp_loss(model, mlp_batches(1)[0]).backward()
    for optimizer in (fused.optimizer, rest, elsewhere):
        optimizer.step()
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(new, old)


def test_two_fused_optimizers_of_one_parameter():
    class Shared(torch.nn.Module):
        def __init__(self, norm: torch.nn.LayerNorm) -> None:
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(4, 4), norm

    norm = torch.nn.LayerNorm(4)
    first, second = Shared(norm), Shared(norm)
    fused = forge_train.fuse(first, SGD())
    with pytest.raises(ValueError, match=r"norm\.weight.*another fuse\(\)"):
        forge_train.fuse(second, SGD())
    assert type(second.linear) is torch.nn.Linear
    fused.remove()
    del fused
    gc.collect()
    assert len(forge_train.fuse(second, SGD()).engine.fused) == 1
