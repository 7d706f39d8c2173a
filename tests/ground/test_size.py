"""`dev.py size`: each limit fails when it is broken, and the package keeps them all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dev() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_package_keeps_its_limits(dev, capsys):
    assert dev.size([]) == 0, capsys.readouterr().out


def test_files_over_the_limit_may_only_shrink(dev):
    for name, ceiling in dev.LONG_FILES.items():
        assert ceiling > dev.FILE_LINES and (ROOT / name).is_file(), name


LIMITS = {
    "fine": ("ir/a.py", "x = 1\n" * 500, ""),
    "file": ("ir/a.py", "x = 1\n" * 501, "src/tilewright/ir/a.py: 501 lines, at most 500"),
    "device file": ("ops/a.cuh", "\n" * 501, "src/tilewright/ops/a.cuh: 501 lines, at most 500"),
    "function": ("a.py", "def f():\n" + "    x = 1\n" * 70, "a.py:1: f: 71 lines, at most 70"),
    "method": ("a.py", "class A:\n    def f(self, a, b, c, d, *, e, f, g): ...\n", ""),
    "parameters": ("a.py", "def f(a, b, c, d, e, f, *, g, h): ...\n", "f: 8 parameters, at most 7"),
    "knobs": ("knobs.py", "K = [\n" + "    Knob(),\n" * 16 + "]\n", "16 knobs, at most 15"),
    "syntax": ("a.py", "def f(:\n", "does not parse"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_a_broken_limit_fails_and_is_named(case, dev, tmp_path, monkeypatch, capsys):
    name, text, wrong = LIMITS[case]
    path = tmp_path / "src/tilewright" / name
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    assert dev.size([]) == (1 if wrong else 0)
    assert wrong in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "kind"), [("py", "Python"), ("cuh", "device code")])
def test_the_sums_are_limits_and_the_rooms_are_guides(
    suffix, kind, dev, tmp_path, monkeypatch, capsys
):
    room = tmp_path / "src/tilewright/attention"
    room.mkdir(parents=True)
    for n in range(4):
        (room / f"a{n}.{suffix}").write_text("\n" * 400, encoding="utf-8")
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "GUIDES", dev.GUIDES | {"attention": (1000, 1000)})
    monkeypatch.setattr(dev, "SUMS", (1600, 1600))
    assert dev.size([]) == 0
    assert "over its guide" in capsys.readouterr().out
    monkeypatch.setattr(dev, "BORROWED", {"attention": "docs/design/why.md"})
    monkeypatch.setattr(dev, "SUMS", (1599, 1599))
    assert dev.size([]) == 1
    out = capsys.readouterr().out
    assert f"1600 lines of {kind}, at most 1599" in out and "over: docs/design/why.md" in out


def test_a_listed_file_may_not_grow(dev, tmp_path, monkeypatch, capsys):
    path = tmp_path / "src/tilewright/ir/nodes.py"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "LONG_FILES", {"src/tilewright/ir/nodes.py": 600})
    for lines, status in ((600, 0), (601, 1)):
        path.write_text("\n" * lines, encoding="utf-8")
        assert dev.size([]) == status
    assert "601 lines, at most 600" in capsys.readouterr().out
