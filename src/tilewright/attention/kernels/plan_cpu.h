// The planner of decode batches on the host. In front of this file: cpu.h, table.h, cuts.h, mask.h.

#define TW_EXPORT extern "C" __attribute__((visibility("default")))

using extents::Shape;
#define TW_STACK(shape) static_cast<extents::Value*>(__builtin_alloca(shape.steps * sizeof(extents::Value)))

// The tiles that each of `count` rows of queries can see.
TW_EXPORT void visible_tiles(const Shape& shape, const int64_t* first, const int64_t* last, const int64_t* keys, int64_t count, int64_t* tiles) {
  extents::Value* stack = TW_STACK(shape);
  for (int64_t n = 0; n < count; ++n) tiles[n] = extents::visible_tiles(shape, stack, first[n], last[n], keys[n]);
}

struct Load { int64_t tiles, units; };  // of a node

// Writes the cuts of `count` nodes, at least 1, whose `keys` are read by the rows `qo_indptr` of their requests. The first
// `shared` are shared keys, which have no units; if there are any, `keys` are those that a unit walks. `ends` [count + 1], `loads` [count] and `sorted` [limit + 1]
// are scratch, `out` holds limit + 1 cuts. Returns the number of ranges; `balance`: the most work of one, and that of all.
TW_EXPORT int64_t plan_cuts(const Shape& shape, const int32_t* qo_indptr, const tw::Node* nodes, const int64_t* keys, int64_t count,
                            int64_t shared, int64_t limit, int64_t* scratch, Cut* out, int64_t* balance) {
  int64_t* ends = scratch;
  int64_t* sorted = ends + count + 1;
  Load* loads = reinterpret_cast<Load*>(sorted + limit + 1);
  extents::Value* stack = TW_STACK(shape);
  ends[0] = 0;
  int64_t all = 0;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t queries = qo_indptr[nodes[n].end] - qo_indptr[nodes[n].begin];
    Load load{cuts::tiles_of(keys[n]), shape.head_blocks};  // where keys are shared, the caller has limited them to what a mask shows
    if (shared) load.units *= n >= shared && queries > 0;
    else load.tiles = tw::most(extents::visible_tiles(shape, stack, keys[n] - queries, keys[n] - 1, keys[n]), 1);
    ends[n + 1] = ends[n] + load.units * cuts::cost_of(load.tiles);
    all += load.units * load.tiles;
    loads[n] = load;
  }
  const int64_t unit = cuts::cost_of(loads[count - 1].tiles);
  bool alike = true;
  for (int64_t n = 0; n < count; ++n) alike &= loads[n].units == 0 || cuts::cost_of(loads[n].tiles) == unit;
  const int64_t ranges = cuts::count_of(all, alike ? ends[count] / unit : 0, limit);
  int64_t node = 0;
  for (int64_t k = 0; k < ranges; ++k) {
    const int64_t at = ends[count] * k / ranges;
    while (node < count && ends[node + 1] <= at) ++node;
    sorted[k] = node < count ? cuts::key_of(ends, node, loads[node].units, at) : cuts::key(count, 0, 0);
  }
  sorted[ranges] = cuts::key(count, 0, 0);
  int64_t before = 0, begin = 0;  // tiles of the nodes in front of a cut, and of all in front of the one before it
  balance[0] = balance[1] = node = 0;
  for (int64_t k = 0; k <= ranges; ++k) {
    const Cut cut = out[k] = cuts::cut_of(sorted, ranges, k);
    for (; node < cut.node; ++node) before += loads[node].units * loads[node].tiles;
    const int64_t end = before + (node < count ? cut.unit * loads[node].tiles + cut.tile : 0);
    balance[0] = tw::most(balance[0], end - begin);
    begin = end;
  }
  balance[1] = begin;
  return ranges;
}
