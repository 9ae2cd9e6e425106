"""How a process ends while a call of the library still runs on another thread."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, threading, time
import numpy as np
import zigzag_attention as z

plan = z.Plan.from_lengths([2000], {ranks})
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((plan.local_tokens(0), 2, 32), dtype=np.float32) for _ in range(3))
inside = threading.Event()

def work(communicator):
    while True:
        inside.set()
        z.attention(q, k, v, plan, group=communicator)

for communicator in z.Communicator.threads({ranks}):
    threading.Thread(target=work, args=(communicator,), daemon=True).start()
inside.wait()
time.sleep({delay})
sys.exit(7)
"""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("delay", [0.05, 0.11, 0.23])
def test_daemon_threads_do_not_change_the_exit_code(ranks: int, delay: float) -> None:
    """A thread that wants the GIL of an ended interpreter must not abort the process."""
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(ranks=ranks, delay=delay)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (7, "")
