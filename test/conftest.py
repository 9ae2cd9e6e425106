"""For the tests at the seed's paths, which run as ranks under `torchrun -m pytest`."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Ranks meet in every test, so all take one order whatever plugins shuffle."""
    if "WORLD_SIZE" in os.environ:
        items.sort(key=lambda item: (str(item.path), item.reportinfo()[1] or 0))


def pytest_sessionfinish():
    support = sys.modules.get("seed_support")
    if support is not None:
        support.close()
