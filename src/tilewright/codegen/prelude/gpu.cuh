// Runtime library of generated CUDA: vectors of N lanes, loads, conversions, searches, reductions.
//
// Compiled by NVRTC, which has no host headers: the integer types are defined here. All PTX that
// Tilewright writes by hand lives in this folder. The test of this file is tests/cubin (it compiles
// for every architecture) and tests/gpu (it gives the CPU's results).
#pragma once

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#define INT64_C(x) x##ll
#define UINT64_C(x) x##ull
#define TW_INLINE __device__ __forceinline__

namespace tw {

template <class T, int N>
struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) vec {
  T v[N];
  TW_INLINE T& operator[](int l) { return v[l]; }
  TW_INLINE const T& operator[](int l) const { return v[l]; }
};

#define TW_EACH(N) _Pragma("unroll") for (int l = 0; l < N; ++l)

#define TW_VECTOR_OP(op)                                                          \
  template <class T, int N>                                                       \
  TW_INLINE vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {       \
    vec<T, N> r;                                                                  \
    TW_EACH(N) r.v[l] = a.v[l] op b.v[l];                                         \
    return r;                                                                     \
  }
TW_VECTOR_OP(+)
TW_VECTOR_OP(-)
TW_VECTOR_OP(*)
TW_VECTOR_OP(/)
TW_VECTOR_OP(%)
TW_VECTOR_OP(&)
TW_VECTOR_OP(|)
TW_VECTOR_OP(^)
TW_VECTOR_OP(<<)
TW_VECTOR_OP(>>)
#undef TW_VECTOR_OP

#define TW_VECTOR_COMPARE(op)                                                     \
  template <class T, int N>                                                       \
  TW_INLINE vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {    \
    vec<bool, N> r;                                                               \
    TW_EACH(N) r.v[l] = a.v[l] op b.v[l];                                         \
    return r;                                                                     \
  }
TW_VECTOR_COMPARE(<)
TW_VECTOR_COMPARE(<=)
TW_VECTOR_COMPARE(>)
TW_VECTOR_COMPARE(>=)
TW_VECTOR_COMPARE(==)
TW_VECTOR_COMPARE(!=)
#undef TW_VECTOR_COMPARE

template <int N>
TW_INLINE vec<bool, N> operator!(const vec<bool, N>& a) {
  vec<bool, N> r;
  TW_EACH(N) r.v[l] = !a.v[l];
  return r;
}
template <class T, int N>
TW_INLINE vec<T, N> operator-(const vec<T, N>& a) {
  vec<T, N> r;
  TW_EACH(N) r.v[l] = -a.v[l];
  return r;
}

// -- memory ------------------------------------------------------------------------------------

template <int Bytes> struct word_of;
template <> struct word_of<1> { using type = unsigned char; };
template <> struct word_of<2> { using type = unsigned short; };
template <> struct word_of<4> { using type = unsigned int; };
template <> struct word_of<8> { using type = uint2; };
template <> struct word_of<16> { using type = uint4; };

// `Unaligned`: p may not be a multiple of the vector size, so elements are accessed one by one.
template <class T, int N, bool Unaligned = false>
TW_INLINE vec<T, N> load(const T* p) {
#ifndef TW_UNALIGNED
  if constexpr (!Unaligned && sizeof(T) * N <= 16) {
    using Word = typename word_of<sizeof(T) * N>::type;
    Word w = *reinterpret_cast<const Word*>(p);
    return reinterpret_cast<vec<T, N>&>(w);
  }
#endif
  vec<T, N> r;
  TW_EACH(N) r.v[l] = p[l];
  return r;
}
// The same for memory that no thread writes during the launch: through the read-only path.
template <class T>
TW_INLINE T load_const(const T* p) { return __ldg(p); }
TW_INLINE bool load_const(const bool* p) { return __ldg(reinterpret_cast<const unsigned char*>(p)) != 0; }
template <class T, int N, bool Unaligned = false>
TW_INLINE vec<T, N> load_const(const T* p) {
#ifndef TW_UNALIGNED
  if constexpr (!Unaligned && sizeof(T) * N <= 16) {
    using Word = typename word_of<sizeof(T) * N>::type;
    Word w = __ldg(reinterpret_cast<const Word*>(p));
    return reinterpret_cast<vec<T, N>&>(w);
  }
#endif
  vec<T, N> r;
  TW_EACH(N) r.v[l] = load_const(p + l);
  return r;
}
TW_INLINE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// Zero where the condition fails: the load is predicated, and nothing is read then.
template <class T, int N, bool Unaligned = false>
TW_INLINE vec<T, N> load_const_if(bool c, const T* p) {
  vec<T, N> r = {};
  if (c) {
    if constexpr (N == 1) r.v[0] = load_const(p); else r = load_const<T, N, Unaligned>(p);
  }
  return r;
}
// Inputs: what an earlier launch may have written. Where launches overlap (TW_OVERLAPS) the read-only
// path may still hold what was there before, so the loads are plain ones.
#ifdef TW_OVERLAPS
template <class T>
TW_INLINE T load_input(const T* p) { return *p; }
template <class T, int N, bool Unaligned = false>
TW_INLINE vec<T, N> load_input(const T* p) { return load<T, N, Unaligned>(p); }
#else
template <class T>
TW_INLINE T load_input(const T* p) { return load_const(p); }
template <class T, int N, bool Unaligned = false>
TW_INLINE vec<T, N> load_input(const T* p) { return load_const<T, N, Unaligned>(p); }
#endif
template <class T, int N, bool Unaligned = false>
TW_INLINE vec<T, N> load_input_if(bool c, const T* p) {
  vec<T, N> r = {};
  if (c) {
    if constexpr (N == 1) r.v[0] = load_input(p); else r = load_input<T, N, Unaligned>(p);
  }
  return r;
}
template <class T, int N, bool Unaligned = false>
TW_INLINE void store(T* p, vec<T, N> x) {
#ifndef TW_UNALIGNED
  if constexpr (!Unaligned && sizeof(T) * N <= 16) {
    using Word = typename word_of<sizeof(T) * N>::type;
    *reinterpret_cast<Word*>(p) = reinterpret_cast<Word&>(x);
    return;
  }
#endif
  TW_EACH(N) p[l] = x.v[l];
}
template <class T, int N, class I>
TW_INLINE vec<T, N> gather(const T* p, vec<I, N> index) {
  vec<T, N> r;
  TW_EACH(N) r.v[l] = p[index.v[l]];
  return r;
}
template <class T, int N, class I>
TW_INLINE void scatter(T* p, vec<I, N> index, vec<T, N> x) {
  TW_EACH(N) p[index.v[l]] = x.v[l];
}
template <class T, int N>
TW_INLINE vec<T, N> splat(T x) {
  vec<T, N> r;
  TW_EACH(N) r.v[l] = x;
  return r;
}
template <class T, int N>
TW_INLINE vec<T, N> ramp(T base) {
  vec<T, N> r;
  TW_EACH(N) r.v[l] = base + static_cast<T>(l);
  return r;
}

// -- conversions: 16-bit floats travel as their bits ----------------------------------------------

TW_INLINE float from_bfloat16(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
TW_INLINE uint16_t to_bfloat16(float x) {
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
TW_INLINE float from_float16(uint16_t x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}
TW_INLINE uint16_t to_float16(float x) {
  uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
template <class To, int N, class From>
TW_INLINE vec<To, N> convert(const vec<From, N>& x) {
  vec<To, N> r;
  TW_EACH(N) r.v[l] = static_cast<To>(x.v[l]);
  return r;
}
#define TW_LANEWISE(name, To, From)                       \
  template <int N>                                        \
  TW_INLINE vec<To, N> name(const vec<From, N>& x) {      \
    vec<To, N> r;                                         \
    TW_EACH(N) r.v[l] = name(x.v[l]);                     \
    return r;                                             \
  }
TW_LANEWISE(from_bfloat16, float, uint16_t)
TW_LANEWISE(to_bfloat16, uint16_t, float)
TW_LANEWISE(from_float16, float, uint16_t)
TW_LANEWISE(to_float16, uint16_t, float)

// -- arithmetic ----------------------------------------------------------------------------------

TW_INLINE float lowest() { return __uint_as_float(0xff800000u); }  // −inf
TW_INLINE float exp(float x) { return ::expf(x); }
TW_INLINE double exp(double x) { return ::exp(x); }
// 2^x by the special function unit: error below 2 ulp, subnormal results are 0.
TW_INLINE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TW_INLINE float log(float x) { return ::logf(x); }
TW_INLINE double log(double x) { return ::log(x); }
TW_INLINE float sqrt(float x) { return ::sqrtf(x); }
TW_INLINE double sqrt(double x) { return ::sqrt(x); }
TW_INLINE float rsqrt(float x) { return 1.0f / ::sqrtf(x); }
TW_INLINE double rsqrt(double x) { return 1.0 / ::sqrt(x); }
TW_INLINE float tanh(float x) { return ::tanhf(x); }
TW_INLINE double tanh(double x) { return ::tanh(x); }
TW_INLINE float sin(float x) { return ::sinf(x); }
TW_INLINE double sin(double x) { return ::sin(x); }
TW_INLINE float cos(float x) { return ::cosf(x); }
TW_INLINE double cos(double x) { return ::cos(x); }
TW_INLINE float floor(float x) { return ::floorf(x); }
TW_INLINE double floor(double x) { return ::floor(x); }
template <class T>
TW_INLINE T abs(T x) { return x < T(0) ? -x : x; }
TW_LANEWISE(exp, float, float)
TW_LANEWISE(log, float, float)
TW_LANEWISE(sqrt, float, float)
TW_LANEWISE(rsqrt, float, float)
TW_LANEWISE(tanh, float, float)
TW_LANEWISE(sin, float, float)
TW_LANEWISE(cos, float, float)
TW_LANEWISE(floor, float, float)
template <class T, int N>
TW_INLINE vec<T, N> abs(const vec<T, N>& x) {
  vec<T, N> r;
  TW_EACH(N) r.v[l] = abs(x.v[l]);
  return r;
}
#undef TW_LANEWISE

TW_INLINE float remainder_of(float a, float b) { return ::fmodf(a, b); }
TW_INLINE double remainder_of(double a, double b) { return ::fmod(a, b); }
#include "common.h"

template <class T, int N>
TW_INLINE vec<T, N> vmax(const vec<T, N>& a, const vec<T, N>& b) {
  vec<T, N> r;
  TW_EACH(N) r.v[l] = max(a.v[l], b.v[l]);
  return r;
}
template <class T, int N>
TW_INLINE vec<T, N> vmin(const vec<T, N>& a, const vec<T, N>& b) {
  vec<T, N> r;
  TW_EACH(N) r.v[l] = min(a.v[l], b.v[l]);
  return r;
}
template <class T, int N>
TW_INLINE vec<T, N> select(const vec<bool, N>& c, const vec<T, N>& a, const vec<T, N>& b) {
  vec<T, N> r;
  TW_EACH(N) r.v[l] = c.v[l] ? a.v[l] : b.v[l];
  return r;
}

template <class T, int N>
TW_INLINE vec<T, N> vfloor_div(vec<T, N> a, vec<T, N> b) {
  for (int l = 0; l < N; ++l) a[l] = floor_div<T>(a[l], b[l]);
  return a;
}
template <class T, int N>
TW_INLINE vec<T, N> vfloor_mod(vec<T, N> a, vec<T, N> b) {
  for (int l = 0; l < N; ++l) a[l] = floor_mod<T>(a[l], b[l]);
  return a;
}
// -- reductions: lanes of a vector, threads of a warp, rows of a CTA; the order is always the same --

template <class T> struct op_sum { static TW_INLINE T of(T a, T b) { return a + b; } };
template <class T> struct op_prod { static TW_INLINE T of(T a, T b) { return a * b; } };
template <class T> struct op_max { static TW_INLINE T of(T a, T b) { return max(a, b); } };
template <class T> struct op_min { static TW_INLINE T of(T a, T b) { return min(a, b); } };
template <class T, int N>
struct op_max<vec<T, N>> { static TW_INLINE vec<T, N> of(vec<T, N> a, vec<T, N> b) { return vmax(a, b); } };
template <class T, int N>
struct op_min<vec<T, N>> { static TW_INLINE vec<T, N> of(vec<T, N> a, vec<T, N> b) { return vmin(a, b); } };

#define TW_FOLD(name)                                                    \
  template <class T, int N>                                              \
  TW_INLINE T fold_##name(vec<T, N> x) {                                 \
    _Pragma("unroll") for (int half = N / 2; half; half /= 2)            \
      TW_EACH(half) x.v[l] = op_##name<T>::of(x.v[l], x.v[l + half]);    \
    return x.v[0];                                                       \
  }
TW_FOLD(sum)
TW_FOLD(prod)
TW_FOLD(max)
TW_FOLD(min)
#undef TW_FOLD

// The lanes of one group of `Extent` neighbours: other groups of the warp may be elsewhere.
template <int Extent>
TW_INLINE unsigned int group_mask() {
  if constexpr (Extent == 32) return 0xffffffffu;
  unsigned int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return ((1u << (Extent & 31)) - 1u) << (lane & ~static_cast<unsigned int>(Extent - 1));
}
// Over `Extent` neighbouring threads of a warp (a power of two); all of them get the result.
template <class Op, int Extent, class T>
TW_INLINE T across_lanes(T x) {
#pragma unroll
  for (int step = Extent / 2; step; step /= 2)
    x = Op::of(x, __shfl_xor_sync(group_mask<Extent>(), x, step));
  return x;
}

template <class Op, int Extent, class T, int N>
TW_INLINE vec<T, N> across_lanes(vec<T, N> x) {
#pragma unroll
  for (int step = Extent / 2; step; step /= 2) {
    vec<T, N> other;
    TW_EACH(N) other.v[l] = __shfl_xor_sync(group_mask<Extent>(), x.v[l], step);
    x = Op::of(x, other);
  }
  return x;
}

// Barrier `id` for the first `threads` threads of a CTA (__syncthreads uses barrier 0).
TW_INLINE void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// The same; whether any of them has a true one.
TW_INLINE bool bar_or(int id, int threads, bool x) {
  int any;
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; bar.red.or.pred p, %1, %2, p; selp.b32 %0, 1, 0, p; }" : "=r"(any) : "r"(id), "r"(threads), "r"(static_cast<int>(x)) : "memory");
  return any != 0;
}

// Over the `Rows` values of a column of threads (same x): through shared memory, in the order of y.
template <class Op, int Rows, class T>
TW_INLINE T across_rows(T x, char* smem, int barrier, int width, int tx, int ty) {
  T* all = reinterpret_cast<T*>(smem);
  all[ty * width + tx] = x;
  bar_sync(barrier, width * Rows);
  T total = all[tx];
  for (int row = 1; row < Rows; ++row) total = Op::of(total, all[row * width + tx]);
  bar_sync(barrier, width * Rows);
  return total;
}

// -- searches --------------------------------------------------------------------------------------

// The position of key in ascending keys[lo, hi), or -1.
template <class I, class K>
TW_INLINE I find(const K* keys, I lo, I hi, K key) {
  I end = hi;
  while (lo < hi) {
    I mid = lo + (hi - lo) / 2;
    if (load_input(keys + mid) < key) lo = mid + 1; else hi = mid;
  }
  return lo < end && load_input(keys + lo) == key ? lo : static_cast<I>(-1);
}
// The last position of ascending keys[lo, hi) whose key is not greater.
template <class I, class K>
TW_INLINE I find_last(const K* keys, I lo, I hi, K key) {
  while (lo < hi) {
    I mid = lo + (hi - lo) / 2;
    if (load_input(keys + mid) <= key) lo = mid + 1; else hi = mid;
  }
  return lo - 1;
}

// -- updates that other CTAs may make too --------------------------------------------------------

template <class T>
TW_INLINE void atomic_sum(T* p, T x) { atomicAdd(p, x); }
template <class Op, class T, class Word>
TW_INLINE void atomic_by_exchange(T* p, T x) {
  Word* w = reinterpret_cast<Word*>(p);
  Word old = *w, seen;
  do {
    seen = old;
    T next = Op::of(reinterpret_cast<T&>(seen), x);
    old = atomicCAS(w, seen, reinterpret_cast<Word&>(next));
  } while (old != seen);
}
TW_INLINE void atomic_max(int32_t* p, int32_t x) { atomicMax(p, x); }
TW_INLINE void atomic_min(int32_t* p, int32_t x) { atomicMin(p, x); }
TW_INLINE void atomic_max(float* p, float x) { atomic_by_exchange<op_max<float>, float, unsigned int>(p, x); }
TW_INLINE void atomic_min(float* p, float x) { atomic_by_exchange<op_min<float>, float, unsigned int>(p, x); }
TW_INLINE void atomic_max(double* p, double x) { atomic_by_exchange<op_max<double>, double, unsigned long long>(p, x); }
TW_INLINE void atomic_min(double* p, double x) { atomic_by_exchange<op_min<double>, double, unsigned long long>(p, x); }

}  // namespace tw
