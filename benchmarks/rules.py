"""Every rule's fused update against AdamW's over as many bytes.

    python benchmarks/rules.py [--shape OUTxIN] [--tokens N,...] [--out FILE]

A bf16 weight and bf16 factors. What a rule costs beside its traffic is its arithmetic, so a rule
is compared with AdamW whose states take as many bytes: one fp32 state with two bf16 ones, two with
two, three bf16 states with one of fp32 and one of bf16. SGD without momentum has no state and no
such peer; it stands beside AdamW with q8 states, and no target applies. All are measured in one
run, bursts of one after bursts of the other.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import environment, slug, write_json
from measure import Meter, Timing

ROOT = Path(__file__).resolve().parents[1]
TARGET = 1.10
# By the number of a rule's states: their formats, and those of AdamW with as many bytes.
FORMATS: dict[int, tuple[tuple[str, ...], tuple[str, str]]] = {
    0: ((), ("q8", "q8")),
    1: (("fp32",), ("bf16", "bf16")),
    2: (("bf16", "bf16"), ("bf16", "bf16")),
    3: (("bf16", "bf16", "bf16"), ("fp32", "bf16")),
}


def documented_rule() -> Any:
    """The rule of docs/rules.md."""
    path = ROOT / "examples" / "user_rule.py"
    spec = importlib.util.spec_from_file_location("user_rule", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RULE


def rules() -> list[tuple[str, Any]]:
    """Every rule, with the options that change its states."""
    import forge_train as ft

    return [
        ("sgd", ft.SGD(lr=1e-3)),
        ("sgd, momentum", ft.SGD(lr=1e-3, momentum=0.9)),
        ("adam", ft.Adam()),
        ("adamw", ft.AdamW()),
        ("adamw, amsgrad", ft.AdamW(amsgrad=True)),
        ("adamax", ft.Adamax()),
        ("nadam", ft.NAdam()),
        ("radam", ft.RAdam()),
        ("ademamix", ft.AdEMAMix()),
        ("rmsprop", ft.RMSprop()),
        ("rmsprop, centered, momentum", ft.RMSprop(centered=True, momentum=0.9)),
        ("adagrad", ft.Adagrad()),
        ("adadelta", ft.Adadelta()),
        ("rprop", ft.Rprop()),
        ("asgd", ft.ASGD()),
        ("lion", ft.Lion()),
        ("signum", ft.Signum()),
        ("soft_lion (docs/rules.md)", documented_rule()),
    ]


@dataclass
class Update:
    """One rule's update of one weight; the call queues it."""

    linear: Any
    storage: Any
    segment: Any
    scalars: Any

    @classmethod
    def of(cls, rule: Any, states: tuple[str, ...], weight: torch.Tensor, segment: Any) -> Update:
        """Fresh states beside a weight that is shared by all rules."""
        from forge_train.native import Linear, LinearSpec

        out, columns = weight.shape
        spec = LinearSpec(
            out, columns, rule, factor_dtype=torch.bfloat16, weight_format="bf16",
            state_formats=states or "bf16",
        )  # fmt: skip
        linear = Linear(spec, name="benchmark", device=torch.device("cuda"))
        scale = 1.0 / math.sqrt(max(segment.dy.shape[0], 1))
        scalars = linear.scalars(rule.options, step=100, seed=1, grad_scale=scale)
        return cls(linear, linear.allocate(weight), segment, scalars)

    def __call__(self, _index: int) -> None:
        """Queue one update."""
        self.linear.update([self.segment], self.storage, self.scalars, report=self.report())

    def report(self) -> torch.Tensor:
        """Where the report stays: to read it would be to wait."""
        if not hasattr(self, "_report"):
            from forge_train._lib import ffi

            size = ffi.sizeof("forge_report")
            self._report = torch.zeros(size, dtype=torch.uint8, device="cuda")
        return self._report


def measure(shape: tuple[int, int], tokens: int) -> list[dict[str, Any]]:
    """A row for each rule."""
    from forge_train import AdamW
    from forge_train.native import Segment

    weight = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    dy = torch.randn(tokens, shape[0], device="cuda").bfloat16()
    segment = Segment.of(dy, torch.randn(tokens, shape[1], device="cuda").bfloat16())
    meter = Meter(Timing(), None)
    rows = []
    for name, rule in rules():
        probe = Update.of(rule, ("bf16",) * 3, weight, segment)
        count = len(probe.linear.rule.state_names)
        del probe
        states, peer_states = FORMATS[count]
        own = Update.of(rule, states, weight, segment)
        peer = Update.of(AdamW(), peer_states, weight, segment)
        # One after the other, twice: a drift of the clock meets both.
        us = [meter.burst(call).us for call in (own, peer, own, peer)]
        ratio = (us[0] + us[2]) / (us[1] + us[3])
        row = {
            "rule": name, "states": list(states), "adamw_states": list(peer_states),
            "out": shape[0], "in": shape[1], "tokens": tokens,
            "us": (us[0] + us[2]) / 2, "adamw_us": (us[1] + us[3]) / 2, "ratio": ratio,
            "target": TARGET if count else None, "met": ratio <= TARGET if count else None,
        }  # fmt: skip
        rows.append(row)
        print(f"{name:<30} {tokens:6d} {row['us']:9.1f} µs  {ratio:5.3f} of AdamW", flush=True)
        del own, peer
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="28672x4096", metavar="OUTxIN")
    parser.add_argument("--tokens", default="512,2048", metavar="N,...")
    parser.add_argument("--out", type=Path, help="default: results/<device>/rules.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("rules.py: torch sees no GPU")
    out, columns = (int(size) for size in arguments.shape.split("x"))
    head = environment()
    path = arguments.out or ROOT / "benchmarks" / "results" / slug(head["device"]) / "rules.json"
    rows: list[dict[str, Any]] = []
    for tokens in arguments.tokens.split(","):
        rows += measure((out, columns), int(tokens))
        write_json(path, {**head, "conditions": Timing().conditions, "rows": rows})
    missed = [row["rule"] for row in rows if row["met"] is False]
    print(f"{len(rows)} rows, {len(missed)} above {TARGET}: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
