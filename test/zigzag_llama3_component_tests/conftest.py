"""Puts seed_support beside this folder on the path, and leaves the group at the end."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session", autouse=True)
def group():
    import seed_support

    seed_support.world()
    yield
    seed_support.close()
