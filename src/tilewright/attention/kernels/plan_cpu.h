// Cuts of a decode batch on the host. In front of this file: cpu.h and cuts.h.

// Writes the cuts of `requests` requests with `lengths` keys each; returns the number of ranges. `ends`
// [requests + 1] and `keys` [limit + 1] are scratch; `out` holds limit + 1 cuts.
// `requests` is at least 1.
extern "C" __attribute__((visibility("default"))) int64_t plan_cuts(
    const int64_t* lengths, int64_t requests, int64_t groups, int64_t limit, int64_t* ends, int64_t* keys, Cut* out) {
  ends[0] = 0;
  for (int64_t r = 0; r < requests; ++r) ends[r + 1] = ends[r] + groups * cuts::cost_of(cuts::tiles_of(lengths[r]));
  const int64_t count = cuts::count_of(ends[requests], requests * groups, limit);
  int64_t request = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t at = ends[requests] * k / count;
    while (ends[request + 1] <= at) ++request;
    keys[k] = cuts::key_of(ends, requests, groups, request, at);
  }
  keys[count] = (requests * groups) << 32;
  for (int64_t k = 0; k <= count; ++k) out[k] = cuts::cut_of(keys, count, groups, k);
  return count;
}
