"""The commands of the seed run as printed there; `-m seed` runs each at 1, 2, 4 and 8 processes."""

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT

FOLDER = "test/zigzag_llama3_component_tests"
KERNELS = f"{FOLDER}/test_triton_kernels.py"
SINGLE = "test_extract_zigzag_kv_slices_single_sequence"
COMMANDS = {
    "kernels": [KERNELS],
    "kernels with pytest": ["-m", "pytest", KERNELS, "-v"],
    "one test": ["-m", "pytest", f"{KERNELS}::{SINGLE}", "-v"],
    "rearrange": [f"{FOLDER}/test_zigzag_rearrange_functions.py"],
    "extract_local": [f"{FOLDER}/test_extract_local.py"],
    "end to end": ["test/test_zigzag_llama3_flash_attn_varlen_func.py"],
}
LINES = [
    "[Rank 0] Test: extract_zigzag_kv_slices_single_sequence",
    "  K max diff: 0.000000e+00",
    "  K mean diff: 0.000000e+00",
    "  V max diff: 0.000000e+00",
    "  V mean diff: 0.000000e+00",
    "  ✓ PASSED",
]


def torchrun(size, arguments):
    command = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", size, *arguments]
    ended = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return ended.stdout


def check(size, name):
    output = torchrun(size, COMMANDS[name])
    if name == "kernels":
        start = output.index(LINES[0])
        assert output[start:].splitlines()[: len(LINES)] == LINES
        assert "  ✓ PASSED (Triton is faster)" in output
        assert "max diff" in output and "FAILED" not in output
    elif "-m" in COMMANDS[name]:
        assert output.count(f"{1 if name == 'one test' else 6} passed") == size


@pytest.mark.parametrize(("size", "name"), [(2, "kernels with pytest"), (4, "kernels")])
def test_commands(size, name):
    check(size, name)


def user_script(size):
    output = torchrun(size, ["test/python/user_script.py"])
    for packing in ("separate", "kvpacked", "qkvpacked"):
        assert f"W = {size}, {packing}: relative L2 out" in output


def test_a_script_written_for_ring_flash_attn():
    user_script(2)


@pytest.mark.seed
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_script_written_for_ring_flash_attn_at_all_sizes(size):
    user_script(size)


@pytest.mark.seed
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", COMMANDS)
def test_all_commands(size, name):
    check(size, name)
