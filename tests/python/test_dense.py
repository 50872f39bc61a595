"""Gradients that autograd leaves: read as they lie, with the bits that a copy in fp32 gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import forge_train
from forge_train import AdamW, dense
from forge_train._linear import Linear
from forge_train._types import LinearSpec

VOCABULARY, WIDTH = 96, 128


class Model(torch.nn.Module):
    """An embedding and a norm, which are not fused, around a linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, 32, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.embedding(ids)))


class Floats(TorchDispatchMode):
    """The most elements of an fp32 tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


def _told(formats, bad, **options):
    """What four steps say, of which ``bad`` has a NaN in the embedding's gradient."""
    weight_format, state_format = formats
    model = Model().bfloat16()
    fused = forge_train.fuse(
        model, AdamW(lr=1e-2), weight_format=weight_format, state_format=state_format,
        rest_state_format=state_format, state_rounding="stochastic", **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    told = []
    for step in range(4):
        ids = torch.randint(VOCABULARY, (2, 40), generator=generator)
        model(ids).float().square().mean().backward()
        if step == bad:
            model.embedding.weight.grad[5, 7] = float("nan")
        with Floats() as floats:
            fused.optimizer.step()
        assert floats.elements < VOCABULARY * WIDTH
        fused.optimizer.zero_grad()
        told.append(fused.optimizer.last)
    for weight in fused.engine.weights:
        storage = weight.storage
        arrays = [storage.weight, storage.weight_extra, *storage.states, *storage.scales]
        assert all(array.isfinite().all() for array in arrays if array is not None)
    return told


@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("bf16", "q8"), ("bf16+16", "fp32")])
def test_a_step_that_is_not_finite_is_skipped(formats):
    told = _told(formats, 2, schedule="deferred")
    assert [last.ok for last in told] == [True, True, False, True]
    assert told[2].nonfinite_layers == ("embedding.weight",)


def test_a_tile_that_is_not_finite_is_left_alone():
    told = _told(("bf16", "bf16"), 2, schedule="deferred", check_finite=False)
    assert [last.nonfinite_tiles for last in told] == [{}, {}, {"embedding.weight": 1}, {}]


@pytest.mark.parametrize("shape", [(96, 128), (1, 4096), (1, 37), (64, 130)])
@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("bf16+16", "fp32"), ("bf16", "q8")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bits_are_those_of_a_copy_in_fp32(shape, formats, dtype):
    weight_format, state_format = formats
    linear = Linear(
        LinearSpec(*shape, AdamW(), dtype, weight_format, state_format, state_rounding="stochastic")
    )
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator).bfloat16()
    gradients = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    found = []
    for convert in (torch.Tensor.clone, torch.Tensor.float):
        storage = linear.allocate(start.clone())
        told = []
        for step, gradient in enumerate(gradients, 1):
            scalars = linear.scalars({"lr": 1e-2}, step=step, seed=5)
            told.append(linear.norm((), convert(gradient), "tiles"))
            told.append(linear.update((), storage, scalars, convert(gradient)))
        found.append((storage, told))
    (ours, told), (theirs, expected) = found
    assert told == expected
    for name in ("weight", "weight_extra"):
        left, right = getattr(ours, name), getattr(theirs, name)
        assert left is right is None or torch.equal(left, right)
    for left, right in zip(
        (*ours.states, *ours.scales), (*theirs.states, *theirs.scales), strict=True
    ):
        assert left is right is None or torch.equal(left, right)


def test_a_gradient_of_the_wrong_size_is_refused():
    linear = Linear(LinearSpec(8, 16, AdamW(), torch.bfloat16, "bf16", "bf16"))
    storage = linear.allocate(torch.zeros(8, 16, dtype=torch.bfloat16))
    before = copy.deepcopy(storage)
    scalars = linear.scalars({}, step=1, seed=0)
    for wrong in (torch.ones(8, 8, dtype=torch.bfloat16), torch.ones(8, 16, dtype=torch.float64)):
        with pytest.raises(forge_train.ForgeArgumentError, match="accumulator"):
            linear.update((), storage, scalars, wrong)
    assert torch.equal(storage.weight, before.weight)


def test_what_is_added_to_a_product_is_fp32():
    linear = Linear(LinearSpec(8, 16, AdamW(), torch.bfloat16, "bf16", "bf16"))
    storage = linear.allocate(torch.zeros(8, 16, dtype=torch.bfloat16))
    scalars = linear.scalars({}, step=1, seed=0)
    dy, x = (torch.ones(4, n, dtype=torch.bfloat16) for n in (8, 16))
    segments = [forge_train._types.Segment.of(dy, x)]
    with pytest.raises(forge_train.ForgeArgumentError, match="accumulator: 256 bytes"):
        linear.update(segments, storage, scalars, torch.ones(8, 16, dtype=torch.bfloat16))
    assert not storage.weight.any()


def test_matrices_fill_tiles():
    assert dense.shape_of(128256 * 4096) == (4104192, 128)
    assert dense.shape_of(4096) == (1, 4096) and dense.shape_of(64 * 128) == (64, 128)
    assert dense.shape_of(64 * 128 + 1) == (1, 64 * 128 + 1)
