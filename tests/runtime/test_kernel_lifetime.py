"""A kernel remembers layouts, not arrays: nothing of the caller's lives longer for its call."""

import gc
import weakref

import numpy as np
import pytest

import tilewright as tw


def _spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("m n d")
    return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))


class Watched(np.ndarray):
    """An array that can be watched."""


def _matrix(rng):
    dense = np.where(rng.random((30, 20)) < 0.2, rng.standard_normal((30, 20)), 0)
    return dense.astype(np.float32)


@pytest.mark.parametrize("target", ["cpp", "interp"])
def test_arrays_and_structures_die_with_their_owner(rng, target):
    kernel = tw.program(_spmm).build(target)
    a = tw.csr().pack(_matrix(rng))
    x = rng.standard_normal((20, 8)).astype(np.float32).view(Watched)
    y = np.empty((30, 8), np.float32).view(Watched)
    kernel(a, x, out=y)
    kernel(a, x, out=y)
    watched = [weakref.ref(a.structure), weakref.ref(x), weakref.ref(y)]
    assert len(kernel._frames) == 1
    del a, x, y
    gc.collect()
    assert [w() for w in watched] == [None, None, None]
    assert not kernel._frames, "a dead structure's number may come back"


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("target", ["cpp", "interp"])
def test_one_matrix_after_the_other_in_the_same_place(rng, target):
    kernel = tw.program(_spmm).build(target)
    x = rng.standard_normal((20, 8)).astype(np.float32)
    for _ in range(30):
        dense = _matrix(rng)
        a = tw.csr().pack(dense)
        assert np.allclose(kernel(a, x), dense @ x, atol=1e-4)
        assert np.allclose(kernel(a, x), dense @ x, atol=1e-4)
        del a
        gc.collect()


def test_a_bound_call_keeps_what_it_needs(rng):
    dense = _matrix(rng)
    x = rng.standard_normal((20, 8)).astype(np.float32)
    bound = tw.program(_spmm).build().bind(tw.csr().pack(dense), x.copy())
    gc.collect()
    assert np.allclose(bound(), dense @ x, atol=1e-4)
