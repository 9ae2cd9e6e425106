"""Groups of ranks: one rank, threads, MPI, or a process group of torch.distributed; and the same
ranks exchanging through their GPUs."""

from __future__ import annotations

import itertools
import sys
import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

from zigzag_attention import _core

if TYPE_CHECKING:
    import torch.distributed

    Group: TypeAlias = "Communicator | torch.distributed.ProcessGroup | None"
else:
    Group = Any

_numbers = itertools.count()
_by_number: weakref.WeakValueDictionary[int, Communicator] = weakref.WeakValueDictionary()


class Communicator:
    """This rank's end of a group that exchanges K/V and gradients.

    Made by `self()`, `threads(n)`, `mpi()` or `from_torch(group)`. All ranks of a group must make
    the same calls in the same order. A rank waits for its peers at most `ZIGZAG_TIMEOUT_S` seconds
    (default 300) and then raises TimeoutError.
    """

    def __init__(
        self, core: _core.Communicator, device: int | None = None, reason: str = ""
    ) -> None:
        self._core = core
        self._device = device
        self._reason = reason
        self._on_gpus: dict[int, Communicator] = {}
        self._number = next(_numbers)
        self._handle = f"comm:{self._number}"
        _by_number[self._number] = self

    @staticmethod
    def self() -> Communicator:
        """The group of one rank, which makes no exchange."""
        return _SELF

    @staticmethod
    def threads(size: int) -> list[Communicator]:
        """A group of threads of this process: element r is for the thread of rank r."""
        return [Communicator(core) for core in _core.Communicator.threads(size)]

    @staticmethod
    def mpi(comm: Any = None) -> Communicator:
        """The ranks of an mpi4py communicator, by default `MPI.COMM_WORLD`; needs mpi4py.

        Uses the library's own MPI transport when it was built with ZIGZAG_MPI=ON, and mpi4py's
        collectives otherwise.
        """
        from zigzag_attention import _mpi

        return Communicator(_mpi.make(comm))

    @staticmethod
    def from_torch(group: torch.distributed.ProcessGroup) -> Communicator:
        """The ranks of a torch.distributed group; the same group gives the same communicator."""
        from zigzag_attention import _distributed

        return _distributed.communicator(group)

    def on_gpu(self, device: Any, exchange: str = "auto") -> Communicator:
        """The same ranks exchanging through their GPUs; attention on CUDA tensors asks for it by
        itself. A collective call the first time.

        Args:
            device: this rank's GPU, an index or a torch.device.
            exchange: "peer" (the GPUs read one another's memory: one host), "nccl" (a GPU a rank,
                any hosts) or "auto": what `ZIGZAG_GPU_COMM` says, else peer where all ranks' GPUs
                reach each other, else nccl.

        Returns:
            The communicator of that GPU, the same at every call. `name` and `reason` say what was
            chosen and why.

        Raises:
            ValueError: another word for `exchange`, or another exchange than that GPU has.
            RuntimeError: no such GPU, or the GPUs cannot exchange so; on every rank.
        """
        index = _index_of(device)
        if self.size == 1 or self._device is not None:
            self.check_device(index)
            return self
        found = self._on_gpus.get(index)
        if found is None:
            name, reason = _core.choose_exchange(self._core, index, exchange)
            make = _core.Communicator.peer if name == "peer" else _core.Communicator.nccl
            found = Communicator(make(self._core, index), index, reason)
            self._on_gpus[index] = found
        elif exchange not in ("auto", found.name):
            raise ValueError(
                f"cuda:{index} exchanges through {found.name} in this group; it cannot become "
                f"{exchange!r}"
            )
        return found

    def check_device(self, index: int | None) -> None:
        """ValueError when tensors on that GPU (None: on the CPU) do not fit."""
        if self._device is not None and index != self._device:
            where = "the cpu" if index is None else f"cuda:{index}"
            raise ValueError(
                f"rank {self.rank} has tensors on {where}; its communicator exchanges through "
                f"cuda:{self._device}"
            )

    @property
    def device(self) -> int | None:
        """The GPU that this rank exchanges through, or None."""
        return self._device

    @property
    def reason(self) -> str:
        """Why this exchange was chosen, for a communicator of `on_gpu`."""
        return self._reason

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self._core.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._core.size

    @property
    def name(self) -> str:
        """ "self", "threads", "mpi", "callback", "peer" or "nccl"."""
        return self._core.name

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        self._core.barrier()

    def all_gather(self, data: bytes) -> bytes:
        """Every rank gives the same number of bytes and gets those of all, in rank order."""
        return self._core.all_gather(data)

    def abort(self, reason: str) -> None:
        """Tells the other ranks that this one failed, so that they stop waiting."""
        self._core.abort(reason)

    def __repr__(self) -> str:
        where = "" if self._device is None else f" on cuda:{self._device}"
        return f"Communicator({self.name}, rank {self.rank} of {self.size}{where})"


def _index_of(device: Any) -> int:
    """The number of a GPU."""
    if isinstance(device, int) and not isinstance(device, bool):
        return device
    if getattr(device, "type", None) != "cuda":
        raise ValueError(f"device is {device!r}; it must be a GPU: an index or a torch.device")
    index: Any = getattr(device, "index", None)
    if index is not None:
        return int(index)
    return int(sys.modules["torch"].cuda.current_device())


_SELF = Communicator(_core.Communicator.self())


def resolve(handle: str) -> Communicator:
    """The communicator that `handle_of` named."""
    kind, _, name = handle.partition(":")
    if kind == "pg":
        from zigzag_attention import _distributed

        return _distributed.by_name(name)
    found = _by_number.get(int(name))
    if found is None:
        raise RuntimeError("the communicator that the forward pass used is gone; keep it alive")
    return found


def handle_of(group: Group, world_size: int) -> str:
    """A name for the group that `world_size` ranks exchange in; ValueError when there is none."""
    if isinstance(group, Communicator):
        return group._handle
    if group is None and world_size == 1:
        return _SELF._handle
    from zigzag_attention import _distributed

    return _distributed.handle_of(group, world_size)


def communicator_of(group: Group) -> Communicator:
    """The group itself; without one the world of torch.distributed, or one rank alone."""
    if isinstance(group, Communicator):
        return group
    dist = sys.modules.get("torch.distributed")
    if group is None and not (dist and dist.is_available() and dist.is_initialized()):
        return _SELF
    # The size tells only whether a world that is not there is wanted; here it is there.
    return resolve(handle_of(group, -1))
