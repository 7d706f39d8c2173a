// Flash attention on any NVIDIA GPU from sm_80 on, by CUDA cores in float32: simple and right.
//
// Expects before it: gpu.cuh, the constants of `flash` (DK and DV: elements of a row of K and of V,
// G query heads of a KV head, MAX_KEYS of a request; the element types Q, KV and
// O), `Params`, `Item`, bounds.h, table.h, variant.h, the struct `Variant` and the barrier id BARRIER.
//
// A CTA runs one item: some queries of one request with one KV head. Its warps take tiles of 32 keys in
// turn, a key a thread. Rows (token, query head of the group) are processed ROWS at a time and share
// each load of K and V. The warps' partial sums are merged in warp order.

namespace flash {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
constexpr int ROWS = 8;
constexpr int COLUMNS = (DV + 31) / 32;   // of the output, for each thread
constexpr int DVP = COLUMNS * 32;         // a row of V with padding
constexpr int DKP = (DK + 31) / 32 * 32;  // a row of K with padding
constexpr int T = 32;                   // keys of a tile
constexpr int Q_FLOATS = ROWS * DKP;
constexpr int SMEM_BYTES = (Q_FLOATS + WARPS * ROWS * (DVP + 2)) * 4;
constexpr unsigned ALL = 0xffffffffu;

using tw::lowest;

TW_INLINE float as_float(float x, float32) { return x; }
TW_INLINE float as_float(uint16_t x, float16) { return tw::from_float16(x); }
TW_INLINE float as_float(uint16_t x, bfloat16) { return tw::from_bfloat16(x); }
TW_INLINE float from_float(float x, float32) { return x; }
TW_INLINE uint16_t from_float(float x, float16) { return tw::to_float16(x); }
TW_INLINE uint16_t from_float(float x, bfloat16) { return tw::to_bfloat16(x); }

// The dot products of one key with all rows of q (shared memory, padded with zeros).
TW_INLINE void dot_rows(const Variant& variant, const At& at, const typename KV::type* key, const float* q, float* s) {
  constexpr int W = DK % 4 == 0 ? 4 : 1;
  const auto read = [&](int d) { return as_float(key[d], KV()); };
#pragma unroll
  for (int r = 0; r < ROWS; ++r) s[r] = 0.0f;
#pragma unroll 1
  for (int d = 0; d < DK; d += W) {
    tw::vec<typename KV::type, W> x = tw::load<typename KV::type, W>(key + d);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      float value = Variant::KEY ? variant.key(tw::elements_of<DK>(read), at, d + i, at.kv, at.key) : as_float(x[i], KV());
#pragma unroll
      for (int r = 0; r < ROWS; ++r) s[r] += value * q[r * DKP + d + i];
    }
  }
}

struct Rows {  // of one warp: outputs of this thread's columns, maxima and sums of all rows
  float acc[ROWS][COLUMNS], row_max[ROWS], row_sum[ROWS];
};

TW_INLINE void start(Rows& rows) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    rows.row_max[r] = Variant::SOFTMAX ? lowest() : 0.0f;  // without one all scales are that of 0
    rows.row_sum[r] = 0.0f;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) rows.acc[r][c] = 0.0f;
  }
}

struct Work {
  int first, row0, rows;  // position of the item's first query; rows of this pass
  int kv_head, request, token, qo_len, kv_len;  // `token`: row of q of the first query
};

TW_INLINE At at_of(const Work& w, const tw::Pages& pages, int row, int key) {
  return At{w.first + row / G, pages.position(key), w.kv_head * G + row % G, w.kv_head, w.request,
            w.token + row / G, pages.number(key), w.qo_len, w.kv_len};
}

// One tile of 32 keys for one warp. Its values are summed from 0 before they join the sums, or small
// terms would vanish beside the sum of a long context. The weight of a masked key is −0 (no other
// is): its value is not added, so NaN there does not matter.
TW_INLINE void attend_tile(const Params& p, const Variant& variant, const Work& w, const tw::Pages& pages, int kv0, int kind, const float* q, int lane, Rows& rows) {
  int n = pages.length - kv0 < T ? pages.length - kv0 : T;
  bool inside = lane < n;
  int kv = inside ? kv0 + lane : kv0;
  const int64_t page = tw::page_at(p, pages, w.kv_head, kv / p.page_size), slot = kv % p.page_size;
  float s[ROWS], rescale[ROWS], sums[ROWS][COLUMNS];
  dot_rows(variant, at_of(w, pages, w.row0, kv), p.k + w.kv_head * p.k_head + page * p.k_page + slot * p.k_slot, q, s);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    int row = w.row0 + r;
    const At at = at_of(w, pages, row, kv);
    float x = lowest();
    const bool counts = inside && r < w.rows && (kind == tw::FULL || variant.mask(at));
    if (counts) x = variant.logits(s[r], at);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) sums[r][c] = 0.0f;
    if constexpr (!Variant::SOFTMAX) {
      rescale[r] = 1.0f;
      s[r] = counts ? x + 0.0f : -0.0f;  // a weight that is not −0
      continue;
    }
    float new_max = tw::max(rows.row_max[r], tw::across_lanes<tw::op_max<float>, 32>(x));
    float base = new_max == lowest() ? 0.0f : new_max;
    rescale[r] = rows.row_max[r] == new_max ? 1.0f : tw::exp(rows.row_max[r] - base);
    s[r] = x == lowest() ? -0.0f : tw::exp(x - base);
    rows.row_sum[r] = rows.row_sum[r] * rescale[r] + tw::across_lanes<tw::op_sum<float>, 32>(s[r]);
    rows.row_max[r] = new_max;
  }
  const typename KV::type* values = p.v + w.kv_head * p.v_head;
  int64_t mine = page * p.v_page + slot * p.v_slot;
  for (int j = 0; j < n; ++j) {
    const typename KV::type* value = values + __shfl_sync(ALL, mine, j);
    float x[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) x[c] = lane + c * 32 < DV ? as_float(value[lane + c * 32], KV()) : 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float weight = __shfl_sync(ALL, s[r], j);
      if (__float_as_uint(weight) == 0x80000000u) continue;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] += weight * x[c];
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) rows.acc[r][c] = rows.acc[r][c] * rescale[r] + sums[r][c];
}

TW_INLINE int64_t row_of_o(const Params& p, const Item& item, const Work& w, int row) {
  return static_cast<int64_t>(item.qo_begin + row / G) * p.qo_heads + w.kv_head * G + row % G;
}

// The warps' states are merged through shared memory; each thread finishes some outputs.
TW_INLINE void finish(const Params& p, const Variant& variant, const Item& item, const Work& w, const tw::Pages& pages, const Rows& rows, float* exchange, int thread) {
  int warp = thread / 32, lane = thread % 32;
  float* mine = exchange + warp * ROWS * (DVP + 2);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) mine[r * (DVP + 2) + lane + c * 32] = rows.acc[r][c];
    if (lane == 0) {
      mine[r * (DVP + 2) + DVP] = rows.row_max[r];
      mine[r * (DVP + 2) + DVP + 1] = rows.row_sum[r];
    }
  }
  tw::bar_sync(BARRIER, THREADS);
  for (int i = thread; i < w.rows * DVP; i += THREADS) {
    int r = i / DVP, d = i % DVP, row = w.row0 + r;
    float* all = exchange + r * (DVP + 2);
    float new_max = lowest(), weight = 0.0f, total = 0.0f;
    for (int k = 0; k < WARPS; ++k) new_max = tw::max(new_max, all[k * ROWS * (DVP + 2) + DVP]);
    float base = new_max == lowest() ? 0.0f : new_max;
    for (int k = 0; k < WARPS; ++k) {
      const float* part = all + k * ROWS * (DVP + 2);
      float factor = tw::exp(part[DVP] - base);
      weight += part[DVP + 1] * factor;
      total += part[d] * factor;
    }
    const int64_t at = row_of_o(p, item, w, row);
    if constexpr (Variant::SINK) total *= tw::add_sink(variant.sink(at_of(w, pages, row, 0)), new_max, weight);
    if (Variant::SOFTMAX) total = new_max == lowest() ? 0.0f : __fdividef(total, weight);
    if constexpr (Variant::OUTPUT) all[d] = total;  // which only this thread has read
    else if (d < DV) p.o[at * DV + d] = from_float(total, O());
    if (d == 0 && p.lse) p.lse[at] = new_max == lowest() ? lowest() : new_max + tw::log(weight);
  }
  tw::bar_sync(BARRIER, THREADS);
  if constexpr (Variant::OUTPUT) {
    for (int i = thread; i < w.rows * DV; i += THREADS) {
      const int r = i / DV, d = i % DV;
      const auto read = [&](int d) { return exchange[r * (DVP + 2) + d]; };
      const float x = variant.output(tw::elements_of<DV>(read), at_of(w, pages, w.row0 + r, 0), d);
      p.o[row_of_o(p, item, w, w.row0 + r) * DV + d] = from_float(x, O());
    }
    tw::bar_sync(BARRIER, THREADS);
  }
}

TW_INLINE void run(const Params& p, int64_t unit, int thread, char* smem) {
  const Item item = p.items[unit];
  const Variant variant(p);
  const int request = item.request - tw::own_node(p, 0);
  const tw::Pages own = tw::pages_of(p, item.request, MAX_KEYS);
  int qo_begin = p.qo_indptr[request], qo_end = p.qo_indptr[request + 1];
  int first = tw::first_query(p, own, request, qo_end - qo_begin) + (item.qo_begin - qo_begin);
  int all_rows = (item.qo_end - item.qo_begin) * G;
  float* q = reinterpret_cast<float*>(smem);
  float* exchange = q + Q_FLOATS;
  for (int row0 = 0; row0 < all_rows; row0 += ROWS) {
    Work w{first, row0, all_rows - row0 < ROWS ? all_rows - row0 : ROWS, item.kv_head, request, item.qo_begin, qo_end - qo_begin,
           own.number(own.length)};
    for (int i = thread; i < Q_FLOATS; i += THREADS) {
      int r = i / DKP, d = i % DKP, row = row0 + r;
      int64_t token = item.qo_begin + row / G;
      bool inside = r < w.rows && d < DK;
      const typename Q::type* from = p.q + token * p.q_token + (w.kv_head * G + row % G) * p.q_head;
      const auto read = [&](int d) { return as_float(from[d], Q()); };
      q[i] = 0.0f;
      if (inside) q[i] = p.sm_scale * (Variant::QUERY ? variant.query(tw::elements_of<DK>(read), at_of(w, own, row, 0), d) : read(d));
    }
    tw::bar_sync(BARRIER, THREADS);
    Rows rows;
    start(rows);
    tw::Tile tile{tw::Bound{first + row0 / G, first + (row0 + w.rows - 1) / G}, tw::Bound{0, 0},
                  tw::Bound{w.kv_head * G, w.kv_head * G + G - 1}, tw::bound(w.kv_head), tw::bound(w.request),
                  tw::Bound{0, 0}, tw::bound(w.qo_len), tw::bound(w.kv_len)};
    for (int node = item.request; node >= 0; node = tw::node_at(p, node).outer) {  // behind its own the keys that it shares
      const tw::Pages pages = tw::pages_of(p, node, MAX_KEYS);
      const auto seen = tw::tiles_seen<T>(variant, tile, pages);
      for (int i = thread / 32; i < seen.count(); i += WARPS) {
        const int kv0 = seen.at(i) * T;
        int end = pages.length - kv0 < T ? pages.length : kv0 + T;
        tile.key = tw::Bound{pages.number(kv0), pages.number(end - 1)};
        tile.kv = tw::Bound{pages.position(kv0), pages.position(end - 1)};
        int kind = variant.tile_class(tile);
        if (kind != tw::EMPTY) attend_tile(p, variant, w, pages, kv0, kind, q, thread % 32, rows);
      }
    }
    finish(p, variant, item, w, own, rows, exchange, thread);
  }
}

}  // namespace flash
