"""`import tilewright` needs NumPy only: nothing heavy may come along."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "scipy", "cuda", "cupy", "gguf", "jinja2", "matplotlib", "regex", "triton")

PROBE = """
import json, sys
import tilewright
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

BLOCKED = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
import tilewright
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=False,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def test_import_brings_no_optional_package():
    done = run(PROBE)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert "tilewright" in loaded
    assert not loaded & set(HEAVY)


def test_import_works_where_no_extra_is_installed():
    done = run(BLOCKED)
    assert done.returncode == 0, done.stderr


GROUND = ("errors", "dtypes", "knobs", "target")


@pytest.mark.parametrize("module", GROUND)
def test_ground_floor_imports_nothing_above_it(module: str):
    code = f"""
import importlib.util, json, sys, types
package = types.ModuleType("tilewright")
package.__path__ = importlib.util.find_spec("tilewright").submodule_search_locations
sys.modules["tilewright"] = package
import tilewright.{module}
print(json.dumps([name for name in sys.modules if name.startswith("tilewright.")]))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) <= {f"tilewright.{name}" for name in GROUND}
