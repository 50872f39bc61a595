"""Devices: results that are left in the backend's memory, and devices that cannot be had."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_same_bits, mlp, mlp_batches, mlp_loss

import forge_train
from forge_train import AdamW, Context, ForgeBackendError, StepResult
from forge_train._structs import DeviceStructs, norm_of, report_of
from forge_train.native import HostComm, Linear, LinearSpec, Segment


def _context(asynchronous: bool) -> Context:
    """A CPU context whose results the engine reads as it reads a GPU's: once a step."""
    context = Context(threads=1)
    context.asynchronous = asynchronous
    return context


@pytest.mark.usefixtures("reads")
def test_weights_of_a_step_are_updated_together(monkeypatch):
    counts: list[int] = []
    together = forge_train.update.apply_together

    def counted(work):
        counts.append(len(work))
        together(work)

    monkeypatch.setattr(forge_train.update, "apply_together", counted)
    model = mlp()
    context = _context(True)
    fused = forge_train.fuse(model, AdamW(lr=1e-2), schedule="deferred", context=context)
    for batch in mlp_batches(2):
        mlp_loss(model, batch).backward()
        fused.optimizer.step()
    weights = fused.engine.fused
    assert len(weights) > 1 and counts == [len(fused.engine.weights)] * 2
    assert all(weight.step == 2 and not weight.pending for weight in weights)
    # Where there is work enough, it does not wait for the rest.
    counts.clear()
    monkeypatch.setattr(forge_train.update, "MOST_WAITING", 1)
    mlp_loss(model, mlp_batches(1)[0]).backward()
    fused.optimizer.step()
    assert counts == [1] * len(fused.engine.weights)
    assert all(weight.step == 3 for weight in fused.engine.weights)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """What was read from the backend's memory, in order: structs by name, and steps."""
    names: list[str] = []
    read, tell = DeviceStructs.read, StepResult._read

    def counted(self, convert):
        names.append(self.name)
        return read(self, convert)

    def told(self):
        names.append("step")
        return tell(self)

    monkeypatch.setattr(DeviceStructs, "read", counted)
    monkeypatch.setattr(StepResult, "_read", told)
    # Only a real GPU has a current device to enter.
    monkeypatch.setattr(Context, "current", lambda self: torch.no_grad())
    return names


@pytest.mark.parametrize(
    ("schedule", "max_norm", "micro_batches"),
    [
        ("immediate", None, 1),
        ("deferred", 0.5, 1),
        ("accumulate", 0.5, 2),
        ("auto", 0.5, 2),
    ],
)
def test_nothing_is_read_before_somebody_asks(reads, schedule, max_norm, micro_batches):
    models, results = [], []
    for asynchronous in (False, True):
        torch.manual_seed(1)
        model = mlp()
        fused = forge_train.fuse(
            model, AdamW(lr=1e-2), schedule=schedule, max_norm=max_norm,
            rest=schedule != "immediate", micro_batches=micro_batches,
            context=_context(asynchronous),
        )  # fmt: skip
        steps = []
        batches = mlp_batches(6)
        for first in range(0, 6, micro_batches):
            fused.optimizer.zero_grad()
            for batch in batches[first : first + micro_batches]:
                mlp_loss(model, batch).backward()
            fused.optimizer.step()
            steps.append(fused.optimizer.last)
        models.append(model)
        results.append(steps)
    assert reads == []
    assert_same_bits(*models)
    # Of all steps, though later ones have reused the memory of reports.
    assert results[0] == results[1]
    assert reads == ["step"] * 2 * len(results[0])
    for result in results[0]:
        assert result.ok and result.ready and (result.norm is None) == (max_norm is None)
    assert len({result.norm for result in results[0]}) == (1 if max_norm is None else len(steps))
    assert len(reads) == 2 * len(results[0])


def test_nonfinite_tiles_are_read_under_immediate(reads):
    model = torch.nn.Linear(19, 33, bias=False)
    fused = forge_train.fuse(
        model, AdamW(), schedule="immediate", context=_context(asynchronous=True)
    )
    x = torch.randn(5, 19)
    x[0, 0] = math.inf
    model(x).sum().backward()
    fused.optimizer.step()
    assert fused.optimizer.last.nonfinite_tiles == {"weight": 1}


def test_a_nonfinite_norm_skips_the_step(reads):
    model = mlp()
    fused = forge_train.fuse(model, AdamW(), max_norm=1.0, context=_context(asynchronous=True))
    (mlp_loss(model, mlp_batches(1)[0]) * math.inf).backward()
    fused.optimizer.step()
    assert not fused.optimizer.last.ok
    assert reads == ["step"]


def test_scalars_report_and_norm_in_memory():
    linear = Linear(LinearSpec(24, 40, AdamW()))
    segment = Segment.of(torch.randn(9, 24), torch.randn(9, 40))
    weight = torch.randn(24, 40)
    scalars = linear.scalars({}, step=3, seed=5, grad_scale=0.5)
    reports, norms = (DeviceStructs(f"forge_{n}", 2, linear.device) for n in ("report", "norm"))
    one, other = linear.allocate(weight.clone()), linear.allocate(weight.clone())
    report = linear.update([segment], one, scalars)
    numbers = linear.device_scalars(scalars)
    assert linear.update([segment], other, numbers, report=reports.rows[1]) is None
    assert torch.equal(one.weight, other.weight)
    assert reports.read(report_of)[1] == report
    assert linear.norm([segment], out=norms.rows[0]) is None
    assert norms.read(norm_of)[0] == linear.norm([segment])
    with pytest.raises(ValueError, match="report must be 32 contiguous bytes"):
        linear.update([segment], one, scalars, report=torch.zeros(31, dtype=torch.uint8))


def test_devices_that_cannot_be_had():
    with pytest.raises(ForgeBackendError, match=r"no cuda:99; torch sees \d+ GPU"):
        Context(device="cuda:99")
    with pytest.raises(ValueError, match="CPUs and NVIDIA GPUs, not on meta"):
        Context(device="meta")
    with pytest.raises(ValueError, match="context of the same device"):
        Linear(LinearSpec(8, 8, AdamW()), name="w", context=Context(threads=1), device="cuda:99")
    linear = Linear(LinearSpec(8, 8, AdamW()), name="w")
    elsewhere = torch.zeros(3, 8, device="meta")
    with pytest.raises(
        ValueError, match=r"w: dY is on meta, but the layer was made for cpu.*before"
    ):
        linear.norm([Segment.of(elsewhere, torch.zeros(3, 8))])
    context = Context(threads=1)
    context.device = torch.device("cuda", 0)
    with pytest.raises(ValueError, match="NCCL"):
        HostComm(context)


def test_a_model_elsewhere_is_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, device="meta"))
    fused = forge_train.fuse(model, AdamW(), rest=False)
    assert "on meta" in str(fused)
