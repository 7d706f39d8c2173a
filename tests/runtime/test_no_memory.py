"""Arrays with elements and no memory: refused with A107 wherever they enter, never read."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tilewright.errors import ArgumentError
from tilewright.runtime.view import address, layout, view

torch = pytest.importorskip("torch")


@tw.program
def scale(A=tw.sparse("m n"), x=tw.dense("m n")):
    i, j = tw.indices("m n")
    return (
        tw.out.named("y")[i](tw.sum(A[i, j] * x[i, j], over=j)),
        tw.out.named("z")[i, j](x[i, j] * 2.0),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    )  # fmt: skip


class NullCapsule:
    """An array by DLPack with null data, and perhaps an offset that hides it."""

    def __init__(self, shape: tuple[int, ...] = (2, 3), offset: int = 0) -> None:
        self.sizes = (ctypes.c_int64 * len(shape))(*shape)
        self.tensor = _Tensor(None, 1, 0, len(shape), 2, 32, 1, self.sizes, None, offset)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(ctypes.addressof(self.tensor), b"dltensor", None)


def freed(*shape: int, dtype: Any = torch.float32) -> Any:
    t = torch.ones(shape, dtype=dtype)
    t.untyped_storage().resize_(0)
    return t


def freed_parameter(*shape: int) -> Any:
    p = torch.nn.Parameter(torch.ones(shape), requires_grad=False)
    p.untyped_storage().resize_(0)
    return p


def fake(*shape: int) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(shape)


NOTHING = {
    "freed": lambda: freed(2, 3),
    "freed parameter": lambda: freed_parameter(2, 3),
    "fake": lambda: fake(2, 3),
    "meta": lambda: torch.ones(2, 3, device="meta"),
    "negated": lambda: torch._neg_view(freed(2, 3)),
    "dlpack": NullCapsule,
    "dlpack with an offset": lambda: NullCapsule(offset=64),
}


def refused(act: Any, where: str = "") -> None:
    with pytest.raises(ArgumentError) as caught:
        act()
    assert caught.value.code == "A107" and where in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", NOTHING)
def test_no_way_in(name):
    nothing = NOTHING[name]()
    for door in (view, layout, address, layout, address):  # once more: types are remembered
        if door is not layout or name != "negated":
            refused(lambda door=door: door(nothing))


@pytest.fixture(scope="module", params=["cpp", "interp"])
def kernel(request) -> Any:
    return scale.build(request.param)


A = tw.csr().pack(np.ones((2, 3), np.float32))


@pytest.mark.parametrize("name", NOTHING)
def test_operands_and_outputs(kernel, name):
    nothing = NOTHING[name]()
    like = np.ones((2, 3), np.float32)
    x, y, z = like, np.zeros(2, np.float32), np.zeros((2, 3), np.float32)
    if hasattr(nothing, "data_ptr"):
        x, y, z = (torch.from_numpy(a) for a in (x, y, z))
    for _ in range(2):  # the second call finds the layout of the first
        refused(lambda: kernel(A, nothing), "argument x")
        refused(lambda: kernel(A, nothing, out=(y, z)), "argument x")
        refused(lambda: kernel(A, x, out=(y, nothing)), "argument z")
        refused(lambda: kernel.bind(A, nothing), "argument x")
        refused(lambda: kernel.bind(A, x, out=(y, nothing)), "argument z")
        kernel(A, x)
        kernel(A, x, out=(y, z))
    assert float(z.sum()) == 12 and float(y.sum()) == 6


@pytest.mark.parametrize("name", NOTHING)
def test_values_of_a_sparse_operand(kernel, name):
    nothing = NOTHING[name]()
    nothing = nothing.reshape(6) if hasattr(nothing, "reshape") else NullCapsule((6,))
    bad = dataclasses.replace(A, values=(nothing,))
    x = np.ones((2, 3), np.float32)
    for _ in range(2):
        refused(lambda: kernel(bad, x))
        kernel(A, x)


@pytest.mark.parametrize("name", [n for n in NOTHING if "dlpack" not in n])
def test_packing(name):
    """Also in a list, and as values."""
    nothing = NOTHING[name]()
    flat = nothing.reshape(6)
    for given in (nothing, [nothing], [[1.0, 2.0], nothing]):
        refused(lambda given=given: tw.csr().pack(given))
    for given in (flat, [flat], [1.0, flat]):
        refused(lambda given=given: A.with_values(given))
        refused(lambda given=given: tw.csr().pack(np.ones((2, 3)), values=given))
    refused(lambda: tw.csr().pack((([0], [0]), flat, (2, 3))))


def test_index_arrays():
    none, some = freed(3, dtype=torch.int64), torch.tensor([0, 1, 2])
    for coords in ((none, some), (some, none)):
        refused(lambda coords=coords: tw.csr().pack((coords, None, (3, 3))))
    refused(lambda: tw.csr().pack((none, some[:2], None, (2, 3))))
    refused(lambda: tw.csr().pack((some, freed(2, dtype=torch.int64), None, (2, 3))))


def test_no_elements_need_no_memory(kernel):
    empty = tw.csr().pack(np.ones((0, 3), np.float32))
    for x in (torch.ones(0, 3), np.ones((0, 3), np.float32), NullCapsule((0, 3))):
        y, z = kernel(empty, x)
        assert tuple(y.shape) == (0,) and tuple(z.shape) == (0, 3)
