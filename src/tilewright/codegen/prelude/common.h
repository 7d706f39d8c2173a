// The functions that CPU and GPU code share: minimum and maximum, quotients, remainders, shifts.
//
// cpu.h and gpu.cuh include this file inside namespace tw, after TW_INLINE, vec, floor and
// remainder_of, which differ between them.

// The stride of a dense array: the constant `packed_stride` of an array without gaps, or, compiled
// with TW_STRIDED, the stride that the caller passes at run time.
#ifdef TW_STRIDED
#define TW_STRIDE(runtime_stride, packed_stride) (runtime_stride)
#else
#define TW_STRIDE(runtime_stride, packed_stride) INT64_C(packed_stride)
#endif

// A NaN on either side is the result, as in NumPy.
template <class T>
TW_INLINE T max(T a, T b) { return a > b ? a : (a != a ? a : b); }
template <class T>
TW_INLINE T min(T a, T b) { return a < b ? a : (a != a ? a : b); }

// Quotients and remainders are NumPy's: rounded down, a remainder has the sign of the divisor, and by
// infinity it is the dividend or infinity.
template <class T>
TW_INLINE T real_mod(T a, T b) {
  T r = remainder_of(a, b);
  if (r == 0) return b < 0 ? -T(0) : T(0);
  return (r < 0) != (b < 0) ? r + b : r;
}
template <class T>
TW_INLINE T real_div(T a, T b) {
  if (b == 0) return a / b;
  T r = remainder_of(a, b), q = (a - r) / b;
  if (r != 0 && (r < 0) != (b < 0)) q -= 1;
  if (q == 0) return T(0) * (a / b);  // with the sign of a / b
  T low = floor(q);
  return q - low > T(0.5) ? low + 1 : low;
}
template <class T>
TW_INLINE T floor_div(T a, T b) {  // by 0: 0, as NumPy has it; the least number by -1: itself
  if constexpr (T(0.5) != T(0)) return real_div(a, b);
  else {
    if (b == 0) return 0;
    if (T(-1) < T(0) && b == T(-1)) return static_cast<T>(0 - static_cast<unsigned long long>(a));
    T q = a / b;
    return q * b != a && ((a < 0) != (b < 0)) ? q - 1 : q;
  }
}
template <class T>
TW_INLINE T floor_mod(T a, T b) {
  if constexpr (T(0.5) != T(0)) return real_mod(a, b);
  else {
    if (b == 0 || (T(-1) < T(0) && b == T(-1))) return 0;
    T r = a % b;
    return r != 0 && ((r < 0) != (b < 0)) ? r + b : r;
  }
}
// A count that is negative, or as large as the width, shifts all bits out: the result is 0, or the sign.
template <class T>
TW_INLINE T shift_left(T a, T count) {
  return count >= T(0) && count < T(8 * sizeof(T)) ? static_cast<T>(a << count) : T(0);
}
template <class T>
TW_INLINE T shift_right(T a, T count) {
  return count >= T(0) && count < T(8 * sizeof(T)) ? static_cast<T>(a >> count) : static_cast<T>(a < T(0) ? -1 : 0);
}
template <class T, int N>
TW_INLINE vec<T, N> vshift_left(vec<T, N> a, vec<T, N> b) {
  for (int l = 0; l < N; ++l) a[l] = shift_left<T>(a[l], b[l]);
  return a;
}
template <class T, int N>
TW_INLINE vec<T, N> vshift_right(vec<T, N> a, vec<T, N> b) {
  for (int l = 0; l < N; ++l) a[l] = shift_right<T>(a[l], b[l]);
  return a;
}
