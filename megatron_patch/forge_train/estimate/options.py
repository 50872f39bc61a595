"""What an estimate is made for: the run beside the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ATTENTIONS = ("sdpa", "eager")
NORMS = ("separate", "fused")
RESTS = ("forge", "torch")


@dataclass(frozen=True)
class Options:
    """The run.

    Attributes:
        tokens: of one micro-batch on this rank's data-parallel group, all sequences together.
        batch: sequences that these tokens are.
        dtype: of parameters and activations.
        weight_format, state_format, schedule: FORGE's, as for ``fuse``.
        clip: whether the global norm is clipped.
        micro_batches: backwards per step.
        tp: ranks of tensor parallelism.
        sp: whether they share out the tokens between the linears.
        dp: ranks of data parallelism.
        checkpointing: whether each layer's activations are computed again in the backward.
        attention: ``sdpa``, which keeps no scores, or ``eager``.
        norm: ``separate`` operations as the transformers package has them, or ``fused`` as
            ``torch.nn.RMSNorm`` is on a GPU.
        rest: who updates what FORGE does not fuse: ``forge``, as ``fuse`` does, or ``torch``: its
            fused AdamW, beside ``fuse(rest=False)``.
        rest_state_format: of the states that ``forge`` keeps for it.
    """

    tokens: int
    batch: int = 1
    dtype: str = "bf16"
    weight_format: str = "auto"
    state_format: str = "fp32"
    schedule: str = "auto"
    clip: bool = False
    micro_batches: int = 1
    tp: int = 1
    sp: bool = False
    dp: int = 1
    checkpointing: bool = False
    attention: str = "sdpa"
    norm: str = "separate"
    rest: str = "forge"
    rest_state_format: str = "fp32"

    def check(self) -> None:
        """Refuse what excludes itself.

        Raises:
            ValueError: the message names the option, its value and what it may be.
        """
        for name in ("tokens", "batch", "micro_batches", "tp", "dp"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)}: at least 1 is needed")
        choices = {"dtype": DTYPES, "attention": ATTENTIONS, "norm": NORMS, "rest": RESTS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"--{name} {value}: choose one of {', '.join(known)}")
        if self.tokens % self.batch:
            raise ValueError(
                f"--tokens {self.tokens} does not divide by --batch {self.batch}; tokens are those "
                "of all sequences together"
            )
        if self.clip and self.rest == "torch":
            raise ValueError(
                "--rest torch leaves parameters out of the norm that --clip clips; choose "
                "--rest forge"
            )
        if self.sp and self.tp == 1:
            raise ValueError("--sp shares out tokens over tensor-parallel ranks; give --tp")
        if self.sp and self.tokens % self.tp:
            raise ValueError(f"--tokens {self.tokens} does not divide by --tp {self.tp}, for --sp")

    @property
    def element(self) -> int:
        """Bytes of a parameter and of an activation."""
        return DTYPES[self.dtype].itemsize
