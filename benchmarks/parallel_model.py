"""What data parallelism costs a linear layer: bytes on the wire, and the time that they take.

    python benchmarks/parallel_model.py                # the tables of docs/parallelism.md
    python benchmarks/parallel_model.py --page         # puts them there
    python benchmarks/parallel_model.py --page --check # exits with 1 where they are not there

A model, no measurement: a collective takes its bytes over the link's rate and a latency for each
of its steps, a product its FLOPs over the rate that a large product of bf16 reaches, an update its
bytes over the memory's. Links and rates are in ``LINKS`` and ``GPU``, with what they stand for.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from table import markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parallelism.md"
_MARKS = re.compile(r"(<!-- begin: (\w+) -->\n)(.*?)(<!-- end: \2 -->)", re.DOTALL)


@dataclass(frozen=True)
class Link:
    """Bytes/s of a GPU into it, in one direction, as collectives reach them; seconds of a step."""

    name: str
    rate: float
    latency: float


@dataclass(frozen=True)
class Rates:
    """FLOP/s of large bf16 products and bytes/s of memory, as an H200 sustains them."""

    flops: float
    memory: float


# NVLink of an H200: 450 GB/s each way by the data sheet, four fifths of it in collectives. One
# 400 Gbit/s adapter for each GPU: 50 GB/s, nine tenths of it.
LINKS = {
    "NVLink": Link("NVLink", 0.8 * 450e9, 5e-6),
    "400 Gbit/s": Link("400 Gbit/s", 0.9 * 50e9, 15e-6),
}
GPU = Rates(650e12, 4.0e12)

# (out, in) of a Llama-3.1-8B layer as it is built, q, k and v together, gate and up together.
LAYER = {
    "qkv": (6144, 4096),
    "proj": (4096, 4096),
    "fc1": (28672, 4096),
    "fc2": (4096, 14336),
}


def exchanged(out: int, columns: int, tokens: int, ranks: int) -> float:
    """Bytes of factors that a rank receives: X of the others, dY of the others for its rows."""
    return 2.0 * (ranks - 1) * tokens * (columns + out / ranks)


def panelled(out: int, columns: int, ranks: int) -> float:
    """Bytes of fp32 panels that a rank receives."""
    return 4.0 * (ranks - 1) / ranks * out * columns


def gathered(out: int, columns: int, ranks: int) -> float:
    """Bytes of bf16 W that a rank receives from the owners of its rows."""
    return 2.0 * (ranks - 1) / ranks * out * columns


def all_reduced(out: int, columns: int, ranks: int) -> float:
    """Bytes of a bf16 gradient that a ring's rank receives: reduce-scatter, then all-gather."""
    return 2 * gathered(out, columns, ranks)


def distributed_optimizer(out: int, columns: int, ranks: int) -> float:
    """Bytes of Megatron's distributed optimizer: fp32 gradients scattered, W gathered."""
    return panelled(out, columns, ranks) + gathered(out, columns, ranks)


def forge(out: int, columns: int, tokens: int, ranks: int) -> float:
    """Bytes by the cheaper of FORGE's reductions, W included."""
    cheaper = min(exchanged(out, columns, tokens, ranks), panelled(out, columns, ranks))
    return cheaper + gathered(out, columns, ranks)


def crossover(out: int, columns: int, ranks: int) -> float:
    """Tokens of a rank up to which factors are fewer bytes than panels."""
    return panelled(out, columns, ranks) / exchanged(out, columns, 1, ranks)


def milliseconds(size: float, collectives: int, ranks: int, link: Link) -> float:
    """Of collectives on one stream: bytes, and the latency of a tree's steps for each."""
    steps = collectives * max(1, (ranks - 1).bit_length())
    return 1e3 * (size / link.rate + steps * link.latency)


def compute_ms(out: int, columns: int, tokens: int, ranks: int, state_bytes: float = 4.0) -> float:
    """A backward's two products, and the update of the owned rows in the shadow of dW."""
    product = 2.0 * tokens * out * columns / GPU.flops
    update = 2 * (2.0 + state_bytes) * out * columns / ranks / GPU.memory
    return 1e3 * (product + max(product, update))


def of_layer(value: object, *arguments: object) -> float:
    """A sum over the linears of a layer."""
    return sum(value(*shape, *arguments) for shape in LAYER.values())  # type: ignore[operator]


def tokens_table() -> str:
    """Crossover of each linear by ranks."""
    counts = (2, 8, 64, 1024)
    header = ["linear", *(f"{ranks} ranks" for ranks in counts)]
    rows = [
        [f"{name} {out}×{columns}", *(f"{crossover(out, columns, r):.0f}" for r in counts)]
        for name, (out, columns) in LAYER.items()
    ]
    return markdown(header, rows)


def bytes_table() -> str:
    """MB that a rank receives for a layer, by ranks and tokens of a rank."""
    header = [
        "ranks",
        "tokens of a rank",
        "FORGE",
        "bf16 all-reduce",
        "distributed optimizer",
        "FORGE over all-reduce",
    ]
    rows = []
    for ranks in (2, 8, 64, 1024):
        for tokens in (512, 4096):
            ours = of_layer(forge, tokens, ranks) / 1e6
            reduce = of_layer(all_reduced, ranks) / 1e6
            stock = of_layer(distributed_optimizer, ranks) / 1e6
            row = [ranks, tokens, f"{ours:.0f}", f"{reduce:.0f}", f"{stock:.0f}"]
            rows.append([*map(str, row), f"{ours / reduce:.2f}"])
    return markdown(header, rows)


def time_table() -> str:
    """Milliseconds of a layer's backward and update: compute, and what the wire takes beside it."""
    header = [
        "GPUs",
        "link of the replicas",
        "tokens of a rank",
        "compute, ms",
        "FORGE's wire, ms",
        "distributed optimizer's wire, ms",
    ]
    rows = []
    for ranks, name in ((8, "NVLink"), (64, "400 Gbit/s"), (1024, "400 Gbit/s")):
        link = LINKS[name]
        for tokens in (512, 4096, 32768):
            # An exchange is two collectives, W one; a gradient's two.
            ours = milliseconds(of_layer(forge, tokens, ranks), 3 * len(LAYER), ranks, link)
            size = of_layer(distributed_optimizer, ranks)
            stock = milliseconds(size, 2 * len(LAYER), ranks, link)
            compute = of_layer(compute_ms, tokens, ranks)
            row = [str(ranks), name, str(tokens), f"{compute:.2f}", f"{ours:.2f}", f"{stock:.2f}"]
            rows.append(row)
    return markdown(header, rows)


TABLES = {"crossover": tokens_table, "wire": bytes_table, "time": time_table}


def page(text: str) -> str:
    """The page with the tables that belong between its marks."""

    def table(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        return f"{begin}\n{TABLES[name]()}\n{end}"

    return _MARKS.sub(table, text)


def main() -> int:
    """Print the tables, or put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--page", action="store_true", help="put the tables into docs/parallelism.md"
    )
    parser.add_argument("--check", action="store_true", help="with --page: change nothing")
    arguments = parser.parse_args()
    if not arguments.page:
        for name, table in TABLES.items():
            print(f"{name}\n\n{table()}")
        return 0
    before = PAGE.read_text(encoding="utf-8")
    after = page(before)
    if arguments.check:
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
