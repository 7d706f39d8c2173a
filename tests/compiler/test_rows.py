"""Rows of temporaries on a GPU: kept in shared memory or registers, with what is behind them in an
array; against NumPy in float64 after every pass, with every barrier dropped, and refusals."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.compiler import cases, cta
from tests.compiler.test_placed import NAMES, attend, attention, spread

import tilewright as tw
from tilewright import knobs
from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import map_bodies, rebuild, walk
from tilewright.lower import AFTER_SCHEDULE, run_passes

CUDA = "cuda:sm_90a"
SIZES = {"m": 5, "n": 13, "d": 3, "v": 4, "h": 2}
softmax = runpy.run_path(
    str(Path(__file__).resolve().parents[2] / "examples" / "05_row_softmax.py"), run_name="lesson"
)["softmax"]


def rows_of_lanes(most: int, x: int = 8, y: int = 8) -> Any:
    """A row for each group of `x` lanes."""

    def schedule(s: Any) -> Any:
        for name in ("top", "weight", "total"):
            s = s.compute_at(name, "i", most=most)
        for n in ("top", "weight", "total", "out"):
            s = s.split(f"{n}.j", x, into=(f"{n}_o", f"{n}_x")).bind(f"{n}_x", "thread.x")
        s = s.split("i", y, into=("i_cta", "i_y")).bind("i_y", "thread.y")
        return s.bind("i_cta", "cta.x")

    return schedule


def rows_of_blocks(most: int) -> Any:
    """A row for each group of 4 lanes, 8 of a row of blocks or stripe a CTA."""

    def schedule(s: Any) -> Any:
        inner = "j_i" if s.format_of(0).blocks[1] > 1 else "j"
        for name in ("top", "weight", "total"):
            s = s.compute_at(name, "i", most=most)
        for n in ("top", "weight", "total", "out"):
            s = s.split(f"{n}.{inner}", 4, into=(f"{n}_o", f"{n}_x")).bind(f"{n}_x", "thread.x")
        return s.bind(s.rows, "cta.x").bind("i_i", "thread.y")

    return schedule


def row_of_a_cta(most: int, loop: str = "h", threads: int = 32) -> Any:
    """A row of a CTA; with `loop` h its heads one after the other in the same memory."""

    def schedule(s: Any) -> Any:
        for name in NAMES:
            s = s.compute_at(name, loop, most=most)
        s = s.order_axes("out", "i", "h", "c").specialize("v", 4).specialize("h", 2)
        for n in NAMES:
            s = s.split(f"{n}.j", threads, into=(f"{n}_o", f"{n}_x")).bind(f"{n}_x", "thread.x")
        return s.split("c", 32, into=("c_o", "c_x")).bind("c_x", "thread.x").bind("i", "cta.x")

    return schedule


def scores_of_all(most: int, lanes: int = 4, rows: int = 8) -> Any:
    """A row and head for each group of lanes, which compute a score together."""

    def schedule(s: Any) -> Any:
        for name in NAMES:
            s = s.compute_at(name, "h", most=most)
        s = s.order_axes("out", "i", "h", "c").fuse("i", "h", into="row")
        for n in ("score.k", "top.j", "weight.j", "total.j", "c"):
            name = n.partition(".")[0]
            s = s.split(n, lanes, into=(f"{name}_o", f"{name}_x")).bind(f"{name}_x", "thread.x")
        if rows == 1:
            return s.bind("row", "cta.x")
        s = s.split("row", rows, into=("row_cta", "row_y")).bind("row_cta", "cta.x")
        return s.bind("row_y", "thread.y")

    return schedule


def in_threads(most: int = 0, size: int = 3) -> Any:
    """A dense row, its elements computed by threads."""

    def schedule(s: Any) -> Any:
        s = s.compute_at("mixed", "i", most=most)
        s = s.specialize("f", size) if size else s
        s = s.split("mixed.f", 32, into=("f_o", "f_x")).bind("f_x", "thread.x")
        s = s.split("o", 32, into=("o_o", "o_x")).bind("o_x", "thread.x")
        return s.split("i", 2, into=("i_cta", "i_s")).bind("i_cta", "cta.x")

    return schedule


def in_registers(s: Any) -> Any:
    s = s.compute_at("mixed", "i").specialize("f", 3).unroll("mixed.f").unroll("out.f")
    return s.split("o", 32, into=("o_o", "o_x")).bind("o_x", "thread.x").bind("i", "cta.x")


def lowered(definition: Any, schedule: Any) -> ir.Program:
    return run_passes(schedule(definition.scheduled(CUDA)).lowered.program, AFTER_SCHEDULE, "cuda")


def nodes(program: ir.Program, kind: Any) -> list[Any]:
    bodies = (nest.body for stage in program.stages for nest in stage)
    return [x for body in bodies for x in walk(body) if isinstance(x, kind)]


def uneven(definition: Any, rng: np.random.Generator, **sizes: int) -> dict[str, Any]:
    """Arguments with an empty row, one of all columns, and others in between."""
    args = cases.arguments(definition, rng, "sparse", **sizes)
    m, n = args["A"].shape
    dense = cases.matrix("sparse", m, n, rng)
    dense[1], dense[2] = 0, rng.uniform(0.5, 1.5, n)
    return args | {"A": cases.pack(args["A"].format, dense)}


def softmax_rows(a: Any) -> np.ndarray:
    """In float64, the values in the order of `unpack`."""
    (rows, _), values = a.unpack()
    out = np.empty(len(values))
    for i in np.unique(rows):
        mine = rows == i
        w = np.exp(values[mine].astype(np.float64) - values[mine].max())
        out[mine] = w / w.sum()
    return out


# ---- meaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "most"), [
    ("csr", 1), ("csr", 3), ("csr", 40), ("dcsr", 3), ("hyb", 3), ("hyb", 40), ("ragged", 3),
])  # fmt: skip
def test_rows_of_lanes_agree_with_numpy_after_every_pass(rng, fmt, most):
    definition = softmax.decompose(A=cases.FORMATS[fmt])
    schedule = rows_of_lanes(most)
    args = uneven(definition, rng, m=11, n=13)
    with knobs.scope(verify=True):
        cases.after_every_pass(definition, args, schedule, CUDA)
    args["A"] = cases.filled_padding(args["A"])
    got = cases.executed(definition, lowered(definition, schedule), args, cta.execute)["out"]
    np.testing.assert_allclose(got, softmax_rows(args["A"]), rtol=1e-5)


@pytest.mark.parametrize("most", [1, 16, 64])
@pytest.mark.parametrize("fmt", [tw.bsr(8), tw.dbsr(8), tw.sr_bcrs(8)], ids=str)
def test_rows_of_blocks_agree_with_numpy_after_every_pass(rng, fmt, most):
    """`most` counts elements; what is kept is a number of blocks, one at least."""
    definition, schedule = softmax.decompose(A=fmt), rows_of_blocks(most)
    args = uneven(definition, rng, m=19, n=37)
    with knobs.scope(verify=True):
        cases.after_every_pass(definition, args, schedule, CUDA)
    program = lowered(definition, schedule)
    (kept,) = (x.buffer for x in nodes(program, ir.Alloc) if x.buffer.name == "weight.row")
    sizes = [int(e.value) for e in kept.shape]
    assert sizes == ([8, max(most // 8, 1), 8] if fmt.blocks[1] > 1 else [8, most])
    args["A"] = cases.filled_padding(args["A"])
    got = cases.executed(definition, program, args, cta.execute)["out"]
    np.testing.assert_allclose(got, softmax_rows(args["A"]), rtol=1e-5)


@pytest.mark.parametrize("kind", ["empty", "dense"])
@pytest.mark.parametrize("fmt", ["csr", "hyb"])
def test_no_row_and_every_row_is_longer(rng, fmt, kind):
    definition = softmax.decompose(A=cases.FORMATS[fmt])
    args = cases.arguments(definition, rng, kind, m=11, n=5)
    cases.after_every_pass(definition, args, rows_of_lanes(4), CUDA, only_last=True)


@pytest.mark.parametrize(("fmt", "loop", "most"), [
    ("csr", "h", 2), ("csr", "i", 5), ("dcsr", "h", 40),
])  # fmt: skip
def test_attention_keeps_scores_and_weights(rng, fmt, loop, most):
    definition = attend.decompose(A=cases.FORMATS[fmt])
    schedule = row_of_a_cta(most, loop)
    args = uneven(definition, rng, **SIZES)
    with knobs.scope(verify=True):
        cases.after_every_pass(definition, args, schedule, CUDA)
    program = lowered(definition, schedule)
    got = cases.executed(definition, program, args, cta.execute)["out"]
    np.testing.assert_allclose(got.reshape(5, 2, 4), attention(args), rtol=2e-5, atol=2e-6)
    kernel = definition.schedule(schedule).build()  # a CPU keeps all of a row
    out = np.full((5, 2, 4), np.nan, np.float32)
    kernel(**args, out=out)
    np.testing.assert_allclose(out, attention(args), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("schedule", [
    in_threads(), in_threads(2), in_threads(2, 0), in_threads(40, 0), in_registers,
])  # fmt: skip
def test_a_dense_row(rng, schedule):
    args = cases.arguments(spread, rng, m=4, n=5, f=3, o=2)
    for target in (CUDA, "cpp"):
        with knobs.scope(verify=True):
            cases.after_every_pass(spread, args, schedule, target)
    expected = np.maximum(args["A"].dense().astype(np.float64) @ args["X"], 0) @ args["W"]
    got = spread.schedule(schedule).build()(*args.values())
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_an_unrolled_loop_keeps_the_length_of_its_rows(rng):
    """On a CPU each copy has a row of its own, of run-time length."""

    def schedule(s: Any) -> Any:
        for name in NAMES:
            s = s.compute_at(name, "h")
        return s.order_axes("out", "i", "h", "c").specialize("h", 2).unroll("h")

    args = uneven(attend, rng, **SIZES)
    cases.after_every_pass(attend, args, schedule)
    got = attend.schedule(schedule).build()(**args)
    np.testing.assert_allclose(got, attention(args), rtol=2e-5, atol=2e-6)


# ---- what is computed and kept ------------------------------------------------------------------


def test_nothing_is_computed_twice():
    """One launch; each product Q·K and each exponential is computed once, each score and weight
    stored once: in shared memory or behind it."""
    program = lowered(attend, row_of_a_cta(8))
    assert len(program.stages) == 1
    assert sum(x.op == "exp" for x in nodes(program, ir.Unary)) == 1
    reads = [x.buffer.name for x in nodes(program, ir.Load)]
    assert [reads.count(n) for n in "QKV"] == [1, 1, 1]
    stores = [x.buffer.name for x in nodes(program, ir.Store) if x.buffer.scope != "register"]
    rows = ["score.row", "score.values", "weight.row", "weight.values"]
    assert sorted(stores) == ["out", *rows]


def test_where_rows_are():
    rows = lambda d, s: {  # noqa: E731
        x.buffer.name: (x.buffer.scope, *(int(n.value) for n in x.buffer.shape))
        for x in nodes(lowered(d, s), ir.Alloc) if ".row" in x.buffer.name
    }  # fmt: skip
    assert rows(softmax, rows_of_lanes(5)) == {"weight.row": ("shared", 8, 5)}
    assert rows(spread, in_threads()) == {"mixed.row": ("shared", 3)}
    assert rows(spread, in_threads(2)) == {"mixed.row": ("shared", 3)}  # it is short enough
    assert rows(spread, in_threads(2, 0)) == {"mixed.row": ("shared", 2)}
    assert {scope for scope, *_ in rows(spread, in_registers).values()} == {"register"}
    assert not nodes(lowered(spread, in_registers), ir.Sync)
    heads = {"score": (6, 2), "weight": (6, 2), "top": (2,), "total": (2,)}
    expected = {f"{name}.row": ("shared", *shape) for name, shape in heads.items()}
    assert rows(attend, row_of_a_cta(6, "i")) == expected


@pytest.mark.parametrize(("most", "temps"), [(0, []), (8, ["score", "weight"])])
def test_only_rows_that_may_be_longer_have_an_array(most, temps):
    schedule = row_of_a_cta(most) if most else lambda s: s.compute_at("score", "i")
    definition = attend.schedule(schedule) if most else spread.schedule(in_threads())
    manifest = definition.build(CUDA).manifest
    assert [t.name for t in manifest.tensors if t.role == "temp"] == temps


def test_the_report_has_the_bytes_of_a_row():
    report = attend.schedule(row_of_a_cta(8)).build().report()
    shown = {(b.array, b.way): b.unique for b in report.bytes}
    for name in ("score (row)", "weight (row)"):
        assert shown[name, "read"] == shown[name, "written"] == 8 * 4


# ---- barriers -----------------------------------------------------------------------------------


def without_barrier(program: ir.Program, number: int) -> ir.Program:
    left = [number]

    def visit(s: Any) -> Any:
        if isinstance(s, ir.Sync):
            left[0] -= 1
            return ir.seq() if left[0] == -1 else s
        return rebuild(s, visit) if isinstance(s, (ir.Seq, ir.For, ir.If)) else s

    return map_bodies(program, visit)


@pytest.mark.parametrize(("definition", "schedule", "lanes"), [
    (attend, scores_of_all(3), [4, 4]),
    (attend, scores_of_all(40, 32, 1), [0, 0]),
    (spread, in_threads(), [0, 0]),  # the second one before the next row
    (spread, in_threads(2, 0), [0, 0]),
])  # fmt: skip
def test_every_dropped_barrier_is_a_race(rng, definition, schedule, lanes):
    sizes = SIZES if definition is attend else {"m": 4, "n": 5, "f": 3, "o": 2}
    args = uneven(definition, rng, **sizes)
    program = lowered(definition, schedule)
    assert [s.lanes for s in nodes(program, ir.Sync)] == lanes
    cases.executed(definition, program, args, cta.execute)
    for n in range(len(lanes)):
        with pytest.raises(cta.Refused, match="race"):
            cases.executed(definition, without_barrier(program, n), args, cta.execute)


def test_rows_that_take_turns_need_no_barrier_more():
    """Nobody reads the scores of a head any more when those of the next one are written."""
    assert len(nodes(lowered(attend, row_of_a_cta(3)), ir.Sync)) == 2


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("definition", "schedule", "code", "names"), [
    (attend, row_of_a_cta(0), "S102", ("score", "A.indptr1[i + 1]", "most=1024", 'scope="global"')),
    (spread, in_threads(0, 0), "S102", ("mixed", "f.size", "specialize()")),
    (softmax.decompose(A=tw.bitmap(counted=True)), rows_of_lanes(4), "S102",
        ("not side by side", "global")),
    (attend, lambda s: s.compute_at("score", "h", "global", 8), "S102", ("most is 8", "global")),
    (attend, lambda s: s.compute_at("score", "h", most=-1), "S102", ("most is -1",)),
    (attend, row_of_a_cta(100_000), "S103", ("bytes of shared memory", "smaller")),
    (attend, scores_of_all(4, 64, 1), "S102", ("powers of two, to 32",)),
    (spread, lambda s: s.compute_at("mixed", "i").specialize("f", 3).split("i", 32)
        .bind("i_i", "thread.x").bind("i_o", "cta.x"), "S102", ("inside a loop bound to threads",)),
])  # fmt: skip
def test_a_refusal_names_what_to_call_instead(definition, schedule, code, names):
    with pytest.raises(tw.TilewrightError) as error:
        definition.schedule(schedule).build(CUDA)
    assert error.value.code == code and error.value.hint
    for name in names:
        assert name in f"{error.value} {error.value.hint}"


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("most", [1, 64, 512])
@pytest.mark.parametrize("fmt", [tw.bsr(8), tw.dbsr(8), tw.sr_bcrs(8)], ids=str)
def test_rows_of_blocks_on_a_gpu(rng, fmt, most):
    definition = softmax.decompose(A=fmt)
    a = cases.filled_padding(uneven(definition, rng, m=301, n=3001)["A"])
    out = definition.schedule(rows_of_blocks(most)).build("cuda")(a.to("cuda"))
    np.testing.assert_allclose(out.unpack()[1], softmax_rows(a), rtol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("most", [16, 256, 2048])
@pytest.mark.parametrize("schedule", [row_of_a_cta, scores_of_all])
def test_on_a_gpu(rng, schedule, most):
    """Of rows of up to 3001 entries a CTA keeps some; lanes of a CTA with eight rows up to 256."""
    from tilewright.runtime.cuda import DeviceArray

    args = uneven(attend, rng, m=301, n=3001, d=33, v=4, h=2)
    most = most if schedule is row_of_a_cta else min(most, 256)
    given = {n: DeviceArray.from_numpy(args[n]) for n in "QKV"}
    out = DeviceArray.from_numpy(np.full((301, 2, 4), np.nan, np.float32))
    kernel = attend.schedule(schedule(most)).build("cuda")
    kernel(args["A"].to("cuda"), **given, scale=args["scale"], out=out)
    np.testing.assert_allclose(out.to_numpy(), attention(args), rtol=2e-5, atol=2e-6)
