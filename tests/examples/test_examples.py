"""Every example runs as its first lines say, and agrees with NumPy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
LINES = {
    "01_spmm.py": 15,
    "02_rgcn.py": 20,
    "03_graph_softmax.py": 20,
    "04_band_attention.py": 20,
    "09_flash_attention.py": 60,
    "10_blocks.py": 80,
    "11_linear.py": 50,
    "12_unions.py": 30,
}


def test_the_lessons_are_there():
    assert set(LINES) <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_runs_and_is_right(path):
    command = [sys.executable, "-W", "error", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    found = [float(x) for x in re.findall(r"farthest from NumPy: (\S+)", done.stdout)]
    if path.name in LINES:
        assert found
    assert all(error < 1e-3 for error in found)


@pytest.mark.parametrize("name", LINES)
def test_an_operator_takes_few_lines(name):
    text = (FOLDER / name).read_text(encoding="utf-8").split('if __name__ == "__main__":')[0]
    text = text.split("@tw.program", 1)[1]
    code = [x for x in text.splitlines() if x.strip() and not x.strip().startswith(("#", '"""'))]
    assert len(code) + 1 <= LINES[name] - 3  # building, packing and calling take three more


def test_a_fused_linear_layer_takes_15_lines():
    """A norm, two products and a gate, with the schedule for a CPU and a GPU."""
    text = (FOLDER / "11_linear.py").read_text(encoding="utf-8").split("@tw.program")[1]
    text = text.split("# A statement on tiles")[0]
    code = [x for x in text.splitlines() if x.strip() and not x.strip().startswith('"""')]
    assert "few_rows" in text and len(code) + 1 <= 15 - 3


def test_the_first_lesson_can_be_shown():
    command = [sys.executable, "-m", "tilewright", "show", str(FOLDER / "01_spmm.py"), "scheduled"]
    done = subprocess.run(
        [*command, "--stages"], check=False, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "(C++)" in done.stdout and "(CUDA)" in done.stdout and "refused" not in done.stdout
