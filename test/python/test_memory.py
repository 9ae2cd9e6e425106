"""q, k and v are read in place: the peak of the resident set grows by the results alone."""

import json
import subprocess
import sys

import pytest
from ranks import ROOT


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["torch", "torch slices", "numpy slices"])
def test_no_copies(kind):
    ended = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "python_overhead.py", "--memory", kind],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)
    # A copy of q, k or v would be a third of the inputs.
    allowed = figures["input_mib"] / 3 / 4
    for name in ("forward", "backward"):
        assert figures[f"{name}_mib"] - figures[f"results_{name}_mib"] < allowed, figures
