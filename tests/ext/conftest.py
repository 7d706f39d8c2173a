"""What the tests of the doors share."""

from __future__ import annotations

import pytest

from tilewright.toolchain import compilers


@pytest.fixture
def interpreted(monkeypatch):
    """Attention by the NumPy reference instead of compiled kernels, each of which costs a second:
    for tests of what an option means, where its kernels are tested in tests/attention."""
    monkeypatch.setattr(compilers, "has_compiler", lambda: False)
    monkeypatch.setattr(compilers, "warn_of_interpreter", lambda: None)
