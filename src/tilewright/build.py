"""Build kernels from programs: trace → decompose → schedule → lower → render → compile.

    kernel = spmm.decompose(A=tw.hyb()).schedule(tw.recipes.spmm).build("cuda")

Everything up to `build` is a frozen value that prints. A `Kernel` is callable on whatever arrays
the caller has; `bind` fixes the arguments, and its result costs next to nothing to call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from tilewright import dtypes, knobs
from tilewright.codegen import prelude_files
from tilewright.dtypes import DType
from tilewright.errors import BuildError, ProgramError, ScheduleError, TilewrightError
from tilewright.ir.body import Body
from tilewright.ir.digest import digest
from tilewright.ir.nodes import Program
from tilewright.reference.launcher import InterpLauncher
from tilewright.runtime import launch, transfer
from tilewright.runtime.kernel import Kernel
from tilewright.runtime.manifest import Built
from tilewright.sparse import entries, formats, trace
from tilewright.target import Target
from tilewright.target import target as parse_target
from tilewright.toolchain import compilers, cxx, disk_cache, nvrtc, program_cache

if TYPE_CHECKING:
    from tilewright.compiler import Recipe, Watch
    from tilewright.schedule import Schedule

entries.to_device = transfer.to_device

P = ParamSpec("P")
_INT32, _INT64 = dtypes.int32, dtypes.int64
OPS, TABLES = "tilewright.ops.", (tuple, list, dict)


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """A schedule of the package as data: the qualified name of its function and plain arguments.

    Calling it with a Schedule runs the function. The key of a kernel has name, arguments and
    `constants`; the version of the package covers the function's code."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def of(self, **arguments: Any) -> NamedRecipe:
        """The same recipe with arguments: numbers, strings, tuples of them, or None. Raises
        ScheduleError[S102] for a name that the recipe does not take."""
        code = _RECIPES[self.name].__code__
        known = code.co_varnames[1 : code.co_argcount]
        for name in arguments:
            if name not in known:
                text = f"{self.name} takes no argument {name!r}"
                raise ScheduleError("S102", text, hint=f"arguments: {', '.join(known) or 'none'}")
        return replace(self, arguments=tuple(sorted((dict(self.arguments) | arguments).items())))

    def __call__(self, s: Schedule) -> Schedule:
        return _RECIPES[self.name](s, **dict(self.arguments))

    def constants(self) -> tuple[tuple[str, str | None], ...]:
        """What its module, and those of `ops` that this one uses, have under names in capitals: its
        code may read them, and a process may set them. A digest of plain data; of tables what they
        print, which has functions by their names."""
        modules = _modules_of(self.name.rpartition(".")[0])
        return tuple([
            (n, re.sub(" at 0x[0-9a-f]+", "", repr(x)) if isinstance(x, TABLES) else digest(x))
            for n, x in [(n, x) for m in modules for n, x in vars(m).items() if n.isupper()]
        ])  # fmt: skip


_RECIPES: dict[str, FunctionType] = {}


@functools.cache
def _modules_of(name: str) -> list[ModuleType]:
    """A module, and those of `ops` that it uses, or that these use, in the order of their text."""
    modules = [sys.modules[name]]
    for module in modules:
        used = dict.fromkeys(map(inspect.getmodule, vars(module).values()))
        modules += [m for m in used if m and m.__name__.startswith(OPS) and m not in modules]
    return modules


def named_recipe(function: FunctionType) -> NamedRecipe:
    """Decorator: a function of the package from a Schedule and plain arguments to a Schedule."""
    name = f"{function.__module__}.{function.__qualname__}"
    assert name.startswith("tilewright."), "the package's version says nothing of other functions"
    _RECIPES[name] = function
    return NamedRecipe(name)


@dataclass(frozen=True, slots=True)
class Definition:
    """A program as the user wrote it, with the choices made so far: dtypes, formats, a schedule.

    Each method returns a new Definition; `build` compiles it. Printing shows the program."""

    function: Callable[..., Any]
    dtypes: tuple[tuple[str, DType], ...] = ()
    formats: tuple[tuple[str, Any], ...] = ()
    recipe: Recipe | None = None
    index: DType = _INT32

    @property
    def name(self) -> str:
        """The name of the function, and of its kernels."""
        return self.function.__name__

    @property
    def program(self) -> Program:
        """The program at the coordinate level."""
        traced = trace.trace(self.function, dict(self.dtypes), dict(self.formats))
        return replace(traced, index=self.index)

    def typed(self, index: Any = None, **of: Any) -> Definition:
        """Chooses the dtypes of parameters: `spmm.typed(A="float16", X="float16")`. `index`: that
        of coordinates and sizes, int32 or int64. Raises ProgramError[P101, P106]."""
        self._known(of)
        chosen = dict(self.dtypes) | {name: dtypes.dtype(t) for name, t in of.items()}
        coordinate = self.index if index is None else dtypes.dtype(index)
        if coordinate not in (_INT32, _INT64):
            raise ProgramError("P106", f"index is {coordinate}", where="index", hint="int32, int64")
        return replace(self, dtypes=tuple(chosen.items()), index=coordinate)

    def decompose(self, **of: Any) -> Definition:
        """Chooses the formats of sparse parameters: `spmm.decompose(A=tw.hyb())`. Raises
        ProgramError[P107]."""
        self._known(of)
        for name, fmt in of.items():
            if not isinstance(fmt, (formats.Format, formats.Composed)):
                raise ProgramError("P107", f"{name}={fmt!r} is not a format", where=name)
            if name not in {t.structure for t in self.program.tensors}:
                text = f"{name} is no sparse parameter with a structure of its own"
                raise ProgramError("P107", text, where=name)
        return replace(self, formats=tuple((dict(self.formats) | of).items()))

    def schedule(self, recipe: Recipe) -> Definition:
        """Chooses the schedule: `recipe` takes a Schedule and returns one. A user's function
        runs at each build, and the verbs that it calls are part of the key of the kernel cache; a
        recipe of the package runs only where its kernel is not in the cache."""
        if not callable(recipe):
            raise ProgramError("P101", f"{recipe!r} is no recipe", hint="a function of a Schedule")
        return replace(self, recipe=recipe)

    def scheduled(self, target: Target | str = "cpp") -> Schedule:
        """The schedule after its recipe, if there is one: to print it and to try verbs."""
        return _compiler().scheduled(self.program, self.recipe, parse_target(target))

    def lower(self, target: Target | str = "cpp", watch: Watch | None = None) -> Program:
        """The program at the loop level for a target. `watch(name, program)` sees each pass."""
        return _compiler().lowered(self.scheduled(target), watch)

    def build(self, target: Target | str = "cpp") -> Kernel:
        """Compile for a target, through the cache: a program, recipe and target that were built
        before are neither lowered nor compiled. Raises BuildError, ScheduleError, ProgramError."""
        return _build(self, parse_target(target))

    def _known(self, names: Any) -> None:
        known = inspect.signature(self.function).parameters
        for name in names:
            if name not in known:
                text, hint = f"{self.name} has no parameter {name!r}", ", ".join(known)
                raise ProgramError("P101", text, where=name, hint=f"parameters: {hint}")

    def __str__(self) -> str:
        return str(self.program)

    __repr__ = __str__


def program(function: Callable[..., Any]) -> Definition:
    """Decorator: the function describes a program on coordinates (see `sparse.trace`)."""
    definition = Definition(function)
    definition.program  # noqa: B018 - errors belong to the definition, not to the first use
    return definition


def program_of(name: str, parameters: dict[str, Any], function: Callable[..., Any]) -> Definition:
    """The program of a function that takes what `parameters` describe by keyword."""
    kind = inspect.Parameter.KEYWORD_ONLY
    described = [inspect.Parameter(n, kind, default=d) for n, d in parameters.items()]
    function.__name__, function.__signature__ = name, inspect.Signature(described)
    return program(function)


def kernels(define: Callable[P, Definition]) -> Callable[Concatenate[str, P], Kernel]:
    """The kernels of the definitions that a function returns, built once each: a function of the
    target and of its arguments."""

    def kernel(target: str, *args: P.args, **named: P.kwargs) -> Kernel:
        return define(*args, **named).build(target)

    return functools.cache(kernel)  # type: ignore[return-value]


def _compiler() -> Any:
    """The module, which kernels from the cache do not need."""
    from tilewright import compiler

    return compiler


def _build(d: Definition, target: Target) -> Kernel:
    if target.kind == "cpp" and not compilers.has_compiler():
        compilers.warn_of_interpreter()
        target = Target("interp")
    if target.is_cuda and not target.arch:
        from tilewright.runtime import cuda

        target = Target("cuda", cuda.device().arch)  # its limits count when the program is lowered
    program, scheduled = d.program, None
    if d.recipe is None or isinstance(d.recipe, NamedRecipe):
        key = _key(program, d.recipe, target)
    else:  # a user's function: the key has the steps that it took
        scheduled = _compiler().scheduled(program, d.recipe, target)
        is_own = scheduled.first.program is program
        key = _key(program, scheduled.history, target) if is_own else None
    data = program_cache.load(key) if key else None
    built = Built.from_bytes(data) if data else None
    if built is None:
        scheduled = scheduled or _compiler().scheduled(program, d.recipe, target)
        built = _compiler().built(scheduled)
        if key:
            with contextlib.suppress(BuildError):  # the next process lowers again
                program_cache.save(key, built.to_bytes())
    return _kernel(built, target, program if target.kind == "interp" else None)


def _kernel(built: Built, target: Target, program: Program | None) -> Kernel:
    """Compiles the source through the cache and loads it; unpickling a kernel calls this. The
    interpreter needs the `program` too."""
    if program is not None:
        kernel = Kernel(built.manifest, InterpLauncher(program), built.source)
    elif target.kind == "cpp":
        kernel = _cpp_kernel(built, target)
    else:
        kernel = _cuda_kernel(built, target)
    kernel.rebuilt = _kernel, (built, target, program)
    return kernel


def _key(program: Program, recipe: Any, target: Target) -> str | None:
    """The key of a lowered program: program, recipe (a NamedRecipe and the constants of
    its module, or the steps of a user's), target, instruction set and version. None where these are
    not plain data, or where passes are to be verified."""
    if knobs.get("verify"):
        return None
    try:
        isa = compilers.resolve_isa().name
    except TilewrightError:  # raised again by the compilation
        return None
    constants = recipe.constants() if isinstance(recipe, NamedRecipe) else ()
    content = digest((program, recipe, constants))
    return content and disk_cache.key_of("kernel", program_cache.VERSION, str(target), isa, content)


def _variant_source(variants: tuple[str, ...], source: str) -> str:
    """The source that defines the macros of `Frame.variants`."""
    return "".join(f"#define {name}\n" for name in variants) + source


def _cpp_kernel(built: Built, target: Target) -> Kernel:
    def load(variants: tuple[str, ...]) -> ctypes.CDLL:
        source = _variant_source(variants, built.source)
        return cxx.load_cpp(source, name=built.manifest.name, isa=target.arch)

    entries = tuple(s.entry for s in built.manifest.stages)
    return Kernel(built.manifest, launch.CpuLauncher(load, entries), built.source)


def compile_cuda(source: str, arch: str, name: str = "") -> nvrtc.Cubin:
    """The cubin of CUDA C++ that includes the prelude. Raises BuildError."""
    headers = prelude_files.headers()
    return nvrtc.compile_cuda(source, arch=arch, name=name, headers=headers)


def _cuda_kernel(built: Built, target: Target) -> Kernel:
    def compiled(variants: tuple[str, ...]) -> nvrtc.Cubin:
        source = _variant_source(variants, built.source)
        return compile_cuda(source, target.arch, built.manifest.name)

    cubin = compiled(())
    launcher = launch.CudaLauncher(
        lambda v: compiled(v).image if v else cubin.image, built.bodies, step_compiler(target.arch)
    )
    return Kernel(built.manifest, launcher, built.source, cubin.resources)


@functools.cache
def step_compiler(arch: str) -> launch.CompileStep:
    """Returns a function that compiles several kernel bodies of a recorded step into one cubin."""

    def compile_step(bodies: tuple[Body, ...], macros: tuple[str, ...]) -> bytes:
        from tilewright.codegen import shell

        source = _variant_source((*macros, shell.OVERLAPS), shell.beside(bodies))
        return compile_cuda(source, arch, "step").image

    return compile_step
