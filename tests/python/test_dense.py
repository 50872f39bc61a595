"""Large gradients that autograd leaves: taken in parts, with the bits of the whole."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import forge_train
from forge_train import AdamW, dense

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


class Largest(TorchDispatchMode):
    """The most elements of an fp32 tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


def _trained(formats, steps=4, bad=None, **options):
    """Model, its optimizer, norms and counts of tiles that were left alone, after some steps."""
    model = Model().bfloat16()
    weight_format, state_format = formats
    fused = forge_train.fuse(
        model, AdamW(lr=1e-2), weight_format=weight_format, state_format=state_format,
        rest_state_format=state_format, state_rounding="stochastic", **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    told = []
    for step in range(steps):
        ids = torch.randint(VOCABULARY, (2, 40), generator=generator)
        model(ids).float().square().mean().backward()
        if step == bad:
            model.embedding.weight.grad[5, 7] = float("nan")
        fused.optimizer.step()
        fused.optimizer.zero_grad()
        last = fused.optimizer.last
        told.append((last.ok, last.norm, last.nonfinite_layers, last.nonfinite_tiles))
    return model, fused, told


def _state(fused):
    weights = [weight for weight in fused.engine.weights if weight.name.startswith("embedding")]
    (weight,) = weights
    storage = weight.storage
    return [storage.weight, storage.weight_extra, *storage.states, *storage.scales]


@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("bf16", "q8"), ("bf16+16", "fp32")])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_parts_give_the_bits_of_the_whole(monkeypatch, formats, max_norm):
    whole = _trained(formats, max_norm=max_norm)
    monkeypatch.setattr(dense, "MOST_ELEMENTS", 2048)
    parts = _trained(formats, max_norm=max_norm)
    embedding = next(w for w in parts[1].engine.weights if w.name.startswith("embedding"))
    assert len(embedding._parts) == 6
    for ours, theirs in zip(_state(parts[1]), _state(whole[1]), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    for (_, norm, *_), (_, want, *_) in zip(parts[2], whole[2], strict=True):
        assert norm == want if norm is None else norm == pytest.approx(want, rel=1e-14)
    want = next(w for w in whole[1].engine.weights if w.name == embedding.name).report
    assert embedding.report.tiles >= want.tiles > 0
    assert embedding.report.sum_of_squares == pytest.approx(want.sum_of_squares, rel=1e-14)


@pytest.mark.parametrize("check_finite", [True, False])
def test_what_is_not_finite_in_a_part_is_told_of_the_whole(monkeypatch, check_finite):
    options = {"check_finite": check_finite, "schedule": "deferred", "bad": 2}
    whole = _trained(("bf16", "bf16"), **options)
    monkeypatch.setattr(dense, "MOST_ELEMENTS", 2048)
    parts = _trained(("bf16", "bf16"), **options)
    names = [layers for _, _, layers, _ in parts[2]]
    assert [bool(layers) for layers in names] == [False, False, True, False]
    assert names == [layers for _, _, layers, _ in whole[2]]
    told = [tiles for *_, tiles in parts[2]]
    assert told == ([{}, {}, {"embedding.weight": 1}, {}] if not check_finite else [{}] * 4)
    assert all(array.isfinite().all() for array in _state(parts[1]) if array is not None)


def test_no_fp32_copy_of_the_whole(monkeypatch):
    monkeypatch.setattr(dense, "MOST_ELEMENTS", 2048)
    model, fused, _ = _trained(("bf16", "bf16"), steps=1)
    model(torch.arange(80).view(2, 40)).float().square().mean().backward()
    with Largest() as largest:
        fused.optimizer.step()
    assert 0 < largest.elements <= 2048 < VOCABULARY * WIDTH


def test_matrices_fill_tiles():
    assert dense.shape_of(128256 * 4096) == (4104192, 128)
    assert dense.shape_of(4096) == (1, 4096) and dense.shape_of(64 * 128) == (64, 128)
    assert dense.shape_of(64 * 128 + 1) == (1, 64 * 128 + 1)


def test_parts_are_whole_blocks():
    assert dense.parts_of(128256 * 4096) == 64
    assert dense.parts_of(4096) == dense.parts_of(dense.MOST_ELEMENTS) == 1
    # Nothing divides it into whole blocks: one.
    assert dense.parts_of(128 * 131071 + 1) == 1
    # 128257 is prime: 32 divides the width alone.
    assert dense.parts_of(128257 * 4096) == 32
    for elements in (151936 * 896, 50304 * 768, 32000 * 4096):
        count = dense.parts_of(elements)
        assert elements % (128 * count) == 0 and elements // count <= dense.MOST_ELEMENTS
