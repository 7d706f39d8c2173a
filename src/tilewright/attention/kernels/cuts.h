// The planner of decode batches: the tiles of all units in one order, cut into ranges of equal cost.
// One source for the host and for GPUs; attention/ranges.py is its twin in NumPy.
//
// A unit is (request, group of KV heads that CTAs work on together), requests first. In front of this
// file: the constants of `cuts` (TILE keys, TILE_COST and UNIT_COST) and the struct `Cut`; TW_INLINE
// comes from either prelude.

namespace cuts {

TW_INLINE int64_t tiles_of(int64_t keys) {  // a request without keys costs a tile: its result is written
  const int64_t tiles = (keys + TILE - 1) / TILE;
  return tiles < 1 ? 1 : tiles;
}
TW_INLINE int64_t cost_of(int64_t tiles) { return TILE_COST * tiles + UNIT_COST; }

// How many ranges a batch of `total` cost is cut into: at most `limit`, and at most its tiles.
TW_INLINE int64_t count_of(int64_t total, int64_t units, int64_t limit) {
  const int64_t tiles = (total - units * UNIT_COST) / TILE_COST, most = tiles < limit ? tiles : limit;
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

// Cut k of `count` as unit << 32 | tile. `ends` [requests + 1]: the cost of the requests before each;
// `request`: the one that the cut lies in.
TW_INLINE int64_t key_of(const int64_t* ends, int64_t requests, int64_t groups, int64_t request, int64_t at) {
  const int64_t cost = (ends[request + 1] - ends[request]) / groups, tiles = (cost - UNIT_COST) / TILE_COST;
  const int64_t within = at - ends[request], group = within / cost;
  const int64_t rest = within % cost - UNIT_COST + TILE_COST / 2;
  const int64_t tile = rest > 0 ? rest / TILE_COST : 0, unit = request * groups + group;
  return tile >= tiles ? (unit + 1) << 32 : unit << 32 | tile;
}

// Cut k with the first and the last range of its unit. `keys` [count + 1], sorted.
TW_INLINE Cut cut_of(const int64_t* keys, int64_t count, int64_t groups, int64_t k) {
  const int64_t unit = keys[k] >> 32, tile = keys[k] & 0xffffffff;
  const int64_t first = tile == 0 ? k : bound_in<true>(keys, count + 1, unit << 32) - 1;
  const int64_t last = bound_in<false>(keys, count + 1, (unit + 1) << 32) - 1;
  return Cut{static_cast<int32_t>(unit), static_cast<int32_t>(unit / groups), static_cast<int32_t>(unit % groups),
             static_cast<int32_t>(tile), static_cast<int32_t>(first), static_cast<int32_t>(last)};
}

}  // namespace cuts
