"""``python -m forge_train doctor``: flags, and a line for each finding."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from .doctor import WRONG, examine

_DESCRIPTION = """\
See whether FORGE works on this machine: the library, the driver, the compiler and its cache of
kernels, and whether the GPUs compute what the CPU does. Takes some seconds and changes nothing but
the cache.
"""
_WIDTH, _SUBJECT = 110, 18


def add_to(tools: Any) -> None:
    """Add the tool to those of the command line."""
    tool = tools.add_parser(
        "doctor",
        help="see what works on this machine, and how to mend what does not",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tool.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda|cuda:N",
        help="what has to work (default: auto, the GPUs if there are any)",
    )
    tool.add_argument(
        "--arch", default="sm_80", help="to compile for where there is no GPU (default: sm_80)"
    )
    tool.add_argument("--cache-dir", type=Path, help="(default: as a run's)")
    tool.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 if something is wrong."""
    wrong = 0
    for finding in examine(arguments.device, arch=arguments.arch, cache_dir=arguments.cache_dir):
        wrong += finding.state == WRONG
        head = f"{finding.state:6} {finding.subject:{_SUBJECT}} "
        below = " " * len(head)
        print(
            textwrap.fill(
                finding.text, _WIDTH, initial_indent=head, subsequent_indent=below,
                break_long_words=False, break_on_hyphens=False,
            ),
            flush=True,
        )  # fmt: skip
    print("nothing is wrong" if not wrong else f"{wrong} wrong: see above for the way out")
    return min(wrong, 1)
