"""zigzag plan: keys, values, exit codes, the picture, and a million documents."""

import random
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import support
from support import CommandTest


class PlanTest(CommandTest):
    def test_json_has_the_promised_keys(self):
        plan = self.passes("plan", "--lengths", "512,1024,768", "--ranks", 4, "--json").json()
        self.assertEqual(plan["world_size"], 4)
        self.assertEqual(plan["total_tokens"], 2304)
        self.assertEqual(plan["documents"], 3)
        self.assertAlmostEqual(plan["balance"], 1.0, places=3)
        self.assertEqual([r["rank"] for r in plan["ranks"]], [0, 1, 2, 3])
        for rank in plan["ranks"]:
            self.assertEqual(rank["tokens"], 576)
            self.assertGreater(rank["flops"], 0)
            self.assertGreater(rank["gathered_bytes"], 0)

    def test_segments_are_the_seed_formula_and_cover_the_pack(self):
        plan = self.passes("plan", "--lengths", "512,1024,768", "--ranks", 4, "--json").json()
        owner = {}
        for rank in plan["ranks"]:
            self.assertEqual(sum(s["end"] - s["begin"] for s in rank["segments"]), rank["tokens"])
            for s in rank["segments"]:
                self.assertIn(s["chunk"], (rank["rank"], 7 - rank["rank"]))
                for token in range(s["begin"], s["end"]):
                    self.assertNotIn(token, owner)
                    owner[token] = rank["rank"]
        self.assertEqual(len(owner), 2304)
        start = 0
        for length in (512, 1024, 768):
            for position in range(length):
                chunk = position // (length // 8)
                self.assertEqual(owner[start + position], min(chunk, 7 - chunk))
            start += length

    def test_segments_only_on_demand_when_there_are_many(self):
        arguments = ("plan", "--lengths", ",".join(["9"] * 2000), "--ranks", 4, "--json")
        plan = self.passes(*arguments).json()
        self.assertGreater(plan["segments"], 10000)
        self.assertNotIn("segments", plan["ranks"][0])
        plan = self.passes(*arguments, "--segments").json()
        self.assertEqual(sum(len(r["segments"]) for r in plan["ranks"]), plan["segments"])

    def test_lengths_file_and_documents(self):
        (self.folder / "lengths.txt").write_text("# two\n10, 20\n\n5 # three\n")
        plan = self.passes("plan", "--lengths-file", "lengths.txt", "--ranks", 2, "--json").json()
        self.assertEqual((plan["documents"], plan["total_tokens"]), (3, 35))
        (self.folder / "docs" / "b").mkdir(parents=True)
        (self.folder / "docs" / "b" / "x").write_bytes(b"12345")
        (self.folder / "docs" / "a").write_bytes(b"123")
        (self.folder / "docs" / "empty").write_bytes(b"")
        (self.folder / "docs" / "link").symlink_to("b")
        plan = self.passes("plan", "--documents", "docs", "--ranks", 1, "--json").json()
        self.assertEqual((plan["documents"], plan["total_tokens"]), (3, 8))
        self.assertEqual(plan["notes"], ["left out 'docs/link': a link to a folder"])
        plan = self.passes(
            "plan", "--documents", "docs", "--max-tokens", 4, "--ranks", 1, "--json"
        ).json()
        self.assertEqual(plan["total_tokens"], 4)
        self.assertIn(
            "cut 'docs/b/x' after 1 of 5 bytes: the limit of 4 tokens is reached", plan["notes"]
        )

    def test_window_gathers_less(self):
        both = [
            self.passes("plan", "--lengths", "4096", "--ranks", 4, "--json", *window).json()
            for window in ((), ("--window", "64"))
        ]
        for full, windowed in zip(both[0]["ranks"], both[1]["ranks"], strict=True):
            self.assertLess(windowed["gathered_bytes"], full["gathered_bytes"])
            self.assertLess(windowed["flops"], full["flops"])

    def test_prediction(self):
        slow, fast = (
            self.passes(
                "plan",
                "--lengths",
                "65536",
                "--ranks",
                8,
                "--tflops",
                tflops,
                "--gbps",
                50,
                "--json",
            ).json()["predicted"]
            for tflops in (1, 2)
        )
        self.assertAlmostEqual(slow["forward_compute_s"], 2 * fast["forward_compute_s"])
        self.assertGreaterEqual(slow["forward_s"], slow["forward_compute_s"])

    def test_table_names_every_rank(self):
        table = self.passes("plan", "--lengths", "5000,100,7", "--ranks", 3).out
        for rank in range(3):
            self.assertRegex(table, rf"(?m)^ +{rank} +{rank}, {5 - rank} ")

    def test_token_counts_of_2_to_the_40(self):
        plan = self.passes("plan", "--lengths", str(2**40), "--ranks", 1024, "--json").json()
        self.assertEqual(plan["total_tokens"], 2**40)
        self.assertEqual(sum(r["tokens"] for r in plan["ranks"]), 2**40)

    def test_a_million_documents_over_1024_ranks(self):
        rng = random.Random(7)
        lengths = [rng.randint(1, 4000) for _ in range(1_000_000)]
        (self.folder / "lengths.txt").write_text("\n".join(map(str, lengths)))
        start = time.monotonic()
        plan = self.passes(
            "plan", "--lengths-file", "lengths.txt", "--ranks", 1024, "--json"
        ).json()
        seconds = time.monotonic() - start
        self.assertEqual(sum(r["tokens"] for r in plan["ranks"]), sum(lengths))
        # The bound is 5 s on a quiet machine; tests share theirs and run under sanitizers.
        self.assertLess(seconds, 60)

    def test_picture(self):
        packs = {
            "one": ["--lengths", "3000"],
            "five": ["--lengths", "100,5000,37,1200,600"],
            "many": ["--lengths", ",".join(str(1 + 7 * i % 900) for i in range(3000))],
            "none": ["--lengths", "0"],
            "short": ["--lengths", "1,2,3"],
            "window": ["--lengths", "900,400", "--window", "100"],
            "full": ["--lengths", "900,400", "--causal", "false", "--window", "100,50"],
        }
        for name, pack in packs.items():
            for ranks in (1, 4, 1024):
                path = self.folder / f"{name}.svg"
                self.passes("plan", *pack, "--ranks", ranks, "--svg", path.name)
                self.assertLess(path.stat().st_size, 400_000, f"{name} over {ranks} ranks")
                root = ElementTree.parse(path).getroot()
                self.assertTrue(root.tag.endswith("svg"))
                self.assertNotRegex(path.read_text(), r"\b(nan|inf)\b")
        self.assertEqual(sorted(p.suffix for p in self.folder.iterdir()), [".svg"] * len(packs))

    def test_captions_are_true_of_the_pack(self):
        cases = (
            ("64", 4, "8 chunks of equal length; a rank holds 16 tokens."),
            ("64", 4, "the same area on every rank"),
            ("5", 4, "lengths differ by at most a token; a rank holds 1 to 2 tokens."),
            ("5", 4, "the mean is 62.5% of the largest area"),
            ("0,0,1", 3, "a rank holds 0 to 1 token."),
            ("0,0,1", 3, "Shown: 1 of 3 documents, all that are not empty."),
            ("9,1,5,3,2,8", 2, "Shown: 4 of 6 documents, longest and shortest included."),
        )
        for lengths, ranks, caption in cases:
            path = self.folder / "a.svg"
            self.passes("plan", "--lengths", lengths, "--ranks", ranks, "--svg", path.name)
            self.assertIn(caption, path.read_text(), (lengths, ranks))
        self.passes("plan", "--lengths", "64", "--ranks", 2, "--window", 3, "--svg", "a.svg")
        self.assertNotIn("costly", path.read_text())

    def test_picture_replaces_what_stands_there_only_on_success(self):
        path = self.folder / "a.svg"
        path.write_text("before")
        self.assertEqual(
            self.zigzag("plan", "--lengths", "x", "--ranks", 2, "--svg", "a.svg").code, 2
        )
        self.assertEqual(path.read_text(), "before")
        self.passes("plan", "--lengths", "9", "--ranks", 2, "--svg", "a.svg")
        self.assertIn("<svg", path.read_text())


class LimitTest(CommandTest):
    def test_the_default_of_max_tokens_can_be_given(self):
        pack = ("plan", "--lengths", "30,50", "--ranks", 2)
        self.assertEqual(self.passes(*pack, "--max-tokens", -1).out, self.passes(*pack).out)

    def test_segments_are_listed_up_to_the_limits_of_the_help(self):
        text = " ".join(self.passes("plan", "--help").out.split())
        self.assertIn("above 16 documents or ranks too; with --json, above 10,000 too", text)
        for documents, ranks, listed in ((16, 16, True), (17, 1, False), (1, 17, False)):
            lengths = ",".join(["99"] * documents)
            table = self.passes("plan", "--lengths", lengths, "--ranks", ranks).out
            self.assertEqual("document.chunk" in table, listed, (documents, ranks))


class HelpTest(CommandTest):
    def test_version_and_help(self):
        self.assertRegex(self.passes("--version").out, r"^zigzag \d+\.\d+\.\d+\n$")
        for subcommand in ((), ("plan",), ("run",), ("bench",), ("doctor",)):
            finished = self.passes(*subcommand, "--help")
            self.assertIn("Usage: zigzag", finished.out)
            self.assertEqual(finished.err, "")

    def test_examples_of_plan_and_run_work(self):
        for subcommand in ("plan", "run"):
            text = self.passes(subcommand, "--help").out
            examples = re.sub(r"\\\n\s*", "", text[text.index("Examples:") :])
            commands = re.findall(r"(?m)^\s*(zigzag .*)$", examples)
            self.assertGreaterEqual(len(commands), 3)
            (self.folder / "include").mkdir(exist_ok=True)
            for name in ("README.md", "LICENSE", "include/a.h"):
                (self.folder / name).write_text(name * 40)
            (self.folder / "qkv.safetensors").write_bytes(
                support.safetensors_bytes(support.pack_file([40, 3]))
            )
            for command in commands:
                finished = self.zigzag(*command.split()[1:])
                self.assertEqual(finished.code, 0, f"{command}: {finished.err}")

    def test_json_is_all_that_stdout_gets(self):
        for arguments in (
            ("plan", "--lengths", "9,5", "--ranks", 2, "--svg", "x.svg"),
            ("run", "--lengths", "9,5", "--ranks", 2, "--check", "--output", "o.safetensors"),
        ):
            finished = self.passes(*arguments, "--json")
            finished.json()
            self.assertEqual(finished.out.count("\n"), 1)
            self.assertEqual(finished.err, "")

    def test_a_closed_pipe_does_not_crash(self):
        process = subprocess.Popen(
            [
                support.COMMAND,
                "plan",
                "--lengths",
                ",".join(["99"] * 9000),
                "--ranks",
                "64",
                "--segments",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=support.clean_environment(),
        )
        process.stdout.read(10)
        process.stdout.close()
        process.stderr.close()
        self.assertIn(process.wait(timeout=60), (3, -13))


if __name__ == "__main__":
    sys.modules.setdefault("support", support)
    support.main()
