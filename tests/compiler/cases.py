"""Programs, formats, matrices and comparisons that the compiler's tests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tests.compiler import cta
from tests.compiler.interpreter import execute
from tests.compiler.memory import Part, poisoned

import tilewright as tw
from tilewright import dtypes
from tilewright.ir.levels import Diagonals, NofM, Paged, coordinates
from tilewright.ir.names import GeneratedName, count_name, size_name, values_name
from tilewright.ir.nodes import Program, Tensor
from tilewright.lower import AFTER_SCHEDULE, BEFORE_SCHEDULE, run_passes
from tilewright.reference.evaluate import evaluate
from tilewright.sparse.pack import Packed

Arrays = dict[str, Any]

# ---------------------------------------------------------------------------- programs


@tw.program
def spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))


@tw.program
def spmm_t(A=tw.sparse("m n"), X=tw.dense("m d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[j, k](tw.sum(A[i, j] * X[i, k], over=i))


@tw.program
def row_max(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[i, k](tw.max(A[i, j] * X[j, k], over=j))


@tw.program
def sddmm(A=tw.sparse("m n"), P=tw.dense("m d"), Q=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out.like(A)[i, j](A[i, j] * tw.sum(P[i, k] * Q[j, k], over=k))


@tw.program
def sddmm_plain(A=tw.sparse("m n"), P=tw.dense("m d"), Q=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out.like(A)[i, j](tw.sum(P[i, k] * Q[j, k], over=k))


@tw.program
def softmax(A=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    e = tw.exp(A[i, j] - tw.max(A[i, j], over=j))
    return tw.out.like(A)[i, j](e / tw.sum(e, over=j))


@tw.program
def logsumexp(A=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[i](tw.log(tw.sum(tw.exp(A[i, j]), over=j)))


@tw.program
def rgcn(
    A=tw.sparse("m n"),
    R=tw.sparse("m n", dtype="int32", like="A"),
    W=tw.dense("r f o"),
    X=tw.dense("n f"),
):
    i, j, f, o = tw.indices("i:m j:n f:f o:o")
    return tw.out[i, o](tw.sum(A[i, j] * X[j, f] * W[R[i, j], f, o], over=(j, f)))


@tw.program
def both_ways(A=tw.sparse("m n"), X=tw.dense("n d"), Z=tw.dense("m d")):
    i, j, k = tw.indices("i:m j:n k:d")
    down = tw.out.named("down")[i, k](tw.sum(A[i, j] * X[j, k], over=j))
    up = tw.out.named("up")[j, k](tw.sum(A[i, j] * Z[i, k], over=i))
    return down, up


@tw.program
def attention(A=tw.sparse("m n"), Q=tw.dense("m d"), K=tw.dense("n d"), V=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    s = tw.temp.like(A).named("s")[i, j](tw.sum(Q[i, k] * K[j, k], over=k))
    top = tw.temp.named("top")[i](tw.max(s[i, j], over=j))
    total = tw.temp.named("total")[i](tw.sum(tw.exp(s[i, j] - top[i]), over=j))
    return tw.out[i, k](tw.sum(tw.exp(s[i, j] - top[i]) / total[i] * V[j, k], over=j))


@tw.program
def square(A=tw.sparse("n n"), X=tw.dense("n d")):
    i, j, k = tw.indices("i:n j:n k:d")
    return tw.out[i, k](X[i, k] + tw.sum(A[i, j] * (X[j, k] - X[i, k]), over=j))


@tw.program
def two_sparse(A=tw.sparse("m n"), B=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[i](tw.sum(A[i, j] * (B[i, j] + 0.5), over=j))


@tw.program
def triangles(A=tw.sparse("n n"), B=tw.sparse("n n")):
    i, j, k = tw.indices("i:n j:n k:n")
    return tw.out.like(A)[i, j](A[i, j] * tw.sum(B[j, k] * A[i, k], over=k))


@tw.program
def farthest(A=tw.sparse("n n"), B=tw.sparse("n n")):
    i, j, k = tw.indices("i:n j:n k:n")
    return tw.out.like(A)[i, j](tw.max(B[j, k] * A[i, k], over=k, where=tw.stored(B[j, k])))


@tw.program
def filled(A=tw.sparse("m n", fill=float("inf")), X=tw.dense("n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[i, j](tw.where(A[i, j] < 1e30, A[i, j] * X[j], -1.0))


@tw.program
def gemv(W=tw.dense("n k"), x=tw.dense("k")):
    i, k = tw.indices("i:n k:k")
    return tw.out[i](tw.sum(W[i, k] * x[k], over=k))


@tw.program
def gemm(A=tw.dense("m k"), B=tw.dense("k n")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out[i, j](tw.sum(A[i, k] * B[k, j], over=k))


@tw.program
def rmsnorm(X=tw.dense("m k"), W=tw.dense("k"), eps=tw.scalar()):
    i, k = tw.indices("i:m k:k")
    mean = tw.sum(X[i, k] * X[i, k], over=k) / tw.size("k")
    return tw.out[i, k](-X[i, k] * W[k] * tw.rsqrt(mean + eps))


@tw.program
def gather_rows(T=tw.dense("v d"), at=tw.dense("t", dtype="int32")):
    t, k = tw.indices("t:t k:d")
    return tw.out[t, k](tw.where(at[t] >= 0, T[at[t], k], 0.0))


@tw.program
def column_share(A=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    return tw.out.like(A)[i, j](A[i, j] / (1.0 + tw.sum(A[i, j] * A[i, j], over=i)))


@tw.program
def row_pairs(A=tw.sparse("m n")):
    i, j, k = tw.indices("i:m j:n k:n")
    return tw.out.like(A)[i, j](tw.sum(A[i, k] * A[i, j], over=k) + A[i, j])


@tw.program
def neighbours(A=tw.sparse("n n")):
    i, j, k = tw.indices("i:n j:n k:n")
    return tw.out.like(A)[i, j](tw.max(A[j, k], over=k) + A[i, j])


@tw.program
def reverse(A=tw.sparse("n n")):
    i, j = tw.indices("i:n j:n")
    return tw.out.like(A)[i, j](A[i, j] + A[j, i])


@tw.program
def mixed(A=tw.sparse("m n"), X=tw.dense("m d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[i](tw.sum(A[i, j], over=j) * 2.0 + tw.sum(X[i, k], over=k))


@tw.program
def column_norm(A=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[j](tw.sqrt(tw.sum(A[i, j] * A[i, j], over=i)))


@tw.program
def whole_sum(A=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[()](tw.sum(A[i, j], over=(i, j)))


OTHER = (column_share, row_pairs, neighbours, reverse, mixed, column_norm, whole_sum)
SPARSE = (spmm, spmm_t, row_max, sddmm, sddmm_plain, softmax, logsumexp, rgcn, both_ways)
SQUARE = (square, triangles, farthest)
DENSE = (gemv, gemm, rmsnorm, gather_rows)
SEARCHED = (two_sparse, triangles, farthest)

# ---------------------------------------------------------------------------- formats

FORMATS: dict[str, Any] = {
    "csr": tw.csr(),
    "csc": tw.csc(),
    "coo": tw.coo(),
    "dcsr": tw.dcsr(),
    "ell": tw.ell(8),
    "ragged": tw.ragged(),
    "bsr": tw.bsr(2),
    "bsr3": tw.bsr(3),
    "dbsr": tw.dbsr(2),
    "sr_bcrs": tw.sr_bcrs(2),
    "hyb": tw.hyb(buckets=(1, 2, 4)),
    "hyb split": tw.hyb(buckets=(1, 2), long_rows="split"),
    "hyb 2": tw.hyb(2, (1, 3)),
    "hyb 3 split": tw.hyb(3, (1, 2), long_rows="split"),
    "csr + bsr": tw.Composed(
        "csr + bsr", ((tw.Where(3), tw.csr()), (tw.Where(0, 2), tw.bsr(2))), disjoint_rows=True
    ),
    "dbsr + csc": tw.Composed(
        "dbsr + csc", ((tw.Where(0, None, 0, 2), tw.dbsr(2)), (tw.Where(0, None, 1, 2), tw.csc()))
    ),
}

STRUCTURED: dict[str, Any] = {  # these hold some matrices only, or store more than entries
    "band": tw.band(-1, 2),
    "dia": tw.dia(-2, 0, 1),
    "bitmap": tw.bitmap(),
    "counted": tw.bitmap(counted=True),
    "2:4": tw.n_m(2, 4),
    "paged": tw.paged(4),
}

MATRICES = ("random", "sparse", "empty", "dense", "one row", "one column", "diagonal")


def matrix(kind: str, m: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """A dense array with the pattern of a kind; no stored value is zero."""
    values = rng.uniform(0.25, 1.5, (m, n)) * rng.choice([-1, 1], (m, n))
    keep = {
        "random": rng.random((m, n)) < 0.4,
        "sparse": rng.random((m, n)) < 0.12,
        "empty": np.zeros((m, n), bool),
        "dense": np.ones((m, n), bool),
        "one row": np.arange(m)[:, None] == m // 2,
        "one column": np.broadcast_to(np.arange(n) == n // 2, (m, n)),
        "diagonal": np.eye(m, n, dtype=bool),
    }[kind]
    return np.where(keep, values, 0).astype(np.float32)


def fitted(fmt: Any, dense: np.ndarray) -> np.ndarray:
    """The entries of a tensor that a format can hold."""
    coords = np.indices(dense.shape)
    for level in getattr(fmt, "levels", ()):
        if isinstance(level, Diagonals):
            offset = coords[level.dim] - coords[level.of]
            dense = np.where(np.isin(offset, level.offsets), dense, 0)
        if isinstance(level, NofM):
            groups = range(level.block, dense.shape[level.dim], level.block)
            split = np.split(dense, groups, axis=level.dim)
            kept = [np.where(np.cumsum(g != 0, level.dim) <= level.width, g, 0) for g in split]
            dense = np.concatenate(kept, axis=level.dim)
    return dense


def pack(fmt: Any, dense: np.ndarray, dtype: str = "float32", fill: float = 0.0) -> Packed:
    """Packed, with NaN in all padding that no program may read; pages are in a random order."""
    packed = fmt.pack(fitted(fmt, dense), dtype=dtype, fill=fill)
    if any(isinstance(level, Paged) for level in getattr(fmt, "levels", ())):
        packed = shuffled(packed)
    return poison_padding(packed)


def shuffled(a: Packed) -> Packed:
    """A matrix in pages, the same in other pages of a pool that has some more."""
    (part,) = a.structure.parts
    level: Any = part.format.levels[1]
    size, kind = level.page, a.structure.index_dtype.numpy
    pages = len(part.arrays[1]["pages"])
    other = np.random.default_rng(pages).permutation(pages + 2).astype(kind)
    values = poisoned((len(other), size), a.dtype)
    values[other[:pages]] = a.values[0].reshape(-1, size)
    slots = other[part.slots // size] * size + part.slots % size
    table = {**part.arrays[1], "pages": other[part.arrays[1]["pages"]]}
    counts = (part.counts[0], values.size)
    moved = dataclasses.replace(part, arrays=({}, table), counts=counts, slots=slots)
    structure = dataclasses.replace(a.structure, parts=(moved,))
    return dataclasses.replace(a, structure=structure, values=(values.reshape(-1),))


def poison_padding(a: Packed) -> Packed:
    return _with_padding(a, [poisoned(old.shape, a.dtype) for old in a.values])


def filled_padding(a: Packed) -> Packed:
    """The same matrix with 0 in its padding, which GPU kernels may load."""
    return _with_padding(a, [np.zeros_like(old) for old in a.values])


def _with_padding(a: Packed, values: list[np.ndarray]) -> Packed:
    for part, old, new in zip(a.structure.parts, a.values, values, strict=True):
        _, stored = coordinates(part.format.levels, part.arrays, part.counts, a.shape)
        new[stored] = old[stored]
    return dataclasses.replace(a, values=tuple(values))


def widened(a: Packed) -> Packed:
    """The same matrix with coordinates in int64."""
    s = a.structure
    parts = tuple(
        dataclasses.replace(
            p,
            arrays=tuple(
                {k: x.astype(np.int64) if level.arrays[k] is None else x for k, x in own.items()}
                for level, own in zip(p.format.levels, p.arrays, strict=True)
            ),
        )
        for p in s.parts
    )
    wide = dataclasses.replace(s, parts=parts, index_dtype=dtypes.int64)
    return dataclasses.replace(a, structure=wide)


# ---------------------------------------------------------------------------- arguments


def arguments(
    definition: Any, rng: np.random.Generator, kind: str = "random", **sizes: int
) -> Arrays:
    """Random arguments of a program, by name. Sizes not given are odd and small."""
    program = definition.program
    known = {"m": 5, "n": 6, "d": 3, "k": 7, "f": 3, "o": 2, "r": 3, "v": 4, "t": 5, **sizes}
    out: Arrays = {}
    for t in program.inputs:
        shape = tuple(d if isinstance(d, int) else known[d] for d in t.dims)
        if t.structure and t.structure != t.name:
            owner = out[t.structure]
            out[t.name] = owner.with_values(rng.integers(0, known["r"], owner.nnz).astype(np.int32))
        elif t.is_sparse:
            dense = matrix(kind, shape[0], shape[1], rng)
            out[t.name] = pack(t.format, dense, t.dtype.name, t.fill)
        elif not t.dims:
            out[t.name] = 0.125
        elif t.dtype.is_int:
            out[t.name] = rng.integers(-1, known["v"], shape).astype(t.dtype.numpy)
        else:
            out[t.name] = stored(rng.uniform(-1, 1, shape), t.dtype)
    return out


def stored(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Numbers as a kernel keeps them: bfloat16 is its bits."""
    kind = dtypes.dtype(dtype)
    if kind.name == "bfloat16":
        return dtypes.bfloat16_bits(values.astype(np.float32)).reshape(values.shape)
    return values.astype(kind.numpy)


def numbers(values: np.ndarray, dtype: Any) -> np.ndarray:
    """What stored values mean, in float64."""
    if dtypes.dtype(dtype).name == "bfloat16" and values.dtype == np.uint16:
        values = dtypes.bfloat16_values(values)
    return values.astype(np.float64)


def poisoned_output(t: Tensor, args: Arrays, definition: Any) -> Any:
    """An output (or sparse temporary) full of NaN."""
    if not t.is_sparse:
        sizes = sizes_of(definition.program, args)
        return poisoned(tuple(d if isinstance(d, int) else sizes[d] for d in t.dims), t.dtype)
    owner = args[t.structure]
    sizes = sizes_of(definition.program, args)
    inner = tuple(d if isinstance(d, int) else sizes[d] for d in t.dims[len(owner.shape) :])
    values = tuple(poisoned((*v.shape, *inner), t.dtype) for v in owner.values)
    return dataclasses.replace(owner, values=values, dtype=t.dtype, inner=inner)


def sizes_of(program: Program, args: Arrays) -> dict[Any, int]:
    return {
        d: n
        for t in program.inputs
        for d, n in zip(
            t.dims, np.shape(args[t.name]) if not t.is_sparse else args[t.name].shape, strict=True
        )
    }


# ---------------------------------------------------------------------------- comparing


def flat(t: Tensor, x: Any) -> np.ndarray:
    """An output as numbers; of a sparse one the stored values."""
    return numbers(x.unpack()[1] if t.is_sparse else np.asarray(x), t.dtype)


TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-2, "bfloat16": 8e-2, "int32": 0.0}


def close(got: np.ndarray, wanted: np.ndarray, dtype: str, what: str = "") -> None:
    np.testing.assert_allclose(
        got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=False, err_msg=what
    )


def after_every_pass(
    definition: Any, args: Arrays, recipe: Callable[[Any], Any] | None = None, target: str = "cpp",
    only_last: bool = False,
) -> list[str]:  # fmt: skip
    """Runs the program after each pass that changed it and compares with its meaning: after the
    passes for C++, and those for CUDA too where that is the target of the schedule. Returns the
    names of those passes. `only_last`: runs the lowered programs alone; a pass that is wrong shows
    there too, but not which one it is."""
    wanted = evaluate(definition.program, args)
    seen: list[str] = []
    last: list[Program] = [definition.program]

    def watch(name: str, program: Program, machine: Any = execute, args: Arrays = args) -> None:
        if program == last[0] or program.level == "coordinates":
            return
        last[0] = program
        seen.append(name)
        if not only_last:
            compare(name, program, machine, args)

    def compare(name: str, program: Program, machine: Any = execute, args: Arrays = args) -> None:
        got = executed(definition, program, args, machine)
        for t in definition.program.outputs:
            close(got[t.name], wanted[t.name], t.dtype.name, f"{t.name} after {name}\n{program}")

    if recipe is None:
        lowered = run_passes(definition.program, BEFORE_SCHEDULE, watch=watch)
    else:
        lowered = recipe(definition.scheduled(target)).lowered.program
        watch("schedule", lowered)
    run_passes(lowered, AFTER_SCHEDULE, "cpp", watch)
    if only_last:
        compare("the last pass", last[0])
    if target.startswith("cuda"):  # registers belong to threads as soon as these are bound
        bound = [p.name for p in AFTER_SCHEDULE].index("bind_threads")
        binding, rest = AFTER_SCHEDULE[: bound + 1], AFTER_SCHEDULE[bound + 1 :]
        filled = {n: filled_padding(x) if isinstance(x, Packed) else x for n, x in args.items()}

        def with_threads(name: str, program: Program) -> None:
            watch(name, program, cta.execute, filled)

        program = run_passes(lowered, binding, "cuda")
        with_threads("bind_threads", program)
        run_passes(program, rest, "cuda", with_threads)
        if only_last:
            compare("the last pass", last[0], cta.execute, filled)
    return seen


def executed(
    definition: Any, program: Program, args: Arrays, machine: Any = execute
) -> dict[str, np.ndarray]:
    """The outputs of a program at the position or loop level, from an interpreter."""
    given = dict(args)
    for t in program.tensors:
        if t.role in ("output", "temp", "inline") and t.name not in given:
            given[t.name] = poisoned_output(t, args, definition)
    buffers, variables, parts = memory_of(program, given)
    machine(program, buffers, variables, parts)
    return {
        t.name: flat(t, given[t.name] if t.is_sparse else buffers[t.name])
        for t in definition.program.outputs
    }


def memory_of(
    program: Program, arrays: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, int], list[Part]]:
    """(buffers, variables, parts) for `execute`, from arrays by tensor name.

    Sparse tensors are objects with `structure` and `values` (`sparse.pack.Packed`), also those
    that are computed. Dense outputs and temporaries that `arrays` lacks are allocated, poisoned.
    """
    sizes = dict(program.sizes)
    buffers: dict[str, np.ndarray] = {}
    passed = [(t, arrays[t.name]) for t in program.tensors if arrays.get(t.name) is not None]
    parts = [
        Part() for _ in range(max((len(x.values) for t, x in passed if t.is_sparse), default=0))
    ]
    for t, x in passed:
        sizes |= {d: n for d, n in zip(t.dims, np.shape(x), strict=False) if isinstance(d, str)}
        if t.is_sparse:
            _add_to_parts(t, x, parts)
        else:
            buffers[t.name] = np.asarray(x)
    for t in program.tensors:
        if t.role in ("output", "temp", "inline") and not t.is_sparse and t.name not in buffers:
            shape = tuple(d if isinstance(d, int) else sizes[d] for d in t.dims)
            buffers[t.name] = poisoned(shape, t.dtype)
    return buffers, {size_name(d): n for d, n in sizes.items() if isinstance(d, str)}, parts


def _add_to_parts(t: Tensor, packed: Any, rows: list[Part]) -> None:
    """Adds the arrays of each part of a tensor; one that is not composed is in every row."""
    parts, cases = packed.structure.parts, packed.structure.format.formats
    for number, row in enumerate(rows):
        at = number if number < len(parts) else 0
        row.buffers[values_name(t.name)] = packed.values[at]
        row.case = max(row.case, cases.index(parts[at].format))
        for depth, level in enumerate(parts[at].arrays):
            row.variables[count_name(t.structure, depth)] = parts[at].counts[depth]
            for kind, array in level.items():
                row.buffers[GeneratedName(t.structure, kind, depth).name] = array


def called(kernel: Any, definition: Any, args: Arrays) -> dict[str, np.ndarray]:
    """The outputs of a kernel, called with outputs that are all NaN before."""
    outputs = definition.program.outputs
    outs = tuple(poisoned_output(t, args, definition) for t in outputs)
    returned = kernel(**args, out=outs)
    results = returned if isinstance(returned, tuple) else (returned,)
    assert all(a is b for a, b in zip(results, outs, strict=True))
    return {t.name: flat(t, o) for t, o in zip(outputs, outs, strict=True)}
