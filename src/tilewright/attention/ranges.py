"""Ranges: the tiles of a decode batch cut into contiguous pieces of equal cost, one for each team.

A unit is (request, block of KV heads), in that order; a range goes from one cut to the next. No
range lists its tiles: lengths are read when the kernel runs, and the last range of a unit works to
its end. The plan decides which shared keys a launch in front reads, once for many requests.
"""

from typing import Any

import numpy as np

from tilewright.runtime.layout import Struct

TILE = 64  # keys of a tile
HEAD_BLOCK = 8  # KV heads of a range, at most: its CTAs read the same pages at the same time
TILE_COST, UNIT_COST = 4, 2  # of a tile, and of starting and finishing a unit
APART_COST, CHUNK_TILES = 3, 2  # of a launch in front, for each range; tiles of a chunk, at least
HALF_TILES = 5  # of a range: with more of its own a decode kernel takes all SMs behind that launch

CUT = Struct("Cut", [(name, "int32") for name in ("node", "unit", "tile", "first", "last")])
"""Where a range begins: a unit of a node and a tile of it. `first` and `last` are the ranges that
hold the first and the last tile of that unit."""

SHORT = 48  # tiles of a range whose units are worth counting
ROWS = 16  # packed rows (queries × group) of a request, at most

_NODE, _UNIT = 43, 26  # the bits of a cut's key: NODE_SHIFT and UNIT_SHIFT of cuts.h


def head_block(kv_heads: int) -> int:
    """CTAs that work on one range, each on a head of its own."""
    return max(n for n in range(1, HEAD_BLOCK + 1) if kv_heads % n == 0)


def of_front(block: int, group: int, sms: int) -> int:
    """CTAs of a launch in front: one an SM of the Hopper family, two of the decode family."""
    return sms * (1 + (block * group <= ROWS))


def linked(nodes: np.ndarray, ahead: Any, tiles: Any = 0) -> tuple[np.ndarray, np.ndarray]:
    """`nodes` with the links of a plan in which a launch in front does those of `ahead`; the tiles
    that a unit walks."""
    nodes, requests = nodes.copy(), int(nodes["end"].max(initial=0))
    tiles = np.zeros(len(nodes), int) + tiles
    so_far = np.array([[-1], [-1], [0]]) + np.zeros(requests + 1, int)  # of each request
    for level in range(int(nodes["level"].max(initial=-1)) + 1):
        at = np.flatnonzero(nodes["level"] == level)
        outer, joined, walked = so_far[:, nodes["begin"][at]]
        nodes["outer"][at], nodes["joined"][at] = outer, joined
        more = np.where(ahead[at], (outer, at, walked), (at, joined, walked + tiles[at]))
        so_far[:, :-1] = np.repeat(more, nodes["end"][at] - nodes["begin"][at], 1)
    tiles[len(nodes) - requests :] = so_far[2, :-1]
    return nodes, tiles


def chosen(
    nodes: np.ndarray, keys: np.ndarray, queries: np.ndarray, kv_heads: int, limit: int,
    block: int, front: int,
) -> tuple[np.ndarray, np.ndarray, int]:  # fmt: skip
    """What `linked` returns of the choice by predicted time (see cuts.h), and the most ranges.
    `block`: queries of an item of the launch in front, which has up to `front` CTAs."""
    tiles, blocks = -(-keys // TILE), -(-queries // block)
    shared = np.arange(len(nodes)) < len(nodes) - nodes["end"].max(initial=0)
    readers = np.minimum(nodes["end"] - nodes["begin"], queries)
    gain = (readers * tiles - blocks * (tiles + CHUNK_TILES)) * TILE_COST * shared
    heads, gains = kv_heads // head_block(kv_heads), gain.clip(0).sum()
    nodes, walked = linked(nodes, ahead := (gain > 0) & (gains * heads > APART_COST * limit), tiles)
    if ahead.any() and (tiles * ~shared * (queries > 0)).sum() * heads <= HALF_TILES * (limit // 2):
        limit, front = max(limit // 2, 1), max(front // 2, 1)
    items = blocks * kv_heads * ahead
    wanted = tiles * front // max(int((items * tiles).sum()), 1)
    nodes["chunks"] = np.minimum(wanted, tiles // CHUNK_TILES).clip(1) * (items > 0)
    nodes["item"], nodes["row"] = numbers(nodes, queries, kv_heads, block)
    return nodes, walked, limit


def numbers(nodes: np.ndarray, queries: np.ndarray, kv_heads: int, block: int) -> np.ndarray:
    """The first item of each node and the first row of its states, int64 (2, nodes)."""
    counts = np.array([-(-queries // block) * kv_heads, queries]) * nodes["chunks"]
    return np.cumsum(counts, 1) - counts


def cut(lengths: np.ndarray, kv_heads: int, ctas: int, exist: Any = True) -> np.ndarray:
    """The cuts of a batch, an array of `CUT` (ranges + 1), for at most `ctas` CTAs.

    Of each node: `lengths`, its keys, and whether it has units (`exist`, an array or one value). A
    node without keys costs a tile: its result is written too. The last range of a unit works to the
    end of its keys as they are when the kernel runs.
    """
    if not len(lengths):
        return np.zeros(1, CUT.numpy)
    tiles, units = _sizes(lengths, kv_heads, exist)
    cost = TILE_COST * tiles + UNIT_COST
    ends = np.concatenate([[0], np.cumsum(cost * units)])
    most = count = int(max(1, min(ctas // head_block(kv_heads), (tiles * units).sum())))
    alike = (cost[units > 0] == cost[-1]).all() and (tiles * units).sum() <= SHORT * most
    if alike and units.any():  # no range has parts of two units
        many, per = int(units.sum()), -(-int(units.sum()) // most)
        even = many * (most // many) if many < most else 0 if many % per else many // per
        count = even if 8 * even >= 7 * most else most
    at = int(ends[-1]) * np.arange(count) // count
    node = np.searchsorted(ends, at, "right") - 1
    if not ends[-1]:  # no unit at all
        node, unit, tile = np.full(count, len(tiles)), np.zeros(count, int), np.zeros(count, int)
    else:
        unit, rest = np.divmod(at - ends[node], cost[node])
        tile = np.maximum((rest - UNIT_COST + TILE_COST // 2) // TILE_COST, 0)
        full = tile >= tiles[node]
        over = full & (unit + 1 >= units[node])
        node, unit = node + over, np.where(over, 0, unit + full)
        tile = np.where(full, 0, tile)
    return _array(np.append(node, len(tiles)), np.append(unit, 0), np.append(tile, 0))


def _sizes(lengths: np.ndarray, kv_heads: int, exist: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of a unit, and units, of each node."""
    tiles = np.maximum(-(-np.asarray(lengths, np.int64) // TILE), 1)
    return tiles, np.full(len(tiles), kv_heads // head_block(kv_heads)) * exist


def _key(node: np.ndarray, unit: np.ndarray, tile: np.ndarray) -> np.ndarray:
    return (node << _NODE) + (unit << _UNIT) + tile


def _array(node: np.ndarray, unit: np.ndarray, tile: np.ndarray) -> np.ndarray:
    """Cuts by node, unit and tile, which decide the rest."""
    key, begin = _key(node, unit, tile), _key(node, unit, 0 * tile)
    cuts = np.zeros(len(node), CUT.numpy)
    cuts["node"], cuts["unit"], cuts["tile"] = node, unit, tile
    own = np.arange(len(node))
    cuts["first"] = np.where(tile == 0, own, np.searchsorted(key, begin, "right") - 1)
    cuts["last"] = np.searchsorted(key, begin + (1 << _UNIT), "left") - 1
    return cuts


def work(cuts: np.ndarray, lengths: np.ndarray, kv_heads: int, exist: Any = True) -> np.ndarray:
    """The tiles of each range; arguments as for `cut`."""
    tiles, units = _sizes(lengths, kv_heads, exist)
    ends, node = np.append(0, np.cumsum(units * tiles)), cuts["node"].astype(np.int64)
    return np.diff(ends[node] + cuts["unit"] * np.append(tiles, 0)[node] + cuts["tile"])


def is_sound(cuts: np.ndarray, units: np.ndarray) -> bool:
    """Whether cuts from outside cover the `units` of each node once and in order."""
    if not len(cuts):
        return True
    node, unit, tile = (cuts[n].astype(np.int64) for n in ("node", "unit", "tile"))
    key, last = _key(node, unit, tile), len(units)
    if min(node.min(), unit.min(), tile.min()) < 0 or node.max() > last or tile.max() >> _UNIT:
        return False
    from_first = not (unit[0] or tile[0] or units[: node[0]].any())
    exists = (unit < np.append(units, 1)[node]) | ((unit == 0) & (tile == 0))
    rising = key[-1] == last << _NODE and (key[1:] >= key[:-1]).all()
    return bool(from_first and rising and exists.all() and (_array(node, unit, tile) == cuts).all())
