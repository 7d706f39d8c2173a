// Vectors and register blocks of attention on the CPU: elements as floats, operands (floats, or pairs of
// bfloat16) and their products. Expects before it what flash_cpu.h expects.

namespace flash {

using tw::vec;
using F = vec<float, N>;
using I = vec<int32_t, N>;

constexpr int NK = (DK + N - 1) / N, NV = (DV + N - 1) / N;  // vectors of a row of K, of V
constexpr int DKP = NK * N, DVP = NV * N;                    // a row with padding
constexpr int TV = T / N;            // vectors of a tile of keys
constexpr int PARTIAL_ROW = DVP + 2;  // floats of a partial result: sums, maximum, weight
constexpr float LOWEST = -__builtin_inff();

// -- the mathematics of vectors that programs have only for scalars --------------------------------

template <int L>
TW_INLINE vec<float, L> tanh(vec<float, L> x) {
  using V = vec<float, L>;
  V near = x * x;  // near 0 a polynomial: the quotient below would cancel
  V small = x + x * near * (-0.33333333f + near * (0.13333333f + near * (-0.05396825f + near * 0.02186949f)));
  V a = x < V{} ? -x : x;
  V large = 1.0f - 2.0f / (tw::exp<L>(a + a) + 1.0f);
  V result = a < tw::splat<float, L>(0.25f) ? small : (x < V{} ? -large : large);
  return x != x ? x : result;
}

// Elements of a row of a variant's matrix.
template <int L, class V>
TW_INLINE vec<V, L> elements(const tw::Array<V>& array, int32_t row, vec<int32_t, L> column) {
  vec<V, L> found;
  for (int l = 0; l < L; ++l) found[l] = array.at(row, column[l]);
  return found;
}

// -- elements ------------------------------------------------------------------------------------

TW_INLINE F as_float(vec<float, N> x, float32) { return x; }
TW_INLINE F as_float(vec<uint16_t, N> x, float16) { return tw::from_float16<N>(x); }
TW_INLINE F as_float(vec<uint16_t, N> x, bfloat16) { return tw::from_bfloat16<N>(x); }

TW_INLINE float from_float(float x, float32) { return x; }
TW_INLINE uint16_t from_float(float x, float16) { return tw::to_float16(x); }
TW_INLINE uint16_t from_float(float x, bfloat16) { return tw::to_bfloat16(x); }

// Vector `v` of a row of D elements at `p`; lanes beyond it are 0.
template <class E, int D>
TW_INLINE F load_head(const typename E::type* p, int v) {
  if constexpr (D % N != 0) {
    if (v == D / N) {
      vec<typename E::type, N> part{};
      __builtin_memcpy(&part, p + v * N, (D % N) * sizeof(typename E::type));
      return as_float(part, E());
    }
  }
  return as_float(tw::load<typename E::type, N>(p + v * N), E());
}

// Elements d of a row of D become element(row, d).
template <int D, class Element>
TW_INLINE void change_row(float* row, Element element) {
  float old[D];
  __builtin_memcpy(old, row, sizeof old);
  const auto read = [&](int d) { return old[d]; };
  for (int d = 0; d < D; ++d) row[d] = element(tw::elements_of<D>(read), d);
}

TW_INLINE F shuffle(F a, F b, I lanes) {
#ifdef __clang__
  F out;
  for (int l = 0; l < N; ++l) out[l] = lanes[l] < N ? a[lanes[l]] : b[lanes[l] - N];
  return out;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Lane i of the result is the sum of the lanes of x[i].
TW_INLINE F sum_each(F* x) {
  int count = N;
#pragma GCC unroll 8
  for (int width = N; width > 1; width /= 2) {  // groups of `width` lanes fold to half of it
    I low, high;
#pragma GCC unroll 16
    for (int l = 0; l < N; ++l) {
      int group = l / (width / 2), within = l % (width / 2), groups = N / width;
      int from = group < groups ? group * width : N + (group - groups) * width;
      low[l] = from + within;
      high[l] = from + within + width / 2;
    }
    count /= 2;
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      if (i < count) x[i] = shuffle(x[2 * i], x[2 * i + 1], low) + shuffle(x[2 * i], x[2 * i + 1], high);
    }
  }
  return x[0];
}

// x becomes its transpose.
TW_INLINE void transpose(F* x) {
#pragma GCC unroll 8
  for (int step = N / 2; step > 0; step /= 2) {
    I low, high;
#pragma GCC unroll 16
    for (int l = 0; l < N; ++l) {
      low[l] = l & step ? N + l - step : l;
      high[l] = l & step ? N + l : l + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (i & step) continue;
      F a = x[i], b = x[i + step];
      x[i] = shuffle(a, b, low);
      x[i + step] = shuffle(a, b, high);
    }
  }
}

// -- operands of register blocks: floats, or pairs of bfloat16 ---------------------------------------

template <class E> constexpr bool is_bfloat16(E) { return false; }
constexpr bool is_bfloat16(bfloat16) { return true; }

// acc + a · b.
TW_INLINE F multiply_add(const float* a, F b, F acc) { return acc + *a * b; }

#ifdef __AVX512BF16__
constexpr bool PAIRED = is_bfloat16(Q()) && is_bfloat16(KV()) && is_bfloat16(O()) && Variant::SOFTMAX && !Variant::QUERY && !Variant::KEY;
template <bool> struct OperandOf { using type = float; };
template <> struct OperandOf<true> { using type = uint32_t; };
using Operand = typename OperandOf<PAIRED>::type;

// Each lane: acc + the sum of both products of the pairs. No header has the instruction for less than
// half a second of compiling.
TW_INLINE F multiply_add(const uint32_t* a, vec<uint32_t, N> b, F acc) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*a));
  return acc;
}

// 32 floats as 16 pairs, rounded to nearest even.
TW_INLINE vec<uint32_t, N> to_pairs(F low, F high) {
  vec<uint32_t, N> pairs;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(pairs) : "v"(high), "v"(low));
  return pairs;
}
#else
constexpr bool PAIRED = false;
using Operand = float;
TW_INLINE vec<uint32_t, N> to_pairs(F, F) { return vec<uint32_t, N>{}; }  // never called
#endif

using Operands = vec<Operand, N>;
constexpr int EACH = PAIRED ? 2 : 1;                    // elements of an operand
constexpr int NQ = (DK + N * EACH - 1) / (N * EACH);    // vectors of operands in a row of K
constexpr int QP = NQ * N;                              // operands in a row of Q and K, with padding

// Vector `v` of operands of a row of K at `p`; elements beyond the row are 0.
TW_INLINE void load_operands(const typename KV::type* p, int v, F& floats) { floats = load_head<KV, DK>(p, v); }
TW_INLINE void load_operands(const typename KV::type* p, int v, vec<uint32_t, N>& pairs) {
  constexpr int rest = DK % (2 * N);
  pairs = vec<uint32_t, N>{};
  __builtin_memcpy(&pairs, p + v * 2 * N, rest && v == DK / (2 * N) ? rest * 2 : sizeof pairs);
}

// -- register blocks ---------------------------------------------------------------------------------

template <int C>
struct Count { static constexpr int value = C; };

// Σ_k a[r][k] b[k] for R rows and C vectors of columns; k counts operands.
template <int R, int C, class A, class LoadB>
TW_INLINE void block(const A* a, int lda, LoadB b, int k_end, F (&acc)[R][C]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) acc[r][v] = F{};
#pragma GCC unroll 1
  for (int k = 0; k < k_end; ++k) {
    decltype(b(0, 0)) row[C];
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) row[v] = b(k, v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) acc[r][v] = multiply_add(a + r * lda + k, row[v], acc[r][v]);
  }
}

// The columns of a product, CB vectors at a time: `body` gets the first vector and how many.
template <int VECTORS, class Body>
TW_INLINE void for_columns(Body body) {
  constexpr int most = VECTORS / CB * CB;
#pragma GCC unroll 1
  for (int v0 = 0; v0 < most; v0 += CB) body(v0, Count<CB>());
  if constexpr (most < VECTORS) body(most, Count<VECTORS - most>());
}

// c[r] = scale · Σ_k a[r][k] b[k]; `b(k, v)` is vector v of row k.
template <int R, int VECTORS, class A, class LoadB>
TW_INLINE void product(const A* a, int lda, LoadB b, int k_end, float scale, float* c, int ldc) {
  for_columns<VECTORS>([&](int v0, auto count) {
    constexpr int C = decltype(count)::value;
    F acc[R][C];
    block<R, C>(a, lda, [&](int k, int v) { return b(k, v0 + v); }, k_end, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) tw::store<float, N>(c + r * ldc + (v0 + v) * N, acc[r][v] * scale);
  });
}

}  // namespace flash
