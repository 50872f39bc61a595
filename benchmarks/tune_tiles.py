"""Tries tiles of the fused Hopper kernel on shapes, token counts and formats, and prints the best.

    python benchmarks/tune_tiles.py --shapes 28672x4096 --tokens 512,1024 --formats bf16/bf16

FORGE_SM90_TILE names the tile to the library. What came of it is in sm90/policy.rs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from environment import environment, write_json
from points import formats, numbers, shapes

SHARED_BYTES = 232_448
# As policy.rs has them.
TILE_ROWS, CONSUMERS = 128, 2
# Bytes of a chunk's place in shared memory for each element of W: both ways use the same.
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "bf16+fp32": 6, "bf16+16": 4}
STATE_BYTES = {"fp32": 4, "bf16": 2, "q8": 1}


def candidates(weight_format: str, state_format: str) -> Iterator[tuple[int, ...]]:
    """Tiles that fit shared memory, each with as many stages as fit.

    Yields:
        columns, tokens of a stage, stages, columns of a chunk, slots, cluster.
    """
    element = WEIGHT_BYTES[weight_format] + 2 * STATE_BYTES[state_format]
    q8 = state_format == "q8"
    for cols, chunk, slots in product((128, 192), (32, 64, 128), (1, 2, 3, 4)):
        if cols % chunk or (q8 and (chunk != 128 or cols != 128)):
            continue
        if not 60_000 <= 32 * chunk * element * slots * CONSUMERS <= 170_000:
            continue
        for tokens, cluster in product((32, 64), (1, 2)):
            ring = CONSUMERS * slots * (32 * chunk * element + (384 if q8 else 0) + 16)
            stage = tokens * 2 * (TILE_ROWS + cols) + 16
            stages = min(8 * 64 // tokens, (SHARED_BYTES - ring - 40 * CONSUMERS - 140) // stage)
            if stages * tokens >= 128:
                yield cols, tokens, stages, chunk, slots, cluster


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", type=shapes, default=[(28672, 4096)], metavar="OUTxIN,...")
    parser.add_argument("--tokens", type=numbers, default=[512, 1024, 2048, 4096], metavar="N,...")
    parser.add_argument("--formats", type=formats, default=[("bf16", "bf16")])
    parser.add_argument("--state-rounding", default="nearest")
    parser.add_argument("--only", help="a part of a tile's name, to try fewer")
    parser.add_argument("--list", action="store_true", help="print the tiles and measure nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.list:
        for pair in options.formats:
            for tile in candidates(*pair):
                print("/".join(pair), ",".join(map(str, tile)))
        return

    import layers
    import torch
    from measure import Meter, Timing

    timing = Timing(bursts=5)
    meter = Meter(timing, None)
    result = environment()
    result["conditions"] = {**timing.conditions, "states": options.state_rounding}
    rows: list[dict[str, Any]] = []
    for shape, pair in product(options.shapes, options.formats):
        count = 1 if shape[0] * shape[1] > 5e7 else 3
        parameters = [layers.Parameter(shape, *pair) for _ in range(count)]
        for parameter in parameters:
            parameter.fill()
        for tokens in options.tokens:
            pool = layers.Factors(shape, tokens * len(parameters))
            times = {}
            for tile in candidates(*pair):
                name = ",".join(map(str, tile))
                if options.only and options.only not in name:
                    continue
                os.environ["FORGE_SM90_TILE"] = name
                try:
                    factors = pool.sets(tokens, len(parameters))
                    forge = layers.ForgeUpdate(
                        shape, parameters, factors, "stochastic", options.state_rounding
                    )
                    problem = forge.check()
                except RuntimeError as error:
                    problem = str(error)
                if problem:
                    print(f"{name}: {problem}", flush=True)
                    torch.cuda.synchronize()
                    continue
                times[name] = meter.burst(forge).us
            best = sorted(times.items(), key=lambda item: item[1])
            print(
                f"{shape} {pair} {tokens}: " + "  ".join(f"{n}: {t:.0f}" for n, t in best[:6]),
                flush=True,
            )
            rows.append({"shape": shape, "formats": pair, "tokens": tokens, "us": dict(best)})
            if options.out:
                result["rows"] = rows
                write_json(options.out, result)


if __name__ == "__main__":
    main()
