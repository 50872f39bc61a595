"""The tape of one micro-batch through a transformer, as the transformers package computes it.

Sizes are one rank's under tensor parallelism. Which tensors each operation saves is autograd's
doing; tests compare it with what torch is seen to hold.
"""

from __future__ import annotations

from math import prod

from .architecture import HEAD, Architecture, Module, modules_of
from .methods import Parameter
from .options import Options
from .tape import LOGITS, Tape, Value

_FP32 = 4
_LABEL = 8


def local_shape(module: Module, tp: int) -> tuple[int, ...]:
    """This rank's part of a weight.

    Raises:
        ValueError: a dimension that ``tp`` ranks cannot share out.
    """
    if tp == 1 or module.parallel == "none":
        return module.shape
    outputs = 1 if module.kind == "Conv1D" else 0
    dimension = outputs if module.parallel != "row" else 1 - outputs
    shape = list(module.shape)
    if module.parallel == "vocabulary" or module.name == HEAD:
        # Megatron pads a vocabulary so that it divides.
        shape[dimension] = -(-shape[dimension] // tp)
    elif shape[dimension] % tp:
        raise ValueError(
            f"--tp {tp} does not divide {module.name}, {module.shape[0]}x{module.shape[1]}; "
            "choose a divisor of the heads and of the MLP's width"
        )
    else:
        shape[dimension] //= tp
    return tuple(shape)


def local_bias(module: Module, tp: int) -> tuple[int, ...]:
    """This rank's part of a bias, which a row-parallel linear has whole."""
    return (module.outputs // (tp if module.parallel == "column" else 1),)


def parameters_of(found: Architecture, options: Options) -> list[Parameter]:
    """This rank's parameters, each once."""
    sizes: dict[str, int] = {}
    for module in modules_of(found):
        sizes[module.weight] = prod(local_shape(module, options.tp))
        if module.bias:
            sizes[f"{module.name}.bias"] = local_bias(module, options.tp)[0]
    return [Parameter(name, size, size * options.element) for name, size in sizes.items()]


class Forward:
    """Builds the tape.

    Args:
        found: the model.
        options: the run.
    """

    def __init__(self, found: Architecture, options: Options) -> None:
        if found.heads and (found.heads % options.tp or found.key_value_heads % options.tp):
            raise ValueError(
                f"--tp {options.tp} does not divide the model's {found.heads} heads and "
                f"{found.key_value_heads} key-value heads"
            )
        self.found, self.options, self.tape = found, options, Tape()
        self.element, self.tokens = options.element, options.tokens
        # Between the linears, under sequence parallelism.
        self.shard = options.tokens // (options.tp if options.sp else 1)
        self.modules = {module.name: module for module in modules_of(found)}
        self.cos = self.sin = self.tape.value(0, needs_grad=False)

    def build(self) -> Tape:
        """The whole forward and the loss."""
        if self.found.family == "linears":
            self._linears()
            return self.tape
        layers, norm = {
            "gpt2": ("transformer.h", "transformer.ln_f"),
            "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm"),
        }.get(self.found.family, ("model.layers", "model.norm"))
        layer = {"gpt2": self._gpt2_layer, "gpt_neox": self._neox_layer}.get(
            self.found.family, self._llama_layer
        )
        hidden = self._embedding()
        for index in range(self.found.layers):
            self.tape.block = index
            hidden = layer(hidden, f"{layers}.{index}.")
        self.tape.block = -1
        self._loss(self._norm(hidden, norm))
        return self.tape

    # -- sizes --------------------------------------------------------------------------------

    def _size(self, columns: int, tokens: int | None = None) -> int:
        """Bytes of an activation ``[tokens, columns]``."""
        return (self.tokens if tokens is None else tokens) * columns * self.element

    def _parameters(self, module: Module) -> list[tuple[str, int]]:
        made = [(module.weight, prod(local_shape(module, self.options.tp)) * self.element)]
        if module.bias:
            size = local_bias(module, self.options.tp)[0] * self.element
            made.append((f"{module.name}.bias", size))
        return made

    # -- modules ------------------------------------------------------------------------------

    def _linear(self, x: Value, name: str) -> Value:
        """A linear; ``column`` reads every token, ``row`` leaves this rank's."""
        module, options, tape = self.modules[name], self.options, self.tape
        shape = local_shape(module, options.tp)
        out = shape[1] if module.kind == "Conv1D" else shape[0]
        into = shape[0] if module.kind == "Conv1D" else shape[1]
        gathered = 0
        if options.sp and module.parallel == "column":
            # Each rank saves its part of X and gathers the rest again in the backward.
            gathered = self._size(into)
        y = tape.operation(
            [x],
            self._size(out),
            saves=[x],
            parameters=self._parameters(module),
            linear=True,
            forward_bytes=gathered,
            backward_bytes=gathered,
        )
        if options.sp and module.parallel == "row":
            y = tape.operation([y], self._size(out, self.shard))
        return y

    def _norm(self, x: Value, name: str, heads: int = 0) -> Value:
        """RMSNorm or LayerNorm over the columns, or over each of ``heads`` heads."""
        module, tape = self.modules[name], self.tape
        weight = self._parameters(module)
        rows = self.tokens * heads if heads else self.shard
        elements = x.bytes // self.element
        if module.kind == "LayerNorm":
            return tape.operation(
                [x], x.bytes, saves=[x], saved_bytes=2 * rows * _FP32, parameters=weight
            )
        if self.options.norm == "fused":
            return tape.operation(
                [x], x.bytes, saves=[x], saved_bytes=rows * _FP32, parameters=weight
            )
        wide = elements * _FP32
        exact = tape.cast(x, wide)
        # The derivative of a power is two products of its own.
        squares = tape.operation([exact], wide, saves=[exact], backward_bytes=wide)
        mean = tape.operation([squares], rows * _FP32)
        root = tape.operation([mean], rows * _FP32, saves_output=True)
        product = tape.operation([exact, root], wide, saves=[exact, root], backward_bytes=wide)
        narrow = tape.cast(product, x.bytes)
        return tape.operation([narrow], x.bytes, saves=[narrow], parameters=weight,
                              backward_bytes=x.bytes)  # fmt: skip

    def _dropout(self, x: Value, place: str) -> Value:
        if place not in self.found.dropout:
            return x
        return self.tape.operation([x], x.bytes, saved_bytes=x.bytes // self.element)

    def _rope(self, x: Value) -> Value:
        """``x·cos + rotate_half(x)·sin``, on a part of each head's columns."""
        tape, part = self.tape, int(x.bytes * self.found.rotary)
        turned = x if part == x.bytes else tape.view(x, part)
        straight = tape.multiply(turned, self.cos, part)
        negated = tape.operation([turned], part // 2)
        swapped = tape.operation([negated, turned], part)
        y = tape.add(straight, tape.multiply(swapped, self.sin, part))
        if part == x.bytes:
            return y
        return tape.operation([y, tape.view(x, x.bytes - part)], x.bytes)

    def _attention(self, q: Value, k: Value, v: Value) -> Value:
        """Causal attention from heads to columns."""
        found, options, tape = self.found, self.options, self.tape
        heads = found.heads // options.tp
        out = self._size(heads * found.head_dim)
        if options.attention == "sdpa":
            # A flash kernel's backward sums dq in fp32 and dk, dv for each head of q.
            wide = out // self.element * _FP32 + (2 * out if q.bytes != k.bytes else 0)
            return tape.operation(
                [q, k, v], out, saves=[q, k, v], saves_output=True,
                saved_bytes=self.tokens * heads * _FP32, backward_bytes=wide,
            )  # fmt: skip
        if q.bytes != k.bytes:
            k, v = tape.operation([k], out), tape.operation([v], out)
        scores = heads * self.tokens * (self.tokens // options.batch)
        product = tape.operation([q, k], scores * self.element, saves=[q, k])
        scaled = tape.operation([product], scores * self.element)
        masked = tape.operation([scaled], scores * self.element, passes=True)
        exact = tape.cast(masked, scores * _FP32)
        chances = tape.operation([exact], scores * _FP32, saves_output=True)
        chances = self._dropout(tape.cast(chances, scores * self.element), "attention")
        y = tape.operation([chances, v], out, saves=[chances, v])
        return tape.operation([y], out)

    # -- models -------------------------------------------------------------------------------

    def _embedding(self) -> Value:
        found, tape = self.found, self.tape
        name = next(iter(self.modules))
        size = self._size(found.hidden, self.shard)
        ids = tape.value(self.tokens * _LABEL, needs_grad=False)
        hidden = tape.operation(
            [], size, reads=[ids], parameters=self._parameters(self.modules[name])
        )
        if found.positions:
            weight = self._parameters(self.modules["transformer.wpe"])
            hidden = tape.add(hidden, tape.operation([], size, parameters=weight))
            hidden = self._dropout(hidden, "embedding")
        if found.rotary:
            angles = self._size(int(found.head_dim * found.rotary))
            self.cos, self.sin = (
                tape.operation([tape.value(0, needs_grad=False)], angles) for _ in range(2)
            )
        return hidden

    def _llama_layer(self, hidden: Value, layer: str) -> Value:
        found, tape = self.found, self.tape
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        x = self._norm(hidden, f"{layer}input_layernorm")
        q, k, v = (self._linear(x, f"{attention}{name}_proj") for name in "qkv")
        if found.query_key_norm:
            q = self._norm(q, f"{attention}q_norm", found.heads // self.options.tp)
            k = self._norm(k, f"{attention}k_norm", found.key_value_heads // self.options.tp)
        y = self._attention(self._rope(q), self._rope(k), v)
        hidden = tape.add(hidden, self._linear(y, f"{attention}o_proj"))
        x = self._norm(hidden, f"{layer}post_attention_layernorm")
        gate = self._linear(x, f"{mlp}gate_proj")
        gate = tape.operation([gate], gate.bytes, saves=[gate])
        up = self._linear(x, f"{mlp}up_proj")
        y = self._linear(tape.multiply(gate, up, up.bytes), f"{mlp}down_proj")
        return tape.add(hidden, y)

    def _gpt2_layer(self, hidden: Value, layer: str) -> Value:
        tape = self.tape
        qkv = self._linear(self._norm(hidden, f"{layer}ln_1"), f"{layer}attn.c_attn")
        y = self._attention(*(tape.view(qkv, qkv.bytes // 3) for _ in range(3)))
        y = self._dropout(self._linear(y, f"{layer}attn.c_proj"), "residual")
        hidden = tape.add(y, hidden)
        y = self._linear(self._norm(hidden, f"{layer}ln_2"), f"{layer}mlp.c_fc")
        y = self._linear(self._activation(y), f"{layer}mlp.c_proj")
        return tape.add(hidden, self._dropout(y, "residual"))

    def _neox_layer(self, hidden: Value, layer: str) -> Value:
        tape, attention = self.tape, f"{layer}attention."
        x = self._norm(hidden, f"{layer}input_layernorm")
        qkv = self._linear(x, f"{attention}query_key_value")
        q, k, v = (tape.view(qkv, qkv.bytes // 3) for _ in range(3))
        y = self._attention(self._rope(q), self._rope(k), v)
        y = self._dropout(self._linear(y, f"{attention}dense"), "residual")
        if not self.found.parallel_residual:
            hidden = tape.add(y, hidden)
        x = self._norm(hidden, f"{layer}post_attention_layernorm")
        x = self._activation(self._linear(x, f"{layer}mlp.dense_h_to_4h"))
        z = self._dropout(self._linear(x, f"{layer}mlp.dense_4h_to_h"), "residual")
        if self.found.parallel_residual:
            z = tape.add(z, y)
        return tape.add(z, hidden)

    def _activation(self, x: Value) -> Value:
        tape = self.tape
        if self.found.activation != "gelu_new":
            return tape.operation([x], x.bytes, saves=[x])
        # 0.5 · x · (1 + tanh(c · (x + 0.044715 · x³))), each an operation of its own.
        half = tape.operation([x], x.bytes)
        cube = tape.operation([x], x.bytes, saves=[x], backward_bytes=x.bytes)
        inner = tape.operation([tape.add(x, tape.operation([cube], x.bytes))], x.bytes)
        curve = tape.operation([inner], x.bytes, saves_output=True)
        return tape.multiply(half, tape.operation([curve], x.bytes, passes=True), x.bytes)

    def _loss(self, hidden: Value) -> None:
        """Cross entropy of fp32 logits."""
        tape = self.tape
        tape.category = LOGITS
        logits = self._linear(hidden, HEAD)
        exact = tape.cast(logits, logits.bytes // self.element * _FP32)
        chances = tape.operation([exact], exact.bytes, saves_output=True)
        # The function of the loss and its caller hold both until they return.
        tape.hold(exact)
        loss = tape.operation([chances], _FP32, saves=[chances])
        tape.hold(logits)
        tape.operation([loss], _FP32)

    def _linears(self) -> None:
        """Linears one after another, each with an input of its own."""
        tape = self.tape
        y = tape.value(0)
        for name, module in self.modules.items():
            y = self._linear(tape.operation([y], self._size(module.shape[1])), name)
        tape.operation([y], _FP32)
