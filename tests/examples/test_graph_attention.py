"""Graph attention against float64: shapes, formats, dtypes, rows of any length, refusals."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
from tests.compiler import cases, cta
from tests.shipped import lesson

import tilewright as tw
from tilewright import knobs
from tilewright.lower import AFTER_SCHEDULE, run_passes
from tilewright.toolchain import nvrtc

module = lesson("06_graph_attention.py")


def graph(rng: np.random.Generator, m: int, n: int, density: float = 0.3) -> tuple[Any, ...]:
    """A CSR matrix with empty rows, and a row that is full."""
    stored = rng.random((m, n)) < density
    stored[::5], stored[1 % m :: 7] = False, True
    indptr = np.concatenate([[0], np.cumsum(stored.sum(1))]).astype(np.int32)
    indices = np.nonzero(stored)[1].astype(np.int32)
    return indptr, indices, rng.uniform(-1.5, 1.5, len(indices)).astype(np.float32), (m, n)


def expected(matrix: Any, q: Any, k: Any, v: Any, scale: float) -> np.ndarray:
    indptr, indices, values, _ = matrix
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for i in range(len(q)):
        j, a = indices[indptr[i] : indptr[i + 1]], values[indptr[i] : indptr[i + 1]]
        if len(j):
            s = scale * a[:, None].astype(np.float64) * np.einsum("hk,jhk->jh", q[i], k[j])
            w = np.exp(s - s.max(0))
            out[i] = np.einsum("jh,jhc->hc", w / w.sum(0), v[j])
    return out


def operands(rng: np.random.Generator, m: int, n: int, h: int, d: int, v: int) -> list[np.ndarray]:
    return [rng.standard_normal(s).astype(np.float32) for s in ((m, h, d), (n, h, d), (n, h, v))]


@pytest.mark.parametrize(
    ("m", "n", "h", "d", "v"),
    [(37, 29, 2, 64, 64), (37, 29, 1, 20, 7), (1, 40, 3, 16, 48), (23, 1, 1, 1, 1)],
)
def test_shapes(rng, m, n, h, d, v):
    matrix, (q, k, w) = graph(rng, m, n), operands(rng, m, n, h, d, v)
    out = np.full((m, h, v), np.nan, np.float32)
    A = module.pack_for_graph_attention(matrix)
    assert module.graph_attention(A, q, k, w, out=out) is out
    np.testing.assert_allclose(out, expected(matrix, q, k, w, d**-0.5), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "fmt", [tw.csr(), tw.dcsr(), tw.ell(29), tw.hyb(buckets=(4, 8, 16)), module.by_row(8)], ids=str
)
def test_formats(rng, fmt):
    matrix, (q, k, v) = graph(rng, 37, 29), operands(rng, 37, 29, 2, 16, 16)
    got = module.graph_attention(fmt.pack(matrix), q, k, v, scale=2.0)
    np.testing.assert_allclose(got, expected(matrix, q, k, v, 2.0), rtol=2e-5, atol=5e-6)


def test_a_row_of_100_000_entries(rng):
    n = 100_000
    indptr = np.array([0, 3, n + 3, n + 3], np.int32)
    indices = np.concatenate([[1, 5, 9], np.arange(n)]).astype(np.int32)
    matrix = indptr, indices, np.ones(n + 3, np.float32), (3, n)
    q, k, v = operands(rng, 3, n, 1, 16, 16)
    got = module.graph_attention(module.pack_for_graph_attention(matrix), q, k, v)
    np.testing.assert_allclose(got, expected(matrix, q, k, v, 0.25), rtol=1e-4, atol=1e-6)


def test_large_scores_do_not_overflow(rng):
    matrix, (q, k, v) = graph(rng, 12, 11), operands(rng, 12, 11, 1, 16, 16)
    got = module.graph_attention(module.pack_for_graph_attention(matrix), q, k, v, scale=1e4)
    np.testing.assert_allclose(got, expected(matrix, q, k, v, 1e4), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float16", 4e-3)])
def test_dtypes(rng, dtype, tolerance):
    matrix, qkv = graph(rng, 12, 11), operands(rng, 12, 11, 2, 32, 16)
    q, k, v = (x.astype(dtype) for x in qkv)
    A = module.pack_for_graph_attention(matrix, dtype="float64" if dtype == "float64" else None)
    got = module.graph_attention(A, q, k, v, scale=0.5)
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_allclose(got, expected(matrix, q, k, v, 0.5), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("fmt", "sizes"),
    [(module.by_row(4), (2, 8, 8)), (module.by_row(4), (1, 3, 5)), (tw.csr(), (1, 12, 20))],
    ids=str,
)
def test_the_gpu_schedule_on_threads_of_the_interpreter(rng, fmt, sizes):
    """Meaning after every pass, and no race."""
    definition = module.graph_attention_definition(fmt, ("float32",) * 4, sizes)
    recipe, definition = definition.recipe, dataclasses.replace(definition, recipe=None)
    h, d, v = sizes
    args = cases.arguments(definition, rng, m=4, n=7, h=h, d=d, v=v)
    with knobs.scope(verify=True):
        cases.after_every_pass(definition, args, recipe, "cuda:sm_90a")


def gpu_rows(s: Any, kept: int = 272) -> Any:
    """Graph attention with rows in shared memory: the threads of the lesson's `gpu_recipe`, and the
    statements of a row one after the other: scores, maximum, weights, their sum, features.
    Slower than the lesson's on an H200 (docs/design/compiler.md)."""
    lanes, power = module.features(s)
    for t in module.TEMPORARIES:
        s = s.compute_at(t, "h", most=kept)
    s = s.order_axes("out", "i", "h", "j", "c").fuse("i", "h", into="row")
    for n in range(len(s.nests)):
        fmt, s = s.format_of(n), s.on(n)
        across = min(power, module.WARP)
        s, groups = module.bind_features(s, lanes, across), module.CTA // across
        if fmt.name == module.TALL:
            s = tall_rows(s, across, groups).bind("row", "cta.x")
            continue
        for t in module.TEMPORARIES[1:] if fmt.name != "bucket(0)" else ():
            s = s.split(f"{t}.j", across, into=(f"{t}_o", f"{t}_x")).bind(f"{t}_x", "thread.x")
        for t in ("score", "out") if fmt.name != "bucket(0)" else ():
            s = s.split(f"{t}.j", module.IN_FLIGHT, tail="cut", into=(f"{t}_o", f"{t}_u")).unroll(
                f"{t}_u"
            )
        s = s.split("row", groups, into=("row_cta", "row_y"))
        s = s.bind("row_cta", "cta.x").bind("row_y", "thread.y")
    return s.everywhere()


def tall_rows(s: Any, across: int, groups: int) -> Any:
    """The entries of a row on all threads of a CTA, those of scores and features by groups."""
    for t in module.TEMPORARIES[1:]:
        s = s.split(f"{t}.j", module.CTA, into=(f"{t}_o", f"{t}_r"))
        s = s.split(f"{t}_r", across, into=(f"{t}_y", f"{t}_x"))
        s = s.bind(f"{t}_y", "thread.y").bind(f"{t}_x", "thread.x")
    for t in "score", "out":
        s = s.split(f"{t}.j", module.IN_FLIGHT * groups, tail="cut", into=(f"{t}_o", f"{t}_r"))
        s = s.split(f"{t}_r", groups, into=(f"{t}_u", f"{t}_y")).unroll(f"{t}_u")
        s = s.split(f"{t}.j_t", groups, into=(f"{t}_w", f"{t}_y")).bind(f"{t}_y", "thread.y")
    return s


@pytest.mark.parametrize(
    ("fmt", "sizes", "kept"),
    [
        (module.by_row(8), (2, 8, 8), 4),
        (module.by_row(8), (1, 3, 5), 64),
        (tw.csr(), (1, 12, 4), 3),
    ],
    ids=str,
)
def test_rows_in_shared_memory_on_threads_of_the_interpreter(rng, fmt, sizes, kept):
    """Against float64, without a race: rows that are empty, that fit, and that are longer."""
    definition = module.graph_attention_definition(
        fmt, ("float32",) * 4, sizes, on_gpu=partial(gpu_rows, kept=kept)
    )
    matrix, (q, k, v) = graph(rng, 8, 23), operands(rng, 8, 23, *sizes)
    args = {"A": fmt.pack(matrix), "Q": q, "K": k, "V": v, "scale": 0.5}
    with knobs.scope(verify=True):
        scheduled = definition.scheduled("cuda:sm_90a").lowered.program
        program = run_passes(scheduled, AFTER_SCHEDULE, "cuda")
    got = cases.executed(definition, program, args, cta.execute)["out"]
    wanted = expected(matrix, q, k, v, 0.5)
    np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_the_gpu_kernel_has_one_launch_and_no_spills():
    for recipe in module.gpu_recipe, gpu_rows:
        definition = module.graph_attention_definition(
            module.by_row(), ("float32",) * 4, (1, 64, 64), on_gpu=recipe
        )
        kernel = definition.build("cuda:sm_90a")
        assert [s.entry for s in kernel.manifest.stages] == ["stage0"]
        assert kernel.resources["stage0"].spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "d", "v"), [(1, 64, 64), (8, 32, 48), (3, 20, 8)])
def test_rows_in_shared_memory_on_a_gpu(rng, h, d, v):
    import torch

    matrix, (q, k, w) = graph(rng, 700, 900), operands(rng, 700, 900, h, d, v)
    types = ("float32",) * 4
    definition = module.graph_attention_definition(
        module.by_row(), types, (h, d, v), on_gpu=gpu_rows
    )
    given = (torch.from_numpy(x).cuda() for x in (q, k, w))
    got = definition.build("cuda")(module.by_row().pack(matrix).to("cuda"), *given, d**-0.5)
    wanted = expected(matrix, q, k, w, d**-0.5)
    np.testing.assert_allclose(got.cpu().numpy(), wanted, rtol=2e-5, atol=5e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "d", "v"), [(1, 64, 64), (8, 32, 48), (3, 20, 7)])
def test_on_a_gpu(rng, h, d, v):
    import torch

    matrix, (q, k, w) = graph(rng, 700, 900), operands(rng, 700, 900, h, d, v)
    A = module.pack_for_graph_attention(matrix, "cuda")
    assert max(np.diff(matrix[0])) > module.LONG
    got = module.graph_attention(A, *(torch.from_numpy(x).cuda() for x in (q, k, w)))
    wanted = expected(matrix, q, k, w, d**-0.5)
    np.testing.assert_allclose(got.cpu().numpy(), wanted, rtol=2e-5, atol=5e-6)


def test_refusals(rng):
    matrix, (q, k, v) = graph(rng, 12, 11), operands(rng, 12, 11, 2, 16, 16)
    A = module.pack_for_graph_attention(matrix)
    for bad, code, word in (
        ((matrix, q, k, v), "A106", "tuple"),
        ((tw.coo().pack(matrix), q, k, v), "A106", "coo"),
        ((A, q[:, 0], k, v), "A103", "Q has shape (12, 16)"),
        ((A, q, k[:, :1], v), "A103", "K"),
        ((A, q, k, v[:5]), "A103", "V"),
        ((A, q.astype(bool), k, v), "A102", "Q"),
    ):
        with pytest.raises(tw.TilewrightError) as error:
            module.graph_attention(*bad)
        assert error.value.code == code and word in str(error.value), error.value
