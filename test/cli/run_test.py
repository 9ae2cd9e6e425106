"""zigzag run: JSON, the check over world sizes and types, output files, interruption, MPI."""

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import support
from support import CommandTest

WORLDS = (1, 2, 3, 4, 5, 8)
DTYPES = ("float32", "float16", "bfloat16")


def documents_of(folder: Path) -> None:
    """Real text of very different lengths: 0 bytes to 1,500."""
    text = (support.REPOSITORY / "include/zigzag/plan.h").read_bytes()
    (folder / "docs").mkdir()
    for name, length in (("a", 1500), ("b", 0), ("c", 1), ("d", 13), ("e", 257), ("f", 128)):
        (folder / "docs" / name).write_bytes(text[:length])


class RunTest(CommandTest):
    def test_json_has_the_promised_keys(self):
        run = self.passes("run", "--lengths", "100,0,33", "--ranks", 3, "--json").json()
        self.assertEqual(run["ranks"], 3)
        self.assertEqual((run["device"], run["comm"], run["dtype"]), ("cpu", "threads", "float32"))
        self.assertEqual((run["tokens"], run["documents"]), (133, 3))
        for key in ("forward_ms", "backward_ms", "tflops", "peak_resident_bytes"):
            self.assertGreater(run[key], 0)
        self.assertEqual(len(run["per_rank"]), 3)
        for rank in run["per_rank"]:
            self.assertEqual(
                set(rank),
                {"rank", "tokens", "flops", "gathered_bytes", "forward_ms", "backward_ms"},
            )
        self.assertIsNone(run["check"])

    def test_memory_beyond_the_named_parts_is_small(self):
        # Tables, scratch of the kernels, and float32 sums of gradients, 40 MiB at a time: no part
        # grows with the tokens. A thread has less than 8 MiB of scratch.
        threads = os.cpu_count() or 1
        for dtype in DTYPES:
            for world in (1, 4):
                run = self.passes(
                    "run", "--lengths", "6000,2000,192", "--ranks", world, "--dtype", dtype,
                    "--heads", 8, "--kv-heads", 8, "--head-dim", 128, "--json",
                ).json()  # fmt: skip
                self.assertEqual(run["peak_resident_bytes"], sum(run["memory"].values()))
                self.assertLess(
                    run["memory"]["rest_bytes"], (64 << 20) + threads * (8 << 20), (dtype, world)
                )
                for part in ("gathered_bytes", "partials_bytes"):
                    self.assertEqual(run["memory"][part], 0, "rank threads read in place")

    def test_parts_of_the_memory_add_up_to_the_peak(self):
        """With --check too, whose results come after the peak; the rest is the last line."""
        units = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
        arguments = ("run", "--lengths", "900,40", "--ranks", 2, "--heads", 4, "--head-dim", 256)
        for check in ([], ["--check"]):
            run = self.passes(*arguments, *check, "--json").json()
            self.assertEqual(run["peak_resident_bytes"], sum(run["memory"].values()))
            self.assertEqual(run["check_results_bytes"] > 0, bool(check))
            text = self.passes(*arguments, *check).out
            peak, parts = re.search(
                r"Peak resident memory of .*: (.*)\n((?:  .*\n)+)All but the last", text
            ).groups()
            lines = [re.match(r" +([0-9.e+]+) (\w+)  (.*)", line) for line in parts.splitlines()]
            total = sum(float(line[1]) * units[line[2]] for line in lines)
            value, unit = peak.split()
            self.assertAlmostEqual(total / (float(value) * units[unit]), 1, delta=0.01)
            self.assertTrue(lines[-1][3].startswith("program, threads, tables"), text)
            self.assertEqual("Measured before --check" in text, bool(check))

    def test_check_passes_for_every_world_size_and_type(self):
        documents_of(self.folder)
        for dtype in DTYPES:
            for world in WORLDS:
                run = self.passes(
                    "run",
                    "--documents",
                    "docs",
                    "--ranks",
                    world,
                    "--dtype",
                    dtype,
                    "--heads",
                    4,
                    "--kv-heads",
                    2,
                    "--head-dim",
                    32,
                    "--check",
                    "--json",
                ).json()
                check = run["check"]
                self.assertTrue(check["passed"], f"{dtype} {world}: {check}")
                self.assertGreaterEqual(check["out_max"], 0)
                for name in ("out", "lse", "dq"):
                    self.assertTrue(check[f"{name}_one_rank_equal"], f"{name} {dtype} {world}")

    def test_out_lse_and_dq_have_the_same_bits_for_every_world_size(self):
        documents_of(self.folder)
        first = None
        for world in (1, 2, 3, 4, 8):
            path = self.folder / f"{world}.safetensors"
            self.passes("run", "--documents", "docs", "--ranks", world, "--output", path.name)
            tensors = support.read_safetensors(path)
            self.assertEqual(list(tensors), ["out", "lse", "dq", "dk", "dv"])
            tokens = 1500 + 1 + 13 + 257 + 128
            self.assertEqual(tensors["out"][1], [tokens, 8, 64])
            self.assertEqual(tensors["lse"][:2], ("F32", [tokens, 8]))
            self.assertEqual(tensors["dk"][1], [tokens, 2, 64])
            first = first or tensors
            for name in ("out", "lse", "dq"):
                self.assertEqual(tensors[name], first[name], f"{name} at {world} ranks")

    def test_masks_and_options(self):
        documents_of(self.folder)
        for options in (
            ["--causal", "false"],
            ["--window", "50"],
            ["--window", "40,7", "--causal", "false"],
            ["--softcap", "2.5"],
            ["--scale", "0.3"],
            ["--kv-heads-per-stage", "1"],
            ["--kv-heads", "4", "--kv-heads-per-stage", "2"],
            ["--kernels", "reference"],
            ["--deterministic"],
            ["--head-dim", "80", "--heads", "3", "--kv-heads", "3"],
        ):
            check = self.passes(
                "run",
                "--documents",
                "docs",
                "--max-tokens",
                900,
                "--ranks",
                3,
                "--check",
                "--json",
                *options,
            ).json()["check"]
            self.assertTrue(check["passed"], options)

    def test_empty_packs(self):
        for lengths in ("0", "0,0", "1", "1,1,1"):
            for world in (1, 3):
                run = self.passes(
                    "run",
                    "--lengths",
                    lengths,
                    "--ranks",
                    world,
                    "--check",
                    "--json",
                    "--output",
                    "o.safetensors",
                ).json()
                self.assertTrue(run["check"]["passed"], f"{lengths} over {world}: {run['check']}")

    def test_input_file(self):
        tensors = support.pack_file([70, 0, 5, 31])
        (self.folder / "in.safetensors").write_bytes(support.safetensors_bytes(tensors))
        run = self.passes(
            "run",
            "--input",
            "in.safetensors",
            "--ranks",
            3,
            "--check",
            "--json",
            "--output",
            "out.safetensors",
        ).json()
        self.assertEqual(
            (run["tokens"], run["heads"], run["kv_heads"], run["head_dim"]), (106, 4, 2, 8)
        )
        self.assertTrue(run["check"]["passed"])
        self.assertIn("dv", support.read_safetensors(self.folder / "out.safetensors"))
        # The first token of a document sees itself alone: out is its v.
        out = support.read_safetensors(self.folder / "out.safetensors")["out"][2]
        row = struct.unpack("<8f", out[:32])
        expected = struct.unpack("<8f", tensors["v"][2][:32])
        for got, want in zip(row, expected, strict=True):
            self.assertAlmostEqual(got, want, places=6)
        del tensors["dout"]
        (self.folder / "in.safetensors").write_bytes(support.safetensors_bytes(tensors))
        run = self.passes("run", "--input", "in.safetensors", "--ranks", 2, "--json").json()
        self.assertIsNone(run["backward_ms"])
        run = self.passes(
            "run", "--input", "in.safetensors", "--ranks", 2, "--json", "--backward"
        ).json()
        self.assertGreater(run["backward_ms"], 0)

    def test_a_failing_check_exits_1_and_writes_nothing(self):
        # A NaN in q makes rows that no bound can hold for; the reference has them as well, so the
        # wrong place of an infinity is what must be found: an overflow of float16.
        tensors = support.pack_file([40], dout=False)
        big = struct.pack("<e", 60000.0)
        for name in ("q", "k", "v"):
            shape = tensors[name][1]
            tensors[name] = ("F16", shape, big * (shape[0] * shape[1] * shape[2]))
        (self.folder / "in.safetensors").write_bytes(support.safetensors_bytes(tensors))
        (self.folder / "o.safetensors").write_text("before")
        finished = self.zigzag(
            "run",
            "--input",
            "in.safetensors",
            "--ranks",
            2,
            "--check",
            "--json",
            "--backward",
            "--scale",
            "1e30",
            "--output",
            "o.safetensors",
        )
        if finished.code == 0:
            self.skipTest("the engine holds the bound on this input too")
        self.assertEqual(finished.code, 1)
        self.assertFalse(finished.json()["check"]["passed"])
        self.assertIn("check failed", finished.err)
        self.assertEqual((self.folder / "o.safetensors").read_text(), "before")

    def test_a_nan_or_inf_of_the_input_is_checked_and_spares_the_rest(self):
        for name, value in (
            ("q", "nan"),
            ("v", "nan"),
            ("dout", "nan"),
            ("v", "inf"),
            ("dout", "inf"),
        ):
            tensors = support.pack_file([70, 31])
            dtype, shape, data = tensors[name]
            tensors[name] = (dtype, shape, struct.pack("<f", float(value)) + data[4:])
            (self.folder / "in.safetensors").write_bytes(support.safetensors_bytes(tensors))
            arguments = ("run", "--input", "in.safetensors", "--ranks", 2, "--check")
            run = self.passes(*arguments, "--json").json()
            check = run["check"]
            cause = f"; of the inputs, NaN or infinite elements: 1 of {name}"
            notes = [note for note in run["notes"] if note.endswith(cause)]
            self.assertEqual(len(notes), 1, run["notes"])
            self.assertIn(f"Note: {notes[0]}.\n", self.passes(*arguments).out)
            # Rows without it are held to the bounds: no error at all would be no comparison.
            self.assertGreater(check["dq_relative_l2"], 0, f"{value} in {name}")
            self.assertGreater(check["dk_relative_l2"], 0, f"{value} in {name}")

    def test_nan_of_the_results_is_counted(self):
        tensors = support.pack_file([3], dout=False)
        dtype, shape, data = tensors["v"]
        # One element of the last token and its KV head, seen by one query of two heads.
        tensors["v"] = (dtype, shape, data[:-4] + struct.pack("<f", float("nan")))
        (self.folder / "in.safetensors").write_bytes(support.safetensors_bytes(tensors))
        arguments = ("run", "--input", "in.safetensors", "--ranks", 2)
        note = "out holds 2 NaN; of the inputs, NaN or infinite elements: 1 of v"
        self.assertEqual(self.passes(*arguments, "--check", "--json").json()["notes"], [note])

    def test_seed_decides_the_inputs(self):
        outputs = []
        for seed in (1, 1, 2):
            path = self.folder / f"{len(outputs)}.safetensors"
            self.passes(
                "run", "--lengths", "50", "--ranks", 2, "--seed", seed, "--output", path.name
            )
            outputs.append(path.read_bytes())
        self.assertEqual(outputs[0], outputs[1])
        self.assertNotEqual(outputs[0], outputs[2])

    def test_same_bits_for_one_and_two_threads(self):
        outputs = []
        for threads in ("1", "2"):
            path = self.folder / f"{threads}.safetensors"
            self.passes(
                "run",
                "--lengths",
                "700,90",
                "--ranks",
                3,
                "--output",
                path.name,
                env={"ZIGZAG_NUM_THREADS": threads},
            )
            outputs.append(path.read_bytes())
        self.assertEqual(outputs[0], outputs[1])

    def test_an_interrupted_run_leaves_nothing(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            for delay in (0.1, 0.6):
                process = subprocess.Popen(
                    [
                        support.COMMAND,
                        "run",
                        "--lengths",
                        "6000",
                        "--ranks",
                        "2",
                        "--kernels",
                        "reference",
                        "--output",
                        "o.safetensors",
                    ],
                    cwd=self.folder,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=support.clean_environment(),
                    # A background job starts with SIGINT ignored, which the command respects.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )
                time.sleep(delay)
                process.send_signal(number)
                process.wait(timeout=60)
                self.assertEqual(list(self.folder.iterdir()), [], f"signal {number} at {delay} s")

    def test_output_through_a_link_keeps_the_link(self):
        (self.folder / "real.safetensors").write_text("before")
        (self.folder / "link.safetensors").symlink_to("real.safetensors")
        self.passes("run", "--lengths", "9", "--ranks", 2, "--output", "link.safetensors")
        self.assertTrue((self.folder / "link.safetensors").is_symlink())
        support.read_safetensors(self.folder / "real.safetensors")
        self.assertEqual(len(list(self.folder.iterdir())), 2)

    def test_memory_is_linear_in_the_tokens(self):
        peaks = []
        for tokens in (4096, 8192):
            run = self.passes("run", "--lengths", tokens, "--ranks", 4, "--json").json()
            peaks.append(run["peak_resident_bytes"])
            self.assertLess(run["memory"]["rest_bytes"], 400 << 20)
        self.assertLess(peaks[1], 2.6 * peaks[0])


class MpiTest(CommandTest):
    def setUp(self) -> None:
        super().setUp()
        if shutil.which("mpirun") is None or "MPI: no" in self.zigzag("doctor").out:
            self.skipTest("no mpirun, or built without MPI")

    def mpirun(
        self, ranks: int, *arguments: object, second: list[str] | None = None
    ) -> subprocess.CompletedProcess:
        """Runs the command as `ranks` processes, and one more as `run SECOND` where given."""
        options = ["--oversubscribe"] if ranks > 1 or second else []
        more = [":", "-n", "1", support.COMMAND, "run", *second] if second else []
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.append("--allow-run-as-root")
        return subprocess.run(
            ["mpirun", *options, "-n", str(ranks), support.COMMAND, *map(str, arguments), *more],
            cwd=self.folder,
            env=support.clean_environment({"ZIGZAG_NUM_THREADS": "1"}),
            capture_output=True,
            timeout=200,
            check=False,
        )

    def test_processes_give_the_bits_of_threads(self):
        for ranks in (1, 2, 4):
            arguments = ("run", "--lengths", "300,0,41,7", "--output")
            finished = self.mpirun(
                ranks, *arguments, "mpi.safetensors", "--comm", "mpi", "--check", "--json"
            )
            self.assertEqual(finished.returncode, 0, finished.stderr.decode())
            self.passes(*arguments, "threads.safetensors", "--ranks", ranks)
            self.assertEqual(
                (self.folder / "mpi.safetensors").read_bytes(),
                (self.folder / "threads.safetensors").read_bytes(),
            )

    def test_ranks_that_were_told_different_things_say_so(self):
        tensors = support.pack_file([40])
        (self.folder / "0.safetensors").write_bytes(support.safetensors_bytes(tensors))
        tensors["v"] = (*tensors["v"][:2], tensors["v"][2][:-1] + b"\0")
        (self.folder / "1.safetensors").write_bytes(support.safetensors_bytes(tensors))
        for name in ("0", "1"):
            (self.folder / f"{name}.txt").write_text(f"document {name}")
        lengths = "--lengths 40"
        for first, second, named in (
            (lengths, f"{lengths} --seed 7", "rank 1 has --seed 7, rank 0 has --seed 0"),
            (lengths, "--lengths 30,10", "rank 1 has a pack of 40 tokens in 2 documents"),
            (lengths, f"{lengths} --check", "rank 1 has --check true, rank 0 has --check false"),
            (
                f"{lengths} --output a",
                lengths,
                "rank 1 has --output nowhere, rank 0 has --output a",
            ),
            (lengths, f"{lengths} --forward-only", "has a backward"),
            (lengths, f"{lengths} --max-tokens 9", "rank 1 has --max-tokens 9"),
            (lengths, f"{lengths} --json", "rank 1 has --json true"),
            (lengths, f"{lengths} --dtype float16", "rank 1 has --dtype float16"),
            ("--input 0.safetensors", "--input 1.safetensors", "rank 1 has documents or tensors"),
            ("--documents 0.txt", "--documents 1.txt", "rank 1 has documents or tensors"),
            ("--documents 0.txt", "--lengths 10", "rank 1 has a pack from --lengths"),
        ):
            finished = self.mpirun(1, "run", *first.split(), second=second.split())
            said = finished.stderr.decode()
            self.assertEqual(finished.returncode, 3, said)
            self.assertIn("zigzag: rank 1 has ", said)
            self.assertIn(named, said)
            self.assertIn("; all ranks must be given the same\n", said)
            self.assertEqual(finished.stdout, b"")
            self.assertFalse((self.folder / "a").exists())

    def test_benchmarks_refuse_mpirun(self):
        for benchmark in ("layout", "attention", "plan"):
            finished = self.mpirun(2, "bench", benchmark, "--lengths", "50")
            self.assertEqual(finished.returncode, 2)
            self.assertEqual(finished.stdout, b"")
            self.assertIn("start it without mpirun", finished.stderr.decode())

    def test_bad_input_is_said_once(self):
        finished = self.mpirun(3, "run", "--lengths", "5,x", "--comm", "mpi")
        self.assertEqual(finished.returncode, 2)
        self.assertEqual(finished.stderr.decode().count("zigzag: "), 1)


if __name__ == "__main__":
    sys.modules.setdefault("support", support)
    support.main()
