"""Ranks that die, never come or disagree: an exception on every other rank, and no hang."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ranks import Processes

import zigzag_attention as z

STEPS = """
lengths = [300, 20] if rank != int(os.environ.get("ODD_RANK", "-1")) else [20, 300]
plan = z.Plan.from_lengths(lengths, size)
torch.manual_seed(rank)
rows = plan.local_tokens(rank)
q, k, v = (torch.randn(rows, h, 32, requires_grad=True) for h in (4, 2, 2))
try:
    for step in range(10**6):
        print("step", step, flush=True)
        out = z.attention(q, k, v, plan)
        if rank == int(os.environ.get("KILL_RANK", "-1")) and step == 2:
            os.kill(os.getpid(), 9)
        if rank == int(os.environ.get("SLEEP_RANK", "-1")) and step == 2:
            time.sleep(30)
        out.sum().backward()
        if step == 20 and "ODD_RANK" not in os.environ and "KILL_RANK" not in os.environ:
            break
except (RuntimeError, TimeoutError, ValueError) as error:
    print(type(error).__name__, error, flush=True)
    os._exit(17)
"""

SURVIVED = 17


def killed(repetition):
    start = time.monotonic()
    victim = repetition % 3
    ended = Processes(3, STEPS, KILL_RANK=str(victim), ZIGZAG_TIMEOUT_S="20").wait(90)
    assert time.monotonic() - start < 60
    for rank, end in enumerate(ended):
        if rank == victim:
            assert end.code == -signal.SIGKILL
        else:
            assert end.code == SURVIVED, end.output
            assert "rank " in end.output


def mismatched(repetition):
    ended = Processes(3, STEPS, ODD_RANK=str(repetition % 3)).wait(90)
    for end in ended:
        assert end.code == SURVIVED, end.output
        assert "pack" in end.output or "plan" in end.output, end.output


def test_a_mistake_is_named_even_when_no_peer_comes(monkeypatch):
    monkeypatch.setenv("ZIGZAG_TIMEOUT_S", "0.5")
    group, _peer = z.Communicator.threads(2)
    x = np.zeros((8, 2, 16), np.float32)
    with pytest.raises(ValueError, match=r"is nan; .* could not be told: rank 0 waited"):
        z.attention(x, x, x, z.Plan([0, 16], 2), group, softmax_scale=float("nan"))


REFUSALS = """
cu = torch.tensor([0, 64, 128])
q, k, v = (torch.randn(64, h, 32) for h in (4, 2, 2))
drop_in = z.zigzag_llama3_flash_attn_varlen_func
given = (q, k, v, cu // 2, cu, 64, 64, 1, None)
plan = z.Plan([0, 64, 128], 2)
odd = rank == 1
for call in (
    lambda: drop_in(*given, dropout_p=0.5 if odd else 0.0),
    lambda: drop_in(*given, alibi_slopes=torch.ones(4) if odd else None),
    lambda: drop_in(*given, **({"softmax_scal": 1.0} if odd else {})),
    lambda: z.attention(q, k, v, plan, **({"dropout": 0.5} if odd else {})),
    lambda: z.attention(q.numpy() if odd else q, k, v, plan),
):
    try:
        call()
        print("no error", flush=True)
    except (TypeError, ValueError) as error:
        print("mine", error, flush=True)
    except RuntimeError as error:
        print("theirs", error, flush=True)
z.attention(q, k, v, plan)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_refusal_on_one_rank_reaches_the_others():
    ended = Processes(2, REFUSALS, ZIGZAG_TIMEOUT_S="20").wait(90)
    for rank, end in enumerate(ended):
        assert end.code == 0, end.output
        assert "no error" not in end.output
        assert end.output.count("mine" if rank == 1 else "theirs rank 1 passed") == 5, end.output


def test_a_killed_process_ends_the_others():
    killed(1)


def test_mismatched_plans_are_an_error_on_every_rank():
    mismatched(1)


@pytest.mark.repeat
@pytest.mark.parametrize("repetition", range(20))
def test_killed_repeatedly(repetition):
    killed(repetition)


@pytest.mark.repeat
@pytest.mark.parametrize("repetition", range(20))
def test_mismatched_repeatedly(repetition):
    mismatched(repetition)


FAILS = """
group = z.Communicator.from_torch(dist.group.WORLD)
plan = z.Plan([0, 64], size)
q, k, v = (torch.randn(plan.local_tokens(rank), h, 32) for h in (4, 2, 2))
z.attention(q, k, v, plan)
start = time.monotonic()
if rank == 1:
    group.abort("it ran out of luck")
try:
    z.attention(q, k, v, plan)
except z.CommunicationError as error:
    print(error, flush=True)
    assert "ran out of luck" in str(error) and ("rank 1 failed" in str(error) or rank == 1)
    assert time.monotonic() - start < 10
    time.sleep(3)  # rank 0 keeps the store
    os._exit(17)
"""


def test_a_rank_that_fails_tells_the_others():
    for end in Processes(3, FAILS).wait():
        assert end.code == SURVIVED, end.output


def test_a_rank_that_does_not_come_is_a_timeout():
    processes = Processes(2, STEPS, SLEEP_RANK="1", ZIGZAG_TIMEOUT_S="3")
    first = processes.processes[0]
    output, _ = first.communicate(timeout=60)
    processes.processes[1].kill()
    processes.wait()
    assert first.returncode == SURVIVED, output
    assert "TimeoutError" in output and "3 s" in output


@pytest.fixture(autouse=True)
def children_take_sigint():
    """A background job starts with SIGINT ignored, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


INTERRUPTED = """
import os, signal, threading, time
import torch
import zigzag_attention as z
{setup}
threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    {call}
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted after", time.monotonic() - start)
"""
LONG_WORK = (
    "q = torch.randn(60000, 8, 128); plan = z.Plan([0, 60000], 1)",
    "z.attention(q, q, q, plan)",
)
LONG_WAIT = (
    "both = z.Communicator.threads(2); q = torch.randn(8, 2, 32); plan = z.Plan([0, 16], 2)",
    "z.attention(q, q, q, plan, both[0])",
)


@pytest.mark.parametrize(("setup", "call"), [LONG_WORK, LONG_WAIT], ids=["work", "wait"])
def test_ctrl_c_interrupts(setup, call):
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.format(setup=setup, call=call)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "ZIGZAG_NUM_THREADS": "1"},
    )
    assert "interrupted after" in run.stdout and "not" not in run.stdout, run.stdout + run.stderr
    assert float(run.stdout.split()[-1]) < 15
    assert run.returncode == 0, run.stderr


def test_ctrl_c_interrupts_a_wait_for_peers():
    """Rank 0 waits in gloo for a rank that sleeps."""
    processes = Processes(
        2, STEPS.replace("except (", "except (KeyboardInterrupt, "), SLEEP_RANK="1"
    )
    first = processes.processes[0]
    deadline = time.monotonic() + 60
    seen = ""
    while "step 3" not in seen and time.monotonic() < deadline:
        line = first.stdout.readline()
        seen += line
        if "step 2" in line:
            time.sleep(2)
            break
    first.send_signal(signal.SIGINT)
    start = time.monotonic()
    output, _ = first.communicate(timeout=60)
    processes.processes[1].kill()
    processes.wait()
    assert first.returncode == SURVIVED and "KeyboardInterrupt" in output, output
    assert time.monotonic() - start < 15


def test_other_threads_run_during_work():
    """The GIL is free while the library computes."""
    import threading

    import torch

    import zigzag_attention as z

    q = torch.randn(6000, 4, 64)
    plan = z.Plan([0, 6000], 1)
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.002):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    z.attention(q, q, q, plan)
    end = time.monotonic()
    stop.set()
    thread.join()
    during = [t for t in ticks if start < t < end]
    assert len(during) >= min(5, (end - start) / 0.05)
