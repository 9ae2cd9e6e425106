"""torch.distributed groups as communicators: the library's schedule over their collectives."""

from __future__ import annotations

import ctypes
import datetime
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from numpy.typing import NDArray

from zigzag_attention import _core
from zigzag_attention.communicator import Communicator

# While it waits, Python's main thread looks at signals this often.
_POLL = datetime.timedelta(milliseconds=100)
# The key of the group's store under which a rank that failed says so.
_FAILED = "zigzag/failed"
# The newest pieces of work, see `keep`. One reference too many: it outlives the interpreter.
_kept: deque[Any] = deque(maxlen=2)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))
_communicators: weakref.WeakKeyDictionary[Any, Communicator] = weakref.WeakKeyDictionary()


def handle_of(group: Any, world_size: int) -> str:
    """The name of a process group, by default of the world."""
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"the plan is for {world_size} ranks but no group was given and torch.distributed "
                "is not initialised; give a group, or a plan for 1 rank"
            )
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is {type(group).__qualname__}; it must be a torch.distributed group that this "
            "process is a member of, a zigzag_attention.Communicator or None"
        )
    return "pg:" + group.group_name


def by_name(name: str) -> Communicator:
    """The communicator of the process group of that name."""
    return communicator(_resolve_process_group(name))


def communicator(group: dist.ProcessGroup) -> Communicator:
    """The group's communicator, made on first use."""
    found = _communicators.get(group)
    if found is None:
        collectives = _Collectives(group)
        core = _core.Communicator.callback(
            dist.get_rank(group),
            dist.get_world_size(group),
            collectives.all_gather,
            collectives.all_to_all,
            collectives.abort,
        )
        # gloo takes hundreds of microseconds for a message between processes of one machine.
        found = Communicator(_core.share_messages(core))
        _communicators[group] = found
    return found


def _resolve_process_group(name: str) -> dist.ProcessGroup:
    resolve: Callable[[str], dist.ProcessGroup] = c10d._resolve_process_group  # type: ignore
    return resolve(name)


def keep(work: Any) -> Any:
    """The work of a collective, which lives until a few more were kept, or the process ends.

    A thread of gloo holds it, too, for a moment after it is done. Were that thread the last to let
    go, it would want the GIL to give tensors back; and if the interpreter has begun to end by then,
    Python up to 3.13 unwinds the thread, and the process aborts instead of exiting with its code.
    """
    _kept.append(work)
    return work


class _Collectives:
    """What the library calls: two exchanges of bytes of host memory, and the news of a failure."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._failure = ""
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        # Weak, because the table above must not keep its own keys alive.
        self._group: Callable[[], dist.ProcessGroup | None] = weakref.ref(group)
        if torch.device("cpu") not in group._device_types:
            # A group of NCCL alone moves nothing on the host, and through the GPU messages would
            # wait for the work before them.
            companion = _host_group(group)
            self._group = lambda: companion
        # The newer name of the same collective warns less.
        newer = hasattr(dist, "all_gather_single")
        self._gather: Callable[..., Any] = getattr(
            dist, "all_gather_single" if newer else "all_gather_into_tensor"
        )

    def all_gather(self, data: NDArray[Any], out: NDArray[Any]) -> None:
        # Messages are short. When one is given up, gloo may still write to where it was to go.
        given, received = torch.from_numpy(data).clone(), torch.empty(out.size, dtype=torch.uint8)
        self._wait(
            "all_gather",
            lambda group: self._gather(received, given, group=group, async_op=True),
        )
        out[:] = received.numpy()

    def all_to_all(
        self,
        send: NDArray[Any],
        send_bytes: list[int],
        receive: NDArray[Any],
        receive_bytes: list[int],
    ) -> None:
        given, received = torch.from_numpy(send), torch.from_numpy(receive)
        self._wait(
            "all_to_all",
            lambda group: dist.all_to_all_single(
                received, given, receive_bytes, send_bytes, group=group, async_op=True
            ),
        )

    def abort(self, reason: str) -> None:
        """Tells the other ranks, which look for it while they wait."""
        self._failure = self._failure or reason
        store = _store_of(self._group())
        if store is not None:
            store.compare_set(_FAILED, "", f"rank {self._rank} failed: {reason}")

    def _news(self) -> str:
        """What another rank said when it failed; empty while none did."""
        store = _store_of(self._group())
        try:
            if store is not None and store.check([_FAILED]):
                return str(store.get(_FAILED).decode(errors="replace"))
        except RuntimeError:
            pass  # the process that keeps the store is gone, and exchanges notice that themselves
        return ""

    def _wait(self, step: str, start: Callable[[dist.ProcessGroup], Any]) -> None:
        group = self._group()
        where = f"rank {self._rank} of {self._size} of a torch.distributed group"
        if group is None:
            raise RuntimeError(f"{where}: the group was destroyed")
        if self._failure:
            raise _core.CommunicationError(
                f"{where} takes part in nothing more, since it failed before: {self._failure}"
            )
        seconds = _core.timeout_seconds()
        deadline = time.monotonic() + seconds
        try:
            work = keep(start(group))
            while not _wait_briefly(work):
                self._failure = self._news()
                if self._failure:
                    raise _core.CommunicationError(f"{where} stopped in {step}: {self._failure}")
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{where} waited {seconds:g} s for its peers in {step}; "
                        "one of them died or never came (ZIGZAG_TIMEOUT_S)"
                    )
        except (TimeoutError, _core.CommunicationError):
            raise
        except RuntimeError as error:
            raise _core.CommunicationError(f"{where}: {step} failed: {error}") from error


def _store_of(group: dist.ProcessGroup | None) -> Any:
    """The key-value store that the group was made with, or None."""
    if group is None:
        return None
    try:
        return c10d._get_process_group_store(group)
    except (KeyError, RuntimeError, ValueError):
        return None


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same ranks. A collective call of these ranks alone."""
    ranks = dist.get_process_group_ranks(group)
    try:
        made = dist.new_group(
            ranks,
            timeout=datetime.timedelta(seconds=_core.timeout_seconds()),
            backend="gloo",
            use_local_synchronization=True,
        )
    except RuntimeError as error:
        raise _core.CommunicationError(
            f"a torch.distributed group without a CPU backend needs a gloo group of its ranks "
            f"beside it, and that failed: {error}"
        ) from error
    assert isinstance(made, dist.ProcessGroup)
    return made


def _wait_briefly(work: Any) -> bool:
    """True when the work is done; its failure is raised."""
    try:
        work.wait(_POLL)
    except RuntimeError:
        # The same type tells a wait that was too short from an exchange that failed.
        if not work.is_completed():
            return False
        # It may have ended well between the two questions: this raises only if it did not.
        work.wait()
    return True
