"""zigzag bench: every benchmark runs, verifies its results and prints its columns."""

import re
import sys

import support
from support import CommandTest


class BenchTest(CommandTest):
    def test_layout(self):
        result = self.passes(
            "bench",
            "layout",
            "--lengths",
            "700,3,0,90",
            "--ranks",
            3,
            "--kv-heads",
            2,
            "--repeat",
            2,
            "--threads",
            "1,2",
            "--json",
        ).json()
        self.assertEqual(result["benchmark"], "layout")
        self.assertEqual(
            [(r["operation"], r["threads"]) for r in result["rows"]],
            [
                (name, threads)
                for threads in (1, 2)
                for name in ("memcpy", "shard", "unshard", "extract", "scatter")
            ],
        )
        for row in result["rows"]:
            self.assertEqual(row["#wrong"], 0)
            self.assertGreater(row["GB/s"], 0)

    def test_attention(self):
        for dtype in ("float32", "bfloat16"):
            result = self.passes(
                "bench",
                "attention",
                "--lengths",
                "300,41",
                "--ranks",
                3,
                "--heads",
                4,
                "--kv-heads",
                2,
                "--head-dim",
                64,
                "--dtype",
                dtype,
                "--repeat",
                2,
                "--threads",
                "1",
                "--json",
            ).json()
            self.assertEqual([r["pass"] for r in result["rows"]], ["forward", "backward", "both"])
            for row in result["rows"]:
                self.assertEqual(row["#wrong"], 0, dtype)
                for column in ("TFLOP/s", "of FMA peak", "of one rank", "x reference"):
                    self.assertGreater(row[column], 0)

    def test_plan(self):
        result = self.passes(
            "bench", "plan", "--lengths", "70000,3,900", "--ranks", 16, "--repeat", 2, "--json"
        ).json()
        self.assertEqual([r["#wrong"] for r in result["rows"]], [0] * len(result["rows"]))
        self.assertIn("build the plan", [r["what"] for r in result["rows"]])

    def test_help_says_what_benchmarks_take(self):
        for benchmark in ("layout", "attention", "plan"):
            text = self.passes("bench", benchmark, "--help").out
            self.assertNotIn("mpi", text)
            self.assertEqual("--comm" in text, benchmark == "attention")
            self.assertEqual("--device" in text, benchmark == "attention")

    def test_plan_of_more_ranks_than_threads(self):
        result = self.passes(
            "bench", "plan", "--lengths", "1000000000000", "--ranks", "8192", "--json"
        ).json()
        self.assertEqual(result["ranks"], 8192)

    def test_tables(self):
        for benchmark in ("layout", "attention", "plan"):
            table = self.passes(
                "bench", benchmark, "--lengths", "64,9", "--ranks", 2, "--repeat", 1, "--threads", 1
            ).out
            self.assertIn("#wrong", table)


class DoctorTest(CommandTest):
    def test_it_always_prints(self):
        doctor = self.passes("doctor", "--json").json()
        self.assertEqual(
            set(doctor),
            {"version", "build", "memory_bytes", "environment", "components", "self_checks"},
        )
        checks = {c["name"]: c["status"] for c in doctor["self_checks"]}
        self.assertNotIn("failed", checks.values())
        self.assertEqual(checks["cpu, 2 rank threads, float32"], "passed")
        self.assertIn("CPU", [c["name"] for c in doctor["components"]])

    def test_it_prints_what_is_broken(self):
        finished = self.zigzag("doctor", "--json", env={"ZIGZAG_NUM_THREADS": "none"})
        self.assertEqual(finished.code, 1)
        doctor = finished.json()
        self.assertEqual(doctor["environment"], {"ZIGZAG_NUM_THREADS": "none"})
        broken = [c for c in doctor["components"] if not c["available"]]
        self.assertIn("ZIGZAG_NUM_THREADS is 'none'", " ".join(c["detail"] for c in broken))

    def test_a_wrong_variable_fails_the_part_that_reads_it(self):
        for part, variable, value in (
            ("threads", "ZIGZAG_NUM_THREADS", "0"),
            ("CPU", "ZIGZAG_CPU_TARGET", "foo"),
        ):
            finished = self.zigzag("doctor", env={variable: value})
            self.assertEqual(finished.code, 1, variable)
            self.assertIn(f"  FAIL {part}: {variable} is '{value}'", finished.out)

    def test_it_lists_every_variable_of_the_docs(self):
        table = (support.REPOSITORY / "docs/cli.md").read_text().partition("## Environment var")[2]
        names = set(re.findall(r"`(ZIGZAG_[A-Z_]+)`", table))
        self.assertGreater(len(names), 10)
        text = self.zigzag("doctor", env=dict.fromkeys(names, "1")).out
        self.assertEqual([name for name in sorted(names) if f"  {name}=1\n" not in text], [])

    def test_text(self):
        text = self.passes("doctor").out
        for heading in ("Build", "Machine", "Self-checks"):
            self.assertIn(f"\n{heading}\n", text)


if __name__ == "__main__":
    sys.modules.setdefault("support", support)
    support.main()
