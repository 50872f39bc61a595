"""What the GPU tests share: layers on both backends, guarded memory, fp64 references, bounds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from forge_train import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    AdEMAMix,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    Rule,
    Signum,
)
from forge_train._context import Context, default_context
from forge_train.native import Linear, LinearSpec, Segment, Storage

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"
)
DEVICE = "cuda"
EPS32 = 2.0**-24

RULES: dict[str, Rule] = {
    "sgd": SGD(lr=0.05, weight_decay=0.1),
    "sgd-momentum": SGD(lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "sgd-nesterov": SGD(lr=0.05, momentum=0.9, nesterov=True),
    "adam": Adam(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-6),
    "adamw": AdamW(lr=1e-2, eps=1e-6),
    "adamw-maximize": AdamW(lr=1e-2, eps=1e-6, maximize=True),
    "lion": Lion(lr=1e-2, weight_decay=0.1),
    "adam-amsgrad": Adam(lr=1e-2, eps=1e-6, amsgrad=True),
    "adamax": Adamax(lr=1e-2, weight_decay=0.1),
    "nadam": NAdam(lr=1e-2, eps=1e-6, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": RAdam(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1),
    "ademamix": AdEMAMix(lr=1e-2, eps=1e-6, warmup=30),
    "rmsprop": RMSprop(lr=1e-2, eps=1e-6),
    "rmsprop-centered": RMSprop(lr=1e-2, eps=1e-2, momentum=0.8, centered=True),
    "adagrad": Adagrad(eps=1e-6, lr_decay=0.1, weight_decay=0.1),
    "adadelta": Adadelta(weight_decay=0.1),
    "rprop": Rprop(),
    "asgd": ASGD(lambd=0.01, t0=1, weight_decay=0.1),
    "signum": Signum(lr=1e-2, weight_decay=0.1),
}
# Those that are compiled for a few formats only.
FURTHER_RULES = list(RULES)[list(RULES).index("adam-amsgrad") :]
# States that are never negative.
SQUARES = {
    "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "acc_delta", "step_size",
}  # fmt: skip
WEIGHTS = ("fp32", "bf16", "bf16+fp32", "bf16+16")
STATES = ("fp32", "bf16", "q8")


@dataclass(frozen=True)
class Case:
    """A scheme; ``str`` is the test's id."""

    rule: str = "adamw"
    weight: str = "fp32"
    state: str = "fp32"
    rounding: str = "stochastic"
    factor: str = "auto"

    @property
    def factor_dtype(self) -> torch.dtype:
        if self.factor == "auto":
            return torch.float32 if self.weight == "fp32" else torch.bfloat16
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.factor]

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.weight == "fp32" else torch.bfloat16

    def spec(self, rows: int, cols: int, **changes: object) -> LinearSpec:
        spec = LinearSpec(
            rows, cols, RULES[self.rule], factor_dtype=self.factor_dtype,
            weight_format=self.weight, state_formats=self.state,
            weight_rounding=self.rounding, state_rounding=self.rounding, parameter_id=77,
        )  # fmt: skip
        return replace(spec, **changes)

    def __str__(self) -> str:
        factor = "" if self.factor == "auto" else f"-{self.factor}"
        return f"{self.rule}-{self.weight}-{self.state}-{self.rounding}{factor}"


def ids(cases: Sequence[Case]) -> list[str]:
    return [str(case) for case in cases]


def linear_on(device: str, spec: LinearSpec, context: Context | None = None) -> Linear:
    return Linear(spec, name="case", context=context or default_context(device))


# -- memory -------------------------------------------------------------------------------------

_BAND, _PATTERN = 1024, 0xA5


class Guard:
    """Copies tensors to memory with bands around it; :meth:`check` looks whether a band changed."""

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, int]] = []

    def __call__(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        size = tensor.nbytes
        padded = (size + 255) // 256 * 256
        buffer = torch.full((padded + 2 * _BAND,), _PATTERN, dtype=torch.uint8, device=DEVICE)
        inner = buffer[_BAND : _BAND + size].view(tensor.dtype).view(tensor.shape)
        inner.copy_(tensor)
        self._buffers.append((buffer, size))
        return inner

    def storage(self, storage: Storage) -> Storage:
        return Storage(
            weight=self(storage.weight),
            weight_extra=self(storage.weight_extra),
            states=[self(state) for state in storage.states],
            scales=[self(scale) for scale in storage.scales],
        )

    def check(self) -> None:
        for buffer, size in self._buffers:
            assert (buffer[:_BAND] == _PATTERN).all(), "written before a buffer"
            assert (buffer[_BAND + size :] == _PATTERN).all(), "written past a buffer"


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """``torch.empty`` gives NaN and the largest integers inside."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# -- data ---------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factors(
    tokens: int, rows: int, cols: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0
) -> Segment:
    """Random dY and X on the CPU; :func:`to_gpu` copies them."""
    g = generator(seed)
    dy = torch.randn(tokens, rows, generator=g) * scale / math.sqrt(max(tokens, 1))
    x = torch.randn(tokens, cols, generator=g)
    return Segment.of(dy.to(dtype), x.to(dtype))


def to_gpu(segments: Sequence[Segment]) -> list[Segment]:
    return [Segment.of(s.dy.to(DEVICE), s.x.to(DEVICE)) for s in segments]


def to_cpu(storage: Storage) -> Storage:
    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.cpu().clone()

    return Storage(
        copy(storage.weight), copy(storage.weight_extra),
        [copy(t) for t in storage.states], [copy(t) for t in storage.scales],
    )  # fmt: skip


def initial(linear: Linear, seed: int = 5, warm: bool = True) -> Storage:
    """A parameter with random weights and, if ``warm``, random states, on the linear's device.

    Both devices start with the same bits: values are made on the CPU and rounded by the backend.
    """
    g = generator(seed)
    rows, cols = linear.layout.out_local, linear.layout.in_local
    values = torch.randn(rows, cols, generator=g)
    weight = values.to(linear.layout.weight.dtype).to(linear.device)
    storage = linear.allocate(weight)
    if storage.weight_extra is not None:
        linear.import_weight(storage, values)
    if warm:
        for index, name in enumerate(linear.rule.state_names):
            state = torch.randn(rows, cols, generator=g) * 0.1
            linear.import_state(storage, index, state.square() if name in SQUARES else state)
    return storage


def tensors(storage: Storage) -> list[torch.Tensor]:
    every = [storage.weight, storage.weight_extra, *storage.states, *storage.scales]
    return [tensor for tensor in every if tensor is not None]


def assert_same_bits(a: Storage, b: Storage, where: object = "") -> None:
    for index, (s, t) in enumerate(zip(tensors(a), tensors(b), strict=True)):
        same = s.cpu().contiguous().view(torch.uint8), t.cpu().contiguous().view(torch.uint8)
        assert torch.equal(*same), f"array {index} differs {where}"


# -- references ---------------------------------------------------------------------------------


def reference(
    rule: Rule, w: torch.Tensor, states: list[torch.Tensor], g: torch.Tensor, step: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One step in fp64; see docs/numerics.md, "Rules". Inputs are not changed."""
    w, g = w.double(), g.double() * (-1 if rule.maximize else 1)
    states = [state.double() for state in states]
    lr, decay = rule.lr, rule.weight_decay
    if isinstance(rule, SGD):
        g = g + decay * w
        if not rule.momentum:
            return w - lr * g, []
        b = g if step == 1 else rule.momentum * states[0] + (1 - rule.dampening) * g
        return w - lr * (g + rule.momentum * b if rule.nesterov else b), [b]
    beta1, beta2 = rule.betas
    m = states[0]
    if isinstance(rule, Lion):
        update = torch.sign(beta1 * m + (1 - beta1) * g)
        return w * (1 - lr * decay) - lr * update, [beta2 * m + (1 - beta2) * g]
    if isinstance(rule, AdamW):
        w = w * (1 - lr * decay)
    else:
        g = g + decay * w
    m = m + (1 - beta1) * (g - m)
    v = beta2 * states[1] + (1 - beta2) * g * g
    root = v.sqrt() / math.sqrt(1 - beta2**step) + rule.eps
    return w - lr / (1 - beta1**step) * m / root, [m, v]


def product(segments: Sequence[Segment], rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 dW, and a bound on what fp32 sums may differ from it, whatever their order."""
    exact = torch.zeros(rows, cols, dtype=torch.float64, device=DEVICE)
    magnitude = torch.zeros_like(exact)
    tokens = 0
    for segment in segments:
        dy, x = segment.dy.to(DEVICE).double(), segment.x.to(DEVICE).double()
        exact += dy.T @ x
        magnitude += dy.abs().T @ x.abs()
        tokens += dy.shape[0]
    return exact, (8 + tokens) * EPS32 * magnitude


def bf16_ulp(values: torch.Tensor) -> torch.Tensor:
    """The distance of neighbouring bf16 numbers at these values."""
    _, exponent = torch.frexp(values.double().abs().clamp_min(2.0**-126))
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent - 8)


def blocks(values: torch.Tensor) -> torch.Tensor:
    """Each element's largest magnitude within its q8 block of 128 columns."""
    rows, cols = values.shape
    padded = torch.nn.functional.pad(values.abs(), (0, -cols % 128)).view(rows, -1, 128)
    return padded.amax(2, keepdim=True).expand(-1, -1, 128).reshape(rows, -1)[:, :cols]


def storage_error(case: Case, values: torch.Tensor, name: str) -> torch.Tensor:
    """How far a stored value may be from the exact one; ``name``: a state's, or ``weight``."""
    values = values.double()
    fmt = case.weight if name == "weight" else case.state
    if fmt == "bf16":
        return bf16_ulp(values) * (1.0 if case.rounding == "stochastic" else 0.5)
    if fmt != "q8":
        return torch.zeros_like(values)
    if name.endswith("sq"):
        step = blocks(values.sqrt()) / 255 * 1.001
        root = values.sqrt()
        return (root + step).square() - root.square() + 1e-30
    scale = blocks(values)
    ratio = (values.abs() / scale.clamp_min(1e-300)).sqrt()
    return 1.001 * scale * (2 * ratio / 127 + 1 / 127**2)
