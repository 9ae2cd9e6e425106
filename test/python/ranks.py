"""Ranks as threads, and ranks as processes over gloo, for the tests of this folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zigzag_attention

ROOT = Path(__file__).resolve().parents[2]


def run_threads(size: int, work: Callable[[int, zigzag_attention.Communicator], Any]) -> list[Any]:
    """work(rank, communicator) on a thread each; the first rank's exception is raised."""
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def rank_main(rank: int, communicator: zigzag_attention.Communicator) -> None:
        try:
            results[rank] = work(rank, communicator)
        except BaseException as error:
            errors[rank] = error
            communicator.abort(str(error))

    threads = [
        threading.Thread(target=rank_main, args=(rank, communicator))
        for rank, communicator in enumerate(zigzag_attention.Communicator.threads(size))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
    return results


@dataclass
class Ended:
    """A rank's process when it ended."""

    code: int
    output: str


PREAMBLE = """
import os, sys, time, datetime
import torch, torch.distributed as dist
import zigzag_attention as z
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
"""


class Processes:
    """`size` Python processes that are ranks of a gloo group."""

    def __init__(self, size: int, script: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(size):
            variables = {
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "ZIGZAG_NUM_THREADS": "1",
                "ZIGZAG_TIMEOUT_S": "60",
                **environment,
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", PREAMBLE + script],
                    env=variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def wait(self, seconds: float = 120) -> list[Ended]:
        """Every rank's exit code and output; a rank that does not end is killed and fails."""
        ended = []
        try:
            for process in self.processes:
                output, _ = process.communicate(timeout=seconds)
                ended.append(Ended(process.returncode, output))
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
        return ended


def run_processes(size: int, script: str, **environment: str) -> list[Ended]:
    """Runs the script on every rank; all must exit with 0."""
    ended = Processes(size, script, **environment).wait()
    for rank, end in enumerate(ended):
        assert end.code == 0, f"rank {rank} exited with {end.code}:\n{end.output}"
    return ended
