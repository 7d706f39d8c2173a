"""The text of the files in `codegen/prelude`, which generated code includes."""

import os
import re
from functools import cache
from pathlib import Path

PRELUDE = Path(__file__).parent / "prelude"
SHARED = re.compile('#include "(common|integers)[.]h"\n')  # parts of texts for CPUs and for GPUs


@cache
def prelude(name: str) -> str:
    """The text of one file. An include of a SHARED one is replaced by its text, since a C++ source
    is compiled without an include path."""
    text = (PRELUDE / name).read_text(encoding="utf-8")
    return SHARED.sub(lambda found: prelude(f"{found[1]}.h"), text)


@cache
def headers() -> dict[str, str]:
    """The CUDA files by name, for NVRTC."""
    return {name: prelude(name) for name in sorted(os.listdir(PRELUDE)) if name.endswith(".cuh")}
