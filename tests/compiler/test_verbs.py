"""What the verbs of a schedule take: any other argument is refused by name, with its rule."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from tests.compiler.cases import spmm

import tilewright as tw
from tilewright.errors import ScheduleError

CALLS = [
    ("order_axes", "out", "k", "i"), ("fuse_axes", "A"), ("merge_sums", "out"),
    ("specialize", "d", 8),
    ("split", "k", 4, "guard", ("k_a", "k_b")), ("fuse", "i", "k", "ik"), ("reorder", "k", "i"),
    ("bind", "i", "cta.x"), ("parallel", "i"), ("vectorize", "k"),
    ("unroll", "k", 4), ("rfactor", "j"), ("atomic", "out"), ("mma", "i", "k", "j"),
    ("prefetch", "X", "j", 4), ("cache", "X", "j", "register"), ("pipeline", "j", 3),
    ("privatize", "out", "j", 4), ("on", 0), ("undo", 1), ("has", "k", 0), ("format_of", 0),
    ("everywhere",),
]  # fmt: skip
STRANGE = [
    1.5, True, (), (1, 2), object(), -1, 2**40, [], {}, ("a",), b"k", float("nan"), 2**64,
    np.arange(3), np.bool_(True), np.float32(2),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=[c[0] for c in CALLS])
def test_every_argument_of_every_verb_is_checked(call):
    start = spmm.scheduled()
    text, (verb, *args) = str(start), call
    wrong = [(*args[:n], x, *args[n + 1 :]) for n in range(len(args)) for x in STRANGE]
    for given in (*wrong, *((*args, x) for x in STRANGE)):
        with pytest.raises(ScheduleError) as caught:
            getattr(start, verb)(*given)
        e = caught.value
        assert e.code == "S102" and e.message.startswith(f"{verb}(") and e.hint, given
    assert str(start) == text and start.history == ()
    parameters = inspect.signature(getattr(start, verb)).parameters.values()
    if any(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in parameters):
        with pytest.raises(ScheduleError, match="missing a required argument"):
            getattr(start, verb)()


@pytest.mark.parametrize(
    ("where", "verb", "says"),
    [
        ("ahead", lambda s: s.prefetch("X", "i", "a"), "'a', not a whole number from 1 to"),
        ("ahead", lambda s: s.prefetch("X", "j", 2**31 - 1), "not a whole number from 1 to"),
        ("factor", lambda s: s.unroll("b", "x"), "unroll('b', 'x'): factor is 'x', not a whole"),
        ("factor", lambda s: s.split("i", 2**31 - 1), "not a whole number from 1 to"),
        ("into", lambda s: s.split("k", 4, into=("a",)), "('a',), not two names"),
        ("into", lambda s: s.split("k", 4, into=(1, 2)), "(1, 2), not two names"),
        ("into", lambda s: s.split("k", 4, into="ab"), "'ab', not two names"),
        ("tail", lambda s: s.split("k", 4, tail="none"), "'none', not one of guard, cut, exact"),
        ("axes", lambda s: s.order_axes("out", 3), "(3,), not one or more names"),
        ("order", lambda s: s.reorder(), "(), not one or more names"),
        ("size", lambda s: s.specialize("d", True), "True, not a whole number from 1 to"),
        ("to", lambda s: s.bind("i", to="warp"), "bind('i', to='warp'): to is 'warp', not one of"),
        ("nests", lambda s: s.on(True), "(True,), not numbers"),
        ("steps", lambda s: s.undo(-1), "-1, not a whole number from 0 to"),
        ("", lambda s: s.split("k", 4, tale="cut"), "unexpected keyword argument 'tale'"),
        ("size", lambda s: s.specialize("d", 2**31), "coordinates are int32"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(where, verb, says):
    with pytest.raises(ScheduleError) as caught:
        verb(spmm.scheduled())
    e = caught.value
    assert (e.code, e.where) == ("S102", where) and says in e.message and e.hint, str(e)


def test_whole_numbers_and_names_of_other_kinds_are_taken_as_pythons():
    start = spmm.scheduled()
    plain = start.specialize("d", 8).split("k", 4, into=("a", "b")).unroll("b", 2)
    other = start.specialize("d", np.int64(8)).split("k", np.int32(4), into=["a", "b"])  # type: ignore[arg-type]
    assert other.unroll("b", np.array(2)).history == plain.history and hash(plain.history)  # type: ignore[arg-type]
    wide = spmm.typed(index="int64").scheduled().specialize("d", 2**40)
    assert dict(wide.program.sizes)["d"] == 2**40
    assert start.split("i", 4, into=None).loops == start.split("i", 4).loops


@pytest.mark.parametrize("number", [1, -1, 2**40])
def test_numbers_of_nests_are_checked(number):
    for look in (tw.Schedule.on, tw.Schedule.format_of, lambda s, n: s.has("k", n)):
        with pytest.raises(ScheduleError, match=r"S101.*no nest 1" if number == 1 else "S102"):
            look(spmm.scheduled(), number)


def reversed_order(s):
    s.split("k", 4)
    return s.bind("i", "parallel")


@pytest.mark.parametrize(
    ("recipe", "verb"),
    [
        (lambda s: (s.split("k", 4), s)[1], "s.split('k', 4, tail='guard')"),
        (lambda s: (s.on(0).unroll("k", 4), s)[1], "s.on(0,).unroll('k', 4)"),
        (lambda s: (s.specialize("d", 8), s)[1], "s.specialize('d', 8)"),
        (lambda s: (s.split("k", 4), s.split("k", 4))[1], "s.split('k', 4, tail='guard')"),
        (reversed_order, "s.split('k', 4, tail='guard')"),
        (lambda s: (s.parallel("i").undo(), s.unroll("k", 4), s)[2], "s.unroll('k', 4)"),
        (lambda s: (s.parallel("i"), spmm.scheduled())[1], "s.bind('i', 'parallel')"),
        (lambda s: (s.split("k", 4).rows, s)[1], "s.split('k', 4, tail='guard')"),
    ],
)  # fmt: skip
def test_a_recipe_that_drops_the_result_of_a_verb_is_refused(recipe, verb) -> None:
    for target in ("cpp", "interp"):
        with pytest.raises(ScheduleError) as error:
            spmm.schedule(recipe).build(target)
        assert error.value.code == "S102" and verb in error.value.message
        assert "s = s.split" in error.value.hint


def tries(s):
    """Looks at a schedule that it discards, and at one that is refused."""
    if s.split("k", 4).undo().has("k"):
        s = s.split("k", 8)
    try:
        s.split("no_loop", 8)
    except ScheduleError:
        return s.everywhere().bind("k_i", "unroll")
    raise AssertionError


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [(lambda s: s, 0), (lambda s: s.parallel("i").undo(), 0), (tries, 2),
     (lambda s: s.split("k", 4).undo().split("k", 4).parallel("i"), 2)],
)  # fmt: skip
def test_a_recipe_may_discard_with_undo_and_return_its_argument(recipe, steps) -> None:
    d = spmm.schedule(recipe)
    for _ in range(2):
        assert len(d.scheduled().history) == steps
    d.build("interp")
