"""MPI groups through mpi4py."""

from __future__ import annotations

import time
from typing import Any

from numpy.typing import NDArray

from zigzag_attention import _core

# MPI-3 counts are of C's int.
_MAX_COUNT = 2**31 - 1


def make(comm: Any) -> _core.Communicator:
    """The library's communicator for an mpi4py communicator."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise RuntimeError("an MPI group needs mpi4py (pip install mpi4py)") from error
    if comm is None:
        comm = MPI.COMM_WORLD
    if any(name == "MPI" and available for name, available, _ in _core.components()):
        return _core.Communicator.mpi(MPI._addressof(comm))
    collectives = _Collectives(MPI, comm.Dup())
    return _core.Communicator.callback(
        comm.Get_rank(), comm.Get_size(), collectives.all_gather, collectives.all_to_all
    )


class _Collectives:
    """The two functions that the library calls, on bytes of host memory."""

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi = mpi
        self._comm = comm

    def all_gather(self, data: NDArray[Any], out: NDArray[Any]) -> None:
        self._wait("all_gather", self._comm.Iallgather(data, out))

    def all_to_all(
        self,
        send: NDArray[Any],
        send_bytes: list[int],
        receive: NDArray[Any],
        receive_bytes: list[int],
    ) -> None:
        if max(send.size, receive.size) > _MAX_COUNT:
            raise _core.CommunicationError(
                f"an exchange of {max(send.size, receive.size)} bytes is more than MPI counts "
                f"({_MAX_COUNT}); take fewer kv_heads_per_stage"
            )
        byte = self._mpi.BYTE
        request = self._comm.Ialltoallv(
            [send, (send_bytes, _offsets(send_bytes)), byte],
            [receive, (receive_bytes, _offsets(receive_bytes)), byte],
        )
        self._wait("all_to_all", request)

    def _wait(self, step: str, request: Any) -> None:
        seconds = _core.timeout_seconds()
        start = time.monotonic()
        pause = 0.0
        while not request.Test():
            waited = time.monotonic() - start
            if waited > seconds:
                raise TimeoutError(
                    f"rank {self._comm.Get_rank()} of {self._comm.Get_size()} of an MPI group "
                    f"waited {seconds:g} s for its peers in {step} (ZIGZAG_TIMEOUT_S)"
                )
            # Spin at first; a long wait means that a peer still computes.
            if waited > 1e-3:
                pause = min(1e-3, pause + 2e-5)
                time.sleep(pause)


def _offsets(counts: list[int]) -> list[int]:
    offsets = [0]
    for count in counts[:-1]:
        offsets.append(offsets[-1] + count)
    return offsets
