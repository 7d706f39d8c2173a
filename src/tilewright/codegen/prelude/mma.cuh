// Matrix tiles of a warp: mma.sync m16n8k16, float16 or bfloat16 in, float32 out (sm_80 and newer).
//
// All 32 lanes of a warp call these functions together. With g = lane / 4 and t = lane % 4 a lane holds
//   of a (16 × 16): words (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8), two neighbours of a row in each
//   of b (16 × 8):  words (2t, g) (2t+8, g), two neighbours of a column in each
//   of the sum (16 × 8): (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
// Reference: PTX ISA, warp-level matrix instructions, fragments of m16n8k16.
#pragma once

namespace tw {

// A window of memory: element (r, c) lies at p[r * down + c * right]; beyond rows and cols it reads
// as 0 and is not written.
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
// Windows of shared memory, all of whose 16 rows and columns are there: scratch holds 0 beyond limits.
// In `shared_rows` eight neighbours of a row are aligned and lie side by side, in `shared_cols` eight
// neighbours of a column.
template <class T> struct shared_rows { const T* p; int64_t down; };
template <class T> struct shared_cols { const T* p; int64_t right; };
template <class T> struct shared_window { const T* p; int64_t down, right; };

template <class T>
TW_INLINE shared_rows<T> shared_rows_at(const T* p, int64_t down) { return {p, down}; }
template <class T>
TW_INLINE shared_cols<T> shared_cols_at(const T* p, int64_t right) { return {p, right}; }
template <class T>
TW_INLINE shared_window<T> shared_tile(const T* p, int64_t down, int64_t right) { return {p, down, right}; }

template <class T>
TW_INLINE window<T> transposed(window<T> w) { return {w.p, w.right, w.down, w.cols, w.rows}; }

struct fragment { float v[4]; };                  // of a sum
struct fragment_a { uint32_t v[4]; };
struct fragment_b { uint32_t v[2]; };

// Row and column of element e of a sum's fragment.
TW_INLINE int fragment_row(int e, int lane) { return (lane >> 2) + (e >> 1) * 8; }
TW_INLINE int fragment_col(int e, int lane) { return (lane & 3) * 2 + (e & 1); }

// How the elements of a window are read and written.
struct float32_bits {
  static TW_INLINE float read(float x) { return x; }
  static TW_INLINE float write(float x) { return x; }
};
struct float16_bits {
  static TW_INLINE float read(uint16_t x) { return from_float16(x); }
  static TW_INLINE uint16_t write(float x) { return to_float16(x); }
};
struct bfloat16_bits {
  static TW_INLINE float read(uint16_t x) { return from_bfloat16(x); }
  static TW_INLINE uint16_t write(float x) { return to_bfloat16(x); }
};

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

template <class T>
TW_INLINE void load_fragment(fragment_a& f, window<T> w, int lane) {
  const int g = lane >> 2, t = (lane & 3) * 2;
  const bool pairs = in_pairs(w);
#pragma unroll
  for (int i = 0; i < 4; ++i) f.v[i] = load_pair(w, g + (i & 1) * 8, t + (i >> 1) * 8, pairs);
}
template <class T>
TW_INLINE void load_fragment(fragment_b& f, window<T> w, int lane) {
  const int g = lane >> 2, t = (lane & 3) * 2;
  const window<T> columns = transposed(w);
  const bool pairs = in_pairs(columns);
#pragma unroll
  for (int i = 0; i < 2; ++i) f.v[i] = load_pair(columns, g, t + i * 8, pairs);
}

TW_INLINE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
TW_INLINE void load_matrices(uint32_t (&v)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(shared_address(p)) : "memory");
}
TW_INLINE void load_matrices_transposed(uint32_t (&v)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(shared_address(p)) : "memory");
}
TW_INLINE void load_matrices(uint32_t (&v)[2], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(v[0]), "=r"(v[1]) : "r"(shared_address(p)) : "memory");
}
TW_INLINE void load_matrices_transposed(uint32_t (&v)[2], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(v[0]), "=r"(v[1]) : "r"(shared_address(p)) : "memory");
}

// Each lane gives the address of one row (column) of eight: of the upper and lower half, then of the
// right half.
template <class T>
TW_INLINE void load_fragment(fragment_a& f, shared_rows<T> w, int lane) {
  load_matrices(f.v, w.p + (lane & 15) * w.down + (lane >> 4) * 8);
}
template <class T>
TW_INLINE void load_fragment(fragment_a& f, shared_cols<T> w, int lane) {
  load_matrices_transposed(f.v, w.p + ((lane & 7) + (lane >> 4) * 8) * w.right + (lane >> 3 & 1) * 8);
}
template <class T>
TW_INLINE void load_fragment(fragment_b& f, shared_rows<T> w, int lane) {
  load_matrices_transposed(f.v, w.p + (lane & 15) * w.down);
}
template <class T>
TW_INLINE void load_fragment(fragment_b& f, shared_cols<T> w, int lane) {
  load_matrices(f.v, w.p + (lane & 7) * w.right + (lane >> 3 & 1) * 8);
}

template <class T>
TW_INLINE uint32_t shared_pair(const T* p, int64_t right) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[right]) << 16;
}
template <class T>
TW_INLINE void load_fragment(fragment_a& f, shared_window<T> w, int lane) {
  const int g = lane >> 2, t = (lane & 3) * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    f.v[i] = shared_pair(w.p + (g + (i & 1) * 8) * w.down + (t + (i >> 1) * 8) * w.right, w.right);
}
template <class T>
TW_INLINE void load_fragment(fragment_b& f, shared_window<T> w, int lane) {
  const int g = lane >> 2, t = (lane & 3) * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) f.v[i] = shared_pair(w.p + (t + i * 8) * w.down + g * w.right, w.down);
}

// -- the operation -------------------------------------------------------------------------------

TW_INLINE void mma_zero(fragment& acc) {
  TW_EACH(4) acc.v[l] = 0.0f;
}

#define TW_MMA(name, kind)                                                                       \
  TW_INLINE void name(fragment& acc, const fragment_a& a, const fragment_b& b) {                 \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." kind "." kind ".f32 "                           \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
        : "+f"(acc.v[0]), "+f"(acc.v[1]), "+f"(acc.v[2]), "+f"(acc.v[3])                         \
        : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]));         \
  }
TW_MMA(mma_float16, "f16")
TW_MMA(mma_bfloat16, "bf16")
#undef TW_MMA

// An 8 × 8 matrix of 16-bit elements (row g, columns 2 t and 2 t + 1 in lane 4 g + t), transposed.
TW_INLINE uint32_t transpose_matrix(uint32_t x) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}

// The same on plain registers: acc += a · (b0, b1), and two floats as one word of an operand.
template <class Kind> TW_INLINE void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <class Kind> TW_INLINE uint32_t pack(float low, float high);
#define TW_MMA_REGISTERS(Kind, kind)                                                             \
  template <> TW_INLINE void mma<Kind>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." kind "." kind ".f32 "                           \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
  }                                                                                              \
  template <> TW_INLINE uint32_t pack<Kind>(float low, float high) {                             \
    uint32_t word;                                                                               \
    asm("cvt.rn." kind "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));                 \
    return word;                                                                                 \
  }
TW_MMA_REGISTERS(float16_bits, "f16")
TW_MMA_REGISTERS(bfloat16_bits, "bf16")
#undef TW_MMA_REGISTERS

// -- fragments to memory -------------------------------------------------------------------------

template <class Kind, class T>
TW_INLINE void mma_store(window<T> to, const fragment& acc, int lane) {
  const int g = lane >> 2, t = (lane & 3) * 2;
  const bool pairs = in_pairs(to);
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const int r = g + i * 4;
    T* p = to.p + r * to.down + t * to.right;
    const T low = Kind::write(acc.v[i]), high = Kind::write(acc.v[i + 1]);
    if (pairs) {
      if (r < to.rows && t < to.cols) store<T, 2>(p, vec<T, 2>{{low, high}});
    } else {
      if (r < to.rows && t < to.cols) p[0] = low;
      if (r < to.rows && t + 1 < to.cols) p[to.right] = high;
    }
  }
}
template <class Kind, class T>
TW_INLINE void mma_add(window<T> to, const fragment& acc, int lane) {
  const int g = lane >> 2, t = (lane & 3) * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = g + (i >> 1) * 8, c = t + (i & 1);
    T* p = to.p + r * to.down + c * to.right;
    if (r < to.rows && c < to.cols) *p = Kind::write(Kind::read(*p) + acc.v[i]);
  }
}

}  // namespace tw
