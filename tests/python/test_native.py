"""The wrappers over the C ABI: layouts, norms, segments, formats, errors."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import forge_train
from forge_train import SGD, AdamW, Lion, user_rule
from forge_train._lib import check, declarations, lib
from forge_train.native import Linear, LinearSpec, Segment
from forge_train.rules import built_in, hyper_values, rule_flags, rule_info

EPS32 = 2.0**-24
EVERY_RULE = list(built_in().values())


def factors(tokens, out_features, in_features, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(tokens, out_features, generator=generator).to(dtype)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    return Segment.of(dy, x)


def test_every_rule_of_the_library_has_its_dataclass():
    from forge_train._lib import new_struct, text

    names = set()
    for index in range(lib.forge_rule_count()):
        info = new_struct("forge_rule_info")
        check(lib.forge_rule_get(index, info))
        names.add(text(info.name))
    # Other tests may have defined some of their own.
    assert names - set(user_rule._defined) == {rule.name for rule in EVERY_RULE}


@pytest.mark.parametrize("rule", [SGD(momentum=0.9), *(rule() for rule in EVERY_RULE)], ids=str)
def test_hyperparameters_are_found_by_name(rule):
    info = rule_info(rule.name, rule_flags(rule.name, rule.options))
    options = {"weight_decay": 0.0, **rule.options}
    names = {"betas": ("beta1", "beta2", "beta3"), "etas": ("eta_minus", "eta_plus")}
    names["step_sizes"] = ("step_size_min", "step_size_max")
    for option, parts in names.items():
        options.update(zip(parts, options.get(option, ()), strict=False))
    assert hyper_values(info, rule.options) == [float(options[name]) for name in info.hyper_names]
    # The library's defaults are torch.optim's.
    assert tuple(hyper_values(info, type(rule)().options)) == pytest.approx(info.hyper_defaults)


def test_the_docs_have_every_hyperparameter_with_its_default():
    text = (Path(__file__).parents[2] / "docs" / "rules.md").read_text()
    table = text[text.index("## Hyper-parameters") : text.index("## Bytes")]
    for rule in EVERY_RULE:
        rows = (line.split("|") for line in table.splitlines() if line.startswith("| `"))
        row = next(cells[2] for cells in rows if f"`{rule.name}`" in cells[1])
        info = rule_info(rule.name)
        found = re.findall(r"`(\w+)` ([\d.e-]+)", row)
        assert [name for name, _ in found] == list(info.hyper_names)
        defaults = [float(value) for _, value in found]
        if rule.name == "adamw":  # shares adam's row
            defaults[1] = 1e-2
        assert tuple(defaults) == info.hyper_defaults


@given(
    tokens=st.integers(1, 40),
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 300),
    method=st.sampled_from(["auto", "gram", "tiles"]),
    pieces=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_norm_without_gradient(tokens, out_features, in_features, method, pieces, dtype):
    weight_format = "fp32" if dtype == torch.float32 else "bf16"
    spec = LinearSpec(
        out_features, in_features, SGD(), factor_dtype=dtype, weight_format=weight_format
    )
    linear = Linear(spec)
    segments = [factors(tokens, out_features, in_features, i, dtype) for i in range(pieces)]
    gradient = sum(s.dy.double().T @ s.x.double() for s in segments)
    exact = gradient.square().sum().item()
    norm = linear.norm(segments, method=method)
    # Few tokens or features leave no cancellation that Gram sums would suffer from.
    assert math.sqrt(norm.sum_of_squares) == pytest.approx(math.sqrt(exact), rel=1e-5)
    assert not norm.nonfinite
    # Where Gram sums would lose digits the library takes the tiles, even when asked for them.
    assert norm.method == "tiles" if method == "tiles" else norm.method in ("gram", "tiles")


def test_auto_norm_is_right_under_cancellation():
    """Two micro-batches that nearly cancel: Gram sums lose their digits, the tiles do not."""
    first = factors(16, 64, 64)
    second = Segment.of(-first.dy + 1e-5 * torch.randn(16, 64), first.x)
    exact = (
        first.dy.double().T @ first.x.double() + second.dy.double().T @ second.x.double()
    ).norm()
    linear = Linear(LinearSpec(64, 64, SGD()))
    norm = linear.norm([first, second])
    assert math.sqrt(norm.sum_of_squares) == pytest.approx(exact.item(), rel=2e-2)
    assert norm.method == "tiles"


def test_nonfinite_norm():
    linear = Linear(LinearSpec(8, 8, SGD()))
    for value in (math.inf, math.nan):
        segment = factors(4, 8, 8)
        segment.x[1, 2] = value
        for method in ("auto", "gram", "tiles"):
            assert linear.norm([segment], method=method).nonfinite


@given(
    tokens=st.integers(1, 33),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 150),
    rule=st.sampled_from([SGD(lr=0.1), SGD(momentum=0.9), AdamW(), Lion()]),
    state_format=st.sampled_from(["fp32", "bf16", "q8"]),
    weight_format=st.sampled_from(["fp32", "bf16", "bf16+fp32", "bf16+16"]),
)
@settings(max_examples=60, deadline=None)
def test_segments_and_strides_do_not_change_a_bit(
    tokens, out_features, in_features, rule, state_format, weight_format
):
    """One segment, its halves, and the same inside wider matrices: equal weights and states."""
    dtype = torch.float32 if weight_format == "fp32" else torch.bfloat16
    spec = LinearSpec(
        out_features, in_features, rule, factor_dtype=dtype,
        weight_format=weight_format, state_formats=state_format, parameter_id=5,
    )  # fmt: skip
    whole = factors(tokens, out_features, in_features, dtype=dtype)
    wide_dy, wide_x = torch.randn(tokens, out_features + 3), torch.randn(tokens, in_features + 5)
    wide_dy, wide_x = wide_dy.to(dtype), wide_x.to(dtype)
    wide_dy[:, 2 : 2 + out_features] = whole.dy
    wide_x[:, 1 : 1 + in_features] = whole.x
    strided = Segment.of(wide_dy[:, 2 : 2 + out_features], wide_x[:, 1 : 1 + in_features])
    start = torch.randn(out_features, in_features).to(dtype)
    results = []
    for segments in ([whole], [strided]):
        linear = Linear(spec)
        storage = linear.allocate(start.clone())
        for step in (1, 2):
            linear.update(segments, storage, linear.scalars({}, step=step, seed=3))
        results.append(storage)
    assert torch.equal(results[0].weight, results[1].weight)
    for first, second in zip(results[0].states, results[1].states, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("weight_format", ["fp32", "bf16+fp32", "bf16+16"])
def test_exact_formats_export_what_was_imported(weight_format):
    dtype = torch.float32 if weight_format == "fp32" else torch.bfloat16
    spec = LinearSpec(7, 131, AdamW(), factor_dtype=dtype, weight_format=weight_format)
    linear = Linear(spec)
    storage = linear.allocate(torch.zeros(7, 131, dtype=dtype))
    values = torch.randn(7, 131)
    linear.import_weight(storage, values)
    assert torch.equal(linear.export_weight(storage), values)
    assert (storage.weight.float() - values).abs().max() < 2**-7 * values.abs().max()


@pytest.mark.parametrize(("state_format", "bound"), [("fp32", 0), ("bf16", 2**-8), ("q8", 2**-4)])
def test_states_survive_export_and_import(state_format, bound):
    linear = Linear(LinearSpec(7, 131, AdamW(), state_formats=state_format))
    storage = linear.allocate(torch.zeros(7, 131))
    for index in range(2):
        assert torch.equal(linear.export_state(storage, index), torch.zeros(7, 131))
        values = torch.rand(7, 131) + 0.5
        linear.import_state(storage, index, values)
        assert ((linear.export_state(storage, index) - values) / values).abs().max() <= bound


def test_bf16_states_follow_fp32_roughly_and_formats_take_their_bytes():
    taken = {}
    for state_format in ("fp32", "bf16", "q8"):
        linear = Linear(LinearSpec(64, 256, AdamW(lr=1e-2), state_formats=state_format))
        storage = linear.allocate(torch.ones(64, 256))
        for step in range(1, 21):
            segment = factors(8, 64, 256, step)
            linear.update([segment], storage, linear.scalars({}, step=step, seed=0))
        taken[state_format] = (storage.weight, storage.bytes)
    exact, full = taken["fp32"]
    assert full == 64 * 256 * 12
    assert taken["bf16"][1] == 64 * 256 * 8
    assert taken["q8"][1] == 64 * 256 * 6 + 2 * 64 * 2 * 4
    for state_format in ("bf16", "q8"):
        assert (taken[state_format][0] - exact).abs().mean() < 2e-2
        assert not torch.equal(taken[state_format][0], exact)


def test_bf16_low_half_is_the_fp32_run_bit_for_bit():
    rule = AdamW(lr=1e-2)
    start = torch.randn(33, 65).bfloat16()
    runs = []
    for weight_format in ("bf16+16", "bf16+fp32"):
        spec = LinearSpec(33, 65, rule, factor_dtype=torch.bfloat16, weight_format=weight_format)
        linear = Linear(spec)
        storage = linear.allocate(start.clone())
        for step in range(1, 11):
            segment = factors(9, 33, 65, step, torch.bfloat16)
            linear.update([segment], storage, linear.scalars({}, step=step, seed=0))
        runs.append(linear.export_weight(storage))
    assert torch.equal(runs[0], runs[1])


def test_stochastic_rounding_depends_on_seed_and_name_only():
    def run(seed, parameter_id):
        spec = LinearSpec(
            32, 64, SGD(lr=1e-3), factor_dtype=torch.bfloat16,
            weight_format="bf16", parameter_id=parameter_id,
        )  # fmt: skip
        linear = Linear(spec)
        storage = linear.allocate(torch.ones(32, 64, dtype=torch.bfloat16))
        segment = factors(9, 32, 64, 1, torch.bfloat16)
        linear.update([segment], storage, linear.scalars({}, step=1, seed=seed))
        return storage.weight

    assert torch.equal(run(1, 1), run(1, 1))
    assert not torch.equal(run(1, 1), run(2, 1))
    assert not torch.equal(run(1, 1), run(1, 2))


def test_dgrad_and_dbias():
    linear = Linear(LinearSpec(13, 17, SGD()))
    storage = linear.allocate(torch.randn(13, 17))
    dy, x = torch.randn(2, 5, 13), torch.randn(2, 5, 17)
    assert torch.allclose(linear.dgrad(dy, storage), dy @ storage.weight, atol=1e-5)
    result = linear.backward(dy, x, storage, mode="keep", need_dbias=True)
    assert result.dx.shape == x.shape
    assert torch.allclose(result.dx, dy @ storage.weight, atol=1e-5)
    assert torch.allclose(result.dbias, dy.sum((0, 1)), atol=1e-5)
    assert result.segment.dy.data_ptr() == dy.data_ptr()  # kept, not copied


def test_accumulate_adds():
    linear = Linear(LinearSpec(13, 17, SGD()))
    accumulator = torch.ones(13, 17)
    segments = [factors(5, 13, 17, 1), factors(6, 13, 17, 2)]
    linear.accumulate(segments, accumulator)
    exact = 1 + sum(s.dy.double().T @ s.x.double() for s in segments)
    assert torch.allclose(accumulator.double(), exact, atol=1e-5)


def test_plan_names_a_schedule_and_a_reason():
    linear = Linear(LinearSpec(256, 256, AdamW()))
    few = linear.plan(tokens=16, micro_batches=1, needs_norm=True)
    assert few.schedule == "deferred"
    assert few.reason
    assert few.gradient_bytes == 256 * 256 * 4
    many = linear.plan(tokens=4096, micro_batches=64, needs_norm=True)
    assert many.schedule == "accumulate"
    assert linear.plan(tokens=16, micro_batches=1, needs_norm=False).schedule == "immediate"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Linear(LinearSpec(0, 4, SGD()), name="fc"), ValueError, "fc: "),
        (lambda: Linear(LinearSpec(4, 4, SGD(), weight_format="x")), ValueError, "weight_format"),
        (lambda: Linear(LinearSpec(4, 4, SGD(), parallel="diagonal")), ValueError, "column, row"),
        (
            lambda: Linear(LinearSpec(4, 4, SGD(), factor_dtype=torch.float64), name="fc"),
            ValueError,
            "fc: factors of torch.float64",
        ),
        (
            lambda: Linear(LinearSpec(4, 4, SGD())).allocate(torch.zeros(4, 5)),
            ValueError,
            r"\(4, 4\)",
        ),
        (
            lambda: Linear(LinearSpec(4, 4, SGD())).allocate(torch.zeros(4, 4).bfloat16()),
            ValueError,
            "torch.float32",
        ),
        (lambda: rule_info("shampoo"), forge_train.ForgeArgumentError, "shampoo"),
        (lambda: rule_info("lion", 4), forge_train.ForgeArgumentError, "lion"),
    ],
)
def test_errors_are_clear(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_status_bands_are_exception_classes():
    cases = {
        lib.FORGE_ERROR_SHAPE: forge_train.ForgeArgumentError,
        lib.FORGE_ERROR_RULE_FUNCTION: forge_train.ForgeRuleError,
        lib.FORGE_ERROR_COLLECTIVE: forge_train.ForgeCommunicationError,
        lib.FORGE_ERROR_NO_BACKEND: forge_train.ForgeBackendError,
        lib.FORGE_ERROR_PANIC: forge_train.ForgeInternalError,
    }
    for status, error in cases.items():
        with pytest.raises(error) as caught:
            check(status, "layer")
        assert caught.value.status == status
        assert caught.value.status_name.startswith("FORGE_ERROR_")
        assert str(caught.value).startswith("layer: ")
    assert issubclass(forge_train.ForgeArgumentError, ValueError)


def test_declarations_keep_integer_defines_only():
    header = """
#ifndef H
#define H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#define A 3
#define B(x) x
typedef int c;
#ifdef __cplusplus
}
#endif
#endif
"""
    assert declarations(header).split() == ["#define", "A", "3", "typedef", "int", "c;"]


def test_a_negative_lr_is_refused_by_the_library():
    linear = Linear(LinearSpec(4, 4, SGD()), name="fc")
    storage = linear.allocate(torch.zeros(4, 4))
    with pytest.raises(forge_train.ForgeArgumentError, match="fc: "):
        linear.update([factors(3, 4, 4)], storage, linear.scalars({"lr": -1.0}, step=1, seed=0))
    assert not storage.weight.any()
