"""The unfused peer: AdamW as one element-wise pass in Triton, for every pair of formats.

It is made to run at the speed of memory, nothing else: it rounds to the nearest (stochastic
rounding would only slow it down), reads each array once, writes each once, and its block size is
tuned on the device. Without a gradient to read, the gradient is the first moment itself: it costs
no byte and keeps the data random however often the kernel runs, where a constant would turn all
states into constants, which draw less power.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK_Q8 = 128
"""Elements that share a scale in a q8 state."""

WEIGHT_BYTES = {"fp32": 8.0, "bf16": 4.0, "bf16+fp32": 10.0, "bf16+16": 8.0}
"""Bytes read and written per parameter; beside an fp32 master the bf16 weight is only written."""
STATE_BYTES = {"fp32": 8.0, "bf16": 4.0, "q8": 2.0 + 8.0 / BLOCK_Q8}
"""Bytes read and written per parameter and state."""
GRADIENT_BYTES = 2.0

_WEIGHT_KIND = {"fp32": 0, "bf16": 0, "bf16+fp32": 1, "bf16+16": 2}


def update_bytes(weight_format: str, state_format: str, gradient: bool) -> float:
    """The least bytes per parameter of one AdamW step."""
    least = WEIGHT_BYTES[weight_format] + 2 * STATE_BYTES[state_format]
    return least + (GRADIENT_BYTES if gradient else 0.0)


@triton.jit
def _sqrt(x):  # noqa: ANN001, ANN202
    # tl.sqrt and the division would each spend four more instructions on denormals.
    return tl.inline_asm_elementwise(
        "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _reciprocal(x):  # noqa: ANN001, ANN202
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _byte_to_float(code):  # noqa: ANN001, ANN202
    # The bits of 2²³ + code: a conversion instruction takes as long as eight additions.
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _float_to_byte(x):  # noqa: ANN001, ANN202
    """Rounds 0 ≤ x ≤ 255 to the nearest: the low byte of 2²³ + x."""
    return (x + 8388608.0).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def _load_weight(w_ptr, extra_ptr, at, KIND: tl.constexpr):  # noqa: ANN001, ANN202
    if KIND == 1:
        return tl.load(extra_ptr + at)
    w = tl.load(w_ptr + at)
    if KIND == 2:
        high = w.to(tl.int16, bitcast=True).to(tl.int32) << 16
        # The bf16 is rounded to the nearest, so the lower half counts as signed.
        return (high + tl.load(extra_ptr + at).to(tl.int32)).to(tl.float32, bitcast=True)
    return w.to(tl.float32)


@triton.jit
def _store_weight(w_ptr, extra_ptr, at, w, KIND: tl.constexpr):  # noqa: ANN001, ANN202
    if KIND == 2:
        bits = w.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(w_ptr + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True))
        tl.store(extra_ptr + at, bits.to(tl.int16))
    else:
        if KIND == 1:
            tl.store(extra_ptr + at, w)
        tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty))


@triton.jit
def _adamw(w, m, g, v, decay, step_size, beta1, beta2, root_correction, eps):  # noqa: ANN001, ANN202
    """One AdamW step in fp32; also returns √v, which q8 stores."""
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * g * g
    root = _sqrt(v)
    w = w * decay - step_size * m * _reciprocal(root * root_correction + eps)
    return w, m, v, root


@triton.jit
def adamw_kernel(  # noqa: ANN201
    w_ptr,  # noqa: ANN001
    extra_ptr,  # noqa: ANN001
    m_ptr,  # noqa: ANN001
    v_ptr,  # noqa: ANN001
    g_ptr,  # noqa: ANN001
    decay,  # noqa: ANN001
    step_size,  # noqa: ANN001
    beta1,  # noqa: ANN001
    beta2,  # noqa: ANN001
    root_correction,  # noqa: ANN001
    eps,  # noqa: ANN001
    KIND: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """fp32 or bf16 states; the number of elements is a multiple of BLOCK."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = _load_weight(w_ptr, extra_ptr, at, KIND)
    m = tl.load(m_ptr + at).to(tl.float32)
    v = tl.load(v_ptr + at).to(tl.float32)
    g = tl.load(g_ptr + at).to(tl.float32) if GRADIENT else m
    w, m, v, _ = _adamw(w, m, g, v, decay, step_size, beta1, beta2, root_correction, eps)
    _store_weight(w_ptr, extra_ptr, at, w, KIND)
    tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty))
    tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty))


@triton.jit
def adamw_q8_kernel(  # noqa: ANN201
    w_ptr,  # noqa: ANN001
    extra_ptr,  # noqa: ANN001
    m_ptr,  # noqa: ANN001
    v_ptr,  # noqa: ANN001
    m_scale_ptr,  # noqa: ANN001
    v_scale_ptr,  # noqa: ANN001
    g_ptr,  # noqa: ANN001
    decay,  # noqa: ANN001
    step_size,  # noqa: ANN001
    beta1,  # noqa: ANN001
    beta2,  # noqa: ANN001
    root_correction,  # noqa: ANN001
    eps,  # noqa: ANN001
    KIND: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """8-bit states with FORGE's square-root codes; ROWS blocks of 128 to a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    w = _load_weight(w_ptr, extra_ptr, at, KIND)
    m_scale = tl.load(m_scale_ptr + row)[:, None]
    v_scale = tl.load(v_scale_ptr + row)[:, None]
    m_level = _byte_to_float(tl.load(m_ptr + at)) - 128.0
    v_root = _byte_to_float(tl.load(v_ptr + at)) * (v_scale * (1.0 / 255.0))
    m = m_level * tl.abs(m_level) * (m_scale * (1.0 / (127.0 * 127.0)))
    g = tl.load(g_ptr + at).to(tl.float32) if GRADIENT else m
    w, m, _, root = _adamw(
        w, m, g, v_root * v_root, decay, step_size, beta1, beta2, root_correction, eps
    )
    _store_weight(w_ptr, extra_ptr, at, w, KIND)
    # 1e-30: an all-zero block divides by something, and its codes are 0.
    m_max = tl.max(tl.abs(m), axis=1)
    v_max = tl.max(root, axis=1)
    m_level = _sqrt(tl.abs(m) * (127.0 * 127.0 * _reciprocal(tl.maximum(m_max, 1e-30)))[:, None])
    sign = m.to(tl.int32, bitcast=True) & -0x80000000
    m_level = (m_level.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    v_code = root * (255.0 * _reciprocal(tl.maximum(v_max, 1e-30)))[:, None]
    tl.store(m_ptr + at, _float_to_byte(m_level + 128.0))
    tl.store(v_ptr + at, _float_to_byte(tl.minimum(v_code, 255.0)))
    tl.store(m_scale_ptr + row, m_max)
    tl.store(v_scale_ptr + row, v_max)


@dataclass(frozen=True)
class Config:
    """Elements to a program (of 128 each for q8) and warps to a program."""

    block: int
    num_warps: int


CONFIGS = (
    Config(1024, 4),
    Config(2048, 8),
    Config(2048, 4),
    Config(4096, 8),
    Config(1024, 2),
    Config(512, 2),
)
CONFIGS_Q8 = (
    Config(2048, 4),
    Config(1024, 2),
    Config(4096, 8),
    Config(1024, 4),
    Config(2048, 8),
    Config(4096, 4),
)


@dataclass
class Arrays:
    """One parameter with its states, contiguous; scales are ``[elements / 128]`` here."""

    weight_format: str
    state_format: str
    weight: torch.Tensor
    extra: torch.Tensor | None
    moments: tuple[torch.Tensor, torch.Tensor]
    scales: tuple[torch.Tensor, torch.Tensor] | None


def launch(arrays: Arrays, gradient: torch.Tensor | None, config: Config) -> None:
    """One AdamW step in place; ``gradient`` is bf16, shaped like the weight, or None."""
    beta1, beta2, lr = 0.9, 0.95, 1e-3
    scalars = (1.0 - lr * 0.1, lr, beta1, beta2, 1.0, 1e-8)
    n = arrays.weight.numel()
    if n % config.block:
        raise ValueError(f"{n} parameters are no multiple of the block of {config.block}")
    # A pointer has to be given for each argument; those that are not there are never read.
    extra = arrays.weight if arrays.extra is None else arrays.extra
    g = arrays.weight if gradient is None else gradient
    kind, has_gradient = _WEIGHT_KIND[arrays.weight_format], gradient is not None
    grid = (n // config.block,)
    if arrays.scales is None:
        adamw_kernel[grid](
            arrays.weight,
            extra,
            *arrays.moments,
            g,
            *scalars,
            KIND=kind,
            GRADIENT=has_gradient,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    else:
        adamw_q8_kernel[grid](
            arrays.weight,
            extra,
            *arrays.moments,
            *arrays.scales,
            g,
            *scalars,
            KIND=kind,
            GRADIENT=has_gradient,
            ROWS=config.block // BLOCK_Q8,
            num_warps=config.num_warps,
        )


def tune(time_us: Callable[[Config], float], state_format: str) -> list[Config]:
    """All configurations, the fastest by ``time_us`` first."""
    configs = CONFIGS_Q8 if state_format == "q8" else CONFIGS
    return sorted(configs, key=time_us)
