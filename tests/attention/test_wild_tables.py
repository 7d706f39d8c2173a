"""Tables whose arrays change in memory after a cache was made of them: whatever they hold then,
kernels read nothing outside of the pool, on CPUs and, simulated, on GPUs."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.attention import oracle, simulated
from tests.attention import test_decode_simulated as decodes
from tests.attention import test_hopper_simulated as hoppers
from tests.attention.test_cascade import cascade
from tests.attention.test_flash_tiles import simulated_result
from tests.attention.test_mutants import reported
from tests.attention.test_row_hooks import portable_result

import tilewright as tw
from tilewright.attention.families import hopper
from tilewright.toolchain import compilers

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
LIBC = ctypes.CDLL(None, use_errno=True)
FORMS = ["csr", "csr int64", "padded", "rows"]
POSITIONS = {"usual": (), "keys": ("qo_base", "kv_base", "kv_stride")}


def guarded(array: np.ndarray, kept: list[Any]) -> np.ndarray:
    """A copy that ends where memory ends: whoever reads behind it, or a page before it, dies."""
    page, size = mmap.PAGESIZE, -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + 2 * page)
    whole = np.frombuffer(memory, np.uint8)
    for at in (0, page + size):
        address = ctypes.c_void_p(whole.ctypes.data + at)
        assert LIBC.mprotect(address, ctypes.c_size_t(page), 0) == 0  # PROT_NONE
    copy = whole[page + size - array.nbytes : page + size].view(array.dtype).reshape(array.shape)
    copy[...] = array
    kept.append(memory)
    return copy


def make_wild(rng: np.random.Generator, table: tw.Table) -> None:
    """Any numbers in each array: around 0, around the ends of its type, and those that it has."""
    for array in table.arrays.values():
        info = np.iinfo(array.dtype)
        numbers = [info.min, info.min + 1, -1, 0, 1, 7, 300, 2**30, info.max - 1, info.max]
        wild = rng.random(array.shape) < 0.7
        array[wild] = rng.choice(np.array(numbers, array.dtype), int(wild.sum()))


def on_cpu(case: oracle.Case, rng: np.random.Generator) -> None:
    attn, table = oracle.attention_of(case), oracle.table_of(case)
    kv = tw.KV(table, tw.Pool(case.k, case.v))
    plan = attn.plan(case.qo_indptr, kv, q_dtype=case.q.dtype.name)
    bound = attn.bind(case.q, kv, plan=plan, **oracle.arrays_of(case))
    for _ in range(20):
        make_wild(rng, table)
        bound()


WAYS = {
    "cpu": on_cpu,
    "tiles": lambda case, rng: simulated_result(case, 1),
    "portable": lambda case, rng: portable_result(case, 1),
    "decode": lambda case, rng: decodes.prepared(case, 3),
    "hopper": lambda case, rng: hoppers.prepared(case, 8, 3),
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_outside_of_the_pool_is_read(way, positions, rng, monkeypatch):
    kept: list[Any] = []
    counts, lengths = ([3, 0, 1] if way == "decode" else [40, 1, 9]), [130, 5, 300]
    form = str(rng.choice(FORMS))
    shape = (4, 2, 128, ml_dtypes.bfloat16, "window", "scores", "")
    case = cascade(rng, shape, counts, [], lengths, 8, form)
    case = replace(case, k=guarded(case.k, kept), v=guarded(case.v, kept))
    first = {"qo_base": 7, "kv_base": 3, "kv_stride": 1}
    named = {n: np.full(3, first[n], np.int32) for n in POSITIONS[positions]}
    case, real = replace(case, positions=named), simulated.arguments

    def arguments(case: oracle.Case, attn: Any, kv: tw.KV, *args: Any) -> Any:
        found = real(case, attn, kv, *args)
        make_wild(rng, kv.table)
        return found

    monkeypatch.setattr(simulated, "arguments", arguments)
    monkeypatch.setattr(hopper, "tensor_map", hoppers.tensor_map)
    monkeypatch.setattr(oracle, "compare", lambda *args: None)  # results are those of wild numbers

    def run(seed: int) -> None:
        call = WAYS[way](case, rng)
        if way == "decode":
            call.launch(call.body, call.ctas, seed)
        elif way == "hopper":
            call.launch(seed)

    assert reported(run, "") == ""


def test_memory_ends_behind_the_pool(rng):
    """What the test above rests on."""
    kept: list[Any] = []
    row = guarded(rng.standard_normal(10).astype(np.float32), kept)
    behind = ctypes.c_float.from_address(row.ctypes.data + row.nbytes)

    def read(seed: int) -> None:
        faulthandler.disable()  # it would print where
        print(behind.value)

    assert reported(read, "").startswith("signal")
