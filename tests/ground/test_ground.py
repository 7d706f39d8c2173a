"""The ground floor: errors, dtypes, knobs and targets."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import numpy as np
import pytest

import tilewright
from tilewright import dtypes, errors, knobs
from tilewright.dtypes import DType, bfloat16_bits, bfloat16_values, dtype, promote
from tilewright.errors import ADVICE, CATALOG, ArgumentError, BuildError, KnobError, TilewrightError
from tilewright.target import CUDA_ARCHS, Target, target

KINDS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, TilewrightError)
]


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(CATALOG))
def test_every_code_formats(code: str):
    error = TilewrightError(code, "the rule, the value", where="argument A", hint="mend it")
    assert str(error).splitlines() == [
        f"[{code}] the rule, the value",
        "  --> argument A",
        "  hint: mend it",
    ]
    advice = " ".join(ADVICE.get(code, "").split())
    lines = [f"[{code}] short", *([f"  hint: {advice}"] if advice else [])]
    assert str(TilewrightError(code, "short")).splitlines() == lines
    assert CATALOG[code]


@pytest.mark.parametrize("code", sorted(CATALOG))
def test_every_code_is_raised_somewhere(code: str):
    package = Path(tilewright.__file__).parent
    sources = (p for p in package.rglob("*.py") if p.name not in ("errors.py", "explain.py"))
    assert any(f'"{code}"' in p.read_text(encoding="utf-8") for p in sources)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling(kind: type[TilewrightError]):
    before = kind("A103", "shape (3,)", where="argument x", hint="reshape it")
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is kind
    assert str(after) == str(before)
    assert (after.code, after.message, after.where, after.hint) == (
        "A103",
        "shape (3,)",
        "argument x",
        "reshape it",
    )


def test_unknown_code_is_a_bug_of_ours():
    with pytest.raises(AssertionError, match="X999"):
        TilewrightError("X999", "no such code")


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.FormatError, ValueError),
        (errors.ProgramError, ValueError),
        (errors.ScheduleError, ValueError),
        (errors.ArgumentError, ValueError),
        (errors.BuildError, RuntimeError),
        (errors.KnobError, ValueError),
        (errors.MissingExtra, ImportError),
        (errors.ModelError, ValueError),
        (errors.InternalError, AssertionError),
    ],
)
def test_errors_are_the_builtin_kind_too(kind: type[TilewrightError], builtin: type[BaseException]):
    with pytest.raises(builtin, match="A101"):
        raise kind("A101", "x")


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(dtypes.ALL))
def test_a_dtype_is_found_by_its_name_and_holds_its_size(name: str):
    found = dtype(name)
    assert str(found) == name
    assert dtype(found) is found
    assert found.numpy.itemsize == found.itemsize


@pytest.mark.parametrize(
    "name", ["bool", "int8", "int64", "uint16", "uint32", "float16", "float32", "float64"]
)
def test_numpy_dtypes_map_both_ways(name: str):
    assert dtype(np.dtype(name)).name == name
    assert dtype(np.dtype(name).type).name == name
    assert dtype(name).numpy == np.dtype(name)


def test_bfloat16_of_ml_dtypes_is_known():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert dtype(np.dtype(ml_dtypes.bfloat16)) == dtypes.bfloat16


@pytest.mark.parametrize("bad", ["float99", "complex64", object, np.dtype("M8[s]"), 7])
def test_what_is_not_a_dtype_is_refused(bad: object):
    with pytest.raises(ArgumentError, match="A102"):
        dtype(bad)


def test_vectors_and_accumulators():
    wide = dtypes.float16.vector(8)
    assert str(wide) == "float16x8"
    assert wide.scalar == dtypes.float16
    assert wide.itemsize == 2
    for narrow in (dtypes.float16, dtypes.bfloat16):
        assert narrow.accumulator == dtypes.float32
    assert dtypes.float64.accumulator == dtypes.float64
    assert dtypes.int8.accumulator == dtypes.int32  # its own sums would overflow


@pytest.mark.parametrize("a", dtypes.ALL.values(), ids=str)
@pytest.mark.parametrize("b", dtypes.ALL.values(), ids=str)
def test_promotion_commutes_and_keeps_floats(a: DType, b: DType):
    both = promote(a, b)
    assert both == promote(b, a)
    if a.is_float or b.is_float:
        assert both.is_float and both.bits >= max(x.bits for x in (a, b) if x.is_float)
    else:
        assert both.name == np.result_type(a.numpy, b.numpy).name


def test_bfloat16_rounds_as_ml_dtypes_does(rng: np.random.Generator):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (rng.integers(0, 2**16, 1000, dtype=np.uint32) << 16) | 0x8000
    edges = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45], np.float32)
    values = np.concatenate([bits.view(np.float32), ties.view(np.float32), edges])
    values = values[~np.isnan(values)]
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(bfloat16_bits(values), expected.view(np.uint16))
    np.testing.assert_array_equal(
        bfloat16_values(expected.view(np.uint16)), expected.astype(np.float32)
    )


def test_every_bfloat16_survives_the_round_trip():
    bits = np.arange(2**16, dtype=np.uint16)
    values = bfloat16_values(bits)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(bfloat16_bits(values)[number], bits[number])
    assert np.isnan(bfloat16_values(bfloat16_bits(values)))[~number].all()


# ---- knobs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("threads", "3", 3),
        ("threads", "", 0),
        ("debug", "1", 1),
        ("cache", "0", False),
        ("verify", "1", True),
        ("cxx", "clang++", "clang++"),
        ("cache_dir", "some/folder", Path("some/folder")),
    ],
)
def test_a_knob_reads_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object
):
    monkeypatch.setenv(knobs.KNOBS[name].env, text)
    assert knobs.get(name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("threads", "-1"),
        ("threads", "many"),
        ("debug", "1.5"),
        ("debug", "9"),
        ("debug", "-1"),
        ("cache", "yes"),
        ("verify", "2"),
    ],
)
def test_a_bad_value_names_the_variable_and_the_value(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
):
    env = knobs.KNOBS[name].env
    monkeypatch.setenv(env, text)
    with pytest.raises(KnobError, match="K101") as caught:
        knobs.get(name)
    assert env in str(caught.value)
    assert text in str(caught.value)
    assert knobs.KNOBS[name].form in str(caught.value)


def test_defaults_without_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for knob in knobs.KNOBS.values():
        monkeypatch.delenv(knob.env, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert knobs.get("cache_dir") == tmp_path / "tilewright"
    assert knobs.get("cache") is True
    assert knobs.get("verify") is False
    assert (knobs.get("threads"), knobs.get("debug")) == (0, 0)


@pytest.mark.parametrize("path", ["~", "~/kernels"])
def test_a_folder_below_a_home(monkeypatch: pytest.MonkeyPatch, path: str):
    monkeypatch.setenv("HOME", "/home/nobody")
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", path)
    assert str(knobs.get("cache_dir")) == path.replace("~", "/home/nobody")


def test_a_folder_below_no_home(monkeypatch: pytest.MonkeyPatch):
    from tilewright.toolchain import disk_cache

    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", "~no-such-user/x")
    with pytest.raises(KnobError, match=r"K101.*no-such-user"):
        knobs.get("cache_dir")
    with knobs.scope(cache_dir="~no-such-user/x"), pytest.raises(KnobError, match="K101"):
        disk_cache.current()


def test_scopes_nest_and_end_also_by_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TILEWRIGHT_THREADS", "2")
    with knobs.scope(threads=3):
        assert knobs.get("threads") == 3
        with pytest.raises(ZeroDivisionError), knobs.scope(threads=4, debug=1):
            assert (knobs.get("threads"), knobs.get("debug")) == (4, 1)
            raise ZeroDivisionError
        assert knobs.get("threads") == 3
        assert knobs.get("debug") == 0
    assert knobs.get("threads") == 2


def test_a_scope_refuses_unknown_knobs():
    with pytest.raises(KnobError, match="nonsense"), knobs.scope(nonsense=1):
        pass


def test_knobs_are_few_and_documented():
    assert len(knobs.KNOBS) <= 15
    for knob in knobs.KNOBS.values():
        assert knob.env.startswith("TILEWRIGHT_")
        assert knob.doc
        assert knob.form


def test_the_suite_runs_with_verifiers_and_a_cache_of_its_own():
    assert knobs.get("verify") is True
    assert "tilewright-tests-" in str(knobs.get("cache_dir"))


# ---- targets -------------------------------------------------------------------------------------

GOOD = [
    ("interp", Target("interp")),
    ("cpp", Target("cpp")),
    ("cpu", Target("cpp")),
    ("cpp:avx2", Target("cpp", "avx2")),
    ("cpu:avx512", Target("cpp", "avx512")),
    ("cuda", Target("cuda")),
    *((f"cuda:{arch}", Target("cuda", arch)) for arch in CUDA_ARCHS),
]


@pytest.mark.parametrize(("text", "expected"), GOOD, ids=[text for text, _ in GOOD])
def test_targets_parse_and_print(text: str, expected: Target):
    found = target(text)
    assert found == expected
    assert target(found) is found
    assert target(str(found)) == found
    assert found.is_cuda == text.startswith("cuda")


BAD = ["", "gpu", "cuda:sm_10", "cuda:90", "cpp:native", "CPP", "interp:x", None, 5, ["cpp"]]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_unknown_targets_are_refused(bad: object):
    with pytest.raises(BuildError, match="B103"):
        target(bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BuildError, match="B103"):
        Target(bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("arch", ["x", None, 5])
def test_unknown_architectures_are_refused(arch: object):
    for kind in ("interp", "cpp", "cuda"):
        with pytest.raises(BuildError, match="B103"):
            Target(kind, arch)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", [n for n in tilewright.__all__ if n != "ops"])
def test_what_is_public_says_what_it_does(name: str):
    """Each name of the package, and each method of its classes, hooks of variants too."""
    public = getattr(tilewright, name)
    if not inspect.isclass(public):
        assert inspect.getdoc(public)
        return
    for kind in public.__mro__:
        if kind.__module__.startswith("tilewright"):
            for method, x in vars(kind).items():
                f = getattr(x, "fget", None) or getattr(x, "__func__", None) or x
                assert method[0] == "_" or not inspect.isfunction(f) or f.__doc__, method
