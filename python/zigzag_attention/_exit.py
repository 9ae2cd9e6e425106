"""What outlives a process group of torch, and the end of a process that has one."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import sys
import time
from pathlib import Path

_PAUSE = 0.03


def import_defaults_of_torch() -> None:
    """Imports functions whose default argument is the world's group before there is one.

    torch imports them when an operation of a library is first called. A world that is there by then
    would outlive destroy_process_group(), and its threads with it. Only where torch is imported.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available():
        importlib.import_module("torch.distributed.nn.functional")


@atexit.register
def _give_way() -> None:
    """Lets threads of gloo give back the tensors of the caller's own last collectives.

    A group that was not destroyed has them. One that wants the GIL when the interpreter has ended
    would abort the process (`_distributed.keep`).
    """
    with contextlib.suppress(OSError):
        if any(_name(task).startswith(b"pt_gloo") for task in Path("/proc/self/task").iterdir()):
            time.sleep(_PAUSE)


def _name(task: Path) -> bytes:
    """A thread's name, which may be of any bytes; empty when it has ended."""
    with contextlib.suppress(OSError):
        return task.joinpath("comm").read_bytes()
    return b""
