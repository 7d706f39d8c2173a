"""Plans: which worker does which part of a batch, as a frozen value.

A plan is for one family of kernels. Families of few query rows take *cuts* (`ranges.py`): the tiles
of the batch in one order, cut into contiguous ranges of equal cost. The others take *items*: some
queries of one request with one KV head; long stretches of keys are cut into chunks whose partial
results the last one merges, in order. A plan holds no lengths of keys: kernels read those from
memory, so a plan stays right when they grow, and only its balance ages.
"""

import heapq
import io
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np

from tilewright.attention import planner, ranges
from tilewright.attention import report as reports
from tilewright.attention.checks import rises
from tilewright.attention.planner import Shape
from tilewright.attention.ranges import CUT
from tilewright.attention.table import NODE, of_requests
from tilewright.errors import ArgumentError
from tilewright.runtime import cuda
from tilewright.runtime.layout import Struct

ITEM = Struct("Item", [(name, "int32") for name in (
    "request", "kv_head", "qo_begin", "qo_end", "chunk", "chunks", "slot", "counter",
)])  # fmt: skip
"""One work item; `request` is a node of the table where requests share keys. `qo_begin` … `qo_end`
are rows of q; `slot` is the first partial result of its chunks, `counter` the word in which they
count their arrival."""
ITEMS = (("items", "ptr", "const Item*"),)
"""The field of a kernel's parameters that has the items."""

MAX_WORKERS = 1 << 16
CHUNK_TILES = 8
"""The fewest tiles of keys in a chunk: merging its result then costs less than 2 % of making it."""

_NUMBERS = (
    "kv_heads", "qo_tile", "workers", "slots", "counters", "group", "block", "narrow",
)  # fmt: skip
_ARRAYS = {
    "items": ITEM.numpy, "qo_indptr": np.dtype(np.int32), "cuts": CUT.numpy, "nodes": NODE.numpy,
}  # fmt: skip
_LAYOUT = ITEM.version + CUT.version + NODE.version
_BATCH_CHUNK_TILES = 16  # the fewest where the batch decides: a GPU's item starts anew in a CTA
_NARROW_COST = 0.58  # of a tile of keys in an item of few rows, in such tiles of others
_LAST_TILES = 8  # that requests of a recorded step do not fill; it may have more rows for more
_ITEMS_PER_REQUEST = 64  # to aim at, where a request has keys enough: work for many threads


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


_NO_ITEMS, _NO_CUTS, _NO_NODES = (_frozen(np.zeros(0, s.numpy)) for s in (ITEM, CUT, NODE))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A frozen plan for `family`. `qo_indptr` (requests + 1); `items`: an array of `ITEM`, longest
    first, or `cuts`: an array of `ranges.CUT`; the other is empty.

    `qo_tile` is the most queries an item has; `slots` and `counters` size the work space; `workers`
    are threads or SMs; `imbalance` is the longest worker's estimated work over the mean. `longest`:
    the most queries of a request; `nodes`: an array of `NODE` where requests share keys, `group`:
    query heads of a KV head, which packs their rows; `block`: queries of an item of the launch in
    front that does shared keys; `narrow`: workers that begin with the items of few rows; `tensors`:
    what `on_device` has copied to GPUs; `batch`: what `report` needs. `tree`: levels of shared
    keys, rows of the table, and the query heads of a KV head.

    Kernels trust a plan, so one that was not planned here is checked when it is constructed (see
    `check`): by `load`, `dataclasses.replace`, `pickle` and the constructor. It keeps arrays of its
    own. `planned`: it comes from `make`, whose plans are right.
    """

    qo_indptr: np.ndarray
    kv_heads: int
    qo_tile: int
    workers: int
    family: str
    slots: int
    counters: int
    imbalance: float
    items: np.ndarray = field(default_factory=lambda: _NO_ITEMS)
    cuts: np.ndarray = field(default_factory=lambda: _NO_CUTS)
    nodes: np.ndarray = field(default_factory=lambda: _NO_NODES)
    group: int = 1
    block: int = 1
    narrow: int = 0
    batch: reports.Batch | None = field(default=None, repr=False)
    tensors: dict[int, tuple[Any, ...]] = field(default_factory=dict, init=False, repr=False)
    longest: int = field(default=0, init=False, repr=False)
    tree: tuple[int, int, int] = field(default=(0, 0, 0), init=False, repr=False)
    planned: InitVar[bool] = False

    def __post_init__(self, planned: bool) -> None:
        if not planned:
            _check_types(self)
            for name in _ARRAYS:
                object.__setattr__(self, name, _frozen(np.array(getattr(self, name))))
        queries = self.qo_indptr[1:] - self.qo_indptr[:-1]
        levels = int(self.nodes["level"].max(initial=-1)) + 1  # with that of the requests, if any
        tree = levels - bool(self.requests), len(self.nodes), self.group
        object.__setattr__(self, "longest", int(queries.max(initial=0)))
        object.__setattr__(self, "tree", tree)
        if not planned:
            check(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.load, (self.save(),)

    @property
    def requests(self) -> int:
        """How many requests it is for."""
        return len(self.qo_indptr) - 1

    @property
    def tokens(self) -> int:
        """How many queries, rows of q, all requests have together."""
        return int(self.qo_indptr[-1])

    @property
    def walks(self) -> bool:
        """Whether an item goes over the keys that its request shares with others too."""
        return bool(self.tree[0] and len(self.items) and (self.nodes["outer"] < 0).any())  # linked

    def report(self) -> reports.Report:
        """Balance, padding, bytes, predicted time, and why other families were refused. Raises
        ArgumentError[A103] for a plan that was loaded: it holds no lengths."""
        if self.batch is None:
            raise ArgumentError("A103", "a plan that was loaded holds no lengths", where="plan")
        return reports.report(self)

    def on_device(self, ordinal: int) -> tuple[Any, ...]:
        """`qo_indptr`, the work (items or cuts) and the nodes as int32 arrays on a GPU."""
        if ordinal not in self.tensors:
            work = (self.cuts if len(self.cuts) else self.items).view(np.int32)
            parts = (self.qo_indptr, work, self.nodes.view(np.int32))
            both = cuda.DeviceArray.from_numpy(np.concatenate(parts), ordinal=ordinal)
            ends = np.cumsum([0, *map(len, parts)]).tolist()
            self.tensors[ordinal] = tuple(both.rows(*ends[i : i + 2]) for i in range(3))
        return self.tensors[ordinal]

    def _key(self) -> tuple[Any, ...]:
        numbers = (getattr(self, name) for name in _NUMBERS)
        return (self.family, *numbers, *(getattr(self, name).tobytes() for name in _ARRAYS))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        parts = max(len(self.cuts) - 1, 0) or len(self.items)
        counts = {"request": self.requests, "part": parts, "worker": self.workers}
        many = ", ".join(f"{n} {noun}{'s' * (n != 1)}" for noun, n in counts.items())
        narrow = f" ({self.narrow} narrow)" if self.narrow else ""
        return f"Plan({self.family}): {many}{narrow}, imbalance {self.imbalance:.2f}"

    def save(self) -> bytes:
        """The plan as the bytes of an `.npz` file."""
        file = io.BytesIO()
        numbers = np.array([getattr(self, name) for name in _NUMBERS], np.int64)
        texts = {"layout": _LAYOUT, "family": self.family, "imbalance": self.imbalance}
        arrays = {name: getattr(self, name).view(np.int32) for name in _ARRAYS}
        np.savez(file, numbers=numbers, **{n: np.array(x) for n, x in texts.items()}, **arrays)
        return file.getvalue()

    @staticmethod
    def load(data: bytes) -> "Plan":
        """The plan that `save` wrote. Raises ArgumentError[A107, A109] for anything else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                fields = {name: file[name] for name in file.files}
            if str(fields["layout"]) != _LAYOUT:
                raise ValueError("another version of the layout")
            known: dict[str, Any] = {"family": str(fields["family"])}
            known |= zip(_NUMBERS, map(int, fields["numbers"].tolist()), strict=True)
            known |= {n: np.ascontiguousarray(fields[n]).view(x) for n, x in _ARRAYS.items()}
            known["imbalance"] = float(fields["imbalance"])
        except Exception as error:  # a damaged archive raises a dozen kinds
            raise ArgumentError("A107", f"these bytes are no plan: {error}", where="data") from None
        return Plan(**known)


# ---------------------------------------------------------------------------- planning


def make(
    qo_indptr: np.ndarray, kv_lengths: np.ndarray, shape: Shape, workers: int,
    nodes: np.ndarray | None = None, batch: reports.Batch | None = None,
) -> Plan:  # fmt: skip
    """Divide a batch among `workers`; `qo_indptr` (requests + 1), `kv_lengths` (nodes of the
    table), `nodes`: the tree where requests share keys; `batch`: for the plan's report.

    How a request is cut into items depends on nothing but the request: so do the bits of its
    results. Where cuts divide it, or chunks that fill the workers ("batch"), it depends on the
    batch and the workers.
    """
    indptr = _frozen(np.array(qo_indptr, np.int32))
    nodes = _frozen(of_requests(len(indptr) - 1) if nodes is None else nodes)
    args = indptr, nodes, kv_lengths, shape, workers
    if shape.ctas_per_worker:
        cuts, nodes, balance = planner.cut(*args)
        nodes = _frozen(nodes)
        work = {"cuts": _frozen(cuts), "imbalance": balance, "slots": 0, "counters": 0}
    else:
        if len(nodes) >= len(indptr) and not shape.splits:
            nodes = _frozen(ranges.linked(nodes, np.zeros(len(nodes), bool))[0])
        work = _items(indptr, nodes, *args[2:])
    return Plan(
        **work, qo_indptr=indptr, nodes=nodes, kv_heads=shape.kv_heads, qo_tile=shape.qo_tile,
        workers=workers, family=shape.family, group=shape.group, block=shape.block,
        batch=batch, planned=True,
    )  # fmt: skip


def _items(
    indptr: np.ndarray, nodes: np.ndarray, keys: np.ndarray, shape: Shape, workers: int
) -> dict[str, Any]:
    """The fields of a plan of items, longest first."""
    walks = not shape.splits
    first_row, last_row = _rows_of_nodes(indptr, nodes, walks)
    keys = keys + nodes["base"] * walks
    parts = node, begin, end = _row_tiles(first_row, last_row, shape.qo_tile)
    if len(keys) >= len(indptr) and not walks:  # what masks hide of shared keys is not counted
        visible = -(-keys[node] // ranges.TILE)
    else:
        first = keys[node] - (last_row[node] - begin)
        visible = planner.visible_tiles(first, first + (end - begin) - 1, keys[node], shape)
    cost = visible * ((end - begin) * shape.group + 4) + 4
    chunks = np.ones(len(node), np.int64)
    few = ((last_row - first_row) * shape.group <= shape.few)[node]
    narrow = 0
    if shape.splits == "batch":
        share = visible.sum() * shape.kv_heads / workers
        chunks = np.clip(visible / max(share, 1), 1, np.maximum(visible // _BATCH_CHUNK_TILES, 1))
        chunks = chunks.astype(np.int64)
        if few.any():
            narrow, last, pieces = _narrow(visible, chunks, few, shape.kv_heads, workers)
            shortest = np.argsort(visible + few * (visible.max() + 1), kind="stable")
            chunks[shortest[:last]] = pieces
    elif shape.splits:
        wanted = -(-_ITEMS_PER_REQUEST // (np.bincount(node)[node] * shape.kv_heads))
        chunks = np.clip(visible // CHUNK_TILES, 1, wanted)
    items, slots, counters = _chunked(parts, chunks, shape.kv_heads)
    work = np.repeat(cost / chunks, chunks * shape.kv_heads)
    order = np.argsort(-work, kind="stable")
    if shape.order is not None:
        order = shape.order(items, indptr, workers, shape.few // shape.group)
    return {
        "items": _frozen(items[order]), "slots": slots, "counters": counters, "narrow": narrow,
        "imbalance": _imbalance(work[order], workers),
    }  # fmt: skip


def _narrow(
    visible: np.ndarray, chunks: np.ndarray, few: np.ndarray, kv_heads: int, workers: int
) -> tuple[int, int, int]:
    """How many workers begin with the items of `few` rows: as many as these tiles are of all. Where
    the others have few items each, and alike, also the tiles of rows of their last round, and the
    pieces of each, so that it ends sooner."""
    own, wide = float(visible[few].sum()) * _NARROW_COST, visible[~few]
    most = min(int(chunks[few].sum()) * kv_heads, -(-workers // 2))
    narrow = min(max(round(workers * own / max(own + float(wide.sum()), 1)), 1), most)
    others = max(workers - narrow, 1)
    rounds, rest = divmod(len(wide) * kv_heads, others)
    alike = len(wide) and chunks.max() == 1 and wide.max() < 2 * wide.min()
    if not alike or not 0 < rounds < 8:
        return narrow, 0, 1
    last = -(-rest // kv_heads)
    pieces = min((1, 2, 3, 4), key=lambda n: -(-last * kv_heads * n // others) / n)
    return narrow, last, pieces


def _rows_of_nodes(
    indptr: np.ndarray, nodes: np.ndarray, walks: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The first row of q of each node and the one behind its last, int64. `walks`: items of a
    request go over the keys that it shares too, so that shared nodes have no rows of their own."""
    rows = indptr.astype(np.int64)
    first, last, shared = rows[nodes["begin"]], rows[nodes["end"]], len(nodes) - len(indptr) + 1
    last[: shared * walks] = first[: shared * walks]
    return first, last


def _counted(counts: np.ndarray) -> np.ndarray:
    """0 … n − 1 for each n of `counts`, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _row_tiles(first: np.ndarray, last: np.ndarray, qo_tile: int) -> tuple[np.ndarray, ...]:
    """The rows of each node cut into tiles: node, first row and the row behind the last."""
    tiles = -(-(last - first) // qo_tile)
    node = np.repeat(np.arange(len(tiles)), tiles)
    begin = first[node] + _counted(tiles) * qo_tile
    return node, begin, np.minimum(begin + qo_tile, last[node])


def _chunked(
    parts: tuple[np.ndarray, ...], chunks: np.ndarray, kv_heads: int
) -> tuple[np.ndarray, int, int]:
    """The items of tiles of rows, by tile, KV head and chunk, with the partial results and the
    counters that they need; `chunks` of each tile."""
    node, begin, end, chunks = (np.repeat(x, kv_heads) for x in (*parts, chunks))
    kv_head, cut = np.tile(np.arange(kv_heads), len(parts[0])), chunks > 1
    slots, counters = np.cumsum(chunks * cut), np.cumsum(cut)
    columns = {
        "request": node, "kv_head": kv_head, "qo_begin": begin, "qo_end": end, "chunks": chunks,
        "slot": (slots - chunks) * cut, "counter": (counters - 1) * cut,
    }  # fmt: skip
    items = np.zeros(chunks.sum(), ITEM.numpy)
    items["chunk"] = _counted(chunks)
    for name, column in columns.items():
        items[name] = np.repeat(column, chunks)
    return items, int(chunks[cut].sum()), int(cut.sum())


def _imbalance(work: np.ndarray, workers: int) -> float:
    """Longest over mean when each item, longest first, goes to whoever is free."""
    if not len(work):
        return 1.0
    loads = [0.0] * workers
    for w in work.tolist():
        heapq.heapreplace(loads, loads[0] + w)
    return max(loads) * workers / float(work.sum())


@dataclass(frozen=True, slots=True)
class StepPlans:
    """Plans for recorded steps of some `rows`, whose work the host writes before each run: `plan`
    is what attention is bound with, `work` the int32 words of its memory. `requests`: rows of the
    table; `most`: rows of a step; `gpu`: its number, -1 for a CPU."""

    shape: Shape
    requests: int
    most: int
    workers: int
    gpu: int

    def items(self, rows: int) -> int:
        """Of a step: for tiles, of which requests do not fill some, and for chunks of keys."""
        tiles = rows // self.shape.qo_tile + (self.requests if rows >= self.most else _LAST_TILES)
        return tiles * self.shape.kv_heads + self.workers * bool(self.shape.splits)

    def words(self, rows: int) -> int:
        """How many a step's work has: `qo_indptr`, then the items."""
        return self.requests + 1 + self.items(rows) * (ITEM.size // 4)

    def left(self, rows: int, qo_indptr: np.ndarray) -> int:
        """Items of a step that are left for chunks, below 0 where the requests do not fit."""
        tiles = int((-(-np.diff(qo_indptr) // self.shape.qo_tile)).sum())
        return self.items(rows) - tiles * self.shape.kv_heads

    def plan(self, rows: int, tokens: int, words: Any) -> Plan:
        """The plan of a step; `tokens`: rows of q; `words`: the memory of its work, which the host
        writes: unlike other plans it changes, and is not to be saved."""
        shape, end, chunks = self.shape, self.requests + 1, self.workers * bool(self.shape.splits)
        indptr, items = np.zeros(end, np.int32), np.zeros(self.items(rows), ITEM.numpy)
        if self.gpu < 0:
            indptr, items = words[:end], words[end:].view(ITEM.numpy)
        indptr[-1] = tokens
        plan = Plan(
            indptr, shape.kv_heads, shape.qo_tile, self.workers, shape.family, chunks, chunks, 1.0,
            items, nodes=of_requests(self.requests), group=shape.group, planned=True,
        )  # fmt: skip
        if self.gpu >= 0:
            plan.tensors[self.gpu] = words.rows(0, end), words.rows(end, words.shape[0]), None
        return plan

    def work(self, rows: int, qo_indptr: np.ndarray, keys: np.ndarray, first: int) -> np.ndarray:
        """The words of a step whose requests are rows of the table from `first` on. The row behind
        them has no keys: items that are left over are of that, and of no query. Raises
        ArgumentError[A103] where the step has no room for the batch."""
        count, left = len(keys), self.left(rows, qo_indptr)
        if first + count >= self.requests or left < 0:
            raise ArgumentError("A103", f"a step of {rows} rows has no room for {count} requests")
        indptr = np.zeros(self.requests + 1, np.int32)
        indptr[first : first + count], indptr[first + count :] = qo_indptr[:-1], qo_indptr[-1]
        workers = max(1, min(self.workers, left))
        own = _items(qo_indptr, of_requests(count), keys, self.shape, workers)["items"]
        items = np.zeros(self.items(rows), ITEM.numpy)
        items["request"], items["chunks"] = count, 1
        items["qo_end"] = items["chunk"] = self.gpu < 0  # there: of a chunk that does not exist
        items[: len(own)] = own
        items["request"] += first
        return np.concatenate([indptr, items.view(np.int32)])


# ---------------------------------------------------------------------------- checking


def _require(holds: Any, reason: str) -> None:
    """Refuse a plan of which something does not hold. Raises A109."""
    if not holds:
        raise ArgumentError("A109", f"the plan is damaged: {reason}", where="plan")


def _check_types(plan: Plan) -> None:
    """The fields are what they are annotated as. Raises A109."""
    for name, dtype in _ARRAYS.items():
        array = getattr(plan, name)
        is_array = isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == 1
        _require(is_array, f"{name} is no array of {dtype}")
    for name in _NUMBERS:
        kind = type(getattr(plan, name))
        _require(kind is int, f"{name} is a {kind.__name__}, not an int")
    named = type(plan.family) is str and isinstance(plan.imbalance, float)
    _require(named, f"family={plan.family!r}, imbalance={plan.imbalance!r}")


def check(plan: Plan) -> None:
    """Every query of every KV head is done exactly once, within bounds. Raises A109."""
    indptr, items = plan.qo_indptr, plan.items
    _require(len(indptr) and indptr[0] == 0 and rises(indptr), "qo_indptr does not rise from 0")
    limits = (plan.kv_heads, plan.qo_tile, plan.workers, plan.group, plan.block, plan.narrow + 1)
    _require(min(limits) >= 1 and max(limits) < 2**31, "its numbers are out of range")
    _require(_is_tree(plan.nodes, plan.requests), "its nodes are no tree of the requests")
    first, last = _rows_of_nodes(indptr, plan.nodes, plan.walks)
    units = np.full(len(first), plan.kv_heads // ranges.head_block(plan.kv_heads))
    if plan.tree[0] and (len(plan.cuts) or plan.walks):
        own, chunks = np.arange(len(first)) >= len(first) - plan.requests, plan.nodes["chunks"]
        wanted = ranges.linked(plan.nodes, chunks > 0)[0]
        numbers = ranges.numbers(plan.nodes, last - first, plan.kv_heads, plan.block)
        fits = (wanted == plan.nodes).all() and (chunks >= 0).all() and not chunks[own].any()
        fits = fits and (numbers == [plan.nodes["item"], plan.nodes["row"]]).all()
        _require(fits, "its nodes are not linked, or their items not numbered")
        units *= own & (last > first)
    _require(ranges.is_sound(plan.cuts, units), "its cuts do not cover the batch")
    if not len(items):
        return _require(not plan.tokens or len(plan.cuts), "it has no work")
    tiles = int((-(-(last - first) // plan.qo_tile)).sum())
    _require(tiles * plan.kv_heads <= len(items), "some queries are of no item")
    parts = _row_tiles(first, last, plan.qo_tile)
    ordered = items[np.lexsort([items[n] for n in ("chunk", "kv_head", "qo_begin", "request")])]
    chunks = ordered["chunks"][ordered["chunk"] == 0][:: plan.kv_heads].astype(np.int64)
    fits = len(chunks) == len(parts[0]) and chunks.min() > 0
    fits = fits and chunks.sum() * plan.kv_heads == len(items)
    _require(fits, "its items do not have all chunks of all queries")
    wanted, *sizes = _chunked(parts, chunks, plan.kv_heads)
    fits = (wanted == ordered).all() and sizes == [plan.slots, plan.counters]
    _require(fits, "its items do not do each query once, with partial results of their own")


def _is_tree(nodes: np.ndarray, requests: int) -> bool:
    """Whether each level divides the requests, and the last has one node for each of them."""
    begin, end, level, base = (nodes[n].astype(np.int64) for n in ("begin", "end", "level", "base"))
    steps, first = np.diff(level, prepend=0), np.diff(level, prepend=-1) != 0  # nodes of a level
    own = int((level == level.max(initial=-1)).sum())
    gaps = level[:1].any() or (steps > 1).any()  # levels without nodes, as above no requests
    if (steps < 0).any() or (base < 0).any() or (requests and (gaps or own != requests)):
        return False
    last, before = np.append(first[1:], True)[: len(first)], np.append(0, end)[:-1]
    covers = (begin == np.where(first, 0, before)) & (begin <= end) & ((end == requests) | ~last)
    return bool(covers.all() and (begin[len(begin) - requests :] == np.arange(requests)).all())
