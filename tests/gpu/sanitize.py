"""One small call of every kind, for compute-sanitizer: ``compute-sanitizer python sanitize.py``.

Not a test of numbers. Data is made on the CPU and copied, so that next to no kernel but FORGE's
runs under the tool. With PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor is an allocation of its own,
and the tool sees every access beyond one.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from gpu_cases import RULES

from forge_train import AdamW, Rule, UserRule
from forge_train._lib import ffi
from forge_train.native import Linear, LinearSpec, Scalars, Segment, Storage, update_together

WEIGHTS = ("bf16", "bf16+16", "bf16+fp32", "fp32")
STATES = ("bf16", "fp32", "q8")
# Tiles that are whole, tiles that are cut in both dimensions, and a shape of multiples of 8 alone.
SHAPES = ((256, 256), (144, 392), (200, 120))
# Ragged, more than one segment, none.
TOKENS = ((64,), (100, 37), ())


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers on the GPU, drawn on the CPU."""
    return torch.randn(*shape).to(dtype).cuda()


def run(
    rule: Rule,
    formats: tuple[str, str],
    shape: tuple[int, int],
    tokens: tuple[int, ...],
    factor: torch.dtype,
    products: str,
) -> None:
    """Every call over one linear, and the update of two of them together."""
    spec = LinearSpec(
        *shape, rule, factor_dtype=factor, weight_format=formats[0], state_formats=formats[1],
        fp32_products=products,
    )  # fmt: skip
    linear = Linear(spec, name="sanitize", device=torch.device("cuda"))
    # cuBLASLt writes dW's panels at the start of the workspace; initcheck takes them for never
    # written, probably since it does not follow stores by TMA.
    assert linear.context.workspace is not None
    linear.context.workspace[: 32 << 20].zero_()
    storage = linear.allocate(random(*shape, dtype=linear.layout.weight.dtype))
    scalars = linear.scalars(rule.options, step=1, seed=1)
    segments = [
        Segment.of(random(t, shape[0], dtype=factor), random(t, shape[1], dtype=factor))
        for t in tokens
    ]
    accumulator = random(*shape, dtype=torch.float32)
    linear.update(segments, storage, scalars)
    linear.update(segments, storage, scalars, accumulator)
    linear.accumulate(segments, accumulator)
    linear.norm(segments)
    for segment in segments[:1]:
        linear.backward(
            segment.dy, segment.x, storage, mode="update", need_dbias=True, scalars=scalars
        )
        linear.backward(segment.dy, segment.x, storage, mode="keep")
    update_two(linear, storage, segments, scalars)
    linear.import_weight(storage, linear.export_weight(storage))
    for index in range(len(storage.states)):
        linear.import_state(storage, index, linear.export_state(storage, index))
    torch.cuda.synchronize()


def update_two(linear: Linear, storage: Storage, segments: list[Segment], scalars: Scalars) -> None:
    """The grouped update of the linear and of another parameter like it."""
    other = linear.allocate(storage.weight.clone())
    calls = [linear.update_struct(segments, one, scalars) for one in (storage, other)]
    size = ffi.sizeof("forge_report")
    reports = [torch.zeros(size, dtype=torch.uint8).cuda() for _ in calls]
    for (call, _), report in zip(calls, reports, strict=True):
        call.device_report = ffi.cast("forge_report *", report.data_ptr())
    update_together([linear] * 2, [call for call, _ in calls])
    torch.cuda.synchronize()


# Rule, formats of weight and states, dtype of the factors, FORGE_MAINLOOP or how fp32 factors are
# multiplied.
Case = tuple[Rule, tuple[str, str], torch.dtype, str]


def cases(quick: bool) -> list[Case]:
    """Every format under AdamW, every rule, dtype and mainloop in some."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found: list[Case] = [
        (AdamW(), (weight, state), fp32 if weight == "fp32" else bf16, "")
        for weight in WEIGHTS
        for state in STATES
        if not quick or weight == "bf16"
    ]
    if quick:
        return found
    own = UserRule(
        "sanitized", states=["m"], beta=0.9, per_step={"bias": "1.0 - pow(beta, step)"},
        cuda="m += (1.0f - beta) * (g - m); w -= lr / bias * m;",
    )  # fmt: skip
    for rule in (*RULES.values(), own):
        found.append((rule, ("bf16", "bf16"), bf16, ""))
        found.append((rule, ("bf16", "q8"), bf16, "sm80"))
    found += [(AdamW(), (weight, "fp32"), bf16, "sm80") for weight in WEIGHTS]
    found += [(AdamW(), ("bf16", state), bf16, "panel") for state in STATES]
    found += [(AdamW(), ("bf16", "bf16"), fp16, mainloop) for mainloop in ("", "sm80")]
    found += [(AdamW(), (weight, "fp32"), fp32, "bf16x3") for weight in WEIGHTS]
    return found


def main() -> None:
    """Run all of it; what the library does not support is named, not failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="AdamW with bf16 weights alone")
    parser.add_argument(
        "--part", default="1/1", metavar="K/N", help="every N-th case from the K-th on"
    )
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    if not 1 <= part <= parts:
        parser.error(f"--part {options.part}: K is from 1 to N")
    if not torch.cuda.is_available():
        sys.exit("sanitize: no NVIDIA GPU that torch can use")
    torch.manual_seed(1)
    calls, refused = 0, 0
    every = list(enumerate(cases(options.quick)))
    for index, (rule, formats, factor, mainloop) in every[part - 1 :: parts]:
        products = mainloop if mainloop == "bf16x3" else "exact"
        os.environ["FORGE_MAINLOOP"] = "" if products == "bf16x3" else mainloop
        for number, shape in enumerate(SHAPES):
            # Each shape with each number of tokens in every third case: the tools are slow.
            tokens = TOKENS[(number + index) % len(TOKENS)]
            name = f"{rule.name} {'/'.join(formats)} {shape} {tokens} {factor} {mainloop}"
            try:
                run(rule, formats, shape, tokens, factor, products)
            except ValueError as error:
                refused += 1
                print(f"sanitize: {name}: refused: {error}", flush=True)
            calls += 1
        print(f"sanitize: {rule.name} {'/'.join(formats)} {factor} {mainloop} done", flush=True)
    print(f"sanitize: {calls} cases, {refused} refused")
    if refused == calls:
        sys.exit("sanitize: the library refused every case")


if __name__ == "__main__":
    main()
