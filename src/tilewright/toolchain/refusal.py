"""The error for generated code that a compiler refused."""

import contextlib

from tilewright import knobs
from tilewright.errors import BuildError
from tilewright.toolchain import disk_cache

MESSAGE_LINES = 30


def refusal(compiler: str, name: str, log: str, source: str, key: str) -> BuildError:
    """B101 with the kernel's name, the first error of the compiler's log, and the log itself. The
    source is kept in the cache."""
    lines = log.strip().splitlines()
    first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
    kernel = f"kernel {name}" if name else "a kernel"
    hint = "run again with TILEWRIGHT_VERIFY=1 to check the program after each pass"
    if knobs.get("verify"):
        hint = "this is a bug of Tilewright, or the compiler is too old"
    text = f"{compiler} refused the code generated for {kernel}: {first.strip()}"
    text = "\n".join([text, *(lines[:MESSAGE_LINES] if len(lines) > 1 else [])])
    hint = f"the source is kept in that file; {hint}"
    return BuildError("B101", text, where=keep(source, key), hint=hint)


def keep(source: str, key: str) -> str:
    """Store a source text for the user to look at; its file, or nothing if it cannot be written."""
    with contextlib.suppress(BuildError):
        return str(disk_cache.put("failed", key, source.encode()))
    return ""
