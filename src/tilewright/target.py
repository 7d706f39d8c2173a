"""What a kernel is compiled for: `interp` (NumPy), `cpp` (this CPU) or `cuda:sm_90a`."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.errors import BuildError

CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


@dataclass(frozen=True, slots=True)
class Target:
    """`kind` is interp, cpp or cuda; `arch` the CUDA architecture, or the instruction set of the
    CPU.

    An empty `arch` means the machine's own; it is resolved when something is compiled.
    """

    kind: str
    arch: str = ""

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}" if self.arch else self.kind


def target(of: Target | str) -> Target:
    """Parse `"cpp"`, `"cpp:avx2"`, `"cuda"`, `"cuda:sm_90a"`, `"interp"`. Raises
    BuildError[B103]."""
    if isinstance(of, Target):
        return of
    kind, _, arch = of.partition(":")
    kind = {"cpu": "cpp"}.get(kind, kind)
    if kind not in ("interp", "cpp", "cuda"):
        raise BuildError("B103", f"unknown target {of!r}", hint="cpp, cuda, cuda:sm_90a or interp")
    if kind == "cuda" and arch and arch not in CUDA_ARCHS:
        raise BuildError("B103", f"unknown CUDA architecture {arch!r}", hint=", ".join(CUDA_ARCHS))
    if kind == "cpp" and arch not in ("", "avx512", "avx2", "baseline"):
        raise BuildError(
            "B103", f"unknown instruction set {arch!r}", hint="avx512, avx2 or baseline"
        )
    return Target(kind, arch)
