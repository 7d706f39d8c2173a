// Flash attention by tensor cores (mma.sync m16n8k16), sm_80 and newer: one tile of keys after the other.
//
// Expects before it: gpu.cuh, mma.cuh, async.cuh, the constants of `flash` (DK and DV: elements of a row of K and
// of V, G query heads of a KV head, BLOCKS of 16 rows of a warp, KEYS of a tile, DIRECT: logits are the scores,
// MAX_KEYS of a request; the element types Q, KV and O), `Params`, `Item`, bounds.h, table.h,
// variant.h, the struct `Variant` and the barrier id BARRIER.
//
// A CTA runs one item: some queries of one request with one KV head, at most ROWS rows (token, query head of the
// group), BLOCKS × 16 of them in each warp; all warps go over the same tiles of keys, behind the request's own those
// that it shares with others. Queries are the rows and keys
// the columns of scores, whose fragments are operands of the product with V as they are.
//
// Shared memory: [ROWS][DKP + 8] of q, [KEYS][DKP + 8] of K, [KEYS][DVP + 8] of V; rows end in 16 bytes against bank
// conflicts. There is one tile of each: values are copied while scores are computed, the next keys after that. Two
// CTAs of an SM hide what is left. Assumes: DK and DV multiples of 8, rows of K and V aligned to 16 bytes.

namespace flash {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
constexpr int WARP_ROWS = BLOCKS * 16, ROWS = WARPS * WARP_ROWS;
constexpr int OWN = KEYS / WARPS;  // keys of a tile that a warp copies
template <int N> constexpr int PADDED = (N + 15) / 16 * 16;
template <int N> constexpr int PITCH = PADDED<N> + 8;  // elements from row to row in shared memory
constexpr int DKP = PADDED<DK>, DVP = PADDED<DV>;
constexpr int K_AT = ROWS * PITCH<DK>, V_AT = K_AT + KEYS * PITCH<DK>;
constexpr int SMEM_BYTES = (V_AT + KEYS * PITCH<DV>) * 2;
constexpr float LOG2E = 1.4426950408889634f;
constexpr unsigned ALL = 0xffffffffu;

using tw::lowest;
using Element = uint16_t;
template <class T> struct kind_of;
template <> struct kind_of<float16> { using type = tw::float16_bits; };
template <> struct kind_of<bfloat16> { using type = tw::bfloat16_bits; };
using Kind = typename kind_of<KV>::type;

// The same number, of which nothing is computed ahead: what depends on it would take registers from the outputs.
TW_INLINE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

struct Work {
  int first, rows;  // position of the item's first query; rows of the item
  int kv_head, request, token, qo_len, kv_len;  // `token`: row of q of the first query
};

TW_INLINE At at_of(const Work& w, const tw::Pages& pages, int row, int key) {
  return At{w.first + row / G, pages.position(key), w.kv_head * G + row % G, w.kv_head, w.request,
            w.token + row / G, pages.number(key), w.qo_len, w.kv_len};
}

// In all fragments lane = 4 g + t: rows g and g + 8 of 16, columns 2 t and 2 t + 1 of 8.
struct Rows {  // of one warp: outputs not yet divided, row maxima (of scores · log2 e), row sums of this lane
  float o[BLOCKS][DVP / 8][4];
  float row_max[BLOCKS][2], row_sum[BLOCKS][2];
};

TW_INLINE void start(Rows& rows) {
#pragma unroll
  for (int m = 0; m < BLOCKS; ++m) {
    rows.row_max[m][0] = rows.row_max[m][1] = lowest();
    rows.row_sum[m][0] = rows.row_sum[m][1] = 0.0f;
#pragma unroll
    for (int c = 0; c < DVP / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) rows.o[m][c][i] = 0.0f;
  }
}

TW_INLINE float as_float(Element x, tw::float16_bits) { return tw::from_float16(x); }
TW_INLINE float as_float(Element x, tw::bfloat16_bits) { return tw::from_bfloat16(x); }

// Where the keys lie that a warp copies: of key lane % OWN in each lane.
struct Source { int64_t k, v; };
TW_INLINE Source locate(const Params& p, const tw::Pages& pages, int kv_head, int kv0, int warp, int lane) {
  const int key = kv0 + warp * OWN + lane % OWN;
  Source from{0, 0};
  if (key < pages.length) {
    const int64_t page = tw::page_at(p, pages, kv_head, key / p.page_size), slot = key % p.page_size;
    from.k = page * p.k_page + slot * p.k_slot;
    from.v = page * p.v_page + slot * p.v_slot;
  }
  return from;
}

// The rows of a warp on their way to shared memory; zeros behind the last of `keys`, those from the tile on.
template <int N>
TW_INLINE void copy_rows(Element* to, const Element* from, int64_t at, int keys, int warp, int lane) {
  constexpr int CHUNKS = PADDED<N> / 8;  // of 16 bytes, in a row
#pragma unroll
  for (int i = 0; i < (OWN * CHUNKS + 31) / 32; ++i) {
    const unsigned n = i * 32 + lane, row = n / CHUNKS, chunk = n % CHUNKS;
    const int64_t row_at = __shfl_sync(ALL, at, row % OWN);
    if (OWN * CHUNKS % 32 == 0 || row < OWN) {
      const int bytes = static_cast<int>(warp * OWN + row) < keys && chunk < N / 8 ? 16 : 0;
      tw::copy_async_16(to + (warp * OWN + row) * PITCH<N> + chunk * 8, from + row_at + (bytes ? chunk * 8 : 0), bytes);
    }
  }
  tw::copy_async_commit();
}

// The keys of a tile that the lanes of a warp have copied become those of the variant, rounded to their type.
TW_INLINE void change_keys(const Variant& variant, const Work& w, const tw::Pages& pages, int kv0, Element* k, int warp, int lane) {
#pragma unroll 1
  for (int row = warp * OWN; row < warp * OWN + OWN && kv0 + row < pages.length; ++row) {
    constexpr int EACH = (DK / 2 + 31) / 32;  // pairs of a lane
    Element* own = k + row * PITCH<DK>;
    const auto read = [&](int d) { return as_float(own[d], Kind()); };
    const auto old = tw::elements_of<DK>(read);
    const At at = at_of(w, pages, 0, kv0 + row);
    uint32_t changed[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int d = (i * 32 + lane) * 2;
      if (d < DK) changed[i] = tw::pack<Kind>(variant.key(old, at, d), variant.key(old, at, d + 1));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if ((i * 32 + lane) * 2 < DK) *reinterpret_cast<uint32_t*>(own + (i * 32 + lane) * 2) = changed[i];
  }
}

// The queries to shared memory, as the variant changes them; zeros behind their last row. They may lie at any address.
// The copies are a group of their own: without keys none comes behind them, and outputs may be staged where they land.
TW_INLINE void copy_queries(const Params& p, const Variant& variant, const Work& w, const tw::Pages& pages, Element* to, int thread) {
  const uint64_t strides = static_cast<uint64_t>(p.q_token) | static_cast<uint64_t>(p.q_head);
  const bool aligned = ((reinterpret_cast<uint64_t>(p.q) | strides * sizeof(Element)) & 15) == 0;
  for (int i = thread; i < ROWS * (DKP / 8); i += THREADS) {
    const int row = i / (DKP / 8), column = i % (DKP / 8) * 8;
    const bool exists = row < w.rows && column < DK;
    const int64_t at = (w.token + row / G) * p.q_token + (w.kv_head * G + row % G) * p.q_head + column;
    Element* here = to + row * PITCH<DK> + column;
    if constexpr (Variant::QUERY) {
      const auto read = [&](int d) { return as_float(p.q[at - column + d], Kind()); };
      const auto old = tw::elements_of<DK>(read);
      const At where = at_of(w, pages, row, 0);
#pragma unroll 1
      for (int c = 0; c < 8; c += 2)
        *reinterpret_cast<uint32_t*>(here + c) = exists ? tw::pack<Kind>(variant.query(old, where, column + c), variant.query(old, where, column + c + 1)) : 0u;
    } else if (aligned) {
      tw::copy_async_16(here, p.q + (exists ? at : 0), exists ? 16 : 0);
    } else {
      for (int c = 0; c < 8; ++c) here[c] = exists ? p.q[at + c] : Element(0);
    }
  }
  tw::copy_async_commit();
}

// Scores of the rows of a warp with the keys of a tile.
TW_INLINE void score(float (&s)[BLOCKS][KEYS / 8][4], const Element* q, const Element* k, int lane) {
#pragma unroll
  for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
  const Element* a_at = q + (lane & 15) * PITCH<DK> + (lane >> 4) * 8;
  const Element* b_at = k + ((lane & 7) + (lane >> 4) * 8) * PITCH<DK> + (lane >> 3 & 1) * 8;
#pragma unroll
  for (int j = 0; j < DKP / 16; ++j) {
    uint32_t a[BLOCKS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m) tw::load_matrices(a[m], a_at + m * 16 * PITCH<DK> + j * 16);
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
      uint32_t b[4];
      tw::load_matrices(b, b_at + n * 16 * PITCH<DK> + j * 16);
#pragma unroll
      for (int m = 0; m < BLOCKS; ++m) {
        tw::mma<Kind>(s[m][2 * n], a[m], b[0], b[1]);
        tw::mma<Kind>(s[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Scores become weights (probabilities not yet divided), and the sums so far are rescaled. Where a tile is not FULL
// `visible` has a bit for each key that rows of this lane see.
template <bool MASKED>
TW_INLINE void weigh(const Params& p, const Variant& variant, const Work& w, const tw::Pages& pages, int kv0, int warp_row, float (&s)[BLOCKS][KEYS / 8][4], uint32_t& visible, Rows& rows, int lane) {
  constexpr float UNIT = Variant::SOFTMAX ? LOG2E : 1.0f;
  const float factor = p.sm_scale * UNIT;
  float rescale[BLOCKS][2];
  bool rescales = false;
#pragma unroll
  for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = warp_row + m * 16 + half * 8 + (lane >> 2), row = r < w.rows ? r : 0;
      float top = rows.row_max[m][half];
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[m][n][half * 2 + i];
          const int key = kv0 + n * 8 + (lane & 3) * 2 + i;
          x = DIRECT ? x * factor : variant.logits(x * p.sm_scale, at_of(w, pages, row, key)) * UNIT;
          if constexpr (MASKED) {
            const bool seen = r < w.rows && key < pages.length && variant.mask(at_of(w, pages, row, key));
            visible |= static_cast<uint32_t>(seen) << (n * 2 + i);
            x = seen ? x : Variant::SOFTMAX ? lowest() : 0.0f;
          }
          top = fmaxf(top, x);
        }
      if constexpr (!Variant::SOFTMAX) continue;
#pragma unroll
      for (int step = 1; step < 4; step *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, step));
      const float base = top == lowest() ? 0.0f : top;
      rescale[m][half] = tw::exp2(rows.row_max[m][half] - base);
      rescales |= rescale[m][half] != 1.0f;
      rows.row_max[m][half] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[m][n][half * 2 + i];
          x = tw::exp2(x - base);
          sum += x;
        }
      rows.row_sum[m][half] = rows.row_sum[m][half] * rescale[m][half] + sum;
    }
  if (!Variant::SOFTMAX || !__any_sync(ALL, rescales)) return;
#pragma unroll
  for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
    for (int c = 0; c < DVP / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) rows.o[m][c][i] *= rescale[m][i / 2];
}

// Adds the values of a tile, each times its weight, to the outputs. Where it is not FULL those of keys that no row of
// the warp sees count as 0: a weight of 0 times NaN or Inf would reach the outputs.
template <bool MASKED>
TW_INLINE void add_values(const float (&s)[BLOCKS][KEYS / 8][4], uint32_t visible, const Element* v, Rows& rows, int lane) {
  const Element* b_at = v + (lane & 15) * PITCH<DV> + (lane >> 4) * 8;
#pragma unroll
  for (int n = 0; n < KEYS / 16; ++n) {
    uint32_t a[BLOCKS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = tw::pack<Kind>(s[m][2 * n + i / 2][i % 2 * 2], s[m][2 * n + i / 2][i % 2 * 2 + 1]);
    uint32_t keep[2] = {};  // of keys 2 t and 2 t + 1 of 16, and of those 8 later
    if constexpr (MASKED) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (__ballot_sync(ALL, visible >> (n * 4 + i) & 1) >> (lane & 3) & 0x11111111u) keep[i / 2] |= 0xffffu << i % 2 * 16;
    }
#pragma unroll
    for (int c = 0; c < DVP / 16; ++c) {
      uint32_t b[4];
      tw::load_matrices_transposed(b, b_at + n * 16 * PITCH<DV> + c * 16);
      if constexpr (MASKED) {
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] &= keep[i % 2];
      }
#pragma unroll
      for (int m = 0; m < BLOCKS; ++m) {
        tw::mma<Kind>(rows.o[m][2 * c], a[m], b[0], b[1]);
        tw::mma<Kind>(rows.o[m][2 * c + 1], a[m], b[2], b[3]);
      }
    }
  }
}

TW_INLINE int64_t row_of_o(const Params& p, const Work& w, int row) {
  return static_cast<int64_t>(w.token + row / G) * p.qo_heads + w.kv_head * G + row % G;
}
TW_INLINE void store_pair(float* to, float a, float b) { *reinterpret_cast<float2*>(to) = make_float2(a, b); }
TW_INLINE void store_pair(Element* to, float a, float b) { *reinterpret_cast<uint32_t*>(to) = tw::pack<typename kind_of<Q>::type>(a, b); }

TW_INLINE void store_one(float* to, float x) { *to = x; }
TW_INLINE void store_one(Element* to, float x) { *to = static_cast<Element>(tw::pack<typename kind_of<Q>::type>(x, x)); }

// Eight rows from `row` on, which the lanes of a warp have divided and left at `from`, as the variant changes them.
TW_INLINE void change_outputs(const Params& p, const Variant& variant, const Work& w, const tw::Pages& pages, int row0, const float* from, int lane) {
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < 8 * DV; i += 32) {
    const int row = row0 + i / DV, d = i % DV;
    const float* own = from + i / DV * DVP;
    const auto read = [&](int d) { return own[d]; };
    if (row < w.rows) store_one(p.o + row_of_o(p, w, row) * DV + d, variant.output(tw::elements_of<DV>(read), at_of(w, pages, row, 0), d));
  }
  __syncwarp();
}

// Outputs of the rows of a warp, each divided by its sum; a row that sees nothing has o = 0 and lse = −inf. `free`: the
// part of shared memory of the warp.
TW_INLINE void finish(const Params& p, const Variant& variant, const Work& w, const tw::Pages& pages, int warp_row, const Rows& rows, float* free, int lane) {
#pragma unroll
  for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + m * 16 + half * 8 + (lane >> 2);
      float sum = rows.row_sum[m][half], largest = rows.row_max[m][half] * (1.0f / LOG2E), keep = 1.0f;
#pragma unroll
      for (int step = 1; step < 4; step *= 2) sum += __shfl_xor_sync(ALL, sum, step);
      if (row >= w.rows && !Variant::OUTPUT) continue;
      if constexpr (Variant::SINK) keep = tw::add_sink(variant.sink(at_of(w, pages, row, 0)), largest, sum);
      const bool none = sum == 0.0f;
      const float scale = !Variant::SOFTMAX ? 1.0f : none ? 0.0f : keep / sum;
      const int64_t at = static_cast<int64_t>(w.token + row / G) * p.qo_heads + w.kv_head * G + row % G;
#pragma unroll
      for (int c = 0; c < DVP / 8; ++c)
        if constexpr (Variant::OUTPUT) store_pair(free + (lane >> 2) * DVP + c * 8 + (lane & 3) * 2, rows.o[m][c][half * 2] * scale, rows.o[m][c][half * 2 + 1] * scale);
        else if (c < DV / 8) store_pair(p.o + at * DV + c * 8 + (lane & 3) * 2, rows.o[m][c][half * 2] * scale, rows.o[m][c][half * 2 + 1] * scale);
      if constexpr (Variant::OUTPUT) change_outputs(p, variant, w, pages, row - (lane >> 2), free, lane);
      if ((lane & 3) == 0 && p.lse && (!Variant::OUTPUT || row < w.rows)) p.lse[at] = none ? lowest() : largest + log2f(sum) * (1.0f / LOG2E);
    }
}

// Rows `begin` … `end` − 1; all keys.
TW_INLINE tw::Tile tile_of(const Work& w, const tw::Pages& pages, int begin, int end) {
  return tw::Tile{tw::Bound{w.first + begin / G, w.first + (end - 1) / G}, tw::Bound{0, 0},
                  tw::Bound{w.kv_head * G, w.kv_head * G + G - 1}, tw::bound(w.kv_head), tw::bound(w.request),
                  tw::Bound{0, 0}, tw::bound(w.qo_len), tw::bound(w.kv_len)};
}

// The keys of one node of the table. Q is on its way to shared memory.
TW_INLINE void attend(const Params& p, const Variant& variant, const Work& w, const tw::Pages& pages, const tw::Tiles<Variant::RANGES>& seen, Element* q, Rows& rows, int warp, int lane) {
  Element *k = q + K_AT, *v = q + V_AT;
  const Element* keys = p.k + w.kv_head * p.k_head;
  const Element* values = p.v + w.kv_head * p.v_head;
  Source from{};
  if (seen.count() > 0) {
    from = locate(p, pages, w.kv_head, seen.at(0) * KEYS, warp, lane);
    copy_rows<DK>(k, keys, from.k, pages.length - seen.at(0) * KEYS, warp, lane);
  }
#pragma unroll 1
  for (int i = 0; i < seen.count(); ++i) {
    lane = opaque(lane), warp = opaque(warp);
    const int warp_row = warp * WARP_ROWS;
    const int kv0 = seen.at(i) * KEYS, end = pages.length - kv0 < KEYS ? pages.length : kv0 + KEYS;
    const bool more = i + 1 < seen.count();
    tw::copy_async_wait<0>();
    if constexpr (Variant::KEY) {
      __syncwarp();
      change_keys(variant, w, pages, kv0, k, warp, lane);
    }
    tw::bar_sync(BARRIER, THREADS);  // keys have arrived, values of the last tile have been read
    copy_rows<DV>(v, values, from.v, pages.length - kv0, warp, lane);
    if (more) from = locate(p, pages, w.kv_head, seen.at(i + 1) * KEYS, warp, lane);
    int kind = tw::EMPTY;
    if (warp_row < w.rows) {
      tw::Tile tile = tile_of(w, pages, warp_row, w.rows < warp_row + WARP_ROWS ? w.rows : warp_row + WARP_ROWS);
      tile.key = tw::Bound{pages.number(kv0), pages.number(end - 1)};
      tile.kv = tw::Bound{pages.position(kv0), pages.position(end - 1)};
      kind = variant.tile_class(tile);
    }
    const bool full = kind == tw::FULL && end == kv0 + KEYS;
    float s[BLOCKS][KEYS / 8][4];
    if (kind != tw::EMPTY) score(s, q + warp_row * PITCH<DK>, k, lane);
    tw::copy_async_wait<0>();
    tw::bar_sync(BARRIER, THREADS);  // values have arrived, keys have been read
    lane = opaque(lane);
    if (more) copy_rows<DK>(k, keys, from.k, pages.length - seen.at(i + 1) * KEYS, warp, lane);
    uint32_t visible = 0;
    if (full) {
      weigh<false>(p, variant, w, pages, kv0, warp_row, s, visible, rows, lane);
      add_values<false>(s, visible, v, rows, lane);
    } else if (kind != tw::EMPTY) {
      weigh<true>(p, variant, w, pages, kv0, warp_row, s, visible, rows, lane);
      add_values<true>(s, visible, v, rows, lane);
    }
  }
  tw::copy_async_wait<0>();
}

TW_INLINE void run(const Params& p, int64_t unit, int thread, char* smem) {
  __shared__ Work w;  // scores and outputs take the registers
  __shared__ tw::Pages pages;
  __shared__ tw::Tiles<Variant::RANGES> seen;
  const Variant variant(p);
  int warp = thread / 32, lane = thread % 32;
  Element* q = reinterpret_cast<Element*>(smem);
  if (thread == 0) {
    const Item item = p.items[unit];
    const int request = item.request - tw::own_node(p, 0);
    const int qo_begin = p.qo_indptr[request], qo_len = p.qo_indptr[request + 1] - qo_begin;
    pages = tw::pages_of(p, item.request, MAX_KEYS);
    const int first = tw::first_query(p, pages, request, qo_len) + (item.qo_begin - qo_begin);
    w = Work{first, (item.qo_end - item.qo_begin) * G, item.kv_head, request, item.qo_begin, qo_len, pages.number(pages.length)};
    seen = tw::tiles_seen<KEYS>(variant, tile_of(w, pages, 0, w.rows), pages);
  }
  tw::bar_sync(BARRIER, THREADS);
  copy_queries(p, variant, w, pages, q, thread);
  Rows rows;
  start(rows);
  attend(p, variant, w, pages, seen, q, rows, warp, lane);
  if constexpr (table::LEVELS > 1) {  // the keys that the request shares with others
    for (int node = tw::node_at(p, tw::own_node(p, w.request)).outer; node >= 0; node = tw::node_at(p, node).outer) {
      tw::bar_sync(BARRIER, THREADS);  // the tiles, `pages` and `seen` of the last node have been read
      if (thread == 0) {
        pages = tw::pages_of(p, node, MAX_KEYS);
        seen = tw::tiles_seen<KEYS>(variant, tile_of(w, pages, 0, w.rows), pages);
      }
      tw::bar_sync(BARRIER, THREADS);
      attend(p, variant, w, pages, seen, q, rows, warp, lane);
    }
  }
  constexpr int FREE = SMEM_BYTES / WARPS / 16 * 4;  // floats for each warp
  static_assert(!Variant::OUTPUT || FREE >= 8 * DVP, "eight rows of outputs fit");
  if constexpr (Variant::OUTPUT) tw::bar_sync(BARRIER, THREADS);  // all warps have read the tiles
  finish(p, variant, w, pages, warp * WARP_ROWS, rows, reinterpret_cast<float*>(smem) + warp * FREE, lane);
}

}  // namespace flash
