"""Checks of the arguments of a call: dtype, rank, sizes, strides, device, format, overlaps.

Sparse arguments are anything with `.structure`, `.values`, `.dtype` (`sparse.pack.Packed`). A
layout is checked once: later calls with arguments of the same layout reuse its frame.
"""

import contextlib
import struct
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.errors import ArgumentError
from tilewright.runtime.manifest import Manifest, TensorSpec
from tilewright.runtime.view import View, address, check_gradient, named_view, row_major_strides

Span = tuple[str, int, int]
"""The name of an argument, and the first address and the end of its bytes."""


class Arguments:
    """The checked arguments of one call: views of dense arrays, structures of sparse ones, sizes.
    Every method raises ArgumentError."""

    def __init__(self, manifest: Manifest, dtypes_by_name: dict[str, dtypes.DType]) -> None:
        self.manifest, self.dtypes = manifest, dtypes_by_name
        self.inputs: list[tuple[TensorSpec, Any]] = []
        self.sizes: dict[Any, int] = dict(manifest.sizes)
        self.views: dict[str, View] = {}
        self.structures: dict[str, Any] = {}
        self.device = ""

    def add_input(self, spec: TensorSpec, arg: Any) -> None:
        """Check an input. Scalars are converted, and checked, at each call."""
        self.inputs.append((spec, arg))
        if spec.structure:
            self._add_sparse(spec, arg)
            _check_fill(spec, arg)
        elif spec.dims:
            self._add_dense(spec, arg, written=spec.role == "update")

    def add_output(self, spec: TensorSpec, array: Any) -> None:
        """Check an output that the caller passed, or describe one to be allocated (None)."""
        if spec.structure:
            if array is not None:
                self._add_sparse(spec, array)
        elif array is not None:
            self._add_dense(spec, array, written=True)
        else:
            shape = tuple(d if isinstance(d, int) else self.sizes[d] for d in spec.dims)
            strides, dtype = row_major_strides(shape), self.dtypes[spec.name]
            self.views[spec.name] = View(0, dtype, shape, strides, self.device, None, False)

    def _add_dense(self, spec: TensorSpec, arg: Any, *, written: bool) -> None:
        name = spec.name
        v, dtype = named_view(f"argument {name}", arg), self.dtypes[name]
        is_bits = v.dtype.kind == dtype.numpy.kind == "u"  # bfloat16 may come as uint16
        if v.dtype != dtype and not (is_bits and v.dtype.bits == dtype.bits):
            raise _wrong_dtype(spec, dtype, v.dtype)
        self._add_sizes(spec, v.shape)
        if spec.dims and not spec.strided and v.strides[-1] != 1 and v.shape[-1] > 1 and v.size:
            raise _error("A104", f"the last dimension of {name} has stride {v.strides[-1]}", name)
        if written and v.readonly:
            raise _error("A104", f"{name} is written to but is read-only", name)
        if written and _may_alias_itself(v):
            text = f"elements of {name} share memory: strides {v.strides}"
            raise _error("A104", text, name, "written arrays are not broadcast views: make a copy")
        self._add_device(v.device, name)
        self.views[name] = v

    def _add_sparse(self, spec: TensorSpec, arg: Any) -> None:
        name = spec.name
        s = getattr(arg, "structure", None)
        if s is None:
            text = f"{name} is sparse but a {type(arg).__name__} was given"
            raise _error("A106", text, name, "pack it: fmt.pack(matrix)")
        expected = dict(self.manifest.formats)[spec.structure]
        if repr(s.format) != expected:
            text = f"{name} is packed as {s.format}, the kernel was built for {expected}"
            raise _error("A106", text, name, "decompose() with that format, or pack with this one")
        if self.structures.setdefault(spec.structure, s) is not s:
            text = f"{name} must share the structure of {spec.structure}"
            raise _error("A106", text, name, "make it with A.with_values(…)")
        index = self.manifest.index
        if s.index_dtype.name != index:
            text = f"{name} has {s.index_dtype} coordinates, the kernel was built for {index}"
            raise _error("A102", text, name, f'build with .typed(index="{s.index_dtype}")')
        if arg.dtype != self.dtypes[name]:
            raise _wrong_dtype(spec, self.dtypes[name], arg.dtype)
        self._add_sizes(spec, (*s.shape, *arg.inner))
        self._add_device(f"{s.device}:0" if s.device == "cuda" else s.device, name)

    def inner(self, spec: TensorSpec) -> tuple[int, ...]:
        """The sizes of the dense dimensions of a sparse tensor."""
        own = len(self.structures[spec.structure].shape)
        return tuple(d if isinstance(d, int) else self.sizes[d] for d in spec.dims[own:])

    def _add_sizes(self, spec: TensorSpec, shape: tuple[int, ...]) -> None:
        if len(shape) != len(spec.dims):
            text = f"{spec.name} has {len(shape)} dimensions, expected {_dims(spec)}"
            raise _error("A103", text, spec.name)
        for dim, n in zip(spec.dims, shape, strict=True):
            expected = dim if isinstance(dim, int) else self.sizes.setdefault(dim, n)
            if expected != n:
                text = f"{spec.name} has {n} where {dim!r} is {expected}: its shape is {shape}"
                raise _error("A103", text, spec.name, f"expected {_dims(spec)}")

    def _add_device(self, device: str, name: str) -> None:
        if self.device and device != self.device:
            text = f"{name} is on {device}, other arguments on {self.device}"
            raise _error("A105", text, name, "move it with .to()")
        target, kind = self.manifest.target, device.partition(":")[0]
        if kind != ("cuda" if target.startswith("cuda") else "cpu"):
            text = f"{name} is on {device}, the kernel was built for {target}"
            raise _error("A105", text, name, f'build("{kind}"), or move the arrays')
        self.device = device


def _error(code: str, message: str, name: str, hint: str = "") -> ArgumentError:
    return ArgumentError(code, message, where=f"argument {name}", hint=hint)


def _wrong_dtype(spec: TensorSpec, expected: dtypes.DType, actual: dtypes.DType) -> ArgumentError:
    hint = f'convert it, or build with .typed({spec.name}="{actual}")'
    if spec.role == "output":  # which has the dtype of its expression
        hint = f'make it {expected}, or write tw.out.typed("{actual}")[…](…) in the program'
    text = f"{spec.name} is {actual}, the kernel was built for {expected}"
    return _error("A102", text, spec.name, hint)


def scalar_value(spec: TensorSpec, dtype: dtypes.DType, arg: Any) -> float | int:
    """The number, or the bits of a 16-bit float, that a scalar parameter holds."""
    value: float | int | None = None
    check_gradient(arg, f"argument {spec.name}")
    if not isinstance(arg, (str, bytes)):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            value = _FLOATS[dtype.name](float(arg)) if dtype.is_float else int(arg)
    if value is None or not (
        dtype.is_float or (value == arg and dtype.least <= value <= dtype.most)
    ):
        raise _error("A107", f"{spec.name} is a number of type {dtype}, not {arg!r}", spec.name)
    return value


# A number as a parameter holds it; `struct` refuses finite ones that would become infinite.
_FLOATS: dict[str, Callable[[float], float | int]] = {
    "float64": lambda x: x,
    "float32": lambda x: struct.unpack("<f", struct.pack("<f", x))[0],
    "float16": lambda x: struct.unpack("<H", struct.pack("<e", x))[0],
    "bfloat16": lambda x: int(dtypes.bfloat16_bits(np.array([_FLOATS["float32"](x)], "f"))[0]),
}


def _check_fill(spec: TensorSpec, arg: Any) -> None:
    """Formats with padding store the fill there: it must be the one that the program declares."""
    same = arg.fill == spec.fill or (arg.fill != arg.fill and spec.fill != spec.fill)
    if same or all(f.is_exact for f in arg.structure.format.formats):
        return
    text = f"{spec.name} is packed as {arg.structure.format} with fill={arg.fill:g}, the program "
    text += f"declares fill={spec.fill:g}"
    hint = f'pack(matrix, fill={spec.fill:g}), in Python float("{spec.fill:g}")'
    raise _error("A106", text, spec.name, hint)


def value_spans(name: str, packed: Any) -> list[Span]:
    """The bytes of the values of a sparse tensor, one span a part."""
    itemsize, spans = packed.dtype.itemsize * prod(packed.inner), []
    for values, part in zip(packed.values, packed.structure.parts, strict=True):
        first = address(values)
        spans.append((name, first, first + part.size * itemsize))
    return spans


def check_overlaps(written: Sequence[Span], read: Sequence[Span]) -> None:
    """Refuse a memory hazard: written bytes that another argument has too. Raises
    ArgumentError[A108]."""
    for n, (name, low, high) in enumerate(written):
        for other, first, last in (*written[:n], *read):
            if low < last and first < high and low < high and first < last:
                role = "output" if (other, first, last) in written else "input"
                text = f"the output {name} overlaps the {role} {other}"
                raise ArgumentError("A108", text, where="out", hint="give it memory of its own")


def _may_alias_itself(v: View) -> bool:
    """Whether two elements may have the same address."""
    end = 1
    for step, n in sorted((abs(s), n) for s, n in zip(v.strides, v.shape, strict=True) if n > 1):
        if step < end:
            return v.size > 0
        end += (n - 1) * step
    return False


def _dims(spec: TensorSpec) -> str:
    return f"({' × '.join(map(str, spec.dims))})"
