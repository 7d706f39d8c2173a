"""`layout.Struct`: Python, NumPy and the C++ compiler agree about every byte."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from tilewright.errors import InternalError
from tilewright.runtime.layout import Struct
from tilewright.toolchain import compilers, cxx

KINDS = ["ptr", "float32", "float64", "int8", "uint16", "int32", "uint32", "int64", "uint64"]
needs_cxx = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")


def random_struct(rng: np.random.Generator, name: str = "probe") -> Struct:
    fields = []
    for i in range(int(rng.integers(1, 12))):
        kind = str(rng.choice(KINDS))
        count = f"[{rng.integers(1, 6)}]" if rng.random() < 0.3 else ""
        fields.append((f"f{i}", kind + count))
    return Struct(name, fields)


def random_values(rng: np.random.Generator, struct: Struct) -> dict[str, Any]:
    def one(kind: str) -> float | int:
        return (
            float(rng.integers(-99, 99)) if kind.startswith("float") else int(rng.integers(0, 99))
        )

    return {
        f.name: [one(f.type) for _ in range(f.count)] if f.count else one(f.type)
        for f in struct.fields
    }


def test_offsets_follow_c() -> None:
    s = Struct("s", [("a", "int8"), ("b", "int64"), ("c", "int32[3]"), ("d", "uint16")])
    assert [f.offset for f in s.fields] == [0, 8, 16, 28]
    assert s.size == 32
    assert Struct("s", [("a", "int32"), ("b", "int8[5]")]).size == 12  # padded at its end


def test_numpy_and_pack_agree(rng: np.random.Generator) -> None:
    for _ in range(20):
        s = random_struct(rng)
        values = random_values(rng, s)
        row = np.frombuffer(bytes(s.pack(**values)), s.numpy)[0]
        assert s.numpy.itemsize == s.size
        for name, value in values.items():
            assert np.array_equal(row[name], value)


@needs_cxx
def test_compiler_agrees(rng: np.random.Generator) -> None:
    """The assertions hold, and the fields are read back where Python put them."""
    structs = [random_struct(rng, f"s{i}") for i in range(6)]
    source = "#include <stdint.h>\n" + "".join(s.c_decl for s in structs)
    for s in structs:
        reads = "".join(
            f"  for (int i = 0; i < {max(f.count, 1)}; ++i) *out++ = (double)"
            + ("(uint64_t)" if f.type == "ptr" else "")
            + (f"s.{f.name}[i];\n" if f.count else f"s.{f.name};\n")
            for f in s.fields
        )
        source += (
            'extern "C" __attribute__((visibility("default")))\n'
            f"void read_{s.name}(const {s.name}& s, double* out) {{\n{reads}}}\n"
        )
    library = cxx.load(cxx.compile_cpp(source))
    for s in structs:
        values = random_values(rng, s)
        out = np.zeros(sum(max(f.count, 1) for f in s.fields))
        library[f"read_{s.name}"](s.pack(**values), ctypes.c_void_p(out.ctypes.data))
        assert np.array_equal(out, np.concatenate([np.atleast_1d(v) for v in values.values()]))


def test_pointer_type_and_version() -> None:
    one = Struct("s", [("x", "ptr", "const float*"), ("n", "int64")])
    assert "const float* x;" in one.c_decl
    assert one.version == Struct("s", [("x", "ptr", "const float*"), ("n", "int64")]).version
    assert one.version != Struct("s", [("x", "ptr", "const float*"), ("n", "int32")]).version


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [("a", "int31")],
        [("a", "int32[0]")],
        [("a", "int32", "const int*")],
        [("a b", "int32")],
        [("a", "int32"), ("a", "int32")],
    ],
)
def test_bad_descriptions_are_refused(fields: list[tuple[str, ...]]) -> None:
    with pytest.raises(InternalError, match="I101"):
        Struct("s", fields)


def test_bad_values_are_refused() -> None:
    s = Struct("s", [("a", "int8"), ("b", "int32[2]")])
    for values in (
        {"a": 1},
        {"a": 1, "b": (1, 2), "c": 3},
        {"a": 1, "b": (1,)},
        {"a": 200, "b": (1, 2)},
    ):
        with pytest.raises(InternalError, match="I101"):
            s.pack(**values)
