"""`view`: every framework's array described the same way, and what is not one refused."""

from __future__ import annotations

import ctypes
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilewright import dtypes
from tilewright.errors import ArgumentError
from tilewright.runtime import view as views
from tilewright.runtime.arguments import check_overlaps
from tilewright.runtime.transfer import to_host
from tilewright.runtime.view import View, allocate, byte_span, view


def read(v: View) -> np.ndarray:
    """The elements of a CPU view, read through its pointer, shape and strides alone."""
    item = v.dtype.itemsize
    out = np.empty(v.shape, v.dtype.numpy)
    for index in np.ndindex(v.shape):
        at = v.pointer + item * sum(i * s for i, s in zip(index, v.strides, strict=True))
        out[index] = np.frombuffer(ctypes.string_at(at, item), v.dtype.numpy)[0]
    return out


def random_slices(rng: np.random.Generator, x: Any) -> Any:
    """A random strided, perhaps reversed and transposed part of an array."""
    parts = []
    for extent in x.shape:
        step = int(rng.choice([-2, -1, 1, 2, 3]))
        start = int(rng.integers(0, extent + 1))
        parts.append(slice(start, None, step))
    return x[tuple(parts)].transpose(rng.permutation(x.ndim))


@pytest.mark.parametrize("name", [t for t in dtypes.ALL if dtypes.ALL[t].numpy.name == t])
def test_numpy_arrays(name: str, rng: np.random.Generator) -> None:
    whole = rng.integers(0, 2, (5, 4, 3)).astype(name)
    for _ in range(20):
        x = random_slices(rng, whole)
        v = view(x)
        assert (v.dtype.name, v.shape, v.device, v.owner) == (name, x.shape, "cpu", x)
        assert np.array_equal(read(v), x)
        assert v.is_contiguous == x.flags.c_contiguous


def test_addresses_of_slices(rng: np.random.Generator) -> None:
    whole = rng.standard_normal((6, 5, 4))
    for x in [random_slices(rng, whole) for _ in range(50)]:
        assert view(x).pointer == x.ctypes.data


def test_subclasses_scalars_and_empty(tmp_path: Path) -> None:
    stored = np.memmap(tmp_path / "x", np.float32, "w+", shape=(3, 2))
    assert view(stored).pointer == stored.ctypes.data
    assert view(np.zeros(())).shape == ()
    for shape in ((0,), (3, 0), (0, 4, 2)):
        empty = view(np.zeros(shape))
        assert (empty.size, empty.shape) == (0, shape)
        assert empty.is_contiguous


def test_readonly() -> None:
    x = np.zeros(4)
    x.flags.writeable = False
    assert view(x).readonly
    assert not view(x.copy()).readonly
    assert view(np.broadcast_to(np.zeros(1), (4,))).strides == (0,)


def test_views_are_frozen() -> None:
    v = view(np.zeros(4))
    assert type(v) is View
    with pytest.raises(AttributeError):
        v.pointer = 0  # pyright: ignore[reportAttributeAccessIssue]
    assert "float64" in repr(v)


def test_extension_types() -> None:
    ml = pytest.importorskip("ml_dtypes")
    x = np.zeros((2, 3), ml.bfloat16)
    v = view(x)
    assert (v.dtype.name, v.strides) == ("bfloat16", (3, 1))
    assert allocate(x, (4,), v.dtype).dtype == ml.bfloat16
    for kind in (ml.float8_e4m3fn, ml.float8_e5m2, ml.float8_e4m3):
        with pytest.raises(ArgumentError, match="A102"):
            view(np.zeros(2, kind))


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (3.0, "A107"),
        ([1.0, 2.0], "A107"),
        (None, "A107"),
        ("text", "A107"),
        (np.float32(1), "A107"),
        (np.ma.masked_array([1.0], [True]), "A107"),
        (np.zeros(2, np.complex64), "A102"),
        (np.zeros(2, "S4"), "A102"),
        (np.zeros(2, object), "A102"),
        (np.zeros(2, [("a", "f4")]), "A102"),
        (np.zeros(2, np.dtype("float32").newbyteorder()), "A102"),
        (np.zeros(3, [("a", "i1"), ("b", "f4")])["b"], "A104"),
        (np.frombuffer(bytes(9), np.float32, offset=1), "A104"),
    ],
)
def test_refusals(x: object, code: str) -> None:
    for _ in range(2):  # the second time through the tables
        with pytest.raises(ArgumentError) as caught:
            view(x)
        assert caught.value.code == code


def test_byte_order_says_so() -> None:
    with pytest.raises(ArgumentError, match="byte order"):
        view(np.zeros(2, np.dtype("int32").newbyteorder()))


def test_sparse_matrix_is_pointed_to_pack() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(ArgumentError, match="pack"):
        view(sparse.eye_array(3).tocsr())


class Exporter:
    """Shares an array through DLPack only; `old` is from before versions."""

    def __init__(self, x: Any, old: bool = False) -> None:
        self.x, self.old = x, old

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.x.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        if self.old and options:
            raise TypeError("unexpected keyword")
        return self.x.__dlpack__(**options)


@pytest.mark.parametrize("old", [False, True])
def test_dlpack(old: bool, rng: np.random.Generator) -> None:
    whole = rng.standard_normal((5, 4, 3)).astype(np.float32)
    for _ in range(20):
        x = random_slices(rng, whole)
        v = view(Exporter(x, old))
        assert np.array_equal(read(v), x)
        assert v.dtype == dtypes.float32


def test_dlpack_keeps_memory_alive(rng: np.random.Generator) -> None:
    class Temporary(Exporter):
        def __dlpack__(self, **options: Any) -> Any:
            return self.x.copy().__dlpack__(**options)

    x = rng.standard_normal(10000)
    v = view(Temporary(x))
    rubbish = [np.full(10000, i) for i in range(20)]
    assert np.array_equal(read(v), x)
    assert len(rubbish) == 20


def test_dlpack_readonly_and_refusals() -> None:
    x = np.zeros(3)
    x.flags.writeable = False
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        assert view(Exporter(x)).readonly
    with pytest.raises(ArgumentError, match="A102"):
        view(Exporter(np.zeros(3, np.complex128)))

    class Broken(Exporter):
        def __dlpack__(self, **options: Any) -> Any:
            return 7

    with pytest.raises(ArgumentError, match="A107"):
        view(Broken(x))

    class Elsewhere(Exporter):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("not today")

    with pytest.raises(ArgumentError, match="not today"):
        view(Elsewhere(x))


def overlaps(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether writing x is refused where y is read."""
    try:
        check_overlaps([("x", *byte_span(view(x)))], [("y", *byte_span(view(y)))])
    except ArgumentError as error:
        return error.code == "A108"
    return False


def test_overlaps(rng: np.random.Generator) -> None:
    whole = np.zeros((6, 8), np.int16)
    low, high = np.lib.array_utils.byte_bounds(whole)
    for _ in range(200):
        x, y = random_slices(rng, whole), random_slices(rng, whole)
        if x.size == 0 or y.size == 0:
            assert not overlaps(x, y)
            continue
        (a, b), (c, d) = map(np.lib.array_utils.byte_bounds, (x, y))
        assert low <= a < b <= high
        assert overlaps(x, y) == (a < d and c < b)
    assert not overlaps(whole, whole.copy())
    assert overlaps(whole, whole[::-1].T)


def test_allocate_numpy(rng: np.random.Generator) -> None:
    like = np.zeros(2, np.int8)
    for name in ("float32", "int64", "bool"):
        made = allocate(like, (3, 2), dtypes.ALL[name])
        assert (made.shape, made.dtype.name) == ((3, 2), name)
    assert isinstance(allocate(Exporter(like), (3,), dtypes.float32), np.ndarray)


def test_tables_do_not_grow_for_ever() -> None:
    buffer = np.zeros(5000, np.int8)
    for i in range(4900):
        step = np.lib.stride_tricks.as_strided(buffer, (1,), (i + 1,))
        byte_span(view(step))
    assert views.element_strides.cache_info().currsize <= 4096


# ---- torch ---------------------------------------------------------------------------------------


def test_torch_tensors(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    for name, known in dtypes.ALL.items():
        kind = getattr(torch, name)
        x = torch.zeros((4, 6, 2), dtype=kind)[1:, ::2].transpose(0, 2)
        v = view(x)
        assert (v.dtype, v.shape, v.strides) == (known, (2, 3, 3), (1, 4, 12))
        assert (v.pointer, v.device) == (x.data_ptr(), "cpu")
        assert type(v.shape) is tuple
        made = allocate(x, (5, 2), known)
        assert (made.dtype, tuple(made.shape), made.device) == (kind, (5, 2), x.device)


def test_torch_gradients_and_subclasses() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            v = view(weight)
    assert (v.dtype, v.pointer) == (dtypes.bfloat16, weight.data_ptr())
    with pytest.raises(ArgumentError, match="A111"):
        view(weight)
    with pytest.raises(ArgumentError, match="A111"):
        to_host(weight)
    assert not allocate(weight, (3,), v.dtype).requires_grad
    assert isinstance(allocate(weight, (2,), dtypes.float32), torch.Tensor)


def test_torch_refusals() -> None:
    torch = pytest.importorskip("torch")
    x = torch.eye(3)
    complex_part = torch.zeros(3, dtype=torch.complex64).conj().imag
    with warnings.catch_warnings(action="ignore"):  # torch calls its CSR tensors beta
        compressed = x.to_sparse_csr()
    for bad, code in (
        (torch.zeros(2, dtype=torch.complex64), "A102"),
        (x.to_sparse(), "A107"),
        (compressed, "A107"),
        (torch.empty(3, device="meta"), "A107"),
        (complex_part, "A107"),
    ):
        with pytest.raises(ArgumentError) as caught:
            view(bad)
        assert caught.value.code == code


def _lazy(name: str) -> Any:
    torch = pytest.importorskip("torch")
    x = torch.arange(1.0, 7.0).reshape(2, 3)
    with warnings.catch_warnings(action="ignore"):  # torch calls nested tensors a prototype
        rows = [torch.ones(2), torch.ones(3)]
        return {
            "negated": lambda: torch._neg_view(x),
            "imaginary part": lambda: torch.complex(x, x).conj().imag,
            "nested": lambda: torch.nested.nested_tensor(rows),
            "jagged": lambda: torch.nested.nested_tensor(rows, layout=torch.jagged),
            "complex": lambda: torch.complex(x, x),
            "conjugated": lambda: torch.complex(x, x).conj(),
            "sparse": x.to_sparse,
        }[name]()


@pytest.mark.parametrize(
    "name", ["negated", "imaginary part", "nested", "jagged", "complex", "conjugated", "sparse"]
)
def test_the_hint_helps(name: str) -> None:
    """What the hint says, done to the tensor, is an array."""
    torch = pytest.importorskip("torch")
    x = _lazy(name)
    with pytest.raises(ArgumentError) as caught:
        view(x)
    call = re.search(r"(x|torch)\.\w+\((?:[^()]|\(\))*\)", caught.value.hint)
    assert call, caught.value.hint
    with warnings.catch_warnings(action="ignore"):
        array = eval(call[0], {"x": x, "torch": torch})
    assert view(array).device == "cpu"


@pytest.mark.parametrize("dtype", ["int16", "float32", "float64"])
def test_the_stride_of_one_element_is_any(dtype: str) -> None:
    """It is never used; of more elements it must be a multiple of their size."""
    item = np.dtype(dtype).itemsize
    base = np.arange(64).astype(dtype)

    def strided(shape: tuple[int, ...], steps: tuple[int, ...]) -> np.ndarray:
        return np.lib.stride_tricks.as_strided(base, shape, steps)

    for shape, steps in (
        ((1, 3), (item + 1, item)),
        ((3, 1), (2 * item, 1)),
        ((2, 1, 2), (item, 3 * item - 1, 4 * item)),
        ((1,), (-1,)),
        ((1, 1), (1, 1)),
    ):
        x = strided(shape, steps)
        np.testing.assert_array_equal(read(view(x)), x)
    odd = strided((2, 3), (item + 1, item))
    for _ in range(2):  # the strides of one element are remembered with their shape
        with pytest.raises(ArgumentError) as caught:
            view(odd)
        assert caught.value.code == "A104"
        view(strided((1, 3), (item + 1, item)))


def test_layout_tells_array_types_apart() -> None:
    """A frame allocates results in the framework of its first call, so its key has the type."""

    class First:
        def __init__(self, x: np.ndarray) -> None:
            self.x = x

        def __dlpack__(self, **options: object) -> object:
            return self.x.__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    class Second(First):
        pass

    x = np.arange(6, dtype=np.float32)
    assert views.layout(First(x))[0] == views.layout(First(x))[0]
    assert views.layout(First(x))[0] != views.layout(Second(x))[0]
