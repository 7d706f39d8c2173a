"""Ranges: the tiles of a decode batch cut into contiguous pieces of equal cost, one for each team.

A unit is (request, group of KV heads), in that order; a range goes from one cut to the next. No
range lists its tiles: lengths are read when the kernel runs, and the last range of a unit works to
its end.
"""

from __future__ import annotations

import numpy as np

from tilewright.runtime.layout import Struct

TILE = 64  # keys of a tile
HEADS_AT_ONCE = 8  # CTAs of one range, at most: their reads of the same pages coincide
TILE_COST, UNIT_COST = 4, 2  # of a tile, and of starting and finishing a unit

CUT = Struct(
    "Cut", [(name, "int32") for name in ("unit", "request", "group", "tile", "first", "last")]
)
"""Where a range begins: a unit (request, group of heads) and a tile of it. `first` and `last` are
the ranges that hold the first and the last tile of that unit."""


def heads_at_once(kv_heads: int) -> int:
    """CTAs that work on one range, each on a head of its own."""
    return max(n for n in range(1, HEADS_AT_ONCE + 1) if kv_heads % n == 0)


def cut(lengths: np.ndarray, kv_heads: int, ctas: int) -> np.ndarray:
    """The cuts of a batch, an array of `CUT` (ranges + 1), for at most `ctas` CTAs.

    `lengths` (requests,): keys of each. A request without keys costs a tile: its result is written
    too. The last range of a unit works to the end of its keys as they are when the kernel runs.
    """
    together = heads_at_once(kv_heads)
    groups = kv_heads // together
    if not len(lengths):
        return np.zeros(1, CUT.numpy)
    tiles = np.maximum(-(-np.asarray(lengths, np.int64) // TILE), 1)
    cost = TILE_COST * tiles + UNIT_COST
    ends = np.concatenate([[0], np.cumsum(cost * groups)])
    count = int(max(1, min(ctas // together, tiles.sum() * groups)))
    at = int(ends[-1]) * np.arange(count) // count
    request = np.searchsorted(ends, at, "right") - 1
    unit_cost, unit_tiles = cost[request], tiles[request]
    group, rest = np.divmod(at - ends[request], unit_cost)
    tile = np.maximum((rest - UNIT_COST + TILE_COST // 2) // TILE_COST, 0)
    full = tile >= unit_tiles
    unit = np.append(request * groups + group + full, len(tiles) * groups)
    tile = np.append(np.where(full, 0, tile), 0)
    return _array(unit, tile, groups)


def _array(unit: np.ndarray, tile: np.ndarray, groups: int) -> np.ndarray:
    """Cuts by unit and tile, which decide the rest."""
    key, begin = (unit << 32) + tile, unit << 32
    cuts = np.zeros(len(unit), CUT.numpy)
    cuts["unit"], cuts["tile"] = unit, tile
    cuts["request"], cuts["group"] = np.divmod(unit, groups)
    own = np.arange(len(unit))
    cuts["first"] = np.where(tile == 0, own, np.searchsorted(key, begin, "right") - 1)
    cuts["last"] = np.searchsorted(key, begin + (1 << 32), "left") - 1
    return cuts


def imbalance(cuts: np.ndarray, lengths: np.ndarray, kv_heads: int) -> float:
    """The tiles of the longest range over the mean, 1.0 for an empty batch."""
    groups = kv_heads // heads_at_once(kv_heads)
    tiles = np.maximum(-(-np.asarray(lengths, np.int64) // TILE), 1)
    before = np.append(0, np.cumsum(np.repeat(tiles, groups)))  # tiles before each unit
    at = before[cuts["unit"].astype(np.int64)] + cuts["tile"]
    work = np.diff(at)
    return float(work.max() * len(work) / work.sum()) if len(work) and work.sum() else 1.0


def is_sound(cuts: np.ndarray, requests: int, kv_heads: int) -> bool:
    """Whether cuts from outside cover a batch once and in order: then a kernel can trust them."""
    if not len(cuts):
        return True
    groups = kv_heads // heads_at_once(kv_heads)
    unit, tile = cuts["unit"].astype(np.int64), cuts["tile"].astype(np.int64)
    key = (unit << 32) + tile
    inside = key[0] == 0 and key[-1] == (requests * groups) << 32 and tile.min() >= 0
    if not inside or (key[1:] < key[:-1]).any():
        return False
    return bool((_array(unit, tile, groups) == cuts).all())
