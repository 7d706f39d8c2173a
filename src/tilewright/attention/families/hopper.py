"""The Hopper family: prefill by wgmma and TMA on sm_90a.

Template: kernels/prefill_hopper.cuh. Items have up to 128 packed rows; persistent CTAs draw them in
the order of the plan."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.attention.families.family import Call, Family, Prepared, check_alignment, refusal
from tilewright.attention.plan import ITEM, Plan
from tilewright.attention.pool import Pool
from tilewright.attention.ranges import ROWS
from tilewright.attention.spec import PARTIALS, Spec, constants, cuda_text, namespace
from tilewright.attention.spec import params_struct as common_params
from tilewright.attention.table import MAX_KEYS
from tilewright.attention.tracing import SCORE
from tilewright.errors import ArgumentError
from tilewright.ir.body import Body
from tilewright.ir.nodes import Binary, Cast, Const, Expr, Load, Unary, Var, binary
from tilewright.ir.rewrite import all_of, conjuncts, walk
from tilewright.runtime import cuda
from tilewright.runtime.cuda import tensor_map
from tilewright.runtime.layout import Struct
from tilewright.runtime.view import ordinal_of, view

ARCH = "sm_90a"
MAX_GROUP = 64
NARROW_ROWS = 8  # packed rows of a narrow item, at most: the columns of a tensor core's result
IN_PAGES, IN_ROWS, IN_ONE = 0, 1, 2  # where the keys of a request lie
_LISTS = ("items", "item_count", "narrow_count", "narrow_ctas")  # parameters of a plan's items
SCAN = 256  # elements of a tensor that a kernel reads to learn the class of a tile
_TAIL = 4  # items of a CTA that are drawn in the order of their keys
_SHORT = 512  # queries of a request up to which its items follow each other always


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel divides its work: warpgroups that consume, 64 packed rows of an item each; keys
    of a tile; tiles of Q, of K and of V in shared memory; tiles that the scheduler sorts at once.
    With more tiles of Q than one queries arrive early, and outputs pass through them."""

    groups: int = 2
    keys: int = 128
    q: int = 2
    k: int = 2
    v: int = 2
    segment: int = 512


TILES = {  # by head_dim and head_dim_vo
    (64, 64): Tiles(groups=3, keys=96, q=3),
    (96, 96): Tiles(q=3, segment=96),
    (128, 128): Tiles(q=3, segment=96),
    (192, 128): Tiles(keys=96),
    (256, 256): Tiles(keys=64, q=1),
}


@functools.lru_cache(256)
def tiles_of(spec: Spec) -> Tiles:
    tiles = TILES.get((spec.head_dim, spec.head_dim_vo), Tiles())
    return Tiles() if tiles.segment < 512 and key_array(spec) else tiles  # extremes take room


def rows_of(spec: Spec) -> int:
    """The most packed rows of an item: BM of prefill_hopper.cuh."""
    return tiles_of(spec).groups * 64


def refuses(spec: Spec, rows: int, pool: Pool | None, arch: str = "") -> str:
    """Why the kernel cannot run a call, or ""; `arch`: of the GPU ("": that of the pool). Without a
    pool its strides are assumed."""
    if reason := refusal(spec, rows, pool):
        return reason
    if (spec.head_dim, spec.head_dim_vo) not in TILES:
        return f"head_dim and head_dim_vo are none of {', '.join(map(str, TILES))}"
    if spec.table.shared and not forms(spec)[0]["PLAIN"]:
        return "rows of a tile are of several requests, which the mask or logits tell apart"
    if spec.group > MAX_GROUP:
        return f"{spec.group} query heads share a KV head, more than {MAX_GROUP}"
    if not spec.ascending:
        return "sm_scale is not positive"
    arch = arch or (cuda.device(ordinal_of(pool.device)).arch if pool else "")
    if not arch:
        return "the strides and the GPU are not known: plan with the cache, not with its table"
    if arch != ARCH or pool is None:
        return "" if arch == ARCH else f"the GPU is {arch}, not {ARCH}"
    if spec.table.table_entries and pool.page_size & (pool.page_size - 1):
        return f"page_size {pool.page_size} is no power of two"
    strides = (*pool.k.strides[:3], *pool.v.strides[:3])
    if min(strides) < 0:
        return "k or v has a negative stride"
    if spec.table.table_entries and pool.page_size < 8 and max(strides) >> 31:
        return "pages below 8 rows have strides of 4 GiB or more"
    return "" if pool.pages else "the cache has no pages"


def order(items: np.ndarray, qo_indptr: np.ndarray, workers: int, few: int) -> np.ndarray:
    """The order in which CTAs draw the items of a batch, as indices; `few`: the most queries of a
    request whose items are narrow.

    Requests with many queries come first. Within one, the items of a KV head follow each other, so
    that CTAs read the same keys at the same time; the last queries first: under a causal mask they
    see the most keys. The last few items of each CTA that are not narrow are sorted by that number
    over requests and heads, so that none of them ends long after the others; not those of short
    requests, which would read a long cache once for each of their items.
    """
    indptr = np.asarray(qo_indptr, np.int64)
    request, head = items["request"], items["kv_head"]
    begin, queries = items["qo_begin"] - indptr[request], np.diff(indptr)[request]
    by = np.lexsort((-begin, head, request, -queries))
    unit = items[["request", "kv_head"]][by]
    tail = max(0, int((queries > few).sum()) - _TAIL * workers)
    tail = int(np.argmax(unit == unit[tail])) if tail else 0  # whole units
    key = np.where(queries > _SHORT, -begin, 1)
    by[tail:] = by[tail:][np.argsort(key[by[tail:]], kind="stable")]
    return by


# ---------------------------------------------------------------------------- the kernel


def threads(spec: Spec, box: int) -> int:
    """Threads of a CTA: THREADS of prefill_hopper.cuh."""
    groups = tiles_of(spec).groups
    loaders = 3 if box < 8 and groups == 2 and spec.head_dim_vo <= 128 else 1  # of K, and of V
    return ((2 * loaders + 2) // 4 + groups) * 128


def smem_bytes(spec: Spec, narrow: bool = False) -> int:
    """Dynamic shared memory of a CTA: SMEM_BYTES of prefill_hopper.cuh."""
    tiles = tiles_of(spec)
    k, v = (-(-n // 64) * 128 for n in (spec.head_dim, spec.head_dim_vo))  # bytes of a row
    rows = tiles.q * rows_of(spec) * k + tiles.keys * (tiles.k * k + tiles.v * v)
    rows += rows_of(spec) * 128 * (tiles.q == 1)  # outputs on their way
    barriers = 2 * tiles.k + 3 * tiles.v + 2 * tiles.q + 4
    rows += 8 * tiles.segment * bool(key_array(spec))  # extremes of its elements
    return rows + 2 * (22 + tiles.segment) * 4 + barriers * 8 * (1 + narrow) + 1024


def params_struct(spec: Spec) -> Struct:
    """The parameters of the kernel: the tensor maps first, a multiple of 64 bytes in all."""
    maps = tuple((f"{name}_map", "uint64[16]") for name in "qkvo")
    work: tuple[tuple[str, ...], ...] = (
        ("items", "ptr", "const Item*"), ("counter", "ptr", "int32_t*"),
        ("cycles", "ptr", "int64_t*"), ("item_count", "int32"), ("page_shift", "int32"),
        ("narrow_count", "int32"), ("narrow_ctas", "int32"), ("ctas", "int32"), *PARTIALS[:2],
    )  # fmt: skip
    rest = -common_params(spec, work, maps).size % 64
    padding = (("padding", f"uint64[{rest // 8}]"),) if rest else ()
    return common_params(spec, work, (*maps, *padding), 64)


def keys_lie(spec: Spec) -> int:
    """How the loaders find the keys of a request."""
    if spec.table.table_entries:
        return IN_PAGES
    return IN_ROWS if spec.table.table_indptr else IN_ONE


def box_keys(spec: Spec, page_size: int) -> int:
    """Keys of a TMA box: a tile, or as much of one as a page holds."""
    keys = tiles_of(spec).keys
    return math.gcd(page_size, keys) if keys_lie(spec) == IN_PAGES else keys


ONE, ZERO, LAST = Const(1.0, dtypes.float32), *(Const(x, dtypes.int32) for x in (0, 2**31 - 1))
REQUEST = Var("at.request", dtypes.int32)
_KEYS = {"at.kv", "at.key", "s"}  # what differs between the keys of a row


def forms(spec: Spec) -> tuple[dict[str, int], dict[str, Expr]]:
    """Constants and methods of what a kernel computes beside its products (prefill_hopper.cuh): a
    score or outer · tanh(score / inner), plus slope · (key − row); keys up to a row's limit, behind
    its newest − width. Others are computed as they are written, with nothing under way."""
    e, outer, inner, slope, distance = spec.traced.logits, ONE, ONE, ONE, ZERO
    lies, below, uppers, rest, newest, width = not spec.table.kv_base, [], [], [], ZERO, ZERO
    match e:
        case Binary("+", x, Binary("*", a, Cast(Binary("-", Var("at.kv" | "at.key"), row) as d))):
            if lies and _KEYS.isdisjoint(_names(a) | _names(row)):
                e, slope, distance = x, a, d
    match e:
        case Binary("*", a, Unary("tanh", Binary("/", x, b))):
            if x == SCORE and not _names(a) | _names(b):
                e, outer, inner = x, a, b
    for x in conjuncts(spec.traced.mask):
        match x:
            case Binary("<=", Var("at.kv" | "at.key"), b) if lies and _KEYS.isdisjoint(_names(b)):
                below.append(x)
                uppers.append(b)
            case Binary("<", Binary("-", a, Var("at.kv" | "at.key")), b) if (
                lies and width is ZERO and _KEYS.isdisjoint(_names(a) | _names(b))
            ):
                below.append(x)
                newest, width = a, b
            case _:
                rest.append(x)
    limit = functools.reduce(functools.partial(binary, "min"), uppers or [LAST])
    numbers = {
        "DIRECT": e == SCORE, "BENDS": outer is not ONE, "RESTS": rest != [],
        "TRAILS": width is not ZERO, "LEANS": e == SCORE and distance is not ZERO,
        "PLAIN": e == SCORE and distance is ZERO and width is ZERO and not rest,
        "READS": any(x.index for x in walk(spec.traced.mask, Load)),
        "BY_HEAD": "at.qo_head" in _names(spec.traced.mask),
    }  # fmt: skip
    return {name: int(x) for name, x in numbers.items()}, {
        "float inner()": inner, "float outer()": outer, "float slope(const At& at)": slope,
        "int distance(const At& at)": distance, "int limit(const At& at)": limit,
        "int newest(const At& at)": newest, "int width(const At& at)": width,
        "bool below(const At& at)": all_of(below), "bool rest(const At& at)": all_of(rest),
    }  # fmt: skip


def key_array(spec: Spec) -> str:
    """The first integer tensor by key that the mask reads, or "": its extremes are learnt. None
    where a tile has rows of several requests."""
    found = (x for x in walk(spec.traced.mask, Load) if len(x.index) == 2)
    names = (x.buffer.name for x in found if x.dtype == dtypes.int32 and x.index[0] == REQUEST)
    return "" if spec.table.shared else next(names, "")


def _names(e: Expr) -> set[str]:
    return {x.name for x in walk(e, Var)}


@functools.lru_cache(256)
def body(spec: Spec, box: int, chunked: bool = False, narrow: bool = False) -> Body:
    """One kernel; `box`: keys of a TMA box; `chunked`: items may be chunks, `narrow`: some may be
    narrow. Its units are CTAs that all run at once, one an SM."""
    tiles, (numbers, methods) = tiles_of(spec), forms(spec)
    numbers |= {
        "DK": spec.head_dim, "DV": spec.head_dim_vo, "G": spec.group, "BN": tiles.keys, "BOX": box,
        "CONSUMERS": tiles.groups,
        "IN_PAGES": IN_PAGES, "IN_ROWS": IN_ROWS, "KEYS_LIE": keys_lie(spec), "Q_TILES": tiles.q,
        "K_STAGES": tiles.k, "V_STAGES": tiles.v, "MAX_TILES": tiles.segment, "MAX_KEYS": MAX_KEYS,
        "CHUNKED": int(chunked), "NARROW": int(narrow), "EXTREMES": int(key_array(spec) != ""),
        "MOST_QUERIES": max(1, ROWS // spec.group),
    }  # fmt: skip
    kinds = f"using Kind = tw::{spec.kv.name}_bits;"
    out = f"using Out = {'float' if spec.table.shared or spec.o.itemsize > 2 else 'uint16_t'};"
    text = namespace("attention", *constants(numbers), kinds, out)
    macros = {"TW_SCAN": SCAN} | ({"KEY_ARRAY": f"v_{array}"} if (array := key_array(spec)) else {})
    params, size = params_struct(spec), threads(spec, box)
    text = cuda_text(spec, text, ITEM, params, "prefill_hopper.cuh", macros, **methods)
    return Body(
        text, "attention::run", size, size, smem_bytes(spec, narrow),
        ("gpu.cuh", "mma.cuh", "async.cuh", "hopper.cuh"), *params.buffers, 1 + 2 * narrow,
        order=("wait", "start", "run") if spec.table.shared else ("run",), ctas=1, alone=True,
    )  # fmt: skip


def maps(spec: Spec, values: dict[str, Any], tokens: int) -> dict[str, list[int]]:
    """The tensor maps of q, k, v and o as the parameters hold them."""
    words = {f"{name}_map": [0] * 16 for name in "qkvo"}
    if not tokens:  # nothing is launched, and there are no maps of empty arrays
        return words
    group, heads, kv_heads = spec.group, values["qo_heads"], values["kv_heads"]
    shape, strides = (spec.head_dim, heads, tokens), (values["q_head"], values["q_token"])
    box = (64, group, rows_of(spec) // group)
    words["q_map"] = tensor_map(values["q"], spec.q, shape, strides, box)
    if spec.o == spec.q and 16 % group == 0:  # the 16 rows of a warp are whole queries
        dim = spec.head_dim_vo
        strides, box = (dim, heads * dim), (64, group, 16 // group)
        words["o_map"] = tensor_map(values["o"], spec.o, (dim, heads, tokens), strides, box)
    for name, dim in (("k", spec.head_dim), ("v", spec.head_dim_vo)):
        page, slot, head = (values[f"{name}_{n}"] for n in ("page", "slot", "head"))
        rows, pages = values["page_size"], values["pages"]
        if keys_lie(spec) == IN_ROWS:
            rows, pages, slot, page = pages, 1, page, 8
        box = (64, box_keys(spec, values["page_size"]), 1, 1)
        shape = (dim, rows, kv_heads, pages)
        words[f"{name}_map"] = tensor_map(values[name], spec.kv, shape, (slot, head, page), box)
    return words


def _lists(spec: Spec, plan: Plan) -> tuple[int, int]:
    """How many items come in front of the narrow ones, and how many CTAs begin with those."""
    wide = np.diff(plan.qo_indptr)[plan.items["request"]] * spec.group > NARROW_ROWS
    count = int(wide.sum())
    hosts = tiles_of(spec).keys == 128 and wide[:count].all()
    return (count, min(plan.narrow, len(wide) - count)) if hosts and plan.narrow else (len(wide), 0)


def _prepare(call: Call) -> Prepared:
    spec, plan, ordinal, values = call.spec, call.plan, call.ordinal, call.values
    assert isinstance(plan, Plan)  # a workspace is of the decode family
    check_alignment(values, 16)
    if min(values["q_token"], values["q_head"]) < 0:
        raise ArgumentError("A104", "q has a negative stride", where="q", hint="a contiguous copy")
    indptr, items, _ = plan.on_device(ordinal)
    floats = plan.slots * rows_of(spec) * (spec.head_dim_vo + 8)
    counts = 2 + 4 * tiles_of(spec).groups * plan.counters
    partials, counters = call.scratch.grown(call.like, floats, counts)
    sms, memory = cuda.device(ordinal).sms, (partials, counters)
    wide, narrow = _lists(spec, plan)
    work = {"qo_indptr": indptr.pointer, "items": items.pointer, "item_count": wide}
    work |= {"narrow_count": len(plan.items) - wide, "narrow_ctas": min(narrow, sms)}
    addresses = (view(x).pointer for x in memory)
    keep = indptr, items, counters, partials
    return _prepared(call, min(wide + narrow, sms), work, *addresses, keep=keep)


def _prepared(
    call: Call, ctas: int, work: dict[str, int], *memory: int, keep: Any = ()
) -> Prepared:
    """A launch of a call; `memory`: partial results, and counters."""
    spec, values, plan, struct = call.spec, call.values, call.plan, params_struct(call.spec)
    page_size, shared = values["page_size"], spec.table.shared > 0
    padding = {f.name: [0] * f.count for f in struct.fields if f.name == "padding"}
    block = struct.pack(
        **values, **maps(spec, values, plan.tokens), **padding, **work, partials=memory[0],
        counter=memory[1], counters=memory[1] + 8, page_shift=page_size.bit_length() - 1, cycles=0,
        ctas=ctas,
    )  # fmt: skip
    chunked = not isinstance(plan, Plan) or shared or plan.slots > 0
    b = body(spec, box_keys(spec, page_size), chunked, work["narrow_ctas"] > 0)
    return Prepared.on_gpu(b, call.ordinal, ctas, block, keep)


def shared_launch(call: Call, ctas: int, work: dict[str, int]) -> Any:
    """The launch that does shared keys in front of the decode kernel of a call, whose own part of
    the parameters is `work`; None where the plan is not for it, or q or the cache are not."""
    at, *strides = (call.values[n] for n in ("q", "q_token", "q_head"))
    aligned = min(strides) >= 0 and not any(a % 16 for a in (at, *(2 * n for n in strides)))
    planned = call.plan.block == rows_of(call.spec) // call.spec.group
    if not (aligned and planned) or refuses(call.spec, 0, call.pool):
        return None
    items = {n: work[n] for n in ("qo_indptr", "nodes")} | dict.fromkeys(_LISTS, 0)
    return _prepared(call, ctas, items, work["states"], work["arrivals"]).launch


FAMILY = Family(
    "hopper", "cuda", rows_of, "batch", None, refuses, _prepare, order,
    few=lambda spec: NARROW_ROWS * (tiles_of(spec).keys == 128),
)  # fmt: skip
