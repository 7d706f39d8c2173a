"""Files and messages are UTF-8 in every locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.toolchain import compilers

BUILD = """
import numpy as np
import tilewright as tw
from tilewright import knobs
from tilewright.codegen import prelude_files
from tilewright.errors import BuildError
from tilewright.toolchain import compilers, cxx, nvrtc

@tw.program
def double(X=tw.dense("n")):
    i = tw.indices("n")
    return tw.out[i](X[i] * 2)

prelude_files.headers()
x = np.arange(4, dtype=np.float32)
for target in ("cpp", "interp"):
    assert np.array_equal(double.build(target)(x), 2 * x)
try:
    cxx.compile_cpp("int größe = †; // ∑\\n", name="größe")
except BuildError as error:
    assert "größe" in error.message and "†" in error.message, ascii(error.message)
    assert "∑" in open(error.where, encoding="utf-8").read()
else:
    raise AssertionError
if nvrtc.available():
    assert nvrtc.compile_cuda("// ∑\\nextern \\"C\\" __global__ void f() {}", arch="sm_90a").image
    try:
        nvrtc.compile_cuda("// ∑\\nint größe = †;", arch="sm_90a", name="größe")
    except BuildError as error:
        assert "kernel größe" in error.message
    else:
        raise AssertionError
with knobs.scope(cxx=ODD):
    assert "†" in compilers.find_compiler().version
"""


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8"])
def test_text_is_utf_8_whatever_the_locale(tmp_path: Path, locale: str) -> None:
    """Under a locale without UTF-8, with a warning wherever the locale would decide a file's
    encoding turned into an error."""
    odd = tmp_path / "odd"
    odd.write_bytes("#!/bin/sh\nprintf 'odd † \\377\\n'\n".encode())
    odd.chmod(0o755)
    program = tmp_path / "build.py"
    program.write_text(f"ODD = {str(odd)!r}\n{BUILD}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-X", "warn_default_encoding", "-W",
         "error::EncodingWarning", program],
        env=os.environ | {
            "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0",
            "TILEWRIGHT_CACHE_DIR": str(tmp_path / "cache"),
        },
        capture_output=True, encoding="utf-8", errors="replace", timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
