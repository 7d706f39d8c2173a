// Cuts of a decode batch on a GPU, as a node of a CUDA graph in front of the attention of all layers.
//
// In front of this file: gpu.cuh, the form of the table (namespace `table`), cuts.h, the struct
// `PlanParams`, the constants of `cuts` (THREADS, GROUP query heads of a KV head, MAX_ROWS, MAX_KEYS).
// Launch: one CTA of THREADS threads; shared memory: ends [requests + 1], keys [limit + 1], int64 each.
// A request counts as its tiles, but at most `most_tiles`: what a window can see of any context.
// It copies qo_indptr into the workspace and sets the status word where a request has too many rows.

namespace cuts {

TW_INLINE int64_t length_of(const PlanParams& p, int request) {
  int64_t length;
  if constexpr (table::LENGTHS) {
    length = p.kv_len[request];
  } else {
    const int64_t begin = p.table_indptr[request], end = p.table_indptr[request + 1];
    length = end - (begin < 0 ? 0 : begin);
  }
  return length < 0 ? 0 : length > MAX_KEYS ? MAX_KEYS : length;
}

// Rows of q of each request, copied with what a kernel relies on: none below the one before, none
// beyond max_tokens, at most MAX_ROWS rows of a request.
TW_INLINE void copy_rows(const PlanParams& p, int thread) {
  bool good = true;
  for (int r = thread; r <= p.requests; r += THREADS) {
    const int at = p.qo_from[r], before = r ? p.qo_from[r - 1] : 0;
    good &= r ? at >= before && (at - before) * GROUP <= MAX_ROWS : at == 0;
    good &= at >= 0 && at <= p.max_tokens;
    p.qo_indptr[r] = at;
  }
  if (!__syncthreads_and(good)) {  // no query then: nothing is read or written out of bounds
    for (int r = thread; r <= p.requests; r += THREADS) p.qo_indptr[r] = 0;
    if (thread == 0) *p.status = 1;
  }
}

}  // namespace cuts

extern "C" __global__ void __launch_bounds__(cuts::THREADS, 1) plan_cuts(const __grid_constant__ PlanParams p) {
  extern __shared__ __align__(16) int64_t ends[];
  __shared__ int64_t sums[cuts::THREADS / 32];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int64_t* keys = ends + p.requests + 1;
  tw::start_next_launch();
  tw::wait_for_previous_launch();
  if (p.qo_from) cuts::copy_rows(p, thread);
  const int share = (p.requests + cuts::THREADS - 1) / cuts::THREADS;
  const int begin = thread * share < p.requests ? thread * share : p.requests;
  const int end = begin + share < p.requests ? begin + share : p.requests;
  int64_t own = 0;  // the cost of this thread's requests
  for (int r = begin; r < end; ++r) {
    const int64_t tiles = cuts::tiles_of(cuts::length_of(p, r));
    ends[r + 1] = p.groups * cuts::cost_of(tiles < p.most_tiles ? tiles : p.most_tiles);
    own += ends[r + 1];
  }
  int64_t before = own;  // an inclusive scan over the warp, then over the warps
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) sums[warp] = before;
  __syncthreads();
  before -= own;
  for (int w = 0; w < warp; ++w) before += sums[w];
  if (thread == 0) ends[0] = 0;
  for (int r = begin; r < end; ++r) {
    before += ends[r + 1];
    ends[r + 1] = before;
  }
  __syncthreads();
  const int64_t total = ends[p.requests];
  const int64_t count = cuts::count_of(total, static_cast<int64_t>(p.requests) * p.groups, p.limit);
  for (int k = thread; k <= p.limit; k += cuts::THREADS) {
    int64_t key = static_cast<int64_t>(p.requests) * p.groups << 32;
    if (k < count && p.requests > 0) {
      const int64_t at = total * k / count, request = cuts::bound_in<true>(ends, p.requests + 1, at) - 1;
      key = cuts::key_of(ends, p.requests, p.groups, request, at);
    }
    keys[k] = key;
  }
  __syncthreads();
  for (int k = thread; k <= p.limit; k += cuts::THREADS) p.cuts[k] = cuts::cut_of(keys, k < count ? count : k, p.groups, k);
}
