"""The first level of the kernel cache: never a wrong entry, and no lowering where there is one."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tilewright import build, compiler, knobs
from tilewright.errors import BuildError, InternalError, ScheduleError
from tilewright.ir.levels import Compressed, Dense
from tilewright.ir.rewrite import add
from tilewright.runtime import cache, store, toolchain
from tilewright.runtime.identity import identity
from tilewright.runtime.kernel import Kernel
from tilewright.runtime.manifest import Manifest, manifest_from, manifest_text, unit_count
from tilewright.target import target

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 4  # what recipes below read and tests change
TABLE = {"width": 4}


@tw.program
def spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))


@tw.program
def spmm_max(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[i, k](tw.max(A[i, j] * X[j, k], over=j))


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path) -> Iterator[None]:
    """A cache of the test's own, and no verifiers: with them everything is lowered."""
    with knobs.scope(verify=False, cache_dir=tmp_path / "cache", debug=0):
        yield


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the programs that were lowered."""
    names: list[str] = []
    run = compiler.lowered

    def watched(program, *rest):
        names.append(program.name)
        return run(program, *rest)

    monkeypatch.setattr(compiler, "lowered", watched)
    return names


def key(d: tw.Definition, where: str = "cpp") -> str | None:
    return build._key(d, d.program, target(where))


def split_by(n: int, rest: str = "cut"):
    def recipe(s: tw.Schedule) -> tw.Schedule:
        return s.split("k", n, tail=rest).parallel("i")

    return recipe


def by_global(s: tw.Schedule) -> tw.Schedule:
    return s.split("k", WIDTH)


def helper(n: int) -> int:
    return n * 2


def by_helper(s: tw.Schedule) -> tw.Schedule:
    return s.split("k", helper(4))


def by_table(s: tw.Schedule) -> tw.Schedule:
    return s.split("k", TABLE["width"])


def by_lanes(s: tw.Schedule) -> tw.Schedule:
    return s.split("k", toolchain.vector_bits() // 32)


@dataclasses.dataclass(frozen=True)
class Choice:
    tile: int = 4

    def double(self) -> int:
        return self.tile * 2


# ---------------------------------------------------------------------------- keys


def test_keys_differ_where_kernels_do() -> None:
    plain = spmm
    defs = [
        plain,
        spmm_max,
        plain.typed(X="float16"),
        plain.typed(A="float64"),
        plain.typed(index="int64"),
        *(plain.decompose(A=f) for f in (
            tw.coo(), tw.bsr(4), tw.bsr(8), tw.dcsr(), tw.dcsr("other"), tw.hyb(), tw.hyb(2),
            tw.hyb(buckets=(1, 2)),
        )),
        *(plain.schedule(split_by(n)) for n in (2, 4, 8)),
        plain.schedule(split_by(4, "guard")),
        plain.schedule(lambda s: s.specialize("d", 16)),
        plain.schedule(lambda s: s.specialize("d", 32)),
        plain.schedule(lambda s: s.specialize("m", 32)),
        plain.schedule(functools.partial(lambda n, s: s.split("k", n), 4)),
        plain.schedule(functools.partial(lambda n, s: s.split("k", n), 8)),
    ]  # fmt: skip
    keys = [key(d, where) for d in defs for where in ("cpp", "interp", "cuda:sm_80", "cuda:sm_90a")]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert keys == [key(d, w) for d in defs for w in ("cpp", "interp", "cuda:sm_80", "cuda:sm_90a")]


def test_format_csr_is_the_default() -> None:
    assert key(spmm) == key(spmm.decompose(A=tw.csr()))


def test_fixed_sizes_of_dimensions() -> None:
    def program(dims: str):
        @tw.program
        def scale(X=tw.dense(dims)):
            i, j = tw.indices(dims)
            return tw.out[i, j](X[i, j] * 2.0)

        return scale

    assert len({key(program(d)) for d in ("m n", "m 8", "m 16")}) == 3


def test_constants_of_a_program_and_their_types() -> None:
    def program(value):
        @tw.program
        def scale(X=tw.dense("m")):
            i = tw.indices("i:m")
            i = i[0] if isinstance(i, tuple) else i
            return tw.out[i](X[i] * value)

        return scale

    keys = {key(program(v)) for v in (2.0, 2.5, 0.0, -0.0, float("inf"), float("nan"))}
    assert len(keys) == 6


@pytest.mark.parametrize("recipe", [by_global, by_helper, by_table])
def test_what_a_recipe_reads_is_part_of_its_key(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(spmm.schedule(recipe))
    assert before
    if recipe is by_global:
        monkeypatch.setitem(globals(), "WIDTH", 8)
    elif recipe is by_table:
        monkeypatch.setitem(TABLE, "width", 8)
    else:
        monkeypatch.setitem(globals(), "helper", lambda n: n * 4)
    assert key(spmm.schedule(recipe)) not in (None, before)


def test_attributes_of_a_module_that_another_function_hands_over() -> None:
    module = types.ModuleType("settings")
    module.WIDTH = 4  # type: ignore[attr-defined]

    def settings():
        return module

    def recipe(s):
        return s.split("k", settings().WIDTH)

    before = identity(recipe)
    module.WIDTH = 8  # type: ignore[attr-defined]
    assert before and identity(recipe) not in (None, before)


def test_defaults_and_methods_and_nested_functions() -> None:
    def with_default(n):
        def recipe(s, width=n, *, tail="cut"):
            return s.split("k", width, tail=tail)

        return recipe

    def nested(n):
        def recipe(s):
            def inner(t):
                return t.split("k", n)

            return inner(s)

        return recipe

    def by_choice(c):
        return lambda s: s.split("k", c.double())

    for make in (with_default, nested, lambda n: by_choice(Choice(n))):
        assert identity(make(4)) == identity(make(4))
        assert len({identity(make(n)) for n in (2, 4, 8, 4.0, True, None)}) == 6


def test_the_code_of_a_class_is_part_of_a_value() -> None:
    def made(factor):
        @dataclasses.dataclass(frozen=True, slots=True)
        class Own:
            n: int

            def width(self) -> int:
                return self.n * factor

        return Own(4)

    assert identity(made(2)) == identity(made(2))
    assert identity(made(2)) not in (None, identity(made(3)))


def _configured(text: str, module: str = "settings") -> str | None:
    """The identity of a recipe that asks an object of a class written in a text, as `python -c`
    has it: the file of its methods is then called like that of the methods dataclasses make."""
    space: dict[str, Any] = {"dataclass": dataclasses.dataclass, "field": dataclasses.field}
    if module:
        space["__name__"] = module
    exec(compile(text, "<string>", "exec", dont_inherit=True), space)
    return identity(space["recipe"])


CONFIGURED = (
    """
@dataclass(frozen=True)
class Choice:
    n: int = 1
    def tile(self): return TILE
choice = Choice()
def recipe(s): return s.split("k", choice.tile())
""",
    """
@dataclass(frozen=True, slots=True)
class Choice:
    tile: int = TILE
def recipe(s): return s.split("k", Choice().tile)
""",
    """
@dataclass(frozen=True)
class Choice:
    n: int = field(default=0, compare=TILE == 4)
def recipe(s): return s.split("k", 4 if Choice(1) == Choice(2) else 8)
""",
    """
@dataclass(frozen=True, eq=TILE == 4)
class Choice:
    n: int = 0
def recipe(s): return s.split("k", 4 if Choice() == Choice() else 8)
""",
)


@pytest.mark.parametrize("text", CONFIGURED)
def test_what_dataclasses_make_follows_from_their_fields(text: str) -> None:
    four, eight = (_configured(text.replace("TILE", n)) for n in ("4", "8"))
    assert four is not None and eight is not None and four != eight
    assert four == _configured(text.replace("TILE", "4"))
    for nowhere in ("", "builtins", "math"):
        found = {_configured(text.replace("TILE", n), nowhere) for n in ("4", "8")}
        assert len(found) == 2 or found == {None}


def test_attributes_of_a_partial_function_are_part_of_it() -> None:
    def made(n: int) -> Any:
        half = functools.partial(int)
        half.tile = n  # type: ignore[attr-defined]
        return lambda s: s.split("k", half.tile)  # type: ignore[attr-defined]

    assert len({identity(made(4)), identity(made(8)), None}) == 3


def test_levels_of_ones_own_are_known_by_their_code() -> None:
    def own(step):
        @dataclasses.dataclass(frozen=True, slots=True, repr=False)
        class Own(Dense):
            def pos(self, s, q, v):
                return add(v, step)

        return spmm.decompose(A=tw.Format("own", (Own(0), Compressed(1))))

    assert key(own(0)) == key(own(0))
    assert key(own(0)) not in (None, key(own(1)))


def test_line_numbers_do_not_matter_but_code_does() -> None:
    def compiled(text: str):
        space: dict = {}
        exec(text, space)
        return space["f"]

    one = "def f(s):\n  return s.split('k', 4)\n"
    assert identity(compiled(one)) == identity(compiled("\n\n" + one))
    other = [
        one.replace("4", "8"),
        one.replace("4", "4.0"),
        one.replace("split", "unroll"),
        one.replace("'k'", "'j'"),
    ]
    assert len({identity(compiled(t)) for t in (one, *other)}) == 5


def test_a_wrapper_is_no_part_of_the_module_it_wraps_from(monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(np.clip)
    def recipe(s):
        return s.split("k", WIDTH)

    before = identity(recipe)
    monkeypatch.setitem(globals(), "WIDTH", 8)
    assert before is None or before != identity(recipe)


def test_recipes_that_ask_the_machine_follow_the_instruction_set() -> None:
    keys = {}
    for isa in toolchain.ISAS:
        if toolchain.runnable(isa):
            with knobs.scope(isa=isa):
                keys[isa] = key(spmm.schedule(by_lanes))
    assert None not in keys.values()
    assert len(set(keys.values())) == len(keys)
    assert key(spmm, "cpp:baseline") != key(spmm, "cpp")


class Opaque:
    width = 4


def _opaque():
    thing = Opaque()
    return lambda s: s.split("k", thing.width)


def _environment():
    return lambda s: s.split("k", int(os.environ.get("WIDTH", "4")))


def _random():
    rng = np.random.default_rng(0)
    return lambda s: s.split("k", int(rng.integers(1, 8)))


def _global_random():
    return lambda s: s.split("k", int(np.random.rand() * 4) + 1)  # noqa: NPY002


def _imports():
    def recipe(s):
        from tests.compiler import cases  # noqa: F401

        return s

    return recipe


def _file():
    return lambda s: s.split("k", len(open(__file__).read()))


def _knob():
    return lambda s: s.split("k", knobs.get("threads") + 1)


def _compiler():
    return lambda s: s.split("k", len(toolchain.find_compiler().version))


def _computed_name():
    module = types.ModuleType("settings")
    return lambda s: s.split("k", getattr(module, "WID" + str(s)[:2]))


def _hidden():
    return lambda s: s.split("k", by_global.__globals__["WIDTH"])


def _mutable():
    @dataclasses.dataclass
    class Box:
        n: int = 4

    box = Box()
    return lambda s: s.split("k", box.n)


def _generator():
    numbers = iter((4, 8))
    return lambda s: s.split("k", next(numbers))


def _states():
    def recipe(s):
        global WIDTH
        WIDTH = 4
        return s

    return recipe


def _made_with_arguments():
    second = operator.itemgetter(1)
    return lambda s: s.split("k", second((2, 4)))


def _made_by_numpy():
    vectorized = np.vectorize(lambda n: n + 4)
    return lambda s: s.split("k", int(vectorized(0)))


def _universal_function():
    plus = np.frompyfunc(lambda a, b: a + b, 2, 1)
    return lambda s: s.split("k", int(plus(2, 2)))


def _derived_module():
    class Settings(types.ModuleType):
        @property
        def tile(self) -> int:
            return 4

    settings = Settings("settings")
    return lambda s: s.split("k", settings.tile)


def _kept_result():
    @functools.lru_cache
    def tile() -> int:
        return 4

    return lambda s: s.split("k", tile())


def _derived_number():
    class Tile(np.float64):
        def n(self) -> int:
            return 4

    tile = Tile(0.0)
    return lambda s: s.split("k", tile.n())


def _documented():
    def width() -> int:
        """4"""
        return 0

    return lambda s: s.split("k", int(width.__doc__ or 0))


def _raises_when_asked():
    class Proxy:
        def __getattr__(self, name: str):
            raise RuntimeError(name)

    proxy = Proxy()
    return lambda s: s.split("k", 4) if proxy else s


UNKNOWN = (
    _derived_module, _kept_result, _derived_number, _documented, _raises_when_asked,
    _made_with_arguments, _made_by_numpy, _universal_function,
    _opaque, _environment, _random, _global_random, _imports, _file, _knob, _compiler,
    _computed_name,
    _hidden, _mutable, _generator, _states,
)  # fmt: skip


@pytest.mark.parametrize("make", UNKNOWN)
def test_what_cannot_be_told_has_no_key(make) -> None:
    assert identity(make()) is None
    assert key(spmm.schedule(make())) is None


def test_a_recipe_that_changes_what_it_is_made_of_is_not_kept(lowered: list[str]) -> None:
    calls: list[int] = []

    def recipe(s):
        calls.append(len(calls))
        return s.split("k", 1 + len(calls))

    d = spmm.schedule(recipe)
    first, second = d.build("interp"), d.build("interp")
    assert len(calls) == len(lowered) == 2
    assert first.source != second.source
    assert not [e for e in cache.entries() if e.kind == store.KIND]


# ---------------------------------------------------------------------------- builds

TARGETS = [
    "interp",
    pytest.param(
        "cpp", marks=pytest.mark.skipif(not toolchain.has_compiler(), reason="no C++ compiler")
    ),
]


def multiply(kernel: Kernel, fmt, seed: int) -> None:
    rng = np.random.default_rng(seed)
    D = rng.standard_normal((13, 11)).astype(np.float32) * (rng.random((13, 11)) < 0.3)
    X = rng.standard_normal((11, 9)).astype(np.float32)
    np.testing.assert_allclose(kernel(fmt.pack(D), X), D @ X, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", TARGETS)
@pytest.mark.parametrize("fmt", [tw.csr(), tw.hyb(buckets=(1, 2, 4)), tw.bsr(4)], ids=str)
def test_a_second_build_is_not_lowered_and_computes_the_same(
    where, fmt, lowered: list[str]
) -> None:
    def definition():
        return spmm.decompose(A=fmt).schedule(lambda s: s.split("k", 4))

    first = definition().build(where)
    assert lowered == ["spmm"]
    second = definition().build(where)
    assert lowered == ["spmm"]
    assert second is not first
    assert (second.manifest, second.source) == (first.manifest, first.source)
    for seed, kernel in enumerate((first, second)):
        multiply(kernel, fmt, seed)


def test_other_programs_recipes_and_types_are_lowered(lowered: list[str]) -> None:
    for d in (spmm, spmm.typed(X="float64"), spmm.typed(index="int64"), spmm.decompose(A=tw.coo()),
              spmm_max, spmm.schedule(split_by(4)), spmm.schedule(split_by(8))):  # fmt: skip
        d.build("interp")
    assert len(lowered) == 7


@pytest.mark.parametrize("knob", [{"verify": True}, {"cache": False}, {"debug": 2}], ids=str)
def test_knobs_that_watch_the_compiler_lower_every_time(knob, lowered: list[str], capsys) -> None:
    spmm.build("interp")
    with knobs.scope(**knob):
        spmm.build("interp")
    assert len(lowered) == 2


def test_verifiers_run_although_the_kernel_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    spmm.build("interp")
    checked: list[str] = []
    monkeypatch.setattr("tilewright.lower.verify", lambda p, name: checked.append(name))
    spmm.build("interp")
    assert not checked
    with knobs.scope(verify=True):
        spmm.build("interp")
    assert "materialize_reductions" in checked and "split_registers" in checked


def test_a_refused_recipe_is_refused_again() -> None:
    d = spmm.schedule(lambda s: s.split("nothing", 4))
    for _ in range(2):
        with pytest.raises(ScheduleError, match="S101"):
            d.build("interp")


def test_a_damaged_entry_is_a_miss(lowered: list[str]) -> None:
    spmm.build("interp")
    entry = next(e for e in cache.entries() if e.kind == store.KIND)
    whole = entry.path.read_bytes()
    held = json.loads(whole[: whole.index(b"\n")])
    entry.path.write_bytes(whole.replace(b'"spmm"', b'"evil"'))
    kernel = spmm.build("interp")
    assert len(lowered) == 2
    assert kernel.manifest.name == held["manifest"]["name"] == "spmm"


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_):
        raise BuildError("B105", "full")

    monkeypatch.setattr(store.cache, "put", full)
    multiply(spmm.build("interp"), tw.csr(), 0)


def test_edited_sources_have_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    store.version.cache_clear()
    first = store.version()
    store.version.cache_clear()
    assert first == store.version()
    store.version.cache_clear()
    monkeypatch.setitem(store._LOADED, "/knobs.py", "0 0")
    assert store.version() is None
    assert key(spmm) is None
    store.version.cache_clear()


def test_keys_are_those_of_another_process() -> None:
    text = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.compiler.test_build_cache import *\n"
        "print(key(spmm.decompose(A=tw.hyb()).schedule(by_helper)))\n"
        "print(key(spmm.schedule(lambda s: s.split('k', 4 if 'x' in {'x', 'y', 'zz'} else 8))))\n"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", text, str(ROOT)], capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "TILEWRIGHT_VERIFY": "0"},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(told) == 1
    lines = told.pop().split()
    assert lines[0] == key(spmm.decompose(A=tw.hyb()).schedule(by_helper))
    assert "None" not in lines


# ---------------------------------------------------------------------------- manifests


def test_manifests_survive_json() -> None:
    for d in (spmm, spmm.decompose(A=tw.hyb(2, long_rows="split")), spmm_max.typed(index="int64"),
              spmm.schedule(lambda s: s.specialize("d", 16))):  # fmt: skip
        manifest = d.build("interp").manifest
        back = manifest_from(json.loads(json.dumps(manifest_text(manifest))))
        assert back == manifest and isinstance(back, Manifest)
        assert repr(back) == repr(manifest)


def test_numbers_of_units() -> None:
    v = {"m.size": 10, "A.count0": 3}
    for text, expected in {
        "1": 1, "(v['m.size'])": 10, "((v['m.size'] + 7) // 8) * (min(v['A.count0'], 2))": 4,
        "max(1, v['m.size'] % 4) - -1": 3,
    }.items():  # fmt: skip
        assert unit_count(text)(v) == expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "v.keys()",
        "v",
        "v[0]",
        "v[x]",
        "x",
        "1.5",
        "True",
        "'a'",
        "",
        "min",
        "min(1)",
        "min(*v)",
        "min(1, 2, key=abs)",
        "2 ** 9",
        "1 if v else 2",
        "(lambda: 1)()",
        "[1][0]",
        "v['a'].real",
        "1; 2",
        "1\n2",
        "1 << 3",
        "1 / 2",
        "max(1, open('f'))",
        "v['a' + 'b']",
        "(yield)",
        "x := 1",
        "(" * 300 + "1" + ")" * 300,
        "0\0",
    ],
)
def test_other_texts_are_no_numbers_of_units(text: str) -> None:
    with pytest.raises(InternalError, match="I101"):
        unit_count(text)
