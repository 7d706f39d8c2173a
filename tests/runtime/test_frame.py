"""What a call writes into its parameter blocks, and which variant of the code it launches."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import tilewright as tw
from tilewright import compiler
from tilewright.runtime import cuda
from tilewright.runtime.frame import Frame
from tilewright.runtime.kernel import Kernel, Launcher
from tilewright.runtime.launch import CudaLauncher
from tilewright.runtime.manifest import ROW_HEAD, structs
from tilewright.sparse.pack import pack
from tilewright.target import target as parse_target


@tw.program
def spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("m n d")
    return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))


@tw.program
def scaled(A=tw.dense("m n"), B=tw.dense("n d"), c=tw.scalar()):
    i, j, k = tw.indices("m n d")
    return tw.out[i, k](tw.sum(A[i, j] * B[j, k] * c, over=j))


def built(definition, target, launcher):
    program = definition.lower(target)
    result = compiler.rendered(program, parse_target(target))
    return Kernel(result.manifest, launcher, result.source)


# ---- parameter blocks ---------------------------------------------------------------------------


class Recorder(Launcher):
    """Keeps the frame of each launch, and the bytes of its blocks at that moment."""

    frame: Frame
    blocks: list[bytes]

    def prepare(self, kernel, frame):
        def run():
            self.frame, self.blocks = frame, [bytes(b) for b in frame.blocks]

        return run


CASES = {
    "csr": spmm.decompose(A=tw.csr()),
    "hyb": spmm.decompose(A=tw.hyb()),
    "temporary": spmm.decompose(A=tw.coo()).schedule(lambda s: s.privatize("out", "m", 3)),
}


@pytest.mark.parametrize("passes_out", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_each_call_fills_every_address(name, passes_out, rng):
    definition, recorder = CASES[name], Recorder()
    kernel = built(definition, "cpp", recorder)
    dense = np.where(rng.random((40, 30)) < 0.2, rng.standard_normal((40, 30)), 0)
    a = pack(dict(definition.formats)["A"], dense.astype(np.float32))
    for d in (33, 33, 8, 33):  # the second and the last call reuse a frame
        x = rng.standard_normal((30, d)).astype(np.float32)
        out = np.full((40, d), np.nan, np.float32) if passes_out else None
        y = kernel(a, x, out=out)
        assert out is None or y is out
        temporaries = [m.ctypes.data for m in recorder.frame.keep if isinstance(m, np.ndarray)]
        assert len(temporaries) == sum(t.role == "temp" for t in kernel.manifest.tensors)
        expected = {"X": {x.ctypes.data}, "out": {y.ctypes.data}}
        expected |= {t.name: set(temporaries) for t in kernel.manifest.tensors if t.role == "temp"}
        check_blocks(kernel, recorder.blocks, expected, a, {"m": 40, "n": 30, "d": d})


def check_blocks(kernel, blocks, addresses, a, sizes):
    """Every field against the arrays themselves. The arrays here have no gaps."""
    manifest, (row, params) = kernel.manifest, structs(kernel.manifest)
    of_values = {v.ctypes.data for v in a.values}
    of_levels = {m.ctypes.data for p in a.structure.parts for by in p.arrays for m in by.values()}
    seen = set()
    for block, stage in zip(blocks, manifest.stages, strict=True):
        record = np.frombuffer(block, params.numpy, 1)[0]
        for field, (name, *_) in zip(params.fields, manifest.params, strict=False):
            value = int(record[field.name])
            if name in addresses:
                assert value in addresses[name], name
                seen.add(name)
            elif name.endswith(".size"):
                assert value == sizes[name.removesuffix(".size")]
            elif name.endswith(".stride0") and "copies" not in name:
                assert value == sizes["d"], name
        table = np.frombuffer(block, row.numpy, len(stage.rows), params.size)
        for record in table:
            for field, (name, *_) in zip(row.fields[len(ROW_HEAD) :], manifest.row, strict=True):
                if name == "A.values":
                    assert int(record[field.name]) in of_values
                elif field.type == "ptr":
                    assert int(record[field.name]) in {0, *of_levels}, name
    assert seen == addresses.keys()


# ---- variants for arrays that are not aligned ---------------------------------------------------


class OnGpu:
    """An array on a GPU as other libraries describe theirs; nothing reads its memory."""

    def __init__(self, shape, base, row=0):
        self.shape, self.base = shape, base
        self.row = row or shape[1]  # elements from one row to the next

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape, "typestr": "<f4", "data": (self.base, False),
            "strides": (4 * self.row, 4), "version": 3,
        }  # fmt: skip


class FakeFunction:
    """A function of a loaded cubin: launching it notes the variant that it comes from."""

    def __init__(self, variant, launched):
        self.variant, self.launched = variant, launched

    def prepare(self, grid, block, smem_bytes, params):
        return SimpleNamespace(run_active=lambda stream: self.launched.append(self.variant))


@pytest.fixture
def launched(monkeypatch):
    """The variant of each launch; images of cubins are their variants' names."""
    launches = []
    gpu = SimpleNamespace(ordinal=0, activate=lambda: None)
    module = lambda image, ordinal: SimpleNamespace(  # noqa: E731
        function=lambda entry: FakeFunction(image, launches)
    )
    monkeypatch.setattr(cuda, "Module", module)
    monkeypatch.setattr(cuda, "device", lambda ordinal=0: gpu)
    monkeypatch.setattr(cuda, "current_stream", lambda ordinal=None: 0)
    monkeypatch.setattr(cuda, "pointer_device", lambda address: 0)
    return launches


BASES = (1 << 20, 2 << 20, 3 << 20)
PLAIN = [((8, 16), 0, 0), ((16, 32), 0, 0), ((8, 32), 0, 0)]  # shape, bytes past a base, row
LAYOUTS = {
    "plain": (PLAIN, False),
    "width 33": ([PLAIN[0], ((16, 33), 0, 0), ((8, 33), 0, 0)], True),
    "an input past its base": ([PLAIN[0], ((16, 32), 4, 0), PLAIN[2]], True),
    "an output past its base": ([*PLAIN[:2], ((8, 32), 8, 0)], True),
    "rows of a wider array": ([((8, 16), 0, 20), *PLAIN[1:]], False),
    "rows of an odd array": ([((8, 16), 0, 21), *PLAIN[1:]], True),
    "one odd row": ([((1, 16), 0, 0), PLAIN[1], ((1, 32), 0, 0)], False),
    "one row past its base": ([((1, 16), 4, 0), PLAIN[1], ((1, 32), 0, 0)], True),
}


def _nothing(*arguments: object) -> bytes:
    """The cubin of a step that no test loads."""
    return b""


@pytest.mark.parametrize("first", LAYOUTS)
def test_the_variant_follows_the_arrays_of_each_call(first, launched, rng):
    launcher = CudaLauncher(lambda variants: variants, (), _nothing)  # pyright: ignore[reportArgumentType]
    kernel = built(scaled, "cuda:sm_80", launcher)
    order = [first, *rng.permutation(list(LAYOUTS)), first, *rng.permutation(list(LAYOUTS))]
    for name in order:
        arrays, unaligned = LAYOUTS[name]
        a, b, out = (
            OnGpu(shape, base + past, row)
            for (shape, past, row), base in zip(arrays, BASES, strict=True)
        )
        for call in (kernel, lambda *args, out: kernel.bind(*args, out=out)()):
            launched.clear()
            call(a, b, 2.0, out=out)
            assert ["TW_UNALIGNED" in variant for variant in launched] == [unaligned], name


# ---- threads ------------------------------------------------------------------------------------


class Raced(list):
    """A list of idle frames from which another thread takes all after it was seen not to be
    empty."""

    def __bool__(self):
        seen = len(self) > 0
        self.clear()
        return seen


def test_another_thread_may_take_the_last_idle_frame(rng):
    kernel = built(scaled, "interp", Recorder())
    a, b = rng.standard_normal((3, 4)), rng.standard_normal((4, 5))
    a, b = a.astype(np.float32), b.astype(np.float32)
    kernel(a, b, 2.0)
    (key,) = kernel._frames
    kernel._frames[key] = Raced(kernel._frames[key])
    assert kernel(a, b, 2.0).shape == (3, 5)
    assert len(list(kernel._frames[key])) == 1


def test_calls_of_many_threads(rng):
    kernel = scaled.build()
    arrays = [rng.standard_normal((2, 6, 6)).astype(np.float32) for _ in range(4)]
    faults = []

    def work(a, b):
        expected = a.astype(np.float64) @ b.astype(np.float64)
        for n in range(200):
            out = np.full((6, 6), np.nan, np.float32)
            try:
                kernel(a, b, float(n), out=out)
                np.testing.assert_allclose(out, n * expected, rtol=1e-4, atol=1e-3)
            except BaseException as error:
                faults.append(error)
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=tuple(pair)) for pair in arrays]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not faults, faults[0]


def test_an_address_on_a_gpu_that_is_no_multiple_of_the_element(launched):
    launcher = CudaLauncher(lambda variants: b"", (), _nothing)
    kernel = built(scaled, "cuda:sm_80", launcher)
    arrays = [OnGpu(shape, base) for (shape, *_), base in zip(PLAIN, BASES, strict=True)]
    for past in (1, 2, 3):
        arrays[1].base = BASES[1] + past
        with pytest.raises(tw.TilewrightError, match=r"A104.*not aligned to 4 bytes"):
            kernel(*arrays[:2], 2.0, out=arrays[2])
    assert not launched


# ---- outputs of no dimension -------------------------------------------------------------------


@tw.program
def total(A=tw.dense("n")):
    i = tw.indices("n")
    return tw.out[()](tw.sum(A[i], over=i))


@pytest.mark.parametrize("target", ["cpp", "interp"])
def test_an_output_of_no_dimension_may_not_overlap_an_input(target, rng):
    kernel = total.build(target)
    a = rng.standard_normal(5).astype(np.float32)
    before = a.copy()
    for _ in range(2):  # the first call of a layout, and a later one
        out = np.full((), np.nan, np.float32)
        kernel(a, out=out)
        wanted = before.astype(np.float64).sum()
        np.testing.assert_allclose(out, wanted, atol=1e-6 * float(np.abs(before).sum()))
        with pytest.raises(tw.TilewrightError, match="A108"):
            kernel(a, out=a[2:3].reshape(()))
        np.testing.assert_array_equal(a, before)
