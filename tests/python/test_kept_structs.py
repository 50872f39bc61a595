"""What a call keeps for the next one is made again when what it was made from has changed."""

from __future__ import annotations

import torch

import forge_train
from forge_train import AdamW
from forge_train.native import Linear, LinearSpec, Segment


def _linear(name: str) -> tuple[Linear, torch.Tensor, Segment]:
    torch.manual_seed(0)
    linear = Linear(LinearSpec(8, 16, AdamW(lr=1e-2)), name=name)
    weight = torch.randn(8, 16)
    return linear, weight, Segment.of(torch.randn(4, 8), torch.randn(4, 16))


def _update(linear, storage, segment, step):
    scalars = linear.scalars(linear.spec.rule.options, step=step, seed=1)
    linear.update([segment], storage, scalars)


def test_a_state_that_was_exchanged_is_the_one_that_is_updated():
    linear, weight, segment = _linear("one")
    storage, want = linear.allocate(weight.clone()), linear.allocate(weight.clone())
    for step in (1, 2):
        _update(linear, want, segment, step)
    _update(linear, storage, segment, 1)
    before, storage.states[0] = storage.states[0], storage.states[0].clone()
    kept = before.clone()
    _update(linear, storage, segment, 2)
    assert torch.equal(before, kept)
    assert torch.equal(storage.states[0], want.states[0])
    assert torch.equal(storage.weight, want.weight)


def test_two_parameters_of_one_linear_take_turns():
    linear, weight, segment = _linear("one")
    first, second = linear.allocate(weight.clone()), linear.allocate(-weight)
    for step in (1, 2):
        _update(linear, first, segment, step)
        _update(linear, second, segment, step)
    other, _, _ = _linear("other")
    want = other.allocate(-weight)
    for step in (1, 2):
        _update(other, want, segment, step)
    assert torch.equal(second.weight, want.weight) and not torch.equal(first.weight, want.weight)


def test_betas_that_change_in_place_are_read_again():
    def trained(change):
        torch.manual_seed(2)
        model = torch.nn.Linear(8, 8, bias=False)
        fused = forge_train.fuse(model, AdamW(lr=1e-2), schedule="deferred")
        group = fused.optimizer.param_groups[0]
        group["betas"] = [0.9, 0.999]
        for step in range(3):
            if step == 2:
                change(group)
            model(torch.ones(2, 8)).square().sum().backward()
            fused.optimizer.step()
            fused.optimizer.zero_grad()
        return model.weight.detach()

    def in_place(group):
        group["betas"][0] = 0.5

    def exchange(group):
        group["betas"] = (0.5, 0.999)

    changed = trained(in_place)
    assert torch.equal(changed, trained(exchange))
    assert not torch.equal(changed, trained(lambda group: None))
