"""Short messages between processes of one machine: memory that they share."""

import os
import time

import pytest
from ranks import Processes, run_processes

ROUNDS = """
import random
group = z.Communicator.from_torch(dist.group.WORLD)
random.seed(5)
for i in range(300):
    # Sizes around the slot's, nothing, and more than a slot holds.
    count = random.choice([0, 1, 104, 16383, 16384, 16385, 100000]) if i % 3 == 0 else i
    mine = bytes([(rank * 31 + i) % 256]) * count
    want = b"".join(bytes([(r * 31 + i) % 256]) * count for r in range(size))
    assert group.all_gather(mine) == want, (i, count)
    if i % 50 == rank:
        time.sleep(0.02)  # somebody is always late
group.barrier()
start = time.perf_counter()
for _ in range(200):
    group.all_gather(b"x" * 104)
print("microseconds", (time.perf_counter() - start) / 200 * 1e6)
assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"zigzag-{os.getpid()}-")]
dist.barrier()
dist.destroy_process_group()
"""

DYING = """
group = z.Communicator.from_torch(dist.group.WORLD)
group.barrier()
if rank == 2:
    os.kill(os.getpid(), 9)
start = time.monotonic()
try:
    group.barrier()
except z.CommunicationError as error:
    assert "rank 2 (process" in str(error) and "has died" in str(error), error
    assert time.monotonic() - start < 10
    os._exit(17)
"""


UNLIKE = """
group = z.Communicator.from_torch(dist.group.WORLD)
group.all_gather(b"A" * 104)
group.all_gather(b"A" * 104)
for mine, other in ((8, 16), (8, 20000), (20000, 20008), (8, None)):
    count = mine if rank == 0 else other
    try:
        group.barrier() if count is None else group.all_gather(b"B" * count)
        print("no error", flush=True)
    except z.CommunicationError as error:
        assert "all ranks must make the same calls" in str(error), error
        assert "rank 0 gave %d bytes" % mine in str(error), error
dist.barrier()
dist.destroy_process_group()
"""


def test_ranks_that_make_different_calls_are_told():
    ended = Processes(2, UNLIKE, ZIGZAG_TIMEOUT_S="20").wait(60)
    for end in ended:
        assert end.code == 0 and "no error" not in end.output, end.output


def test_messages_arrive_whole_and_in_order():
    for size in (2, 5):
        run_processes(size, ROUNDS)


def test_a_dead_process_is_noticed_at_once():
    ended = Processes(3, DYING).wait()
    assert [end.code for end in ended] == [17, 17, -9], [end.output for end in ended]


def test_a_deadline():
    script = """
group = z.Communicator.from_torch(dist.group.WORLD)
group.barrier()
if rank == 0:
    time.sleep(8)
try:
    group.barrier()
except TimeoutError as error:
    assert "rank 1 waited 2 s for rank 0" in str(error), error
    try:
        group.barrier()
    except z.CommunicationError as again:
        assert "the group ended when this rank failed: rank 1 waited 2 s" in str(again), again
        assert "rank 1 stopped" not in str(again), again
        os._exit(17)
except z.CommunicationError as error:
    assert rank == 0, error
    os._exit(17)
os._exit(17 if rank == 0 else 1)
"""
    start = time.monotonic()
    ended = Processes(2, script, ZIGZAG_TIMEOUT_S="2").wait()
    assert [end.code for end in ended] == [17, 17], [end.output for end in ended]
    assert time.monotonic() - start < 60


def names():
    return {name for name in os.listdir("/dev/shm") if name.startswith("zigzag-")}


def test_nothing_is_left_behind():
    before = names()
    run_processes(2, "z.Communicator.from_torch(dist.group.WORLD).barrier()\nos._exit(0)\n")
    assert names() <= before


KILLED_WHILE_SHARING = """
dist.barrier()
from zigzag_attention import _distributed
made, original = [], _distributed._Collectives.all_gather
def dying(self, data, out):
    made.append(1)
    if rank == 0 and len(made) == {number}:
        os.kill(os.getpid(), 9)
    original(self, data, out)
_distributed._Collectives.all_gather = dying
try:
    z.Communicator.from_torch(dist.group.WORLD).barrier()
except (RuntimeError, TimeoutError):
    os._exit(17)
"""


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_rank_killed_while_it_shares_memory_leaves_nothing_behind(number):
    before = names()
    script = KILLED_WHILE_SHARING.format(number=number)
    ended = Processes(2, script, ZIGZAG_TIMEOUT_S="30").wait()
    assert [end.code for end in ended] == [-9, 17], ended[1].output
    assert names() <= before


UNSEEN = """
os.setuid(65534)
from zigzag_attention import _distributed
made, original = [], _distributed._Collectives.all_gather
_distributed._Collectives.all_gather = lambda *x: (made.append(1), original(*x))[1]
group = z.Communicator.from_torch(dist.group.WORLD)
for _ in range(3):
    group.barrier()
# Who is there; memory without a name, in vain; memory with one. Messages then need none.
assert len(made) == 5, made
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_processes_that_may_not_look_into_one_another_share_memory_by_name():
    """After setuid a process hides its files from processes of its own user."""
    before = names()
    run_processes(3, UNSEEN + ROUNDS)
    assert names() <= before
