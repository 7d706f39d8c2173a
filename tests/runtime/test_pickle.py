"""Packed tensors and kernels are copied and pickled, before and after their first use."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.compiler.cases import FORMATS, matrix, sddmm_plain, softmax, spmm

import tilewright as tw
from tilewright import ops
from tilewright.errors import ArgumentError

WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "old pickle": lambda x: pickle.loads(pickle.dumps(x, 2)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def inputs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return matrix("random", 7, 6, rng), rng.uniform(-1, 1, (6, 16)).astype(np.float32)


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f != "dbsr + csc"])  # no spmm for it
@pytest.mark.parametrize("way", WAYS)
def test_packed_tensors(way, fmt, rng):
    dense, x = inputs(rng)
    packed = FORMATS[fmt].pack(dense)
    interp = spmm.decompose(A=FORMATS[fmt]).build("interp")
    for used in (False, True):
        again = WAYS[way](packed)
        assert again.format == packed.format and again.dtype == packed.dtype
        assert str(again) == str(packed) and again.shape == packed.shape
        np.testing.assert_array_equal(again.dense(), dense)
        np.testing.assert_array_equal(
            again.with_values(2 * packed.entry_values()).dense(), 2 * dense
        )
        for part in again.structure.parts:  # kernels trust them, in a copy as well
            arrays = [a for level in part.arrays for a in level.values()]
            assert not any(a.flags.writeable for a in (*arrays, part.entries, part.slots))
        assert again.values[0].flags.writeable
        if not used:
            ops.spmm(packed, x)
            interp(packed, x)
        np.testing.assert_allclose(ops.spmm(again, x), dense @ x, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(interp(again, x), dense @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_tensors_of_one_structure_still_share_it(way, rng):
    dense, _ = inputs(rng)
    a = tw.csr().pack(dense)
    one, other = WAYS[way]((a, a.with_values(2 * a.entry_values())))
    assert one.structure is other.structure is not a.structure
    shallow = copy.copy(a)
    assert shallow.structure is a.structure and shallow.values is a.values


def test_a_structure_holds_no_table():
    """Nothing that a call finds out is kept in a frozen value."""
    structure = tw.csr().pack(np.eye(3)).structure
    assert not [n for n in structure.__slots__ if isinstance(getattr(structure, n, None), dict)]


@pytest.mark.parametrize("target", ["cpp", "interp"])
@pytest.mark.parametrize("way", WAYS)
def test_kernels(way, target, rng):
    """Also one whose recipe is a closure, which nothing can pickle."""
    dense, x = inputs(rng)
    lanes = 4
    for fmt in (tw.csr(), tw.hyb(buckets=(1, 2))):
        kernel = spmm.decompose(A=fmt).schedule(lambda s: s.split("k", lanes)).build(target)
        packed = fmt.pack(dense)
        for used in (False, True):
            again = WAYS[way](kernel)
            assert again is not kernel and again.source == kernel.source
            assert repr(again) == repr(kernel) and again.manifest == kernel.manifest
            np.testing.assert_allclose(again(packed, x), dense @ x, rtol=1e-5, atol=1e-5)
            if not used:
                kernel(packed, x)
        again = WAYS[way](again)
        np.testing.assert_allclose(again(packed, x), dense @ x, rtol=1e-5, atol=1e-5)
        with pytest.raises(ArgumentError, match="A103"):
            again(packed, x[1:])


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_another_process(method, rng):
    dense, x = inputs(rng)
    packed = tw.csr().pack(dense)
    kernels = [spmm.build("cpp"), spmm.build("interp")]
    wanted = [k(packed, x) for k in kernels]
    ops.spmm(packed, x)
    with multiprocessing.get_context(method).Pool(1) as pool:
        for kernel, y in zip(kernels, wanted, strict=True):
            np.testing.assert_array_equal(pool.apply(kernel, (packed, x)), y)
        sparse = sddmm_plain.build("cpp")
        P, Q = rng.uniform(-1, 1, (2, 7, 3)).astype(np.float32)
        back = pool.apply(sparse, (packed, P, Q[:6]))
        np.testing.assert_array_equal(back.dense(), sparse(packed, P, Q[:6]).dense())
        row = softmax.build("cpp")
        np.testing.assert_array_equal(pool.apply(row, (packed,)).dense(), row(packed).dense())
