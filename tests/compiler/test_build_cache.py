"""The first level of the kernel cache: never a wrong entry, and no lowering where there is one."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tilewright import build, compiler, dtypes, knobs
from tilewright.errors import BuildError, InternalError, ScheduleError
from tilewright.ir.digest import digest
from tilewright.ir.levels import Compressed, Dense
from tilewright.ir.rewrite import add
from tilewright.ops import linear, rowwise, schedules
from tilewright.runtime.kernel import Kernel
from tilewright.runtime.manifest import Manifest, manifest_from, unit_count
from tilewright.target import target
from tilewright.toolchain import compilers, disk_cache, program_cache

ROOT = Path(__file__).resolve().parents[2]


@tw.program
def spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))


@tw.program
def spmm_max(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[i, k](tw.max(A[i, j] * X[j, k], over=j))


@tw.program
def scale(X=tw.dense("m k")):
    i, k = tw.indices("i:m k:k")
    return tw.out[i, k](X[i, k] * 2.0)


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

    def watched(scheduled, *rest):
        names.append(scheduled.program.name)
        return run(scheduled, *rest)

    monkeypatch.setattr(compiler, "lowered", watched)
    return names


def key(d: tw.Definition, where: str = "cpp") -> str | None:
    """The key that a build of a definition looks for."""
    if d.recipe is None or isinstance(d.recipe, build.NamedRecipe):
        return build._key(d.program, d.recipe, target(where))
    return build._key(d.program, d.scheduled(where).history, target(where))


def split_by(n: int, rest: str = "cut"):
    def recipe(s: tw.Schedule) -> tw.Schedule:
        return s.split("k", n, tail=rest).parallel("i")

    return recipe


def kept() -> int:
    """Kernels in the cache."""
    return len(files())


def files() -> list[Path]:
    """Their files."""
    entries = disk_cache.current().entries()
    return [path for path, _ in entries if path.suffix == f".{program_cache.KIND}"]


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
        plain.schedule(tw.recipes.spmm),
        *(plain.schedule(tw.recipes.spmm.of(width=n)) for n in (16, 32)),
        plain.schedule(tw.recipes.spmm.of(width=16, gathers_far=True)),
        plain.decompose(A=tw.hyb(buckets=(1, 2))).schedule(lambda s: s.on(0).unroll("j", 2)),
        plain.decompose(A=tw.hyb(buckets=(1, 2))).schedule(lambda s: s.on(1).unroll("j", 2)),
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
        def scale(X=tw.dense("m n")):
            i, j = tw.indices("m n")
            return tw.out[i, j](X[i, j] * value)

        return scale

    values = (2.0, 2.0000000001, 2.5, 0.0, -0.0, float("inf"), float("nan"))
    assert len({key(program(v)) for v in values}) == len(values)


OTHERS = {
    "name": "Y", "dims": ("m", 8), "dtype": dtypes.float16, "role": "temp",
    "format": tw.coo(), "structure": "A", "fill": 1.0, "kind": "weight", "strided": True,
    "inner": 1,
}  # fmt: skip


@pytest.mark.parametrize("field", OTHERS)
def test_every_field_of_a_tensor_is_part_of_the_key(field: str) -> None:
    program = scale.program
    x = program.tensor("X")
    assert set(OTHERS) == {f.name for f in dataclasses.fields(x)}
    tensors = tuple(
        dataclasses.replace(t, **{field: OTHERS[field]}) if t is x else t for t in program.tensors
    )
    other = dataclasses.replace(program, tensors=tensors)
    assert None is not digest(other) != digest(program) is not None


def test_the_digest_tells_values_and_types_apart() -> None:
    values: list[Any] = [
        0, 0.0, -0.0, False, None, "", (), "0", (0,), ((0,),), (0, 0), ("0", "0"), ("0, 0",),
        ("a,b",), ("a", "b"), 1, True, 1.0, 2**70, "None", float("nan"), float("inf"),
    ]  # fmt: skip
    digests = {digest(v) for v in values}
    assert None not in digests and len(digests) == len(values)


@pytest.mark.parametrize(
    "value",
    [[1], {1: 2}, {1}, b"a", np.int64(1), np.ones(2), object(), lambda: 1, int, (1, [2]), 1j],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_plain_has_no_digest(value: Any) -> None:
    assert digest(value) is None and digest((1, (value,))) is None


def test_expressions_that_are_used_many_times_are_read_once() -> None:
    def program(times: int):
        @tw.program
        def power(X=tw.dense("m k")):
            i, k = tw.indices("m k")
            x = X[i, k]
            for _ in range(times):
                x = x * x
            return tw.out[i, k](x)

        return power

    assert digest(program(4).program) != digest(program(5).program)
    e = scale.program.body[0].value
    for _ in range(200):  # as a tree this has 2²⁰⁰ nodes
        e = e * e
    body = (dataclasses.replace(scale.program.body[0], value=e),)
    assert digest(dataclasses.replace(scale.program, body=body)) is not None


def test_a_level_of_a_users_own_is_no_data(lowered: list[str]) -> None:
    @dataclasses.dataclass(frozen=True, slots=True, repr=False)
    class Own(Dense):
        def pos(self, s, q, v):
            return add(v, 0)

    d = spmm.decompose(A=tw.Format("own", (Own(0), Compressed(1))))
    assert key(d) is None
    for _ in range(2):
        d.build("interp")
    assert len(lowered) == 2 and kept() == 0


def test_the_instruction_set_is_part_of_the_key() -> None:
    keys = {}
    for isa in compilers.ISAS:
        if compilers.runnable(isa):
            with knobs.scope(isa=isa):
                keys[isa] = key(spmm.schedule(tw.recipes.spmm))
    assert None not in keys.values()
    assert len(set(keys.values())) == len(keys)
    assert key(spmm, "cpp:baseline") != key(spmm, "cpp")


def test_a_recipe_of_the_package_does_not_run_where_the_kernel_is_kept(
    lowered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    d = scale.schedule(schedules.rows.of(row="i", elements=("k",)))
    first = d.build("interp")
    assert lowered == ["scale"] and kept() == 1

    def refuse(*_, **__):
        raise AssertionError("it ran")

    same = scale.schedule(schedules.rows.of(elements=("k",), row="i"))
    other = scale.schedule(schedules.rows.of(row="i", elements=()))
    monkeypatch.setitem(build._RECIPES, schedules.rows.name, refuse)
    assert same.build("interp").source == first.source and lowered == ["scale"]
    with pytest.raises(AssertionError, match="it ran"):
        other.build("interp")


def test_a_recipe_of_the_package_takes_named_arguments() -> None:
    by_row = schedules.rows.of(row="i")
    assert by_row.of(elements=("k",)) == schedules.rows.of(elements=("k",), row="i")
    assert str(tw.recipes.spmm(spmm.scheduled()).history) == str(
        spmm.schedule(tw.recipes.spmm).scheduled().history
    )
    with pytest.raises(ScheduleError, match=r"S102.*'widht'") as e:
        tw.recipes.spmm.of(widht=32)
    assert "width" in e.value.hint
    d = scale.schedule(schedules.rows.of(row="i", elements=["k"]))  # a list is no plain data
    assert key(d) is None
    d.build("interp")
    assert kept() == 0


def test_constants_of_a_recipes_module_are_part_of_the_key(
    lowered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks for the best value sets them in a process: numbers, and tables of them."""
    d, sources = linear.linear_definition("q4_1", False, 32, 64, True), []
    for sums, count in ((2, 1), (1, 2), (2, 2), (1, 2)):
        monkeypatch.setattr(linear, "SUMS", sums)
        sources.append(d.build("interp").source)
        assert len(lowered) == count == kept()
    assert sources[0] == sources[2] != sources[1] == sources[3]
    gemm = importlib.import_module("tilewright.ops.gemm")  # `ops.gemm` is the function
    product = gemm.gemm_definition("float16", 64, 64)
    before = key(product, "cuda:sm_90a")
    monkeypatch.setitem(gemm.TILES, "small", gemm.ANY)
    assert None not in (before, key(product, "cuda:sm_90a"))
    assert before != key(product, "cuda:sm_90a")


@pytest.mark.parametrize(
    ("value", "other"),
    [
        ([1, 2], [1, 3]), ([1, 2], (1, 2)), ({"a": {"b": [1]}}, {"a": {"b": [2]}}),
        ({"f": linear._dense}, {"f": linear._blocks}), (linear.LAYOUTS, {}),
    ],
)  # fmt: skip
def test_constants_that_are_no_plain_data_are_part_of_the_key(
    value: Any, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists, nested dicts, tables of layouts with functions."""
    keys = []
    for x in (value, other, copy.copy(value)):
        monkeypatch.setattr(linear, "TABLE", x, raising=False)
        keys.append(key(linear.linear_definition("q4_1", False, 32, 64, True)))
    assert None not in keys and keys[0] == keys[2] != keys[1]


def test_constants_of_modules_that_a_recipe_uses_are_part_of_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = key(rowwise.ARGMAX, "cuda:sm_90a")
    monkeypatch.setattr(schedules, "THREADS_X", 64)
    assert None not in (before, key(rowwise.ARGMAX, "cuda:sm_90a"))
    assert before != key(rowwise.ARGMAX, "cuda:sm_90a")


def test_only_functions_of_the_package_are_named_recipes() -> None:
    with pytest.raises(AssertionError):
        build.named_recipe(lambda s: s)


def test_a_users_recipe_is_known_by_its_steps(lowered: list[str]) -> None:
    """Whatever a function reads, only the verbs it calls matter: here a mutable global."""
    width = {"n": 4}

    def recipe(s):
        return s.split("k", width["n"])

    sources = []
    for n, count in ((4, 1), (8, 2), (4, 2), (8, 2)):
        width["n"] = n
        sources.append(spmm.schedule(recipe).build("interp").source)
        assert len(lowered) == count == kept()
    assert sources[0] == sources[2] != sources[1] == sources[3]
    spmm.schedule(lambda s: s.split("k", 8)).build("interp")  # another function, the same steps
    assert len(lowered) == 2


def test_a_recipe_that_does_another_thing_each_time_is_kept_as_what_it_did() -> None:
    calls: list[int] = []

    def recipe(s):
        calls.append(len(calls))
        return s.split("k", 1 + len(calls))

    d = spmm.schedule(recipe)
    sources = [d.build("interp").source for _ in range(2)]
    assert len(calls) == 2 == kept()
    for n, source in enumerate(sources):
        assert source == spmm.schedule(lambda s, n=n: s.split("k", 2 + n)).build("interp").source
    assert kept() == 2


def test_a_schedule_of_another_program_is_not_kept(lowered: list[str]) -> None:
    other = spmm_max.scheduled("interp").split("k", 4)
    for s in (other, other.lowered, spmm.scheduled("interp").lowered):
        spmm.schedule(lambda _, s=s: s).build("interp")
    assert len(lowered) == 3 and kept() == 0
    assert ">?" not in spmm.build("interp").source


# ---------------------------------------------------------------------------- builds

TARGETS = [
    "interp",
    pytest.param(
        "cpp", marks=pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
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


@pytest.mark.parametrize("knob", [{"verify": True}, {"cache": False}], ids=str)
def test_knobs_that_watch_the_compiler_lower_every_time(knob, lowered: list[str]) -> None:
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
    [entry] = files()
    whole = entry.read_bytes()
    held = json.loads(whole[: whole.index(b"\n")])
    entry.write_bytes(whole.replace(b'"spmm"', b'"evil"'))
    kernel = spmm.build("interp")
    assert len(lowered) == 2
    assert kernel.manifest.name == held["manifest"]["name"] == "spmm"


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_):
        raise BuildError("B105", "full")

    monkeypatch.setattr(program_cache.disk_cache, "put", full)
    multiply(spmm.build("interp"), tw.csr(), 0)


def test_nothing_is_stored_once_sources_are_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    assert program_cache.stamp() == program_cache.VERSION
    monkeypatch.setattr(program_cache, "VERSION", disk_cache.key_of("of other sources"))
    spmm.build("interp")
    assert kept() == 0


def test_keys_are_those_of_another_process() -> None:
    text = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.compiler.test_build_cache import *\n"
        "print(key(spmm.decompose(A=tw.hyb()).schedule(split_by(4))))\n"
        "print(key(spmm.decompose(A=tw.hyb(2)).schedule(tw.recipes.spmm.of(width=32))))\n"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", text, str(ROOT)], capture_output=True, encoding="utf-8",
            check=True, env=os.environ | {"PYTHONHASHSEED": seed, "TILEWRIGHT_VERIFY": "0"},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(told) == 1
    lines = told.pop().split()
    assert lines[0] == key(spmm.decompose(A=tw.hyb()).schedule(split_by(4)))
    assert lines[1] == key(spmm.decompose(A=tw.hyb(2)).schedule(tw.recipes.spmm.of(width=32)))
    assert "None" not in lines


# ---------------------------------------------------------------------------- manifests


def test_manifests_survive_json() -> None:
    for d in (spmm, spmm.decompose(A=tw.hyb(2, long_rows="split")), spmm_max.typed(index="int64"),
              spmm.schedule(lambda s: s.specialize("d", 16))):  # fmt: skip
        manifest = d.build("interp").manifest
        back = manifest_from(json.loads(json.dumps(dataclasses.asdict(manifest))))
        assert back == manifest and isinstance(back, Manifest)
        assert repr(back) == repr(manifest)


UNITS = (
    (1, 1),
    ("m.size", 10),
    (("*", ("//", ("+", "m.size", 7), 8), ("min", "A.count0", 2)), 4),
    (("-", ("max", 1, ("%", "m.size", 4)), -1), 3),
)


def test_numbers_of_units() -> None:
    values = {"m.size": 10, "A.count0": 3}
    for count, expected in UNITS:
        assert unit_count(count, values) == expected


@pytest.mark.parametrize("where", ["cpp", "cuda:sm_80"])
def test_the_units_of_a_kernel_are_data(where: str) -> None:
    found = []
    for fmt in (tw.csr(), tw.hyb(buckets=(1, 2))):
        d = spmm.decompose(A=fmt).schedule(tw.recipes.spmm.of(width=32))
        for stage in compiler.rendered(d.lower(where), target(where)).manifest.stages:
            for count in stage.units:
                found.append(unit_count(count, dict.fromkeys(_names(count), 1000)))
    assert found[0] == {"cpp": 63, "cuda:sm_80": 32}[where]  # 16 rows a unit; 32 rows a CTA
    assert len(found) > 3 and all(n >= 1 for n in found)


def _names(count: Any) -> set[str]:
    if isinstance(count, tuple):
        return _names(count[1]) | _names(count[2])
    return {count} if isinstance(count, str) else set()


@pytest.mark.parametrize(
    "count",
    [
        "__import__('os').system('true')", "n", "", None, 1.5, True, [1], {}, (), (1,), ("+", 1),
        ("+", 1, 2, 3), ("**", 2, 9), ("<<", 1, 3), ("/", 1, 2), ("eval", 1, 2), (("+",), 1, 2),
        ("+", 1, "n"), ("+", 1, None), ("min", 1, ("+", 1.5, 2)), ({}, 1, 2), (None, 1, 2),
        b"m", ("+", True, 1),
    ],
    ids=repr,
)  # fmt: skip
def test_other_values_are_no_numbers_of_units(count: Any) -> None:
    with pytest.raises(InternalError, match="I101"):
        unit_count(count, {"m": 1})


def test_a_file_with_other_units_is_refused() -> None:
    """A sound trailer around what no compiler wrote: the kernel does not run."""
    spmm.build("interp")
    [entry] = files()
    data = disk_cache.get(program_cache.KIND, entry.stem)
    assert data is not None
    head, _, source = data.partition(b"\n")
    held = json.loads(head)
    held["manifest"]["stages"][0]["units"] = ["__import__('os').abort()"]
    disk_cache.put(program_cache.KIND, entry.stem, json.dumps(held).encode() + b"\n" + source)
    kernel = spmm.build("interp")
    with pytest.raises(InternalError, match=r"I101.*no unit count"):
        multiply(kernel, tw.csr(), 0)
