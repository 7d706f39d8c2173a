// The pages of each request (and KV head) that have the highest scores, written as a page table.
//
// The last page of a request is always kept. Of the others those with the highest scores, of equal ones the
// first; NaN counts as −Inf. They are written in the order of the request, so that a budget of all pages
// writes its own row. attention/select.py has the same in NumPy.
//
// In front of this file: gpu.cuh, async.cuh, the constant THREADS of `select`, the struct `Params`, the barrier
// id BARRIER. Units: (request, KV head that has pages of its own), in that order; whole warps.

namespace select {

constexpr int WARPS = THREADS / 32, DIGIT = 8, BINS = 1 << DIGIT, EACH = BINS / 32;
constexpr uint32_t ALL = 0xffffffffu;

// A score as an unsigned number that sorts like it; −0 and 0 are equal.
TW_INLINE uint32_t key_of(float score) {
  if (score == 0.0f) score = 0.0f;
  const uint32_t bits = score != score ? 0xff800000u : __float_as_uint(score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct Shared {
  int bins[BINS];                             // keys with each digit
  int digit, higher;                          // of the bound, and how many keys have a higher one
  int above[WARPS], equal[WARPS];  // keys of each warp's part of a row
};

// The digit of the key with the `wanted`-th highest one, and how many keys have a higher digit. For one warp:
// lane 0 has the highest bins.
TW_INLINE void find_digit(Shared& shared, int wanted, int lane) {
  const int* bins = shared.bins + (31 - lane) * EACH;
  int own = 0;
  for (int i = 0; i < EACH; ++i) own += bins[i];
  int higher = own;  // an inclusive scan, then without this lane's own
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(ALL, higher, step);
    if (lane >= step) higher += other;
  }
  higher -= own;
  if (higher >= wanted || higher + own < wanted) return;
  int digit = EACH - 1;
  for (; higher + bins[digit] < wanted; --digit) higher += bins[digit];
  shared.digit = (31 - lane) * EACH + digit;
  shared.higher = higher;
}

TW_INLINE void sync() { tw::bar_sync(BARRIER, THREADS); }

TW_INLINE void run(const Params& p, int64_t row, int thread, char*) {
  __shared__ Shared shared;
  const int request = static_cast<int>(row) / p.heads, head = static_cast<int>(row) % p.heads;
  const int lane = thread % 32, warp = thread / 32;
  const int64_t most = p.width * p.page_size;
  const float* scores = p.scores + row * p.width;
  const int32_t* from = p.table_entries + request * p.width;
  int32_t* to = p.chosen + row * p.pages;
  int64_t length = p.kv_len[request];
  length = length < 0 ? 0 : length < most ? length : most;
  const int count = static_cast<int>((length + p.page_size - 1) / p.page_size), rest = count > 0 ? count - 1 : 0;
  const int wanted = rest < p.pages ? rest : static_cast<int>(p.pages) - 1;
  uint32_t bound = 0;  // the key of the `wanted`-th highest score, digit by digit
  int equals = wanted;  // so many of the keys equal to it are kept
  for (int shift = 32 - DIGIT; shift >= 0 && 0 < wanted && wanted < rest; shift -= DIGIT) {
    for (int i = thread; i < BINS; i += THREADS) shared.bins[i] = 0;
    sync();
    for (int first = 0; first < rest; first += THREADS) {
      const int n = first + thread;
      const uint32_t key = n < rest ? key_of(scores[n]) : 0, digit = key >> shift & (BINS - 1);
      const bool counts = n < rest && static_cast<uint64_t>(key ^ bound) >> (shift + DIGIT) == 0;
      if (counts) atomicAdd(&shared.bins[digit], 1);  // of equal digits of a warp at once: ATOMS.POPC.INC
    }
    sync();
    if (warp == 0) find_digit(shared, equals, lane);
    sync();
    bound |= static_cast<uint32_t>(shared.digit) << shift;
    equals -= shared.higher;
  }
  if (wanted == 0) bound = ALL;  // above all keys
  const int share = (rest + THREADS - 1) / THREADS * 32, begin = warp * share;  // the part of this warp
  const int end = begin + share < rest ? begin + share : rest;
  int above = 0, equal = 0;
  for (int n = begin + lane; n - lane < end; n += 32) {
    const uint32_t key = n < end ? key_of(scores[n]) : 0;
    above += __popc(__ballot_sync(ALL, n < end && key > bound));
    equal += __popc(__ballot_sync(ALL, n < end && key == bound));
  }
  if (lane == 0) shared.above[warp] = above, shared.equal[warp] = equal;
  sync();
  above = equal = 0;  // now those of the warps in front
  for (int w = 0; w < warp; ++w) above += shared.above[w], equal += shared.equal[w];
  for (int n = begin + lane; n - lane < end; n += 32) {
    const uint32_t key = n < end ? key_of(scores[n]) : 0, lower = (1u << lane) - 1;
    const bool is_above = n < end && key > bound, is_equal = n < end && key == bound;
    const uint32_t aboves = __ballot_sync(ALL, is_above), same = __ballot_sync(ALL, is_equal);
    const int ties = equal + __popc(same & lower), kept = ties < equals ? ties : equals;
    if (is_above || (is_equal && ties < equals)) to[above + __popc(aboves & lower) + kept] = from[n];
    above += __popc(aboves);
    equal += __popc(same);
  }
  if (thread == 0 && count > 0) to[wanted] = from[rest];
  if (thread == 0 && head == 0) p.chosen_len[request] = static_cast<int32_t>(length - static_cast<int64_t>(rest - wanted) * p.page_size);
}

}  // namespace select
