// Matrix tiles on the CPU: the true twin of mma.cuh. A fragment is M × N floats, row by row.

namespace tw {

// A window of memory: element (r, c) lies at p[r * down + c * right]; beyond rows and cols it reads
// as 0.
template <class T>
struct window {
  T* p;
  int64_t down, right, rows, cols;
};
template <class T>
TW_INLINE window<T> tile(T* p, int64_t down, int64_t right, int64_t rows, int64_t cols) {
  return {p, down, right, rows, cols};
}

template <class T> struct plain { using type = T; };
template <class T> struct plain<const T> { using type = T; };

// How the elements of an operand are read.
// An operand in float32: rounded to 10 bits of mantissa, ties away from zero.
struct tf32_bits {
  TW_INLINE float read(float x) {
    if (x != x) return x;
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    bits = (bits + 0x1000u) & 0xffffe000u;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  }
  template <int N> TW_INLINE vec<float, N> read(vec<float, N> x) {
    for (int i = 0; i < N; ++i) x[i] = read(x[i]);
    return x;
  }
};
struct float16_bits {
  TW_INLINE float read(uint16_t x) { return from_float16(x); }
  TW_INLINE float read(float x) { return from_float16(to_float16(x)); }  // of a fragment
  template <int N> TW_INLINE vec<float, N> read(vec<uint16_t, N> x) { return from_float16<N>(x); }
  template <int N> TW_INLINE vec<float, N> read(vec<float, N> x) { return from_float16<N>(to_float16<N>(x)); }
};
struct bfloat16_bits {
  TW_INLINE float read(uint16_t x) { return from_bfloat16(x); }
  TW_INLINE float read(float x) { return from_bfloat16(to_bfloat16(x)); }
  template <int N> TW_INLINE vec<float, N> read(vec<uint16_t, N> x) { return from_bfloat16<N>(x); }
  template <int N> TW_INLINE vec<float, N> read(vec<float, N> x) { return from_bfloat16<N>(to_bfloat16<N>(x)); }
};

// A window as numbers, R × C.
template <class Kind, int R, int C, class T>
TW_INLINE void read_tile(float* to, window<T> w) {
  const bool all_cols = w.right == 1 && w.cols >= C;
  for (int r = 0; r < R; ++r) {
    const T* row = w.p + r * w.down;
    if (all_cols && r < w.rows) {
      store<float, C>(to + r * C, Kind::template read<C>(load<typename plain<T>::type, C>(row)));
    } else {
      for (int c = 0; c < C; ++c)
        to[r * C + c] = r < w.rows && c < w.cols ? Kind::read(row[c * w.right]) : 0.0f;
    }
  }
}

// acc += a (M × K) · b (K × N)
template <class Kind, int M, int N, int K, class A, class B>
TW_INLINE void mma(float* acc, window<A> a, window<B> b) {
  float x[M * K], y[K * N];
  read_tile<Kind, M, K>(x, a);
  read_tile<Kind, K, N>(y, b);
  for (int r = 0; r < M; ++r) {
    vec<float, N> sum = load<float, N>(acc + r * N);
    for (int k = 0; k < K; ++k) sum += x[r * K + k] * load<float, N>(y + k * N);
    store<float, N>(acc + r * N, sum);
  }
}

}  // namespace tw
