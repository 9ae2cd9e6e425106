"""`zigzag run --comm mpi` and MPI's failures over several hosts, made of namespaces (hosts.py).

hosts_test.py ZIGZAG COMM_MPI_TEST FAILING_RANK [unittest arguments]
"""

from __future__ import annotations

import collections
import json
import os
import sys
import time
import unittest
from collections.abc import Callable
from pathlib import Path

from hosts import Cluster, Job, enter_laboratory, run, scratch
from lossy_wire import BadCluster

DEADLINE_S = 2.0
# For a machine that is busy with other work: on a quiet one ranks need less than a second of it.
SLACK_S = 8.0
ZIGZAG, COMM_MPI_TEST, FAILING_RANK = (Path(p).resolve() for p in sys.argv[1:4])

PACK = ["--lengths", "700,0,33,1,256,5,90", "--heads", 4, "--kv-heads", 2, "--head-dim", 64]
LONG_PACK = ["--lengths", "2048,700", "--heads", 4, "--kv-heads", 2, "--head-dim", 64]
VARIANTS = {
    "float32": [],
    "bfloat16": ["--dtype", "bfloat16"],
    "float32 in two stages": ["--kv-heads-per-stage", 1],
    "bfloat16 with a window and a softcap": [
        *("--dtype", "bfloat16", "--window", 100, "--softcap", 20)
    ],
    "float16 with full attention": ["--dtype", "float16", "--causal", "false"],
}


def say(line: str) -> None:
    """Figures for whoever reads the log."""
    print(f"    {line}", file=sys.stderr, flush=True)


class BitsTest(unittest.TestCase):
    """Results over several hosts."""

    def check_bits(
        self, cluster: Cluster, ranks_of: dict[str, int], pack: list, flags: list
    ) -> float:
        """Compares the files of threads and of MPI; the seconds of the latter's job."""
        ranks = sum(ranks_of.values())
        ours, theirs = scratch() / "threads.safetensors", scratch() / "mpi.safetensors"
        line = [ZIGZAG, "run", *pack, *flags, "--json"]
        run(*line, "--comm", "threads", "--ranks", ranks, "--output", ours)
        job = cluster.mpirun(ranks_of, *line, "--comm", "mpi", "--output", theirs)
        report = json.loads(job.passes(300))
        self.assertEqual((report["comm"], report["ranks"]), ("mpi", ranks))
        self.assertIsNotNone(report["backward_ms"])
        # No assertEqual: it would print megabytes.
        self.assertTrue(ours.read_bytes() == theirs.read_bytes(), f"{flags}: the files differ")
        theirs.unlink()
        self.gathered = [rank["gathered_bytes"] for rank in report["per_rank"]]
        return job.seconds

    def test_each_host_has_its_ranks(self) -> None:
        """Open MPI sees several machines: names, processes and shared memory of their own."""
        with Cluster("alpha", "beta", "gamma") as cluster:
            ranks_of = {"alpha": 2, "beta": 1, "gamma": 1}
            shown = "echo $(hostname) $(readlink /proc/self/ns/net) $(readlink /proc/self/ns/pid)"
            lines = cluster.mpirun(ranks_of, "sh", "-c", shown).passes().splitlines()
            self.assertEqual(collections.Counter(li.split()[0] for li in lines), ranks_of)
            self.assertEqual(len(set(lines)), 3)

    def test_two_hosts_give_the_bits_of_threads(self) -> None:
        """Every type, mask and stage; and the rows did go over the network."""
        with Cluster("alpha", "beta") as cluster:
            for name, flags in VARIANTS.items():
                with self.subTest(name):
                    before = cluster.bytes_to("beta")
                    self.check_bits(cluster, {"alpha": 2, "beta": 2}, PACK, flags)
                    received = cluster.bytes_to("beta") - before
                    # Of two ranks' keys at least a quarter lie on the other host.
                    self.assertGreater(received, sum(self.gathered[2:]) / 4)
                    say(f"{name}: {received / 1e6:.2f} MB came to the second host")

    def test_three_hosts_give_the_bits_of_threads(self) -> None:
        """Ranks dealt out unevenly, two of three hosts with one rank."""
        with Cluster("alpha", "beta", "gamma") as cluster:
            for name in ("float32", "bfloat16"):
                with self.subTest(name):
                    ranks_of = {"alpha": 1, "beta": 3, "gamma": 1}
                    self.check_bits(cluster, ranks_of, PACK, VARIANTS[name])

    def test_every_exchange_over_three_hosts(self) -> None:
        """The conformance suite of all transports."""
        with Cluster("alpha", "beta", "gamma") as cluster:
            job = cluster.mpirun({"alpha": 1, "beta": 2, "gamma": 1}, COMM_MPI_TEST)
            self.assertIn("PASSED", job.passes(120))

    def test_a_slow_network_that_loses_frames(self) -> None:
        """Delay and loss cost time and change nothing."""
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            self.skipTest("/dev/net/tun cannot be opened")
        for delay, loss in ((0.0, 0.0), (0.005, 0.0), (0.0, 0.01), (0.005, 0.01)):
            with BadCluster("alpha", "beta", delay=delay, loss=loss) as cluster:
                for name in ("float32", "bfloat16"):
                    with self.subTest(name, delay=delay, loss=loss):
                        ranks_of = {"alpha": 2, "beta": 2}
                        seconds = self.check_bits(cluster, ranks_of, LONG_PACK, VARIANTS[name])
                        say(f"{name}, {delay * 1e3:.0f} ms, {loss:.0%} lost: {seconds:.1f} s")
                say(f"  {cluster.carried} frames carried, {cluster.lost} lost")


class FailureTest(unittest.TestCase):
    """What the surviving ranks say and when."""

    def setUp(self) -> None:
        # mpirun reports one code only, so each rank leaves its own.
        self.wrapper = scratch() / "rank.sh"
        left = f"{scratch()}/$OMPI_COMM_WORLD_RANK"
        lines = ["#!/bin/sh", "trap : TERM", f'"$@" 2> {left}.words', f"echo $? > {left}.code", ""]
        self.wrapper.write_text("\n".join(lines))
        self.wrapper.chmod(0o755)
        for kind in ("code", "words"):
            for old in scratch().glob(f"*.{kind}"):
                old.unlink()

    def start(self, cluster: Cluster, *command: object) -> Job:
        """Two ranks on each of two hosts."""
        flags = ["-x", f"ZIGZAG_TIMEOUT_S={DEADLINE_S:g}"]
        flags += ["--mca", "odls_base_sigkill_timeout", "3"]
        return cluster.mpirun({"alpha": 2, "beta": 2}, self.wrapper, *command, flags=flags)

    def survive(self, job: Job, survivors: range, step: str, since: float) -> None:
        """Waits until these ranks have ended and checks their codes, words and time."""
        codes = [scratch() / f"{rank}.code" for rank in survivors]
        latest = since + DEADLINE_S + SLACK_S
        while not all(c.exists() and c.read_text() for c in codes) and time.time() < latest:
            time.sleep(0.02)
        running = [p for host in job.hosts for p in host.processes()]
        said = {f.name: f.read_text() for f in scratch().glob("*.words")}
        running = [p for p in running if p.split()[1] in ("failing_rank", "zigzag")]
        self.assertFalse(running, f"still running; the ranks said: {said}")
        took = []
        killed = 0
        for rank, code in zip(survivors, codes, strict=True):
            words_file = scratch() / f"{rank}.words"
            words = words_file.read_text() if words_file.exists() else "nothing"
            # mpirun kills the rest once a second rank has ended (docs/transports.md). On a busy
            # machine that may hit a rank between its words and its exit, but one at most.
            killed += not code.exists()
            self.assertLessEqual(killed, 1, f"rank {rank} was killed too; it said: {words}")
            if code.exists():
                self.assertEqual(code.read_text().strip(), "3", f"rank {rank} said: {words}")
                took.append(code.stat().st_mtime - since)
            # Open MPI's own lines begin with the host in brackets.
            own = [li for li in words.splitlines() if li.startswith((f"rank {rank} ", "zigzag: "))]
            self.assertTrue(own, f"rank {rank} said: {words}")
            self.assertIn(f"rank {rank} ", own[0])
            self.assertRegex(own[0], step)
            self.assertRegex(own[0].replace(f"rank {rank} ", "", 1), r"ranks? (\d[^:;]*)?\d")
        job.end()
        say(f"the ranks ended {min(took):.1f} to {max(took):.1f} s after; the last one said:")
        say(f"  {own[0]}")
        if killed:
            say("  one rank was killed by mpirun after its words")

    def break_while(
        self, command: tuple, step: str, survivors: range, act: Callable[[Cluster], None]
    ) -> None:
        """Lets ranks exchange for ever, does something bad, and checks the survivors."""
        with Cluster("alpha", "beta") as cluster:
            job = self.start(cluster, *command)
            before = cluster.bytes_to("beta")
            latest = time.time() + 60
            while cluster.bytes_to("beta") < before + 1_000_000:
                self.assertLess(time.time(), latest, "the ranks never began to exchange")
            since = time.time()
            act(cluster)
            self.survive(job, survivors, step, since)

    def exchanging(self, where: str) -> tuple:
        """Ranks that exchange until something stops them."""
        return (FAILING_RANK, "never", where)

    def test_a_cable_is_pulled_in_a_forward(self) -> None:
        """Ranks on both sides end at the deadline."""
        step = "gather of K and V|few bytes"
        self.break_while(self.exchanging("forward"), step, range(4), lambda c: c.pull("beta"))

    def test_a_cable_is_pulled_in_a_backward(self) -> None:
        """As in a forward."""
        step = "gather of K and V|reduction of dK and dV|few bytes"
        self.break_while(self.exchanging("backward"), step, range(4), lambda c: c.pull("beta"))

    def test_a_switch_drops_everything(self) -> None:
        """No end sees a link go down."""
        step = "gather of K and V|few bytes"
        self.break_while(self.exchanging("forward"), step, range(4), lambda c: c.mute("beta"))

    def test_a_host_loses_power(self) -> None:
        """All its processes end and nobody there can say so."""
        step = "gather of K and V|few bytes"
        self.break_while(
            self.exchanging("forward"), step, range(2), lambda c: c.hosts["beta"].end()
        )

    def test_a_run_of_the_command_loses_its_cable(self) -> None:
        """The command itself: one sentence a rank, and no output file."""
        output = scratch() / "lost.safetensors"
        # Three times what the wait for the first megabyte takes.
        pack = ["--lengths", "30000", "--heads", 8, "--kv-heads", 8, "--head-dim", 64]
        command = (ZIGZAG, "run", "--comm", "mpi", *pack, "--output", output)
        step = "gather of|reduction of|few bytes|barrier"
        self.break_while(command, step, range(4), lambda c: c.pull("beta"))
        self.assertEqual(list(scratch().glob("lost.safetensors*")), [])

    def test_a_rank_of_another_host_is_killed(self) -> None:
        """In every kind of exchange."""
        gather, reduction = "gather of K and V", "reduction of dK and dV"
        places = {"gather": gather, "reduce": reduction, "barrier": "barrier"}
        places |= {"all_gather": "few bytes", "forward": gather, "backward": gather}
        places |= {"reduction": reduction}
        for where, step in places.items():
            with self.subTest(where), Cluster("alpha", "beta") as cluster:
                self.setUp()
                job = self.start(cluster, FAILING_RANK, "kill", where)
                killed = scratch() / "3.code"
                latest = time.time() + 60
                while not killed.exists():
                    self.assertLess(time.time(), latest, "rank 3 has not killed itself")
                    time.sleep(0.01)
                self.survive(job, range(3), step, killed.stat().st_mtime)

    def test_ranks_of_another_host_have_another_option(self) -> None:
        """Every rank hears what differs before anything is exchanged."""
        with Cluster("alpha", "beta") as cluster:
            differs = '[ $(hostname) = beta ] && set -- "$@" --dtype bfloat16; exec "$@"'
            command = (ZIGZAG, "run", *PACK, "--comm", "mpi")
            job = self.start(cluster, "sh", "-c", differs, "sh", *command)
            job.wait(30)
            job.end()
            for rank in range(4):
                words = (scratch() / f"{rank}.words").read_text()
                sentence = "zigzag: ranks 2 and 3 have --dtype bfloat16, rank 0 has --dtype float32"
                self.assertIn(sentence, words)
                self.assertEqual((scratch() / f"{rank}.code").read_text().strip(), "3")


if __name__ == "__main__":
    enter_laboratory()
    unittest.main(argv=[sys.argv[0], *sys.argv[4:]], verbosity=2)
