"""BSR SpMM refuses what it does not multiply; tests/compiler/test_mma.py runs it."""

from __future__ import annotations

import numpy as np
import pytest

import tilewright as tw
from tilewright import ops
from tilewright.errors import ArgumentError


def test_wrong_arguments():
    eye, x = np.eye(16, dtype=np.float16), np.ones((16, 32), np.float16)
    a = tw.bsr(16).pack(eye)
    for code, args in (
        ("A106", (eye, x)),
        ("A106", (None, x)),
        ("A106", (tw.csr().pack(eye), x)),
        ("A106", (tw.bsr(8).pack(eye), x)),
        ("A102", (tw.bsr(16).pack(eye.astype("f")), x)),
        ("A107", (a, np.float16(2))),
        ("A107", (a, x.tolist())),
    ):
        with pytest.raises(ArgumentError) as caught:
            ops.bsr_spmm(*args)  # type: ignore[arg-type]
        assert caught.value.code == code and caught.value.where.startswith("argument"), args
