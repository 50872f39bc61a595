"""Communicators: one rank alone, a torch.distributed group through C callbacks, or NCCL."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ._context import Context
from ._lib import ForgeCommunicationError, check, ffi, lib, new_struct
from ._tensors import TORCH_DTYPE

if TYPE_CHECKING:
    import torch.distributed as dist

_GATHER = "int32_t(void *, const void *, void *, uint64_t, uint32_t)"
_REDUCE = "int32_t(void *, void *, uint64_t, uint32_t)"
_WAIT = "int32_t(void *)"


class Comm:
    """Owns a ``forge_comm``; the tensor-parallel group of the linears made with it.

    Attributes:
        rank: this process' rank in the group.
        size: ranks in the group.
    """

    def __init__(self, context: Context) -> None:
        """Make the communicator of one rank."""
        self.context = context
        self.rank, self.size = 0, 1
        out = ffi.new("forge_comm **")
        check(lib.forge_comm_new_solo(context.handle, out), "communicator")
        self.handle = ffi.gc(out[0], lib.forge_comm_free)

    def check(self, status: int, what: str = "") -> None:
        """Like :func:`forge_train._lib.check`."""
        check(status, what)

    def raise_own(self) -> None:
        """Raise the exception of a collective of Python's, where there was one."""

    def wait(self) -> None:
        """Let what torch's current stream gets from now on come after all collectives so far.

        Raises:
            ForgeCommunicationError: a collective failed.
        """
        with self.context.current():
            self.check(lib.forge_comm_wait(self.handle, self.context.stream()), "communicator")


@ffi.callback(_GATHER)
def _no_gather(*_arguments: Any) -> int:
    return 1


@ffi.callback(_REDUCE)
def _no_reduce(*_arguments: Any) -> int:
    return 1


class Place(Comm):
    """A rank without others: for linears that are parts of a weight in one process.

    Calls that communicate fail; those that only read and write the shard do not.
    """

    def __init__(self, context: Context, rank: int, size: int) -> None:
        """Register callbacks that refuse."""
        self.context, self.rank, self.size = context, rank, size
        collectives = new_struct("forge_host_collectives")
        collectives.all_gather = collectives.reduce_scatter = _no_gather
        collectives.all_to_all = _no_gather
        collectives.all_reduce = _no_reduce
        out = ffi.new("forge_comm **")
        made = lib.forge_comm_new_host(context.handle, rank, size, collectives, out)
        check(made, "communicator")
        self.handle = ffi.gc(out[0], lib.forge_comm_free)


class HostComm(Comm):
    """Collectives of a ``torch.distributed`` process group (gloo, MPI) as the C ABI's callbacks.

    A callback wraps the raw pointers as tensors without a copy, starts the collective and returns;
    the library computes meanwhile and calls ``wait`` before it needs the result.

    Args:
        context: the backend.
        group: the process group; None is the default group.

    Raises:
        ValueError: the context is a GPU's.
    """

    def __init__(self, context: Context, group: dist.ProcessGroup | None = None) -> None:
        """Register the callbacks; no communication takes place."""
        import torch.distributed as dist

        if context.device.type != "cpu":
            raise ValueError(
                f"collectives over tensors on {context.device} need NCCL: use NcclComm, or train "
                "on the CPU"
            )
        self.context, self.group = context, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._pending: list[tuple[Any, tuple[torch.Tensor, ...]]] = []
        self._exception: BaseException | None = None
        # cffi frees a callback with its Python object, so they live as long as the communicator.
        self._callbacks = {
            "all_gather": ffi.callback(_GATHER, self._guard(self._all_gather)),
            "reduce_scatter": ffi.callback(_GATHER, self._guard(self._reduce_scatter)),
            "all_reduce": ffi.callback(_REDUCE, self._guard(self._all_reduce)),
            "wait": ffi.callback(_WAIT, self._guard(self._wait)),
            "all_to_all": ffi.callback(_GATHER, self._guard(self._all_to_all)),
        }
        collectives = new_struct("forge_host_collectives")
        for name, callback in self._callbacks.items():
            setattr(collectives, name, callback)
        out = ffi.new("forge_comm **")
        status = lib.forge_comm_new_host(context.handle, self.rank, self.size, collectives, out)
        check(status, "communicator")
        self.handle = ffi.gc(out[0], lib.forge_comm_free)

    def check(self, status: int, what: str = "") -> None:
        """Raise a callback's own exception where there was one, else the status'."""
        self.raise_own()
        check(status, what)

    def raise_own(self) -> None:
        """See the base class."""
        exception, self._exception = self._exception, None
        if exception is not None:
            raise exception

    def _guard(self, body: Callable[..., None]) -> Callable[..., int]:
        """No exception may cross C: keep it for :meth:`check` and report failure."""

        def callback(_user: Any, *arguments: Any) -> int:
            try:
                body(*arguments)
            except BaseException as error:  # KeyboardInterrupt, too, must not cross
                self._exception = error
                return 1
            return 0

        return callback

    @staticmethod
    def _tensor(pointer: Any, count: int, dtype: int) -> torch.Tensor:
        """A 1-D tensor over memory of the library or of the caller, without a copy."""
        torch_dtype = TORCH_DTYPE[dtype]
        if count == 0:
            return torch.empty(0, dtype=torch_dtype)
        return torch.frombuffer(
            ffi.buffer(ffi.cast("char *", pointer), count * torch_dtype.itemsize),
            dtype=torch_dtype,
        )

    def _all_gather(self, send: Any, recv: Any, send_count: int, dtype: int) -> None:
        import torch.distributed as dist

        source = self._tensor(send, send_count, dtype)
        target = self._tensor(recv, send_count * self.size, dtype)
        own = target[self.rank * send_count :]
        if own.numel() and own.data_ptr() == source.data_ptr():
            source = source.clone()  # process groups do not say what they do in place
        work = dist.all_gather_into_tensor(target, source, group=self.group, async_op=True)
        self._pending.append((work, (source, target)))

    def _all_to_all(self, send: Any, recv: Any, count: int, dtype: int) -> None:
        import torch.distributed as dist

        # Bytes: what is only moved may be of any type.
        source = self._tensor(send, count * self.size, dtype).view(torch.uint8)
        target = self._tensor(recv, count * self.size, dtype).view(torch.uint8)
        work = dist.all_to_all_single(target, source, group=self.group, async_op=True)
        self._pending.append((work, (source, target)))

    def _reduce_scatter(self, send: Any, recv: Any, recv_count: int, dtype: int) -> None:
        import torch.distributed as dist

        source = self._tensor(send, recv_count * self.size, dtype)
        target = self._tensor(recv, recv_count, dtype)
        work = dist.reduce_scatter_tensor(target, source, group=self.group, async_op=True)
        self._pending.append((work, (source, target)))

    def _all_reduce(self, buffer: Any, count: int, dtype: int) -> None:
        import torch.distributed as dist

        target = self._tensor(buffer, count, dtype)
        work = dist.all_reduce(target, group=self.group, async_op=True)
        self._pending.append((work, (target,)))

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        failure: Exception | None = None
        for work, _tensors in pending:
            # All of them, even after a failure: the buffers are in use until each has ended.
            try:
                work.wait()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure


class NcclComm(Comm):
    """A communicator of NCCL over the ranks of a ``torch.distributed`` group, one GPU each.

    Its collectives run on a stream of its own, ordered with torch's by events: the host waits for
    none. A rank that is lost is found by the next collective, or by :meth:`look`. All ranks make it
    at the same time.

    Args:
        context: a GPU's.
        group: sends the id of the new communicator; None is the default group.
        timeout: seconds after which a collective, or the making of the communicator, has failed.

    Raises:
        ForgeBackendError: NCCL is not there, or too old.
        ForgeCommunicationError: a rank did not come.
    """

    def __init__(
        self, context: Context, group: dist.ProcessGroup | None = None, *, timeout: float = 600.0
    ) -> None:
        """Join; returns when all ranks have."""
        import torch.distributed as dist

        self.context, self.group = context, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        config = new_struct("forge_nccl_config")
        config.rank, config.size = self.rank, self.size
        config.timeout_ms = max(1, int(1000 * timeout))
        # The one that makes the id may fail to: the others must not wait for it.
        shared: list[Any] = [None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                check(lib.forge_nccl_unique_id(config.id), "communicator")
                shared = [bytes(ffi.buffer(config.id))]
            except Exception as error:
                failure, shared = error, [f"{error}"]
        source = dist.get_global_rank(group, 0) if group is not None else 0
        dist.broadcast_object_list(shared, source, group=group)
        if failure is not None:
            raise failure
        if not isinstance(shared[0], bytes):
            raise ForgeCommunicationError(f"communicator: rank 0 could not make one: {shared[0]}")
        ffi.buffer(config.id)[:] = shared[0]
        out = ffi.new("forge_comm **")
        with context.current():
            check(lib.forge_comm_new_nccl(context.handle, config, out), "communicator")
        self.handle = ffi.gc(out[0], lib.forge_comm_free)

    def look(self) -> None:
        """Raise if a collective has failed, or is not done within the timeout; waits for nothing.

        Raises:
            ForgeCommunicationError: then every later call fails in the same words.
        """
        check(lib.forge_comm_check(self.handle), "communicator")


def comm_of(context: Context, group: dist.ProcessGroup | None = None) -> Comm:
    """The communicator of a process group for a backend: NCCL's on a GPU, else the group's own."""
    return HostComm(context, group) if context.device.type == "cpu" else NcclComm(context, group)
