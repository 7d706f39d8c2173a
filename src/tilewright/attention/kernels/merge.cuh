// States of attention over disjoint keys become one; a warp a row (token, head).
//
// In front of this file: gpu.cuh, the constants of `merge` (DIM elements of a row of o, MAX_STATES, WARPS
// of a CTA; the type Element), `load` and `store` of an Element as float, the struct `Params`.
// Units: one warp for each of `rows` rows. Each element of a row is read of every state before it is
// written, so that the result may be one of the states. Where lse is −inf, o is not read.

namespace merge {

using tw::lowest;
// The states' arrays are fields o0 … and lse0 … of the parameters, one after the other.
TW_INLINE const Element* o_of(const Params& p, int i) { return (&p.o0)[i]; }
TW_INLINE const float* lse_of(const Params& p, int i) { return (&p.lse0)[i]; }

TW_INLINE void run(const Params& p, int64_t unit, int thread, char*) {
  const int lane = thread & 31;  // so that the compiler knows that it is not below 0
  const int64_t row = unit * WARPS + thread / 32;
  if (row >= p.rows) return;
  const int count = p.mask && !p.mask[row / p.heads] ? 1 : p.states;
  float weights[MAX_STATES], largest = lowest(), total = 0.0f;
#pragma unroll
  for (int i = 0; i < MAX_STATES; ++i) {
    weights[i] = i < count ? lse_of(p, i)[row] : lowest();
    largest = fmaxf(largest, weights[i]);
  }
  const float base = largest == lowest() ? 0.0f : largest;
#pragma unroll
  for (int i = 0; i < MAX_STATES; ++i) {
    weights[i] = weights[i] == lowest() ? 0.0f : tw::exp(weights[i] - base);
    total += weights[i];
  }
  __syncwarp();  // lse of this row has been read by all lanes
  if (lane == 0) p.out_lse[row] = total == 0.0f ? lowest() : base + tw::log(total);
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  for (int d = lane; d < DIM; d += 32) {
    const int64_t at = row * DIM + d;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_STATES; ++i)
      if (i < count && weights[i] != 0.0f) sum += weights[i] * load(o_of(p, i)[at]);
    store(p.out_o + at, sum * scale);
  }
}

}  // namespace merge
