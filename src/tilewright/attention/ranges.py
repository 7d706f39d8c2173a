"""Ranges: the tiles of a decode batch cut into contiguous pieces of equal cost, one for each team.

A unit is (node of the table, block of packed rows, block of KV heads), in that order; a range goes
from one cut to the next. No range lists its tiles: lengths are read when the kernel runs, and the
last range of a unit works to its end.
"""

from typing import Any

import numpy as np

from tilewright.runtime.layout import Struct

TILE = 64  # keys of a tile
HEAD_BLOCK = 8  # KV heads of a range, at most: its CTAs read the same pages at the same time
TILE_COST, UNIT_COST = 4, 2  # of a tile, and of starting and finishing a unit
WIDE_COST, SNAP = 6, 2  # of a tile of a wide unit; its parts are multiples of so many tiles
JOIN_COST = 28  # of joining states of shared keys with those of their requests, in one CTA
APART_COST, CHUNK_TILES = 8, 2  # of a launch in front that makes them; the fewest tiles of a chunk

CUT = Struct("Cut", [(name, "int32") for name in ("node", "unit", "tile", "first", "last")])
"""Where a range begins: a unit of a node and a tile of it. `first` and `last` are the ranges that
hold the first and the last tile of that unit."""

SHORT = 48  # tiles of a range whose units are worth counting
NARROW_ROWS, WIDE_ROWS = 16, 64  # packed rows of a unit, at most, where nodes are shared

_NODE, _UNIT = 43, 26  # the bits of a cut's key: NODE_SHIFT and UNIT_SHIFT of cuts.h
MAX_NODES, MAX_UNITS = 1 << 20, 1 << 17


def head_block(kv_heads: int) -> int:
    """CTAs that work on one range, each on a head of its own."""
    return max(n for n in range(1, HEAD_BLOCK + 1) if kv_heads % n == 0)


def row_blocks(
    queries: np.ndarray, group: int, nodes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Of nodes that so many queries read: the blocks of packed rows, and whether these are wide.
    A node has none without readers, or where a plan (`nodes`) says that they walk it themselves."""
    wide = queries * group > NARROW_ROWS
    blocks = np.where(wide, -(-queries // (WIDE_ROWS // group)), queries > 0)
    if nodes is not None:  # nor where a launch in front does it
        blocks = blocks * (nodes["states"] >> nodes["level"] & (nodes["chunks"] == 0))
    return blocks, wide


def linked(nodes: np.ndarray, own: Any, tiles: Any = 0) -> tuple[np.ndarray, np.ndarray]:
    """`nodes` with the links of a plan in which those of `own` are units; the tiles of a unit."""
    nodes, requests = nodes.copy(), int(nodes["end"].max(initial=0))
    tiles = np.zeros(len(nodes), int) + tiles
    so_far = np.array([[-1], [0], [0], [-1]]) + np.zeros(requests + 1, int)  # of each request
    for level in range(int(nodes["level"].max(initial=-1)) + 1):
        at = np.flatnonzero(nodes["level"] == level)
        outer, states, walked, joined = so_far[:, nodes["begin"][at]]
        nodes["outer"][at], nodes["states"][at] = outer, states | own[at] << level
        nodes["joined"][at] = joined
        more = np.where(own[at], (outer, walked, at), (at, walked + tiles[at], joined))
        many = nodes["end"][at] - nodes["begin"][at]
        so_far[:, :-1] = np.repeat((more[0], nodes["states"][at], *more[1:]), many, 1)
    tiles[len(nodes) - requests :] += so_far[2, :-1]
    return nodes, tiles


def chosen(
    nodes: np.ndarray, keys: np.ndarray, queries: np.ndarray, heads: tuple[int, int], limit: int,
    block: int = 0, sms: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What `linked` returns of the choice by predicted time (see cuts.h). `heads`: KV heads, and
    the query heads of each. `block`: where a launch in front on `sms` SMs does shared keys the
    queries of an item of it, else 0."""
    tiles, (blocks, wide) = -(-keys // TILE), row_blocks(queries, heads[1])
    each, join = np.where(wide, WIDE_COST, TILE_COST) * tiles + UNIT_COST, JOIN_COST
    if block:
        blocks, each, join = -(-queries // block), TILE_COST * tiles, APART_COST
    alone = np.minimum(nodes["end"] - nodes["begin"], queries) * tiles * TILE_COST
    gain = alone - blocks * each - join
    own = np.arange(len(nodes)) >= len(nodes) - nodes["end"].max(initial=0)
    gain = np.where(own, 0, gain).clip(0)
    split = (gain > 0) & (gain.sum() * (heads[0] // head_block(heads[0])) > join * limit)
    nodes, walked = linked(nodes, own | split, tiles)
    if block:
        items = blocks * heads[0] * split
        wanted = tiles * sms // max(int((items * tiles).sum()), 1)
        nodes["chunks"] = np.minimum(wanted, tiles // CHUNK_TILES).clip(1) * (items > 0)
        nodes["item"], nodes["row"] = numbers(nodes, queries, heads[0], block)
    return nodes, walked


def numbers(nodes: np.ndarray, queries: np.ndarray, kv_heads: int, block: int) -> np.ndarray:
    """The first item of each node and the first row of its states, int64 (2, nodes)."""
    counts = np.array([-(-queries // max(block, 1)) * kv_heads, queries]) * nodes["chunks"]
    return np.cumsum(counts, 1) - counts


def _sizes(lengths: np.ndarray, kv_heads: int, blocks: Any, wide: Any) -> tuple[np.ndarray, ...]:
    """Tiles of a unit, units, and the cost of a tile, of each node."""
    tiles = np.maximum(-(-np.asarray(lengths, np.int64) // TILE), 1)
    units = np.full(len(tiles), kv_heads // head_block(kv_heads)) * blocks
    return tiles, units, np.where(wide, WIDE_COST, np.full(len(tiles), TILE_COST))


def cut(
    lengths: np.ndarray, kv_heads: int, ctas: int, blocks: Any = 1, wide: Any = False
) -> np.ndarray:
    """The cuts of a batch, an array of `CUT` (ranges + 1), for at most `ctas` CTAs.

    Of each node: `lengths`, its keys; `blocks` of packed rows and whether they are `wide`, arrays
    or one value for all. A node without keys costs a tile: its result is written too. The last
    range of a unit works to the end of its keys as they are when the kernel runs.
    """
    if not len(lengths):
        return np.zeros(1, CUT.numpy)
    tiles, units, tile_cost = _sizes(lengths, kv_heads, blocks, wide)
    cost = tile_cost * tiles + UNIT_COST
    ends = np.concatenate([[0], np.cumsum(cost * units)])
    most = count = int(max(1, min(ctas // head_block(kv_heads), (tiles * units).sum())))
    alike = (cost[units > 0] == cost[-1]).all() and (tiles * units).sum() <= SHORT * most
    if alike and units.any():  # no range has parts of two units
        many, per = int(units.sum()), -(-int(units.sum()) // most)
        whole = many * (most // many) if many < most else 0 if many % per else many // per
        count = whole if 8 * whole >= 7 * most else most
    at = int(ends[-1]) * np.arange(count) // count
    node = np.searchsorted(ends, at, "right") - 1
    if not ends[-1]:  # no unit at all
        node, unit, tile = np.full(count, len(tiles)), np.zeros(count, int), np.zeros(count, int)
    else:
        step = np.where(tile_cost == WIDE_COST, SNAP, 1)[node]
        unit, rest = np.divmod(at - ends[node], cost[node])
        by = tile_cost[node] * step
        tile = np.maximum((rest - UNIT_COST + by // 2) // by, 0) * step
        full = tile >= tiles[node]
        over = full & (unit + 1 >= units[node])
        node, unit = node + over, np.where(over, 0, unit + full)
        tile = np.where(full, 0, tile)
    return _array(np.append(node, len(tiles)), np.append(unit, 0), np.append(tile, 0))


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


def work(
    cuts: np.ndarray, lengths: np.ndarray, kv_heads: int, blocks: Any = 1, wide: Any = False
) -> np.ndarray:
    """The cost of the tiles of each range; arguments as for `cut`."""
    tiles, units, tile_cost = _sizes(lengths, kv_heads, blocks, wide)
    ends = np.append(0, np.cumsum(units * tiles * tile_cost))
    node = cuts["node"].astype(np.int64)
    tiles, tile_cost = np.append(tiles, 0), np.append(tile_cost, 0)
    return np.diff(ends[node] + (cuts["unit"] * tiles[node] + cuts["tile"]) * tile_cost[node])


def is_sound(cuts: np.ndarray, units: np.ndarray) -> bool:
    """Whether cuts from outside cover the `units` of each node once and in order: then a kernel can
    trust them."""
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
