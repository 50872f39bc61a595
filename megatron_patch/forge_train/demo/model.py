"""A Llama-style GPT from megatron-core's own model code, in its ``local`` layer spec.

RMSNorm, SwiGLU, rotary embeddings, no biases, embedding and output weights of their own.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from forge_train.demo.config import VOCABULARY, RunConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm under sequence parallelism.

    Each rank normalises its own tokens with the whole weight, so the weight's gradient is a sum
    over ranks: the mark ``sequence_parallel`` makes Megatron's ``finalize_model_grads`` add it up.
    (Megatron's WrappedTorchNorm refuses sequence parallelism instead.)
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def transformer_config(run: RunConfig) -> TransformerConfig:
    """megatron-core's configuration of the run's model.

    Every fusion that needs Apex, Transformer Engine or a compiler is off, so that the model is the
    same on every machine.
    """
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    return TransformerConfig(
        num_layers=run.layers,
        hidden_size=run.hidden,
        ffn_hidden_size=run.ffn,
        num_attention_heads=run.heads,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=run.tp,
        sequence_parallel=run.sequence_parallel and run.tp > 1,
        bf16=run.bf16,
        params_dtype=dtype,
        # On a GPU, too: the same seed gives the same weights on both, and at any TP size.
        use_cpu_initialization=True,
        attention_softmax_in_fp32=True,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )


def build_model(run: RunConfig) -> MegatronModule:
    """This rank's shard of the model, not yet wrapped in DDP; a Float16Module when it is bf16."""
    config = transformer_config(run)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    model: MegatronModule = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[layer] * run.layers, layer_norm=RMSNorm
        ),
        vocab_size=VOCABULARY,
        max_sequence_length=run.sequence,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    if run.device == "cuda":
        model.cuda(torch.cuda.current_device())
    return Float16Module(config, model) if run.bf16 else model
