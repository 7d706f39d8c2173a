"""Bodies: the device code of a launch without the `__global__` function around it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Body:
    """What one launch runs, to be put alone or beside others into one kernel.

    `text` goes into a namespace that the kernel names; it reads the barrier id `BARRIER` from
    there, has a struct `Params` and `void {entry}(const Params&, int64_t unit, int thread, char*
    smem)` for the first `threads` threads of a CTA. Launches of several stages share one text.
    `resident`: threads of an SM that share its registers; `smem_bytes`: of dynamic shared memory;
    `headers`: of the prelude; `reads`, `writes`: the names of its buffers.
    """

    text: str
    entry: str
    threads: int
    resident: int = 1024
    smem_bytes: int = 0
    headers: tuple[str, ...] = ("gpu.cuh",)
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
