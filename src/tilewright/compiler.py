"""From a program to the text of a kernel: the passes, the schedule and the rendering in a row.

`build` imports this when it meets a kernel that the cache does not know, and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tilewright.codegen import cpp, cuda
from tilewright.codegen.params import Params, collect_params, host_text
from tilewright.ir.nodes import Program, Tensor
from tilewright.lower import AFTER_SCHEDULE, BEFORE_SCHEDULE, run_passes
from tilewright.runtime.manifest import Manifest, StageSpec, TensorSpec, declarations
from tilewright.runtime.store import Built
from tilewright.schedule import Schedule
from tilewright.sparse import formats
from tilewright.target import Target

Watch = Callable[[str, Program], None]
Recipe = Callable[[Schedule], Schedule]


def scheduled(program: Program, recipe: Recipe | None, target: Target) -> Schedule:
    """The schedule of a program at the coordinate level, after its recipe ran."""
    start = Schedule(program, _Positions(), target)
    return start if recipe is None else recipe(start)


def lowered(
    program: Program, recipe: Recipe | None, target: Target, watch: Watch | None = None
) -> Program:
    """The program at the loop level for a target."""
    s = scheduled(program, recipe, target)
    return run_passes(s.lowered.program, AFTER_SCHEDULE, target.kind, watch)


class _Positions:
    """Coordinates → positions. A recipe looks at the loops many times before its first verb; the
    last program is lowered once."""

    __slots__ = ("given", "made")

    def __init__(self) -> None:
        self.given = self.made = None

    def __call__(self, program: Program) -> Program:
        if self.made is None or self.given is not program:
            self.given, self.made = program, run_passes(program, BEFORE_SCHEDULE)
        return self.made


def rendered(program: Program, target: Target) -> Built:
    """The program at the loop level as text, and what a call needs to know of it."""
    params = collect_params(program)
    manifest = _manifest(program, params, target)
    if target.kind == "interp":
        return Built(manifest, str(program), ())
    if target.kind == "cpp":
        source = cpp.render(program, declarations(manifest), params)
        return Built(manifest, source.text, source.entries)
    source = cuda.render(program, declarations(manifest), params)
    smem = zip(manifest.stages, source.smem_bytes, strict=True)
    stages = tuple(replace(s, smem_bytes=b) for s, b in smem)
    return Built(replace(manifest, stages=stages), source.text, source.entries)


def _manifest(program: Program, params: Params, target: Target) -> Manifest:
    used = {t.format for t in program.tensors if t.structure}
    composed = next((f for f in used if isinstance(f, formats.Composed)), None)
    cases = (0,)
    if composed is not None:
        cases = tuple(composed.formats.index(f) for _, f in composed.parts)
    stages = tuple(
        StageSpec(
            f"stage{number}",
            tuple(host_text(n.grid) for n in stage),
            tuple(n.part for n in stage),
            (cuda.stage_threads(stage), 1),
        )
        for number, stage in enumerate(program.stages)
    )
    tensors = tuple(_spec(t) for t in program.tensors if t.role != "inline")
    named = {t.structure: repr(t.format) for t in program.tensors if t.structure}
    return Manifest(
        program.name, str(target), tensors, params.params, params.row, stages,
        formats=tuple(named.items()), part_cases=cases, sizes=program.sizes,
        index=program.index.name,
        packed=tuple(t.name for t in program.tensors if _strides_known(t, params)),
    )  # fmt: skip


def _strides_known(t: Tensor, params: Params) -> bool:
    """Whether generated code takes a stride of `t` for granted (beyond the last, which is 1)."""
    return any(f"{t.name}_stride{d}" in params.packed for d in range(len(t.dims) - 1))


def _spec(t: Tensor) -> TensorSpec:
    role = "update" if t.role == "output" and t.kind == "state" else t.role
    return TensorSpec(t.name, t.dims, t.dtype.name, role, t.structure, t.strided, t.fill)
