"""The least time that a training step can take on a device, from its bytes and FLOPs alone.

Products are counted at the data sheet's dense bf16 rate, traffic at its memory bandwidth, and
within one product both overlap perfectly. Nothing is charged for launches, norms, activations
between the products or the loss's arithmetic. The bound does not depend on the method, so what a
method stores beyond need (a gradient, say) counts against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama import LlamaConfig

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "bf16+8": 3.0, "bf16+16": 4.0, "bf16+fp32": 6.0}
# q8: FORGE's, one fp32 scale for 128 elements. FlashOptim's (fp16 for 32) takes 0.03 bytes more.
STATE_BYTES = {"fp32": 4.0, "bf16": 2.0, "q8": 1.0 + 4 / 128}
ACTIVATION_BYTES = 2.0


@dataclass(frozen=True)
class Device:
    """Peaks of a data sheet: dense bf16 FLOP/s and bytes/s."""

    flops: float
    bandwidth: float


DEVICES = {
    "H200": Device(989.4e12, 4.8e12),
    "H100 80GB HBM3": Device(989.4e12, 3.35e12),
}


def device_of(name: str) -> Device | None:
    """The data sheet of a device's full name, or None where it is not known."""
    return next((device for key, device in DEVICES.items() if key in name), None)


def limit_ms(
    device: Device,
    config: LlamaConfig,
    tokens: int,
    weight_format: str,
    state_format: str,
    clip: bool,
) -> float:
    """Milliseconds of one AdamW step over one sequence of ``tokens``.

    For each linear: ``Y = X Wᵀ`` and ``dX = dY W``, which read the 2-byte weight, and
    ``dW = dYᵀ X`` with an update that reads and writes weight and two states once. With ``clip``
    the norm of dW besides, in the cheapest of three ways: from the symmetric Gram matrices of the
    factors, by a second product, or by writing and reading a 2-byte dW. Attention: causal products,
    2 forward and 4 backward. Embedding and norms: their update.
    """
    update = 2 * (WEIGHT_BYTES[weight_format] + 2 * STATE_BYTES[state_format])

    def seconds(flops: float, traffic: float) -> float:
        return max(flops / device.flops, traffic / device.bandwidth)

    total = 0.0
    in_linears = 0
    for out, columns in config.linears():
        elements = out * columns
        in_linears += elements
        product = 2.0 * tokens * elements
        factors = ACTIVATION_BYTES * tokens * (out + columns)
        through = seconds(product, factors + ACTIVATION_BYTES * elements)
        total += 2 * through + seconds(product, factors + update * elements)
        if clip:
            total += min(
                seconds(tokens**2 * (out + columns), factors),
                seconds(product, factors),
                seconds(0.0, 2 * 2.0 * elements),
            )
    attention = 6 * 2.0 * (tokens**2 / 2) * config.num_attention_heads * config.head_dim
    total += config.num_hidden_layers * attention / device.flops
    total += update * (config.parameters() - in_linears) / device.bandwidth
    return 1e3 * total
