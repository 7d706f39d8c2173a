"""Programs and schedules that once reached a compiler as text that it refused, or computed other
numbers: each is compared with NumPy in float64, or refused with a code."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from tests.compiler import cta
from tests.compiler.cases import column_norm, executed, gemm, spmm

import tilewright as tw
from tilewright.errors import InternalError, ProgramError, ScheduleError
from tilewright.ir.levels import Compressed, Dense
from tilewright.ir.nodes import For, Load, Var, as_expr, unary
from tilewright.ir.rewrite import transform
from tilewright.ir.verify import verify
from tilewright.target import target
from tilewright.toolchain import compilers, nvrtc

TARGETS = ("interp", "cpp")
F, D = np.float32, np.float64


def both(definition, *args, **options):
    """The results on both targets, after a check that they are close."""
    first, second = (np.asarray(definition.build(t)(*args, **options)) for t in TARGETS)
    np.testing.assert_allclose(first.astype(D), second.astype(D), rtol=1e-5, atol=1e-5)
    return second


def entries(rng, m, n, density=0.5):
    return ((rng.random((m, n)) < density) * rng.standard_normal((m, n))).astype(F)


# ---------------------------------------------------------------------------- operands


OPERATORS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "//": operator.floordiv, "%": operator.mod,
}  # fmt: skip
CHOICES = {
    "<": (operator.lt, np.less), "<=": (operator.le, np.less_equal),
    ">": (operator.gt, np.greater), ">=": (operator.ge, np.greater_equal),
    "max": (tw.maximum, np.maximum), "min": (tw.minimum, np.minimum),
}  # fmt: skip
NUMBERS = (np.float32(2), np.float64(2), np.float16(2), np.int32(2), np.uint8(2), np.array(2.0), 2)


@pytest.mark.parametrize("op", [*OPERATORS, *CHOICES])
def test_numbers_scalars_and_temporaries_are_operands_on_either_side(rng, op):
    act, plain = (OPERATORS[op],) * 2 if op in OPERATORS else CHOICES[op]

    @tw.program
    def one(X=tw.dense("n"), s=tw.scalar()):
        i = tw.indices("n")
        t = tw.temp.named("t")[()](tw.sum(X[i], over=i))
        pairs = [pair for v in NUMBERS for pair in ((X[i], v), (v, X[i]), (s, v), (v, s))]
        pairs += [(s, X[i]), (X[i], s), (s, s), (t, 2), (2, t), (t, X[i]), (X[i], t[()]), (-s, t)]
        made = [act(a, b) for a, b in pairs]
        made = [tw.where(e, 1.0, 0.0) if e.dtype.kind == "b" else e + 0 * X[i] for e in made]
        return tuple(tw.out.named(f"o{n}")[i](e) for n, e in enumerate(made))

    x, s = (rng.random(5) + 1.25).astype(F), 2.5
    t = x.astype(D).sum()
    pairs = [p for v in NUMBERS for p in ((x, v), (v, x), (s, v), (v, s))]
    pairs += [(s, x), (x, s), (s, s), (t, 2), (2, t), (t, x), (x, t), (-s, t)]
    wanted = [plain(np.asarray(a, D), np.asarray(b, D)) + np.zeros(5) for a, b in pairs]
    for name in TARGETS:
        for got, right in zip(one.build(name)(x, s), wanted, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)


def test_whole_powers(rng):
    @tw.program
    def powers(X=tw.dense("n"), s=tw.scalar()):
        i = tw.indices("n")
        every = [X[i] ** n + 0 * X[i] for n in (0, 1, 2, 3, 7, -2, np.int64(2), 2.0)]
        return tuple(tw.out.named(f"o{n}")[i](e) for n, e in enumerate([*every, s**2 * X[i]]))

    x = rng.standard_normal(6).astype(F)
    wanted = [x.astype(D) ** n for n in (0, 1, 2, 3, 7, -2, 2, 2)] + [9 * x.astype(D)]
    for name in TARGETS:
        for got, right in zip(powers.build(name)(x, 3.0), wanted, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-4)
    for bad in (0.5, 65, as_expr(2)):
        with pytest.raises(ProgramError, match="P106"):
            _ = as_expr(2.0) ** bad
    with pytest.raises(ProgramError, match="P106"):
        _ = 2 ** as_expr(1.0)


def test_negated_negative_numbers_and_the_ends_of_types(rng):
    @tw.program
    def one(X=tw.dense("n"), N=tw.dense("n", "int64"), U=tw.dense("n", "uint32")):
        i = tw.indices("n")
        return (
            tw.out.named("a")[i](X[i] * unary("-", as_expr(-1.5))),
            tw.out.named("b")[i](tw.maximum(N[i], -(2**63))),
            tw.out.named("c")[i](tw.minimum(U[i] + (2**32 - 1), 2**32 - 2)),
        )

    x = rng.standard_normal(4).astype(F)
    n, u = rng.integers(-9, 9, 4), np.array([0, 1, 2, 3], np.uint32)
    for name in TARGETS:
        a, b, c = one.build(name)(x, n, u)
        np.testing.assert_array_equal(a, x * F(1.5))
        np.testing.assert_array_equal(b, n)
        np.testing.assert_array_equal(c, [2**32 - 2, 0, 1, 2])


BOOLS = {
    "stored": (lambda B, X, H: X > 0, lambda b, x, h: x > 0),
    "copied": (lambda B, X, H: B, lambda b, x, h: b),
    "both widths": (lambda B, X, H: (H < 0.5) & (X > 0), lambda b, x, h: (h < 0.5) & (x > 0)),
    "read": (lambda B, X, H: B | (H > 0.5), lambda b, x, h: b | (h > 0.5)),
    "xor": (lambda B, X, H: B ^ (X > 0), lambda b, x, h: b ^ (x > 0)),
    "equal": (lambda B, X, H: tw.equal(B, X > 0), lambda b, x, h: b == (x > 0)),
    "less": (lambda B, X, H: (X > 0) > B, lambda b, x, h: b < (x > 0)),
    "converted": (lambda B, X, H: X.cast("bool"), lambda b, x, h: x != 0),
    "counted": (lambda B, X, H: B + (X > 0), lambda b, x, h: b.astype(int) + (x > 0)),
    "chosen": (lambda B, X, H: tw.where(B, 1.5, 2.0), lambda b, x, h: np.where(b, 1.5, 2.0)),
}


@pytest.mark.parametrize("case", BOOLS)
def test_vectors_of_bool(rng, case):
    act, plain = BOOLS[case]

    @tw.program
    def one(B=tw.dense("n", "bool"), X=tw.dense("n"), H=tw.dense("n", "float64")):
        i = tw.indices("i:n")
        return tw.out[i](act(B[i], X[i], H[i]))

    args = rng.random(32) < 0.5, rng.standard_normal(32).astype(F), rng.standard_normal(32)
    args[1][::5] = 0
    vector = one.schedule(lambda s: s.specialize("n", 32).split("i", 8).vectorize("i_i"))
    np.testing.assert_array_equal(both(vector, *args), plain(*args))
    compiled_for_cuda(vector)


def compiled_for_cuda(definition):
    from tilewright import compiler
    from tilewright.codegen import prelude_files

    kind = target("cuda:sm_80")
    source = compiler.rendered(definition.lower(kind), kind).source
    assert nvrtc.compile_cuda(source, arch="sm_80", headers=prelude_files.headers()).image


# ---------------------------------------------------------------------------- copies and cuts


@tw.program
def spmv(A=tw.sparse("m n"), x=tw.dense("n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[i](tw.sum(A[i, j] * x[j], over=j))


@pytest.mark.parametrize("factors", [(6, 4), (6, 3), (5, 2), (7, 4), (8, 8)])
def test_two_loops_that_are_written_out(rng, factors):
    a, b = factors
    d = spmv.schedule(lambda s: s.split("j", a).split("j_i", b).unroll("j_i_o").unroll("j_i_i"))
    m, x = entries(rng, 9, 40), rng.standard_normal(40).astype(F)
    np.testing.assert_allclose(d.build("cpp")(tw.csr().pack(m), x), m.astype(D) @ x, atol=1e-4)


@pytest.mark.parametrize("scope", ["shared", "register"])
def test_scratch_of_one_element(rng, scope):
    @tw.program
    def scaled(X=tw.dense("n"), Y=tw.dense("n d")):
        i, k = tw.indices("i:n k:d")
        return tw.out[i, k](X[i] * Y[i, k])

    x, y = rng.standard_normal(5).astype(F), rng.standard_normal((5, 32)).astype(F)
    d = scaled.schedule(lambda s: s.specialize("d", 32).cache("X", "i", scope))
    np.testing.assert_allclose(d.build("cpp")(x, y), x[:, None] * y, rtol=1e-6)
    compiled_for_cuda(
        scaled.schedule(
            lambda s: s.specialize("d", 32).cache("X", "i", scope)
            .bind("i", "cta.x").bind("k", "thread.x")
        )
    )  # fmt: skip


def test_a_cache_over_two_cuts_reads_in_two_ways():
    blocks = tw.Format("blocks", (Dense(0), Compressed(1, 3), Dense(1, 3, True)))

    @tw.program
    def rows(A=tw.sparse("m n")):
        i, j = tw.indices("i:m j:n")
        return tw.out[i](tw.sum(A[i, j], over=j))

    s = rows.decompose(A=blocks).scheduled()
    s = s.split("j_i", 3, tail="cut").split("j_i_i", 4, tail="cut")
    with pytest.raises(ScheduleError, match="more than one way"):
        s.cache("A", "j_o_p", "register")


CUTS = {
    "once": lambda s: s.split("k", 4, tail="cut"),
    "vector": lambda s: s.split("k", 8, tail="cut").vectorize("k_i"),
    "twice": lambda s: s.split("k", 4, tail="cut").split("k_i", 2, tail="cut").unroll("k_i_i"),
    "outside": lambda s: s.split("k", 2, tail="cut").split("k_o", 2, tail="cut"),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("d", [3, 5, 8, 11])
@pytest.mark.parametrize("fmt", [tw.csr(), tw.ell(11), tw.csc(), tw.bsr(2)], ids=str)
def test_a_cut_inside_a_sum(rng, fmt, d, cut):
    def inside(s):
        s = s.specialize("d", d)
        return CUTS[cut](s.reorder("j", "k") if s.has("j") else s)

    m, x = entries(rng, 7, 11), rng.standard_normal((11, d)).astype(F)
    made = spmm.decompose(A=fmt).schedule(inside).build("cpp")
    np.testing.assert_allclose(made(fmt.pack(m), x), m.astype(D) @ x, atol=1e-4)


@pytest.mark.parametrize("fmt", [tw.csr(), tw.csc(), tw.dcsr(), tw.ell(11), tw.bsr(2)], ids=str)
def test_a_fixed_row_or_column_beside_a_sum(rng, fmt):
    @tw.program
    def column_sums(A=tw.sparse("m n")):
        i, j = tw.indices("m n")
        return tw.out[j](tw.sum(A[i, j], over=i) + A[2, j])

    @tw.program
    def row_sums(A=tw.sparse("m n")):
        i, j = tw.indices("m n")
        return tw.out[i](tw.sum(A[i, j], over=j) * A[i, 1])

    m = entries(rng, 7, 11)
    wide, packed = m.astype(D), fmt.pack(m)
    down, across = (p.decompose(A=fmt) for p in (column_sums, row_sums))
    np.testing.assert_allclose(both(down, packed), wide.sum(0) + wide[2], atol=1e-4)
    np.testing.assert_allclose(both(across, packed), wide.sum(1) * wide[:, 1], atol=1e-4)


@pytest.mark.parametrize("copies", [2, 4, 64])
@pytest.mark.parametrize("factor", [2, 5, 100_000_000])
@pytest.mark.parametrize("count", [0, 1, 5, 23])
def test_copies_of_an_output_count_each_entry_once(rng, count, factor, copies):
    made = spmv.decompose(A=tw.coo()).schedule(
        lambda s: s.privatize("out", "i", copies).split("i_p", factor, tail="cut")
    )
    m = np.zeros((6, 8), F)
    m.flat[rng.choice(48, count, replace=False)] = 1
    x = rng.standard_normal(8).astype(F)
    np.testing.assert_allclose(made.build("cpp")(tw.coo().pack(m), x), m.astype(D) @ x, atol=1e-4)


def test_a_cache_stands_before_the_use_when_a_barrier_was_dropped(rng):
    """The copies, not the barrier after them, say where the next one goes."""
    from dataclasses import replace

    from tilewright.ir.nodes import Compute, Seq, Store, Sync
    from tilewright.ir.rewrite import statements
    from tilewright.schedule import staging

    s = spmm.scheduled().specialize("d", 8).split("j", 4, tail="cut").cache("X", "j_o", "shared")
    (nest,) = s.nests

    def dropped(x):
        if isinstance(x, Seq) and any(isinstance(y, Sync) for y in x.body):
            first = next(n for n, y in enumerate(x.body) if isinstance(y, Sync))
            return replace(x, body=(*x.body[:first], *x.body[first + 1 :]))
        return x

    body, _ = staging.cache(transform(nest.body, dropped), "A", "j_o", "shared")
    order = [
        x for x in statements(body)
        if isinstance(x, Compute) or (isinstance(x, Store) and x.buffer.name == "A_shared")
    ]  # fmt: skip
    assert isinstance(order[0], Store) and any(isinstance(x, Compute) for x in order)


# ---------------------------------------------------------------------------- atomics, updates


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "uint32"])
@pytest.mark.parametrize("op", ["sum", "prod", "max", "min"])
def test_atomics_that_exist_are_right_and_others_are_refused(rng, op, dtype):
    @tw.program
    def columns(A=tw.sparse("m n", dtype)):
        i, j = tw.indices("i:m j:n")
        return tw.out.typed(dtype)[j](getattr(tw, op)(A[i, j], over=i))

    m = rng.integers(1, 5, (6, 4)).astype(dtype)
    made = columns.schedule(lambda s: s.atomic("out").parallel("i"))
    if op == "prod" or dtype in ("int64", "uint32"):
        with pytest.raises(ScheduleError, match=f"no atomic {op} of {dtype}"):
            made.build("cpp")
        return
    wanted = getattr(np, op)(m.astype(D), axis=0)
    np.testing.assert_allclose(made.build("cpp")(tw.csr().pack(m)), wanted)
    gpu = columns.schedule(lambda s: s.atomic("out").bind("i", "cta.x"))
    compiled_for_cuda(gpu)


@tw.program
def scatter_add(Y=tw.dense("m"), at=tw.dense("t", "int32"), X=tw.dense("t")):
    t = tw.indices("t")
    return tw.update(Y).add[at[t]](X[t])


@pytest.mark.parametrize("how", ["interp", "cpp", "atomic", "blocks"])
def test_adding_at_coordinates_that_repeat(rng, how):
    recipes = {
        "atomic": lambda s: s.atomic("Y").parallel("t"),
        "blocks": lambda s: s.atomic("Y").split("t", 8).parallel("t_o"),
    }
    made = scatter_add.schedule(recipes[how]) if how in recipes else scatter_add
    at = rng.integers(-2, 9, 300).astype(np.int32)  # outside too: nothing is stored there
    x, start = rng.standard_normal(300).astype(F), rng.standard_normal(7).astype(F)
    wanted, inside = start.astype(D), (at >= 0) & (at < 7)
    np.add.at(wanted, at[inside], x[inside])
    y = start.copy()
    made.build(how if how in TARGETS else "cpp")(y, at, x)
    np.testing.assert_allclose(y, wanted, atol=1e-4)


def test_adding_in_parallel_is_refused_without_atomics():
    for recipe in (
        lambda s: s.parallel("t"),
        lambda s: s.bind("t", "cta.x"),
        lambda s: s.split("t", 8).parallel("t_o"),
        lambda s: s.split("t", 32).bind("t_i", "thread.x"),
        lambda s: s.privatize("Y", "t", 4),
    ):
        with pytest.raises(ScheduleError, match="S102"):
            recipe(scatter_add.scheduled())
    compiled_for_cuda(
        scatter_add.schedule(
            lambda s: s.atomic("Y").split("t", 32).bind("t_o", "cta.x").bind("t_i", "thread.x")
        )
    )


def test_threads_that_would_update_one_element_in_memory_are_refused():
    """Columns of blocks: the reduction over the rows of a block comes back to them."""
    columns = column_norm.decompose(A=tw.dbsr(2)).schedule(lambda s: s.bind("i_i", "thread.x"))
    with pytest.raises(ScheduleError, match=r"threads of loop i_i update out\.0") as refused:
        columns.lower("cuda:sm_90a")
    assert refused.value.code == "S102" and "atomic()" in refused.value.hint


def test_adding_halves_of_coordinates_shares_elements(rng):
    """Neighbours add to one element; different rows do not."""

    @tw.program
    def pairs(Y=tw.dense("m d"), X=tw.dense("t d")):
        t, k = tw.indices("t d")
        return tw.update(Y).add[t // 2, k](X[t, k])

    with pytest.raises(ScheduleError, match="same elements"):
        pairs.scheduled().parallel("t")
    y, x = np.ones((4, 3), F), rng.standard_normal((8, 3)).astype(F)
    pairs.schedule(lambda s: s.reorder("d", "t").parallel("d")).build("cpp")(y, x)
    np.testing.assert_allclose(y, 1 + x.reshape(4, 2, 3).astype(D).sum(1), atol=1e-5)


def test_updates_that_depend_on_their_order_are_refused(rng):
    def refused(body, dtype="float32"):
        with pytest.raises(ProgramError) as caught:

            @tw.program
            def one(Y=tw.dense("m", dtype), at=tw.dense("m", "int32"), X=tw.dense("m", dtype)):
                return body(Y, at, X, tw.indices("m"))

        assert caught.value.hint
        return caught.value.code

    assert refused(lambda Y, at, X, t: tw.update(Y)[at[t]](Y[at[t]] + X[t])) == "P103"
    assert refused(lambda Y, at, X, t: tw.update(Y)[t](Y[t + 1])) == "P103"
    assert refused(lambda Y, at, X, t: tw.update(Y).add[at[t]](Y[at[t]])) == "P103"
    assert refused(lambda Y, at, X, t: tw.update(Y).add[at[t]](X[t]), "float16") == "P106"

    @tw.program
    def doubled(Y=tw.dense("m")):
        i = tw.indices("m")
        return tw.update(Y)[i](Y[i] * 2)

    for name in TARGETS:
        y = rng.standard_normal(5).astype(F)
        wanted = y * 2
        doubled.build(name)(y)
        np.testing.assert_array_equal(y, wanted)


# ---------------------------------------------------------------------------- names, verifier


def test_loops_have_the_names_of_dimensions():
    @tw.program
    def scores(Q=tw.dense("m h d"), K=tw.dense("n h d")):
        i, j, head, c = tw.indices("m n h d")
        return tw.out[i, j, head](tw.sum(Q[i, head, c] * K[j, head, c], over=c))

    @tw.program
    def named(A=tw.sparse("n n"), out_=tw.dense("out n")):
        i, row, j = tw.indices("out row:n n")
        return tw.out[i](tw.sum(A[row, j] * out_[i, row], over=(row, j)))

    assert scores.scheduled().loops == ["m", "n", "h", "d"]
    split = scores.schedule(lambda s: s.split("h", 4))
    assert "h_o" in split.scheduled().loops
    assert set(named.scheduled().loops) == {"i_out", "row", "n_p"}
    assert spmm.scheduled().loops == ["i", "k", "j_p"]

    @tw.program
    def square(A=tw.dense("n n")):
        i, j = tw.indices("n n")
        return tw.out[i, j](A[j, i])

    assert square.scheduled().loops == ["n", "n1"]
    with pytest.raises(ScheduleError, match=r"no loop is called 'jp'") as caught:
        spmm.scheduled().split("jp", 4)
    assert caught.value.code == "S101" and "did you mean j_p? loops: i, k, j_p" in caught.value.hint


@pytest.mark.parametrize(
    "fmt", [tw.csr(), tw.coo(), tw.csc(), tw.hyb(), tw.bsr(4), tw.hyb(2, (2, 8))], ids=str
)
def test_the_recipe_of_spmm_takes_any_names(rng, fmt):
    @tw.program
    def product(B=tw.sparse("rows cols"), W=tw.dense("cols f")):
        r, c, e = tw.indices("rows cols f")
        return tw.out.named("Y")[r, e](tw.sum(B[r, c] * W[c, e], over=c))

    m, w = entries(rng, 30, 20, 0.3), rng.standard_normal((20, 19)).astype(F)
    made = product.decompose(B=fmt).schedule(tw.recipes.spmm)
    np.testing.assert_allclose(made.build("cpp")(fmt.pack(m), w), m.astype(D) @ w, atol=1e-4)
    with pytest.raises(ScheduleError, match="S102"):
        spmv.schedule(tw.recipes.spmm).build("cpp")


def test_text_is_rendered_from_verified_programs_only(monkeypatch):
    """No compiler sees the text of a pass that loses a name, which the knob tells by its own."""
    from tilewright import compiler, knobs, lower

    def losing(program):
        def visit(x):
            lost = isinstance(x, For) and x.name == "j_p"
            return For(Var("other", x.var.dtype), x.begin, x.end, x.body) if lost else x

        (stage,) = program.stages
        nests = tuple(
            type(n)(n.name, transform(n.body, visit), n.part, n.grid, n.grid_vars, n.threads)
            for n in stage
        )
        return type(program)(
            program.name, program.level, program.tensors, program.body, (nests,), program.buffers
        )

    passes = (*lower.AFTER_SCHEDULE[:-1], lower.Pass(losing), lower.AFTER_SCHEDULE[-1])
    monkeypatch.setattr(compiler, "AFTER_SCHEDULE", passes)
    for each_pass, where in ((False, "after the last pass"), (True, "after losing")):
        with (
            knobs.scope(verify=each_pass),
            pytest.raises(InternalError, match=f"{where}: j_p is not"),
        ):
            spmm.build("cpp")


@pytest.mark.parametrize("scope", ["global", "part", "shared", "register"])
def test_the_verifier_knows_every_buffer(scope):
    from dataclasses import replace

    program = spmm.lower("cpp")

    def visit(x):
        if isinstance(x, Load) and x.buffer.name == "X":
            return replace(x, buffer=replace(x.buffer, name="nobody", scope=scope))
        return x

    nests = tuple(replace(n, body=transform(n.body, visit)) for n in program.stages[0])
    with pytest.raises(InternalError, match="nobody"):
        verify(replace(program, stages=(nests,)))


def test_refusals_name_the_loops_and_the_way_out():
    s = spmm.schedule(lambda s: s.parallel("k"))
    with pytest.raises(ScheduleError, match="parallel loop k is inside serial loop i"):
        s.build("cpp")
    s = spmm.schedule(lambda s: s.split("k", 8).reorder("j", "k_i").vectorize("k_i"))
    with pytest.raises(ScheduleError, match="differs from lane to lane") as caught:
        s.build("cpp")
    assert 'tail="cut"' in caught.value.hint
    s = spmm.schedule(lambda s: s.specialize("d", 8).vectorize("k").cache("A", "j", "shared"))
    with pytest.raises(ScheduleError, match="fills A_shared") as caught:
        s.build("cpp")
    assert "around" in caught.value.hint


def test_a_guarded_register_is_no_load_from_memory():
    def threads(s):
        s = s.specialize("m", 5).specialize("n", 5).split("k", 2)
        return s.bind("k_i", "thread.y").bind("j", "thread.x").cache("A", "k_i", "register")

    compiled_for_cuda(gemm.schedule(threads))


# ---------------------------------------------------------------------------- shifts, remainders


def lanes(s):
    return s.split("i", 8, tail="cut").vectorize("i_i")


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32", "uint64"])
def test_shifts_beyond_the_width_leave_nothing_or_the_sign(rng, dtype):
    @tw.program
    def shifts(X=tw.dense("n", dtype), N=tw.dense("n", dtype)):
        i = tw.indices("i:n")
        made = (X[i] << N[i], X[i] >> N[i], X[i] << 3, X[i] >> 100, X[i] << 70)
        return tuple(tw.out.named(f"o{n}")[i](e) for n, e in enumerate(made))

    bits = np.dtype(dtype).itemsize * 8
    info = np.iinfo(dtype)
    counts = np.array([0, 1, bits - 1, bits, bits + 1, 99, -1 if info.min < 0 else 7, 5, 2] * 2)
    x = rng.integers(max(info.min, -(2**31)), min(info.max, 2**31), len(counts)).astype(dtype)

    def plain(v, n, left):  # on Python's integers
        if not 0 <= n < bits:
            return 0 if left or v >= 0 else -1
        moved = (v << n) if left else (v >> n)
        return (moved - info.min) % 2**bits + info.min

    wanted = [
        [plain(int(v), int(n), left) for v, n in zip(x, counts, strict=True)]
        for left in (True, False)
    ]
    for n, left in ((3, True), (100, False), (70, True)):
        wanted.append([plain(int(v), n, left) for v in x])
    for made in (shifts.build("interp"), shifts.build("cpp"), shifts.schedule(lanes).build("cpp")):
        for got, right in zip(made(x, counts.astype(dtype)), wanted, strict=True):
            np.testing.assert_array_equal(got, np.array(right, dtype))
    compiled_for_cuda(shifts)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_quotients_and_remainders_of_floats_are_those_of_numpy(dtype):
    @tw.program
    def divided(X=tw.dense("n", dtype), Y=tw.dense("n", dtype)):
        i = tw.indices("i:n")
        return tw.out.named("q")[i](X[i] // Y[i]), tw.out.named("r")[i](X[i] % Y[i])

    some = [0.0, -0.0, 1.0, -1.0, 7.5, -7.5, 0.1, 1e30, np.inf, -np.inf, np.nan, 3.0, -0.3]
    x, y = (g.ravel().astype(dtype) for g in np.meshgrid(some, some))
    with np.errstate(all="ignore"):
        wanted = x // y, x % y
    for made in (divided.build("cpp"), divided.schedule(lanes).build("cpp")):
        for got, right in zip(made(x, y), wanted, strict=True):
            np.testing.assert_array_equal(got, right)
            signed = ~np.isnan(right)
            np.testing.assert_array_equal(np.signbit(got[signed]), np.signbit(right[signed]))
    compiled_for_cuda(divided)
    compiled_for_cuda(divided.schedule(lanes))


@tw.program
def scaled_entries(B=tw.sparse("m n"), X=tw.dense("m d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[i, j, k](B[i, j] * X[i, k])


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
def test_a_vector_loop_of_one_lane_beside_its_tail(rng):
    """The searches of the vector loop and those of its tail have names of their own."""
    dense = np.where(rng.random((4, 5)) < 0.5, rng.standard_normal((4, 5)), 0).astype(np.float32)
    x = rng.standard_normal((4, 3)).astype(np.float32)

    def schedule(s):
        s = s.split("k", 1, tail="cut", into=("k_o", "k_i"))
        return s.reorder("k_i", "k_o").vectorize("k_i")

    kernel = scaled_entries.decompose(B=tw.csr()).schedule(schedule).build("cpp")
    np.testing.assert_array_equal(kernel(tw.csr().pack(dense), x), dense[:, :, None] * x[:, None])


# ---------------------------------------------------------------------------- threads


@tw.program
def least_of_columns(A=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[j](tw.min(A[i, j], over=i))


@pytest.mark.parametrize(("fmt", "order"), [
    (tw.dcsr(), ()), (tw.csr(), ()), (tw.ell(4), ()), (tw.ell(4), ("j_p", "i")),
], ids=str)  # fmt: skip
def test_threads_share_no_element_between_two_rows(rng, fmt, order):
    """A thread's entries of the next row may lie in a column that another thread had in this one,
    and no barrier is in between: refused, but for atomic updates."""

    def threads(s, atomic):
        s = s.reorder(*order) if order else s.split("j_p", 2)
        s = s.bind("j_p" if order else "j_p_i", "thread.y")
        return s.atomic("out") if atomic else s

    definition = least_of_columns.decompose(A=fmt)
    with pytest.raises(ScheduleError, match="in memory at once") as caught:
        definition.schedule(lambda s: threads(s, False)).lower("cuda:sm_90a")
    assert caught.value.code == "S102" and "atomic()" in caught.value.hint
    dense = np.where(rng.random((5, 6)) < 0.5, rng.integers(1, 9, (5, 6)), 0).astype(F)
    dense[:, 4:] *= dense[:, :2] == 0  # at most four of a row
    args = {"A": fmt.pack(dense)}
    program = definition.schedule(lambda s: threads(s, True)).lower("cuda:sm_90a")
    got = executed(definition, program, args, cta.execute)["out"]
    np.testing.assert_array_equal(got, np.where(dense, dense, np.inf).min(0))


@pytest.mark.parametrize("fmt", [tw.coo(), tw.bucket(2, split=True)], ids=str)
def test_threads_share_no_row_that_is_stored_in_pieces(rng, fmt):
    def threads(s):
        return s.split("i_p", 4).bind("i_p_i", "thread.x")

    definition = spmm.decompose(A=fmt)
    with pytest.raises(ScheduleError, match="in memory at once") as caught:
        definition.schedule(threads).lower("cuda:sm_90a")
    assert caught.value.code == "S102" and "atomic()" in caught.value.hint


@tw.program
def row_sums(A=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[i](tw.sum(A[i, j], over=j))


@pytest.mark.parametrize("tail", ["cut", "guard"])
@pytest.mark.parametrize("fmt", [tw.band(-1, 1), tw.dia(0, 2), tw.ragged()], ids=str)
def test_a_cut_of_rows_that_lie_outside(rng, fmt, tail):
    """A tail that began in front of such a row added entries of rows before it."""
    dense = np.triu(np.tril(entries(rng, 9, 4, 1.0), 1), -1)
    dense = dense * np.eye(9, 4, dtype=F) if fmt == tw.dia(0, 2) else dense
    x = rng.standard_normal(4).astype(F)
    cut = spmv.decompose(A=fmt).schedule(lambda s: s.split("j", 4, tail=tail))
    np.testing.assert_allclose(both(cut, fmt.pack(dense), x), dense @ x, rtol=1e-5, atol=1e-5)
    loop = "j_p" if fmt == tw.dia(0, 2) else "j"
    cut = row_sums.decompose(A=fmt).schedule(lambda s: s.split(loop, 8, tail=tail))
    np.testing.assert_allclose(both(cut, fmt.pack(dense)), dense.sum(1), rtol=1e-5, atol=1e-5)


def test_registers_are_filled_by_the_thread_that_reads_them():
    s = gemm.scheduled("cuda").specialize("k", 12).cache("A", "i", "register")
    for kind in ("thread.x", "cta.x"):
        with pytest.raises(ScheduleError, match="fills registers of one thread"):
            s.bind("k_A_register", kind)


def test_a_total_that_an_epilogue_reads_is_in_its_loop(rng):
    @tw.program
    def mixed(A=tw.dense("m n"), X=tw.dense("m d")):
        i, j, k = tw.indices("i:m j:n k:d")
        return tw.out[i](tw.sum(A[i, j], over=j) * 2.0 + tw.sum(X[i, k], over=k))

    a, x = entries(rng, 4, 5), entries(rng, 4, 3)
    wanted = 2 * a.sum(1) + x.sum(1)
    swapped = mixed.schedule(lambda s: s.order_axes("out", "j", "i", "k").specialize("m", 4))
    np.testing.assert_allclose(both(swapped, a, x), wanted, rtol=1e-5, atol=1e-5)


def test_a_loop_of_one_iteration_beside_its_tail(rng):
    @tw.program
    def filled(A=tw.sparse("m n"), X=tw.dense("n")):
        i, j = tw.indices("i:m j:n")
        return tw.out[i, j](A[i, j] * X[j])

    dense, x = entries(rng, 5, 6), rng.standard_normal(6).astype(F)
    cut = filled.decompose(A=tw.dbsr(2)).schedule(
        lambda s: s.specialize("n", 6).split("j", 4, tail="cut").unroll("j_o").unroll("j_i")
    )
    np.testing.assert_allclose(both(cut, tw.dbsr(2).pack(dense), x), dense * x, rtol=1e-6)
    compiled_for_cuda(
        cut.schedule(
            lambda s: (
                s.specialize("n", 6).split("j", 4, tail="cut").unroll("j_o").bind("j_i", "thread.x")
            )
        )
    )


@tw.program
def diagonals(X=tw.dense("m n"), Y=tw.dense("p")):
    i, j = tw.indices("i:m j:n")
    return tw.update(Y).add[i + j](X[i, j])


@pytest.mark.parametrize(("target", "verb"), [
    ("cpp", lambda s: s.parallel("i")),
    ("cpp", lambda s: s.reorder("j", "i").parallel("j")),
    ("cuda:sm_90a", lambda s: s.bind("i", "cta.x")),
    ("cuda:sm_90a", lambda s: s.split("j", 2).bind("j_i", "thread.x")),
])  # fmt: skip
def test_units_of_a_coordinate_of_two_indices_share_elements(target, verb):
    """i + j is the same for many pairs: a unit of i has no elements of its own."""
    with pytest.raises(ScheduleError, match="update the same elements of Y") as caught:
        diagonals.schedule(verb).lower(target)
    assert caught.value.code == "S102" and "atomic()" in caught.value.hint
    atomic = diagonals.schedule(lambda s: verb(s.atomic("Y"))) if target != "cpp" else None
    assert atomic is None or atomic.lower(target)
