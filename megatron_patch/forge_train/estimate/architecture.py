"""The sizes of a transformer, and the modules with parameters that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
HEAD = "lm_head"
FAMILIES = (*LLAMA_LIKE, "gpt2", "gpt_neox")


@dataclass(frozen=True)
class Module:
    """One module with parameters, under the name that it has in the transformers package.

    Attributes:
        name: such as ``model.layers.0.self_attn.q_proj``.
        kind: ``Linear``, ``Conv1D``, ``Embedding``, ``RMSNorm`` or ``LayerNorm``.
        shape: of its weight.
        bias: whether it has one, of the outputs' length.
        parallel: what tensor parallelism does with it: ``column``, ``row``, ``vocabulary`` or
            ``none`` (each rank has it whole).
        group: the name that all modules of its kind share in a report.
        tied_to: the module whose weight it uses; empty: its own.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bias: bool = False
    parallel: str = "none"
    group: str = ""
    tied_to: str = ""

    @property
    def weight(self) -> str:
        """The name of the parameter that it multiplies with or looks up."""
        return f"{self.tied_to or self.name}.weight"

    @property
    def outputs(self) -> int:
        """The length of its bias."""
        return self.shape[1] if self.kind == "Conv1D" else self.shape[0]


@dataclass(frozen=True)
class Architecture:
    """The sizes that memory depends on.

    Attributes:
        name: of the model or of its file.
        family: one of :data:`FAMILIES`, or ``linears`` for linears one after another.
        hidden, intermediate, layers, heads, key_value_heads, head_dim, vocabulary, positions: as
            the config has them; ``positions`` is 0 without learned positions.
        tied: whether the output layer is the embedding.
        attention_bias, output_bias, mlp_bias: of q, k, v; of the attention's output; of the MLP.
        query_key_norm: whether heads of q and k are normed.
        rotary: the part of a head that is rotated, 0 to 1.
        parallel_residual: whether attention and MLP read the same input.
        dropout: whether masks of dropout are kept, by place: ``attention``, ``residual``,
            ``embedding``.
        activation: ``silu``, ``gelu`` or ``gelu_new``.
        linears: of the family ``linears``: out, in, count.
    """

    name: str
    family: str
    hidden: int = 0
    intermediate: int = 0
    layers: int = 0
    heads: int = 0
    key_value_heads: int = 0
    head_dim: int = 0
    vocabulary: int = 0
    positions: int = 0
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    rotary: float = 1.0
    parallel_residual: bool = False
    dropout: frozenset[str] = frozenset()
    activation: str = "silu"
    linears: tuple[tuple[int, int, int], ...] = ()

    @property
    def query(self) -> int:
        """Columns of all heads' queries."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Columns of all heads' keys, and of their values."""
        return self.key_value_heads * self.head_dim


def modules_of(found: Architecture) -> list[Module]:
    """Every module with parameters, in the order of the forward."""
    if found.family == "linears":
        return [
            Module(f"linears.{group}.{index}", "Linear", (out, columns), group=f"{out}x{columns}")
            for group, (out, columns, count) in enumerate(found.linears)
            for index in range(count)
        ]
    blocks = {"gpt2": _gpt2_modules, "gpt_neox": _gpt_neox_modules}.get(
        found.family, _llama_modules
    )
    return blocks(found)


def _named(prefix: str, group: str, modules: Sequence[Module]) -> list[Module]:
    """The same modules below ``prefix``; ``group`` is the prefix without a layer's number."""
    return [
        replace(module, name=f"{prefix}{module.name}", group=f"{group}{module.name}")
        for module in modules
    ]


def _head(found: Architecture, embedding: str) -> Module:
    return Module(
        HEAD, "Linear", (found.vocabulary, found.hidden), parallel="column", group=HEAD,
        tied_to=embedding if found.tied else "",
    )  # fmt: skip


def _llama_modules(found: Architecture) -> list[Module]:
    h, q, kv, wide = found.hidden, found.query, found.key, found.intermediate
    norm, head_norm = (h,), (found.head_dim,)
    bias = found.attention_bias
    layer = [
        Module("input_layernorm", "RMSNorm", norm),
        Module("self_attn.q_proj", "Linear", (q, h), bias, "column"),
        Module("self_attn.k_proj", "Linear", (kv, h), bias, "column"),
        Module("self_attn.v_proj", "Linear", (kv, h), bias, "column"),
        Module("self_attn.o_proj", "Linear", (h, q), found.output_bias, "row"),
        Module("post_attention_layernorm", "RMSNorm", norm),
        Module("mlp.gate_proj", "Linear", (wide, h), found.mlp_bias, "column"),
        Module("mlp.up_proj", "Linear", (wide, h), found.mlp_bias, "column"),
        Module("mlp.down_proj", "Linear", (h, wide), found.mlp_bias, "row"),
    ]
    if found.query_key_norm:
        layer[4:4] = [
            Module("self_attn.q_norm", "RMSNorm", head_norm),
            Module("self_attn.k_norm", "RMSNorm", head_norm),
        ]
    embedding = "model.embed_tokens"
    modules = [Module(embedding, "Embedding", (found.vocabulary, h), False, "vocabulary",
                      embedding)]  # fmt: skip
    for index in range(found.layers):
        modules += _named(f"model.layers.{index}.", "", layer)
    modules.append(Module("model.norm", "RMSNorm", norm, group="model.norm"))
    return [*modules, _head(found, embedding)]


def _gpt2_modules(found: Architecture) -> list[Module]:
    h, wide = found.hidden, found.intermediate
    layer = [
        Module("ln_1", "LayerNorm", (h,), True),
        # transformers' Conv1D keeps its weight as [in, out].
        Module("attn.c_attn", "Conv1D", (h, 3 * h), True, "column"),
        Module("attn.c_proj", "Conv1D", (h, h), True, "row"),
        Module("ln_2", "LayerNorm", (h,), True),
        Module("mlp.c_fc", "Conv1D", (h, wide), True, "column"),
        Module("mlp.c_proj", "Conv1D", (wide, h), True, "row"),
    ]
    embedding = "transformer.wte"
    modules = [
        Module(embedding, "Embedding", (found.vocabulary, h), False, "vocabulary", embedding),
        Module("transformer.wpe", "Embedding", (found.positions, h), group="transformer.wpe"),
    ]
    for index in range(found.layers):
        modules += _named(f"transformer.h.{index}.", "", layer)
    modules.append(Module("transformer.ln_f", "LayerNorm", (h,), True, group="transformer.ln_f"))
    return [*modules, _head(found, embedding)]


def _gpt_neox_modules(found: Architecture) -> list[Module]:
    h, wide = found.hidden, found.intermediate
    layer = [
        Module("input_layernorm", "LayerNorm", (h,), True),
        Module("post_attention_layernorm", "LayerNorm", (h,), True),
        Module(
            "attention.query_key_value", "Linear", (3 * h, h), found.attention_bias, "column"
        ),
        Module("attention.dense", "Linear", (h, h), found.output_bias, "row"),
        Module("mlp.dense_h_to_4h", "Linear", (wide, h), True, "column"),
        Module("mlp.dense_4h_to_h", "Linear", (h, wide), True, "row"),
    ]  # fmt: skip
    embedding, norm = "gpt_neox.embed_in", "gpt_neox.final_layer_norm"
    modules = [Module(embedding, "Embedding", (found.vocabulary, h), False, "vocabulary",
                      embedding)]  # fmt: skip
    for index in range(found.layers):
        modules += _named(f"gpt_neox.layers.{index}.", "", layer)
    modules.append(Module(norm, "LayerNorm", (h,), True, group=norm))
    return [*modules, _head(found, embedding)]
