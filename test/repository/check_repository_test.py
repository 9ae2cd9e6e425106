#!/usr/bin/env python3
"""The repository's rules find what is planted, and leave alone what is right."""

import unittest

import check_repository as rules


class ChunkArithmetic(unittest.TestCase):
    def found(self, line, name="src/layout.cpp"):
        return len(rules.check_chunk_arithmetic(name, [line]))

    def test_planted(self):
        for line in (
            "auto late = 2 * world_size - 1 - rank;",
            "auto chunk = length / (2 * W);",
            "auto share = total / world_size;",
            "auto share = total / plan.world_size();",
            "auto share = total / static_cast<int>(world_size_);",
            "auto share = total / communicator->ranks;",
            "auto left = total % (2 * world_size);",
        ):
            self.assertEqual(self.found(line), 1, line)
            self.assertEqual(self.found(line, "src/plan.cpp"), 0, line)
            self.assertEqual(self.found(line, "test/cpp/plan_test.cpp"), 0, line)
        for line in (
            "late = 2 * world_size - 1 - rank",
            "n = length // (2 * world_size)",
            "n = t // W",
        ):
            self.assertEqual(self.found(line, "python/x.py"), 1, line)

    def test_right(self):
        for line in (
            "// chunk 2 * world_size - 1 - r is the late one",
            "auto x = y / 2;  // per rank: total / world_size",
            "auto x = y / worlds;",
            'throw InvalidArgument("not divisible: length / world_size");',
            "std::int64_t chunks = 2 * world_size;",
            '#include "comm/ranks.h"',
        ):
            self.assertEqual(self.found(line), 0, line)
        self.assertEqual(self.found("x = y  # total // world_size", "python/x.py"), 0)
        docstring = ['"""Rows:', "`[tokens / world_size, ...]`", '"""', "x = f'{y} / W'"]
        self.assertEqual(rules.check_chunk_arithmetic("python/x.py", docstring), [])


class Contracts(unittest.TestCase):
    def found(self, text):
        return rules.check_contracts("include/zigzag/x.h", text)

    def test_planted(self):
        self.assertEqual(len(self.found("namespace zigzag {\n\nint bare(int x);\n\n}\n")), 1)
        self.assertEqual(len(self.found("namespace zigzag {\n\nclass Bare {\n};\n\n}\n")), 1)
        member = "/// Said.\nclass C {\n public:\n  int bare();\n private:\n  int hidden();\n};\n"
        self.assertEqual(len(self.found(member)), 1)

    def test_right(self):
        text = """
/// Said.
class C {
 public:
  C(const C&) = default;
  bool operator==(const C&) const = default;
  /// Said.
  int said(int a,
           int b) const;
 private:
  int hidden();
};
"""
        self.assertEqual(self.found(text), [])


class Sizes(unittest.TestCase):
    def test_planted(self):
        self.assertEqual(len(rules.check_sizes("src/x.cpp", ["x"] * 601)), 1)
        self.assertEqual(len(rules.advice_on_sizes("src/x.h", ["x"] * 201)), 1)
        self.assertEqual(rules.check_sizes("src/x.cpp", ["x"] * 600), [])


class NoExit(unittest.TestCase):
    def test_planted(self):
        for line in (
            "exit(1);",
            "  std::abort();",
            "if (x) ::exit(2);",
            "std::cerr << x;",
            'printf("x");',
        ):
            self.assertEqual(len(rules.check_no_exit("src/x.cpp", [line])), 1, line)

    def test_right(self):
        for line in (
            "transport->abort(reason);",
            "void abort(std::string_view reason) override;",
            "on_exit(x);",
            "snprintf(buffer, n, f);",
            "// never exit(1)",
        ):
            self.assertEqual(rules.check_no_exit("src/x.cpp", [line]), [], line)
        self.assertEqual(rules.check_no_exit("cli/main.cpp", ["std::exit(2);"]), [])


class Headers(unittest.TestCase):
    def test_planted(self):
        text = "#pragma once\n#include <mpi.h>\n"
        self.assertEqual(len(rules.check_public_header("include/zigzag/x.h", text)), 1)
        self.assertEqual(rules.check_public_header("src/x.h", text), [])


if __name__ == "__main__":
    unittest.main()
