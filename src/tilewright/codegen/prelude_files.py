"""The text of the files in `codegen/prelude`, which generated code includes."""

import os
from functools import cache
from pathlib import Path

PRELUDE = Path(__file__).parent / "prelude"
COMMON = '#include "common.h"\n'  # part of cpu.h and of gpu.cuh


@cache
def prelude(name: str) -> str:
    """The text of one file. An include of common.h is replaced by its text, since a C++ source is
    compiled without an include path."""
    text = (PRELUDE / name).read_text(encoding="utf-8")
    return text.replace(COMMON, prelude("common.h")) if COMMON in text else text


@cache
def headers() -> dict[str, str]:
    """The CUDA files by name, for NVRTC."""
    return {name: prelude(name) for name in sorted(os.listdir(PRELUDE)) if name.endswith(".cuh")}
