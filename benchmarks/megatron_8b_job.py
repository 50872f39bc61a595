"""What ``megatron_8b.py`` compares: the models, the methods, and the flags that Megatron gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STOCK = {
    "stock": (),
    # Gradients summed in bf16; the optimizer makes fp32 copies of all of them at its step.
    "stock:bf16-grads": ("--grad-reduce-in-bf16",),
}
SCHEDULES = ("auto", "immediate", "deferred", "accumulate")
DEFAULT_METHODS = "stock,forge:bf16+16/fp32,forge:bf16+16/q8,forge:bf16/q8,stock:bf16-grads"


@dataclass(frozen=True)
class Method:
    """One way to train the same model.

    Attributes:
        kind: a key of ``STOCK``, or ``forge``.
        weight_format, state_format: FORGE's names, which fit stock's fp32 masters, too.
        schedule: FORGE's.
    """

    kind: str
    weight_format: str = "bf16+fp32"
    state_format: str = "fp32"
    schedule: str = "auto"

    def __str__(self) -> str:
        """As the command line has it."""
        if self.kind != "forge":
            return self.kind
        schedule = "" if self.schedule == "auto" else f":{self.schedule}"
        return f"forge:{self.weight_format}/{self.state_format}{schedule}"

    def flags(self) -> list[str]:
        """What differs from the other methods' command lines."""
        if self.kind != "forge":
            return list(STOCK[self.kind])
        return [
            "--forge",
            f"--forge-weight-format={self.weight_format}",
            f"--forge-state-format={self.state_format}",
            f"--forge-schedule={self.schedule}",
            "--forge-left=refuse",
        ]

    def row(self, micro_batch: int) -> dict[str, Any]:
        """A row without figures."""
        return {
            "name": str(self),
            "method": self.kind,
            "weight_format": self.weight_format,
            "state_format": self.state_format,
            "micro_batch": micro_batch,
        }


def method_of(text: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is none of this name; the message says what names look like.
    """
    if text in STOCK:
        return Method(text)
    kind, *rest = text.split(":")
    formats = rest[0].split("/") if rest else []
    schedule = rest[1] if len(rest) > 1 else "auto"
    if kind != "forge" or len(formats) != 2 or len(rest) > 2 or schedule not in SCHEDULES:
        raise ValueError(
            f"{text!r} is no method: use {', '.join(STOCK)}, or forge:WEIGHT/STATE[:SCHEDULE] such "
            f"as forge:bf16+16/q8, with a schedule of {', '.join(SCHEDULES)}"
        )
    return Method("forge", *formats, schedule)


@dataclass(frozen=True)
class Model:
    """Sizes; the words are Megatron's."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    sequence: int


MODELS = {
    "llama-3-8b": Model(4096, 14336, 32, 32, 8, 128256, 4096),
    "tiny": Model(64, 96, 2, 4, 2, 128, 32),
}

_COMMON = """
--bf16 --transformer-impl local --spec megatron_layers layer_spec --attention-backend unfused
--normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
--untie-embeddings-and-output-weights --position-embedding-type rope --rotary-base 500000
--attention-dropout 0 --hidden-dropout 0 --no-persist-layer-norm --no-masked-softmax-fusion
--no-gradient-accumulation-fusion --no-rope-fusion --recompute-granularity full
--recompute-method uniform --recompute-num-layers 1 --optimizer adam --weight-decay 0.1
--adam-beta1 0.9 --adam-beta2 0.95 --lr-decay-style constant --rerun-mode disabled
--tokenizer-type NullTokenizer --train-iters 1000000 --log-interval 1 --eval-iters 0 --num-workers 0
--distributed-timeout-minutes 5
"""


def flags_of(
    method: Method, model: Model, *, layers: int, tp: int, clip: float, micro_batch: int, gpu: bool
) -> list[str]:
    """Megatron's whole command line.

    Args:
        method: stock's or FORGE's.
        model: its sizes; ``layers`` counts.
        layers: of the model.
        tp: tensor-parallel ranks, with sequence parallelism where they are more than one.
        clip: the global norm's limit; 0: none.
        micro_batch: of the first step.
        gpu: or CPUs, with gloo.
    """
    sizes = {
        "num-layers": layers,
        "hidden-size": model.hidden,
        "ffn-hidden-size": model.ffn,
        "num-attention-heads": model.heads,
        "num-query-groups": model.groups,
        "seq-length": model.sequence,
        "max-position-embeddings": model.sequence,
        "vocab-size": model.vocabulary,
        "make-vocab-size-divisible-by": 16,  # so that it is not padded
        "tensor-model-parallel-size": tp,
        "micro-batch-size": micro_batch,
        "global-batch-size": micro_batch,
        "clip-grad": clip,
        # Small enough that the loss falls from the first step on, whatever the width.
        "lr": 0.04 / model.hidden,
        "min-lr": 0.04 / model.hidden,
        "distributed-backend": "nccl" if gpu else "gloo",
    }
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    flags += ["--group-query-attention", *_COMMON.split()]
    flags += ["--sequence-parallel"] if tp > 1 else []
    flags += [] if gpu else ["--use-cpu-initialization"]
    return [*flags, *method.flags()]
