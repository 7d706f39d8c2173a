"""Variants: what tracing gives, what it refuses, and what a mask says of tiles."""

from __future__ import annotations

import ctypes
import functools
import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.cases import ALL_VARIANTS, EMPTY, FULL, PARTIAL, Strange, tile_class
from tests.attention.twin import Interval

from tilewright import dtypes
from tilewright.attention import bounds, reference
from tilewright.attention.batch import Attention
from tilewright.attention.spec import template
from tilewright.attention.tracing import per_request
from tilewright.attention.variant import (
    Alibi,
    Causal,
    Full,
    SlidingWindow,
    Softcap,
    per_head,
    traced_of,
    variant,
)
from tilewright.codegen import prelude_files
from tilewright.errors import ArgumentError, ProgramError
from tilewright.ir.nodes import Var, binary, equal, select, unary
from tilewright.sparse import trace
from tilewright.sparse.trace import scalar
from tilewright.toolchain import compilers, cxx


def test_it_prints():
    assert "at.kv <= at.qo" in str(Softcap.traced)
    assert "tanh" in str(Softcap.traced.logits)
    assert repr(Softcap()) == "Softcap(soft_cap=30.0)"
    assert repr(SlidingWindow(window=5)) == "SlidingWindow(window=5)"


def test_values_are_frozen_and_compare():
    assert Softcap(soft_cap=2.0) == Softcap(soft_cap=2.0) != Softcap()
    assert len({Causal(), Causal(), Full()}) == 2
    with pytest.raises(AttributeError):
        Softcap().soft_cap = 3.0
    assert traced_of(Alibi()).values[0].by == "qo_head"


def test_constants_and_helpers_of_the_class():
    @variant
    class Chunked:
        size = 16

        def chunk(self, x):
            return x // self.size

        def mask(self, at):
            return equal(self.chunk(at.kv), self.chunk(at.qo))

    places = {"at.kv": np.arange(40)[None], "at.qo": np.arange(40)[:, None]}
    seen = reference.evaluate(Chunked.traced.mask, places, {})
    np.testing.assert_array_equal(seen, np.kron(np.eye(3), np.ones((16, 16)))[:40, :40] != 0)


def test_a_subclass_may_fix_a_value():
    @variant
    class Fixed(Softcap):
        soft_cap = 7.0

    assert Fixed.traced.values == () and str(Fixed.traced.logits) == "7 * tanh(s / 7)"


def refused(code, **members):
    with pytest.raises(ProgramError) as e:
        variant(type("Bad", (), members))
    assert e.value.code == code, str(e.value)


def test_ill_formed_variants():
    refused("P101", logits=lambda self, s: s)
    refused("P101", mask=lambda self, at, more: at.kv <= at.qo)
    refused("P101", mask=True)
    refused("P101", logits=lambda self, s, at: None)
    refused("P101", logits=lambda self, s, at: "s")
    refused("P101", logits=lambda self, s, at: s * at.head)
    refused("P101", logits=lambda self, s, at: s * self.missing)
    refused("P101", mask=lambda self, at: at.kv <= at.qo and at.kv > 3)
    refused("P101", slopes=per_head(), logits=lambda self, s, at: s * self.slopes)
    refused("P101", slopes=per_head(), logits=lambda self, s, at: s * self.slopes[at.kv])
    refused("P101", slopes=per_head(), logits=lambda self, s, at: s * self.slopes[0])
    refused(
        "P102",
        slopes=per_head(),
        logits=lambda self, s, at: s * self.slopes[at.qo_head] * self.slopes[at.kv_head],
    )
    refused("P101", table=trace.dense("n"), logits=lambda self, s, at: s)
    refused("P104", logits=lambda self, s, at: s * Var("x", dtypes.float32))
    refused("P106", mask=lambda self, at: at.kv - at.qo)
    refused("P106", logits=lambda self, s, at: at.kv <= at.qo)
    refused("P106", logits=lambda self, s, at: s.cast("float64"))
    refused("P106", logits=lambda self, s, at: s // 2.0)
    refused("P106", mask=lambda self, at: (at.kv <= at.qo) + (at.kv < 3))
    refused("P106", cap=scalar("float64"), logits=lambda self, s, at: s * self.cap)
    refused("P106", cap=per_head("float16"), logits=lambda self, s, at: s)


def test_what_is_no_class_is_refused():
    for wrong in (3, len, Causal()):
        with pytest.raises(ProgramError, match=r"P101.*no class"):
            variant(wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("times", [12, 200])
def test_hooks_too_large_to_be_written(times):
    """A tree of 2^12 leaves, which may be 12 products in a class, and a chain of 200 sums."""

    def logits(self, s, at):
        for _ in range(times):
            s = s * s if times == 12 else s + 1.0
        return s

    refused("P101", logits=logits)
    small = type("Small", (), {"logits": lambda self, s, at: (s * s) * (s * s) * s * s})
    value = variant(small)()
    with pytest.raises(ProgramError, match="more than"):
        functools.reduce(lambda a, b: a | b, [value] * 6)


@pytest.mark.parametrize("same", [True, False])
def test_comparisons_that_python_has_decided(same):
    """`==` of expressions compares their text: as a mask it would see every key, or none."""

    def mask(self, at):
        return at.kv // 4 == at.qo // 4 if same else at.kv // 4 != at.qo // 4

    with pytest.raises(ProgramError, match=r"P101.*(?s:.*)tw\.equal"):
        variant(type("Chunks", (), {"mask": mask}))
    refused("P101", mask=lambda self, at: True)
    refused("P101", mask=lambda self, at: np.True_)
    refused("P101", mask=lambda self, at: at.kv in (at.qo, 3))
    refused("P101", mask=lambda self, at: (at.kv <= at.qo) & (at.kv == at.qo))
    refused("P101", logits=lambda self, s, at: s == at.kv)


def test_misspelt_hooks():
    for name, meant in {"logit": "logits", "masks": "mask", "Mask": "mask"}.items():
        with pytest.raises(ProgramError, match=rf"P101.*{name}(?s:.*)did you mean {meant}\?"):
            variant(type("Bad", (), {name: lambda self, at: at.kv <= at.qo}))
    refused("P101", sink_logit=lambda self, at: 0.0)
    refused("P101", mask=lambda self, at: at.kv <= at.qo, masked=lambda self, at: at.kv > 3)

    @variant
    class Helped:
        """Called by a hook, called by what a hook calls, in a branch not taken, private."""

        windowed = False

        def mask(self, at):
            return self.near(at) if self.windowed else self.past(at)

        def near(self, at):
            return self.past(at) & (at.qo - at.kv < 4)

        def past(self, at):
            return at.kv <= at.qo

        def _unused(self, at):
            return at.kv > 3

    assert str(Helped.traced.mask) == str(Causal.traced.mask)


def test_names_of_values():
    """A value is given by its name to run, plan and bind, whose own arguments are taken."""
    functions = (Attention.run, Attention.plan, Attention.bind, reference.attention)
    taken = {n for f in functions for n in inspect.signature(f).parameters} - {"values"}
    for name in taken | {"fixed", "traced"}:
        refused("P101", **{name: scalar("float32", 1.0)})
        refused("P101", **{name: per_head("int32")})

    for name in ("é", "w_rows", "w_columns"):  # the kernels name them so
        words = {name: scalar("float32", 1.0), "w": per_request("float32")}
        refused("P101", logits=lambda self, s, at: s * self.w[at.request], **words)

    @variant
    class Unusual:
        p = scalar("float32", 2.0)
        int = scalar("int32", 3)
        at = scalar("float32", 1.0)

        def logits(self, s, at):
            return s * self.p + self.at * self.int

    assert [v.name for v in Unusual.traced.values] == ["p", "int", "at"]


def seen(cls, **values):
    """The mask of a variant over 12 queries and 12 keys."""
    places = {"at.kv": np.arange(12)[None], "at.qo": np.arange(12)[:, None]}
    found = reference.evaluate(cls.traced.mask, places, values)
    return np.broadcast_to(found, (12, 12))


def test_hooks_compose_by_super():
    @variant
    class Late(SlidingWindow):
        skipped = scalar("int32", 2)

        def mask(self, at):
            return super().mask(at) & ~(at.kv < self.skipped)

        def logits(self, s, at):
            return super().logits(s, at) * 2.0  # SlidingWindow has none: the score itself

    @variant
    class Later(Late):
        def mask(self, at):
            return super().mask(at) | super(Late, self).mask(at) & (at.kv > 10)

    qo, kv = np.arange(12)[:, None], np.arange(12)[None]
    window = (kv <= qo) & (qo - kv < 3)
    np.testing.assert_array_equal(seen(Late, window=3, skipped=2), window & (kv >= 2))
    np.testing.assert_array_equal(
        seen(Later, window=3, skipped=2), (window & (kv >= 2)) | (window & (kv > 10))
    )
    assert str(Late.traced.logits) == "s * 2" and len(Later.traced.values) == 2
    assert repr(Later(window=4)) == "Later(skipped=2, window=4)"

    @variant
    class Capped(Softcap):
        @property
        def half(self):
            return self.soft_cap * 0.5

        @staticmethod
        def bent(s):
            return trace.tanh(s)

        def logits(self, s, at):
            return self.bent(super().logits(s, at)) * self.half

    assert "tanh" in str(Capped.traced.logits) and str(Capped.traced.mask) == "at.kv <= at.qo"


def test_conditions_are_inverted():
    @variant
    class Future:
        def mask(self, at):
            return ~(at.kv <= at.qo)

    np.testing.assert_array_equal(seen(Future), np.triu(np.ones((12, 12), bool), 1))

    @variant
    class Odd:
        def mask(self, at):
            return equal(~at.kv & 1, 0)  # ~x of an integer inverts its bits

    np.testing.assert_array_equal(seen(Odd), np.broadcast_to(np.arange(12) % 2 == 1, (12, 12)))
    refused("P106", logits=lambda self, s, at: ~s)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.int16])
def test_numbers_of_numpy_in_a_hook(kind):
    four = kind(4)

    @variant
    class Window:
        def mask(self, at):
            return (at.qo - at.kv < four) & (four - 4 <= four * at.kv) & (at.kv <= at.qo)

    kv, qo = np.arange(12)[None], np.arange(12)[:, None]
    np.testing.assert_array_equal(seen(Window), (qo - kv < 4) & (kv <= qo))


def test_floats_of_numpy_in_a_hook():
    half, third = np.float32(0.5), np.float64(1 / 3)

    @variant
    class Scaled:
        def logits(self, s, at):
            return half * s + np.float16(2.0) - s * third

    assert Scaled.traced.logits.dtype == dtypes.float32
    value = reference.evaluate(Scaled.traced.logits, {"s": np.float64(3.0)}, {})
    np.testing.assert_allclose(value, 1.5 + 2.0 - 1.0, rtol=1e-7)
    refused("P106", mask=lambda self, at: at.kv < np.int64(2**40))


def test_what_python_cannot_do_with_symbols_has_a_code():
    table, torch_like = np.arange(100).reshape(10, 10), [1, 2, 3]
    refused("P101", logits=lambda self, s, at: s + table[at.qo, at.kv])
    refused("P101", logits=lambda self, s, at: s + torch_like[at.qo])
    refused("P101", logits=lambda self, s, at: s + table)
    refused("P101", logits=lambda self, s, at: table * s)
    refused("P101", logits=lambda self, s, at: math.tanh(s))
    refused("P101", logits=lambda self, s, at: np.tanh(s))
    refused("P101", logits=lambda self, s, at: s.relu())
    refused("P101", mask=lambda self, at: at.kv[0] > 3)
    refused("P101", mask=lambda self, at: sum(range(at.kv)) > 3)
    with pytest.raises(ProgramError, match="IndexError") as e:
        variant(type("Bad", (), {"logits": lambda self, s, at: s + table[at.qo, at.kv]}))
    assert isinstance(e.value.__cause__, IndexError)


def test_scalars_by_position():
    """In the order of definition, those of base classes first."""

    @variant
    class Both(SlidingWindow):
        slope = scalar("float32", 0.5)

        def logits(self, s, at):
            return s + self.slope * (at.kv - at.qo)

    assert SlidingWindow(1024) == SlidingWindow(window=1024)
    assert Both(7, 0.25).fixed == Both(slope=0.25, window=7).fixed == Both(7, slope=0.25).fixed
    assert str(Causal() & SlidingWindow(1024) | Softcap(30)) == (
        "Causal() & SlidingWindow(window=1024) | Softcap(soft_cap=30)"
    )
    for make in (lambda: Both(7, 0.25, 1), lambda: Both(7, window=7), lambda: Causal(1)):
        with pytest.raises(ArgumentError, match="scalars, and got one too many") as e:
            make()
        assert e.value.code == "A101"
    with pytest.raises(ArgumentError, match="A102"):
        SlidingWindow("wide")


def test_bad_values():
    for code, make in {
        "A101": lambda: Softcap(cap=3.0),
        "A102": lambda: Softcap(soft_cap="big"),
        "A109": lambda: SlidingWindow(window=2**40),
    }.items():
        with pytest.raises(ArgumentError) as e:
            make()
        assert e.value.code == code
    with pytest.raises(ArgumentError):
        SlidingWindow(window=1.5)
    with pytest.raises(ArgumentError):
        Alibi(slopes=3.0)


def test_programs_refuse_defaults():
    from tilewright.build import program

    with pytest.raises(ProgramError) as e:

        @program
        def scaled(X=trace.dense("n"), a=scalar("float32", 2.0)):
            i = trace.indices("n")
            return trace.out[i](X[i] * a)

    assert e.value.code == "P101"


# ---------------------------------------------------------------------------- tiles

QO, KEY = Var("at.qo", dtypes.int32), Var("at.kv", dtypes.int32)


def integer(rng, depth):
    """A random integer expression of the two positions."""
    kind = rng.integers(0, 11) if depth else 11
    if kind > 9:
        return (QO, KEY, QO * 0 + int(rng.integers(-20, 20)))[rng.integers(0, 3)]
    a, b, by = integer(rng, depth - 1), integer(rng, depth - 1), int(rng.integers(1, 9))
    makers = (
        lambda: a + b,
        lambda: a - b,
        lambda: a * b,
        lambda: trace.maximum(a, b),
        lambda: trace.minimum(a, b),
        lambda: -a,
        lambda: unary("abs", a),
        lambda: a // by,
        lambda: a % by,
        lambda: select(condition(rng, 0), a, b),
    )
    return makers[kind]()


def condition(rng, depth):
    """A random condition on the two positions."""
    kind = rng.integers(0, 8) if depth else 7
    if kind > 5:
        op = ("<", "<=", ">", ">=", "==", "!=")[rng.integers(0, 6)]
        return binary(op, integer(rng, depth), integer(rng, depth))
    a, b = condition(rng, depth - 1), condition(rng, depth - 1)
    makers = (
        lambda: a & b,
        lambda: a | b,
        lambda: binary("^", a, b),
        lambda: unary("not", a),
        lambda: integer(rng, depth).cast("bool"),
        lambda: select(condition(rng, 0), a, b),
    )
    return makers[kind]()


tiles = st.tuples(*(st.integers(-30, 60), st.integers(0, 20)) * 2)


@given(st.integers(0, 2**32), st.lists(tiles, min_size=1, max_size=8))
@settings(max_examples=300)
def test_a_class_is_never_wrong(seed, where):
    """EMPTY means no score of the tile counts, FULL that all do: against every score."""
    mask = condition(np.random.default_rng(seed), 2)
    for qo, qo_more, kv, kv_more in where:
        rows, columns = np.arange(qo, qo + qo_more + 1), np.arange(kv, kv + kv_more + 1)
        places = {"at.qo": rows[:, None], "at.kv": columns[None]}
        shape = (len(rows), len(columns))
        seen = np.broadcast_to(reference.evaluate(mask, places, {}), shape)
        intervals = {
            "at.qo": Interval.of(rows[0], rows[-1]),
            "at.kv": Interval.of(columns[0], columns[-1]),
        }
        kind = tile_class(mask, intervals, {})
        if kind == EMPTY:
            assert not seen.any()
        elif kind == FULL:
            assert seen.all()


def test_usual_masks_are_classified_sharply():
    def kind(what, qo, kv, **values):
        places = {"at.qo": Interval.of(*qo), "at.kv": Interval.of(*kv)}
        return tile_class(what.traced.mask, places, values)

    assert kind(Causal, (10, 20), (0, 10)) == FULL
    assert kind(Causal, (10, 20), (0, 11)) == PARTIAL
    assert kind(Causal, (10, 20), (21, 30)) == EMPTY
    assert kind(Full, (10, 20), (0, 99)) == FULL
    assert kind(SlidingWindow, (10, 20), (0, 5), window=5) == EMPTY
    assert kind(SlidingWindow, (10, 12), (8, 10), window=5) == FULL
    assert kind(SlidingWindow, (10, 12), (8, 10)) == PARTIAL
    assert kind(Strange, (10, 20), (30, 40), stride=7) == EMPTY


def test_the_text_agrees_with_numpy(rng):
    """kernels/bounds.h gives the classes that bounds.py gives."""
    if not compilers.has_compiler():
        pytest.skip("no C++ compiler")
    masks = [v.traced.mask for v in ALL_VARIANTS.values()]
    masks += [condition(rng, 3) for _ in range(40)]
    known = {"window": 19, "stride": 5}
    cases = "\n".join(
        f"    case {n}: return tw::tile_class({bounds.bound(m, bounds.Text())});"
        for n, m in enumerate(masks)
    )
    text = "\n".join((prelude_files.prelude("cpu.h"), template("bounds.h")))
    source = f"""{text}
extern "C" __attribute__((visibility("default")))
int classify(int n, int64_t a, int64_t b, int64_t c, int64_t d) {{
  const tw::Bound any = tw::bound_int();
  const tw::Tile tile{{tw::Bound{{a, b}}, tw::Bound{{c, d}}, any, any, any}};
  const int v_window = 19, v_stride = 5; (void)v_window; (void)v_stride; (void)tile;
  switch (n) {{
{cases}
  }}
  return -1;
}}"""
    classify = cxx.load(cxx.compile_cpp(source)).classify
    classify.argtypes = [ctypes.c_int, *(ctypes.c_int64,) * 4]
    for n, mask in enumerate(masks):
        for _ in range(40):
            a, c = rng.integers(-40, 80, 2).tolist()
            b, d = a + int(rng.integers(0, 30)), c + int(rng.integers(0, 30))
            places = {"at.qo": Interval.of(a, b), "at.kv": Interval.of(c, d)}
            assert classify(n, a, b, c, d) == tile_class(mask, places, known), mask


@pytest.mark.parametrize("cap", [10**400, -(10**60), 1e300])
def test_numbers_beyond_float32_are_refused(cap):
    with pytest.raises(ArgumentError, match="A109"):
        Softcap(soft_cap=cap)
    assert dict(Softcap(soft_cap=float("inf")).fixed)["soft_cap"] == float("inf")
