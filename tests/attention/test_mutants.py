"""Every step of the hand-written kernels by which threads synchronise, and every guard by the
number of a thread, left out one at a time: the simulation reports each of these mutants, by a race,
by threads that wait for others, or by a wrong result; and it reports nothing of the kernels as they
are. Of each family a few mutants run; all of them with `--all-mutants`."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.attention import oracle, simulated
from tests.attention import test_decode_simulated as decodes
from tests.attention import test_hopper_simulated as hoppers
from tests.attention.test_cascade import cascade, close
from tests.attention.test_flash_tiles import simulated_result as tiles_result
from tests.attention.test_row_hooks import portable_result
from tests.runtime.test_cuda import fake  # noqa: F401 - a fixture
from tests.serve import test_sampler_gpu as samplers

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import merge, planner, ranges, select
from tilewright.attention import plan as plans
from tilewright.attention.families import hopper
from tilewright.attention.spec import Spec, alone
from tilewright.attention.table import TableForm
from tilewright.toolchain import compilers

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
Run = Callable[[int], None]  # launches and checks, by a seed


def generator() -> np.random.Generator:
    return np.random.default_rng(20261130)


MIRRORED = (
    {"key": lambda self, k, at: k[at.dim] + 0.5 * k[79 - at.dim]},
    {"key": lambda x, t: x + 0.5 * x[:, ::-1]},
    {},
)  # a hook of keys of 80 elements that reads what other lanes write


def hooked(case: oracle.Case, rows: str) -> oracle.Case:
    sizes = len(case.qo_indptr) - 1, len(case.q), 3000
    values = oracle.draw_row_values(generator(), oracle.ROWS[rows][2], case.heads, sizes)
    return replace(case, rows=rows, narrow=True, values=case.values | values)


# ---------------------------------------------------------------------------- decode


def decode(
    shape: Any, counts: Any, shared: Any, lengths: Any, workers: int, *,
    rows: str = "", dim_vo: int = 0, page_size: int = 16, cost: int = 0,
) -> Run:  # fmt: skip
    def run(seed: int) -> None:
        case = cascade(generator(), shape, counts, shared, lengths, page_size)
        case = replace(case, v=case.v[..., : dim_vo or shape[2]])
        case = hooked(case, rows) if rows else case
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranges, "APART_COST", cost)
            o, lse, plan = decodes.result(case, workers, seed)
        assert bool(shared) == bool(plan.nodes["chunks"].any())
        close(case, o, lse)

    return run


# ---------------------------------------------------------------------------- other families


def tiles(
    shape: Any, counts: Any, shared: Any, lengths: Any, rows: str = "", page_size: int = 7
) -> Run:
    def run(seed: int) -> None:
        case = cascade(generator(), shape, counts, shared, lengths, page_size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(oracle.ROWS, "mirrored", MIRRORED)
            case = hooked(case, rows) if rows else case
            close(case, *tiles_result(case, seed))

    return run


def portable(shape: Any, counts: Any, lengths: Any, rows: str) -> Run:
    def run(seed: int) -> None:
        case = cascade(generator(), shape, counts, [], lengths, 7)
        case = replace(hooked(case, rows), narrow=False) if rows else case
        portable_result(case, seed)

    return run


def prefill(
    shape: Any, counts: Any, lengths: Any, page_size: int, workers: int, dtype: Any = F32,
    segment: int = 0, chunk_tiles: int = 0, form: str = "csr",
) -> Run:  # fmt: skip
    """`segment`: tiles that the scheduler sorts at once; `chunk_tiles`: the fewest of a chunk."""

    def run(seed: int) -> None:
        case = cascade(generator(), shape, counts, [], lengths, page_size, form)
        if form == "ragged":  # keys lie one behind the other
            case = replace(case, kv_indices=np.arange(len(case.kv_indices), dtype=np.int32))
            oracle.fill(generator(), case)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper, "tensor_map", hoppers.tensor_map)
            patch.setattr(plans, "_BATCH_CHUNK_TILES", chunk_tiles or plans._BATCH_CHUNK_TILES)
            if segment:
                short = replace(hopper.TILES[128, 128], segment=segment)
                patch.setitem(hopper.TILES, (128, 128), short)
            hopper.tiles_of.cache_clear()
            hopper.body.cache_clear()
            call = hoppers.prepared(case, page_size, workers, dtype)
            call.launch(seed)
        hopper.tiles_of.cache_clear()
        hopper.body.cache_clear()
        assert not chunk_tiles or call.plan.slots
        close(case, call.o.astype(np.float64), call.lse)

    return run


def in_front(shape: Any, counts: Any, shared: Any, lengths: Any, workers: int) -> Run:
    """Shared keys by the Hopper kernel, in front of the decode kernel that adds their states."""

    def run(seed: int) -> None:
        case = cascade(generator(), shape, counts, shared, lengths)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranges, "APART_COST", -(1 << 30))
            patch.setattr(hopper, "tensor_map", hoppers.tensor_map)
            patch.setattr(decodes, "BLOCK", 128 // shape[0])
            call = decodes.prepared(case, workers)
            attn, table = oracle.attention_of(case), oracle.table_of(case)
            kv, kind = tw.KV(table, tw.Pool(case.k, case.v)), dtypes.ALL[case.q.dtype.name]
            types = kind, kind, dtypes.float32
            spec = Spec(attn.group, *case.dims, *types, attn.variant.traced, table.form)
            numbers = simulated.arguments(case, attn, kv, len(case.q))[2]
            states = call.partials[-len(call.states) * (shape[2] + 8) :]
            arrivals, nodes = np.zeros(8, np.int32), call.plan.nodes.ctypes.data
            struct = hopper.params_struct(spec)
            padding = {f.name: [0] * f.count for f in struct.fields if f.name == "padding"}
            block = bytes(struct.pack(
                **numbers, **hopper.maps(spec, numbers, len(case.q)), **padding, nodes=nodes,
                **dict.fromkeys((*hopper._LISTS, "cycles"), 0), partials=states.ctypes.data,
                qo_indptr=call.plan.qo_indptr.ctypes.data, counter=arrivals.ctypes.data,
                counters=arrivals.ctypes.data + 8, page_shift=4, ctas=workers,
            ))  # fmt: skip
            room = np.zeros(len(block) + 64, np.uint8)
            at = -room.ctypes.data % 64
            room[at : at + len(block)] = np.frombuffer(block, np.uint8)
            body = hopper.body(spec, hopper.box_keys(spec, 16), True)
            simulated.launch(simulated.kernel(alone(body)), room.ctypes.data + at, body.threads,
                             workers, seed, (states, arrivals))  # fmt: skip
        assert call.plan.nodes["chunks"].any()
        assert not np.isnan(call.states).any() and not arrivals.any()
        call.launch(call.body, call.ctas, seed)
        close(case, call.o, call.lse)

    return run


def sampled(seed: int) -> None:
    """Tokens of rows that a GPU samples; needs the fake driver."""
    samplers.check(np.random.default_rng(5), (6, 5003), "float32", 2, False)


def chosen(width: int, pages: int, heads: int = 2) -> Run:
    """Pages by their scores: those that NumPy chooses."""

    def run(seed: int) -> None:
        rng = generator()
        lengths = np.array([0, 1, 16 * width, 16 * width - 5, 16 * (width // 2) + 1], np.int32)
        scores = rng.integers(-40, 40, (len(lengths), heads, width)).astype(F32) / 7
        table = rng.permutation(len(lengths) * width).astype(np.int32).reshape(-1, width)
        kept, entries = (
            np.full(len(lengths), -7, np.int32),
            np.full((*scores.shape[:2], pages), -7, np.int32),
        )
        block = select.PARAMS.pack(
            scores=scores.ctypes.data, kv_len=lengths.ctypes.data, table_entries=table.ctypes.data,
            chosen_len=kept.ctypes.data, chosen=entries.ctypes.data, width=width, pages=pages,
            page_size=16, heads=heads,
        )  # fmt: skip
        body = select.body()
        simulated.launch(simulated.kernel(alone(body)), block, body.threads, len(lengths) * heads,
                         seed, (kept, entries))  # fmt: skip
        for r, head in np.ndindex(len(lengths), heads):
            last = -(-int(lengths[r]) // 16) - 1
            best = np.argsort(-scores[r, head, : max(last, 0)], kind="stable")[: pages - 1]
            wanted = table[r, [*np.sort(best), *[last] * (last >= 0)]]
            np.testing.assert_array_equal(entries[r, head, : len(wanted)], wanted)
            assert kept[r] == lengths[r] - 16 * max(last + 1 - pages, 0)

    return run


def merged(count: int, dim: int) -> Run:
    """States that become one, written over the first of them; some rows see nothing."""

    def run(seed: int) -> None:
        rng, rows = generator(), 9
        o, lse = (
            rng.standard_normal((count, rows, dim)).astype(F32),
            rng.standard_normal((count, rows)).astype(F32),
        )
        lse[rng.random((count, rows)) < 0.3] = -np.inf
        lse[:, 2] = -np.inf
        o[lse == -np.inf] = np.nan
        weights = np.exp(lse.astype(np.float64))
        total = weights.sum(0)
        sums = (
            np.where(lse[..., None] == -np.inf, 0, o.astype(np.float64)) * weights[..., None]
        ).sum(0)
        wanted = sums / np.where(total, total, 1)[:, None]
        used = [min(i, count - 1) for i in range(merge.MAX_STATES)]
        body = merge.body(dtypes.float32, dim)
        block = merge._params_struct(dtypes.float32).pack(
            **{f"o{i}": o[n].ctypes.data for i, n in enumerate(used)},
            **{f"lse{i}": lse[n].ctypes.data for i, n in enumerate(used)},
            out_o=o[0].ctypes.data, out_lse=lse[0].ctypes.data, mask=0, rows=rows, heads=1,
            states=count,
        )  # fmt: skip
        ctas = -(-rows // (body.threads // 32))
        simulated.launch(simulated.kernel(alone(body)), block, body.threads, ctas, seed, (o, lse))
        np.testing.assert_allclose(o[0], wanted, 1e-5, 1e-6)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(lse[0], np.log(total), 1e-5, 1e-6)

    return run


def cuts(depth: int, requests: int, most: int, workers: int, cost: int, wrong: bool = False) -> Run:
    """Cuts and nodes of the planner: those of the host. `wrong`: levels that do not divide."""

    def run(seed: int) -> None:
        rng, form = generator(), TableForm("int32", table_entries="", shared=depth)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranges, "APART_COST", cost)
            planner.body.cache_clear()
            shared = oracle.draw_levels(rng, requests, depth)
            if wrong:
                shared[0][-1] += 1
            count = requests + sum(len(x) - 1 for x in shared)
            keys = rng.integers(0, most, count).astype(np.int32)
            indptr = np.cumsum([0, *rng.integers(0, 4, requests)]).astype(np.int32)
            shape = decodes.shape_of_planner(tw.Causal())
            got, nodes, status = decodes.planned(form, shape, keys, indptr, shared, workers, seed)
            planner.body.cache_clear()
            if wrong:
                assert (
                    status == 2
                    and (got["node"] == count).all()
                    and not nodes["item"][-requests:].any()
                )
                return
            tree = tw.Table.dense(keys, shared=shared).tree(keys.astype(np.int64))
            plan = plans.make(indptr, keys.astype(np.int64), shape, workers, tree)
        assert not status
        np.testing.assert_array_equal(got[: len(plan.cuts)], plan.cuts)
        read = plan.nodes["begin"] < plan.nodes["end"]
        if depth:
            np.testing.assert_array_equal(nodes[read], plan.nodes[read])

    return run


# ---------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """The files of a family as a pattern; runs that come to each of their sites; and the mutants
    that no run reports, with the reason."""

    files: str
    runs: tuple[Run, ...]
    silent: dict[str, str] = field(default_factory=dict)


SAME = "all lanes of the warp store the value that one of them stores"
EXIT = "a CTA may end while copies are under way, to memory that nobody reads"
RELEASE = "the arrival behind it releases what __syncwarp has ordered in front of it"
HINT = "a prefetch"
BENCH = "text of a benchmark's builds: cycles, traces"
HOST = "rows with log-probabilities are the host's"
MASK = "rows with a mask are the host's; without one the other of these two is next to it"
EARLY = "it lets the next launch start early: nothing waits for it"
SOME = 4  # mutants of a family in `make test`
PLAIN = (4, 2, 128, BF16, "causal", "scores", "")
ALONE = (1, 1, 128, BF16, "causal", "scores", "")
PAIRS = (2, 1, 128, F16, "causal", "scores", "")
FAMILIES = {
    "decode": Family("decode|shared_items", (
        decode(PLAIN, [3, 0, 1], [], [130, 5, 400], 3),
        decode((7, 2, 80, F16, "window", "scores", "per head"), [1, 0, 2], [], [900, 33, 70], 12,
               page_size=1),
        decode((2, 1, 256, F16, "causal", "scores", "per head"), [1, 0, 4, 1], [],
               [330, 0, 70, 129], 2, page_size=7),
        decode((12, 1, 256, BF16, "causal", "scores", ""), [1, 1], [], [300, 64], 3, rows="ends"),
        decode(PLAIN, [3, 0, 1], [], [130, 5, 400], 3, rows="gated"),
        decode((4, 2, 80, BF16, "causal", "scores", ""), [2, 1, 1], [[0, 3]], [600, 30, 40, 5], 3,
               cost=-(1 << 30)),
    ), {
        "decode.cuh: __syncwarp()": "the wait for a tile's copies has one behind it",
        "decode.cuh: tw::copy_async_wait<0>()": EXIT,
    }),
    "tiles": Family("flash_tiles", (
        tiles(PLAIN, [70, 1, 0], [[0, 3]], [90, 170, 3, 40]),
        tiles((3, 2, 80, F16, "window", "scores", ""), [50, 1, 2], [], [170, 3, 40], "mirrored"),
        tiles((3, 2, 80, F16, "window", "scores", ""), [50, 1, 2], [], [170, 3, 40], "mixed"),
        tiles((1, 2, 64, F16, "full", "scores", ""), [70, 1], [], [300, 20], "gated"),
        tiles((3, 2, 80, F16, "causal", "scores", ""), [50, 1], [], [0, 3], "gated"),
    )),
    "portable": Family("flash_portable", (
        portable((3, 2, 40, F16, "window", "scores", ""), [3, 1, 0, 9], [70, 40, 5, 130], "mixed"),
        portable((12, 1, 40, F16, "causal", "scores", ""), [3, 1], [70, 40], "gated"),
    ), {
        "flash_portable.cuh: if (lane == 0)": SAME,
        "flash_portable.cuh: tw::bar_sync(BARRIER, THREADS) · 3":
            "the next rows have one between q and what is exchanged",
    }),
    "select": Family("select", (chosen(700, 90), chosen(40, 41), chosen(33, 1)), {
        "select.cuh: if (lane == 0)": SAME,
    }),
    "merge": Family("merge", (merged(3, 40),), {"merge.cuh: if (lane == 0)": SAME}),
    "planner": Family("plan_gpu", (
        cuts(3, 33, 900, 40, 3), cuts(0, 70, 300, 12, 3), cuts(2, 9, 200, 12, 3, wrong=True),
    ), {"plan_gpu.cuh: sync() · 2": "each level has one before sums are stored again"}),
    "hopper": Family("hopper|prefill_hopper", (
        prefill(PLAIN, [70, 1, 0, 40], [170, 3, 40, 300], 16, 3, BF16),
        prefill((3, 1, 128, F16, "window", "scores", "per head"), [90, 33], [300, 140], 1, 2),
        prefill((2, 1, 256, F16, "causal", "alibi", ""), [70, 40], [150, 40], 64, 2, F16),
        prefill(ALONE, [20], [700], 32, 3, BF16, chunk_tiles=2),
        prefill((1, 1, 128, BF16, "images", "scores", ""), [50, 140], [900, 300], 32, 1, BF16),
        prefill((8, 1, 128, F16, "window", "scores", "per head"), [1] * 6,
                [900, 33, 1, 50, 60, 70], 8, 1),
        prefill(ALONE, [8, 5, 1], [2100, 3, 260], 32, 6),
        prefill(PAIRS, [1, 3], [5003, 1200], 128, 1, segment=32),
        prefill(PAIRS, [1, 20, 30, 20, 20, 30], [50] * 6, 64, 1),
        prefill((*PAIRS[:3], BF16, *PAIRS[4:]), [90, 60], [300, 70], 1, 1, form="ragged"),
        prefill((1, 1, 128, BF16, "images", "scores", ""), [1, 90, 60], [40, 300, 200], 16, 1),
        in_front(PLAIN, [2, 1, 1], [[0, 3]], [600, 30, 40, 5], 3),
    ), {
        "hopper_load.cuh: __syncwarp()": "the arrivals at an item's end have one in front of them",
        "hopper_load.cuh: __syncwarp() · 3": "the scheduler has one before tiles are sorted",
        "hopper_load.cuh: if (lane == 0)": SAME,
        "hopper_load.cuh: if (lane == i && first + i < tiles)": SAME,
        "hopper_load.cuh: tw::copy_async_wait<0>()": EXIT,
        "hopper_narrow.cuh: __threadfence()": RELEASE,
        "hopper_narrow.cuh: if (lane < 4)": SAME,
        "hopper_narrow.cuh: if (lane == 0)": SAME,
        "hopper_narrow.cuh: if (lane == 0) · 4": SAME,
        "hopper_write.cuh: __threadfence()": RELEASE,
        "hopper_write.cuh: if (lane % 4 == 0)": SAME,
        "hopper_write.cuh: tw::fence_async() · 2":
            "reads are in front of it: what they read was fenced when it was written",
        "prefill_hopper.cuh: if (lane == 0) · 2": HINT,
        "prefill_hopper.cuh: if (cta != 0 || lane != 0)": BENCH,
        "prefill_hopper.cuh: if (thread == LOADER_GROUPS * 128)": BENCH,
    }),
    "sample": Family("sample", (sampled,), {
        "sample.h: team.sync()": MASK,
        "sample.h: team.sync() · 2": MASK,
        "sample.h: team.sync() · 5": HOST,
        "sample.h: team.sync() · 6": HOST,
        "sample.h: team.sync() · 7": HOST,
        "sample.h: team.sync() · 8": "the sum of weights has one behind their stores",
        "sample_gpu.cuh: if (lane == 0)": "all threads store 0, in front of a barrier",
        "sample_gpu.cuh: if (part_lane == 0)": SAME,
        "sample_gpu.cuh: tw::start_next_launch()": EARLY,
    }),
}  # fmt: skip


def reported(run: Run, site: str, seed: int = 1) -> str:
    """What a run says where a site is left out, or "": in a process of its own, which a mutant may
    end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        said = ""
        try:
            simulated.SITES.dropped = site
            run(seed)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"[:300]
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return said or (f"signal {status}" if status else "")


def reached(run: Run, seeds: Iterable[int] = range(3)) -> set[str]:
    """The sites that a run comes to. It reports nothing."""
    simulated.SITES.reached.clear()
    for seed in seeds:
        run(seed)
    return set(simulated.SITES.reached)


def sites_of(files: str) -> set[str]:
    texts = (
        p.read_text(encoding="utf-8") for folder in simulated.SOURCES for p in folder.iterdir()
    )
    names = simulated.marked("\n".join(texts))[1]
    return {name for name in names if re.match(rf"(?:{files})\w*\.\w+:", name)}


@pytest.mark.parametrize("name", FAMILIES)
def test_mutants_are_reported(name: str, request: pytest.FixtureRequest, rng: np.random.Generator):
    if name == "sample":
        request.getfixturevalue("fake")
    family, all_of_them = FAMILIES[name], request.config.getoption("all_mutants")
    sites, found, come = sites_of(family.files), dict[str, str](), set[str]()
    assert family.silent.keys() <= sites
    if not all_of_them:  # a few that the first run comes to
        first = sorted((reached(family.runs[0], range(1)) & sites) - family.silent.keys())
        sites = set(rng.permutation(first)[:SOME].tolist())
    for run in family.runs:
        there = reached(run) & sites if all_of_them else sites - found.keys()
        come |= there
        for site in sorted(there - found.keys()):
            if said := reported(run, site):
                found[site] = said
    for site, said in found.items():
        print(f"{site}: {said}")
    print(f"{name}: {len(found)} of {len(sites)}; not reached: {sorted(sites - come)}")
    silent = family.silent.keys() if all_of_them else set()
    assert sites - found.keys() == silent
