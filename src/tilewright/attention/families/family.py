"""The values that families of kernels share: a family, a call of it, and what it has prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import gt
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright import dtypes
from tilewright.attention.pool import Pool
from tilewright.attention.spec import Spec, alone, launch_of
from tilewright.build import step_compiler
from tilewright.errors import ArgumentError
from tilewright.ir.body import Body
from tilewright.runtime import cuda
from tilewright.runtime.step import Part
from tilewright.runtime.view import allocate, ordinal_of, view

if TYPE_CHECKING:
    from tilewright.attention.plan import Plan
    from tilewright.attention.workspace import Workspace


Order = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]


class Scratch:
    """Memory for partial results and counters of calls on one device that run one after the other:
    the layers of a step, and other steps. It grows; a bound call keeps what it was bound with."""

    def __init__(self) -> None:
        self.arrays: tuple[Any, ...] = ()

    def grown(self, like: Any, *sizes: int) -> tuple[Any, ...]:
        """float32 for partial results, and int32 counters, which are 0 between calls; at least of
        these sizes. Raises ArgumentError[A105] for an array on another device than before."""
        if others := {view(x).device for x in self.arrays} - {view(like).device}:
            raise ArgumentError("A105", f"queries are not on {others.pop()}", where="scratch")
        held = [view(array).size for array in self.arrays] or [0, 0]
        if not self.arrays or any(map(gt, sizes, held)):
            kinds = zip(map(max, sizes, held, (1, 1)), (dtypes.float32, dtypes.int32), strict=True)
            self.arrays = tuple([allocate(like, (size,), kind) for size, kind in kinds])
            cuda.clear(view(self.arrays[1]))
        return self.arrays


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call whose arguments are checked. `values`: the kernel's parameters (those of
    `spec.param_values` and the pointers of the variant's values) without those of its plan."""

    spec: Spec
    pool: Pool
    values: dict[str, Any]
    plan: Plan | Workspace
    like: Any  # the queries: work space is allocated by their framework
    scratch: Scratch

    @property
    def ordinal(self) -> int:
        """The number of the GPU."""
        return ordinal_of(self.pool.device)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A call ready to run: its launch, what runs it, its source, what it keeps alive; on a GPU what
    a step may put beside others."""

    launch: Any
    run: Callable[[], None]
    source: str
    keep: tuple[Any, ...]
    part: Part | None = None

    @staticmethod
    def on_gpu(
        body: Body, ordinal: int, ctas: int, params: cuda.Params, keep: Any, *macros: str
    ) -> Prepared:
        """What runs a body by itself."""
        launch = launch_of(body, ordinal, ctas, params, *macros)
        compiler = step_compiler(cuda.device(ordinal).arch)
        part = Part(body, params, ctas, macros, compiler, ordinal, launch)

        def run() -> None:
            launch.run(cuda.current_stream(ordinal))

        return Prepared(launch, run, alone(body, "stage0", *macros), (keep, params), part)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A family of kernels.

    `device`: cpu or cuda. `rows`: the packed rows (queries × group) of an item, as a function of
    the spec. `splits`: items are cut along the keys by what the "request" alone says, or until the
    "batch" fills the workers ("": never). `ctas_per_sm`: the CTAs of an SM, by head_dim, where its
    plans are cuts of contiguous ranges (`ranges.py`), None where they are items.
    `refuses(spec, rows, pool, arch)`: the reason why it cannot run a call on a GPU of an
    architecture ("": the one that has the pool), or "".
    `order(items, qo_indptr, workers, queries)`: the order of a plan's items, as indices (None:
    longest first); `queries`: the most of a request whose items are narrow. `shares`: whether
    requests may share keys. `few(spec)`: the packed rows of a request up to which its items are
    narrow: some workers begin with these.
    """

    name: str
    device: str
    rows: Callable[[Spec], int]
    splits: str
    ctas_per_sm: Callable[[int], int] | None
    refuses: Callable[[Spec, int, Pool | None, str], str]
    prepare: Callable[[Call], Prepared]
    order: Order | None = None
    shares: bool = False
    few: Callable[[Spec], int] = lambda spec: 0

    def reason(
        self, spec: Spec, rows: int, pool: Pool | None, arch: str = "", invariant: bool = False
    ) -> str:
        """Why it cannot run a call, or ""; `arch`: of another GPU than that of the pool."""
        if invariant and self.ctas_per_sm:
            return "it divides the keys of a request by the batch"
        if spec.table.shared and not self.shares:
            return "requests share keys"
        return self.refuses(spec, rows, pool, arch)

    def qo_tile(self, spec: Spec) -> int:
        """The most queries of an item."""
        return max(1, self.rows(spec) // spec.group)


def refusal(spec: Spec, _rows: int, pool: Pool | None, _arch: str = "", *hosted: str) -> str:
    """Why a kernel of 16-bit tiles, copied 16 bytes at a time, cannot run a call, or ""; `hosted`:
    see `Traced.extras`."""
    if extras := spec.traced.extras(*hosted):
        return f"the variant has {extras}"
    if spec.q != spec.kv or spec.kv not in (dtypes.float16, dtypes.bfloat16):
        return "q, k and v are not all float16 or all bfloat16"
    if spec.head_dim % 8 or spec.head_dim_vo % 8 or max(spec.head_dim, spec.head_dim_vo) > 256:
        return "head_dim is no multiple of 8 up to 256"
    if pool is not None:
        strides = (*pool.k.strides[:3], *pool.v.strides[:3])
        if any(a % 16 for a in (pool.k.pointer, pool.v.pointer, *(2 * n for n in strides))):
            return "rows of k or v are not aligned to 16 bytes"
    return ""


def check_alignment(values: dict[str, Any], q_bytes: int) -> None:
    """Rows of q (16-bit elements) are aligned to `q_bytes`, o to 16. Raises ArgumentError[A104]."""
    q = (values["q"], 2 * values["q_token"], 2 * values["q_head"])
    for name, nbytes, addresses in (("q", q_bytes, q), ("out", 16, (values["o"],))):
        if any(a % nbytes for a in addresses):
            text = f"rows of {name} are not aligned to {nbytes} bytes"
            raise ArgumentError("A104", text, where=name, hint="a contiguous copy")
