"""``python -m forge_train``: the package's command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import doctor_cli, estimate_cli, warm_cli
from ._lib import ForgeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a tool; its exit status, or 1 with a sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m forge_train", description="FORGE's tools.", allow_abbrev=False
    )
    tools = parser.add_subparsers(dest="tool", required=True, metavar="{doctor,estimate,warm}")
    doctor_cli.add_to(tools)
    estimate_cli.add_to(tools)
    warm_cli.add_to(tools)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ForgeError, ValueError, OSError) as error:
        print(f"forge_train {arguments.tool}: {error}", file=sys.stderr)
        return 1
