// Cuts of a decode batch on a GPU, as a node of a CUDA graph in front of the attention of all layers.
//
// In front of this file: gpu.cuh, async.cuh, the form of the table (namespace `table`), table.h, cuts.h, the
// struct `Params`, the constants of `cuts` (THREADS, MAX_KEYS, MOST_QUERIES of a request), the barrier id BARRIER.
// One unit; shared memory: ends [nodes + 1], keys [limit + 1], int64 each.
// A node counts as its tiles, but at most `most_tiles`: what a window can see of any context.
// It copies qo_indptr into the workspace, writes the tree of shared nodes, decides which of these a launch in front does and
// cuts them into items for the `front` CTAs of that, and sets the status word where either is wrong: then no unit is planned.

namespace cuts {

TW_INLINE void sync() { tw::bar_sync(BARRIER, THREADS); }
TW_INLINE bool sync_or(bool x) { return tw::bar_or(BARRIER, THREADS, x); }

TW_INLINE int64_t length_of(const Params& p, int node) {
  int64_t length;
  if constexpr (table::LENGTHS) {
    length = p.kv_len[node];
  } else {
    const int64_t begin = p.table_indptr[node], end = p.table_indptr[node + 1];
    length = end - (begin < 0 ? 0 : begin);
  }
  return length < 0 ? 0 : length > MAX_KEYS ? MAX_KEYS : length;
}

// Rows of q of each request, copied; whether none is below the one before or beyond max_tokens, and no
// request has more than MOST_QUERIES.
TW_INLINE bool copy_rows(const Params& p, int thread) {
  bool good = true;
  for (int r = thread; r <= p.requests; r += THREADS) {
    const int at = p.qo_from[r], before = r ? p.qo_from[r - 1] : 0;
    good &= r ? at >= before && at - static_cast<int64_t>(before) <= MOST_QUERIES : at == 0;
    good &= at >= 0 && at <= p.max_tokens;
    p.qo_indptr[r] = at;
  }
  return good;
}

// Of nodes first … last − 1 of the requests.
TW_INLINE int64_t queries_of(const Params& p, int first, int last) { return p.qo_from ? p.qo_from[last] - p.qo_from[first] : last - first; }
TW_INLINE int64_t blocks_of(int64_t queries) { return (queries + BLOCK - 1) / BLOCK; }

// The levels of a table: shared ones first, then that of the requests, which has no indptr.
struct Level { const int32_t* indptr; int first, count; };
TW_INLINE Level level_of(const Params& p, int level) {
  Level at{nullptr, 0, 0};
  for (int n = 0; n <= level; ++n) {
    at.first += at.count;
    const bool own = n == table::LEVELS - 1;
    at.indptr = own ? nullptr : (&p.shared_0)[n];
    at.count = own ? p.requests : static_cast<int>((&p.count_0)[n]);
  }
  return at;
}
TW_INLINE int64_t tiles_at(const Params& p, int node) { return (length_of(p, node) + TILE - 1) / TILE; }

// What a launch in front would save, of this thread's nodes of all levels; whether each level divides the requests.
TW_INLINE bool measure(const Params& p, Loads& loads, int thread) {
  bool good = true;
  for (int level = 0; level < table::LEVELS; ++level) {
    const Level at = level_of(p, level);
    for (int i = thread; i < at.count; i += THREADS) {
      const int begin = at.indptr ? at.indptr[i] : i, end = at.indptr ? at.indptr[i + 1] : i + 1;
      const int64_t length = length_of(p, at.first + i), tiles = (length + TILE - 1) / TILE;
      const bool fits = begin <= end && begin >= 0 && end <= p.requests;
      good &= fits && (i > 0 || begin == 0) && (i + 1 < at.count || end == p.requests);
      if (!fits) continue;
      const int64_t queries = queries_of(p, begin, end), gain = at.indptr ? gain_of(length, end - begin, queries) : 0;
      loads.gains += gain > 0 ? gain : 0;
      loads.shared += gain > 0 ? blocks_of(queries) * p.kv_heads * tiles : 0;
      loads.own += !at.indptr && queries > 0 ? tiles * p.head_blocks : 0;
    }
  }
  return good;
}

// Node i of a level with its links, as the batch is shared; all levels before it are there. `good` becomes false where its
// level does not divide the one before. `walked` [nodes]: the tiles that requests of a node walk of its keys and those before.
TW_INLINE tw::Node linked(const Params& p, int level, int i, const Sharing& sharing, int64_t tiles_of_items, int64_t* walked, bool& good) {
  const Level at = level_of(p, level), before = level_of(p, level > 0 ? level - 1 : 0);
  tw::Node node{at.indptr ? at.indptr[i] : i, at.indptr ? at.indptr[i + 1] : i + 1, 0, level, -1, -1, 0, 0, 0};
  const int64_t length = length_of(p, at.first + i), tiles = (length + TILE - 1) / TILE;
  int64_t further = 0;
  if (level > 0 && node.begin < node.end) {
    int low = 0;  // the last node of the level before that begins at or before this one
    for (int high = before.count - 1; low < high;) {
      const int middle = low + (high - low + 1) / 2;
      if (before.indptr[middle] <= node.begin) low = middle; else high = middle - 1;
    }
    good &= before.count > 0 && node.end <= before.indptr[low + 1];
    const int n = before.first + low;
    const tw::Node outer = p.nodes[n];
    const int64_t base = outer.base + length_of(p, n);
    good &= base + length <= MAX_KEYS;
    node.base = static_cast<int32_t>(base <= MAX_KEYS ? base : MAX_KEYS);
    node.outer = outer.chunks ? outer.outer : n;
    node.joined = outer.chunks ? n : outer.joined;
    further = walked[n];
  }
  if (at.indptr && sharing.front && node.begin >= 0 && node.end <= p.requests) {
    const int64_t queries = queries_of(p, node.begin, node.end);
    if (gain_of(length, node.end - node.begin, queries) > 0) node.chunks = static_cast<int32_t>(chunks_of(tiles, tiles_of_items, sharing.front));
  }
  walked[at.first + i] = further + (node.chunks ? 0 : tiles);
  return node;
}

// Of all threads. `sums`: three words for each warp.
TW_INLINE Loads sum_of(Loads loads, int64_t* sums, int thread) {
  int64_t* own[3] = {&loads.gains, &loads.shared, &loads.own};
  for (int again = 0; again < 2; ++again) {  // over a warp, then over the warps
    for (int i = 0; i < 3; ++i)
      for (int step = 1; step < 32; step *= 2) *own[i] += __shfl_xor_sync(0xffffffffu, *own[i], step);
    if (again) break;
    for (int i = 0; i < 3; ++i) sums[i * 32 + thread / 32] = *own[i];
    sync();
    for (int i = 0; i < 3; ++i) *own[i] = thread % 32 < THREADS / 32 ? sums[i * 32 + thread % 32] : 0;
  }
  sync();
  return loads;
}

// Numbers of each thread become the sums of those of the threads before; `all`: of all threads. `sums`: N words for each warp.
template <int N>
TW_INLINE void sum_before(int64_t (&own)[N], int64_t (&all)[N], int64_t* sums, int thread) {
  const int lane = thread % 32, warp = thread / 32;
  auto scan = [&](int64_t x) {  // inclusive, over a warp
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, x, step);
      if (lane >= step) x += other;
    }
    return x;
  };
  for (int i = 0; i < N; ++i) {
    const int64_t before = scan(own[i]);
    if (lane == 31) sums[i * 32 + warp] = before;
    own[i] = before - own[i];
  }
  sync();
  for (int i = 0; i < N; ++i) {
    const int64_t of_warp = lane < THREADS / 32 ? sums[i * 32 + lane] : 0, before = scan(of_warp);
    own[i] += __shfl_sync(0xffffffffu, before - of_warp, warp);
    all[i] = __shfl_sync(0xffffffffu, before, 31);
  }
}

TW_INLINE void run(const Params& p, int64_t, int thread, char* smem) {
  __shared__ int64_t sums[4 * 32], unit;  // unit: the cost of one of the last request; those of others may differ
  int64_t *ends = reinterpret_cast<int64_t*>(smem), *keys = ends + p.node_count + 1;
  int wrong = p.qo_from && !copy_rows(p, thread) ? 1 : 0;
  const int shared = p.node_count - p.requests;  // nodes
  Sharing sharing{p.limit, 0};
  Loads loads{};
  if constexpr (table::LEVELS > 1) {
    if (!measure(p, loads, thread)) wrong = 2;
    loads = sum_of(loads, sums, thread);
    sharing = sharing_of(loads, p.head_blocks, p.limit, p.front);
    for (int level = 0; level < table::LEVELS - 1; ++level) {
      const Level at = level_of(p, level);
      bool good = true;
      for (int i = thread; i < at.count; i += THREADS) p.nodes[at.first + i] = linked(p, level, i, sharing, loads.shared, ends + 1, good);
      if (!good) wrong = 2;
      sync();
    }
  }
  auto share_of = [&](int count, int& begin, int& end) {  // of this thread
    const int share = (count + THREADS - 1) / THREADS;
    begin = thread * share < count ? thread * share : count;
    end = begin + share < count ? begin + share : count;
  };
  int begin, end, shared_begin, shared_end;
  share_of(p.requests, begin, end);
  share_of(shared, shared_begin, shared_end);
  auto cost_at = [&](int64_t tiles) { return cost_of(tiles < 1 ? 1 : tiles < p.most_tiles ? tiles : p.most_tiles); };
  constexpr int SUMS = table::LEVELS > 1 ? 4 : 2;
  int64_t own[SUMS] = {}, all[SUMS];  // of this thread's nodes: costs and tiles; items of a launch in front, and rows of states
  for (int r = begin; r < end; ++r) {
    int64_t cost, units = p.head_blocks;
    if constexpr (table::LEVELS > 1) {
      bool good = true;
      p.nodes[shared + r] = linked(p, table::LEVELS - 1, r, sharing, loads.shared, ends + 1, good);
      if (!good) wrong = 2;
      cost = cost_at(ends[shared + r + 1]);
      units = queries_of(p, r, r + 1) > 0 ? units : 0;
    } else {
      cost = cost_at(tiles_at(p, r));
    }
    if (r == p.requests - 1) unit = cost;
    ends[shared + r + 1] = units * cost;
    own[0] += units * cost;
    own[1] += units * ((cost - UNIT_COST) / TILE_COST);
  }
  auto each_apart = [&](auto use) {  // the shared nodes that a launch in front does, among others
    for (int n = shared_begin; SUMS == 4 && n < shared_end; ++n) {
      tw::Node& node = p.nodes[n];
      const int64_t chunks = node.chunks, queries = chunks ? queries_of(p, node.begin, node.end) : 0;
      use(node, chunks * blocks_of(queries) * p.kv_heads, chunks * queries);
    }
  };
  each_apart([&](tw::Node&, int64_t items, int64_t rows) {
    own[SUMS - 2] += items;
    own[SUMS - 1] += rows;
  });
  const bool none = sync_or(wrong);
  if (wrong) *p.status = wrong;
  if (none)
    for (int64_t& x : own) x = 0;
  bool differ = false;
  for (int r = begin; r < end; ++r) {
    int64_t& cost = ends[shared + r + 1];
    if (none) cost = 0;
    differ |= cost > 0 && cost != p.head_blocks * unit;
  }
  sum_before(own, all, sums, thread);
  for (int n = thread; n <= shared; n += THREADS) ends[n] = 0;
  for (int r = begin; r < end; ++r) {
    own[0] += ends[shared + r + 1];
    ends[shared + r + 1] = own[0];
    if constexpr (SUMS == 4) {
      p.nodes[shared + r].item = static_cast<int32_t>(all[SUMS - 2]);
      p.nodes[shared + r].row = static_cast<int32_t>(all[SUMS - 1]);
    }
  }
  each_apart([&](tw::Node& node, int64_t items, int64_t rows) {
    node.item = static_cast<int32_t>(own[SUMS - 2]);
    node.row = static_cast<int32_t>(own[SUMS - 1]);
    own[SUMS - 2] += none ? 0 : items;
    own[SUMS - 1] += none ? 0 : rows;
  });
  differ = sync_or(differ);
  const int64_t total = ends[p.node_count], count = count_of(all[1], differ || total == 0 ? 0 : total / unit, sharing.limit);
  for (int k = thread; k <= p.limit; k += THREADS) {
    int64_t cut = key(p.node_count, 0, 0);
    if (k < count && total > 0) {
      const int64_t at = total * k / count, node = bound_in<true>(ends, p.node_count + 1, at) - 1;
      cut = key_of(ends, node, p.head_blocks, at);  // no cut lies in a node without units
    }
    keys[k] = cut;
  }
  sync();
  for (int k = thread; k <= p.limit; k += THREADS) p.cuts[k] = cut_of(keys, k < count ? count : k, k);
}

}  // namespace cuts
