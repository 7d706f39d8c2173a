// The planner of decode batches: the tiles of all units in one order, cut into ranges of equal cost.
// One source for the host and for GPUs; attention/ranges.py is its twin in NumPy.
//
// A unit is (request, block of KV heads that CTAs work on together), in that order. In front of this file: the
// constants of `cuts` (TILE keys, TILE_COST and UNIT_COST, SHORT; BLOCK queries of an item of a launch in front, which
// costs APART_COST, CHUNK_TILES of a chunk at least, HALF_TILES of a range) and the struct `Cut`; TW_INLINE comes from either prelude.

namespace cuts {

TW_INLINE int64_t tiles_of(int64_t keys) {  // a node without keys costs a tile: its result is written
  const int64_t tiles = (keys + TILE - 1) / TILE;
  return tiles < 1 ? 1 : tiles;
}
TW_INLINE int64_t cost_of(int64_t tiles) { return TILE_COST * tiles + UNIT_COST; }

// What a batch saves where a launch in front reads a shared node once for each block of queries, in place of each of
// its requests.
TW_INLINE int64_t gain_of(int64_t keys, int64_t requests, int64_t queries) {
  const int64_t tiles = (keys + TILE - 1) / TILE, readers = requests < queries ? requests : queries;
  return (readers * tiles - (queries + BLOCK - 1) / BLOCK * (tiles + CHUNK_TILES)) * TILE_COST;
}
// Of a batch: the sum of the gains above 0, the tiles of all items of those nodes, the tiles of the requests' own keys.
struct Loads { int64_t gains, shared, own; };
// How it is shared: the ranges at most, and the CTAs of the launch in front, 0 where that costs more than the batch gains:
// all ranges wait for it. Where requests have few keys of their own the two launches take a half of the SMs each, and run side by side.
struct Sharing { int64_t limit, front; };
TW_INLINE Sharing sharing_of(const Loads& loads, int64_t head_blocks, int64_t limit, int64_t front) {
  if (loads.gains <= 0 || loads.gains * head_blocks <= APART_COST * limit) return Sharing{limit, 0};
  if (loads.own > HALF_TILES * (limit / 2)) return Sharing{limit, front};
  return Sharing{limit / 2 > 1 ? limit / 2 : 1, front / 2 > 1 ? front / 2 : 1};
}
// Into how many chunks the launch in front cuts the items of a node: until `sms` have work, of the tiles of all its items.
TW_INLINE int64_t chunks_of(int64_t tiles, int64_t all, int64_t sms) {
  const int64_t most = tiles / CHUNK_TILES, wanted = tiles * sms / (all > 0 ? all : 1), chunks = wanted < most ? wanted : most;
  return chunks < 1 ? 1 : chunks;
}

// How many ranges a batch of so many tiles is cut into: at most `limit`. Where all units are alike (else `units` is
// 0) and ranges short, a few less if no range then has parts of two: starting and finishing a unit costs more.
TW_INLINE int64_t count_of(int64_t tiles, int64_t units, int64_t limit) {
  const int64_t most = tiles < limit ? tiles : limit;
  if (units > 0 && most > 0 && tiles <= SHORT * most) {
    const int64_t each = units < most ? most / units : (units + most - 1) / most;  // ranges of a unit, or units of a range
    const int64_t count = units < most ? units * each : units % each ? 0 : units / each;
    if (8 * count >= 7 * most) return count;
  }
  return most < 1 ? 1 : most;
}

// The index of the first number of `sorted` [0, n) that is above `x` (or not below it).
template <bool ABOVE>
TW_INLINE int64_t bound_in(const int64_t* sorted, int64_t n, int64_t x) {
  int64_t low = 0;
  while (low < n) {
    const int64_t middle = low + (n - low) / 2;
    if (ABOVE ? sorted[middle] <= x : sorted[middle] < x) low = middle + 1; else n = middle;
  }
  return low;
}

// A cut as one number that sorts like it: node, unit of the node, tile.
constexpr int NODE_SHIFT = 43, UNIT_SHIFT = 26;
TW_INLINE int64_t key(int64_t node, int64_t unit, int64_t tile) { return node << NODE_SHIFT | unit << UNIT_SHIFT | tile; }

// The cut at cost `at`. `ends` [nodes + 1]: the cost of the nodes before each; `node`: the one that the cut
// lies in, of so many units.
TW_INLINE int64_t key_of(const int64_t* ends, int64_t node, int64_t units, int64_t at) {
  const int64_t cost = (ends[node + 1] - ends[node]) / units, tiles = (cost - UNIT_COST) / TILE_COST;
  const int64_t within = at - ends[node], unit = within / cost, rest = within % cost - UNIT_COST + TILE_COST / 2;
  const int64_t tile = rest > 0 ? rest / TILE_COST : 0;
  if (tile < tiles) return key(node, unit, tile);
  return unit + 1 < units ? key(node, unit + 1, 0) : key(node + 1, 0, 0);
}

// Cut k with the first and the last range of its unit. `keys` [count + 1], sorted.
TW_INLINE Cut cut_of(const int64_t* keys, int64_t count, int64_t k) {
  const int64_t tile = keys[k] & ((int64_t{1} << UNIT_SHIFT) - 1), begin = keys[k] - tile;
  const int64_t unit = begin >> UNIT_SHIFT & ((int64_t{1} << (NODE_SHIFT - UNIT_SHIFT)) - 1);
  const int64_t first = tile == 0 ? k : bound_in<true>(keys, count + 1, begin) - 1;
  const int64_t last = bound_in<false>(keys, count + 1, begin + (int64_t{1} << UNIT_SHIFT)) - 1;
  return Cut{static_cast<int32_t>(begin >> NODE_SHIFT), static_cast<int32_t>(unit), static_cast<int32_t>(tile),
             static_cast<int32_t>(first), static_cast<int32_t>(last)};
}

}  // namespace cuts
