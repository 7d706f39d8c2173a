"""The doors are imported on demand; without their packages they name the extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tilewright.errors import MissingExtra

DOORS = {"compat": "torch", "torch_ops": "torch"}


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, encoding="utf-8"
    )


@pytest.mark.parametrize("door", DOORS)
def test_a_missing_package_is_named_with_its_extra(door):
    blocked = f"import sys; sys.modules['torch'] = None; import tilewright.ext.{door}"
    done = run(blocked)
    assert done.returncode == 1
    assert "E101" in done.stderr and "tilewright[torch]" in done.stderr


def test_without_transformers_there_is_an_error_at_register(monkeypatch):
    from tilewright.ext import hf

    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(MissingExtra, match=r"E101.*transformers") as caught:
        hf.register()
    assert "tilewright[hf]" in caught.value.hint
