"""Synthetic graphs fit their laws exactly; files of graphs are checked before they are used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench import graphs
from tilewright.errors import ArgumentError, FormatError
from tilewright.sparse import formats

CASES = [("cora", 0.0), ("cora", 0.8), ("citeseer", 0.8), ("pubmed", 0.0), ("pubmed", 0.8)]


def rows_of(graph: graphs.Graph) -> np.ndarray:
    return np.repeat(np.arange(graph.shape[0]), graph.lengths)


def check_fit(graph: graphs.Graph, law: graphs.Law) -> None:
    n = law.rows
    assert graph.shape == (n, n)
    assert graph.nnz == law.nnz == graph.indptr[-1] == len(graph.values)
    assert graph.lengths.max() == law.max_degree
    assert np.mean(graph.lengths == 0) == pytest.approx(law.empty, abs=1e-3)
    keys = rows_of(graph).astype(np.int64) * n + graph.indices
    assert np.all(np.diff(keys) > 0), "columns are sorted and distinct in each row"
    assert graph.indices.min() >= 0 and graph.indices.max() < n
    if law.symmetric:
        mirrored = np.sort(graph.indices.astype(np.int64) * n + rows_of(graph))
        np.testing.assert_array_equal(mirrored, keys)
    assert abs(graph.values.mean()) < 0.05 and graph.values.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("name", "f"), CASES)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_small_graphs_fit_their_laws(name, f, kind, monkeypatch):
    if kind == "torch":  # what runs on a GPU, on this CPU
        pytest.importorskip("torch")
        monkeypatch.setattr(graphs, "_Numpy", lambda seed: graphs._Torch(seed, "cpu"))
    seed = int(np.random.default_rng().integers(1000))
    graph = graphs.synthetic(name, f, seed=seed, device="cpu")
    law = graphs.LAWS[name]
    check_fit(graph, law)
    assert graphs.hyb_padding(graph, law.widest, law.col_parts) == pytest.approx(law.padding, abs=1)
    n = law.rows
    near = np.mean(rows_of(graph) * 8 // n == graph.indices.astype(np.int64) * 8 // n)
    assert near == pytest.approx(f + (1 - f) / 8, abs=0.05)


def test_a_directed_graph_fits_its_law():
    law = graphs.LAWS["arxiv"]
    graph = graphs.synthetic("arxiv", 0.0, device="cpu")
    check_fit(graph, law)
    assert graphs.hyb_padding(graph, law.widest) == pytest.approx(law.padding, abs=1)


def test_diagonal_blocks_hold_every_entry():
    law = graphs.Law(4_000, 60_000, 1.5, 150, 0, 32, blocks=10, symmetric=False)
    graphs.LAWS["blocks"] = law
    try:
        graph = graphs.synthetic("blocks", 0.8, device="cpu")
    finally:
        del graphs.LAWS["blocks"]
    check_fit(graph, law)
    np.testing.assert_array_equal(rows_of(graph) // 400, graph.indices // 400)


def test_the_same_seed_gives_the_same_graph():
    one, two, other = (graphs.synthetic("cora", 0.8, seed=s, device="cpu") for s in (5, 5, 6))
    np.testing.assert_array_equal(one.indices, two.indices)
    np.testing.assert_array_equal(one.values, two.values)
    assert not np.array_equal(one.indices, other.indices)


@pytest.mark.parametrize("col_parts", [1, 4])
def test_padding_is_that_of_the_packed_format(col_parts):
    graph = graphs.synthetic("pubmed", 0.0, device="cpu")
    hyb = formats.hyb(col_parts, (1, 2, 4, 8, 16), long_rows="split")
    packed = 100 * hyb.pack(graph.csr).padding
    assert graphs.hyb_padding(graph, 16, col_parts) == pytest.approx(packed, abs=1e-9)


def test_window_columns_counts_entries_per_distinct_column():
    indptr, indices = np.array([0, 2, 4, 5], np.int32), np.array([0, 1, 0, 2, 2], np.int32)
    graph = graphs.Graph("g", indptr, indices, np.ones(5, np.float32), (3, 3))
    assert graphs.window_columns(graph, 2) == 5 / 4  # {0, 1, 2} and {2}
    assert graphs.window_columns(graph, 1) == 1


@pytest.mark.parametrize(("name", "f"), [("karate", 0.0), ("cora", 1.5)])
def test_an_unknown_graph_is_named(name, f):
    with pytest.raises(ArgumentError, match="A109"):
        graphs.synthetic(name, f)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "f"), [("pubmed", 0.8), ("arxiv", 0.8), ("proteins", 0.8)])
def test_graphs_made_on_a_gpu_fit_their_laws(name, f):
    check_fit(graphs.synthetic(name, f, device="cuda"), graphs.LAWS[name])


# ---- files ------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "indptr": np.array([0, 1, 3]),
    "indices": np.array([2, 0, 1]),
    "shape": np.array([2, 3]),
}


def test_a_file_without_values_gets_random_ones(tmp_path):
    np.savez(tmp_path / "b.npz", **GOOD)
    np.savez(tmp_path / "a.npz", **GOOD, values=np.array([1.0, 2.0, 3.0]))
    first, second = graphs.load_folder(tmp_path)
    assert (first.name, second.name) == ("a", "b")
    assert first.shape == (2, 3) and first.indices.dtype == np.int32
    np.testing.assert_array_equal(first.values, np.array([1, 2, 3], np.float32))
    assert len(np.unique(second.values)) == 3


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"indptr": None}, "F102"),
        ({"indptr": np.array([0, 1])}, "F103"),
        ({"indptr": np.array([0, 4, 3])}, "F103"),
        ({"indptr": np.array([0.0, 1.0, 3.0])}, "F102"),
        ({"indices": np.array([0, 1, 3])}, "F104"),
        ({"indices": np.array([0, 1, -1])}, "F104"),
        ({"shape": np.array([2])}, "F102"),
        ({"values": np.ones(2)}, "F102"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, code):
    arrays = {k: v for k, v in (GOOD | change).items() if v is not None}
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(FormatError, match=code) as caught:
        graphs.load(tmp_path / "x.npz")
    assert "x.npz" in caught.value.where


def test_what_is_no_file_of_arrays_is_refused(tmp_path):
    with pytest.raises(FormatError, match="F102"):
        list(graphs.load_folder(tmp_path))
    (tmp_path / "x.npz").write_bytes(b"not a zip")
    with pytest.raises(FormatError, match="F102"):
        graphs.load(tmp_path / "x.npz")


def test_real_graphs_load(data_dir):
    found = {g.name: g for g in graphs.load_folder(data_dir / "graphs")}
    assert found["cora"].nnz == 10_556 and found["cora"].lengths.max() == 168
