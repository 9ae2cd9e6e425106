"""Tests of the Python package on GPUs; without one they are skipped.

ZIGZAG_GPU_TESTS_ON=cpu runs those that can on the CPU instead, which tries the tests themselves.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "test" / "python"))


def gpus():
    import torch

    import zigzag_attention

    built = any(name == "CUDA" and ok for name, ok, _ in zigzag_attention.components())
    return torch.cuda.device_count() if built else 0


def pytest_collection_modifyitems(items):
    count = gpus()
    stand_in = os.environ.get("ZIGZAG_GPU_TESTS_ON") == "cpu"
    for item in items:
        mark = item.get_closest_marker("gpus")
        needed = 1 if mark is None else mark.args[0]
        if count >= needed or (stand_in and item.get_closest_marker("real") is None):
            continue
        item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs, there are {count}"))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpus(n): needs n GPUs")
    config.addinivalue_line("markers", "hog: takes a GPU's whole memory")
    config.addinivalue_line("markers", "real: cannot stand in on the CPU")


@pytest.fixture
def device():
    import torch

    return torch.device("cuda", 0) if gpus() else torch.device("cpu")
