// The rows of q of a unit, as the matrix operand of a decode kernel. Part of decode.cuh.

namespace attention {

// Fragments of q: the rows of a unit; in place of those behind its last any other.
struct Query {
  uint32_t b[BLOCKS][DKP / 16][2];
  TW_INLINE Query(Element*, unsigned) {}
  // Of 16 columns, 8 rows each.
  TW_INLINE void load(uint32_t (&to)[BLOCKS][2], int j) const {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
      for (int low = 0; low < 2; ++low) to[n][low] = b[n][j][low];
  }
};
// The same from shared memory, where all warps have the rows of the unit.
struct SharedQuery {
  Element* rows;
  unsigned thread;
  TW_INLINE SharedQuery(Element* to, unsigned thread) : rows(to), thread(thread) {}
  TW_INLINE void load(uint32_t (&to)[BLOCKS][2], int j) const {
    const int lane = thread % 32;
#pragma unroll
    for (int n = 0; n < BLOCKS; n += 2) {
      uint32_t two[4];
      tw::load_matrices(two, rows + (n * 8 + (lane & 7) + (lane >> 4) * 8) * ROW_K + j * 16 + (lane >> 3 & 1) * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[n + i / 2][i % 2] = two[i];
    }
  }
};

TW_INLINE float as_float(Element x, tw::float16_bits) { return tw::from_float16(x); }
TW_INLINE float as_float(Element x, tw::bfloat16_bits) { return tw::from_bfloat16(x); }
TW_INLINE At at_of(const Walk& w, const tw::Row* rows, int row, int key);
static_assert(!Variant::QUERY || KIND == ALONE, "a launch in front does not know yet whose a row is");

// Two elements of q, the same row of the unit and of the query; zeros where the columns of a row end.
TW_INLINE uint32_t load_pair(const Params& p, const Walk& w, int own, int column) {
  const int row = own < w.rows ? own : 0;
  const Element* from = p.q + (w.token + row / G) * p.q_token + (w.head * G + row % G) * p.q_head;
  if constexpr (Variant::QUERY) {
    if (w.rows == 0 || column >= DK) return 0;
    const Variant variant(p);
    const At at = at_of(w, nullptr, row, 0);
    const auto read = [&](int d) { return as_float(from[d], Kind()); };
    const auto old = tw::elements_of<DK>(read);
    return tw::pack<Kind>(variant.query(old, at, column), variant.query(old, at, column + 1));
  }
  return w.rows > 0 && (DKP == DK || column < DK) ? *reinterpret_cast<const uint32_t*>(from + column) : 0u;
}
TW_INLINE void load_query(Query& q, const Params& p, const Walk& w, int lane) {
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
    for (int j = 0; j < DKP / 16; ++j)
#pragma unroll
      for (int low = 0; low < 2; ++low) q.b[n][j][low] = load_pair(p, w, n * 8 + (lane >> 2), j * 16 + low * 8 + (lane & 3) * 2);
}
// All threads: the rows of the last unit have been read.
TW_INLINE void load_query(SharedQuery& q, const Params& p, const Walk& w, int) {
  for (int i = q.thread; i < ROWS * (DKP / 2); i += THREADS) {
    const int row = i / (DKP / 2), column = i % (DKP / 2) * 2;
    *reinterpret_cast<uint32_t*>(q.rows + row * ROW_K + column) = load_pair(p, w, row, column);
  }
  tw::bar_sync(BARRIER, THREADS);
}
template <bool SHARED> struct QueryOf { using type = Query; };
template <> struct QueryOf<true> { using type = SharedQuery; };

}  // namespace attention
