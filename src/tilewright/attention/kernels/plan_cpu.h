// Cuts of a decode batch on the host. In front of this file: cpu.h and cuts.h.

// Writes the cuts of `nodes` nodes; returns the number of ranges. Of each node: `lengths` in keys, `units`
// and `wide`. `ends` [nodes + 1] and `keys` [limit + 1] are scratch; `out` holds limit + 1 cuts. `nodes` is
// at least 1.
extern "C" __attribute__((visibility("default"))) int64_t plan_cuts(
    const int64_t* lengths, const int64_t* units, const uint8_t* wide, int64_t nodes, int64_t limit, int64_t* ends,
    int64_t* keys, Cut* out) {
  ends[0] = 0;
  int64_t all = 0;
  for (int64_t n = 0; n < nodes; ++n) {
    const int64_t tiles = cuts::tiles_of(lengths[n]);
    ends[n + 1] = ends[n] + units[n] * cuts::cost_of(tiles, wide[n]);
    all += units[n] * tiles;
  }
  const int64_t count = cuts::count_of(all, limit);
  int64_t node = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t at = ends[nodes] * k / count;
    while (node < nodes && ends[node + 1] <= at) ++node;
    keys[k] = node < nodes ? cuts::key_of(ends, node, units[node], wide[node], at) : cuts::key(nodes, 0, 0);
  }
  keys[count] = cuts::key(nodes, 0, 0);
  for (int64_t k = 0; k <= count; ++k) out[k] = cuts::cut_of(keys, count, k);
  return count;
}
