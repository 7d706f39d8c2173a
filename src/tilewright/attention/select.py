"""Selection: attention over the pages of each request that have the highest scores.

chosen = scores(attn, kv, pages=128)  # `scores`: a function under `@select`; memory, once
chosen.run(q=q, mean=mean)            # scores, then the best pages of each KV head
state = attn.run(q, KV(chosen.table, pool), attn.plan(qo_indptr, chosen.table))
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.attention.checks import check_count, check_view, named_view
from tilewright.attention.kv import KV
from tilewright.attention.spec import body_text, constants, launch_of, namespace
from tilewright.attention.table import Table, TableForm
from tilewright.attention.variant import Causal, Full, traced_of
from tilewright.build import Definition, program
from tilewright.errors import ArgumentError, ProgramError
from tilewright.ir.body import Body
from tilewright.ir.nodes import Access, Binary, Cast, Index, Reduce
from tilewright.ir.rewrite import free_vars, walk
from tilewright.ops import schedules
from tilewright.ops.paging import pages_before_kernel
from tilewright.runtime import cuda
from tilewright.runtime.kernel import Kernel
from tilewright.runtime.layout import Struct
from tilewright.runtime.transfer import to_device, to_host
from tilewright.runtime.view import ordinal_of, view
from tilewright.schedule import Schedule
from tilewright.sparse.pack import Packed, Structure

THREADS, RESIDENT = 512, 2048  # of a CTA that chooses pages, and of an SM
LOADS = 8  # under way in a thread that scores pages
BLOCK_BYTES, WALK, STAGES = 32 << 10, 4, 2  # of pages; blocks of a CTA, and in shared memory
PARAMS = Struct("Params", [
    ("scores", "ptr", "const float*"),
    *((name, "ptr", "const int32_t*") for name in ("kv_len", "table_entries")),
    *((name, "ptr", "int32_t*") for name in ("chosen_len", "chosen")),
    *((name, "int64") for name in ("width", "pages", "page_size")), ("heads", "int32"),
])  # fmt: skip


def _coords(program: Any) -> Any:
    """The indices of scores: request, KV head where they have one, page."""
    return program.body[-1].out.coords


def by_page(s: Schedule) -> Schedule:
    """The schedule of scores out[r, h, p] or out[r, p]: requests in parallel, sums over the last
    dimension of the first sparse parameter in vectors; on a GPU a few threads for each page, or
    tiles where a score is the greatest of sums of products of 16-bit numbers."""
    *rows, page = (c.name for c in _coords(s.program))
    tensor = next(t for t in s.program.tensors if t.is_sparse)
    lane = str(tensor.dims[-1])
    if not s.target.is_cuda:
        return schedules.vectors(s.parallel(rows[0]), lane)
    s = functools.reduce(lambda s, row: s.bind(row, "cta.y"), rows, s)
    for n in range(len(s.nests)):
        s = s.on(n)
        if s.has(page, n) and s.has(lane, n):
            s = _sums(s, page, lane, tensor)
        else:
            s = s.split(page if s.has(page, n) else lane, 32, into=("o", "x")).bind("x", "thread.x")
    return s.everywhere()


def _sums(s: Schedule, page: str, lane: str, tensor: Any) -> Schedule:
    sizes, values = dict(s.program.sizes), [x.value for x in s.program.body[-2:]]
    match values:
        case [Reduce("sum", deep, Binary("*", Cast(a), Cast(b))), Reduce("max", (column,))]:
            most = BLOCK_BYTES // (a.dtype.itemsize * prod(sizes[x.name] for x in deep))
            if a.dtype == b.dtype and a.dtype.itemsize == 2 and sizes[lane] % 16 == 0 and most > 15:
                operands = [x.tensor for x in walk(values[0], Access)]
                return _tiles(s, (page, column.name, lane), min(64, most // 16 * 16), operands)
    return schedules.dot_products(s, page, lane, sizes[lane], tensor.dtype.itemsize, LOADS)


def _tiles(s: Schedule, loops: tuple[str, str, str], block: int, operands: list[Any]) -> Schedule:
    """A CTA copies blocks of pages ahead to shared memory, 16 pages for each of its warps."""
    other, pages = sorted(operands, key=lambda t: t.is_sparse)
    s = s.split(loops[1], 8, into=("c_u", "c_v")).split(loops[2], 16, into=("k_u", "k_v"))
    s = s.split(loops[0], block, into=("p_b", "p_i")).split("p_b", WALK, into=("p_cta", "p_o"))
    s = s.split("p_i", 16, into=("p_y", "p_v")).reorder("p_cta", "p_o", "p_y", "p_v", "c_u", "c_v")
    s = s.unroll("c_u").unroll("k_u").mma("p_v", "c_v", "k_v").bind("p_cta", "cta.x")
    s = s.bind("p_y", "thread.y").cache(other.name, "p_cta", "shared")
    return s.cache(pages.name, "p_o", "shared").pipeline("p_o", STAGES)


def select(
    function: Callable[..., Any], schedule: Callable[[Schedule], Schedule] = by_page
) -> functools.partial["Selection"]:
    """Decorator: the function describes a program of scores out[r, h, p], float32, for each
    request, KV head and page of a request; or out[r, p], one choice for all heads. The result
    makes a `Selection` from an attention, a cache and a number of pages.

    A sparse parameter is a tensor (requests, pages of a request, …): its argument is an array
    (pages of the pool, …), kept beside the cache, and the table says which pages are whose. It has
    the pages in front of a request's last one, which is always kept and needs no score.
    `schedule`: of the program; all sizes but those of r and p are constants there. Raises
    ProgramError[P101].
    """
    definition = program(function)
    scores = definition.program.body[-1].out
    is_plain = all(isinstance(c, Index) for c in scores.coords)
    if not is_plain or len(scores.coords) not in (2, 3) or scores.dtype != dtypes.float32:
        rule, hint = f"{scores} has no scores of pages", 'tw.out.typed("float32")[r, h, p](…)'
        raise ProgramError("P101", rule, where=definition.name, hint=hint)
    return functools.partial(Selection, definition.schedule(schedule))


class Selection:
    """The best pages of each request and KV head, chosen by scores. `table`: their page table, at
    fixed addresses, for plans, workspaces and pools of the same pages."""

    def __init__(self, scores: Definition, attn: Any, kv: KV, *, pages: int) -> None:
        """`pages`: the most of a request, the last one among them. `kv`: a cache like those of the
        steps; its table is read at each run, so lengths and entries may change in place.

        The keys of a selection count from 0 in the order of its pages: variants that read positions
        of keys, but for the causal mask, are refused. Raises ArgumentError[A103, A107].
        """
        plain = isinstance(kv, KV) and kv.table.form == TableForm()
        if not plain or kv.table.stride != kv.table.width:
            hint = "Table(kv_len, block_table), int32, contiguous, without positions, not shared"
            raise ArgumentError("A107", f"kv={kv!r}", where="kv", hint=hint)
        traced, masks = traced_of(attn.variant), [traced_of(v).mask for v in (Causal(), Full())]
        hooks = traced.logits, traced.query, traced.key, traced.output
        read = set[str]().union(*map(free_vars, hooks))
        if traced.mask not in masks or read & {"at.kv", "at.key", "at.qo"}:
            text = f"{attn.variant!r} reads positions of keys, which a selection does not keep"
            raise ArgumentError("A107", text, where="attn", hint="tw.Causal(), tw.Full()")
        self._definition, self._kv, requests = scores, kv, kv.table.requests
        width = check_count("the width of block_table", kv.table.width)
        heads = (kv.pool.kv_heads,) * (len(_coords(scores.program)) - 2)
        chosen = requests, *heads, min(check_count("pages", pages), width)

        def new(*shape: int, dtype: Any = np.int32) -> Any:
            return to_device(np.zeros(shape, dtype), kv.pool.device)

        self._scores = new(*chosen[:-1], width, dtype=np.float32)
        self.table = Table(new(requests), new(*chosen))
        # The pages in front of each request's last one: those that have scores.
        indptr = to_device(np.arange(requests + 1, dtype=np.int32) * width, kv.pool.device)
        entries = kv.table.arrays["table_entries"].reshape(-1)
        self._rivals = Table.csr(new(requests), indptr, entries)
        self._structures: dict[Any, Structure] = {}
        self._choose = self._on_host if kv.pool.device == "cpu" else self._on_gpu()

    def run(self, **arrays: Any) -> Table:
        """Compute scores from the program's arguments, by name, and choose pages; the table. The
        first run compiles. Raises ArgumentError."""
        target = "cpp" if self.table.device == "cpu" else "cuda"
        sparse = {t.name for t in self._definition.program.tensors if t.is_sparse}
        arguments = {n: self._tensor(n, x) if n in sparse else x for n, x in arrays.items()}
        types = tuple((n, named_view(n, arrays[n]).dtype, x.shape) for n, x in arguments.items())
        lengths, rivals = self._kv.table.arrays["kv_len"], self._rivals.arrays["kv_len"]
        pages_before_kernel(target)(lengths, self._kv.pool.page_size, out=rivals)
        _scores(self._definition, types, target)(**arguments, out=self._scores)
        self._choose()
        return self.table

    def _tensor(self, name: str, array: Any) -> Packed:
        """An array (pages of the pool, …) as a tensor (requests, pages of the request, …)."""
        seen = named_view(name, array)
        check_view(name, seen, shape=(self._kv.pool.pages, *seen.shape[1:]))
        packed = self._rivals.tensor(array[:, None], longest=self._kv.table.width)
        return replace(packed, structure=self._structures.setdefault(seen.shape, packed.structure))

    def _on_host(self) -> None:
        """What kernels/select.cuh does."""
        source, page_size, pages = self._kv.table, self._kv.pool.page_size, self.table.width
        lengths = np.minimum(source.lengths(), source.width * page_size)
        last, most = np.maximum(-(-lengths // page_size) - 1, 0), float(np.finfo(np.float32).max)
        scores = to_host(self._scores).reshape(len(lengths), max(self.table.heads, 1), source.width)
        scores = np.nan_to_num(scores, nan=-np.inf, posinf=most, neginf=-np.inf)
        behind = np.arange(source.width) - last[:, None, None]
        scores = np.where(behind < 0, scores, np.where(behind == 0, np.inf, -np.inf))
        best = np.sort(np.argsort(-scores, -1, "stable")[..., :pages], -1)  # the last page: last
        entries = np.take_along_axis(source.host("table_entries")[:, None], best, -1)
        chosen, kept = (self.table.arrays[n] for n in ("table_entries", "kv_len"))
        chosen[:] = entries.reshape(chosen.shape)
        kept[:] = lengths - np.maximum(last - (pages - 1), 0) * page_size

    def _on_gpu(self) -> Callable[[], None]:
        """Launches kernels/select.cuh."""
        source, table, ordinal = self._kv.table, self.table, ordinal_of(self.table.device)
        heads = max(table.heads, 1)
        block = PARAMS.pack(
            scores=view(self._scores).pointer, kv_len=source.views["kv_len"].pointer,
            table_entries=source.views["table_entries"].pointer,
            chosen_len=table.views["kv_len"].pointer, chosen=table.views["table_entries"].pointer,
            width=source.width, pages=table.width, page_size=self._kv.pool.page_size, heads=heads,
        )  # fmt: skip
        ctas, names = heads * table.requests, {"entry": "choose_pages", "name": "select"}
        launch = launch_of(body(), ordinal, ctas, block, **names)
        return lambda: launch.run(cuda.current_stream(ordinal))


@functools.cache
def body() -> Body:
    """The kernel that chooses pages: a CTA a KV head of a request."""
    numbers = namespace("select", *constants({"THREADS": THREADS}))
    text, files = body_text("select.cuh", numbers, PARAMS.c_decl), ("gpu.cuh", "async.cuh")
    order = ("start", "wait", "run")
    return Body(text, "select::run", THREADS, RESIDENT, 0, files, *PARAMS.buffers, order=order)


@functools.cache
def _scores(scores: Any, types: tuple[tuple[str, Any, Any], ...], target: str) -> Kernel:
    """The kernel of scores for the dtype and shape of each argument."""
    typed = scores.typed(**{name: kind for name, kind, _ in types})
    tensors, coords = {t.name: t for t in typed.program.tensors}, _coords(typed.program)
    owners = (t for t in tensors.values() if t.structure == t.name)
    formats = {t.name: Table.format(1, len(t.dims)) for t in owners}
    pairs = (p for n, _, shape in types for p in zip(tensors[n].dims, shape, strict=False))
    varying = (coords[0].dim, coords[-1].dim)
    sizes = {d: n for d, n in pairs if isinstance(d, str) and d not in varying}

    def recipe(s: Schedule) -> Schedule:
        return scores.recipe(functools.reduce(lambda s, x: s.specialize(*x), sizes.items(), s))

    return typed.decompose(**formats).schedule(recipe).build(target)
