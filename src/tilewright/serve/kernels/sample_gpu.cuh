// The sampler on a GPU: a row by one CTA, whose warps are the parts. Included after gpu.cuh, async.cuh and
// sample.h. Rows stay in memory of the GPU; a row of size 0 is left alone.
namespace sample {

constexpr int WARPS = THREADS / 32;
constexpr uint32_t ALL = 0xffffffffu;

struct Cta {
  static constexpr int lanes = THREADS, parts = WARPS, part_lanes = 32;
  Measure* of_parts;
  Key* few_keys;
  uint32_t* few_weights;
  int32_t* count;
  Measure* of_warps;  // twice WARPS, written in turns: one barrier is enough
  int lane, part, part_lane;
  mutable int turn;

  SAMPLE_FN void sync() const { __syncthreads(); }
  SAMPLE_FN void begin() const {
    if (lane == 0) *count = 0;
    __syncthreads();
  }
  SAMPLE_FN int32_t next() const { return atomicAdd(count, 1); }
  // What each warp has: of warp `part_lane`.
  SAMPLE_FN Measure of_all(const Measure& mine) const {
    Measure* words = of_warps + (turn ^= WARPS);
    if (part_lane == 0) words[part] = mine;
    __syncthreads();
    return words[part_lane];
  }
  SAMPLE_FN Key max(Key x) const {
    return __reduce_max_sync(ALL, of_all({__reduce_max_sync(ALL, x), 0, 0}).least);
  }
  SAMPLE_FN Measure part_sum(const Measure& m) const {  // weights in halves of 26 bits, whose sums fit
    const uint32_t low = __reduce_add_sync(ALL, static_cast<uint32_t>(m.weight) & (1u << 26) - 1);
    const uint32_t high = __reduce_add_sync(ALL, static_cast<uint32_t>(m.weight >> 26));
    return {m.least, __reduce_add_sync(ALL, m.count), low + (uint64_t{high} << 26)};
  }
  SAMPLE_FN Measure sum(const Measure& m) const { return part_sum(of_all(part_sum(m))); }
  SAMPLE_FN uint64_t prefix(uint64_t x) const {
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(ALL, x, step);
      x += part_lane >= step ? other : 0;
    }
    return x;
  }
  SAMPLE_FN uint64_t of(uint64_t x, int lane_of_part) const { return __shfl_sync(ALL, x, lane_of_part); }
  SAMPLE_FN int first(bool is_one) const { return __ffs(static_cast<int>(__ballot_sync(ALL, is_one))) - 1; }
};

}  // namespace sample

extern "C" __global__ void __launch_bounds__(sample::THREADS) sample_rows(const __grid_constant__ SampleParams p) {
  using namespace sample;
  __shared__ Measure of_parts[PARTS], of_warps[2 * WARPS];
  __shared__ Key few_keys[FEW];
  __shared__ uint32_t few_weights[FEW];
  __shared__ int32_t count;
  tw::start_next_launch();
  tw::wait_for_previous_launch();
  const int seat = blockIdx.x, lane = threadIdx.x;
  SampleRow& row = p.rows[seat];
  const int32_t size = row.size;
  if (size == 0) return;
  const Cta team = {of_parts, few_keys, few_weights, &count, of_warps, lane, lane / 32, lane % 32, 0};
  Key* keys = p.scores + int64_t{2} * seat * size;
  sample::sample(team, Scores{keys, reinterpret_cast<uint32_t*>(keys + size), size}, row);
  advance(team, row);
  if (lane) return;
  p.drawn[seat] = row.token;
  if (row.token >= 0) p.tokens[seat] = row.token;  // else the likeliest: the next step reads it
}
