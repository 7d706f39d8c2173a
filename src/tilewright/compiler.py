"""From a program to the text of a kernel: the passes, the schedule and rendering, in order.

`build` imports this only for a kernel that is not in the cache.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tilewright.codegen import cpp, cuda, shell
from tilewright.codegen.params import Params, collect_params, count_of, host_count
from tilewright.errors import ScheduleError
from tilewright.ir.names import stride_name
from tilewright.ir.nodes import Program, Tensor
from tilewright.ir.rewrite import is_ordered
from tilewright.ir.verify import verify
from tilewright.lower import AFTER_SCHEDULE, BEFORE_SCHEDULE, Watch, run_passes
from tilewright.lower.cost import costs
from tilewright.runtime.manifest import Built, Manifest, StageSpec, TensorSpec, declarations
from tilewright.schedule import Schedule, Session
from tilewright.target import Target

Recipe = Callable[[Schedule], Schedule]


def scheduled(program: Program, recipe: Recipe | None, target: Target) -> Schedule:
    """The schedule of a program at the coordinate level, after its recipe ran."""
    session = Session(lambda p: run_passes(p, BEFORE_SCHEDULE))
    start = Schedule(program, session, target)
    result = start if recipe is None else recipe(start)
    if not isinstance(result, Schedule):
        text = f"the recipe of {program.name} returned {result!r}"
        raise ScheduleError("S102", text, hint="return the schedule")
    used = {id(step) for step in result.history}
    if dropped := [step for step in session.calls if id(step) not in used]:
        rule = f"the recipe of {program.name} does not use the result of s{dropped[0]}"
        hint = "a verb returns a new schedule: s = s.split(…), and return s; s.undo() to discard"
        raise ScheduleError("S102", rule, hint=hint)
    return result


def lowered(s: Schedule, watch: Watch | None = None) -> Program:
    """The program of a schedule at the loop level for its target, verified: text that is rendered
    from it declares every name that it uses. Raises InternalError[I101], which names the pass at
    fault under the knob `verify`."""
    result = run_passes(s.lowered.program, AFTER_SCHEDULE, s.target.kind, watch)
    verify(result, "the last pass")
    return result


def built(s: Schedule) -> Built:
    """The text and the manifest of a scheduled program, with what its loops cost."""
    result = rendered(lowered(s), s.target)
    tables = costs(s.lowered.program, count_of)
    return replace(result, manifest=replace(result.manifest, costs=tables))


def rendered(program: Program, target: Target) -> Built:
    """Render a program at the loop level; the text with its manifest."""
    params = collect_params(program)
    manifest = _manifest(program, params, target)
    if target.kind == "interp":
        return Built(manifest, str(program))
    if target.kind == "cpp":
        return Built(manifest, cpp.render(program, declarations(manifest), params))
    bodies = cuda.render(program, declarations(manifest), params)
    pairs = zip(manifest.stages, bodies, strict=True)
    stages = tuple(replace(stage, smem_bytes=body.smem_bytes) for stage, body in pairs)
    for stage in stages:
        if stage.smem_bytes > target.shared_bytes:
            text = f"{stage.entry} of {program.name} has {stage.smem_bytes} bytes of shared memory"
            hint = f"a CTA of {target} has at most {target.shared_bytes}: smaller tiles"
            raise ScheduleError("S103", text, hint=hint)
    source = shell.alone(bodies, [s.entry for s in stages])
    return Built(replace(manifest, stages=stages), source, bodies)


def _manifest(program: Program, params: Params, target: Target) -> Manifest:
    format_of = {t.structure: t.format for t in program.tensors if t.structure}
    stages = tuple(
        StageSpec(
            f"stage{number}", tuple(host_count(n.grid) for n in stage),
            _rows(format_of.get(stage[0].structure)), stage[0].structure,
            any(is_ordered(n) for n in stage), (cuda.stage_threads(stage), 1),
        )
        for number, stage in enumerate(program.stages)
    )  # fmt: skip
    arrays = {b.name.removesuffix(".values") for b in program.buffers}
    # Generated code has strides as constants, beyond the last, which is 1.
    strides = ((t.name, d) for t in program.tensors for d in range(len(t.dims) - 1))
    packed = dict.fromkeys(name for name, d in strides if stride_name(name, d) in params.packed)
    tensors = tuple(_spec(t) for t in program.tensors if t.role != "inline" or t.name in arrays)
    return Manifest(
        program.name, str(target), tensors, params.params, params.row, stages,
        formats=tuple((name, repr(f)) for name, f in format_of.items()),
        sizes=program.sizes, index=program.index.name, packed=tuple(packed),
    )  # fmt: skip


def _rows(fmt: Any) -> tuple[int, ...]:
    """The body that serves each row of a stage's work table; `fmt` is that of its structure."""
    return (0,) if fmt is None else tuple(fmt.formats.index(f) for _, f in fmt.parts)


def _spec(t: Tensor) -> TensorSpec:
    role = "temp" if t.role == "inline" else t.role
    role = "update" if role == "output" and t.kind == "state" else role
    return TensorSpec(t.name, t.dims, t.dtype.name, role, t.structure, t.strided, t.fill)
