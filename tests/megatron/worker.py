"""One rank: ``worker.py RANK WORLD PORT FOLDER`` runs every scenario of its world size.

Writes ``FOLDER/WORLD-RANK.json``: scenario → seconds, the traceback, or a list with the reason
why it was skipped.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import unittest
import warnings
from pathlib import Path


def main() -> None:
    """Run the scenarios in order; of several ranks, the first failure ends its rank."""
    # Not at the top: Megatron's checkpoint writer spawns a process that imports this file again.
    warnings.simplefilter("ignore")
    import torch

    from forge_train.megatron import cpu

    torch.set_num_threads(1)
    cpu.enable()  # before the imports of Megatron below
    import checkpoint_scenarios  # noqa: F401  (these register what they define)
    import data_parallel_scenarios  # noqa: F401
    import expert_scenarios  # noqa: F401
    import format_scenarios  # noqa: F401
    import gpt
    import rounding_scenarios  # noqa: F401
    import training_scenarios  # noqa: F401
    from registry import SCENARIOS

    rank, world, port = (int(argument) for argument in sys.argv[1:4])
    folder = Path(sys.argv[4])
    results: dict[str, float | str | list[str]] = {}
    report = folder / f"{world}-{rank}.json"
    gpt.start(rank, world, port, tp=world)
    for name, (worlds, function) in SCENARIOS.items():
        if world not in worlds:
            continue
        begin = time.monotonic()
        try:
            function(folder)
            results[name] = time.monotonic() - begin
        except unittest.SkipTest as reason:
            results[name] = [str(reason)]
        except BaseException:
            results[name] = traceback.format_exc()
        report.write_text(json.dumps(results))
        if world > 1 and isinstance(results[name], str):
            os._exit(1)  # the other rank waits in a collective that this one will not reach
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
