"""The files that generated code stands on, as text (`codegen/prelude`)."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

PRELUDE = Path(__file__).parent / "prelude"


@cache
def prelude(name: str) -> str:
    """A file of `codegen/prelude`."""
    return (PRELUDE / name).read_text(encoding="utf-8")


@cache
def headers() -> dict[str, str]:
    """The CUDA files by name, as NVRTC includes them."""
    return {name: prelude(name) for name in sorted(os.listdir(PRELUDE)) if name.endswith(".cuh")}
