"""Bodies of attention kernels: with others in one translation unit, and in one launch."""

from __future__ import annotations

import gc
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.attention import simulated
from tests.attention.cases import ALL_VARIANTS, TYPES, paged, queries, spec_of
from tests.attention.test_cascade import cascade, close
from tests.attention.test_decode_simulated import prepared
from tests.attention.test_flash_cuda import on_device
from tests.attention.test_hopper_cuda import nvdisasm
from tests.attention.test_tensors import Documents
from tests.cubin import test_steps
from tests.runtime.test_cuda import fake  # noqa: F401 - a fixture

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import families, merge, planner, reference, select
from tilewright.attention.families import decode, hopper, portable
from tilewright.attention.plan import ITEMS
from tilewright.attention.spec import KERNELS, loaded, params_struct
from tilewright.attention.table import TableForm
from tilewright.codegen import prelude_files, shell
from tilewright.ir.body import Body
from tilewright.runtime import step as step_runtime
from tilewright.runtime.step import Part, Step, parameters
from tilewright.toolchain import compilers, nvrtc

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
needs_compiler = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")


def spec(group: int, dim: int, kind: str, variant: str = "causal", **form: Any) -> Any:
    return spec_of(group, dim, kind, kind, ALL_VARIANTS[variant], **form)


def portable_bodies() -> tuple[Body, ...]:
    """Of every kernel but those of the Hopper family; two of decode and of the planner, whose
    constants, tables and variants differ."""
    tables = TableForm("int32").for_planner(), TableForm("int32", shared=1).for_planner()
    return (
        decode.body(spec(4, 128, "bfloat16"), 8, 1),
        decode.body(spec(1, 80, "float16", "softcap_alibi"), 5, 2),
        decode.body(spec(4, 128, "bfloat16", shared=1), 8, 1, decode.BEHIND, 32),
        portable.body(spec(2, 72, "float32", "window")),
        portable.body(spec(2, 64, "float16", "softcap_alibi"), True),
        merge.body(dtypes.float16, 80), merge.body(dtypes.float32, 64), select.body(),
        *(planner.body(form, 4, 32) for form in tables),
    )  # fmt: skip


def test_kernels_take_threads_units_and_barriers_from_outside():
    words = r"blockIdx|threadIdx|gridDim|blockDim|__syncthreads|__global__|bar_(?:sync|or)\(\d"
    for file in KERNELS.glob("*.cuh"):
        assert not re.findall(words, file.read_text(encoding="utf-8")), file.name


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_function_each_in_one_translation_unit(arch, tmp_path):
    """Also beside Hopper kernels, whose macros end with their texts, and a program; none uses a
    barrier beyond those that its body says."""
    bodies = list(portable_bodies())
    if arch == hopper.ARCH:
        documents = spec_of(4, 128, "float16", "float16", Documents())
        narrow = hopper.body(spec(2, 128, "float16"), 128, True, True)
        bodies[1:1] = [hopper.body(documents, 16), hopper.body(spec(4, 64, "bfloat16"), 4), narrow]
    bodies += test_steps.bodies(("append",), arch)
    names = [f"f{n}" for n in range(len(bodies))]
    text = shell.alone(bodies, names)
    cubin = nvrtc.compile_cuda(text, arch=arch, name="all", headers=prelude_files.headers())
    tool, file = nvdisasm(), tmp_path / "all.cubin"
    file.write_bytes(cubin.image)
    machine = subprocess.run([tool, "-c", file], capture_output=True, encoding="utf-8", check=True)
    found = re.split(r"\.section\s+\.text\.(\w+)", machine.stdout)[1:]
    code = dict(zip(found[::2], found[1::2], strict=True))
    for name, body in zip(names, bodies, strict=True):
        used = cubin.resources[name]
        assert used.spill_bytes == 0 and used.registers * body.resident <= 65536
        ids = {int(x, 16) for x in re.findall(r"BAR\.\S+ +(0x\w+)", code[name])}
        assert ids <= {*range(shell.BARRIER, shell.BARRIER + body.barriers)}


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_one_function_for_attention_and_a_program(arch):
    two = portable_bodies()[:2]
    text = shell.beside((*two, *test_steps.bodies(("append",), arch)))
    source = f"#define {shell.OVERLAPS}\n{text}"
    cubin = nvrtc.compile_cuda(source, arch=arch, name="step", headers=prelude_files.headers())
    assert cubin.resources["step"].spill_bytes == 0


@needs_compiler
def test_two_head_dimensions_in_one_launch_on_simulated_warps(rng):
    """Each by a range of the CTAs, which come in any order."""
    cases = (
        cascade(rng, (4, 2, 128, ml_dtypes.bfloat16, "causal", "scores", ""), [1, 2, 1], [],
                [130, 5, 300]),
        cascade(rng, (3, 1, 40, np.float16, "window", "alibi", "per head"), [2, 0, 3], [],
                [70, 9, 200]),
    )  # fmt: skip
    calls = [prepared(case, 6) for case in cases]
    parts = [Part(c.body, c.block, c.ctas, (), None) for c in calls]  # type: ignore[arg-type]
    run = simulated.kernel(shell.beside([c.body for c in calls]), "step", "Step")
    writes = [x for c in calls for x in (c.o, c.lse, c.partials, c.counters)]
    ctas = sum(c.ctas for c in calls)
    simulated.launch(run, parameters(parts), decode.THREADS, ctas, 5, writes)
    for case, call in zip(cases, calls, strict=True):
        close(case, call.o, call.lse)
        assert not call.counters.any()


def on_gpu(rng: np.random.Generator, shape: tuple[int, int, int, str], lengths: list[int]) -> Any:
    """A bound call of one query a request, and what the evaluator in float64 says of it."""
    from tilewright.runtime.cuda import DeviceArray

    group, kv_heads, dim, kind = shape
    attn = tw.Attention(group * kv_heads, kv_heads, dim)
    kv = paged(rng, lengths, (16, kv_heads, dim), TYPES[kind])
    q, indptr = queries(rng, [1] * len(lengths), group * kv_heads, dim, TYPES[kind])
    there = on_device(kv)
    bits = q.view(np.uint16) if kind == "bfloat16" else q
    plan = attn.plan(indptr, there)
    bound = attn.bind(DeviceArray.from_numpy(bits, kind), there, plan=plan)
    return bound, reference.attention(q, kv, indptr, attn.variant)


@pytest.fixture
def imagined(fake: Any) -> Iterator[None]:  # noqa: F811
    """A driver that runs nothing; what it has loaded ends with it."""
    caches = loaded, step_runtime._function
    for cache in caches:
        cache.cache_clear()
    yield
    gc.collect()
    for cache in caches:
        cache.cache_clear()


@tw.program
def scaled(X=tw.dense("i j")):
    i, j = tw.indices("i:i j:j")
    return tw.out[i, j](2.0 * X[i, j])


def recorded(rng: np.random.Generator, target: str) -> Any:
    """A step of two head dimensions and a program that depend on none of each other, then of a
    program that reads what the first one writes; the calls with what is right; x, y and z."""
    from tilewright.runtime.cuda import DeviceArray

    calls = (
        on_gpu(rng, (4, 2, 128, "bfloat16"), [700, 0, 65, 3000]),
        on_gpu(rng, (3, 3, 80, "float16"), [1, 2000, 17]),
    )
    x, y, z = (DeviceArray.from_numpy(np.full((40, 128), n, np.float32)) for n in (3, 0, 0))
    kernel = scaled.schedule(lambda s: s.bind("i", "cta.x")).build(target)
    step = Step([*(bound for bound, _ in calls), kernel.bind(x, out=y), kernel.bind(y, out=z)])
    assert step.count == 2 and step.edges == ((2, 3),)
    return step, calls, (x, y, z)


@needs_nvrtc
def test_what_becomes_one_launch(rng, imagined):
    step, calls, _ = recorded(rng, "cuda:sm_90a")
    one, other = (bound for bound, _ in calls)
    first, last = step._launches(True)
    assert first.grid[0] == one.launch.grid[0] + other.launch.grid[0] + 40 and last.grid[0] == 40
    assert first.block == (decode.THREADS, 1, 1)
    assert first.smem_bytes == max(one.launch.smem_bytes, other.launch.smem_bytes)
    alone = Step([one])
    assert alone._launches(True) == [one.launch]  # not compiled again


@needs_nvrtc
def test_what_shares_no_launch(rng, imagined):
    """Three CTAs of an SM with two of another; a launch that has another one in front."""
    one, _ = on_gpu(rng, (4, 2, 128, "bfloat16"), [700, 65])
    small, _ = on_gpu(rng, (4, 2, 64, "bfloat16"), [700, 65])
    assert Step([one, small])._launches(True) == [one.launch, small.launch]
    part = replace(one.part, body=replace(one.part.body, alone=True))
    alone = SimpleNamespace(part=part, launch=one.launch, boxes=one.boxes)
    two, _ = on_gpu(rng, (4, 2, 128, "bfloat16"), [9])
    assert Step([alone, two])._launches(True) == [one.launch, two.launch]
    assert Step([one, two]).count == 1


STRUCTS = {decode.FAMILY: decode.params_struct, hopper.FAMILY: hopper.params_struct}
OF_A_PLAN = {"cuts", "items", "qo_indptr", "nodes"}  # arrays that nobody writes


@needs_nvrtc
@pytest.mark.parametrize("family", [decode.FAMILY, portable.FAMILY, portable.TILES, hopper.FAMILY])
def test_boxes_hold_what_a_body_names(rng, imagined, monkeypatch, family):
    """Every address of the parameters that a body reads or writes lies in a box of its call."""
    monkeypatch.setattr(families, "FAMILIES", (family,))
    monkeypatch.setattr(hopper, "tensor_map", lambda *_: [0] * 16)
    bound, _ = on_gpu(rng, (4, 2, 128, "bfloat16"), [700, 0, 65])
    part, spec = bound.part, bound._keep[-1].spec
    struct = STRUCTS.get(family, lambda spec: params_struct(spec, ITEMS))(spec)
    data = bytearray(part.params)
    fields = {f.name: f.in_buffer(data).value for f in struct.fields if not f.count}
    assert {"q", "k", "v", "kv_len", "table_entries"} <= {*part.body.reads}
    assert {"o", "lse"} <= {*part.body.writes} and not {*part.body.reads} & {*part.body.writes}
    for names, boxes in zip((part.body.reads, part.body.writes), bound.boxes, strict=True):
        for name in set(names) - OF_A_PLAN:
            at = fields[name]
            assert at == 0 or any(low <= at <= high for low, high in boxes), name
    if bound.launch.before is None:
        assert part.params is bound.launch.params and part.units == bound.launch.grid[0]


# ---------------------------------------------------------------------------- on a GPU


def check(bound: Any, wanted: Any) -> None:
    o = reference.as_float64(bound.state.o)
    size = np.linalg.norm(wanted.o, axis=-1)
    assert (np.linalg.norm(o - wanted.o, axis=-1) <= 1.2e-2 * size + 1e-6).all()
    np.testing.assert_allclose(bound.state.lse.to_numpy(), wanted.lse, rtol=2e-3, atol=4e-3)


@pytest.mark.gpu
def test_attention_and_a_program_in_one_launch(rng):
    """A replay reads what memory holds then."""
    step, calls, (x, y, z) = recorded(rng, "cuda")
    for factor in (3, 5):
        for bound, _ in calls:
            bound.state.o.copy_from(np.full(bound.state.o.shape, 0x7FFF, np.uint16))
        x.copy_from(np.full((40, 128), factor, np.float32))
        step()
        for bound, wanted in calls:
            check(bound, wanted)
        assert (y.to_numpy() == 2 * factor).all() and (z.to_numpy() == 4 * factor).all()
