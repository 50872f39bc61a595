"""``torch.autocast``: torch's forward and dX, and a dW from bf16 factors that is never rounded."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Transformer, assert_same_bits, mlp, mlp_batches, tokens_loss, worst
from torch.utils.checkpoint import checkpoint

import forge_train
from forge_train import SGD, AdamW

BF16 = torch.bfloat16


def autocast(dtype=BF16, **options):
    return torch.autocast("cpu", dtype, **options)


def mean_square(net, batch):
    with autocast():
        return torch.nn.functional.mse_loss(net(batch[0]).float(), batch[1])


@pytest.mark.parametrize("schedule", ["immediate", "deferred", "accumulate"])
def test_forward_and_input_gradient_have_torchs_bits(schedule):
    stock = mlp()
    model = copy.deepcopy(stock)
    forge_train.fuse(model, SGD(lr=0.1), schedule=schedule)
    x, target = mlp_batches(1)[0]
    results = []
    for net in (stock, model):
        inputs = x.clone().requires_grad_()
        loss = mean_square(net, (inputs, target))
        loss.backward()
        results.append((loss, inputs.grad, net[0].bias.grad, net[2].weight.grad))
    for mine, torchs in zip(*results, strict=True):
        assert torch.equal(mine, torchs)
    assert model[0].weight.grad is None


def test_the_update_is_the_exact_product_of_bf16_factors():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False))
    before = model[0].weight.detach().clone()
    fused = forge_train.fuse(model, SGD(lr=0.5), schedule="deferred")
    x = torch.randn(40, 24)
    with autocast():
        y = model(x)
    assert y.dtype == BF16
    dy = torch.randn(40, 16).to(BF16)
    y.backward(dy)
    (segment,) = fused.engine.fused[0].segments
    assert segment.x.dtype == segment.dy.dtype == BF16
    fused.optimizer.step()
    exact = before.double() - 0.5 * dy.double().T @ x.to(BF16).double()
    assert model[0].weight.dtype == torch.float32
    error = (model[0].weight.double() - exact).abs().max()
    rounded = (exact - (before.double() - 0.5 * (dy.T @ x.to(BF16)).double())).abs().max()
    assert error < 1e-5 < rounded


@pytest.mark.parametrize(
    ("dtype", "weight_format"), [(torch.float32, "fp32"), (BF16, "bf16+16"), (BF16, "bf16+fp32")]
)
def test_training_follows_torchs(dtype, weight_format):
    tokens = [torch.randint(0, 40, (4, 12)) for _ in range(8)]
    start = Transformer()
    stock, model = copy.deepcopy(start), copy.deepcopy(start).to(dtype)
    fused = forge_train.fuse(
        model, AdamW(lr=1e-2), weight_format=weight_format, schedule="deferred", max_norm=1.0
    )
    optimizer = torch.optim.AdamW(stock.parameters(), lr=1e-2)
    losses = []
    for batch in tokens * 3:
        step = []
        for net, each in ((stock, optimizer), (model, fused.optimizer)):
            each.zero_grad()
            with autocast():
                loss = tokens_loss(net, batch)
            loss.backward()
            if each is optimizer:
                torch.nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
            each.step()
            step.append(loss.item())
        losses.append(step)
    assert losses[-1][0] < 0.9 * losses[0][0]
    assert all(abs(a - b) < 0.03 * a for a, b in losses)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_under_autocast(reentrant):
    model = mlp()
    other = copy.deepcopy(model)
    batch = mlp_batches(1)[0]
    batch = (batch[0].requires_grad_(), batch[1])
    for net, run in (
        (model, model),
        (other, lambda x: checkpoint(other, x, use_reentrant=reentrant)),
    ):
        fused = forge_train.fuse(net, SGD(lr=0.1), schedule="immediate")
        mean_square(run, batch).backward()
        fused.optimizer.step()
    assert_same_bits(model, other)


def test_compiled_under_autocast():
    models = [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    for net, wrap in zip(models, (lambda m: m, torch.compile), strict=True):
        fused = forge_train.fuse(net, SGD(lr=0.1), schedule="deferred")
        run = (
            wrap(net)
            if wrap is not torch.compile
            else wrap(net, backend="aot_eager", fullgraph=True)
        )
        for batch in mlp_batches(3):
            mean_square(run, batch).backward()
            fused.optimizer.step()
        assert fused.engine.fused[0].linear.spec.factor_dtype == BF16
    torch._dynamo.reset()
    assert_same_bits(*models)


def test_one_step_has_factors_of_one_dtype():
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), schedule="deferred", micro_batches=2)
    before = copy.deepcopy(model)
    first, second = mlp_batches(2)
    mean_square(model, first).backward()
    with pytest.raises(RuntimeError, match=r"3\.weight: .*float32.*bfloat16.*same torch\.autocast"):
        torch.nn.functional.mse_loss(model(second[0]), second[1]).backward()
    assert_same_bits(model, before)
    fused.optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(second[0]), second[1]).backward()
    fused.optimizer.step()
    mean_square(model, first).backward()
    fused.optimizer.step()
    assert worst(model, before) > 0


def test_evaluation_and_disabled_regions():
    model = mlp()
    plain = copy.deepcopy(model)
    forge_train.fuse(model, AdamW())
    x = mlp_batches(1)[0][0]
    with autocast():
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        with autocast(enabled=False):
            y = model(x)
    assert y.dtype == torch.float32 and torch.equal(y, plain(x))


def test_fp16_is_refused():
    model = mlp()
    forge_train.fuse(model, AdamW())
    with (
        autocast(torch.float16),
        pytest.raises(RuntimeError, match=r"0\.weight.*float16.*bfloat16"),
    ):
        model(torch.randn(3, 19))
