"""The CTA interpreter on small programs: what it must report, and what it must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.compiler import cta

from tilewright import dtypes
from tilewright.errors import InternalError
from tilewright.ir import nodes as ir

i32, f32 = dtypes.int32, dtypes.float32
X, Y = (ir.Buffer(name, f32, (ir.as_expr(64),), "global") for name in "XY")
S = ir.Buffer("S", f32, (ir.as_expr(64),), "shared")
TX, TY, U, I, R, C = (ir.Var(name) for name in ("thread_x", "thread_y", "unit", "i", "r", "c"))
T = TY * 32 + TX  # of 32 × 2 threads


def load(b: ir.Buffer, at: Any) -> ir.Load:
    return ir.Load(b, (ir.as_expr(at),), b.dtype)


def store(b: ir.Buffer, at: Any, value: Any, op: str = "", atomic: bool = False) -> ir.Store:
    return ir.Store(b, (ir.as_expr(at),), ir.as_expr(value), op, atomic)


def loop(extent: Any, *body: ir.Stmt) -> ir.For:
    return ir.For(I, ir.as_expr(0), ir.as_expr(extent), ir.seq(*body))


def guard(cond: ir.Expr, *body: ir.Stmt) -> ir.If:
    return ir.If(cond, ir.seq(*body))


def ran(*body: ir.Stmt, units: int = 1, threads: tuple[int, int] = (32, 2)) -> np.ndarray:
    """Y after a launch; X is 0, 1, 2, …"""
    nest = ir.Nest("n", ir.seq(*body), -1, (ir.as_expr(units),), (U,), threads)
    y = np.full(64, np.nan, np.float32)
    program = ir.Program("p", "loops", (), stages=((nest,),))
    cta.execute(program, {"X": np.arange(64, dtype=np.float32), "Y": y}, {})
    return y


def refused(match: str, *body: ir.Stmt, outside: bool = False, **options: Any) -> None:
    with pytest.raises(InternalError if outside else cta.Refused, match=match):
        ran(*body, **options)


FILL, ALLOC, SYNC = store(S, T, load(X, T)), ir.Alloc(S), ir.Sync()
MIRRORED = store(Y, T, load(S, 63 - T))


def test_a_barrier_orders_a_write_and_a_read():
    np.testing.assert_array_equal(ran(ALLOC, FILL, SYNC, MIRRORED), np.arange(64)[::-1])
    refused("race at S.*read", ALLOC, FILL, MIRRORED)


def test_a_barrier_orders_a_read_and_the_next_write():
    fill, read = store(S, T, load(X, T) + I), store(Y, T, load(S, 63 - T))
    got = ran(ALLOC, loop(3, fill, SYNC, read, SYNC))
    np.testing.assert_array_equal(got, np.arange(64)[::-1] + 2)
    refused("race at S.*write.*, read by", ALLOC, loop(3, fill, SYNC, read))


def test_equal_values_are_a_race_too():
    refused("race at Y.*write", store(Y, 0, 1.0))
    refused("race at Y.*write", guard(TX < 1, store(Y, 0, 1.0)))
    assert ran(guard(T < 1, store(Y, 0, 1.0)))[0] == 1


def test_a_thread_needs_no_barrier_for_its_own_accesses():
    own = store(S, T, load(S, T) + load(S, T))
    np.testing.assert_array_equal(ran(ALLOC, FILL, own, store(Y, T, load(S, T))), np.arange(64) * 2)


def test_no_barrier_orders_the_ctas_of_a_launch():
    once = guard(T < 1, store(Y, U, U.cast("float32")))
    np.testing.assert_array_equal(ran(once, units=3)[:3], np.arange(3))
    refused("race at Y", guard(T < 1, store(Y, 0, 1.0)), units=2)
    after = guard(T < 1, store(Y, U, 1.0)), SYNC, guard(T < 1, store(Y, 9 + U, load(Y, 1 - U)))
    refused("race at Y.*read", *after, units=2)


def test_shared_memory_belongs_to_one_cta():
    body = (ALLOC, store(S, T, load(X, T) + U), SYNC, guard(T < 1, store(Y, U, load(S, 63))))
    np.testing.assert_array_equal(ran(*body, units=3)[:3], [63, 64, 65])


def test_atomic_updates_conflict_with_plain_accesses_only():
    zero, add = guard(T < 1, store(Y, 0, 0.0)), store(Y, 0, 1.0, "sum", True)
    assert ran(zero, SYNC, add)[0] == 64
    refused("race at Y.*update", zero, add)
    refused("race at Y.*read", zero, SYNC, add, store(S, T, load(Y, 0)))
    refused("race at Y.*write", zero, SYNC, store(Y, 0, 1.0, "sum"))


def test_several_readers_and_one_writer():
    """The writer is one of the readers: the other ones conflict."""
    body = (ALLOC, FILL, SYNC, store(Y, T, load(S, 5)), guard(T < 1, store(S, 5, 1.0)))
    refused("race at S.*write", *body)
    assert ran(*body[:-1], SYNC, body[-1], SYNC, guard(T < 1, store(Y, 0, load(S, 5))))[0] == 1


def test_shared_memory_is_written_before_it_is_read():
    refused("read before it is written", ALLOC, store(Y, T, load(S, T)))
    half = guard(T < 32, FILL)
    refused("read before it is written", ALLOC, half, SYNC, MIRRORED)
    again = loop(2, ALLOC, guard(I < 1, FILL), SYNC, store(Y, T, load(S, T)), SYNC)
    refused("read before it is written", again)


def test_a_barrier_is_reached_by_all_threads_or_none():
    refused("do not reach a barrier", guard(TX < 31, SYNC))
    refused("do not reach a barrier", loop(TY + 1, SYNC))
    ran(guard(U < 1, SYNC), loop(U, SYNC), units=3)


def total(op: str, e: ir.Expr, axis: str, extent: int) -> ir.ReduceThreads:
    return ir.ReduceThreads(op, e, f"thread.{axis}", extent, e.dtype)


@pytest.mark.parametrize("op", ["sum", "max", "min"])
@pytest.mark.parametrize("extent", [2, 8, 32])
def test_reductions_over_lanes(op, extent):
    got = ran(store(Y, T, total(op, load(X, T), "x", extent)))
    groups = np.arange(64.0).reshape(-1, extent)
    np.testing.assert_array_equal(got, getattr(groups, op)(1).repeat(extent))


def test_a_shuffle_needs_its_lanes_and_orders_no_accesses():
    both = store(Y, T, total("sum", load(X, T), "x", 8))
    ran(guard(TX < 8, both))
    refused("lanes of a group", guard(TX < 12, both))
    refused("no groups", both, threads=(12, 1))
    through = store(Y, T, total("sum", load(X, T), "x", 32) * 0 + load(S, TY * 32 + 31 - TX))
    refused("race at S", ALLOC, FILL, through)


def test_reductions_over_rows():
    got = ran(store(Y, T, total("sum", load(X, T), "y", 2)))
    np.testing.assert_array_equal(got, np.tile(np.arange(64.0).reshape(2, 32).sum(0), 2))
    refused("do not reach a barrier", guard(TY < 1, store(Y, T, total("sum", load(X, T), "y", 2))))
    refused("beside 2", store(Y, T, total("sum", load(X, T), "y", 4)))


@pytest.mark.parametrize("left_out", [0, 1])
def test_both_barriers_of_a_reduction_over_rows_are_needed(left_out, monkeypatch):
    """Also where the second reduction is of another, wider type."""
    wide = total("sum", load(X, T).cast("float64"), "y", 2).cast("float32")
    body = store(Y, T, total("sum", load(X, T), "y", 2)), store(Y, T, wide)
    ran(*body)
    barrier = cta.Launch.barrier
    monkeypatch.setattr(
        cta.Launch, "barrier", lambda self, s, n=0: n == left_out or barrier(self, s, n)
    )
    refused("race at the scratch", *body)


ACC = ir.Buffer("acc", f32, tuple(map(ir.as_expr, (1, 16, 8))), "fragment")
H = ir.Buffer("H", dtypes.float16, (ir.as_expr(512),), "shared")
SHAPE = (16, 8, 16)


def tile(b: ir.Buffer, offset: Any, down: int, rows: int, cols: int) -> ir.Tile:
    first, across, right, high, wide = map(ir.as_expr, (offset, down, 1, rows, cols))
    return ir.Tile(b, first, across, right, high, wide)


def product(*between: ir.Stmt, limit: int = 4, apart: int = 32) -> tuple[ir.Stmt, ...]:
    """Y (4 × 8, twice) = H (16 × 16) · H (16 × 8), by each of two warps."""
    slot = ir.as_expr(0)
    ones = ir.Store(H, (I * 64 + T,), ir.as_expr(1.0).cast("float16"))
    a, b = tile(H, 0, 16, 16, 16), tile(H, 256, 8, 16, 8)
    total = ir.Load(ACC, (slot, R, C), f32)
    stores = ir.If(ir.binary("<", R, limit), store(Y, TY * apart + R * 8 + C, total))
    for var, extent in ((C, 8), (R, 16)):
        stores = ir.For(var, ir.as_expr(0), ir.as_expr(extent), stores, "fragment")
    return (ir.Alloc(H), loop(8, ones), *between, ir.Alloc(ACC),
            ir.Mma(ACC, slot, a, b, SHAPE), stores)  # fmt: skip


def test_tiles():
    np.testing.assert_array_equal(ran(*product(SYNC)), np.full(64, 16))
    refused("race at H.*read", *product())
    refused("race at H.*read", *product(), threads=(32, 1))  # lanes of the same warp
    refused("race at Y.*write", *product(SYNC, apart=24))  # a row of both warps
    refused("outside", *product(SYNC, limit=5), outside=True)
    refused("lanes of a warp", *product(SYNC)[:3], guard(TX < 31, *product(SYNC)[3:]))
    refused("disagree", *product(SYNC)[:-1], ir.Mma(ACC, TX, tile(H, 0, 16, 16, 16),
                                                    tile(H, 256, 8, 16, 8), SHAPE))  # fmt: skip


def test_lanes_that_do_not_run_access_nothing():
    away = load(X, T * 100)
    inside = ir.Select(ir.equal(T, 0), away, ir.as_expr(7.0), f32)
    np.testing.assert_array_equal(ran(store(Y, T, inside)), [0, *[7] * 63])
    ran(guard(T < 1, store(Y, T, away)))
    ran(store(Y, T, ir.cast((T < 1) & (away < 1), f32)))
    refused("outside", store(Y, T, away), outside=True)
    refused("outside", guard(T < 2, store(Y, T * 64, 1.0)), outside=True)
    refused("outside", ALLOC, store(S, T + 1, 1.0), outside=True)


def test_threads_run_loops_of_their_own_length():
    r = ir.Buffer("r", f32, (), "register")
    body = (ir.Alloc(r), ir.Store(r, (), ir.as_expr(0.0)),
            loop(T, ir.Store(r, (), load(X, I), "sum")),
            store(Y, T, ir.Load(r, (), f32)))  # fmt: skip
    np.testing.assert_array_equal(ran(*body), [sum(range(t)) for t in range(64)])


@pytest.mark.parametrize("last", [False, True])
def test_searches_of_each_thread(last):
    keys = ir.Buffer("keys", i32, (ir.as_expr(9),), "global")
    sorted_keys = np.array([0, 3, 3, 8, 9, 20, 21, 40, 62], np.int32)
    found = ir.Search(keys, T // 32, ir.as_expr(9), T, last, i32)
    nest = ir.Nest("n", store(Y, T, ir.cast(found, f32)), -1, (), (), (32, 2))
    y = np.full(64, np.nan, np.float32)
    cta.execute(ir.Program("p", "loops", (), stages=((nest,),)), {"Y": y, "keys": sorted_keys}, {})
    for t in range(64):
        low = t // 32
        at = low + int(np.searchsorted(sorted_keys[low:], t, "right" if last else "left"))
        wanted = at - 1 if last else at if at < 9 and sorted_keys[at] == t else -1
        assert y[t] == wanted, t


# ---- barriers of groups of lanes ---------------------------------------------------------------

LANES = ir.Sync(8)  # of each group of 8 threads
ME = TY * 8 + TX  # of 8 × 4 threads
NEXT, FAR = (ir.binary("^", ME, n) for n in (1, 8))  # of the same group, and of another


def test_a_barrier_of_lanes_orders_those_of_its_group():
    fill = (ALLOC, store(S, ME, load(X, ME)))
    y = ran(*fill, LANES, store(Y, ME, load(S, NEXT)), threads=(8, 4))
    assert y[0] == 1
    refused("race", *fill, store(Y, ME, load(S, NEXT)), threads=(8, 4))
    refused("race", *fill, LANES, store(Y, ME, load(S, FAR)), threads=(8, 4))
    ran(*fill, LANES, SYNC, store(Y, ME, load(S, FAR)), threads=(8, 4))


def test_groups_of_lanes_pass_their_barriers_at_different_times():
    """In loops of different lengths; a group that is not complete is refused."""
    own = ir.binary("<", I, TY)
    turn = (store(S, ME, load(X, ME)), LANES, store(Y, ME, load(S, NEXT)), LANES)
    ran(ALLOC, store(S, ME, load(X, ME)), loop(4, guard(own, *turn)), threads=(8, 4))
    once = (store(S, ME, load(X, ME)), LANES, store(Y, ME, load(S, NEXT)))
    refused("race", ALLOC, loop(4, guard(own, *once)), threads=(8, 4))
    half = guard(ir.binary("<", TX, 4), LANES)
    refused("some lanes of a group do not reach a barrier", half, threads=(8, 4))


# ---- loops over merged lists -------------------------------------------------------------------


def merged(op: str, lists: list[list[int]], threads: tuple[int, int] = (4, 1)) -> np.ndarray:
    """Y[32 · t + coordinate] of thread t: 1 + rank, and 100 · the positions in both lists, of
    thread t in lists that are t entries shorter."""
    keys = [ir.Buffer(f"K{n}", i32, (ir.as_expr(len(x)),), "global") for n, x in enumerate(lists)]
    ends = tuple(ir.as_expr(len(x)) - TX for x in lists)
    key = ir.Var("key")
    at = [ir.Cursor(I, n, i32, optional=True) for n in range(len(lists))]
    seen = I + 1 + 100 * (at[0] + 1) + 10_000 * (at[1] + 1)
    body = ir.seq(
        ir.Let(key, ir.Cursor(I, ir.KEY, i32)), store(Y, TX * 16 + key, ir.cast(seen, f32))
    )
    runs = tuple(ir.Load(k, (ir.as_expr(0),), i32) for k in keys)
    zero = ir.as_expr(0)
    loop = ir.Merge(I, zero, ir.as_expr(99), body, runs=runs, ends=ends, op=op)
    nest = ir.Nest("n", loop, -1, (ir.as_expr(1),), (U,), threads)
    y = np.full(64, np.nan, np.float32)
    arrays = {k.name: np.array(x, np.int32) for k, x in zip(keys, lists, strict=True)}
    cta.execute(ir.Program("p", "loops", (), stages=((nest,),)), {"Y": y, **arrays}, {})
    return y.reshape(4, 16)


@pytest.mark.parametrize("op", ["union", "intersection"])
def test_lanes_merge_lists_of_their_own(op):
    lists = [[0, 3, 5, 6, 9], [3, 4, 6, 9, 11]]
    got, wanted = merged(op, lists), np.full((4, 16), np.nan)
    for t in range(4):
        a, b = (x[: len(x) - t] for x in lists)
        both = sorted(set(a) | set(b) if op == "union" else set(a) & set(b))
        for rank, key in enumerate(both):
            at = [x.index(key) + 1 if key in x else 0 for x in (a, b)]
            wanted[t, key] = rank + 1 + 100 * at[0] + 10_000 * at[1]
    np.testing.assert_array_equal(got, wanted)


def test_a_list_that_does_not_ascend_is_reported():
    with pytest.raises(InternalError, match="K1 does not ascend"):
        merged("union", [[0, 1, 2, 3], [5, 2, 7, 8]])
