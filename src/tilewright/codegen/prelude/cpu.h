// Runtime library of generated C++: vectors of N lanes, conversions, mathematics, searches.
//
// No header of the C++ library is included: it would cost more to compile than the kernel.
// Vectors are those of GCC and Clang (vector_size); wider ones than the CPU has are cut by the compiler.
#include <stdint.h>

namespace tw {

#define TW_INLINE static inline __attribute__((always_inline))

template <class T, int N>
struct vec_of {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T loose __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int N>
using vec = typename vec_of<T, N>::type;

template <class T, class U> struct same { static constexpr bool value = false; };
template <class T> struct same<T, T> { static constexpr bool value = true; };

// A vector of bool has bytes that are 0 or 1, as memory has.
template <int N>
struct vec_of<bool, N> : vec_of<int8_t, N> {};

template <int Bytes> struct int_of;
template <> struct int_of<1> { using type = int8_t; };
template <> struct int_of<2> { using type = int16_t; };
template <> struct int_of<4> { using type = int32_t; };
template <> struct int_of<8> { using type = int64_t; };

// -- memory ------------------------------------------------------------------------------------

template <class T, int N>
TW_INLINE vec<T, N> load(const T* p) {
  return *reinterpret_cast<const typename vec_of<T, N>::loose*>(p);
}
template <class T, int N>
TW_INLINE void store(T* p, vec<T, N> v) {
  *reinterpret_cast<typename vec_of<T, N>::loose*>(p) = v;
}
template <class T, int N, class I>
TW_INLINE vec<T, N> gather(const T* p, I index) {
  vec<T, N> out;
  for (int l = 0; l < N; ++l) out[l] = p[index[l]];
  return out;
}
template <class T, int N, class I>
TW_INLINE void scatter(T* p, I index, vec<T, N> v) {
  for (int l = 0; l < N; ++l) p[index[l]] = v[l];
}
template <class T, int N>
TW_INLINE vec<T, N> splat(T x) {
  if constexpr (same<T, bool>::value) return splat<int8_t, N>(x);
  else return x - vec<T, N>{};
}
template <class T, int N>
TW_INLINE vec<T, N> ramp(T base) {
  vec<T, N> out;
  for (int l = 0; l < N; ++l) out[l] = base + static_cast<T>(l);
  return out;
}

// -- conversions ---------------------------------------------------------------------------------

TW_INLINE float bits_to_float(uint32_t b) {
  float f;
  __builtin_memcpy(&f, &b, 4);
  return f;
}
TW_INLINE uint32_t float_to_bits(float f) {
  uint32_t b;
  __builtin_memcpy(&b, &f, 4);
  return b;
}

TW_INLINE float from_bfloat16(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
TW_INLINE uint16_t to_bfloat16(float f) {  // nearest, ties to even; NaN stays NaN
  uint32_t b = float_to_bits(f);
  if (f != f) return 0x7fc0;
  return static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

TW_INLINE float from_float16(uint16_t x) {
#ifdef __F16C__
  typedef short h8 __attribute__((vector_size(16)));
  h8 v = {static_cast<short>(x)};
  return __builtin_ia32_vcvtph2ps(v)[0];
#else
  uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest << 13));
  float f = bits_to_float((rest << 13)) * 0x1p112f;  // exact, subnormals too
  return bits_to_float(float_to_bits(f) | sign);
#endif
}
TW_INLINE uint16_t to_float16(float f) {
#ifdef __F16C__
  typedef float f4 __attribute__((vector_size(16)));
  f4 v = {f};
  return static_cast<uint16_t>(__builtin_ia32_vcvtps2ph(v, 0)[0]);
#else
  uint32_t b = float_to_bits(f), sign = (b >> 16) & 0x8000u, rest = b & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {  // subnormal: let the adder round
    float t = bits_to_float(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(t) - 0x3f000000u));
  }
  rest += 0xfffu + ((rest >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u) >> 13));
#endif
}

template <int N>
TW_INLINE vec<float, N> from_bfloat16(vec<uint16_t, N> x) {
  vec<uint32_t, N> wide = __builtin_convertvector(x, vec<uint32_t, N>) << 16;
  return reinterpret_cast<vec<float, N>&>(wide);
}
template <int N>
TW_INLINE vec<uint16_t, N> to_bfloat16(vec<float, N> f) {
  vec<uint16_t, N> out;
  for (int l = 0; l < N; ++l) out[l] = to_bfloat16(f[l]);
  return out;
}
template <int N>
TW_INLINE vec<float, N> from_float16(vec<uint16_t, N> x) {
#ifdef __AVX512F__
  if constexpr (N == 16) {
    typedef short h16 __attribute__((vector_size(32)));
    return __builtin_ia32_vcvtph2ps512_mask((h16)x, vec<float, 16>{}, -1, 4);
  }
#endif
  vec<float, N> out;
  for (int l = 0; l < N; ++l) out[l] = from_float16(x[l]);
  return out;
}
template <int N>
TW_INLINE vec<uint16_t, N> to_float16(vec<float, N> f) {
  vec<uint16_t, N> out;
  for (int l = 0; l < N; ++l) out[l] = to_float16(f[l]);
  return out;
}

// Bytes to 32 bits: GCC 12 compiles __builtin_convertvector to scalar code here.
template <int N, bool Signed, class V>
TW_INLINE vec<int32_t, N> widen_bytes(V v) {
  typedef char b16 __attribute__((vector_size(16)));
#ifdef __AVX512F__
  if constexpr (N == 16) {
    if constexpr (Signed) return (vec<int32_t, 16>)__builtin_ia32_pmovsxbd512_mask((b16)v, vec<int32_t, 16>{}, -1);
    else return (vec<int32_t, 16>)__builtin_ia32_pmovzxbd512_mask((b16)v, vec<int32_t, 16>{}, -1);
  }
#endif
#ifdef __AVX2__
  if constexpr (N == 8) {
    b16 low = {};
    __builtin_memcpy(&low, &v, 8);
    if constexpr (Signed) return (vec<int32_t, 8>)__builtin_ia32_pmovsxbd256(low);
    else return (vec<int32_t, 8>)__builtin_ia32_pmovzxbd256(low);
  }
  if constexpr (N == 16) {
    vec<int8_t, 8> half[2];
    __builtin_memcpy(half, &v, 16);
    vec<int32_t, 8> wide[2] = {widen_bytes<8, Signed>(half[0]), widen_bytes<8, Signed>(half[1])};
    vec<int32_t, 16> out;
    __builtin_memcpy(&out, wide, 64);
    return out;
  }
#endif
  return __builtin_convertvector(v, vec<int32_t, N>);
}

template <class To, int N, class V>
TW_INLINE vec<To, N> convert(V v) {
  if constexpr (same<To, int32_t>::value && same<V, vec<int8_t, N>>::value) return widen_bytes<N, true>(v);
  else if constexpr (same<To, int32_t>::value && same<V, vec<uint8_t, N>>::value) return widen_bytes<N, false>(v);
  else return __builtin_convertvector(v, vec<To, N>);
}

#include "integers.h"
template <class To, int N, class V>
TW_INLINE vec<To, N> to_integer(V x) {
  vec<To, N> out;
  for (int l = 0; l < N; ++l) out[l] = to_integer<To>(x[l]);
  return out;
}

// -- arithmetic ----------------------------------------------------------------------------------

template <class M, class V>
TW_INLINE V select(M mask, V a, V b) {
  typedef typename int_of<sizeof(V{}[0])>::type mask_t __attribute__((vector_size(sizeof(V))));
  return __builtin_convertvector(mask, mask_t) ? a : b;
}
// The lanes of a comparison, or of any numbers, as a vector of bool: whether each is not 0.
template <int N, class M>
TW_INLINE vec<bool, N> mask(M m) { return __builtin_convertvector(m != 0, vec<bool, N>) & 1; }
template <class T, int N>
TW_INLINE vec<T, N> vmax(vec<T, N> a, vec<T, N> b) { return ((a > b) | (a != a)) ? a : b; }
template <class T, int N>
TW_INLINE vec<T, N> vmin(vec<T, N> a, vec<T, N> b) { return ((a < b) | (a != a)) ? a : b; }


// Cephes' polynomial for 2^f on [-1/2, 1/2]; error below 2 ulp over the whole range.
template <int N>
TW_INLINE vec<float, N> exp(vec<float, N> x) {
  using F = vec<float, N>;
  using I = vec<int32_t, N>;
  F lo = splat<float, N>(-87.33654f), hi = splat<float, N>(88.72283f);
  F t = x < lo ? lo : (x > hi ? hi : x);
  F shifted = t * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
  F n = shifted - 12582912.0f;
  F r = t - n * 0.693359375f + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  I e = __builtin_convertvector(n, I);
  I half = e >> 1;  // two steps, so that 2^128 and subnormals come out right
  I one = (half + 127) << 23, two = (e - half + 127) << 23;
  F result = p * reinterpret_cast<F&>(one) * reinterpret_cast<F&>(two);
  result = x < splat<float, N>(-103.97f) ? F{} : result;
  result = x > hi ? splat<float, N>(__builtin_inff()) : result;
  return x != x ? x : result;
}
TW_INLINE float exp(float x) { return exp<1>(vec<float, 1>{x})[0]; }
TW_INLINE double exp(double x) { return __builtin_exp(x); }
TW_INLINE float exp2(float x) { return __builtin_exp2f(x); }

#define TW_LANEWISE(name, single, wide)                              \
  TW_INLINE float name(float x) { return single; }                   \
  TW_INLINE double name(double x) { return wide; }                   \
  template <int N>                                                   \
  TW_INLINE vec<float, N> name(vec<float, N> v) {                    \
    for (int l = 0; l < N; ++l) { float x = v[l]; v[l] = single; }   \
    return v;                                                        \
  }                                                                  \
  template <int N>                                                   \
  TW_INLINE vec<double, N> name(vec<double, N> v) {                  \
    for (int l = 0; l < N; ++l) { double x = v[l]; v[l] = wide; }    \
    return v;                                                        \
  }
TW_LANEWISE(log, __builtin_logf(x), __builtin_log(x))
TW_LANEWISE(sqrt, __builtin_sqrtf(x), __builtin_sqrt(x))
TW_LANEWISE(rsqrt, 1.0f / __builtin_sqrtf(x), 1.0 / __builtin_sqrt(x))
TW_LANEWISE(tanh, __builtin_tanhf(x), __builtin_tanh(x))
TW_LANEWISE(sin, __builtin_sinf(x), __builtin_sin(x))
TW_LANEWISE(cos, __builtin_cosf(x), __builtin_cos(x))
TW_LANEWISE(floor, __builtin_floorf(x), __builtin_floor(x))
#undef TW_LANEWISE
template <int N>
TW_INLINE vec<double, N> exp(vec<double, N> v) {
  for (int l = 0; l < N; ++l) v[l] = __builtin_exp(v[l]);
  return v;
}
template <class T>
TW_INLINE T abs(T x) { return x < T{} ? -x : x; }

TW_INLINE float remainder_of(float a, float b) { return __builtin_fmodf(a, b); }
TW_INLINE double remainder_of(double a, double b) { return __builtin_fmod(a, b); }
#include "common.h"
// Vectors: a divisor that would trap is replaced by 1, so that a constant divisor needs no division.
template <class T, int N>
TW_INLINE vec<T, N> vfloor_div(vec<T, N> a, vec<T, N> b) {
  if constexpr (T(0.5) != T(0)) {
    for (int l = 0; l < N; ++l) a[l] = floor_div<T>(a[l], b[l]);
    return a;
  } else {
    using V = vec<T, N>;
    auto zero = b == V{}, minus = T(-1) < T(0) ? b == splat<T, N>(T(-1)) : V{} != V{};
    V by = zero | minus ? splat<T, N>(1) : b, q = a / by, r = a - q * by;
    auto below = T(-1) < T(0) ? (r != V{}) & ((r ^ by) < V{}) : V{} != V{};
    q = below ? q - 1 : q;
    return zero ? V{} : (minus ? -a : q);
  }
}
template <class T, int N>
TW_INLINE vec<T, N> vfloor_mod(vec<T, N> a, vec<T, N> b) {
  if constexpr (T(0.5) != T(0)) {
    for (int l = 0; l < N; ++l) a[l] = floor_mod<T>(a[l], b[l]);
    return a;
  } else {
    return b == vec<T, N>{} ? b : a - vfloor_div<T, N>(a, b) * b;
  }
}
// -- reductions over lanes: halves folded onto each other, always in the same order -------------

#define TW_FOLD(name, expression)                                    \
  template <class T, int N>                                          \
  TW_INLINE T name(vec<T, N> v) {                                    \
    if constexpr (N == 1) {                                          \
      return v[0];                                                   \
    } else {                                                         \
      vec<T, N / 2> a, b;                                            \
      __builtin_memcpy(&a, &v, sizeof(a));                           \
      __builtin_memcpy(&b, reinterpret_cast<char*>(&v) + sizeof(a), sizeof(b)); \
      return name<T, N / 2>(expression);                             \
    }                                                                \
  }
TW_FOLD(fold_sum, a + b)
TW_FOLD(fold_prod, a * b)
TW_FOLD(fold_max, (vmax<T, N / 2>(a, b)))
TW_FOLD(fold_min, (vmin<T, N / 2>(a, b)))
#undef TW_FOLD

// -- searches --------------------------------------------------------------------------------------

// The position of key in ascending keys[lo, hi), or -1.
template <class I, class K>
TW_INLINE I find(const K* keys, I lo, I hi, K key) {
  I end = hi;
  while (lo < hi) {
    I mid = lo + (hi - lo) / 2;
    if (keys[mid] < key) lo = mid + 1; else hi = mid;
  }
  return lo < end && keys[lo] == key ? lo : static_cast<I>(-1);
}
// The last position of ascending keys[lo, hi) whose key is not greater.
template <class I, class K>
TW_INLINE I find_last(const K* keys, I lo, I hi, K key) {
  while (lo < hi) {
    I mid = lo + (hi - lo) / 2;
    if (keys[mid] <= key) lo = mid + 1; else hi = mid;
  }
  return lo - 1;
}

// -- updates that other threads may make too ----------------------------------------------------

template <class T>
TW_INLINE void atomic_max(T* p, T x) {
  T old;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  while (true) {
    T next = max(old, x);
    if (__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
  }
}
template <class T>
TW_INLINE void atomic_min(T* p, T x) {
  T old;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  while (true) {
    T next = min(old, x);
    if (__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
  }
}
template <class T>
TW_INLINE void atomic_sum(T* p, T x) {
  T old;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  while (true) {
    T next = old + x;
    if (__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
  }
}

}  // namespace tw
