"""Whether FORGE works here: what was looked at, what is wrong, and how to mend it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ._context import Context
from ._lib import ForgeError, check, ffi, lib, new_struct
from .native import Linear, LinearSpec, Segment, Storage, version
from .rules import AdamW
from .warm import Kernel, warm

OK, NOTE, WRONG = "ok", "note", "wrong"
_ROWS, _COLUMNS, _TOKENS = 256, 384, 96
# Free disk below which a cache of a few hundred kernels may not fit.
_LITTLE_DISK = 1 << 28


@dataclass(frozen=True)
class Finding:
    """What one look found.

    Attributes:
        subject: what was looked at.
        state: ``ok``, ``note`` (works, but not as well as it could, or was not asked for) or
            ``wrong``.
        text: a sentence; the way out in it where something is wrong.
    """

    subject: str
    state: str
    text: str


def examine(
    device: str = "auto", *, arch: str = "sm_80", cache_dir: str | os.PathLike[str] | None = None
) -> Iterator[Finding]:
    """Look at everything that an update needs, one after the other.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: every GPU if there is one. What is
            asked for by name and is not there is wrong; under ``auto`` it is a note.
        arch: what to compile for where there is no GPU.
        cache_dir: of the compiled kernels; None: a run's.

    Raises:
        ValueError: a device of another kind.
    """
    kind = torch.device(device).type if device != "auto" else "auto"
    if kind not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r} is neither a CPU nor an NVIDIA GPU")
    yield _library()
    yield _guarded("CPU", lambda: _agrees(Context(threads=1), None))
    if kind == "cpu":
        return
    missing = _missing_gpu()
    if missing is not None:
        yield Finding("GPU", WRONG if kind == "cuda" else NOTE, missing)
        yield _compiler(arch, cache_dir, WRONG if kind == "cuda" else NOTE)
        return
    index = torch.device(device).index if kind == "cuda" else None
    count = torch.cuda.device_count()
    for number in range(count) if index is None else (index,):
        yield from _gpu(number, cache_dir)
    if count > 1:
        yield Finding("NCCL", NOTE, f"{_nccl()}; FORGE trains on one GPU of a process for now")


def _library() -> Finding:
    """That the package was imported says that the library loads and has the right ABI."""
    where = os.environ.get("FORGE_LIBRARY") or "the installed wheel"
    return Finding("FORGE", OK, f"{version()} of {where}; torch {torch.__version__}")


def _guarded(subject: str, look: Callable[[], str], state: str = WRONG) -> Finding:
    """A look that raises has found what is wrong; FORGE's errors say the way out."""
    try:
        return Finding(subject, OK, look())
    except (ForgeError, RuntimeError, OSError, ValueError) as error:
        return Finding(subject, state, str(error))


# -- GPUs -----------------------------------------------------------------------------------------


def _missing_gpu() -> str | None:
    """Why there is no GPU to use; None if there is one."""
    config, out = new_struct("forge_context_config"), ffi.new("forge_context **")
    config.backend, config.device = lib.FORGE_BACKEND_CUDA, 0
    try:
        check(lib.forge_context_new(config, out), "context")
    except ForgeError as error:
        return str(error)
    lib.forge_context_free(out[0])
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "a GPU is there, but this torch is built without CUDA; install a CUDA build of torch"
    return (
        f"a GPU is there, but torch, built for CUDA {torch.version.cuda}, cannot use it; see "
        "`python -c 'import torch; torch.zeros(1).cuda()'`: most often the driver is too old for it"
    )


def _gpu(index: int, cache_dir: str | os.PathLike[str] | None) -> Iterator[Finding]:
    """One GPU: what it is, whether kernels compile for it and compute what the CPU does."""
    name = f"GPU {index}"
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    yield Finding(
        name, OK, f"{properties.name}, compute capability {capability}, "
        f"{properties.total_memory / 2**30:.0f} GiB; CUDA {torch.version.cuda} in torch",
    )  # fmt: skip
    try:
        context = Context(device=f"cuda:{index}", cache_dir=cache_dir)
    except (ForgeError, RuntimeError) as error:
        yield Finding(name, WRONG, str(error))
        return
    yield _compiled(f"{name}: kernels", context, None, WRONG)
    yield _guarded(f"{name}: results", lambda: _agrees(context, Context(threads=1)))


def _nccl() -> str:
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return "this torch has no NCCL"
    return "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))


# -- kernels --------------------------------------------------------------------------------------


def _compiler(arch: str, cache_dir: str | os.PathLike[str] | None, state: str) -> Finding:
    return _compiled(f"kernels for {arch}", arch, cache_dir, state)


def _compiled(
    subject: str,
    target: Context | str,
    cache_dir: str | os.PathLike[str] | None,
    state: str,
) -> Finding:
    """Compile the kernels of a small linear, or find them in the cache."""
    kernels: list[Kernel] = []

    def look() -> str:
        begin = time.monotonic()
        spec = LinearSpec(_ROWS, _COLUMNS, AdamW())
        done = warm(
            spec, target, cache_dir=cache_dir, tokens=_TOKENS, micro_batches=1,
            progress=kernels.append,
        )  # fmt: skip
        folder = kernels[0].path.parent
        free = shutil.disk_usage(folder).free
        if free < _LITTLE_DISK:
            raise OSError(
                f"{folder}: {free >> 20} MiB of disk are left; kernels of a run take some hundred. "
                "Free some, or name another directory in FORGE_CACHE_DIR"
            )
        return (
            f"{done.compiled} compiled, {done.present} found, {time.monotonic() - begin:.1f} s; "
            f"NVRTC {done.nvrtc[0]}.{done.nvrtc[1]}; kept in {folder}"
        )

    return _guarded(subject, look, state)


# -- results --------------------------------------------------------------------------------------


def _agrees(context: Context, other: Context | None) -> str:
    """Compare updates of a small linear with another backend's, or with torch in fp64.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    begin = time.monotonic()
    if other is None:
        worst = _worst("fp32", "fp32", torch.float32, context, None)
        _require(worst <= 1e-5, "the fp32 update", worst, "torch's in fp64")
        return f"{context.threads} thread, an update is torch's in fp64 to {worst:.0e}"
    exact = _worst("fp32", "fp32", torch.float32, context, other)
    _require(exact == 0.0, "the fp32 update", exact, "the CPU's, whose bits it should have")
    worst = max(
        _worst(weight, state, torch.bfloat16, context, other)
        for weight, state in (("bf16+16", "fp32"), ("bf16+16", "bf16"), ("bf16+16", "q8"))
    )
    _require(worst <= 1e-3, "a bf16 update", worst, "the CPU's")
    return (
        f"fp32 has the CPU's bits, bf16 is the CPU's to {worst:.0e}; "
        f"{time.monotonic() - begin:.1f} s"
    )


def _require(holds: bool, what: str, worst: float, whose: str) -> None:
    if not holds:
        raise RuntimeError(
            f"{what} differs from {whose} by {worst:.1e} of a step. That is a defect of FORGE, of "
            "the compiler or of the machine: please report it with this text, and do not train "
            "with it"
        )


def _worst(
    weight_format: str,
    state_format: str,
    dtype: torch.dtype,
    context: Context,
    other: Context | None,
) -> float:
    """The largest difference of a weight after an update, in steps of the learning rate."""
    rule = AdamW(lr=1e-2)
    g = torch.Generator().manual_seed(1)
    # Small ones, so that their own rounding is far below a step.
    weight = torch.randn(_ROWS, _COLUMNS, generator=g) * 0.02
    dy, x = (torch.randn(_TOKENS, n, generator=g).to(dtype) for n in (_ROWS, _COLUMNS))
    spec = LinearSpec(
        _ROWS, _COLUMNS, rule, factor_dtype=dtype, weight_format=weight_format,
        state_formats=state_format, weight_rounding="nearest", state_rounding="nearest",
    )  # fmt: skip

    def after(where: Context) -> torch.Tensor:
        linear = Linear(spec, name="doctor", context=where)
        storage = _storage(linear, weight)
        scalars = linear.scalars(rule.options, step=1, seed=1)
        linear.update([Segment.of(dy.to(where.device), x.to(where.device))], storage, scalars)
        return linear.export_weight(storage).cpu().double()

    if other is not None:
        theirs = after(other)
    else:
        parameter = torch.nn.Parameter(weight.double())
        parameter.grad = dy.double().T @ x.double()
        options = {name: rule.options[name] for name in ("lr", "betas", "eps", "weight_decay")}
        torch.optim.AdamW([parameter], **options).step()
        theirs = parameter.detach()
    difference = (after(context) - theirs).abs().max().item() / rule.options["lr"]
    return difference if difference == difference else float("inf")


def _storage(linear: Linear, weight: torch.Tensor) -> Storage:
    model_weight = weight.to(linear.layout.weight.dtype, copy=True).to(linear.device)
    storage = linear.allocate(model_weight)
    linear.import_weight(storage, weight)
    return storage
