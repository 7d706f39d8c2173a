"""CUDA: NVRTC for every architecture, the driver calls on a fake driver and on a real GPU."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tilewright import dtypes, knobs
from tilewright.errors import ArgumentError, BuildError, MissingExtra
from tilewright.runtime import cuda, driver
from tilewright.runtime.layout import Struct
from tilewright.runtime.view import allocate, view
from tilewright.target import CUDA_ARCHS
from tilewright.toolchain import compilers, cxx, disk_cache, nvrtc
from tilewright.tools import env

AXPY = Struct(
    "Axpy", [("y", "ptr", "float*"), ("x", "ptr", "const float*"), ("a", "float32"), ("n", "int64")]
)
HEADERS = {"names.cuh": "#pragma once\ntypedef long long int64_t;\n"}
SOURCE = (
    '#include "names.cuh"\n'
    + AXPY.c_decl
    + """
extern "C" __global__ void axpy(const __grid_constant__ Axpy p) {
  int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (i < p.n) p.y[i] += p.a * p.x[i];
}
"""
)
TOGETHER = Struct("Together", [("out", "ptr", "int*"), ("count", "ptr", "int*")])
NEIGHBOURS = """
extern "C" __global__ void neighbours(const __grid_constant__ Together p) {
  __shared__ int mine;
  if (threadIdx.x == 0) mine = blockIdx.x;
  unsigned at = (unsigned)__cvta_generic_to_shared(&mine), other = blockIdx.x % 2 ^ 1;
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(other));
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
  int theirs;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(theirs) : "r"(at) : "memory");
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
  if (threadIdx.x == 0) {
    atomicAdd(p.count, 1);
    while (atomicAdd(p.count, 0) < (int)gridDim.x) {}
    p.out[blockIdx.x] = atomicAdd(p.count, 0) * 100 + theirs;
  }
}
"""
needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")


# ---- compiling: needs no GPU ------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_compiles_for_every_architecture(arch: str, tmp_path: Path) -> None:
    with knobs.scope(cache_dir=tmp_path):
        first = nvrtc.compile_cuda(SOURCE, arch=arch, headers=HEADERS)
        assert first.image.startswith(b"\x7fELF")
        assert first.resources["axpy"].registers > 0
        assert first.resources["axpy"].spill_bytes == 0
        compiled = disk_cache.stats.compiled
        assert nvrtc.compile_cuda(SOURCE, arch=arch, headers=HEADERS) == first
        assert disk_cache.stats.compiled == compiled


@needs_nvrtc
def test_headers_and_flags_are_in_the_key(tmp_path: Path) -> None:
    source = '#include "n.cuh"\nextern "C" __global__ void k(float* y) { *y = N; }\n'
    with knobs.scope(cache_dir=tmp_path):
        images = {
            nvrtc.compile_cuda(source, arch="sm_90a", headers={"n.cuh": text}, flags=flags).image
            for text, flags in (("#define N 1\n", ()), ("#define N 2\n", ()))
        }
        nvrtc.compile_cuda("extern \"C\" __global__ void k(float* y) { *y = N; }\n", arch="sm_90a",
                          flags=("--define-macro=N=3",))  # fmt: skip
    assert len(images) == 2


@needs_nvrtc
def test_cuda_headers_are_found() -> None:
    source = "#include <cuda_bf16.h>\n" + (
        'extern "C" __global__ void k(__nv_bfloat16* y, float x) { *y = __float2bfloat16(x); }\n'
    )
    assert "k" in nvrtc.compile_cuda(source, arch="sm_80").resources


@needs_nvrtc
def test_resources_tell_of_spills_and_shared_memory() -> None:
    source = """
extern "C" __global__ void __launch_bounds__(1024, 2) crowded(float* y, int n) {
  __shared__ float s[1000];
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = y[i * n + threadIdx.x];
  s[threadIdx.x % 1000] = a[n % 3];
  __syncthreads();
  for (int k = 0; k < n; ++k)
    for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i + 1) % 64] + s[(i + k) % 1000];
  for (int i = 0; i < 64; ++i) y[i * n + threadIdx.x] = a[i];
}
extern "C" __global__ void plain(float* y) { *y = 1; }
"""
    found = nvrtc.compile_cuda(source, arch="sm_90a").resources
    assert found["crowded"].smem == 4000
    assert found["crowded"].spill_bytes > 0
    assert found["crowded"].registers <= 32
    assert found["plain"] == nvrtc.Resources(registers=found["plain"].registers)


@needs_nvrtc
def test_refused_source_is_kept(tmp_path: Path) -> None:
    with knobs.scope(cache_dir=tmp_path), pytest.raises(BuildError) as caught:
        nvrtc.compile_cuda("int x = nonsense;\n", arch="sm_90a")
    assert caught.value.code == "B101"
    assert "nonsense" in caught.value.message
    assert Path(caught.value.where).read_text(encoding="utf-8").startswith("int x = nonsense;\n")


@needs_nvrtc
def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(BuildError, match="B101"):
        nvrtc.compile_cuda(SOURCE, arch="sm_1", headers=HEADERS)


def test_a_missing_compiler_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(MissingExtra, match=r"tilewright\[cuda\]"):
        nvrtc._library.__wrapped__()
    broken = tmp_path / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13"
    broken.parent.mkdir(parents=True)
    broken.write_text("no library", encoding="utf-8")
    assert nvrtc._library.__wrapped__() == str(broken)
    monkeypatch.setattr(nvrtc, "_library", lambda: str(broken))
    with pytest.raises(MissingExtra, match=r"tilewright\[cuda\]"):
        nvrtc._nvrtc.__wrapped__()


def test_architecture_of_a_capability() -> None:
    named = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a"}
    assert {of: driver.arch_of(*of) for of in named} == named
    assert driver.arch_of(10, 0) == "sm_100a"
    assert driver.arch_of(12, 0) == "sm_120a"
    assert driver.arch_of(7, 5) == "sm_75"


def _described() -> dict[str, str]:
    """What `tilewright env` prints of CUDA, by name."""
    return {f.name: f.value for f in env.report() if f.section == "CUDA target"}


@contextlib.contextmanager
def driver_of(library: str) -> Iterator[None]:
    """Inside, another library is the CUDA driver."""
    caches = (driver.driver, driver._device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "LIBRARIES", (library,))
        patch.setattr(driver, "_active", threading.local())
        for function in caches:
            function.cache_clear()
        yield
    for function in caches:
        function.cache_clear()


def test_no_driver_says_so() -> None:
    with driver_of("libtilewright-absent.so"):
        assert not cuda.available()
        assert "no CUDA driver" in _described()["CUDA driver"]
        for call in (cuda.device, lambda: cuda.Module(b""), lambda: cuda.DeviceArray((1,), "int8")):
            with pytest.raises(BuildError, match="B102"):
                call()


# ---- running: the same tests on the fake driver and on a GPU ------------------------------------


def _include_folder() -> str | None:
    folder = nvrtc._include_folder()
    return folder if folder and (Path(folder) / "cuda.h").exists() else None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The driver of `fake_driver.cpp` in place of the machine's; checks that all is given back."""
    folder = _include_folder()
    if not folder or not compilers.has_compiler():
        pytest.skip("the fake driver needs a C++ compiler and cuda.h")
    source = Path(__file__).with_name("fake_driver.cpp").read_text(encoding="utf-8")
    flags = (f"-I{folder}", "-Wall", "-Wextra", "-Werror")
    path = cxx.compile_cpp(source, flags=flags, full_link=True)
    monkeypatch.setattr(cuda, "current_stream", lambda ordinal=None: 0)
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    library = ctypes.CDLL(str(path))
    library.fake_live.restype = ctypes.c_int64
    with driver_of(str(path)):
        before = library.fake_live()
        yield library
        assert library.fake_live() == before


@pytest.fixture(params=["fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def axpy(request: pytest.FixtureRequest) -> cuda.Function:
    """The kernel y += a x, loaded."""
    if request.param == "fake":
        request.getfixturevalue("fake")
        return cuda.Module(b"\x7fELF").function("axpy")
    cubin = nvrtc.compile_cuda(SOURCE, arch=cuda.device().arch, headers=HEADERS)
    return cuda.Module(cubin.image).function("axpy")


def _params(y: cuda.DeviceArray, x: cuda.DeviceArray, a: float) -> ctypes.Array[ctypes.c_char]:
    return AXPY.pack(y=y.pointer, x=x.pointer, a=a, n=x.shape[0])


def test_launch(axpy: cuda.Function, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, 1000)).astype(np.float32)
    xd, yd = cuda.DeviceArray.from_numpy(x), cuda.DeviceArray.from_numpy(y)
    params = _params(yd, xd, 2.0)
    axpy.prepare((4, 1, 1), (256, 1, 1), 0, params).run(cuda.current_stream())
    assert np.array_equal(yd.to_numpy(), y + 2 * x)
    prepared = axpy.prepare((4, 1, 1), (256, 1, 1), 0, params)
    AXPY.pack_into(params, y=yd.pointer, x=xd.pointer, a=-2.0, n=1000)
    prepared.run(cuda.current_stream())
    assert np.allclose(yd.to_numpy(), y, atol=1e-5)
    axpy.prepare((0, 1, 1), (256, 1, 1), 0, params).run(0)  # an empty grid is no launch


def test_large_shared_memory(axpy: cuda.Function) -> None:
    x = cuda.DeviceArray.from_numpy(np.ones(8, np.float32))
    y = cuda.DeviceArray.from_numpy(np.ones(8, np.float32))
    axpy.prepare((1, 1, 1), (32, 1, 1), 90 * 1024, _params(y, x, 1.0)).run(cuda.current_stream())
    assert np.array_equal(y.to_numpy(), np.full(8, 2))
    with pytest.raises(BuildError, match=r"B104.*INVALID_VALUE"):
        axpy.prepare((1, 1, 1), (32, 1, 1), 10**7, _params(y, x, 1.0))


def test_copies_that_nobody_waits_for(axpy: cuda.Function) -> None:
    """Two are under way while the array changes again; each has what it was begun with."""
    values = [np.arange(1000, dtype=np.int32) + n for n in range(3)]
    array = cuda.DeviceArray((1000,), "int32")
    words = [cuda.HostWords(0, 1000) for _ in range(2)]
    waits = []
    for n in range(2):
        array.copy_from(values[n], waits=False)
        waits.append(words[n].copy(array))
    array.copy_from(values[2])
    assert all(np.array_equal(wait(), values[n]) for n, wait in enumerate(waits))
    assert np.array_equal(array.to_numpy(), values[2])
    assert (words[1].take(), words[1].take(), words[1].words[1]) == (1, 0, 2)
    del array, words, waits


def test_graph_replays(axpy: cuda.Function, rng: np.random.Generator) -> None:
    x = rng.standard_normal(100).astype(np.float32)
    xd, yd = cuda.DeviceArray.from_numpy(x), cuda.DeviceArray((100,), "float32")
    cuda.clear(view(yd))
    cuda.synchronize()
    launches = [axpy.prepare((1, 1, 1), (128, 1, 1), 0, _params(yd, xd, a)) for a in (1.0, 3.0)]
    graph = cuda.Graph(launches)
    assert not yd.to_numpy().any()  # recording runs nothing
    for _ in range(5):
        graph.launch()
    cuda.synchronize()
    assert np.allclose(yd.to_numpy(), 20 * x, rtol=1e-5)


def test_attributes_of_a_launch(axpy: cuda.Function) -> None:
    """Clusters must divide the grid, and CTAs that wait for each other must all fit."""
    x = cuda.DeviceArray.from_numpy(np.ones(8, np.float32))
    params, size = _params(x, x, 1.0), (128, 1, 1)
    if axpy.module.device.arch == "sm_90a":
        axpy.prepare((4, 1, 1), size, 0, params, cluster=(2, 1, 1)).run(0)
        axpy.prepare((4, 1, 1), size, 0, params, cluster=(4, 1, 1), cooperative=True).run(0)
        with pytest.raises(BuildError, match=r"B104.*launching axpy"):
            axpy.prepare((3, 1, 1), size, 0, params, cluster=(2, 1, 1)).run(0)
    with pytest.raises(BuildError, match=r"B104.*TOO_LARGE"):
        axpy.prepare((100_000, 1, 1), size, 0, params, cooperative=True).run(0)
    axpy.prepare((4, 1, 1), size, 0, params, cooperative=True).run(0)
    cuda.synchronize()
    assert np.array_equal(x.to_numpy(), np.full(8, 8 if axpy.module.device.arch == "sm_90a" else 2))


@needs_nvrtc
def test_neighbours_compile() -> None:
    assert nvrtc.compile_cuda(TOGETHER.c_decl + NEIGHBOURS, arch="sm_90a").image


@pytest.mark.gpu
@needs_nvrtc
def test_clusters_and_cooperative_grids() -> None:
    """Each CTA reads the shared memory of its neighbour, then waits for all CTAs of the grid."""
    device = cuda.device()
    if not device.arch.startswith("sm_9"):
        pytest.skip("clusters need sm_90")
    cubin = nvrtc.compile_cuda(TOGETHER.c_decl + NEIGHBOURS, arch=device.arch)
    out = cuda.DeviceArray.from_numpy(np.full(8, -1, np.int32))
    count = cuda.DeviceArray.from_numpy(np.zeros(1, np.int32))
    params = TOGETHER.pack(out=out.pointer, count=count.pointer)
    function = cuda.Module(cubin.image).function("neighbours")
    function.prepare((8, 1, 1), (32, 1, 1), 0, params, cluster=(2, 1, 1), cooperative=True).run(0)
    cuda.synchronize()
    assert out.to_numpy().tolist() == [8 * 100 + (n ^ 1) for n in range(8)]


def test_failed_recording_leaves_nothing(axpy: cuda.Function) -> None:
    x = cuda.DeviceArray.from_numpy(np.ones(8, np.float32))
    good = axpy.prepare((1, 1, 1), (32, 1, 1), 0, _params(x, x, 1.0))

    def run(stream: int) -> None:
        raise KeyError("while recording")

    bad = SimpleNamespace(run=run)
    with pytest.raises(KeyError, match="while recording"):
        cuda.Graph([good, bad])
    cuda.synchronize()
    assert axpy.handle


def test_launch_errors_are_named(axpy: cuda.Function) -> None:
    params = AXPY.pack(y=0, x=0, a=0.0, n=0)
    with pytest.raises(BuildError, match=r"B104.*launching axpy.*INVALID_VALUE"):
        axpy.prepare((1, 1, 1), (2048, 1, 1), 0, params).run(0)
    with pytest.raises(BuildError, match=r"B104.*NOT_FOUND"):
        axpy.module.function("absent")


def test_another_thread_launches(axpy: cuda.Function) -> None:
    """The context is made current in each thread that needs it."""
    x = cuda.DeviceArray.from_numpy(np.ones(8, np.float32))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            axpy.prepare((1, 1, 1), (32, 1, 1), 0, _params(x, x, 1.0)).run(0)
            cuda.synchronize()
        except BuildError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert np.array_equal(x.to_numpy(), np.full(8, 2))


def test_device_array(axpy: cuda.Function, rng: np.random.Generator) -> None:
    x = rng.integers(0, 99, (3, 5)).astype(np.int32)
    held = cuda.DeviceArray.from_numpy(x[:, ::-1])
    assert np.array_equal(held.to_numpy(), x[:, ::-1])
    held.copy_from(x)
    assert np.array_equal(held.to_numpy(), x)
    v = view(held)
    assert (v.shape, v.strides, v.device, v.dtype) == ((3, 5), (5, 1), "cuda:0", dtypes.int32)
    assert held.__cuda_array_interface__["typestr"] == "<i4"
    made = allocate(held, (2, 2), dtypes.bfloat16)
    assert (made.dtype, made.nbytes) == (dtypes.bfloat16, 8)
    assert made.pointer >= v.pointer + held.nbytes or v.pointer >= made.pointer + made.nbytes
    bits = cuda.DeviceArray.from_numpy(np.ones(4, np.uint16), "bfloat16")
    assert view(bits).dtype == dtypes.bfloat16
    empty = cuda.DeviceArray.from_numpy(np.zeros((0, 3)))
    assert empty.to_numpy().shape == (0, 3)
    assert held.reshape(-1, 3).shape == (5, 3) and held.reshape(5, 1, -1).shape == (5, 1, 3)
    for wrong in ((-1, 4), (-1, -1), (0, -1), (3, 4)):
        with pytest.raises(ArgumentError, match="A103"):
            held.reshape(*wrong)
    with pytest.raises(ArgumentError, match="A103"):
        held.copy_from(x.T)
    with pytest.raises(ArgumentError, match="A102"):
        held.copy_from(x.astype(np.int64))
    with pytest.raises(ArgumentError, match="A103"):
        cuda.DeviceArray((-1,), "int8")
    assert axpy.name == "axpy"


def test_device_facts(fake: ctypes.CDLL) -> None:
    assert cuda.available()
    assert (cuda.device(0).name, cuda.device().arch, cuda.device(1).arch) == (
        "Imaginary H100",
        "sm_90a",
        "sm_86",
    )
    assert cuda.device(0).sms == 132
    lines = _described()
    assert lines["CUDA driver"] == "CUDA 13.0"
    assert lines["GPU 1"] == "Imaginary H100, sm_86, 132 SMs, 80 GiB"
    with pytest.raises(BuildError, match="no GPU 2"):
        cuda.device(2)


def test_driver_without_a_gpu(fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_FAKE_NO_GPU", "1")
    assert not cuda.available()
    with pytest.raises(BuildError, match=r"B102.*NO_DEVICE"):
        cuda.device()


class Interface:
    """An array that has nothing but `__cuda_array_interface__`."""

    def __init__(self, **said: object) -> None:
        self.said = said

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return self.said


def test_cuda_array_interface(fake: ctypes.CDLL) -> None:
    plain = Interface(shape=(2, 3), typestr="<f4", data=(4096, False), strides=None, version=3)
    v = view(plain)
    assert (v.pointer, v.strides, v.device, v.readonly) == (4096, (3, 1), "cuda:1", False)
    turned = Interface(
        shape=(3, 2), typestr="<i2", data=(4096, True), strides=(2, 6), version=3, stream=7
    )
    v = view(turned)
    assert (v.strides, v.readonly, v.dtype) == ((1, 3), True, dtypes.int16)
    refused: list[tuple[dict[str, object], str]] = [
        ({"typestr": "<c8"}, "A102"),
        ({"typestr": ">f4"}, "A102"),
        ({"strides": (13, 4)}, "A104"),
        ({"mask": turned}, "A107"),
    ]
    for change, code in refused:
        with pytest.raises(ArgumentError) as caught:
            view(Interface(**(plain.said | change)))
        assert caught.value.code == code


@pytest.mark.gpu
def test_torch_shares_context_and_stream(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    cubin = nvrtc.compile_cuda(SOURCE, arch=cuda.device().arch, headers=HEADERS)
    kernel = cuda.Module(cubin.image).function("axpy")
    x = torch.from_numpy(rng.standard_normal(1000).astype(np.float32)).cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert cuda.current_stream() == side.cuda_stream
        y = torch.zeros_like(x)
        params = AXPY.pack(y=view(y).pointer, x=view(x).pointer, a=2.0, n=1000)
        kernel.prepare((4, 1, 1), (256, 1, 1), 0, params).run(cuda.current_stream())
        z = y + 1
    side.synchronize()
    assert torch.equal(z, 2 * x + 1)
    made = allocate(x, (3,), dtypes.bfloat16)
    assert (made.dtype, made.device) == (torch.bfloat16, x.device)
    array = cuda.DeviceArray.from_numpy(np.arange(4, dtype=np.int32))
    assert torch.as_tensor(array, device="cuda").tolist() == [0, 1, 2, 3]
