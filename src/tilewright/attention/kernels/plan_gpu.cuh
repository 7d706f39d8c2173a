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
TW_INLINE int64_t blocks_of(const Params& p, const tw::Node& node) { return (queries_of(p, node.begin, node.end) + BLOCK - 1) / BLOCK; }

// The nodes of one level, `first` the first of them; whether they divide the requests and the nodes of the
// level before, whose indptr is `outer` [outer_count + 1]. Those that gain by it have `chunks` for now. `loads`: this thread's.
TW_INLINE bool write_level(const Params& p, const int32_t* indptr, int count, int first, int level, const int32_t* outer, int outer_count, Loads& loads, int thread) {
  bool good = true;
  for (int i = thread; i < count; i += THREADS) {
    tw::Node node{indptr ? indptr[i] : i, indptr ? indptr[i + 1] : i + 1, 0, level, -1, -1, 0, 0, 0};
    const int64_t length = length_of(p, first + i);
    good &= node.begin <= node.end && (i > 0 || node.begin == 0) && (i + 1 < count || node.end == p.requests);
    if (outer && node.begin < node.end) {
      int low = 0;  // the last outer node that begins at or before this one
      for (int high = outer_count - 1; low < high;) {
        const int middle = low + (high - low + 1) / 2;
        if (outer[middle] <= node.begin) low = middle; else high = middle - 1;
      }
      good &= outer_count > 0 && node.end <= outer[low + 1];
      const int64_t base = p.nodes[first - outer_count + low].base + length_of(p, first - outer_count + low);
      good &= base + length <= MAX_KEYS;
      node.base = static_cast<int32_t>(base <= MAX_KEYS ? base : MAX_KEYS);
      node.outer = first - outer_count + low;  // until it is linked
    }
    if (good && node.begin >= 0 && node.end <= p.requests) {
      const int64_t queries = queries_of(p, node.begin, node.end), tiles = (length + TILE - 1) / TILE;
      const int64_t gain = indptr ? gain_of(length, node.end - node.begin, queries) : 0;
      node.chunks = gain > 0;
      loads.gains += gain > 0 ? gain : 0;
      loads.shared += gain > 0 ? blocks_of(p, node) * p.kv_heads * tiles : 0;
      loads.own += !indptr && queries > 0 ? tiles * p.head_blocks : 0;
    }
    p.nodes[first + i] = node;
  }
  return good;
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

// The links of all nodes, and the chunks of those that a launch in front does: how the batch is shared.
TW_INLINE void link(const Params& p, const Sharing& sharing, int64_t tiles_of_items, int thread) {
  for (int level = 0; level < table::LEVELS; ++level) {
    for (int n = thread; n < p.node_count; n += THREADS) {
      tw::Node node = p.nodes[n];
      if (node.level != level) continue;
      if (node.outer >= 0) {
        const tw::Node outer = p.nodes[node.outer];
        node.joined = outer.chunks ? node.outer : outer.joined;
        if (outer.chunks) node.outer = outer.outer;
      }
      if (node.chunks) node.chunks = sharing.front ? static_cast<int32_t>(chunks_of((length_of(p, n) + TILE - 1) / TILE, tiles_of_items, sharing.front)) : 0;
      p.nodes[n] = node;
    }
    sync();
  }
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

// The tiles of a unit of a node. A node without keys costs a tile: its result is written.
TW_INLINE int64_t unit_tiles(const Params& p, int n) {
  if constexpr (table::LEVELS == 1) return tiles_of(length_of(p, n));
  int64_t tiles = (length_of(p, n) + TILE - 1) / TILE;
  for (int at = n < p.node_count - p.requests ? -1 : p.nodes[n].outer; at >= 0; at = p.nodes[at].outer)
    tiles += (length_of(p, at) + TILE - 1) / TILE;
  return tiles < 1 ? 1 : tiles;
}

// Units of a node.
TW_INLINE int64_t units_of(const Params& p, int n) {
  if constexpr (table::LEVELS == 1) return p.head_blocks;
  const int request = n - (p.node_count - p.requests);
  return request >= 0 && queries_of(p, request, request + 1) > 0 ? p.head_blocks : 0;
}

TW_INLINE void run(const Params& p, int64_t, int thread, char* smem) {
  __shared__ int64_t sums[4 * 32];
  int64_t *ends = reinterpret_cast<int64_t*>(smem), *keys = ends + p.node_count + 1;
  int wrong = p.qo_from && !copy_rows(p, thread) ? 1 : 0;
  int64_t limit = p.limit;
  if constexpr (table::LEVELS > 1) {
    Loads loads{};
    const int32_t* outer = nullptr;
    int first = 0, outer_count = 0;
    for (int level = 0; level < table::LEVELS; ++level) {
      const bool own = level == table::LEVELS - 1;
      const int32_t* indptr = own ? nullptr : (&p.shared_0)[level];
      const int count = own ? p.requests : static_cast<int>((&p.count_0)[level]);
      if (!write_level(p, indptr, count, first, level, outer, outer_count, loads, thread)) wrong = 2;
      first += count;
      outer = indptr;
      outer_count = count;
      sync();
    }
    loads = sum_of(loads, sums, thread);
    const Sharing sharing = sharing_of(loads, p.head_blocks, p.limit, p.front);
    link(p, sharing, loads.shared, thread);
    limit = sharing.limit;
  }
  const bool none = sync_or(wrong);
  if (wrong) *p.status = wrong;
  const int share = (p.node_count + THREADS - 1) / THREADS;
  const int begin = thread * share < p.node_count ? thread * share : p.node_count;
  const int end = begin + share < p.node_count ? begin + share : p.node_count;
  constexpr int SUMS = table::LEVELS > 1 ? 4 : 2;
  int64_t own[SUMS] = {}, all[SUMS];  // of this thread's nodes: costs and tiles; items of a launch in front, and rows of states
  int64_t unit = none || p.node_count == 0 ? 0 : unit_tiles(p, p.node_count - 1);
  unit = cost_of(unit < p.most_tiles ? unit : p.most_tiles);  // of the last request; those of others may differ
  bool differ = false;
  auto each_apart = [&](auto use) {  // the nodes that a launch in front does, among others
    for (int n = begin; SUMS == 4 && n < end; ++n) {
      tw::Node& node = p.nodes[n];
      const int64_t chunks = none ? 0 : node.chunks;
      use(node, chunks ? chunks * blocks_of(p, node) * p.kv_heads : 0, chunks ? chunks * queries_of(p, node.begin, node.end) : 0);
    }
  };
  for (int n = begin; n < end; ++n) {
    int64_t tiles = unit_tiles(p, n);
    tiles = tiles < p.most_tiles ? tiles : p.most_tiles;
    const int64_t units = none ? 0 : units_of(p, n);
    ends[n + 1] = units * cost_of(tiles);
    differ |= units > 0 && cost_of(tiles) != unit;
    own[0] += ends[n + 1];
    own[1] += units * tiles;
  }
  each_apart([&](tw::Node&, int64_t items, int64_t rows) {
    own[SUMS - 2] += items;
    own[SUMS - 1] += rows;
  });
  sum_before(own, all, sums, thread);
  if (thread == 0) ends[0] = 0;
  for (int n = begin; n < end; ++n) {
    own[0] += ends[n + 1];
    ends[n + 1] = own[0];
  }
  each_apart([&](tw::Node& node, int64_t items, int64_t rows) {
    node.item = static_cast<int32_t>(own[SUMS - 2]);
    node.row = static_cast<int32_t>(own[SUMS - 1]);
    own[SUMS - 2] += items;
    own[SUMS - 1] += rows;
  });
  differ = sync_or(differ);
  const int64_t total = ends[p.node_count], count = count_of(all[1], differ || total == 0 ? 0 : total / unit, limit);
  for (int k = thread; k <= p.limit; k += THREADS) {
    int64_t cut = key(p.node_count, 0, 0);
    if (k < count && total > 0) {
      const int64_t at = total * k / count, node = bound_in<true>(ends, p.node_count + 1, at) - 1;
      cut = key_of(ends, node, units_of(p, static_cast<int>(node)), at);
    }
    keys[k] = cut;
  }
  sync();
  for (int k = thread; k <= p.limit; k += THREADS) p.cuts[k] = cut_of(keys, k < count ? count : k, k);
}

}  // namespace cuts
