"""``fuse`` on a GPU: the CPU's losses, every schedule, checkpoints between devices."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from gpu_cases import DEVICE, needs_gpu

import forge_train
from forge_train import SGD, AdamW

pytestmark = needs_gpu


class Net(torch.nn.Module):
    """Embedding, norm, two linears with bias, and a head: fused weights and the rest."""

    def __init__(self, width: int = 64, classes: int = 40) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(classes, width)
        self.norm = torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, 136), torch.nn.Linear(136, width)
        self.head = torch.nn.Linear(width, classes, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


def _loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    tokens = tokens.to(next(model.parameters()).device)
    logits = model(tokens[:, :-1]).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _batches(count: int, seed: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (4, 33), generator=g) for _ in range(count)]


def _train(model, fused, batches, micro_batches: int = 1) -> list[float]:
    losses = []
    for first in range(0, len(batches), micro_batches):
        fused.optimizer.zero_grad()
        for batch in batches[first : first + micro_batches]:
            loss = _loss(model, batch) / micro_batches
            loss.backward()
            losses.append(loss.item() * micro_batches)
        fused.optimizer.step()
    return losses


def _pair(dtype: torch.dtype = torch.float32) -> tuple[Net, Net]:
    cpu = Net().to(dtype)
    return cpu, copy.deepcopy(cpu).to(DEVICE)


@pytest.mark.parametrize(
    ("schedule", "max_norm", "micro_batches"),
    [
        ("immediate", None, 1),
        ("deferred", 0.5, 1),
        ("deferred", None, 2),
        ("accumulate", 0.5, 2),
        ("auto", 0.5, 2),
    ],
)
def test_losses_follow_the_cpus_in_fp32(schedule, max_norm, micro_batches):
    results = []
    for model in _pair():
        fused = forge_train.fuse(
            model, AdamW(lr=1e-3, eps=1e-5), schedule=schedule, max_norm=max_norm,
            micro_batches=micro_batches,
        )  # fmt: skip
        losses = _train(model, fused, _batches(60), micro_batches)
        assert fused.optimizer.last.ok and not fused.optimizer.last.nonfinite_tiles
        results.append((losses, fused.optimizer.last_grad_norm))
    (cpu, cpu_norm), (gpu, gpu_norm) = results
    assert max(abs(a - b) for a, b in zip(cpu, gpu, strict=True)) < 1e-4
    assert gpu[-1] < gpu[0]
    if cpu_norm is not None:
        assert gpu_norm == pytest.approx(cpu_norm, rel=1e-3)


@pytest.mark.parametrize(
    ("weight_format", "state_format"), [("bf16", "q8"), ("bf16+16", "bf16"), ("bf16+fp32", "fp32")]
)
def test_bf16_models_train(weight_format, state_format):
    results = []
    for model in _pair(torch.bfloat16):
        fused = forge_train.fuse(
            model, AdamW(lr=1e-3), weight_format=weight_format, state_format=state_format,
            max_norm=1.0,
        )  # fmt: skip
        results.append(_train(model, fused, _batches(40)))
    cpu, gpu = (sum(losses[-5:]) / 5 for losses in results)
    assert gpu == pytest.approx(cpu, abs=0.05)


def test_no_gradient_is_left_and_everything_is_on_the_gpu():
    _, model = _pair()
    fused = forge_train.fuse(model, AdamW(), max_norm=1.0)
    _loss(model, _batches(1)[0]).backward()
    for weight in fused.engine.fused:
        assert weight.parameter.grad is None
        for segment in weight.segments:
            assert segment.dy.is_cuda and segment.x.is_cuda
    fused.optimizer.step()
    for parameter in model.parameters():
        storage = fused.optimizer.storage_of(parameter)
        assert storage.weight.data_ptr() == parameter.data_ptr()
        assert all(state.is_cuda for state in storage.states)


def test_a_nonfinite_gradient_skips_the_deferred_step_as_a_whole():
    _, model = _pair()
    fused = forge_train.fuse(model, AdamW(), max_norm=1.0)
    before = copy.deepcopy(model.state_dict())
    (_loss(model, _batches(1)[0]) * math.inf).backward()
    fused.optimizer.step()
    assert not fused.optimizer.last.ok and fused.optimizer.skipped_steps == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_immediate_reports_nonfinite_tiles():
    model = torch.nn.Linear(64, 128, bias=False, device=DEVICE)
    fused = forge_train.fuse(model, SGD(), schedule="immediate")
    x = torch.randn(8, 64, device=DEVICE)
    x[0, 0] = math.inf
    model(x).backward(torch.ones(8, 128, device=DEVICE))
    fused.optimizer.step()
    assert fused.optimizer.last.nonfinite_tiles["weight"] > 0


def test_a_backward_and_a_deferred_step_do_not_wait_for_the_gpu():
    """The watch that torch keeps refuses every wait, until somebody asks for the norm."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(6)))
    model.to(DEVICE)
    fused = forge_train.fuse(model, AdamW(), max_norm=1.0, rest=False)
    x = torch.randn(32, 64, device=DEVICE)
    model(x).square().mean().backward()
    fused.optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).square().mean().backward()
        fused.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fused.optimizer.last.ok and fused.optimizer.last.norm > 0
    assert {weight.step for weight in fused.engine.fused} == {2}


@pytest.mark.parametrize("direction", [("cpu", DEVICE), (DEVICE, "cpu")], ids=str)
@pytest.mark.parametrize(
    ("dtype", "weight_format", "state_format"),
    [(torch.float32, "fp32", "fp32"), (torch.bfloat16, "bf16+16", "q8")],
    ids=str,
)
def test_checkpoints_move_between_devices(direction, dtype, weight_format, state_format):
    source, target = direction
    options = {"weight_format": weight_format, "state_format": state_format, "max_norm": 1.0}
    model = Net().to(dtype).to(source)
    fused = forge_train.fuse(model, AdamW(lr=1e-3), **options)
    _train(model, fused, _batches(5))
    saved, saved_optimizer = model.state_dict(), fused.optimizer.state_dict()

    other = Net().to(dtype).to(target)
    fused_other = forge_train.fuse(other, AdamW(lr=1e-3), **options)
    other.load_state_dict(saved)
    fused_other.optimizer.load_state_dict(saved_optimizer)
    for a, b in zip(fused.engine.weights, fused_other.engine.weights, strict=True):
        assert b.storage.weight.device.type == torch.device(target).type
        arrays = zip(
            [a.storage.weight, a.storage.weight_extra, *a.storage.states, *a.storage.scales],
            [b.storage.weight, b.storage.weight_extra, *b.storage.states, *b.storage.scales],
            strict=True,
        )
        for left, right in arrays:
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left.cpu(), right.cpu()), a.name
        assert a.step == b.step
    losses = _train(other, fused_other, _batches(3, seed=9))
    want = _train(model, fused, _batches(3, seed=9))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert losses == pytest.approx(want, abs=tolerance)


def test_torch_adamw_loads_the_states():
    model = torch.nn.Linear(64, 128, device=DEVICE)
    fused = forge_train.fuse(model, AdamW(lr=1e-3))
    for _ in range(3):
        fused.optimizer.zero_grad()
        model(torch.randn(16, 64, device=DEVICE)).square().mean().backward()
        fused.optimizer.step()
    state = copy.deepcopy(fused.optimizer.state_dict())
    fused.remove()
    stock = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stock.load_state_dict(state)
    model(torch.randn(16, 64, device=DEVICE)).square().mean().backward()
    stock.step()


def test_a_side_stream():
    """Forward, backward and step on a stream of one's own give the default stream's weights."""
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.manual_seed(0)
        model = Net().to(DEVICE)
        fused = forge_train.fuse(model, AdamW(lr=1e-3), max_norm=1.0)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _train(model, fused, _batches(10))
        torch.cuda.synchronize()
        results.append(fused.export_weights()["up.weight"])
    assert torch.allclose(*results, rtol=0, atol=1e-4)
