"""What a kernel is compiled for: `interp` (NumPy), `cpp` (this CPU) or `cuda:sm_90a`."""

from dataclasses import dataclass

from tilewright.errors import BuildError

# The hardware's limits for one CTA (CUDA C++ Programming Guide, "Compute Capabilities").
CTA_THREADS = 1024
WARP = 32  # threads that execute together
SHARED_BYTES = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10,
    "sm_90a": 227 << 10, "sm_100a": 227 << 10, "sm_120a": 99 << 10,
}  # fmt: skip
CUDA_ARCHS = tuple(SHARED_BYTES)

# The noun for `arch` in messages, and its values, for each kind of target.
ARCHS: dict[str, tuple[str, tuple[str, ...]]] = {
    "interp": ("architecture", ()),
    "cpp": ("instruction set", ("avx512bf16", "avx512", "avx2", "baseline")),
    "cuda": ("CUDA architecture", CUDA_ARCHS),
}


@dataclass(frozen=True, slots=True)
class Target:
    """What kernels are compiled for. `kind`: interp, cpp or cuda; `arch`: the CUDA architecture, or
    the instruction set of the CPU. Empty: the machine's own, resolved when something is compiled.
    """

    kind: str
    arch: str = ""

    def __post_init__(self) -> None:
        """Raises BuildError[B103]."""
        if not isinstance(self.kind, str) or self.kind not in ARCHS:
            hint = "cpp, cuda, cuda:sm_90a or interp"
            raise BuildError("B103", f"unknown target {self.kind!r}", hint=hint)
        noun, known = ARCHS[self.kind]
        if not isinstance(self.arch, str) or self.arch not in ("", *known):
            hint = ", ".join(known) or f"{self.kind} has none"
            raise BuildError("B103", f"unknown {noun} {self.arch!r}", hint=hint)

    @property
    def is_cuda(self) -> bool:
        """Whether kernels run on a GPU."""
        return self.kind == "cuda"

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that one CTA can have; without an architecture, on any of them."""
        return SHARED_BYTES.get(self.arch, min(SHARED_BYTES.values()))

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}" if self.arch else self.kind


def target(of: Target | str) -> Target:
    """Parse `"cpp"`, `"cpp:avx2"`, `"cuda"`, `"cuda:sm_90a"`, `"interp"`. Raises
    BuildError[B103]."""
    if isinstance(of, Target):
        return of
    kind, _, arch = str(of).partition(":")
    return Target("cpp" if kind == "cpu" else kind, arch)
