"""Statements that share tiles, as in flash attention, and tile operations of a user's."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.compiler import cta
from tests.compiler.cases import executed
from tests.compiler.interpreter import execute

import tilewright as tw
from tilewright import dtypes
from tilewright.errors import ScheduleError
from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import map_bodies, rebuild, walk
from tilewright.ops.gemm import gemm_program
from tilewright.target import target
from tilewright.toolchain import nvrtc

LESSON = runpy.run_path(
    str(Path(__file__).resolve().parents[2] / "examples" / "09_flash_attention.py"),
    run_name="lesson",
)
TILES = {"rows": 32, "warps": 2, "keys": 32}


def flash(group: int, causal: bool, heads: int, d: int, dtype="bfloat16", **tiles: int) -> Any:
    typed = LESSON["attention"](group, causal).typed(Q=dtype, K=dtype, V=dtype)
    return typed.schedule(lambda s: LESSON["tiles"](s, heads, group, d, **TILES | tiles))


def operands(m: int, n: int, heads: int, group: int, d: int, large: float = 1.0) -> dict[str, Any]:
    """bfloat16 bits of Q, K and V."""
    rng = np.random.default_rng(m * 1000 + n)
    shapes = {"Q": (m, heads, d), "K": (n, heads // group, d), "V": (n, heads // group, d)}
    numbers = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    numbers["Q"] *= large
    bits = {x: dtypes.bfloat16_bits(v).reshape(v.shape) for x, v in numbers.items()}
    return {**bits, "scale": np.float32(d**-0.5)}


def expected(a: dict[str, Any], causal: bool) -> np.ndarray:
    """The definition in float64."""
    Q, K, V = (dtypes.bfloat16_values(a[x]).astype(np.float64) for x in "QKV")
    group, (m, n) = Q.shape[1] // K.shape[1], (len(Q), len(K))
    s = np.einsum("ihd,jhd->hij", Q, np.repeat(K, group, 1)) * float(a["scale"])
    if causal:
        s[:, np.arange(n) - n > np.arange(m)[:, None] - m] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), np.repeat(V, group, 1))


def run(definition: Any, kind: str, args: dict[str, Any], machine: Any) -> np.ndarray:
    got = executed(definition, definition.lower(target(kind)), args, machine)["out"]
    return dtypes.bfloat16_values(got) if got.dtype == np.uint16 else got


# Lengths that are no multiples of tiles, one row, one key; heads that share keys, or not; a decode.
SHAPES = {
    "33 × 50, group 4": (33, 50, 4, 4, {}),
    "70 × 70, 4 warps of 32 rows": (70, 70, 1, 1, {"rows": 128, "warps": 4, "keys": 64}),
    "1 × 1": (1, 1, 2, 1, {"stages": 3}),
    "1 × 90, group 2": (1, 90, 2, 2, {"keys": 16}),
}


@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("name", SHAPES)
def test_flash_attention_is_right_on_a_cta(name, causal):
    m, n, heads, group, tiles = SHAPES[name]
    args = operands(m, n, heads, group, 32)
    got = run(flash(group, causal, heads, 32, **tiles), "cuda", args, cta.execute)
    np.testing.assert_allclose(got, expected(args, causal), rtol=0.02, atol=0.02)


def test_one_thread_computes_the_same_with_large_scores():
    args = operands(20, 40, 2, 2, 16, large=40.0)  # weights of most keys vanish
    for kind in ("cpp", "interp"):
        got = run(flash(2, True, 2, 16), kind, args, execute)
        np.testing.assert_allclose(got, expected(args, True), rtol=0.02, atol=0.02)


def test_keys_that_no_row_of_a_block_sees_are_not_read():
    args = operands(64, 64, 1, 1, 16)
    wanted = expected(args, True)
    args["K"][32:], args["V"][32:] = 0x7FC0, 0x7FC0  # NaN
    got = run(flash(1, True, 1, 16, rows=32), "cuda", args, cta.execute)
    np.testing.assert_allclose(got[:32], wanted[:32], rtol=0.02, atol=0.02)


def test_a_window_begins_late_and_ends_early():
    @tw.program
    def window(X=tw.dense("m n"), V=tw.dense("n")):
        i, j = tw.indices("i:m j:n")
        seen = (j <= i + 2) & (i - j < 5)
        return tw.out[i](tw.sum(tw.where(seen, X[i, j] * V[j], 0.0), over=j))

    lowered = window.lower(target("cpp"))
    loop = next(x for n in lowered.stages[0] for x in walk(n.body) if getattr(x, "name", "") == "j")
    assert str(loop.begin) == "max(0, 0 - (5 - i + -1))"
    assert str(loop.end) == "min(n.size, i + 3)"
    X, V = np.random.default_rng(0).standard_normal((2, 20, 30)).astype(np.float32)
    V = V[0].copy()
    got = executed(window, lowered, {"X": X, "V": V})["out"]
    i, j = np.indices(X.shape)
    np.testing.assert_allclose(
        got, np.where((j <= i + 2) & (i - j < 5), X * V, 0).sum(1), rtol=1e-5
    )


def _without(s: Any, kind: type, inside: bool = False) -> Any:
    """A statement without those of a kind in the loop over keys."""
    inside = inside or getattr(s, "name", "") == "j_o"
    if isinstance(s, kind) and inside:
        return ir.seq()
    return rebuild(s, lambda x: _without(x, kind, inside))


@pytest.mark.parametrize("kind", (ir.Sync, ir.Wait), ids=("barrier", "wait"))
def test_a_dropped_barrier_or_wait_is_reported(kind):
    definition, args = flash(1, False, 1, 16, rows=32), operands(32, 96, 1, 1, 16)
    lowered = definition.lower(target("cuda"))
    program = map_bodies(lowered, lambda body: _without(body, kind))
    assert program != lowered
    with pytest.raises(cta.Refused):
        executed(definition, program, args, cta.execute)


def sum_of_products(nested: bool = False) -> Any:
    @tw.program
    def product_of_sums(A=tw.dense("m k"), B=tw.dense("n k"), w=tw.dense("n")):
        i, j, k = tw.indices("i:m j:n k:k")
        s = tw.temp.named("s")[i, j](tw.sum(A[i, k] * B[j, k], over=k))
        factor = tw.sum(B[j, k], over=k) if nested else w[j]
        return tw.out[i](tw.sum(s[i, j] * factor, over=j) + 1.0)

    def recipe(s):
        s = s.compute_at("s", "j").split("i", 16, into=("i_o", "i_v"))
        s = s.split("j", 16, into=("j_o", "j_v")).split("k", 16, into=("k_o", "k_v"))
        return s.reorder("i_o", "j_o", "i_v", "j_v").mma("i_v", "j_v", "k_v").bind("i_o", "cta.x")

    return product_of_sums.typed(A="float16", B="float16").schedule(recipe)


@pytest.mark.parametrize("shape", ((16, 16, 16), (33, 50, 20), (1, 1, 1), (5, 0, 3)))
def test_a_value_of_each_row_is_stored_once(shape):
    """The tiles' columns are summed up; a second store would be a race on the CTA."""
    m, n, k = shape
    rng, definition = np.random.default_rng(m), sum_of_products()
    A, B = (rng.standard_normal(s).astype(np.float16) for s in ((m, k), (n, k)))
    args = {"A": A, "B": B, "w": rng.standard_normal(n).astype(np.float32)}
    wanted = A.astype(float) @ B.astype(float).T @ args["w"] + 1
    for kind, machine in (("cuda", cta.execute), ("cpp", execute)):
        got = executed(definition, definition.lower(target(kind)), args, machine)["out"]
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3)


def test_other_statements_on_shared_tiles_are_refused():
    with pytest.raises(
        ScheduleError, match=r"S102.*shares the loops of a tile and has other loops"
    ):
        sum_of_products(nested=True).lower(target("cuda"))


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize(("arch", "warps"), (("sm_80", 8), ("sm_90a", 4)))
def test_flash_attention_has_no_spills(arch, warps):
    kernel = flash(4, True, 32, 128, rows=128, warps=warps, keys=32).build(f"cuda:{arch}")
    (found,) = kernel.resources.values()
    assert found.spill_bytes == 0 and found.registers <= 255


# ---------------------------------------------------------------------------- an atom of a user's

HALF_SUMS = tw.Atom(
    "half_sums", (16, 8, 16), ("float16",),
    cuda="""// Sums of 16 products in float16, twice as fast as in float32 on some GPUs.
using sums = tw::fragment<8>;
TW_INLINE void half_sums(sums& acc, const tw::fragment_a& a, const tw::fragment_b<8>& b) {
  uint32_t d[2];
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
      "{%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %8};"
      : "=r"(d[0]), "=r"(d[1])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]), "r"(0));
  for (int i = 0; i < 4; ++i) acc.v[0][i] += tw::from_float16(uint16_t(d[i / 2] >> i % 2 * 16));
}""",
    cpp="""template <class A, class B>
TW_INLINE void half_sums(float* acc, tw::window<A> a, tw::window<B> b) {
  float sum[16 * 8] = {};
  tw::mma<tw::float16_bits, 16, 8, 16>(sum, a, b);
  for (int i = 0; i < 16 * 8; ++i) acc[i] += tw::from_float16(tw::to_float16(sum[i]));
}""",
    numpy=lambda a, b: (a @ b).astype(np.float16).astype(np.float32),
)  # fmt: skip


def half_sums_product(atom: Any = HALF_SUMS) -> Any:
    def recipe(s):
        for loop, n in (("i", 16), ("j", 8), ("k", 16)):
            s = s.split(loop, n, into=(f"{loop}_u", f"{loop}_v"))
        s = s.reorder("i_u", "j_u", "k_u", "i_v", "j_v", "k_v")
        return s.mma("i_v", "j_v", "k_v", atom).bind("i_u", "cta.x").bind("j_u", "cta.y")

    return gemm_program.typed(A="float16", B="float16").schedule(recipe)


def test_an_atom_of_a_user_is_what_every_target_computes():
    rng, definition = np.random.default_rng(5), half_sums_product()
    A, B = (8 * rng.standard_normal(s).astype(np.float16) for s in ((33, 50), (50, 20)))
    steps = (A[:, k : k + 16].astype(np.float64) @ B[k : k + 16] for k in range(0, 50, 16))
    wanted = sum(x.astype(np.float16).astype(np.float64) for x in steps)
    assert np.abs(wanted - A.astype(np.float64) @ B).max() > 0.05  # the rounding is seen
    got = [definition.build("cpp")(A, B)]
    for kind, machine in (("cuda", cta.execute), ("cpp", execute)):
        lowered = definition.lower(target(kind))
        got.append(executed(definition, lowered, {"A": A, "B": B}, machine)["out"])
    for x in got:
        np.testing.assert_allclose(x, wanted, rtol=1e-3, atol=1e-3)
    if nvrtc.available():
        assert "half_sums(" in definition.build("cuda:sm_80").source


@pytest.mark.parametrize(
    ("change", "why"),
    (({"shape": (16, 8, 8)}, "no tile operation is"), ({"operands": ("bfloat16",)}, "not float16")),
    ids=("shape", "operands"),
)
def test_an_atom_for_other_tiles_is_refused(change, why):
    with pytest.raises(ScheduleError, match=f"S102.*{why}"):
        half_sums_product(replace(HALF_SUMS, **change)).lower(target("cuda"))


def test_only_atoms_are_taken():
    with pytest.raises(ScheduleError, match=r"S102.*not a tw\.Atom"):
        half_sums_product("half_sums").lower(target("cuda"))
