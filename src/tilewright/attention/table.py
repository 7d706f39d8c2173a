"""Page tables: how many keys each request has, and which pages of a pool hold them.

One table describes one step of a model and is used by all of its layers. A `Pool` holds the pages
of one layer, and `KV` is a table with a pool. Key t of request r is slot t % page_size of the page
whose number is entry t // page_size of the request. Entries beyond the request's last key are never
read. `Table`, `Table.csr`, `Table.ragged` and `Table.dense` are the forms of a table.

Requests that share keys (a cascade): with `shared=[indptr, …]` the rows of the table are nodes of a
tree. Those of the outermost level come first, then those of each further level, then one row for
each request, with the keys that are its own. Node i of a level has keys that requests indptr[i] …
indptr[i + 1] − 1 share; each level divides the nodes of the one before. The keys of a request are
those of its nodes, one behind the other, as if they stood in one row.

Arrays are not copied: kernels read the caller's memory, so the next run uses what it then holds.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.attention.checks import check_range, check_view, integer_view, rises
from tilewright.errors import ArgumentError
from tilewright.ir.levels import integer
from tilewright.runtime.layout import Struct
from tilewright.runtime.transfer import to_host
from tilewright.runtime.view import View, named_view
from tilewright.sparse import entries
from tilewright.sparse.formats import Format
from tilewright.sparse.pack import Packed, Part, Structure
from tilewright.sparse.structured import paged

_FIELDS = ("begin", "end", "base", "level", "outer", "joined", "chunks", "item", "row")
NODE = Struct("Node", [(name, "int32") for name in _FIELDS])
"""A row of a table: requests begin … end − 1 have its keys behind `base` others; `outer` and all
behind it are a plan's (see table.h)."""

MAX_KEYS = 2**31 - 128
"""The most keys of a request: positions are int32, and so is the end of the last tile."""


@dataclass(frozen=True, slots=True)
class TableForm:
    """What a kernel is compiled for: the dtype of each array of a table, "" where it is absent."""

    kv_len: str = "int32"
    table_indptr: str = ""
    table_rows: str = ""
    table_entries: str = "int32"
    qo_base: str = ""
    kv_base: str = ""
    kv_stride: str = ""
    shared: int = 0  # levels of shared keys
    by_head: bool = False  # whether each KV head has entries of its own

    def for_planner(self) -> "TableForm":
        """The form with nothing but what decides lengths."""
        return TableForm(self.kv_len, self.table_indptr, table_entries="", shared=self.shared)

    def param_fields(self) -> list[tuple[str, ...]]:
        """The fields of a kernel's parameters: one pointer for each array, and the sizes."""
        pointers = [(n, "ptr", f"const {getattr(self, n) or 'int32'}_t*") for n in _NAMES]
        sizes = [(n, "int64") for n in ("table_limit", "table_width", "table_stride")]
        sizes += [("table_head", "int64")] if self.by_head else []
        tree = [("nodes", "ptr", "const void*"), ("shared_nodes", "int64")] if self.shared else []
        return [*pointers, *tree, *sizes]

    def c_text(self) -> str:
        """The constants that kernels/table.h reads."""
        flags = {
            "LENGTHS": self.kv_len, "INDPTR": self.table_indptr, "ROWS": self.table_rows,
            "ENTRIES": self.table_entries, "QUERY_POSITIONS": self.qo_base,
            "KEY_POSITIONS": self.kv_base, "BY_HEAD": self.by_head,
        }  # fmt: skip
        values = ", ".join(f"{n} = {str(bool(v)).lower()}" for n, v in flags.items())
        lines = (f"constexpr bool {values};", f"constexpr int LEVELS = {self.shared + 1};")
        return "\n".join(("namespace table {", *lines, "}  // namespace table"))


_NAMES = tuple(TableForm.__dataclass_fields__)[:-2]  # of the arrays of a table


@dataclass(frozen=True, init=False, eq=False)
class Table:
    """The page table of a batch. `arrays` holds the caller's arrays by name, `views` their views.

    `limit`: the number of entries of a CSR table, else of rows; `width`: entries in a row;
    `stride`: distance between the starts of two rows, in entries; `heads`: KV heads with entries of
    their own, `head_stride` entries from one to the next; 0 where all have the same. `form` selects
    the kernels.
    `nodes`: rows of the table, more than `requests` where these share keys.
    """

    nodes: int
    requests: int
    device: str
    form: TableForm
    limit: int
    width: int
    stride: int
    heads: int
    head_stride: int
    views: dict[str, View]
    arrays: dict[str, Any]

    def __init__(
        self, kv_len: Any, block_table: Any, *, rows: Any = None, **positions: Any
    ) -> None:
        """A padded table.

        `kv_len` (requests,), `block_table` (requests, width), or (requests, kv_heads, width) where
        each KV head has pages of its own (of the same lengths), or, with `rows` (requests,), any
        number of rows of which request r has row rows[r]; int32 or int64, the rows of `block_table`
        any stride apart. `positions`: `qo_base` (requests,), the position of each request's first
        query (None: its last query has the position of its last key); with it `kv_base` and
        `kv_stride` (requests,): key t has position kv_base + kv_stride · t; int32. Or `shared`: for
        each level of shared keys an indptr over requests, int32; then `kv_len` and the rows of the
        table are those of nodes (see above).
        Raises ArgumentError (A101 … A109). Contents of device arrays are not looked at: kernels
        clamp them.
        """
        lengths = integer_view("kv_len", kv_len)
        device, requests = lengths.device, lengths.size
        ndim = 3 if named_view("block_table", block_table).ndim == 3 else 2
        entries = integer_view("block_table", block_table, ndim, device=device)
        height, *heads, width = entries.shape
        if rows is None and height != requests:
            text = f"block_table has {height} rows, kv_len {requests} requests"
            hint = "rows=… names the row of each request"
            raise ArgumentError("A103", text, where="block_table", hint=hint)
        if heads == [0]:
            raise ArgumentError("A103", "block_table has 0 KV heads", where="block_table")
        found = {"kv_len": (kv_len, lengths), "table_entries": (block_table, entries)}
        if rows is not None:
            found["table_rows"] = rows, integer_view("rows", rows, device=device, size=requests)
            if device == "cpu":
                check_range("rows", to_host(rows), 0, height - 1)
        stride = entries.strides[0] if height > 1 else width
        by_head = (heads[0], entries.strides[1]) if heads else (0, 0)
        self._set(requests, found, (height, width, stride, *by_head), positions)

    @classmethod
    def csr(cls, kv_len: Any, kv_indptr: Any, kv_indices: Any, **positions: Any) -> "Table":
        """Request r has the pages kv_indices[kv_indptr[r] … kv_indptr[r + 1] − 1].

        `kv_len` (requests,), `kv_indptr` (requests + 1), `kv_indices`: int32 or int64. Entries from
        kv_indptr[-1] on, and those behind a request's last key, are never read. `positions`: see
        `Table`. Raises ArgumentError (A101 … A109).
        """
        lengths = integer_view("kv_len", kv_len)
        indptr = integer_view("kv_indptr", kv_indptr, device=lengths.device)
        indices = integer_view("kv_indices", kv_indices, device=lengths.device)
        check_view("kv_len", lengths, shape=(_requests(indptr),), hint="one a request")
        if lengths.device == "cpu":
            _check_indptr(to_host(kv_indptr), indices.size, "kv_indices")
        found = {"kv_len": (kv_len, lengths), "table_indptr": (kv_indptr, indptr)}
        found["table_entries"] = kv_indices, indices
        sizes = (indices.size, 0, 0, 0, 0)
        return object.__new__(cls)._set(lengths.size, found, sizes, positions)

    @classmethod
    def ragged(cls, kv_indptr: Any, kv_len: Any = None, **positions: Any) -> "Table":
        """Request r has the rows kv_indptr[r] … kv_indptr[r + 1] − 1 of a pool of rows.

        `kv_indptr` (requests + 1), `kv_len` (requests,) or None where every row is a key: int32 or
        int64. `positions`: see `Table`. Raises ArgumentError (A101 … A109).
        """
        indptr = integer_view("kv_indptr", kv_indptr)
        requests, found = _requests(indptr), {"table_indptr": (kv_indptr, indptr)}
        if kv_len is not None:
            lengths = integer_view("kv_len", kv_len, device=indptr.device, size=requests)
            found["kv_len"] = kv_len, lengths
        if indptr.device == "cpu":
            _check_indptr(to_host(kv_indptr), 2**63 - 1, "k")
        return object.__new__(cls)._set(requests, found, (2**62, 0, 0, 0, 0), positions)

    @classmethod
    def dense(cls, kv_len: Any, **positions: Any) -> "Table":
        """Request r has page r: k and v are (requests, longest, kv_heads, head_dim).

        `kv_len` (requests,) int32 or int64. `positions`: see `Table`. Raises ArgumentError.
        """
        lengths = integer_view("kv_len", kv_len)
        found, sizes = {"kv_len": (kv_len, lengths)}, (lengths.size, 1, 1, 0, 0)
        return object.__new__(cls)._set(lengths.size, found, sizes, positions)

    def _set(
        self, nodes: int, found: dict[str, tuple[Any, View]], sizes: tuple[int, ...],
        positions: dict[str, Any],
    ) -> "Table":  # fmt: skip
        """The fields of a new table, with its positions and levels checked and added to the arrays
        `found`, each beside its view."""
        device = next(iter(found.values()))[1].device
        shared, requests = positions.pop("shared", None), nodes
        shared = () if shared is None else shared
        if not isinstance(shared, (list, tuple)):
            text, hint = f"shared is a {type(shared).__name__}", "a list: one indptr for each level"
            raise ArgumentError("A107", text, where="shared", hint=hint)
        for level, indptr in enumerate(shared):
            name = f"shared_{level}"
            seen = integer_view(name, indptr, kinds=(dtypes.int32,), device=device)
            found[name], requests = (indptr, seen), requests - _requests(seen, name)
        if device == "cpu":
            _check_levels([to_host(x) for x in shared], requests)
        for name, array in positions.items():
            if name not in ("qo_base", "kv_base", "kv_stride"):
                hint = "positions: qo_base, kv_base, kv_stride; shared"
                raise ArgumentError("A101", f"a table has no {name!r}", where=name, hint=hint)
            if array is not None:
                kinds = (dtypes.int32,)
                found[name] = array, integer_view(name, array, 1, kinds, device, requests)
        arrays, views = ({n: pair[i] for n, pair in found.items()} for i in range(2))
        if len({"kv_base", "kv_stride"} & views.keys()) == 1 or (
            "kv_base" in views and ("qo_base" not in views or shared)
        ):
            text = "positions of keys need kv_base, kv_stride and qo_base, and no shared keys"
            hint = "without kv_base and kv_stride key t has position t"
            raise ArgumentError("A101", text, where="kv_base", hint=hint)
        for name, least, most in (("kv_len", 0, MAX_KEYS), ("kv_stride", 1, 2**31 - 1)):
            if device == "cpu" and name in views:
                check_range(name, to_host(arrays[name]), least, most)
        kinds = {n: views[n].dtype.name if n in views else "" for n in _NAMES}
        form = TableForm(**kinds, shared=len(shared), by_head=bool(sizes[3]))
        values = (nodes, requests, device, form, *sizes, views, arrays)
        for name, value in zip(self.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, name, value)
        return self

    # -- as a tensor of the sparse compiler --------------------------------------------------------

    @staticmethod
    def format(page: int, ndim: int = 4) -> Format:
        """The format of tensors (requests, positions, …) in pages that a table names: what a
        program is decomposed with, to read `tensor(pages)`. Raises FormatError[F101]."""
        return paged(page, ndim, shared=True)

    def tensor(self, pages: Any, *, longest: int | None = None) -> Packed:
        """`pages` (pages, page_size, …), contiguous, as a sparse tensor (requests, positions, …) of
        the format above, for programs. Nothing is copied: it follows lengths, entries and pages
        that change in memory.

        `longest`: its number of positions; None: as many as a request has room for now, which is
        read from the device. Positions behind it, or behind the pages of a request, are not there.
        The table has kv_len and entries, padded or CSR, all of one dtype. Raises ArgumentError.
        """
        values, length = named_view("pages", pages), self.views.get("kv_len")
        if self.kind not in ("padded", "csr") or length is None or self.heads:
            kind = f"a {self.kind} table{' by KV head' if self.heads else ''}"
            raise ArgumentError("A107", kind, where="table", hint="Table(…) or Table.csr(…)")
        own = [v for n, v in self.views.items() if n.startswith(("kv_len", "table"))]
        if {v.dtype for v in own} != {length.dtype}:
            raise ArgumentError("A102", "arrays of two dtypes", where="table", hint="int32 for all")
        if values.ndim < 2 or not 0 < values.size <= length.dtype.most:
            hint = f"(pages, page_size, …), at most {length.dtype.most} elements: those of int64"
            raise ArgumentError("A103", f"pages has shape {values.shape}", where="pages", hint=hint)
        if not all(v.is_contiguous for v in (values, *own)):
            raise ArgumentError("A104", "pages or entries are not contiguous", where="pages")
        check_view("pages", values, device=self.device)
        if longest is None:
            longest = int(self.ranges()[1].max(initial=0)) * values.shape[1]
        longest = integer("Table.tensor", "longest", longest)
        indptr = self.arrays.get("table_indptr")
        if indptr is None:
            host = np.arange(self.nodes + 1, dtype=length.dtype.numpy) * self.stride
            indptr = entries.to_device(host, self.device)
        named = self.arrays["table_entries"].reshape(-1)
        level = {"indptr": indptr, "pages": named, "length": self.arrays["kv_len"]}
        shape, none = (self.nodes, longest, *values.shape[2:]), np.zeros(0, np.int64)
        fmt = self.format(values.shape[1], len(shape))
        counts = np.cumprod((values.shape[0] * values.shape[1], *values.shape[2:])).tolist()
        arrays = ({}, level, *({} for _ in shape[2:]))
        part = Part(fmt, arrays, (self.nodes, *counts), none, none)  # without a list of entries
        structure = Structure(fmt, shape, (part,), 0, length.dtype, self.device)
        return Packed(structure, (pages.reshape(-1),), values.dtype)

    # -- what the arrays hold now ----------------------------------------------------------------

    def host(self, name: str) -> np.ndarray:
        """An array on the host as int64; copied from a device."""
        return to_host(self.arrays[name]).astype(np.int64)

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """First entry and number of entries of each node (nodes,), clamped as kernels do."""
        if "table_indptr" in self.views:
            indptr = self.host("table_indptr")
            first = np.maximum(indptr[:-1], 0)
            return first, np.minimum(indptr[1:], self.limit).clip(first) - first
        row = self.host("table_rows") if "table_rows" in self.views else np.arange(self.nodes)
        exists = (row >= 0) & (row < self.limit)
        return np.where(exists, row * self.stride, 0), np.where(exists, self.width, 0)

    def pages(self, node: np.ndarray, entry: np.ndarray) -> np.ndarray:
        """The pages that entries of nodes name, int64, not clamped; both arrays (n,). Where each KV
        head has its own: (n, heads)."""
        if "table_indptr" in self.views:
            at: tuple[Any, ...] = (self.ranges()[0][node] + entry,)
            if "table_entries" not in self.views:
                return at[0]
        else:
            row = self.host("table_rows")[node] if "table_rows" in self.views else node
            if "table_entries" not in self.views:
                return np.asarray(row, np.int64) + entry
            at = (row, slice(None), entry) if self.heads else (row, entry)
        return to_host(self.arrays["table_entries"])[at].astype(np.int64)

    def lengths(self) -> np.ndarray:
        """Keys of each node (nodes,), int64, as the arrays now say; without a pool nothing but 0 …
        MAX_KEYS limits them."""
        lengths = self.host("kv_len") if "kv_len" in self.views else self.ranges()[1]
        return lengths.clip(0, MAX_KEYS)

    def tree(self, lengths: np.ndarray) -> np.ndarray:
        """The rows of the table as `NODE`, with keys of each as in `lengths`. Raises
        ArgumentError[A109]."""
        if not self.form.shared:
            return of_requests(self.requests)
        levels = [self.host(f"shared_{n}") for n in range(self.form.shared)]
        _check_levels(levels, self.requests)
        tree = np.zeros(self.nodes, NODE.numpy)
        keys, at = np.zeros(self.requests + 1, np.int64), 0  # of each request, so far
        for level, indptr in enumerate([*levels, np.arange(self.requests + 1)]):
            part = tree[at : at + len(indptr) - 1]
            part["begin"], part["end"], part["level"] = indptr[:-1], indptr[1:], level
            part["base"] = keys[indptr[:-1]]
            keys[:-1] += np.repeat(lengths[at : at + len(part)], np.diff(indptr))
            check_range("kv_len, over all levels,", keys, 0, MAX_KEYS)
            at += len(part)
        return tree

    def params(self) -> dict[str, int]:
        """The values of `TableForm.param_fields` but `nodes`, which plans have."""
        pointers = {n: self.views[n].pointer if n in self.views else 0 for n in _NAMES}
        sizes = {"table_limit": self.limit, "table_width": self.width, "table_stride": self.stride}
        sizes |= {"table_head": self.head_stride} if self.heads else {}
        tree = {"shared_nodes": self.nodes - self.requests} if self.form.shared else {}
        return pointers | sizes | tree

    @property
    def kind(self) -> str:
        """padded, rows, csr, ragged or dense."""
        if "table_indptr" in self.views:
            return "csr" if "table_entries" in self.views else "ragged"
        if "table_rows" in self.views:
            return "rows"
        return "padded" if "table_entries" in self.views else "dense"

    def __repr__(self) -> str:
        levels = f"{self.form.shared} levels of shared keys, " if self.form.shared else ""
        return f"Table({self.kind}, {self.requests} requests, {levels}{self.device})"


@functools.lru_cache(64)
def of_requests(count: int) -> np.ndarray:
    """The nodes of a table whose rows are requests."""
    nodes = np.zeros(count, NODE.numpy)
    nodes["begin"], nodes["end"] = np.arange(count), np.arange(1, count + 1)
    nodes.flags.writeable = False
    return nodes


def _check_levels(levels: list[np.ndarray], requests: int) -> None:
    """Levels of shared keys, the outermost first: each divides the nodes of the one before."""
    if requests < 0:
        raise ArgumentError("A103", "shared has more nodes than the table", where="shared")
    finer = np.arange(requests + 1)
    for level, indptr in reversed(list(enumerate(levels))):
        rises_to = indptr[0] == 0 and indptr[-1] == requests and rises(indptr)
        if not rises_to or not np.isin(indptr, finer).all():
            text = f"shared[{level}] = {indptr.tolist()[:20]} does not divide {requests} requests"
            hint = "rises from 0 to the requests; all its numbers are in the next level"
            raise ArgumentError("A109", text, where="shared", hint=hint)
        finer = indptr


def _requests(indptr: View, name: str = "kv_indptr") -> int:
    if indptr.size < 1:
        raise ArgumentError("A103", f"{name} is empty", where=name, hint="[0] for none")
    return indptr.size - 1


def _check_indptr(indptr: np.ndarray, limit: int, of: str) -> None:
    if indptr[0] != 0 or indptr[-1] > limit or not rises(indptr):
        most = f" to at most {limit}, the length of {of}" if limit < 2**62 else ""
        text = f"kv_indptr must rise from 0{most}; it goes from {indptr[0]} to {indptr[-1]}"
        raise ArgumentError("A109", text, where="kv_indptr")
