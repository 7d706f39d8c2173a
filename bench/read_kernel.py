"""A Triton kernel that reads memory once and keeps one word of each block: the floor of a kernel
that is bound by memory. Triton needs its source in a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


@triton.jit
def _read(source, out, BLOCK: tl.constexpr):  # noqa: ANN001
    i = tl.program_id(0)
    x = tl.load(source + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + i, tl.sum(x, 0))


def launcher(words: Any, out: Any, block: int, warps: int) -> Callable[[int], None]:
    """A function that reads all of `words` on torch's current stream; the stream's number that it
    takes is the one of the calls beside it."""
    kernel: Any = _read

    def launch(stream: int) -> None:
        kernel[(words.numel() // block,)](words, out, BLOCK=block, num_warps=warps)

    return launch
