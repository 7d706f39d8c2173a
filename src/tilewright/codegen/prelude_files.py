"""The text of the files in `codegen/prelude`, which generated code includes."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

PRELUDE = Path(__file__).parent / "prelude"


@cache
def prelude(name: str) -> str:
    """The text of one file."""
    return (PRELUDE / name).read_text(encoding="utf-8")


@cache
def headers() -> dict[str, str]:
    """The CUDA files by name, for NVRTC."""
    return {name: prelude(name) for name in sorted(os.listdir(PRELUDE)) if name.endswith(".cuh")}
