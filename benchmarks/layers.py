"""The buffers of a weight's update, filled with random data, and FORGE's update over them."""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from elementwise import BLOCK_Q8, Arrays

_STATE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "q8": torch.uint8}
_EXTRA_DTYPE = {"bf16+fp32": torch.float32, "bf16+16": torch.int16}
# Kernels of cuBLAS and cuBLASLt, by what their names have in common.
_LIBRARY_KERNEL = re.compile(r"nvjet|cutlass|xmma|cublas|splitk|gemvx", re.IGNORECASE)


class Parameter:
    """Weight and moments of one AdamW parameter, shared by FORGE and its peer.

    Attributes:
        weight: ``[out, in]``.
        extra: fp32 master or 16 low bits, or None.
        moments: first and second.
        scales: of q8 moments, ``[in / 128, out]`` as FORGE has them; else none.
    """

    def __init__(self, shape: tuple[int, int], weight_format: str, state_format: str) -> None:
        """Allocate without filling."""
        out, columns = shape
        self.formats = (weight_format, state_format)

        def empty(dtype: torch.dtype, size: tuple[int, int] = shape) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="cuda")

        self.weight = empty(torch.float32 if weight_format == "fp32" else torch.bfloat16)
        extra = _EXTRA_DTYPE.get(weight_format)
        self.extra = empty(extra) if extra else None
        state = _STATE_DTYPE[state_format]
        self.moments = (empty(state), empty(state))
        blocks = (columns // BLOCK_Q8, out)
        count = 2 if state_format == "q8" else 0
        self.scales = tuple(empty(torch.float32, blocks) for _ in range(count))

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        tensors = [self.weight, self.extra, *self.moments, *self.scales]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def fill(self) -> None:
        """Random numbers; the second moment is not negative."""
        if self.extra is None:
            self.weight.normal_(std=0.02)
        elif self.extra.dtype == torch.float32:
            self.extra.normal_(std=0.02)
            self.weight.copy_(self.extra)
        else:
            # Both halves of one number: a half of one and a half of another may be a NaN together.
            master = torch.empty_like(self.weight, dtype=torch.float32).normal_(std=0.02)
            bits = master.view(torch.int32)
            self.extra.copy_(bits)
            self.weight.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))
        first, second = self.moments
        if self.scales:
            first.random_(0, 256)
            second.random_(0, 256)
            for scale in self.scales:
                scale.uniform_(0.5, 1.5)
        else:
            first.normal_(std=0.3)
            second.normal_().square_()

    def arrays(self) -> Arrays:
        """As the peer takes them; it orders scales by block, which costs the same."""
        scales = (self.scales[0].view(-1), self.scales[1].view(-1)) if self.scales else None
        return Arrays(*self.formats, self.weight, self.extra, self.moments, scales)


class Factors:
    """dY and X of random numbers; several sets of ``tokens`` rows lie behind one another."""

    def __init__(self, shape: tuple[int, int], rows: int) -> None:
        """Allocate and fill."""
        self.rows = rows
        self.dy = torch.empty(rows, shape[0], dtype=torch.bfloat16, device="cuda").normal_()
        self.x = torch.empty(rows, shape[1], dtype=torch.bfloat16, device="cuda").normal_()

    def sets(self, tokens: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first sets; as many as there are rows for."""
        count = max(1, min(count, self.rows // tokens))
        ranges = [slice(i * tokens, (i + 1) * tokens) for i in range(count)]
        return [(self.dy[at], self.x[at]) for at in ranges]


class ForgeUpdate:
    """FORGE's fused update of parameters in turn, from factors in turn.

    Raises:
        ValueError, RuntimeError: the library refuses the combination or is not there.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        parameters: list[Parameter],
        factors: list[tuple[torch.Tensor, torch.Tensor]],
        rounding: str,
        state_rounding: str,
    ) -> None:
        """Make the layer; nothing runs."""
        from forge_train import AdamW
        from forge_train._lib import ffi
        from forge_train.native import Linear, LinearSpec, Segment, Storage

        weight_format, state_format = parameters[0].formats
        self._ffi, self.shape = ffi, shape
        rule = AdamW(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        spec = LinearSpec(
            out_features=shape[0],
            in_features=shape[1],
            rule=rule,
            factor_dtype=torch.bfloat16,
            weight_format=weight_format,
            state_formats=state_format,
            weight_rounding=rounding,
            state_rounding=state_rounding,
        )
        self.linear = Linear(spec, name="benchmark", device=torch.device("cuda"))
        self.parameters, self.factors = parameters, factors
        self.storages = [
            Storage(p.weight, p.extra, list(p.moments), list(p.scales or (None, None)))
            for p in parameters
        ]
        self.segments = [Segment.of(dy, x) for dy, x in factors]
        # Gradients of about 1, whatever the number of tokens.
        self.grad_scale = 1.0 / math.sqrt(factors[0][0].shape[0])
        self.scalars = self.linear.scalars(
            rule.options, step=100, seed=1, grad_scale=self.grad_scale
        )
        # Left on the device: to read it would be to wait.
        size = ffi.sizeof("forge_report")
        self.report = torch.zeros(size, dtype=torch.uint8, device="cuda")

    def __call__(self, index: int) -> None:
        """Queue one update."""
        segment = self.segments[index % len(self.segments)]
        storage = self.storages[index % len(self.storages)]
        self.linear.update([segment], storage, self.scalars, report=self.report)

    def read_report(self) -> Any:
        """The last update's ``forge_report``."""
        data = bytearray(self.report.cpu().numpy().tobytes())
        self._bytes = data  # the struct only points into it
        return self._ffi.cast("forge_report *", self._ffi.from_buffer(data))

    def check(self) -> str | None:
        """Run the first update; what is wrong with its result, or None.

        A sanity check of 16 rows, so that no time is reported of a kernel that does not do the
        work; the tests are the proof.
        """
        parameter, (dy, x) = self.parameters[0], self.factors[0]
        rows = torch.tensor([*range(8), *range(self.shape[0] - 8, self.shape[0])], device="cuda")
        weight, moment = parameter.weight[rows], parameter.moments[0][rows].float()
        self(0)
        torch.cuda.synchronize()
        report = self.read_report()
        if not report.tiles or report.nonfinite_tiles:
            return f"{report.nonfinite_tiles} of {report.tiles} tiles not finite"
        if not math.isfinite(parameter.weight.sum(dtype=torch.float32).item()):
            return "weights are not finite"
        if torch.equal(parameter.weight[rows], weight):
            return "weights did not change"
        if parameter.scales:
            return None
        gradient = self.grad_scale * (dy[:, rows].float().t() @ x.float())
        expected = 0.9 * moment + 0.1 * gradient
        error = (parameter.moments[0][rows].float() - expected).norm() / expected.norm()
        return None if error.item() < 2e-2 else f"first moment is off by {error.item():.2g}"

    def kernels(self, stream: torch.cuda.Stream) -> list[str]:
        """Names of one update's kernels, from the drawing of a captured graph; [] if unknown."""
        try:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = torch.cuda.CUDAGraph(keep_graph=True)
                graph.enable_debug_mode()
                with torch.cuda.stream(stream):
                    graph.capture_begin(capture_error_mode="thread_local")
                    try:
                        self(0)
                    finally:
                        graph.capture_end()
                path = Path(folder) / "graph.dot"
                graph.debug_dump(str(path))
                # A kernel's node is labelled `… | name\<\<\<grid,block,shared\>\>\>}`.
                return re.findall(r"([\w.]+)\\*<\\*<\\*<", path.read_text(errors="replace"))
        except (RuntimeError, OSError, TypeError, AttributeError):
            return []


def path_of(kernels: list[str]) -> str:
    """``fused``, or ``panel`` where cuBLAS computes dW panel by panel; ``unknown``."""
    if not kernels:
        return "unknown"
    return "panel" if any(_LIBRARY_KERNEL.search(name) for name in kernels) else "fused"
