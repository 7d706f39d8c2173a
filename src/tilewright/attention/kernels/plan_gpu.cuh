// Cuts of a decode batch on a GPU, as a node of a CUDA graph in front of the attention of all layers.
//
// In front of this file: gpu.cuh, async.cuh, the form of the table (namespace `table`), table.h, cuts.h, the
// struct `PlanParams`, the constants of `cuts` (THREADS, GROUP query heads of a KV head, MAX_KEYS, MOST_ROWS: packed rows of a request).
// Launch: one CTA of THREADS threads; shared memory: ends [nodes + 1], keys [limit + 1], int64 each.
// A node counts as its tiles, but at most `most_tiles`: what a window can see of any context.
// It copies qo_indptr into the workspace, writes the tree of shared nodes, decides which of these a launch in front does and
// cuts them into items for the `front` CTAs of that, and sets the status word where either is wrong: then no unit is planned.

namespace cuts {

TW_INLINE int64_t length_of(const PlanParams& p, int node) {
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
// request has more than MOST_ROWS.
TW_INLINE bool copy_rows(const PlanParams& p, int thread) {
  bool good = true;
  for (int r = thread; r <= p.requests; r += THREADS) {
    const int at = p.qo_from[r], before = r ? p.qo_from[r - 1] : 0;
    good &= r ? at >= before && (at - before) * static_cast<int64_t>(GROUP) <= MOST_ROWS : at == 0;
    good &= at >= 0 && at <= p.max_tokens;
    p.qo_indptr[r] = at;
  }
  return good;
}

// The nodes of one level, `first` the first of them; whether they divide the requests and the nodes of the
// level before, whose indptr is `outer` [outer_count + 1].
TW_INLINE bool write_level(const PlanParams& p, const int32_t* indptr, int count, int first, int level, const int32_t* outer, int outer_count, int thread) {
  bool good = true;
  for (int i = thread; i < count; i += THREADS) {
    tw::Node node{indptr ? indptr[i] : i, indptr ? indptr[i + 1] : i + 1, 0, level, -1, -1, 0, 0, 0};
    good &= node.begin <= node.end && (i > 0 || node.begin == 0) && (i + 1 < count || node.end == p.requests);
    if (outer && node.begin < node.end) {
      int low = 0;  // the last outer node that begins at or before this one
      for (int high = outer_count - 1; low < high;) {
        const int middle = low + (high - low + 1) / 2;
        if (outer[middle] <= node.begin) low = middle; else high = middle - 1;
      }
      good &= outer_count > 0 && node.end <= outer[low + 1];
      const int64_t base = p.nodes[first - outer_count + low].base + length_of(p, first - outer_count + low);
      good &= base + length_of(p, first + i) <= MAX_KEYS;
      node.base = static_cast<int32_t>(base <= MAX_KEYS ? base : MAX_KEYS);
      node.outer = first - outer_count + low;  // until it is linked
    }
    p.nodes[first + i] = node;
  }
  return good;
}

TW_INLINE int64_t queries_of(const PlanParams& p, const tw::Node& node) {
  return p.qo_from ? p.qo_indptr[node.end] - p.qo_indptr[node.begin] : node.end - node.begin;
}

// Which of the shared nodes a launch in front does, and the links of all. `sums`: a word for each warp.
TW_INLINE void choose(const PlanParams& p, int64_t* sums, int thread) {
  const int shared = p.node_count - p.requests;
  int64_t gains = 0;
  for (int n = thread; n < shared; n += THREADS) {
    tw::Node& node = p.nodes[n];
    const int64_t gain = gain_of(length_of(p, n), node.end - node.begin, queries_of(p, node));
    node.chunks = gain > 0;
    gains += gain > 0 ? gain : 0;
  }
  for (int step = 1; step < 32; step *= 2) gains += __shfl_xor_sync(0xffffffffu, gains, step);
  if (thread % 32 == 0) sums[thread / 32] = gains;
  __syncthreads();
  for (int w = 1; w < THREADS / 32; ++w) gains += sums[(thread / 32 + w) % (THREADS / 32)];
  const bool any = pays(gains, p.head_blocks, p.limit);
  for (int level = 0; level < table::LEVELS; ++level) {
    for (int n = thread; n < p.node_count; n += THREADS) {
      tw::Node& node = p.nodes[n];
      if (node.level != level) continue;
      const tw::Node* outer = node.outer < 0 ? nullptr : p.nodes + node.outer;
      node.chunks = any && node.chunks;
      if (outer) node.joined = outer->chunks ? node.outer : outer->joined;
      if (outer && outer->chunks) node.outer = outer->outer;
    }
    __syncthreads();
  }
}

// Two numbers of each thread become the sums of those of the threads before; returns that of the second of all
// threads. `sums`: two words for each warp.
TW_INLINE int64_t sum_before(int64_t (&own)[2], int64_t* sums, int thread) {
  constexpr int WARPS = THREADS / 32;
  const int lane = thread % 32, warp = thread / 32;
  int64_t before[2] = {own[0], own[1]}, all = 0;  // an inclusive scan over the warp, then over the warps
  for (int i = 0; i < 2; ++i) {
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, before[i], step);
      if (lane >= step) before[i] += other;
    }
    if (lane == 31) sums[i * WARPS + warp] = before[i];
    own[i] = before[i] - own[i];
  }
  __syncthreads();
  for (int w = 0; w < WARPS; ++w) {
    for (int i = 0; i < 2; ++i) own[i] += w < warp ? sums[i * WARPS + w] : 0;
    all += sums[WARPS + w];
  }
  __syncthreads();
  return all;
}

// Items of the nodes that the launch in front does, and rows of their states: first numbers, and chunks.
TW_INLINE void cut_shared(const PlanParams& p, int64_t* sums, int thread) {
  const int shared = p.node_count - p.requests, share = (p.node_count + THREADS - 1) / THREADS;
  const int begin = thread * share, end = begin + share < p.node_count ? begin + share : p.node_count;
  auto items_of = [&](int n) { return n < shared && p.nodes[n].chunks ? (queries_of(p, p.nodes[n]) + BLOCK - 1) / BLOCK * p.kv_heads : 0; };
  auto tiles = [&](int n) { return (length_of(p, n) + TILE - 1) / TILE; };
  int64_t tiles_of_all[2] = {}, before[2] = {};  // items and rows of states
  for (int n = begin; n < end; ++n) tiles_of_all[1] += items_of(n) * tiles(n);
  const int64_t all = sum_before(tiles_of_all, sums, thread);
  for (int n = begin; n < end; ++n) {
    tw::Node& node = p.nodes[n];
    node.chunks = items_of(n) > 0 ? static_cast<int32_t>(chunks_of(tiles(n), all, p.front)) : 0;
    before[0] += items_of(n) * node.chunks;
    before[1] += queries_of(p, node) * node.chunks;
  }
  sum_before(before, sums, thread);
  for (int n = begin; n < end; ++n) {
    tw::Node& node = p.nodes[n];
    node.item = static_cast<int32_t>(before[0]);
    node.row = static_cast<int32_t>(before[1]);
    before[0] += items_of(n) * node.chunks;
    before[1] += queries_of(p, node) * node.chunks;
  }
  __syncthreads();
}

// The tiles of a unit of a node. A node without keys costs a tile: its result is written.
TW_INLINE int64_t unit_tiles(const PlanParams& p, int n) {
  if constexpr (table::LEVELS == 1) return tiles_of(length_of(p, n));
  int64_t tiles = (length_of(p, n) + TILE - 1) / TILE;
  for (int at = n < p.node_count - p.requests ? -1 : p.nodes[n].outer; at >= 0; at = p.nodes[at].outer)
    tiles += (length_of(p, at) + TILE - 1) / TILE;
  return tiles < 1 ? 1 : tiles;
}

// Units of a node.
TW_INLINE int64_t units_of(const PlanParams& p, int n) {
  if constexpr (table::LEVELS == 1) return p.head_blocks;
  return n >= p.node_count - p.requests && queries_of(p, p.nodes[n]) > 0 ? p.head_blocks : 0;
}

}  // namespace cuts

extern "C" __global__ void __launch_bounds__(cuts::THREADS, 1) plan_cuts(const __grid_constant__ PlanParams p) {
  extern __shared__ __align__(16) int64_t ends[];
  __shared__ int64_t sums[2 * cuts::THREADS / 32];
  const int thread = threadIdx.x;
  int64_t* keys = ends + p.node_count + 1;
  tw::start_next_launch();
  tw::wait_for_previous_launch();
  int wrong = p.qo_from && !cuts::copy_rows(p, thread) ? 1 : 0;
  if constexpr (table::LEVELS > 1) {
    const int32_t* outer = nullptr;
    int first = 0, outer_count = 0;
    for (int level = 0; level < table::LEVELS; ++level) {
      const bool own = level == table::LEVELS - 1;
      const int32_t* indptr = own ? nullptr : (&p.shared_0)[level];
      const int count = own ? p.requests : static_cast<int>((&p.count_0)[level]);
      if (!cuts::write_level(p, indptr, count, first, level, outer, outer_count, thread)) wrong = 2;
      first += count;
      outer = indptr;
      outer_count = count;
      __syncthreads();
    }
    if (!__syncthreads_or(wrong)) {
      cuts::choose(p, sums, thread);
      cuts::cut_shared(p, sums, thread);
    }
  }
  const bool none = __syncthreads_or(wrong);
  if (wrong) *p.status = wrong;
  const int share = (p.node_count + cuts::THREADS - 1) / cuts::THREADS;
  const int begin = thread * share < p.node_count ? thread * share : p.node_count;
  const int end = begin + share < p.node_count ? begin + share : p.node_count;
  int64_t own[2] = {};  // the cost of this thread's nodes, and their tiles
  int64_t unit = none || p.node_count == 0 ? 0 : cuts::unit_tiles(p, p.node_count - 1);
  unit = cuts::cost_of(unit < p.most_tiles ? unit : p.most_tiles);  // of the last request; those of others may differ
  bool differ = false;
  for (int n = begin; n < end; ++n) {
    int64_t tiles = cuts::unit_tiles(p, n);
    tiles = tiles < p.most_tiles ? tiles : p.most_tiles;
    const int64_t units = none ? 0 : cuts::units_of(p, n);
    ends[n + 1] = units * cuts::cost_of(tiles);
    differ |= units > 0 && cuts::cost_of(tiles) != unit;
    own[0] += ends[n + 1];
    own[1] += units * tiles;
  }
  const int64_t all_tiles = cuts::sum_before(own, sums, thread);
  int64_t before = own[0];
  if (thread == 0) ends[0] = 0;
  for (int n = begin; n < end; ++n) {
    before += ends[n + 1];
    ends[n + 1] = before;
  }
  differ = __syncthreads_or(differ);
  const int64_t total = ends[p.node_count], count = cuts::count_of(all_tiles, differ || total == 0 ? 0 : total / unit, p.limit);
  for (int k = thread; k <= p.limit; k += cuts::THREADS) {
    int64_t key = cuts::key(p.node_count, 0, 0);
    if (k < count && total > 0) {
      const int64_t at = total * k / count, node = cuts::bound_in<true>(ends, p.node_count + 1, at) - 1;
      key = cuts::key_of(ends, node, cuts::units_of(p, static_cast<int>(node)), at);
    }
    keys[k] = key;
  }
  __syncthreads();
  for (int k = thread; k <= p.limit; k += cuts::THREADS) p.cuts[k] = cuts::cut_of(keys, k < count ? count : k, k);
}
