"""``--spec megatron_layers layer_spec``: Megatron's local layers with torch's fused attention.

Megatron's local attention writes a score for every pair of tokens, which at 4096 tokens decides
memory and time of a step. Here it is torch's ``scaled_dot_product_attention``, for stock and FORGE
alike; all else is ``forge_train.megatron.spec``: Megatron's local linears and torch's norms.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch.nn.attention import SDPBackend, sdpa_kernel

from forge_train.megatron import spec


class CausalAttention(MegatronModule):
    """Causal attention of whole sequences, without dropout, with grouped keys and values."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_options: Any,
    ) -> None:
        """No weights.

        Raises:
            ValueError: a setting that the measured model has not.
        """
        super().__init__(config=config)
        unlike = {
            "a mask other than the causal one": attn_mask_type != AttnMaskType.causal,
            "cross attention": attention_type != "self",
            "--attention-dropout above 0": config.attention_dropout > 0,
            "context parallelism": config.context_parallel_size > 1,
            "a window": config.window_size is not None,
        }
        for what, asked in unlike.items():
            if asked:
                raise ValueError(f"megatron_layers has no {what}; leave it out")
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        *,
        packed_seq_params: Any = None,
        **_options: Any,
    ) -> torch.Tensor:
        """``[s, b, heads · head_dim]`` of query ``[s, b, heads, head_dim]``, key and value.

        Key and value have as many heads as there are query groups on this rank.

        Raises:
            ValueError: a mask, or sequences packed into one.
        """
        if attention_mask is not None or packed_seq_params is not None:
            raise ValueError("megatron_layers is causal by itself; pass attention_mask=None")
        # [s, b, h, d] → [b, h, s, d]: strides alone, which the fused kernels take.
        q_BHSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        # Where the fused kernel cannot run, this is an error, not a slow step.
        only = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if query.is_cuda else nullcontext()
        with only:
            mixed = torch.nn.functional.scaled_dot_product_attention(
                q_BHSD,
                k_BGSD,
                v_BGSD,
                is_causal=True,
                scale=self.scale,
                enable_gqa=q_BHSD.shape[1] != k_BGSD.shape[1],
            )
        return mixed.permute(2, 0, 1, 3).flatten(2).contiguous()


def layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of ``forge_train.megatron.spec``, with :class:`CausalAttention`."""
    made = spec.layer_spec(config, vp_stage)
    for layer in made.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = CausalAttention
    return made
