// Matrix tiles of a warp: mma.sync m16n8k16, float16 or bfloat16 in, and m16n8k8, float32 rounded to tf32
// in; float32 out (sm_80 and newer).
//
// All 32 lanes of a warp call these functions together. With g = lane / 4 and t = lane % 4 a lane holds
//   of a (16 × 16): words (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8), two neighbours of a row in each
//   of b (16 × 8):  words (2t, g) (2t+8, g), two neighbours of a column in each
//   of the sum (16 × 8): (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
// and of operands in tf32 (16 × 8 and 8 × 8) a word for each element, t in place of 2t, 4 in place of 8.
// b and the sum may have more columns: one such fragment after the other for each eight.
// Reference: PTX ISA, warp-level matrix instructions, fragments of m16n8k16 and m16n8k8.
#pragma once

namespace tw {

// A window of memory: element (r, c) lies at p[r * down + c * right]; beyond rows and cols it reads
// as 0.
template <class T>
struct window {
  T* p;
  int64_t down, right;
  int rows, cols;  // at most 16
};
template <class I>
TW_INLINE int tile_limit(I n) { return n < 16 ? static_cast<int>(n < 0 ? 0 : n) : 16; }
template <class T, class R, class C>
TW_INLINE window<T> tile(T* p, int64_t down, int64_t right, R rows, C cols) {
  return {p, down, right, tile_limit(rows), tile_limit(cols)};
}
// Layouts of shared memory: where in an array element `at` lies. In `swizzled` the 16-byte chunks of a
// row are exchanged, by the number of the row, so that eight chunks of a column are in 32 banks. `Row`:
// elements of a row, a power of two.
struct row_major {
  static TW_INLINE int at(int x) { return x; }
  static TW_INLINE int exchanged(int, int c) { return c; }
};
template <int Row, int Size>
struct swizzled {
  static constexpr int chunk = 16 / Size, many = Row / chunk < 8 ? Row / chunk : 8, rows = 8 / many;
  static TW_INLINE int at(int x) { return x ^ (static_cast<unsigned>(x) / (Row * rows) % many * chunk); }
  // Column c of row r.
  static TW_INLINE int exchanged(int r, int c) { return c ^ (static_cast<unsigned>(r) / rows % many * chunk); }
};

// Windows of shared memory, all of whose rows and columns are there: scratch holds 0 beyond limits.
// In `shared_rows` the 16 bytes from a multiple of 16 on are neighbours in a row, in `shared_cols`
// neighbours in a column. Such a line lies at p[start + known + line * across], `known` a constant;
// lines are counted from a multiple of 8 and elements in a line from `first`, as the layout has it.
TW_INLINE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
template <class T, class L> struct shared_lines {
  const T* p;
  int start, known, first, across;
  // The address in shared memory: what the thread decides (`p` too), then what an iteration does, the
  // same for all threads, then the constant, which is part of the instruction. So a thread needs one
  // register for many lines.
  TW_INLINE uint32_t at(int line, int c) const {
    constexpr int size = sizeof(T);
    return ((shared_address(p) + (line * across + L::exchanged(line, first + c)) * size) + start * size) + known * size;
  }
};
template <class T, class L> struct shared_rows : shared_lines<T, L> {};
template <class T, class L> struct shared_cols : shared_lines<T, L> {};
template <class T, class L> struct shared_window {
  const T* p;
  int first, down, right;
  TW_INLINE T at(int r, int c) const { return p[L::at(first + r * down + c * right)]; }
};

template <class T>
TW_INLINE window<T> transposed(window<T> w) { return {w.p, w.right, w.down, w.cols, w.rows}; }
template <class T, class L>
TW_INLINE shared_window<T, L> transposed(shared_window<T, L> w) { return {w.p, w.first, w.right, w.down}; }

template <int N> struct fragment { float v[N / 8][4]; };  // of a sum, 16 × N
struct fragment_a { uint32_t v[4]; };
template <int N> struct fragment_b { uint32_t v[N / 4]; };

// Row and column of element e of a sum's fragment.
TW_INLINE int fragment_row(int e, int lane) { return (lane >> 2) + (e >> 1 & 1) * 8; }
TW_INLINE int fragment_col(int e, int lane) { return (lane & 3) * 2 + (e & 1) + (e >> 2) * 8; }

// The types of operands.
struct float16_bits {};
struct bfloat16_bits {};
struct tf32_bits {};
// To nearest, ties away from zero.
TW_INLINE uint32_t to_tf32(float x) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
}

// -- memory to fragments -------------------------------------------------------------------------

// Whether neighbours of a row, from an even column on, are one aligned word, inside or outside as one.
template <class T>
TW_INLINE bool in_pairs(window<T> w) {
  const uint64_t mask = 2 * sizeof(T) - 1;
  const uint64_t at = reinterpret_cast<uint64_t>(w.p) | static_cast<uint64_t>(w.down) * sizeof(T);
  return w.right == 1 && (at & mask) == 0 && w.cols % 2 == 0;
}

// Elements (r, c) and (r, c + 1), the first in the low half. `pairs` is in_pairs(w), the same for all.
template <class T>
TW_INLINE uint32_t load_pair(window<T> w, int r, int c, bool pairs) {
  const T* p = w.p + r * w.down + c * w.right;
  uint32_t low = 0, high = 0;
  if (pairs) {
    if (r < w.rows && c < w.cols) low = load_input(reinterpret_cast<const uint32_t*>(p));
    return low;
  }
  if (r < w.rows && c < w.cols) low = load_input(p);
  if (r < w.rows && c + 1 < w.cols) high = load_input(p + w.right);
  return low | high << 16;
}

TW_INLINE uint32_t load_word(window<const float> w, int r, int c) {
  return to_tf32(r < w.rows && c < w.cols ? __ldg(w.p + r * w.down + c * w.right) : 0.0f);
}
template <class L>
TW_INLINE uint32_t load_word(shared_window<float, L> w, int r, int c) { return to_tf32(w.at(r, c)); }
template <class L>
TW_INLINE uint32_t load_word(shared_window<uint16_t, L> w, int r, int c) {
  return static_cast<uint32_t>(w.at(r, c)) | static_cast<uint32_t>(w.at(r, c + 1)) << 16;
}

template <class T>
TW_INLINE void load_fragment(fragment_a& f, window<T> w, int lane) {
  const int g = lane >> 2, t = (lane & 3) * 2;
  const bool pairs = in_pairs(w);
#pragma unroll
  for (int i = 0; i < 4; ++i) f.v[i] = load_pair(w, g + (i & 1) * 8, t + (i >> 1) * 8, pairs);
}
template <int N, class T>
TW_INLINE void load_fragment(fragment_b<N>& f, window<T> w, int lane) {
  const int g = lane >> 2, t = (lane & 3) * 2;
  const window<T> columns = transposed(w);
  const bool pairs = in_pairs(columns);
#pragma unroll
  for (int i = 0; i < N / 4; ++i) f.v[i] = load_pair(columns, g + (i >> 1) * 8, t + (i & 1) * 8, pairs);
}

// Word by word: operands in tf32, and windows of shared memory without lines of 16 bytes.
template <class W>
TW_INLINE void load_words(fragment_a& f, const W& w, int wide, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < 4; ++i) f.v[i] = load_word(w, g + (i & 1) * 8, (t + (i >> 1) * 4) * wide);
}
template <int N, class W>
TW_INLINE void load_words(fragment_b<N>& f, const W& columns, int wide, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) f.v[i] = load_word(columns, g + (i >> 1) * 8, (t + (i & 1) * 4) * wide);
}
TW_INLINE void load_fragment(fragment_a& f, window<const float> w, int lane) { load_words(f, w, 1, lane); }
TW_INLINE void load_fragment(fragment_b<8>& f, window<const float> w, int lane) {
  load_words(f, transposed(w), 1, lane);
}
template <class T, class L>
TW_INLINE void load_fragment(fragment_a& f, shared_window<T, L> w, int lane) { load_words(f, w, 4 / sizeof(T), lane); }
template <int N, class T, class L>
TW_INLINE void load_fragment(fragment_b<N>& f, shared_window<T, L> w, int lane) {
  load_words(f, transposed(w), 4 / sizeof(T), lane);
}

TW_INLINE void load_matrices(uint32_t (&v)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}
TW_INLINE void load_matrices_transposed(uint32_t (&v)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}
TW_INLINE void load_matrices(uint32_t (&v)[2], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(v[0]), "=r"(v[1]) : "r"(at) : "memory");
}
TW_INLINE void load_matrices_transposed(uint32_t (&v)[2], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(v[0]), "=r"(v[1]) : "r"(at) : "memory");
}

template <int N>
TW_INLINE void load_matrices(uint32_t (&v)[N], const void* p) { load_matrices(v, shared_address(p)); }
template <int N>
TW_INLINE void load_matrices_transposed(uint32_t (&v)[N], const void* p) {
  load_matrices_transposed(v, shared_address(p));
}

// Each lane gives the address of one line of 16 bytes: of the upper and lower half, then of the right
// half. Words of tf32 are rounded after.
template <class T, int N>
TW_INLINE void rounded(uint32_t (&v)[N]) {
  if constexpr (sizeof(T) == 4) TW_EACH(N) v[l] = to_tf32(__uint_as_float(v[l]));
}
template <class T, class L>
TW_INLINE void load_fragment(fragment_a& f, shared_rows<T, L> w, int lane) {
  load_matrices(f.v, w.at(lane & 15, (lane >> 4) * (16 / sizeof(T))));
  rounded<T>(f.v);
}
template <class L>
TW_INLINE void load_fragment(fragment_a& f, shared_cols<uint16_t, L> w, int lane) {
  load_matrices_transposed(f.v, w.at((lane & 7) + (lane >> 4) * 8, (lane >> 3 & 1) * 8));
}
template <int N, class L>
TW_INLINE void load_fragment(fragment_b<N>& f, shared_rows<uint16_t, L> w, int lane) {
  load_matrices_transposed(f.v, w.at(lane & 15, (lane >> 4) * 8 % N));
}
template <int N, class T, class L>
TW_INLINE void load_fragment(fragment_b<N>& f, shared_cols<T, L> w, int lane) {
  load_matrices(f.v, w.at((lane & 7) + (lane >> 4) * 8 % N, (lane >> 3 & 1) * (16 / sizeof(T))));
  rounded<T>(f.v);
}

// Lines that run across the words of an operand in tf32: word by word.
TW_INLINE uint32_t load_word(uint32_t at) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
  return to_tf32(x);
}
template <class L>
TW_INLINE void load_fragment(fragment_a& f, shared_cols<float, L> w, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < 4; ++i) f.v[i] = load_word(w.at(t + (i >> 1) * 4, g + (i & 1) * 8));
}
template <int N, class L>
TW_INLINE void load_fragment(fragment_b<N>& f, shared_rows<float, L> w, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) f.v[i] = load_word(w.at(t + (i & 1) * 4, g + (i >> 1) * 8));
}

// -- the operation -------------------------------------------------------------------------------

// An 8 × 8 matrix of 16-bit elements (row g, columns 2 t and 2 t + 1 in lane 4 g + t), transposed.
TW_INLINE uint32_t transpose_matrix(uint32_t x) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}

// acc += a · (b0, b1), and two floats as one word of an operand.
template <class Kind> TW_INLINE void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <class Kind> TW_INLINE uint32_t pack(float low, float high);
#define TW_MMA(Kind, shape, kind)                                                                \
  template <> TW_INLINE void mma<Kind>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned." shape ".row.col.f32." kind "." kind ".f32 "                          \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
  }
#define TW_PACK(Kind, kind)                                                                      \
  template <> TW_INLINE uint32_t pack<Kind>(float low, float high) {                             \
    uint32_t word;                                                                               \
    asm("cvt.rn." kind "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));                 \
    return word;                                                                                 \
  }
TW_MMA(float16_bits, "m16n8k16", "f16")
TW_MMA(bfloat16_bits, "m16n8k16", "bf16")
TW_MMA(tf32_bits, "m16n8k8", "tf32")
TW_PACK(float16_bits, "f16")
TW_PACK(bfloat16_bits, "bf16")
#undef TW_MMA
#undef TW_PACK

template <class Kind, int N>
TW_INLINE void mma(fragment<N>& acc, const fragment_a& a, const fragment_b<N>& b) {
#pragma unroll
  for (int n = 0; n < N / 8; ++n) mma<Kind>(acc.v[n], a.v, b.v[2 * n], b.v[2 * n + 1]);
}

// A column of tiles, acc += a · b for each pair (acc, a): for each eight columns of b all products, up
// and down in turns, so that neighbours have an operand in common, which stays at the tensor core.
template <class Kind, int N>
TW_INLINE void mma_up(const fragment_b<N>&, int) {}
template <class Kind, int N, class... Pairs>
TW_INLINE void mma_up(const fragment_b<N>& b, int n, fragment<N>& acc, const fragment_a& a, Pairs&... below) {
  mma<Kind>(acc.v[n], a.v, b.v[2 * n], b.v[2 * n + 1]);
  mma_up<Kind>(b, n, below...);
}
template <class Kind, int N>
TW_INLINE void mma_down(const fragment_b<N>&, int) {}
template <class Kind, int N, class... Pairs>
TW_INLINE void mma_down(const fragment_b<N>& b, int n, fragment<N>& acc, const fragment_a& a, Pairs&... below) {
  mma_down<Kind>(b, n, below...);
  mma<Kind>(acc.v[n], a.v, b.v[2 * n], b.v[2 * n + 1]);
}
template <class Kind, int N, class... Pairs>
TW_INLINE void mma_column(const fragment_b<N>& b, Pairs&... pairs) {
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    if (n % 2) mma_down<Kind>(b, n, pairs...); else mma_up<Kind>(b, n, pairs...);
  }
}

}  // namespace tw
