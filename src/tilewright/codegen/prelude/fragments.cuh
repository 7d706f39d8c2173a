// Fragments as values: what a warp computes from the sums of tile operations, in registers.
#pragma once

namespace tw {

struct fragment_rows { float v[2]; };  // a value for each row of a fragment: rows g and g + 8

// Two sums of 8 columns side by side, rounded, are an operand of the next operation.
// Reference: PTX ISA, fragments of mma.m16n8k16: the sum and the operand a have the same lanes.
template <class Kind>
TW_INLINE void pack_fragment(fragment_a& to, const fragment<16>& from) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to.v[i] = pack<Kind>(from.v[i >> 1][(i & 1) * 2], from.v[i >> 1][(i & 1) * 2 + 1]);
}

// The larger and the smaller number by one instruction; NaN if one is.
#define TW_ONE(op)                                                          \
  template <> TW_INLINE float op<float>(float a, float b) {                 \
    float y;                                                                \
    asm(#op ".NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));             \
    return y;                                                               \
  }
TW_ONE(max)
TW_ONE(min)
#undef TW_ONE

}  // namespace tw
