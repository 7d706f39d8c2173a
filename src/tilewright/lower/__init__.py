"""The compiler on one screen: every pass, in order. Each is a pure function Program → Program.

`schedule` is where a schedule's verbs rewrite the nests; without one the program runs as written.
The knob `verify` runs the verifier after each pass; `tilewright show` prints what each makes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tilewright import knobs
from tilewright.ir import nodes as ir
from tilewright.ir.verify import verify
from tilewright.lower import vectorize
from tilewright.lower.bind import bind_grid, bind_threads, serialize_threads
from tilewright.lower.blocks import materialize_blocks
from tilewright.lower.conditions import narrow_loops, predicate_loads
from tilewright.lower.flatten import flatten_addresses, inline_lets
from tilewright.lower.hoist import hoist_reductions
from tilewright.lower.pipelines import carry_addresses, load_operands_ahead, pipeline_loops
from tilewright.lower.positions import coordinates_to_positions
from tilewright.lower.reductions import check_threads, materialize_reductions
from tilewright.lower.rows import keep_rows
from tilewright.lower.tiles import materialize_tiles


@dataclass(frozen=True, slots=True)
class Pass:
    """`only`: the kinds of target it runs for (empty: all)."""

    run: Callable[[ir.Program], ir.Program]
    only: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.run.__name__


BEFORE_SCHEDULE = (Pass(hoist_reductions), Pass(coordinates_to_positions))
AFTER_SCHEDULE = (
    Pass(narrow_loops),
    Pass(check_threads, only=("cuda",)),
    Pass(pipeline_loops),
    Pass(serialize_threads, only=("cpp", "interp")),
    Pass(materialize_blocks),
    Pass(materialize_tiles),
    Pass(materialize_reductions),
    Pass(inline_lets),
    Pass(bind_grid),
    Pass(keep_rows, only=("cuda",)),
    Pass(bind_threads, only=("cuda",)),
    Pass(predicate_loads, only=("cuda",)),
    Pass(flatten_addresses),
    Pass(vectorize.pair_fragments, only=("cuda",)),
    Pass(vectorize.vectorize_loops),
    Pass(vectorize.unroll_loops),
    Pass(vectorize.split_registers),
    Pass(load_operands_ahead, only=("cuda",)),
    Pass(carry_addresses, only=("cuda",)),
)


Watch = Callable[[str, ir.Program], None]
"""Sees the name of each pass and the program that it returned."""


def run_passes(
    program: ir.Program, passes: tuple[Pass, ...], kind: str = "cpp", watch: Watch | None = None
) -> ir.Program:
    """The program after the passes that apply to a kind of target, in order."""
    verifying = knobs.get("verify")
    for p in passes:
        if p.only and kind not in p.only:
            continue
        program = p.run(program)
        if verifying:
            verify(program, p.name)
        if watch is not None:
            watch(p.name, program)
    return program
