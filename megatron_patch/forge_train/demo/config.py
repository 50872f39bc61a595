"""What one demo run is: every number that decides its result, in one serialisable place."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

RULES = ("sgd", "adam", "adamw", "lion")
WEIGHT_FORMATS = ("fp32", "bf16", "bf16+fp32", "bf16+16")
STATE_FORMATS = ("fp32", "bf16", "q8")
DEVICES = ("auto", "cpu", "cuda")
SCHEDULES = ("auto", "immediate", "deferred", "accumulate")

#: Learning rates that suit the default model, per rule. With 1e-3 Adam's run is on the edge: the
#: loss spikes, and rounding differences of 1e-7 grow to 0.1 nats in 200 steps, so that no two
#: programs could be compared.
DEFAULT_LR = {"sgd": 0.1, "adam": 3e-4, "adamw": 3e-4, "lion": 1e-4}

#: Larger than Adam's usual 1e-8 for the same reason: without it, gradient elements that are mere
#: rounding noise move their weights by a whole learning rate.
DEFAULT_ADAM_EPS = 1e-5

#: Rules that megatron-core's own optimizer has, so that a stock run to compare with exists.
STOCK_RULES = ("sgd", "adam", "adamw")

VOCABULARY = 256  # one token per byte


#: Steps of linear warm-up, at most; short runs warm up for a tenth of their steps.
MAX_WARMUP_STEPS = 20


def default_warmup(steps: int) -> int:
    """Steps of warm-up of a run that is not told how many."""
    return min(MAX_WARMUP_STEPS, steps // 10)


def default_schedule(clip_grad: float, micro_batches: int) -> str:
    """The schedule of a run that is not told one: none of the two it picks has a gradient buffer.

    ``auto`` would, for weights that are smaller than their factors.
    """
    return "deferred" if clip_grad > 0.0 or micro_batches > 1 else "immediate"


class ConfigError(ValueError):
    """A combination of settings that cannot run; the message names the flag and the way out."""


@dataclass
class RunConfig:
    """One training run. Sizes are in elements, lengths in tokens (one token is one byte)."""

    name: str = "demo"
    out: str = "runs"
    stock: bool = False

    rule: str = "adamw"
    weight_format: str = "fp32"
    state_format: str = "fp32"
    schedule: str = "deferred"  # see default_schedule

    steps: int = 300
    lr: float = DEFAULT_LR["adamw"]
    warmup_steps: int = MAX_WARMUP_STEPS  # see default_warmup
    adam_eps: float = DEFAULT_ADAM_EPS
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    micro_batches: int = 1
    micro_batch_size: int = 2
    seed: int = 1234
    save_interval: int = 50

    device: str = "cpu"  # "cuda": one GPU
    tp: int = 2
    sequence_parallel: bool = True

    hidden: int = 512
    ffn: int = 1408
    layers: int = 4
    heads: int = 8
    sequence: int = 128

    @property
    def directory(self) -> Path:
        """Where this run writes; a stock run lies below the FORGE run it is compared with."""
        base = Path(self.out) / self.name
        return base / "stock" if self.stock else base

    @property
    def bf16(self) -> bool:
        """Whether the model's weights are bf16 (every weight format but ``fp32``)."""
        return self.weight_format != "fp32"

    @property
    def samples_per_step(self) -> int:
        """Sequences that one optimizer step consumes."""
        return self.micro_batches * self.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step consumes."""
        return self.samples_per_step * self.sequence

    def check(self) -> None:
        """Refuse what cannot run, before anything starts. Raises :class:`ConfigError`."""
        if not self.name or Path(self.name).name != self.name:
            raise ConfigError(f"--name {self.name!r}: must be a plain folder name")
        for flag, value, least in (
            ("--steps", self.steps, 1),
            ("--micro-batches", self.micro_batches, 1),
            ("--micro-batch-size", self.micro_batch_size, 1),
            ("--tp", self.tp, 1),
            ("--layers", self.layers, 1),
            ("--heads", self.heads, 1),
            ("--hidden", self.hidden, 1),
            ("--ffn", self.ffn, 1),
            ("--sequence", self.sequence, 2),
            ("--save-interval", self.save_interval, 0),
            ("--warmup-steps", self.warmup_steps, 0),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{flag} {value}: must be at least {least}")
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                f"--warmup-steps {self.warmup_steps}: must be less than --steps {self.steps}"
            )
        for flag, number in (
            ("--lr", self.lr),
            ("--adam-eps", self.adam_eps),
            ("--clip-grad", self.clip_grad),
            ("--weight-decay", self.weight_decay),
        ):
            if not 0.0 <= number < float("inf"):
                raise ConfigError(f"{flag} {number}: must be a finite number, 0 or more")
        if self.device == "cuda" and self.tp > 1:
            raise ConfigError(
                f"--tp {self.tp} with --device cuda: FORGE's collectives over GPUs (NCCL) are not "
                "there yet; use --tp 1, or --device cpu"
            )
        for flag, value in (
            ("--heads", self.heads),
            ("--ffn", self.ffn),
            ("--hidden", self.hidden),
        ):
            if value % self.tp:
                raise ConfigError(
                    f"--tp {self.tp} does not divide {flag} {value}: "
                    f"every rank needs an equal shard; choose another --tp or {flag}"
                )
        if VOCABULARY % self.tp:
            raise ConfigError(
                f"--tp {self.tp} does not divide the vocabulary of {VOCABULARY} bytes: "
                "choose a power of two"
            )
        if self.hidden % (2 * self.heads):
            raise ConfigError(
                f"--heads {self.heads} does not cut --hidden {self.hidden} into heads of even size "
                "(rotary embeddings turn pairs); choose another --heads"
            )
        if self.sequence_parallel and self.sequence % self.tp:
            raise ConfigError(
                f"--tp {self.tp} does not divide --sequence {self.sequence}: sequence parallelism "
                "needs it to; choose another --sequence or add --no-sequence-parallel"
            )
        if self.stock:
            self._check_stock()
        elif self.schedule == "immediate":
            self._check_immediate()

    def _check_stock(self) -> None:
        if self.rule not in STOCK_RULES:
            raise ConfigError(
                f"--rule {self.rule}: stock megatron-core has no such optimizer; a stock run or "
                f"--compare needs one of {', '.join(STOCK_RULES)}"
            )

    def _check_immediate(self) -> None:
        """An update inside the backward cannot know what comes after it."""
        if self.clip_grad > 0.0:
            raise ConfigError(
                f"--schedule immediate with --clip-grad {self.clip_grad:g}: the global norm is "
                "known only after the whole backward; use --schedule deferred, or --clip-grad 0"
            )
        if self.micro_batches > 1:
            raise ConfigError(
                f"--schedule immediate with --micro-batches {self.micro_batches}: a weight may be "
                "updated once per step only; use --schedule deferred or accumulate, or "
                "--micro-batches 1"
            )

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        """Read what :meth:`save` wrote."""
        return cls(**json.loads(path.read_text()))
