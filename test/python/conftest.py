"""Fixtures of this folder; ranks.py runs ranks as threads and as processes."""

import pytest

from zigzag_attention import _core


@pytest.fixture(autouse=True)
def fused_kernels():
    """A test that sets the kernels leaves the default behind."""
    before = _core.default_kernels()
    yield
    _core.set_default_kernels(before)
