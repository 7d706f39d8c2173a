"""The kernel cache: private, atomic, and never believing a damaged file."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tilewright import knobs
from tilewright.errors import BuildError
from tilewright.runtime.manifest import Built
from tilewright.toolchain import compilers, disk_cache, program_cache


def test_key_separates_parts() -> None:
    assert disk_cache.key_of("ab", "c") != disk_cache.key_of("a", "bc")
    assert disk_cache.key_of("ab") != disk_cache.key_of("ab", "")
    assert disk_cache.key_of(b"ab") == disk_cache.key_of("ab")


def test_round_trip_and_listing(tmp_path: Path, rng: np.random.Generator) -> None:
    with knobs.scope(cache_dir=tmp_path / "cache"):
        data = rng.bytes(1000)
        key = disk_cache.key_of(data)
        hits = disk_cache.stats.hits
        assert disk_cache.get("so", key) is None
        path = disk_cache.put("so", key, data)
        assert disk_cache.get("so", key) == data
        assert disk_cache.find("so", key) == path
        assert disk_cache.get("cubin", key) is None
        assert disk_cache.stats.hits - hits == 2
        assert [path.name for path, _ in disk_cache.current().entries()] == [f"{key}.so"]
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert disk_cache.current().clear() == 1
        assert disk_cache.get("so", key) is None


def test_empty_data_is_an_entry(tmp_path: Path) -> None:
    store = disk_cache.Cache(tmp_path)
    store.put("so", disk_cache.key_of("x"), b"")
    assert store.get("so", disk_cache.key_of("x")) == b""


def test_damage_is_a_miss(tmp_path: Path, rng: np.random.Generator) -> None:
    store, data = disk_cache.Cache(tmp_path), rng.bytes(300)
    key, other = disk_cache.key_of("x"), disk_cache.key_of("y")
    path = store.put("so", key, data)
    whole = path.read_bytes()
    store.path("so", other).write_bytes(whole)  # moved to another key
    store.path("cubin", key).write_bytes(whole)  # or to another kind
    assert store.get("so", other) is None
    assert store.get("cubin", key) is None
    for _ in range(30):
        damaged = bytearray(whole)
        where = int(rng.integers(len(whole)))
        damaged[where] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        assert store.get("so", key) is None
        path.write_bytes(whole[:where])
        assert store.get("so", key) is None
    path.write_bytes(whole)
    assert store.get("so", key) == data


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_a_miss(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Above all, nobody waits for the other end of a pipe."""
    store, key = disk_cache.Cache(tmp_path), disk_cache.key_of("x")
    make(store.path("so", key))
    assert store.get("so", key) is None


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff", b"{", b"[]", b"5", b"{}", b"[" * 100_000,
        b'{"manifest": {}, "source": "", "entries": []}',
        b'{"manifest": {"tensors": 5}, "source": "", "entries": []}',
        b'{"manifest": {"tensors": [5], "stages": []}, "source": "", "entries": []}',
        b'{"manifest": {"name": "x"}, "source": 5, "entries": [1]}',
    ],
    ids=lambda data: repr(data[:50]),
)  # fmt: skip
def test_a_kernel_entry_of_another_form_is_a_miss(tmp_path: Path, data: bytes) -> None:
    """Signed as it should be, but not what this version writes."""
    with knobs.scope(cache_dir=tmp_path, cache=True):
        program_cache.save(disk_cache.key_of("x"), data)
        assert program_cache.load(disk_cache.key_of("x")) == data
    assert Built.from_bytes(data) is None


def test_the_warning_of_a_fall_back_names_the_user_s_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with (
        knobs.scope(cache_dir=tmp_path / "file" / "cache"),
        pytest.warns(RuntimeWarning, match="cannot be written") as caught,
    ):
        compilers.has_compiler()
        disk_cache.put("so", disk_cache.key_of("x"), b"data")
    assert [w.filename for w in caught] == [__file__]


def test_folder_others_can_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with knobs.scope(cache_dir=folder), pytest.raises(BuildError, match=r"B105.*0777"):
        disk_cache.get("so", disk_cache.key_of("x"))
    folder.chmod(0o755)
    with knobs.scope(cache_dir=folder):
        assert disk_cache.get("so", disk_cache.key_of("x")) is None


def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(BuildError, match=r"B105.*belongs to"):
        disk_cache.Cache(tmp_path)


def test_unwritable_folder_falls_back_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")
    with knobs.scope(cache_dir=blocked / "cache"):
        with pytest.warns(RuntimeWarning, match="cannot be written"):
            path = disk_cache.put("so", disk_cache.key_of("x"), b"data")
        assert tmp_path not in path.parents
        assert disk_cache.get("so", disk_cache.key_of("x")) == b"data"  # and no second warning


def test_full_disk_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = disk_cache.Cache.put

    def full(self: disk_cache.Cache, kind: str, key: str, data: bytes) -> Path:
        if self.folder == tmp_path:
            raise OSError(28, "No space left on device")
        return put(self, kind, key, data)

    monkeypatch.setattr(disk_cache.Cache, "put", full)
    with knobs.scope(cache_dir=tmp_path):
        with pytest.warns(RuntimeWarning, match="No space left"):
            disk_cache.put("so", disk_cache.key_of("x"), b"data")
        assert disk_cache.get("so", disk_cache.key_of("x")) == b"data"


def test_folder_deleted_under_us_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with knobs.scope(cache_dir=folder):
        disk_cache.put("so", disk_cache.key_of("x"), b"one")
        assert disk_cache.current().clear() == 1
        folder.rmdir()
        assert disk_cache.put("so", disk_cache.key_of("x"), b"two").parent == folder


def test_knob_turns_it_off(tmp_path: Path) -> None:
    with knobs.scope(cache_dir=tmp_path, cache=False):
        path = disk_cache.put("so", disk_cache.key_of("x"), b"data")
        assert path.exists()
        assert disk_cache.get("so", disk_cache.key_of("x")) is None
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: Path) -> None:
        raise OSError(5, "Input/output error")

    store = disk_cache.Cache(tmp_path)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output"):
        store.put("so", disk_cache.key_of("x"), b"data")
    assert list(tmp_path.iterdir()) == []


def _hammer(folder: str, seed: int) -> bool:
    store = disk_cache.Cache(Path(folder))
    rng = np.random.default_rng(seed)
    for _ in range(150):
        name = str(rng.integers(4))
        key, data = disk_cache.key_of(name), name.encode() * 20000
        store.put("so", key, data)
        found = store.get("so", key)
        if found != data:
            return False
    return True


def test_many_processes(tmp_path: Path) -> None:
    """Writers of the same entries at the same time: a reader sees a whole one, always."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as workers:
        assert all(workers.starmap(_hammer, [(str(tmp_path), seed) for seed in range(3)]))
    assert not list(tmp_path.glob(".tmp-*"))
