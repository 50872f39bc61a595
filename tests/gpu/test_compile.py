"""``torch.compile`` and autocast around a fused model on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_cases import DEVICE, needs_gpu

import forge_train

pytestmark = needs_gpu


class Residual(torch.nn.Module):
    """dY of a layer is what dX is added to; gate and value share their input."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(3))
        self.values = torch.nn.ModuleList(torch.nn.Linear(256, 256, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for gate, value in zip(self.gates, self.values, strict=True):
            hidden = torch.sin(x)
            x = x + torch.tanh(gate(hidden)) * value(hidden)
        return x


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(start, schedule, mode, dtype=torch.float32, autocast=False):
    """The model after six steps; ``mode`` None is eager."""
    model = copy.deepcopy(start).to(DEVICE, dtype)
    micro_batches = 1 if schedule == "immediate" else 2
    fused = forge_train.fuse(
        model, forge_train.SGD(lr=0.5), schedule=schedule, micro_batches=micro_batches,
        max_norm=None if schedule == "immediate" else 1.0,
    )  # fmt: skip
    net = torch.compile(model, mode=mode, fullgraph=True) if mode else model
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        for _ in range(micro_batches):
            x = torch.randn(64, 256, generator=generator).to(DEVICE, dtype)
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = net(x).float().square().mean()
            loss.backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
    assert all(weight.step == 6 for weight in fused.engine.fused)
    return model


def assert_close(model, expected, start, part):
    """Every weight has moved, and differs by at most a part of the largest move."""
    triples = zip(model.parameters(), expected.parameters(), start.parameters(), strict=True)
    for new, want, old in triples:
        moved = (want.detach().cpu().double() - old.double()).abs().max()
        assert moved > 0
        assert (new.double() - want.double()).abs().max().cpu() <= part * moved


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("schedule", ["immediate", "deferred", "accumulate"])
def test_compiled_is_eager(schedule, mode):
    start = Residual()
    eager, compiled = (trained(start, schedule, each) for each in (None, mode))
    assert_close(compiled, eager, start, 1e-3)


@pytest.mark.parametrize("schedule", ["immediate", "deferred"])
def test_linears_alone_have_the_bits_of_eager(schedule):
    start = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(3)))
    eager, compiled = (trained(start, schedule, m, torch.bfloat16) for m in (None, "default"))
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", [None, "default"])
def test_autocast_takes_the_bf16_kernel_and_follows_fp32(mode):
    start = Residual()
    exact = trained(start, "deferred", None)
    assert_close(trained(start, "deferred", mode, autocast=True), exact, start, 0.1)


def test_autocast_has_torchs_forward_and_input_gradient():
    stock = Residual().to(DEVICE)
    model = copy.deepcopy(stock)
    fused = forge_train.fuse(model, forge_train.SGD(lr=0.1), schedule="immediate")
    results = []
    for net in (stock, model):
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        x.requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = net(x)
        y.float().square().mean().backward()
        results.append((y, x.grad, net.gates[0].bias.grad))
    for mine, torchs in zip(*results, strict=True):
        assert torch.allclose(mine.float(), torchs.float(), rtol=1e-2, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])
    assert fused.engine.fused[0].linear.spec.factor_dtype == torch.bfloat16


def test_an_input_on_the_cpu_changes_nothing():
    model = Residual().to(DEVICE)
    fused = forge_train.fuse(model, forge_train.SGD(lr=0.1), schedule="immediate")
    before = copy.deepcopy(model)
    with pytest.raises(
        RuntimeError, match=r"gates\.0\.weight is on cuda:0, but its input is on cpu"
    ):
        model(torch.randn(4, 256))
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)
    model(torch.randn(4, 256, device=DEVICE)).sum().backward()
    fused.optimizer.step()
