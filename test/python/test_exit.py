"""How a process ends while a call of the library still runs on another thread."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ranks import Processes

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


# Before the last collective the main thread takes to keeping the GIL: who wants it only waits.
LAST_CALL = """
plan = z.Plan.from_lengths([64, 192], size)
rows = plan.local_tokens(rank)
q, k, v = (torch.randn(rows, 2, 32, requires_grad=True) for _ in range(3))
cu_seqlens = torch.tensor([0, 64, 256], dtype=torch.int32)
for last in (False, True):
    {forward}
    if last:
        sys.setswitchinterval(100)
    out.sum().backward()
dist.destroy_process_group()
sys.exit(7)
"""
FORWARD = {
    "zigzag": "out = z.attention(q, k, v, plan)",
    "contiguous": """
    own = z.ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, True, rank, size)
    out = z.ring_flash_attn.llama3_flash_attn_varlen_func(
        q, k, v, *own[:4], heads_k_stride=1, local_k_slice=own[4], causal=True
    )""",
}


@pytest.mark.parametrize("layout", FORWARD)
def test_exchanges_just_before_the_end_do_not_change_the_exit_code(layout: str) -> None:
    """A thread of gloo that still holds what it exchanged must not want the GIL."""
    script = "import zigzag_attention.ring_flash_attn\n" + LAST_CALL.format(forward=FORWARD[layout])
    for _ in range(3):
        for end in Processes(2, script).wait():
            assert end.code == 7, end.output


OWN_COLLECTIVES = """
import ctypes
plan = z.Plan.from_lengths([64, 192], size)
q = torch.randn(plan.local_tokens(rank), 2, 32)
z.attention(q, q, q, plan)
ctypes.CDLL(None).prctl(15, b"name \\xe9\\xff", 0, 0, 0)  # a thread's name is of any bytes
sys.setswitchinterval(100)
for _ in range(20):
    dist.all_gather_object([None] * size, rank)
{last}
sys.exit(7)
"""


@pytest.mark.parametrize("last", ["dist.destroy_process_group()", ""], ids=["destroyed", "alive"])
def test_collectives_of_the_caller_do_not_change_the_exit_code_either(last: str) -> None:
    for end in Processes(4, OWN_COLLECTIVES.format(last=last)).wait():
        assert end.code == 7, end.output
        assert "ignored" not in end.output, end.output


DESTROYED = """
plan = z.Plan.from_lengths([64, 192], size)
q = torch.randn(plan.local_tokens(rank), 2, 32)
z.attention(q, q, q, plan)
dist.destroy_process_group()
tasks = [f"/proc/self/task/{task}/comm" for task in os.listdir("/proc/self/task")]
names = [open(task).read() for task in tasks]
assert not [name for name in names if name.startswith("pt_gloo")], names
child = os.fork()
if child == 0:
    sys.exit(4)
for _ in range(200):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
assert ended and os.waitstatus_to_exitcode(status) == 4
"""


def test_a_destroyed_group_is_gone_and_a_forked_child_ends() -> None:
    for end in Processes(2, DESTROYED).wait():
        assert end.code == 0, end.output
