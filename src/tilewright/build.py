"""The one place that joins the rooms: trace → decompose → schedule → lower → render → compile.

    kernel = spmm.decompose(A=tw.hyb()).schedule(tw.recipes.spmm).build("cuda")

Everything up to `build` is a frozen value that prints. A `Kernel` is callable on whatever arrays
the caller has; `bind` fixes the arguments and gives a call that costs next to nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright import dtypes, knobs
from tilewright.codegen import texts
from tilewright.dtypes import DType
from tilewright.errors import BuildError, ProgramError, TilewrightError
from tilewright.ir.nodes import Program
from tilewright.reference.launcher import InterpLauncher
from tilewright.runtime import launch, native, nvrtc, place, store, toolchain
from tilewright.runtime.identity import identity
from tilewright.runtime.kernel import Kernel
from tilewright.sparse import entries, formats, trace
from tilewright.target import Target
from tilewright.target import target as parse_target

if TYPE_CHECKING:
    from tilewright.compiler import Recipe, Watch
    from tilewright.schedule import Schedule

entries.place = place.to_device

WATCHED = 2  # the debug level from which passes and schedules are printed, so that they must run


@dataclass(frozen=True, slots=True)
class Definition:
    """A program as the user wrote it, with the choices made so far: dtypes, formats, a schedule.

    Each method returns a new Definition; `build` compiles it. Printing shows the program."""

    function: Callable[..., Any]
    given: tuple[tuple[str, DType], ...] = ()
    formats: tuple[tuple[str, Any], ...] = ()
    recipe: Recipe | None = None
    index: DType = dtypes.int32

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def program(self) -> Program:
        """The program at the coordinate level."""
        traced = trace.trace(self.function, dict(self.given), dict(self.formats), formats.plain)
        return replace(traced, index=self.index)

    def typed(self, index: Any = None, **of: Any) -> Definition:
        """Other dtypes for parameters: `spmm.typed(A="float16", X="float16")`; `index="int64"` for
        coordinates beyond 2³¹."""
        self._known(of)
        chosen = dict(self.given) | {name: dtypes.dtype(t) for name, t in of.items()}
        wide = self.index if index is None else dtypes.dtype(index)
        if wide not in (dtypes.int32, dtypes.int64):
            raise ProgramError(
                "P106", f"coordinates are {wide}", where="index", hint="int32, int64"
            )
        return replace(self, given=tuple(chosen.items()), index=wide)

    def decompose(self, **of: Any) -> Definition:
        """Formats for sparse parameters: `spmm.decompose(A=tw.hyb())`."""
        self._known(of)
        for name, fmt in of.items():
            if not isinstance(fmt, (formats.Format, formats.Composed)):
                raise ProgramError(
                    "P107",
                    f"{name}={fmt!r} is not a format",
                    where=name,
                    hint="tw.csr(), tw.hyb(), …",
                )
            if name not in {t.structure for t in self.program.tensors}:
                raise ProgramError(
                    "P107",
                    f"{name} is no sparse parameter with a structure of its own",
                    where=name,
                    hint="dense parameters have no format; one declared like=… shares another's",
                )
        return replace(self, formats=tuple((dict(self.formats) | of).items()))

    def schedule(self, recipe: Recipe) -> Definition:
        """A function from Schedule to Schedule: it runs when the kernel is built."""
        if not callable(recipe):
            raise ProgramError("P101", f"{recipe!r} is no recipe", hint="a function of a Schedule")
        return replace(self, recipe=recipe)

    def scheduled(self, target: Target | str = "cpp") -> Schedule:
        """The schedule before or after its recipe ran, to look at and to try verbs on."""
        from tilewright import compiler

        return compiler.scheduled(self.program, self.recipe, parse_target(target))

    def lower(self, target: Target | str = "cpp", watch: Watch | None = None) -> Program:
        """The program at the loop level for a target."""
        from tilewright import compiler

        return compiler.lowered(self.program, self.recipe, parse_target(target), watch)

    def build(self, target: Target | str = "cpp") -> Kernel:
        """Compile for a target, through the cache: a program, recipe and target that were built
        before are neither lowered nor compiled. Raises BuildError, ScheduleError, ProgramError."""
        return _build(self, parse_target(target))

    def _known(self, names: Any) -> None:
        import inspect

        known = inspect.signature(self.function).parameters
        for name in names:
            if name not in known:
                raise ProgramError(
                    "P101",
                    f"{self.name} has no parameter {name!r}",
                    where=name,
                    hint=f"parameters: {', '.join(known)}",
                )

    def __str__(self) -> str:
        return str(self.program)

    __repr__ = __str__


def program(function: Callable[..., Any]) -> Definition:
    """Decorator: the function describes a program on coordinates (see `sparse.trace`)."""
    made = Definition(function)
    made.program  # noqa: B018 - errors belong to the definition, not to the first use
    return made


def _build(d: Definition, target: Target) -> Kernel:
    if target.kind == "cpp" and not toolchain.has_compiler():
        toolchain.warn_of_interpreter()
        target = Target("interp")
    program = d.program
    key = _key(d, program, target)
    built = store.load(key) if key else None
    if built is None:
        from tilewright import compiler

        built = compiler.rendered(compiler.lowered(program, d.recipe, target), target)
        if key and key == _key(d, program, target):  # else the recipe changed what it is made of
            with contextlib.suppress(BuildError):  # the next process lowers again
                store.save(key, built)
    if target.kind == "interp":
        return Kernel(built.manifest, InterpLauncher(program), built.source)
    if target.kind == "cpp":
        return _cpp_kernel(built, target)
    return _cuda_kernel(built, target)


def _key(d: Definition, program: Program, target: Target) -> str | None:
    """All that decides what lowering makes; None where that cannot be told, or is to be watched."""
    if knobs.get("verify") or knobs.get("debug") >= WATCHED:
        return None
    try:
        version, isa = store.version(), toolchain.resolve_isa().name
    except TilewrightError:  # told where it matters
        return None
    what = identity(program, d.recipe) if version else None
    return what and store.key_of("kernel", version or "", str(target), isa, what)


def _defining(names: tuple[str, ...], source: str) -> str:
    """The source that takes fewer things for granted: `Frame.lacks` names them."""
    return "".join(f"#define {name}\n" for name in names) + source


def _cpp_kernel(built: store.Built, target: Target) -> Kernel:
    def compiled(lacks: tuple[str, ...]) -> Path:
        return native.compile_cpp(_defining(lacks, built.source), isa=target.arch or None)

    return Kernel(built.manifest, launch.CpuLauncher(compiled, built.entries), built.source)


def _cuda_kernel(built: store.Built, target: Target) -> Kernel:
    from tilewright.runtime import cuda

    arch = target.arch or cuda.device_arch()
    headers = texts.headers()
    cubin = nvrtc.compile_cuda(built.source, arch=arch, headers=headers)

    def compiled(lacks: tuple[str, ...]) -> bytes:
        if not lacks:
            return cubin.image
        source = _defining(lacks, built.source)
        return nvrtc.compile_cuda(source, arch=arch, headers=headers).image

    launcher = launch.CudaLauncher(compiled)
    return Kernel(built.manifest, launcher, built.source, cubin.resources)
