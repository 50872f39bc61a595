"""``--spec forge_train.megatron.spec layer_spec``: Megatron's local layers, under sequence parallelism, too.

Megatron's own local layers take their norms from Apex or torch, and with torch's refuse
``--sequence-parallel``: nobody tells the gradients of their weights to be summed over the
tensor-parallel ranks. Here they are told to.
"""  # noqa: E501  (a command)

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class Norm:
    """Makes torch's norm of ``--normalization``, whose weights say that tokens are shared out."""

    def __new__(  # type: ignore[misc]  # as Megatron's own wrapper does
        cls, config: Any, hidden_size: int, eps: float = 1e-5, **_options: Any
    ) -> torch.nn.Module:
        """A ``torch.nn.LayerNorm`` or ``RMSNorm`` over ``hidden_size``.

        Raises:
            ValueError: an option of norms that torch's have not.
        """
        for option in ("layernorm_zero_centered_gamma", "memory_efficient_layer_norm"):
            if getattr(config, option, False):
                raise ValueError(f"{option} is not supported by torch's norms; turn it off")
        made: torch.nn.Module = _NORMS[config.normalization](
            hidden_size, eps=eps, dtype=config.params_dtype
        )
        for parameter in made.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return made


def layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of a stage, dense ones and mixtures of experts.

    Args:
        config: the model's; its ``transformer`` is the ``TransformerConfig``.
        vp_stage: the model chunk, under an interleaved pipeline.

    Raises:
        ValueError: latent attention, whose layers are others.
    """
    transformer = config.transformer
    if transformer.multi_latent_attention:
        raise ValueError(
            "--spec forge_train.megatron.spec layer_spec is not for multi_latent_attention: leave "
            "it out"
        )
    block = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=False,
        normalization=transformer.normalization,
        vp_stage=vp_stage,
    )
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        if transformer.qk_layernorm:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=block.layer_specs, layer_norm=Norm)
