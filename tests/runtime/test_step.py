"""Recorded steps: what must follow what, which launches become one, and the checker of both."""

from __future__ import annotations

import ctypes
import gc
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tests.runtime.test_cuda import AXPY, fake  # noqa: F401 - a fixture

import tilewright as tw
from tilewright.ir.body import Body
from tilewright.runtime import cuda, step
from tilewright.runtime.driver import driver
from tilewright.runtime.step import Edge, Node, Part, Step, dependencies, hazards, levels
from tilewright.toolchain import nvrtc


def random_nodes(rng: np.random.Generator, count: int, cells: int) -> list[Node]:
    """Launches that read and write ranges of a few cells, empty ranges too."""

    def boxes(most: int) -> tuple[tuple[int, int], ...]:
        begins = rng.integers(0, cells, rng.integers(0, most + 1)).tolist()
        return tuple((b, b + int(rng.integers(0, 3))) for b in begins)

    return [Node(str(n), None, boxes(3), boxes(2)) for n in range(count)]


def cells_of(boxes: tuple[tuple[int, int], ...]) -> set[int]:
    return {cell for low, high in boxes for cell in range(low, high)}


def conflict(a: Node, b: Node) -> bool:
    """By the cells themselves, one by one."""
    reads, writes = cells_of(a.reads), cells_of(a.writes)
    return bool(writes & (cells_of(b.writes) | cells_of(b.reads)) or reads & cells_of(b.writes))


def reachable(count: int, edges: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """Every pair that a path of edges keeps in order."""
    paths = set(edges)
    for middle in range(count):
        into = [i for i, j in paths if j == middle]
        out = [j for i, j in paths if i == middle]
        paths |= set(itertools.product(into, out))
    return paths


def missing(nodes: Sequence[Node], edges: Iterable[Edge]) -> list[Edge]:
    """The hazards (i, j) that no path of edges keeps in order."""
    before = [1 << j for j in range(len(nodes))]
    for i, j in sorted(edges, key=lambda edge: edge[1]):
        before[j] |= before[i]
    return [(i, j) for i, j in np.argwhere(hazards(nodes)).tolist() if not before[j] >> i & 1]


@pytest.mark.parametrize("seed", range(40))
def test_dependencies_are_the_fewest_that_keep_every_hazard(seed: int):
    rng = np.random.default_rng(seed)
    nodes = random_nodes(rng, int(rng.integers(0, 14)), int(rng.integers(1, 12)))
    pairs = {
        (i, j) for i, j in itertools.combinations(range(len(nodes)), 2)
        if conflict(nodes[i], nodes[j])
    }  # fmt: skip
    assert set(map(tuple, np.argwhere(hazards(nodes)).tolist())) == pairs
    edges = list(dependencies(nodes))
    assert set(edges) <= pairs <= reachable(len(nodes), edges)
    assert missing(nodes, edges) == []
    for dropped in edges:  # none can be spared, and the checker finds each
        rest = [edge for edge in edges if edge != dropped]
        lost = pairs - reachable(len(nodes), rest)
        assert dropped in lost
        assert set(missing(nodes, rest)) == lost
    level = levels(len(nodes), edges)
    assert all(level[i] < level[j] for i, j in pairs)


def test_no_launches():
    assert dependencies([]) == () and missing([], []) == [] and levels(0, ()) == []


# ---- on the fake driver -------------------------------------------------------------------------


class Recorded:
    """A bound call of one launch that the fake driver does nothing for."""

    def __init__(self, name: str, reads: str, writes: str, units: int = 2, nbytes: int = 24):
        body = Body(f"// {name}", "run0", 32, reads=tuple(reads), writes=tuple(writes))
        params = ctypes.create_string_buffer(name.encode().ljust(nbytes), nbytes)
        self.part = Part(body, params, units, (), _compile)
        self.node = Node(name, self.part, _cells(reads), _cells(writes))


def _cells(names: str) -> tuple[tuple[int, int], ...]:
    return tuple((100 * ord(name), 100 * ord(name) + 10) for name in names)


COMPILED: list[tuple[Body, ...]] = []


def _compile(bodies: tuple[Body, ...], macros: tuple[str, ...]) -> bytes:
    COMPILED.append(bodies)
    return b"\x7fELF"


@pytest.fixture
def record(fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """Records calls; gives the step, the names in each launch, and the driver."""

    def recorded(*calls: Recorded, overlaps: bool = True):
        COMPILED.clear()
        step._function.cache_clear()
        monkeypatch.setattr(step, "_launches", lambda call: (call.node,))
        made = Step(calls, overlaps)
        return SimpleNamespace(
            step=made, driver=fake, names=[[b.text[3:] for b in bodies] for bodies in COMPILED]
        )

    yield recorded
    step._function.cache_clear()


def test_independent_launches_become_one(record):
    """A layer's beginning: three products of one input, then what reads each of them."""
    calls = [
        Recorded("q", "x", "Q"), Recorded("k", "x", "K"), Recorded("v", "x", "V"),
        Recorded("rotate", "Q", "R"), Recorded("append k", "K", "C"),
        Recorded("append v", "V", "D"),
        Recorded("attend", "RCD", "A"), Recorded("o", "Ax", "x"),
    ]  # fmt: skip
    made = record(*calls)
    assert made.names == [
        ["q", "k", "v"], ["rotate", "append k", "append v"], ["attend"], ["o"]
    ]  # fmt: skip
    assert made.step.count == made.driver.fake_nodes() == made.driver.fake_overlapping() == 4
    assert missing(made.step.nodes, made.step.edges) == []


def test_without_overlap_the_edges_are_plain(record):
    made = record(Recorded("a", "x", "y"), Recorded("b", "y", "z"), overlaps=False)
    assert made.driver.fake_nodes() == 2 and made.driver.fake_overlapping() == 0


def test_parameters_beyond_a_kernel_s_limit_are_two_launches(record):
    calls = [Recorded(str(n), "x", chr(200 + n), nbytes=1600) for n in range(5)]
    assert record(*calls).names == [["0", "1"], ["2", "3"], ["4"]]


def test_no_body_loses_registers_to_another_one_s_threads(record):
    """A CTA of 512 threads has 128 registers a thread at most; tiles want more."""
    calls = [Recorded(str(n), "x", chr(200 + n)) for n in range(3)]
    for call, threads, resident in zip(calls, (256, 512, 512), (384, 1024, 1024), strict=True):
        body = replace(call.part.body, threads=threads, resident=resident)
        call.node = replace(call.node, launch=replace(call.part, body=body))
    assert record(*calls).names == [["0"], ["1", "2"]]


def test_no_body_has_fewer_ctas_because_of_another_one_s_shared_memory(record):
    """An SM of sm_90 has 228 KB, of which a CTA takes its own and one: two of 100 KB, one of 150.
    What one body alone has no room for it does not lose."""
    for wanted, names in ((2, [["0", "1"], ["2"]]), (1, [["0", "1", "2"]]), (0, [["0", "1", "2"]])):
        calls = [Recorded(str(n), "x", chr(200 + n)) for n in range(3)]
        for call, kilobytes, ctas in zip(calls, (100, 113, 150), (wanted, 0, 4), strict=True):
            ctas = ctas if wanted else 0
            body = replace(call.part.body, smem_bytes=kilobytes << 10, ctas=ctas, resident=1024)
            call.node = replace(call.node, launch=replace(call.part, body=body))
        assert record(*calls).names == names


def test_parameters_stand_one_after_the_other(record):
    made = record(Recorded("a", "x", "y", 3), Recorded("b", "x", "z", 5))
    (launch,) = made.step._launches(True)
    data = bytes(launch.params)
    assert (data[:24].strip(), data[24:48].strip()) == (b"a", b"b")
    assert np.frombuffer(data[48:], np.int64).tolist() == [0, 3]
    assert (launch.grid, launch.block, launch.smem_bytes) == ((8, 1, 1), (32, 1, 1), 0)


def test_launches_without_boxes_keep_their_order(fake: ctypes.CDLL):  # noqa: F811
    """Nothing is known of their memory: each follows all before it."""
    function = cuda.Module(b"\x7fELF").function("axpy")
    x, y = (cuda.DeviceArray.from_numpy(np.full(8, n, np.float32)) for n in (1, 2))

    def add(to: cuda.DeviceArray, of: cuda.DeviceArray) -> cuda.Launch:
        params = AXPY.pack(y=to.pointer, x=of.pointer, a=1.0, n=8)
        return function.prepare((1, 1, 1), (32, 1, 1), 0, params)

    recorded = Step([add(x, y), add(y, x), add(x, y)])
    assert recorded.edges == ((0, 1), (1, 2)) and recorded.count == 3
    recorded()
    assert x.to_numpy().tolist() == [8.0] * 8 and y.to_numpy().tolist() == [5.0] * 8


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_stages_of_a_kernel_follow_each_other(fake: ctypes.CDLL):  # noqa: F811
    """A temporary that one stage writes and the next reads; coordinates and values of a matrix."""

    @tw.program
    def centred(X=tw.dense("i j")):
        i, j = tw.indices("i:i j:j")
        total = tw.temp[()](tw.sum(X[i, j], over=(i, j)))
        return tw.out[i, j](X[i, j] - total[()])

    @tw.program
    def spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
        i, j, k = tw.indices("m n d")
        return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))

    x, y = (cuda.DeviceArray.from_numpy(np.zeros((4, 4), np.float32)) for _ in range(2))
    two = centred.schedule(lambda s: s.on(1).bind("i", "cta.x")).build("cuda:sm_90a")
    recorded = Step([two.bind(x, out=y), two.bind(y, out=x)])
    assert recorded.count == 4 and set(recorded.edges) == {(0, 1), (1, 2), (2, 3)}
    product = spmm.schedule(lambda s: s.bind("m", "cta.x")).build("cuda:sm_90a")
    matrix = tw.csr().pack(np.eye(4, dtype=np.float32)).to("cuda:0")
    boxes = product.bind(matrix, x, out=y).boxes()
    sizes = {name: sum(high - low for low, high in of) for name, of in boxes.items()}
    assert sizes == {"A": 4 * 4, "X": 64, "out": 64, "": 4 * (5 + 4)}
    del recorded, matrix
    gc.collect()


def test_a_library_s_launch_among_ours(fake: ctypes.CDLL):  # noqa: F811
    """It is captured where its memory says, on its own stream, which is not destroyed: y += x
    (ours), z += 2 y (the library's), then z += y (ours)."""
    function = cuda.Module(b"\x7fELF").function("axpy")
    x, y, z = (cuda.DeviceArray.from_numpy(np.full(8, n, np.float32)) for n in (3, 0, 0))
    spans = [(a.pointer, a.pointer + a.nbytes) for a in (x, y, z)]

    def launch(to: cuda.DeviceArray, of: cuda.DeviceArray, factor: float) -> cuda.Launch:
        params = AXPY.pack(y=to.pointer, x=of.pointer, a=factor, n=8)
        return function.prepare((1, 1, 1), (32, 1, 1), 0, params)

    stream, seen = driver().returned("cuStreamCreate", 1), list[int]()
    theirs = launch(z, y, 2.0)

    def run(at: int) -> None:
        seen.append(at)
        theirs.run(at)

    library = SimpleNamespace(stream=stream, boxes=((spans[1],), (spans[2],)), run=run)
    theirs_too = SimpleNamespace(launch=library, boxes=library.boxes)
    ours = [
        SimpleNamespace(launch=launch(y, x, 1.0), boxes=((spans[0],), (spans[1],))),
        SimpleNamespace(launch=launch(z, y, 1.0), boxes=((spans[1],), (spans[2],))),
    ]
    made = Step([ours[0], theirs_too, ours[1]])
    assert made.count == 3 and made.edges == ((0, 1), (1, 2)) and seen == [stream]
    assert [node.name for node in made.nodes] == ["axpy", "SimpleNamespace", "axpy"]
    made()
    assert z.to_numpy().tolist() == [9.0] * 8
    again = launch(z, y, 1.0)
    again.run(stream)  # still there
    driver().call("cuStreamDestroy_v2", stream)
