#!/usr/bin/env python3
"""Counts the instructions of three fixed kernel cases and compares them with the repository's.

A change that makes the kernels slower is seen without a quiet machine. The AVX2 kernels run, on
one thread, whatever else the machine has: valgrind 3.19 knows no AVX-512. So counts depend on the
compiler, which results/callgrind.json names, and not on the machine: two of them, an Intel Xeon
with AMX and an AMD EPYC (Zen 5), differed by 0.01%.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
STORED = HERE / "results" / "callgrind.json"
TARGET = "avx2"
CASES = ("forward", "backward", "short")


def count_instructions(program: pathlib.Path, case: str) -> int:
    """Instructions of one case inside of zigzag_measured."""
    environment = dict(os.environ, ZIGZAG_NUM_THREADS="1", ZIGZAG_CPU_TARGET=TARGET)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind",
            "--tool=callgrind",
            "--toggle-collect=zigzag_measured",
            f"--callgrind-out-file={folder}/out",
            str(program),
            case,
        ]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = re.search(r"Collected : (\d+)", run.stderr)
    if run.returncode != 0 or not found:
        sys.exit(f"callgrind.py: {' '.join(command)} failed:\n{run.stderr}")
    return int(found.group(1))


def compiler(program: pathlib.Path) -> str:
    """What the program says it was compiled with."""
    run = subprocess.run(
        ["readelf", "-p", ".comment", str(program)], capture_output=True, text=True, check=True
    )
    found = re.findall(r"\]\s+(.*)", run.stdout)
    return found[0] if found else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, default=HERE.parent / "build" / "default")
    parser.add_argument("--tolerance", type=float, default=0.02, help="relative; default 0.02")
    parser.add_argument("--update", action="store_true", help="store the counts instead")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        sys.exit("callgrind.py: valgrind is missing; install it (apt-get install valgrind)")
    program = options.build / "benchmarks" / "callgrind_cases"
    if not program.exists():
        sys.exit(f"callgrind.py: {program} is missing; build the target callgrind_cases")
    counts = {case: count_instructions(program, case) for case in CASES}
    built_with = compiler(program)
    if options.update:
        STORED.write_text(
            json.dumps({"target": TARGET, "compiler": built_with, "instructions": counts}, indent=2)
            + "\n"
        )
        print(f"stored in {STORED}: {counts}")
        return 0
    stored = json.loads(STORED.read_text())
    if stored["compiler"] != built_with:
        print(f"note: stored with {stored['compiler']}, built with {built_with}")
    print(f"instructions of the {TARGET} kernels on one thread, stored -> now")
    worse = False
    for case, now in counts.items():
        before = stored["instructions"][case]
        change = now / before - 1
        worse |= change > options.tolerance
        print(f"{case:10} {before:>14,} -> {now:>14,}  {change:+.2%}")
    if worse:
        print(f"slower: more than {options.tolerance:.0%} above the stored counts")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
