"""Every refusal has its code, names what was wrong, and says how to mend it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
from tests.compiler.cases import (
    FORMATS,
    arguments,
    matrix,
    rgcn,
    row_pairs,
    sddmm,
    spmm,
    triangles,
    two_sparse,
)  # fmt: skip

import tilewright as tw
from tilewright import knobs
from tilewright.errors import (
    ArgumentError,
    BuildError,
    FormatError,
    InternalError,
    KnobError,
    ProgramError,
    TilewrightError,
)
from tilewright.ir.levels import Compressed, Dense, Fixed, Singleton
from tilewright.ir.nodes import (
    Assign,
    Binary,
    Const,
    For,
    Let,
    Nest,
    Program,
    Seq,
    Store,
    Var,
)  # fmt: skip
from tilewright.ir.verify import verify

I, V = np.array, np.array([1.0, 2.0, 3.0], np.float32)


def refusal(kind, code, name, act, *, hint=True) -> TilewrightError:
    """`hint`: the error has one of its own, not that of its code only."""
    with pytest.raises(kind) as caught:
        act()
    e = caught.value
    assert e.code == code, str(e)
    assert name in f"{e.message} {e.where}", str(e)
    assert "\n  hint: " in str(e) and (e.hint or not hint), str(e)
    return e


# ---------------------------------------------------------------------------- formats, packing

FORMS = [
    ("no levels", lambda: tw.Format("f", ())),
    ("dimension 1", lambda: tw.Format("f", (Dense(0), Dense(2)))),
    ("whole", lambda: tw.Format("f", (Dense(0), Dense(0), Dense(1)))),
    ("whole", lambda: tw.Format("f", (Dense(0, block=4), Dense(1)))),
    ("singleton", lambda: tw.Format("f", (Dense(0), Singleton(1)))),
    ("outermost", lambda: tw.Format("f", (Fixed(0, width=2), Dense(1)))),
    ("width -1", lambda: tw.Format("f", (Dense(0), Fixed(1, width=-1)))),
    ("bsr(0)", lambda: tw.bsr(0)),
    ("buckets=(4, 2)", lambda: tw.hyb(buckets=(4, 2))),
    ("buckets=()", lambda: tw.hyb(buckets=())),
    ("col_parts=0", lambda: tw.hyb(0)),
    ("long_rows='no'", lambda: tw.hyb(long_rows="no")),
    ("long_rows", lambda: tw.hyb(long_rows=np.ones(2))),  # type: ignore[arg-type]
    ("counted", lambda: tw.bitmap(counted=np.ones(2))),  # type: ignore[arg-type]
    ("name is 3", lambda: tw.Format(3, (Dense(0), Dense(1)))),  # type: ignore[arg-type]
    ("levels is 3", lambda: tw.Format("f", 3)),  # type: ignore[arg-type]
    ("levels[1] is 3", lambda: tw.Format("f", (Dense(0), 3))),  # type: ignore[arg-type]
    ("name is None", lambda: tw.Composed(None, ((tw.Where(), tw.csr()),))),  # type: ignore[arg-type]
    (
        "disjoint_rows is 'no'",
        lambda: tw.Composed("c", ((tw.Where(), tw.csr()),), "no"),  # type: ignore[arg-type]
    ),
    (
        "covers_rows is [1]",
        lambda: tw.Composed("c", ((tw.Where(), tw.csr()),), True, [1]),  # type: ignore[arg-type]
    ),
    ("no parts", lambda: tw.Composed("c", ())),
    (
        "dimensions",
        lambda: tw.Composed(
            "c", ((tw.Where(), tw.csr()), (tw.Where(), tw.Format("v", (Dense(0),))))
        ),
    ),
]


@pytest.mark.parametrize(("name", "make"), FORMS, ids=range(len(FORMS)))
def test_f101_formats(name, make):
    refusal(FormatError, "F101", name, make, hint=False)


CSR = tw.csr()
PACKED = [
    ("F102", "Thing", lambda: CSR.pack(type("Thing", (), {})())),
    ("F102", "str", lambda: CSR.pack("matrix")),
    ("F102", "has 3", lambda: CSR.pack(np.ones((2, 2, 2)))),
    ("F102", "indptr", lambda: CSR.pack((I([0.0, 1.0]), I([0]), V[:1], (1, 1)))),
    ("F102", "indices", lambda: CSR.pack((I([0, 1]), I([[0]]), V[:1], (1, 1)))),
    ("F102", "shape", lambda: CSR.pack((I([0, 1]), I([0]), V[:1], (1,)))),
    ("F102", "shape", lambda: CSR.pack((I([0, 1]), I([0]), V[:1], (-1, 1)))),
    ("F102", "values", lambda: CSR.pack((I([0, 1]), I([0]), V, (1, 1)))),
    ("F102", "values", lambda: CSR.pack(np.eye(2), values=V)),
    ("F102", "tuple of 2", lambda: CSR.pack((I([0, 1]), I([0])))),
    ("F102", "coords", lambda: CSR.pack(((I([0]), I([0, 1])), None, (2, 2)))),
    ("F102", "coords", lambda: CSR.pack(((I([0]),), None, (2, 2)))),
    ("F103", "indptr", lambda: CSR.pack((I([0, 1]), I([0]), None, (2, 2)))),
    ("F103", "indptr", lambda: CSR.pack((I([1, 1, 1]), I([0]), None, (2, 2)))),
    ("F103", "indptr", lambda: CSR.pack((I([0, 1, 2]), I([0, 1, 1]), None, (2, 2)))),
    ("F103", "row 1", lambda: CSR.pack((I([0, 2, 1, 3]), I([0, 1, 1]), None, (3, 2)))),
    ("F104", "coordinate 2", lambda: CSR.pack((I([0, 1]), I([2]), None, (1, 2)))),
    ("F104", "coordinate -1", lambda: CSR.pack((I([0, 1]), I([-1]), None, (1, 2)))),
    ("F104", "dimension 0", lambda: CSR.pack(((I([5]), I([0])), None, (2, 2)))),
    ("F105", "(0, 1)", lambda: CSR.pack((I([0, 2]), I([1, 1]), None, (1, 2)))),
    ("F105", "(1, 0)", lambda: tw.coo().pack(((I([1, 0, 1]), I([0, 0, 0])), None, (2, 2)))),
    ("F107", "(2,)", lambda: CSR.pack(np.eye(3, dtype="f")).with_values(V[:2])),
    ("F108", "row 1", lambda: tw.ell(1).pack(I([[1, 0], [1, 1]]))),
]  # fmt: skip


@pytest.mark.parametrize(("code", "name", "act"), PACKED, ids=range(len(PACKED)))
def test_packing_refuses(code, name, act):
    refusal(FormatError, code, name, act, hint=False)


@pytest.mark.parametrize("wrong", ["1", b"1", None, [1], 1j, 10**400], ids=str)
def test_a_fill_is_a_number(wrong):
    refusal(
        ArgumentError, "A107", "fill", lambda: tw.bsr(2).pack(np.eye(3), fill=wrong), hint=False
    )
    refusal(ArgumentError, "A107", "fill", lambda: tw.sparse("m n", fill=wrong), hint=False)


@pytest.mark.parametrize("fmt", [tw.ragged(), tw.paged(2)], ids=str)
def test_rows_that_no_memory_holds(fmt):
    """Their lengths would not fit an int64."""
    coords, shape = (I([0, 1, 2]), I([2**62 - 1] * 3)), (3, 2**62)
    refusal(FormatError, "F108", "positions", lambda: fmt.pack((coords, None, shape)), hint=False)


@pytest.mark.parametrize("act", [spmm.build, spmm.scheduled, tw.target])
@pytest.mark.parametrize("wrong", [3, None, [1], np.ones(2), "rocm", "CPP"], ids=str)
def test_b103_targets(act, wrong):
    refusal(BuildError, "B103", "unknown", lambda: act(wrong))


def test_b103_instruction_sets():
    wrong: Any = np.ones(2)
    refusal(BuildError, "B103", "instruction set", lambda: tw.Target("cpp", wrong))


def test_k101_what_is_no_folder():
    with knobs.scope(cache_dir=3):
        refusal(KnobError, "K101", "3", lambda: spmm.build("cpp"))


def test_f106_parts_that_do_not_cover():
    long_only = tw.Composed("long", ((tw.Where(2), tw.dcsr()),))
    refusal(FormatError, "F106", "(1, 1)", lambda: long_only.pack(I([[1, 1], [0, 1]])))
    twice = tw.Composed("twice", ((tw.Where(), tw.dcsr()), (tw.Where(), tw.dcsr())))
    refusal(FormatError, "F106", "2 parts", lambda: twice.pack(np.eye(2)))
    liar = dataclasses.replace(tw.hyb(2, (1, 2)), disjoint_rows=True)
    refusal(FormatError, "F106", "row 0", lambda: liar.pack(np.ones((2, 4))))


# ---------------------------------------------------------------------------- programs


def traced(body, **parameters):
    """A program whose function has these parameters."""
    defaults = ", ".join(f"{n}=_given[{n!r}]" for n in parameters)
    text = f"lambda {defaults}: _body({', '.join(parameters)})"
    return lambda: tw.program(eval(text, {"_given": parameters, "_body": body}))


mean: Any = tw.mean  # takes arguments of wrong types here
argmax: Any = tw.argmax
misspelt: Any = "wieght"
number: Any = 3
A, X, D = tw.sparse("m n"), tw.dense("n d"), tw.dense("m n")


def over(make, **parameters):
    """`traced`, with the indices of m and n handed over as well."""
    return traced(lambda a, *more: make(*tw.indices("i:m j:n"), a, *more), **parameters)


def twice(i, j, a):
    """Two outputs of one name."""
    out = tw.out.named("o")
    return out[i, j](a[i, j]), out[i, j](a[i, j])


PROGRAMS = [
    ("P101", "x", traced(lambda x: x, x=3)),
    ("P101", "wieght", lambda: tw.dense("n", kind=misspelt)),
    ("P101", "wieght", lambda: tw.sparse("m n", kind=misspelt)),
    ("P101", "3", lambda: tw.dense(number)),
    ("P101", "return", traced(lambda x: None, x=D)),
    ("P101", "truth", over(lambda i, j, a: 1 if a[i, j] > 0 else 0, a=D)),
    ("P101", "None", over(lambda i, j, a: tw.out[i, j](a[i, j] + None), a=D)),
    ("P101", "ufunc", over(lambda i, j, a: tw.out[i, j](np.exp(a[i, j])), a=D)),
    ("P101", "float()", over(lambda i, j, a: tw.out[i, j](float(a[i, j])), a=D)),
    ("P101", "for @", over(lambda i, j, a: tw.out[i, j](a[i, j] @ a[i, j]), a=D)),
    ("P101", "'over'", over(lambda i, j, a: tw.out[i](tw.sum(a[i, j])), a=D)),
    ("P101", "defined twice", over(twice, a=D)),
    ("P101", "R", traced(lambda A, R: None, A=A, R=tw.sparse("n m", like="A"))),
    ("P101", "R", traced(lambda A, R: None, A=A, R=tw.sparse("m n", like="B"))),
    ("P102", "j", over(lambda i, j, a: tw.out[i, j](a[j, i]), a=D)),
    ("P102", "dimension", traced(lambda a: tw.indices("m q"), a=D)),
    ("P102", "new name", traced(lambda a: tw.indices("i:m i:n"), a=D)),
    ("P103", "a", over(lambda i, j, a: tw.out[i](a[i]), a=D)),
    ("P103", "plain", over(lambda i, j, a: tw.out[i + 1, j](a[i, j]), a=D)),
    ("P103", "twice", over(lambda i, j, a: tw.out[i, i](tw.sum(a[i, j], over=j)), a=D)),
    ("P103", "dense", over(lambda i, j, a: tw.out.like(a)[i, j](a[i, j]), a=D)),
    ("P103", "A", over(lambda i, j, A: tw.out.like(A)[j, i](A[i, j]), A=A)),
    ("P104", "j", over(lambda i, j, a: tw.out[i](a[i, j]), a=D)),
    ("P104", "j", over(lambda i, j, a: tw.out[i](tw.sum(a[i, i * 0], over=j)), a=D)),
    ("P104", "over 3", over(lambda i, j, a: tw.out[i](tw.sum(a[i, j], over=3)), a=D)),
    ("P104", "over (i, j)", over(lambda i, j, a: tw.out[i](argmax(a[i, j], over=(i, j))), a=D)),
    ("P104", "over 3", over(lambda i, j, a: tw.out[i](mean(a[i, j], over=3)), a=D)),
    (
        "P107",
        "A[i, j] and B[i, j]",
        over(lambda i, j, A, B: tw.out[i](tw.mean(A[i, j] + B[i, j], over=j)), A=A, B=A),
    ),
    (
        "P107",
        "argmax",
        over(lambda i, j, A, B: tw.out[i](tw.argmax(A[i, j] + B[i, j], over=j)), A=A, B=A),
    ),
    ("P101", "kind [1]", lambda: tw.dense("n", kind=[1])),  # type: ignore[arg-type]
    ("P101", "like [1]", lambda: tw.sparse("m n", like=[1])),  # type: ignore[arg-type]
    ("P101", "no function", lambda: tw.program(functools.partial(len))),
    ("P101", "3 is no function", lambda: tw.program(number)),
    ("P106", "does not fit float32", over(lambda i, j, a: tw.out[i, j](a[i, j] * 10**400), a=D)),
    ("P106", "integers", over(lambda i, j, a: tw.out[i, j](a[i, j] & 1), a=D)),
    ("P106", "1.5 is float32", over(lambda i, j, a: tw.out[i](a[i, 1.5]), a=D)),
    ("P106", "1.5 is float32", over(lambda i, j, A: tw.out[i](A[i, 1.5]), A=A)),
]


@pytest.mark.parametrize(("code", "name", "act"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_refused(code, name, act):
    refusal(ProgramError, code, name, act, hint=False)


anything: Any = 3
SYMBOLS = [  # what Python and other libraries want a number for, with what they say
    ("real number", lambda i, j, a: math.exp(a[i, j])),
    ("int()", lambda i, j, a: int(a[i, j])),
    ("__round__", lambda i, j, a: round(a[i, j])),
    ("abs()", lambda i, j, a: abs(a[i, j])),
    ("len()", lambda i, j, a: len(a)),
    ("subscriptable", lambda i, j, a: a[i, j][0]),
    ("indices must be", lambda i, j, a: [1, 2][i]),
    ("interpreted as an integer", lambda i, j, a: range(i)),
    ("not iterable", lambda i, j, a: sum(a[i, j])),
    ("not callable", lambda i, j, a: a(i, j)),
    ("__format__", lambda i, j, a: f"{a[i, j]:.2f}"),
    ("maximum() missing", lambda i, j, a: tw.maximum(a[i, j])),  # type: ignore[call-arg]
    ("'where'", lambda i, j, a: tw.update(a).append[i, j](1, j)),
    ("over 3", lambda i, j, a: tw.indices(anything)),
    ("update(3)", lambda i, j, a: tw.update(anything)),
    ("3", lambda i, j, a: tw.out.named(anything)[i, j](a[i, j])),
]


@pytest.mark.parametrize(("text", "act"), SYMBOLS, ids=range(len(SYMBOLS)))
def test_symbols_are_no_numbers(text, act):
    caught = refusal(ProgramError, "P101", text, over(act, a=D))
    assert __file__ in caught.where


@pytest.mark.parametrize("wrong", [3, None, ["m"]])
def test_what_is_no_dimension_and_no_structure(wrong):
    refusal(ProgramError, "P102", repr(wrong), over(lambda i, j, a: tw.size(wrong), a=D))
    refusal(ProgramError, "P103", repr(wrong), over(lambda i, j, a: tw.out.like(wrong), a=D))


def _scale(x):
    return x * "2".join(3)  # type: ignore[arg-type]


def _needs_two(x, y):
    return x * y


OWN = [
    ("can only join an iterable", lambda i, j, a: _scale(a[i, j])),
    ("missing 1 required positional", lambda i, j, a: _needs_two(a[i, j])),  # type: ignore[call-arg]
    ("'int' and 'NoneType'", lambda i, j, a: 3 * None),  # type: ignore[operator]
]


@pytest.mark.parametrize(("text", "act"), OWN, ids=range(len(OWN)))
def test_a_fault_of_the_traced_function_stays_its_own(text, act):
    """With the lines that lead to it."""
    with pytest.raises(TypeError) as caught:
        over(act, a=D)()
    assert type(caught.value) is TypeError and caught.value.__cause__ is None
    assert text in str(caught.value)
    assert str(caught.traceback[-1].path) == __file__


def test_the_line_at_which_a_symbol_is_no_number():
    def half(x):
        return math.exp(x)

    def program(a=D):
        i, j = tw.indices("m n")
        return tw.out[i, j](half(a[i, j]))

    caught = refusal(ProgramError, "P101", "real number", lambda: tw.program(program))
    assert caught.where == f"{__file__}:{half.__code__.co_firstlineno + 1}"
    assert isinstance(caught.__cause__, TypeError)


def test_p101_outside_a_program():
    refusal(ProgramError, "P101", "@program", lambda: tw.indices("m n"), hint=False)


def test_p101_unknown_parameters():
    refusal(ProgramError, "P101", "Q", lambda: spmm.typed(Q="float16"))
    refusal(ProgramError, "P101", "Q", lambda: spmm.decompose(Q=tw.csr()))


P107 = [
    ("csr", lambda: spmm.decompose(A="csr")),
    ("1 dimensions", lambda: spmm.decompose(A=tw.Format("v", (Compressed(0),))).program),
    ("sum of A[i, k] * A[i, j] over k", lambda: row_pairs.decompose(A=tw.coo()).lower()),
    ("keeps rows in pieces", lambda: row_pairs.decompose(A=tw.hyb(2, (1, 2))).lower()),
    ("B[j, k]", lambda: triangles.decompose(A=tw.hyb(1, (1, 2), long_rows="split")).lower()),
    ("B[i, j] is read", lambda: two_sparse.decompose(B=tw.bucket(2, split=True)).lower()),
    ("B[i, j] is read", lambda: two_sparse.decompose(B=tw.hyb()).lower()),
    ("B[j, k]", lambda: triangles.decompose(B=tw.hyb()).lower()),
    ("float16", lambda: spmm.decompose(A=tw.coo()).typed(A="float16", X="float16").lower()),
]


@pytest.mark.parametrize(("name", "act"), P107, ids=range(len(P107)))
def test_p107_decompositions_that_do_not_apply(name, act):
    refusal(ProgramError, "P107", name, act, hint=False)


# ---------------------------------------------------------------------------- arguments


@pytest.fixture(scope="module")
def kernel():
    return spmm.build("interp")


def args(**changes):
    return arguments(spmm, np.random.default_rng(1), m=5, n=6, d=3) | changes


def read_only(x):
    x.flags.writeable = False
    return x


ROW = np.zeros((6, 3), np.float32)
CALLS = [
    ("A101", "X", lambda k: k(args()["A"])),
    ("A101", "too many positional", lambda k: k(*args().values(), 1)),
    ("A101", "Q", lambda k: k(**args(), Q=1)),
    ("A101", "multiple values for argument 'A'", lambda k: k(args()["A"], A=args()["A"], X=ROW)),
    ("A101", "2 outputs", lambda k: k(**args(), out=(ROW, ROW))),
    ("A102", "X is float64", lambda k: k(**args(X=ROW.astype(np.float64)))),
    ("A102", "A is float64", lambda k: k(**args(A=tw.csr().pack(np.eye(5, 6))))),
    ("A102", "out is float64", lambda k: k(**args(), out=np.zeros((5, 3)))),
    ("A102", "X", lambda k: k(**args(X=ROW.astype(">f4")))),
    ("A103", "X has 5", lambda k: k(**args(X=ROW[:5]))),
    ("A103", "X has 1 dim", lambda k: k(**args(X=ROW[:, 0]))),
    ("A103", "out has 4", lambda k: k(**args(), out=np.zeros((4, 3), "f"))),
    ("A103", "out has 2", lambda k: k(**args(), out=np.zeros((5, 2), "f"))),
    ("A104", "X has stride", lambda k: k(**args(X=np.zeros((6, 6), "f")[:, ::2]))),
    ("A104", "X has stride", lambda k: k(**args(X=np.asfortranarray(ROW)))),
    ("A104", "out is written to", lambda k: k(**args(), out=read_only(np.zeros((5, 3), "f")))),
    ("A104", "aligned", lambda k: k(**args(X=np.zeros(100, "u1")[1:73].view("f").reshape(6, 3)))),
    ("A106", "A is sparse", lambda k: k(**args(A=np.eye(5, 6, dtype="f")))),
    ("A106", "A is packed as coo", lambda k: k(**args(A=tw.coo().pack(np.eye(5, 6, dtype="f"))))),
    ("A107", "X", lambda k: k(**args(X="array"))),
    ("A107", "X", lambda k: k(**args(X=[[1.0]]))),
    ("A107", "X", lambda k: k(**args(X=None))),
]  # fmt: skip


@pytest.mark.parametrize(("code", "name", "act"), CALLS, ids=range(len(CALLS)))
def test_calls_refused(kernel, code, name, act):
    refusal(ArgumentError, code, name, lambda: act(kernel), hint=False)


def test_a105_another_device(kernel):
    a = args()["A"]
    there = dataclasses.replace(a, structure=dataclasses.replace(a.structure, device="cuda"))
    refusal(ArgumentError, "A105", "A is on cuda", lambda: kernel(**args(A=there)))


@pytest.mark.parametrize("first", [True, False])
def test_a108_outputs_apart_from_inputs(kernel, first):
    """On the first call of a layout and on later ones."""
    given = args(A=tw.csr().pack(matrix("random", 6, 6, np.random.default_rng(0))))
    if not first:
        kernel(**given, out=np.zeros((6, 3), "f"))
    refusal(ArgumentError, "A108", "X", lambda: kernel(**given, out=given["X"]))
    both = np.zeros((9, 3), "f")
    refusal(ArgumentError, "A108", "X", lambda: kernel(given["A"], both[:6], out=both[3:]))


def test_nothing_is_written_when_a_call_is_refused(kernel):
    out = np.full((5, 3), 7.0, np.float32)
    refusal(ArgumentError, "A103", "X", lambda: kernel(**args(X=ROW[:2]), out=out), hint=False)
    assert (out == 7).all()


def test_a106_structures_that_are_not_shared():
    kernel = rgcn.build("interp")
    given = arguments(rgcn, np.random.default_rng(0))
    other = arguments(rgcn, np.random.default_rng(0))
    refusal(ArgumentError, "A106", "R", lambda: kernel(**{**given, "R": other["R"]}))
    out = sddmm.build("interp")
    a = arguments(sddmm, np.random.default_rng(0))
    b = tw.csr().pack(matrix("dense", 5, 6, np.random.default_rng(0)))
    refusal(ArgumentError, "A106", "out", lambda: out(**a, out=b))


def test_a102_wide_and_narrow_coordinates():
    kernel = spmm.typed(index="int64").build("interp")
    refusal(ArgumentError, "A102", "A", lambda: kernel(**args()))


def test_a107_numbers():
    @tw.program
    def scaled(x=tw.dense("n"), s=tw.scalar()):
        i = tw.indices("n")
        return tw.out[i](x[i] * s)

    kernel = scaled.build("interp")
    assert kernel(np.ones(2, "f"), 3).tolist() == [3, 3]
    assert kernel(np.ones(2, "f"), np.float64(4)).tolist() == [4, 4]
    for bad in ("three", None, [1]):
        refusal(ArgumentError, "A107", "s", lambda b=bad: kernel(np.ones(2, "f"), b), hint=False)


def test_a102_unknown_dtypes():
    refusal(ArgumentError, "A102", "float7", lambda: spmm.typed(A="float7"))


# ---------------------------------------------------------------------------- verifiers

N = Var("n.size")
i_ = Var("i")
ZERO = Const(0, i_.dtype)


def loops(body) -> Program:
    return Program("p", "loops", (), stages=((Nest("n", body),),))


def bad_programs():
    from tilewright import dtypes
    from tilewright.ir.nodes import Buffer, Load, Reduce

    y = Buffer("y", dtypes.float32, (N,), "global")
    r = Buffer("r", dtypes.float32, (), "register")
    one = Const(1.0, dtypes.float32)
    yield loops(Store(y, (i_,), one))
    yield loops(For(i_, ZERO, N, For(i_, ZERO, N, Store(y, (i_,), one))))
    yield loops(Store(y, (ZERO,), Const(1, dtypes.int32)))
    yield loops(Store(r, (), one))
    yield loops(Store(y, (ZERO,), Load(r, (), r.dtype)))
    yield loops(Seq((Let(i_, ZERO), Let(i_, ZERO), Store(y, (i_,), one))))
    yield loops(Let(i_, one))
    yield loops(Store(y, (ZERO,), Binary("+", one, Const(1.0, dtypes.float64), one.dtype)))
    yield loops(Store(y, (ZERO,), Reduce("sum", (i_,), one, one.dtype)))
    program = spmm.program
    wrong = Assign(program.body[0].out, Const(1, dtypes.int32))
    yield dataclasses.replace(program, body=(wrong,))


@pytest.mark.parametrize("number", range(10))
def test_i101_verifiers_find_broken_programs(number):
    program = list(bad_programs())[number]
    e = refusal(InternalError, "I101", "level", lambda: verify(program, "some_pass"), hint=False)
    assert "some_pass" in e.message


def test_verifiers_pass_what_the_compiler_makes():
    for fmt in FORMATS.values():
        seen = []
        spmm.decompose(A=fmt).lower(watch=lambda name, p, s=seen: s.append(name) or verify(p, name))
        assert seen[-1] == "split_registers"
