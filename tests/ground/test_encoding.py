"""Text files are UTF-8 in every locale: the encoding is always named, never the locale's."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for pattern in ("src/**/*.py", "tests/**/*.py", "bench/**/*.py", "examples/**/*.py", "*.py")
    for path in ROOT.glob(pattern)
)
MODE_AT = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}  # or of a Path: 0


def _constant(call: ast.Call, name: str, position: int) -> object:
    values = [k.value for k in call.keywords if k.arg == name] or call.args[position : position + 1]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def _is_text(call: ast.Call, owner: str, name: str) -> bool:
    """Whether the call opens text: a file by its mode, a process by `text=True`."""
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output"):
        return any(k.arg in ("text", "universal_newlines") for k in call.keywords)
    if name not in MODE_AT or (owner, name) in (("os", "open"), ("self", "_open")):
        return False
    builtin = not owner or owner in ("os", "io", "tempfile", "gzip")
    mode = _constant(call, "mode", MODE_AT[name] if builtin else 0)
    return "b" not in str(mode or ("r" if "open" in name else "w+b"))


def unnamed_encodings(source: str) -> Iterator[int]:
    """The lines that open text without naming its encoding."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        f = call.func
        name = f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""
        owner = ast.unparse(f.value) if isinstance(f, ast.Attribute) else ""
        if _is_text(call, owner, name) and not any(k.arg == "encoding" for k in call.keywords):
            yield call.lineno


def test_every_text_file_names_its_encoding():
    assert len(SOURCES) > 100
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in unnamed_encodings(path.read_text(encoding="utf-8"))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("open(p)", True), ("open(p, 'w')", True), ("p.open('a')", True), ("os.fdopen(h)", True),
        ("p.read_text()", True), ("p.write_text(t)", True), ("run(c, text=True)", True),
        ("tempfile.NamedTemporaryFile('w')", True), ("tempfile.NamedTemporaryFile()", False),
        ("open(p, 'rb')", False), ("open(p, encoding='utf-8')", False), ("run(c)", False),
        ("p.open('ab')", False), ("os.open(p, os.O_RDONLY)", False), ("os.fdopen(h, 'wb')", False),
    ],
)  # fmt: skip
def test_what_counts_as_text(source: str, wrong: bool):
    assert list(unnamed_encodings(source)) == ([1] if wrong else [])


END_TO_END = """
import locale
assert locale.getencoding().lower().replace("-", "") != "utf8", locale.getencoding()
import numpy as np
import tilewright as tw
from tilewright.codegen import prelude_files

@tw.program
def double(A=tw.sparse("m n")):
    i, j = tw.indices("m n")
    return tw.out[i](tw.sum(A[i, j] * 2.0, over=j))

kernel = double.build("cpp")
y = kernel(tw.csr().pack(np.eye(3, dtype=np.float32)))
assert y.tolist() == [2, 2, 2]
for path in sorted(prelude_files.PRELUDE.iterdir()):
    prelude_files.prelude(path.name)
"""


def test_a_kernel_is_built_in_a_locale_of_ascii(tmp_path: Path):
    """An empty cache, so that every source text is read; a default encoding is an error."""
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-X", "warn_default_encoding",
         "-W", "error::EncodingWarning", "-c", END_TO_END],
        env=os.environ
        | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "TILEWRIGHT_CACHE_DIR": str(tmp_path)},
        capture_output=True, encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
