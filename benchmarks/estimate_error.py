"""The estimate of each row of a ``llama_step.json`` beside the peak that was measured.

    python benchmarks/estimate_error.py results/h200/llama_step.json

Prints both for every row; ends with 1 where one is off by more than 5 %, or has no estimate.
Needs no GPU. The benchmark's model has fused norms.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from forge_train.estimate import Estimate, Options, architecture, estimate

WITHIN = 0.05
METHODS = {
    "adamw": "adamw-loop",
    "adamw_foreach": "adamw-foreach",
    "adamw_fused": "adamw-fused",
    "adamw_in_backward": "hooks-fused",
    "flashoptim_release": "flashoptim-release",
    "forge": "forge",
}


@cache
def estimate_of(model: str, options: Options) -> Estimate:
    return estimate(architecture(model), options, all_formats=True)


def predicted_gb(row: dict[str, Any], model: str) -> float | None:
    """The estimate of one row in 10⁹ bytes; None: there is none."""
    options = Options(
        tokens=row["tokens"],
        # A step after the backward is torch's word for it.
        schedule=row["schedule"] if row["method"] == "forge" else "auto",
        clip=bool(row["clip"]),
        norm="fused",
        rest=row["rest"],
        rest_state_format=row.get("rest_state_format") or "fp32",
    )
    named = [
        each
        for each in estimate_of(model, options).rows
        if each.method == METHODS.get(row["method"]) and not each.refused
    ]
    formats = (row["weight_format"], row["state_format"])
    fits = [
        each for each in named if (each.weight_format, each.state_format) in (formats, ("", ""))
    ]
    return fits[0].peak / 1e9 if fits else None


def check(result: dict[str, Any]) -> int:
    """Print every row; how many are off."""
    off = compared = 0
    print(f"{'':<38} {'tokens':>6} {'measured':>9} {'estimate':>9}")
    for row in result["rows"]:
        if not row.get("peak_gb") or row["method"] == "frozen":
            continue
        compared += 1
        found = predicted_gb(row, result["conditions"]["model"])
        name = row.get("name", row["method"])
        start = f"{name:<38} {row['tokens']:>6} {row['peak_gb']:>9.2f}"
        error = None if found is None else found / row["peak_gb"] - 1
        off += error is None or abs(error) > WITHIN
        if found is None or error is None:
            print(f"{start} {'none':>9}          FAIL")
        else:
            said = "PASS" if abs(error) <= WITHIN else "FAIL"
            print(f"{start} {found:>9.2f} {100 * error:+6.1f} %  {said}")
    print(f"{compared} rows in GB of 10⁹ bytes, {off} off by more than {100 * WITHIN:g} %")
    return off if compared else 1


def main() -> None:
    """Compare a result with the estimates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, help="a llama_step.json")
    sys.exit(min(check(json.loads(parser.parse_args().result.read_text())), 1))


if __name__ == "__main__":
    main()
