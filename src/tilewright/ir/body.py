"""Bodies: the device code of a launch without the `__global__` function around it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Body:
    """What one launch runs, to be put alone or beside others into one kernel.

    `text` goes into a namespace that the kernel names; it has a struct `Params` and `void
    {entry}(const Params&, int64_t unit, int thread, char* smem)` for the first `threads` threads of
    a CTA. Of the barriers of a CTA it uses `barriers`, by their ids from `BARRIER` on, which is in
    that namespace. Launches of several stages share one text.
    `resident`: threads of an SM that share its registers; `smem_bytes`: of dynamic shared memory;
    `headers`: of the prelude; `reads`, `writes`: the names of its buffers, whose addresses a bound
    call knows. `order`: what a launch of its own does: "run" it, "wait" for the launch in front,
    "start" the next one, which waits in turn. `ctas`: those of an SM that its work is divided for:
    threads and memory of a launch that it shares allow as many. `alone`: it shares none.
    """

    text: str
    entry: str
    threads: int
    resident: int = 1024
    smem_bytes: int = 0
    headers: tuple[str, ...] = ("gpu.cuh",)
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    barriers: int = 1
    order: tuple[str, ...] = ("run",)
    ctas: int = 0
    alone: bool = False
