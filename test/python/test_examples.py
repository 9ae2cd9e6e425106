"""The examples run, and the training run is the same at any number of ranks."""

import shutil
import subprocess
import sys

import pytest
from ranks import ROOT


def run(*command, seconds=280):
    ended = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_numpy_attention():
    output = run(sys.executable, ROOT / "examples" / "numpy_attention.py")
    assert "out: largest difference to one rank 0.0e+00" in output


def test_train_tiny_llama(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "loss.png"
    output = run(
        sys.executable,
        ROOT / "examples" / "train_tiny_llama.py",
        *("--steps", 12, "--ranks", "1,3", "--tokens", 301, "--width", 32, "--layers", 1),
        *("--plot", plot, ROOT / "include" / "zigzag" / "plan.h"),
    )
    difference = float(output.split("largest relative difference: ")[1].split()[0])
    assert difference <= 1e-5
    assert plot.read_bytes().startswith(b"\x89PNG")


MPI = shutil.which("mpirun")
PYTHON_OVER_MPI = """
import numpy as np
import zigzag_attention as z
from zigzag_attention import _core, _mpi
from mpi4py import MPI

lengths = [37, 1, 60]
rng = np.random.default_rng(0)
q, dout = rng.standard_normal((2, 98, 4, 32)).astype(np.float32)
k, v = rng.standard_normal((2, 98, 2, 32)).astype(np.float32)

def step(plan, group, rank):
    a, b, c, d = (z.shard(x, plan, rank) for x in (q, k, v, dout))
    out, lse = z.attention(a, b, c, plan, group, return_lse=True)
    return (out, lse, *z.attention_backward(d, a, b, c, out, lse, plan, group))

group = z.Communicator.mpi()
assert group.size == MPI.COMM_WORLD.Get_size() and group.rank == MPI.COMM_WORLD.Get_rank()
plan = z.Plan.from_lengths(lengths, group.size)
alone = step(z.Plan.from_lengths(lengths, 1), None, 0)
for index, (one, mine) in enumerate(zip(alone, step(plan, group, group.rank))):
    rows = z.shard(one, plan, group.rank)
    assert np.array_equal(rows, mine) if index < 3 else np.abs(rows - mine).max() < 1e-5, index
"""


@pytest.mark.skipif(MPI is None, reason="there is no mpirun here")
def test_mpi_from_python():
    pytest.importorskip("mpi4py")
    launcher = [MPI, "--allow-run-as-root", "--oversubscribe", "-n", 3]
    run(*launcher, sys.executable, "-c", PYTHON_OVER_MPI)
