"""JSON of one part of ``scripts/gpu_suite.sh``, from what its commands left.

    suite_summary.py tests    --out FILE --status N --seconds N JUNIT
    suite_summary.py sanitize --out FILE NAME=STATUS=LOG ...
    suite_summary.py train    --out FILE --limit X CPU_RUN GPU_RUN
    suite_summary.py folder   prints the name of this device's folder of results

Exit status 1 where the part failed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from environment import environment, slug, write_json

_SUMMARY = re.compile(r"=+ ((?:ERROR|RACECHECK|LEAK) SUMMARY: .*)")
TIMED_OUT = (124, 137)


def tests(junit: Path, status: int, seconds: float) -> dict[str, Any]:
    """Counts and failures of a pytest run; it may have been cut off."""
    found: dict[str, Any] = {
        "status": status,
        "seconds": seconds,
        "timed_out": status in TIMED_OUT,
        "passed": status == 0,
    }
    if not junit.is_file():
        return {**found, "tests": None}
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))

    def having(*tags: str) -> list[ElementTree.Element]:
        return [case for case in cases if any(case.find(tag) is not None for tag in tags)]

    def described(case: ElementTree.Element) -> dict[str, str]:
        problem = next(child for child in case if child.tag in ("failure", "error"))
        message = (problem.get("message") or problem.text or "").strip()
        return {"test": f"{case.get('classname')}::{case.get('name')}", "message": message[:400]}

    failed = having("failure", "error")
    skipped = having("skipped")
    return {
        **found,
        "tests": len(cases),
        "failed": len(failed),
        "skipped": len(skipped),
        "succeeded": len(cases) - len(failed) - len(skipped),
        "failures": [described(case) for case in failed],
        "skips": sorted({(case.find("skipped").get("message") or "")[:200] for case in skipped}),
    }


def sanitize(runs: list[str]) -> dict[str, Any]:
    """What compute-sanitizer's tools said; each run is ``NAME=STATUS=LOG``."""
    tools = []
    for run in runs:
        name, status, path = run.split("=", 2)
        text = Path(path).read_text(errors="replace") if Path(path).is_file() else ""
        findings = [line for line in text.splitlines() if line.startswith("=========")]
        summaries = _SUMMARY.findall(text)
        tools.append(
            {
                "tool": name,
                "status": int(status),
                "timed_out": int(status) in TIMED_OUT,
                "summary": summaries,
                "cases": re.findall(r"sanitize: (\d+ cases, \d+ refused)", text),
                "passed": status == "0" and bool(summaries),
                "findings": [] if status == "0" else findings[:60],
            }
        )
    return {"passed": all(tool["passed"] for tool in tools), "tools": tools}


def losses(run: Path) -> list[float]:
    """The loss of every step of a run of the demo."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["loss"] for line in lines]


def train(cpu: Path, gpu: Path, limit: float) -> dict[str, Any]:
    """How far the two runs' losses are apart."""
    on_cpu, on_gpu = losses(cpu), losses(gpu)
    found = {"limit": limit, "cpu_losses": on_cpu, "gpu_losses": on_gpu}
    if not on_cpu or len(on_cpu) != len(on_gpu):
        return {**found, "passed": False, "max_abs_loss_difference": None}
    apart = [abs(a - b) for a, b in zip(on_cpu, on_gpu, strict=True)]
    # The largest first; NaN counts as larger than any number.
    worst = max(range(len(apart)), key=lambda i: math.inf if math.isnan(apart[i]) else apart[i])
    return {
        **found,
        "max_abs_loss_difference": apart[worst],
        "at_step": worst + 1,
        "passed": apart[worst] <= limit,
    }


def main() -> None:
    """Write one part's result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("tests", "sanitize", "train", "folder"))
    parser.add_argument("inputs", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--limit", type=float, default=1e-4)
    parser.add_argument("--conditions", default="")
    options = parser.parse_intermixed_args()  # inputs may come last
    result = environment()
    if options.part == "folder":
        print(slug(result["device"]))
        return
    result["conditions"] = options.conditions
    if options.part == "tests":
        result |= tests(Path(options.inputs[0]), options.status, options.seconds)
        counts = ("tests", "succeeded", "failed", "skipped", "timed_out")
        print("tests:", ", ".join(f"{key} {result.get(key)}" for key in counts))
        for failure in result.get("failures", [])[:20]:
            print(f"  {failure['test']}: {failure['message'].splitlines()[:1]}")
    elif options.part == "sanitize":
        result |= sanitize(options.inputs)
        for tool in result["tools"]:
            print(f"sanitize: {tool['tool']}: status {tool['status']}, {tool['summary']}")
            print("\n".join(f"  {line}" for line in tool["findings"][:12]))
    else:
        result |= train(Path(options.inputs[0]), Path(options.inputs[1]), options.limit)
        print(
            f"train: losses of {len(result['gpu_losses'])} steps at most "
            f"{result['max_abs_loss_difference']} apart, limit {options.limit:g}"
        )
    write_json(options.out, result)
    sys.exit(not result["passed"])


if __name__ == "__main__":
    main()
