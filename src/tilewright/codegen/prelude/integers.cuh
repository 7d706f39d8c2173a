// For kernels that make integers of floats. C++ leaves all that does not fit undefined; PTX saturates, but
// makes 2^63 or 2^31 of NaN where the float or the integer has 64 bits.
#pragma once
#include "gpu.cuh"

namespace tw {
#include "integers.h"

template <class To, int N, class From>
TW_INLINE vec<To, N> to_integer(const vec<From, N>& x) {
  vec<To, N> r;
  TW_EACH(N) r.v[l] = to_integer<To>(x.v[l]);
  return r;
}

}  // namespace tw
