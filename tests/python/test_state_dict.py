"""Saving, loading, and exchange with torch.optim."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from conftest import assert_same_bits, mlp, mlp_batches, mlp_loss, worst

import forge_train
from forge_train import SGD, Adam, AdamW, Lion

RULES = [
    (AdamW(lr=1e-2), torch.optim.AdamW),
    (Adam(lr=1e-2, weight_decay=0.1), torch.optim.Adam),
    (SGD(lr=1e-2, momentum=0.9, dampening=0.2), torch.optim.SGD),
    (SGD(lr=1e-2), torch.optim.SGD),
]


def train(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        mlp_loss(model, batch).backward()
        optimizer.step()


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


FORMATS = [
    ("fp32", "fp32", torch.float32),
    ("fp32", "q8", torch.float32),
    ("fp32", "bf16", torch.float32),
    ("bf16", "bf16", torch.bfloat16),
    ("bf16+fp32", "fp32", torch.bfloat16),
    ("bf16+16", "q8", torch.bfloat16),
]


@pytest.mark.parametrize("rule", [AdamW(lr=1e-2), SGD(momentum=0.9), Lion()], ids=str)
@pytest.mark.parametrize(("weight_format", "state_format", "dtype"), FORMATS)
def test_resuming_gives_the_bits_of_the_run_that_went_on(rule, weight_format, state_format, dtype):
    options = {"weight_format": weight_format, "state_format": state_format, "seed": 7}
    start, batches = mlp().to(dtype), mlp_batches(12)
    model = copy.deepcopy(start)
    fused = forge_train.fuse(model, rule, **options)
    train(model, fused.optimizer, batches[:6])
    saved = through_a_file({"model": model.state_dict(), "optimizer": fused.optimizer.state_dict()})
    train(model, fused.optimizer, batches[6:])

    resumed = copy.deepcopy(start)
    again = forge_train.fuse(resumed, rule, **{**options, "seed": 0})
    resumed.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    train(resumed, again.optimizer, batches[6:])
    assert_same_bits(resumed, model)
    for key, value in again.export_weights().items():
        assert torch.equal(value, fused.export_weights()[key])


@pytest.mark.parametrize(("rule", "stock"), RULES, ids=str)
def test_torch_loads_it_and_goes_on(rule, stock):
    model = mlp()
    fused = forge_train.fuse(model, rule)
    train(model, fused.optimizer, mlp_batches(5))
    taken = copy.deepcopy(model)
    optimizer = stock(taken.parameters(), **rule.options)
    optimizer.load_state_dict(through_a_file(fused.optimizer.state_dict()))
    batches = mlp_batches(5, seed=2)
    train(model, fused.optimizer, batches)
    train(taken, optimizer, batches)
    assert worst(model, taken) < 1e-5


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "q8"])
@pytest.mark.parametrize(("rule", "stock"), RULES, ids=str)
def test_it_loads_torch_and_goes_on(rule, stock, state_format):
    stock_model = mlp()
    optimizer = stock(stock_model.parameters(), **rule.options)
    train(stock_model, optimizer, mlp_batches(5))
    model = copy.deepcopy(stock_model)
    fused = forge_train.fuse(model, rule, state_format=state_format)
    fused.optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    batches = mlp_batches(5, seed=2)
    train(stock_model, optimizer, batches)
    train(model, fused.optimizer, batches)
    assert worst(model, stock_model) < (1e-5 if state_format == "fp32" else 5e-2)


def test_entries_have_torchs_names_shapes_and_order():
    model = mlp()
    fused = forge_train.fuse(model, AdamW())
    stock = torch.optim.AdamW(model.parameters())
    assert fused.optimizer.state_dict()["state"] == {}
    train(model, fused.optimizer, mlp_batches(2))
    state = fused.optimizer.state_dict()
    assert state["param_groups"][0]["params"] == stock.state_dict()["param_groups"][0]["params"]
    for number, parameter in enumerate(model.parameters()):
        entry = state["state"][number]
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq"}
        assert entry["exp_avg"].shape == parameter.shape
        assert entry["step"].item() == 2


def test_load_restores_lr_and_scheduler_start():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(lr=1e-2))
    scheduler = torch.optim.lr_scheduler.StepLR(fused.optimizer, 1, gamma=0.5)
    train(model, fused.optimizer, mlp_batches(1))
    scheduler.step()
    other = forge_train.fuse(mlp(), AdamW(lr=1.0))
    other.optimizer.load_state_dict(fused.optimizer.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 5e-3
    assert other.optimizer.param_groups[0]["initial_lr"] == 1e-2
    # The weights read the very same group.
    assert other.engine.weights[0].group is other.optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["param_groups"][0]["params"].pop(), "parameters"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (lambda s: s["param_groups"][0].update(maximize=True), "maximize"),
        (lambda s: s["state"][0].pop("exp_avg_sq"), "exp_avg_sq"),
        (lambda s: s["state"][4].update(exp_avg=torch.zeros(3, 3)), "exp_avg"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model = mlp()
    fused = forge_train.fuse(model, AdamW(lr=1e-2))
    train(model, fused.optimizer, mlp_batches(2))
    good = copy.deepcopy(fused.optimizer.state_dict())
    bad = copy.deepcopy(good)
    bad["param_groups"][0]["lr"] = 0.5
    change(bad)
    with pytest.raises(ValueError, match=message):
        fused.optimizer.load_state_dict(bad)
    now = fused.optimizer.state_dict()
    assert now["param_groups"] == good["param_groups"]
    for number, entry in good["state"].items():
        for key, value in entry.items():
            assert torch.equal(now["state"][number][key], value)


def test_q8_states_do_not_load_into_another_format():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), state_format="q8")
    train(model, fused.optimizer, mlp_batches(1))
    other = forge_train.fuse(mlp(), AdamW(), state_format="bf16")
    with pytest.raises(ValueError, match="state_format='bf16'"):
        other.optimizer.load_state_dict(fused.optimizer.state_dict())


@pytest.mark.parametrize("weight_format", ["bf16+16", "bf16+fp32"])
def test_loading_model_weights_moves_the_master_along(weight_format):
    """Else the next step would go on from the old master."""
    source, model = mlp().bfloat16(), mlp().bfloat16()
    fused = forge_train.fuse(model, SGD(lr=0.0), weight_format=weight_format)
    train(model, fused.optimizer, mlp_batches(1))
    model.load_state_dict(source.state_dict())
    train(model, fused.optimizer, mlp_batches(1))
    assert_same_bits(model, source)
