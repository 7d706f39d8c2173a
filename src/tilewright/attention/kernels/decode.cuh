// Attention of few query rows over long KV (decode, short append) by tensor cores, sm_80 and newer.
//
// Keys are the rows and packed rows (query rows × heads of a group, at most 8 or 16) the columns of
// mma.sync m16n8k16: S' = K Q', then O' = V' P', so that 8 rows fill the instruction. A unit is
// (request, KV head); the plan cuts the tiles of all units into contiguous ranges of equal cost. A
// range is worked on by GANG CTAs at once, each with a head of its own, so that they read the same
// pages at the same time. In a CTA each warp takes 16 of the keys of a tile, with a ring of cp.async
// stages of its own: warps synchronise only where a unit ends, and the ring runs on across units.
// Units that several ranges share leave partial states; the last CTA to arrive merges them in the
// order of the ranges, so that the bits of a result do not depend on the order of arrival.
//
// In front of this file: gpu.cuh, mma.cuh, async.cuh, bounds.h, table.h, variant.h, the constants of
// `attention`
// (D head_dim, G query heads of a KV head, BLOCKS of 8 packed rows, GANG, WARPS, STAGES, CTAS of an SM,
// MAX_KEYS; the types Element and Kind), the structs `Params`, `Cut`, `At` and `Variant`.
//
// Launch: grid = ranges × GANG, THREADS threads, SMEM_BYTES of dynamic shared memory:
//   [warp][stage][16 rows of K, 16 rows of V][ROW elements]   a row ends in 16 bytes against conflicts
//   [warp][packed row] (row maximum, row sum); one word: whether this CTA arrived last
// Where a unit ends, the stage that was read last holds the outputs of each warp.
// Assumes: D a multiple of 8, rows of K and V 16-byte aligned, q rows × G at most 8 · BLOCKS for a request.

namespace attention {

constexpr int THREADS = WARPS * 32;
constexpr int KEYS = 16;             // of a tile, for one warp
constexpr int TILE = WARPS * KEYS;   // keys of a tile
constexpr int M = BLOCKS * 8;        // packed rows, the columns of the matrix operand
constexpr int DP = (D + 15) / 16 * 16;
constexpr int CHUNKS = DP / 8;       // of 16 bytes, in a row
constexpr int ROW = DP + 8;          // elements of a row in shared memory
constexpr int STAGE = 2 * KEYS * ROW;  // elements
constexpr int RING_BYTES = WARPS * STAGES * STAGE * 2;
constexpr int SMEM_BYTES = RING_BYTES + WARPS * M * 8 + 16;
constexpr int PITCH = DP + 4;        // floats of a row of outputs in shared memory: no bank conflicts
constexpr int PARTIAL = M * (DP + 2);  // floats of a partial state: outputs, then (maximum, sum) a row
constexpr float LOG2E = 1.4426950408889634f;
static_assert(STAGE * 2 >= M * PITCH * 4, "a stage holds the outputs of a warp");

TW_INLINE float lowest() { return __uint_as_float(0xff800000u); }

// Walks the tiles of a CTA: units in order, of each the tiles from `tile` to `end`, which are numbers in
// `seen`, the tiles that the unit's rows can see.
struct Walk {
  int unit, request, head, tile, end;
  tw::Pages keys;
  tw::Tiles<Variant::RANGES> seen;
};

struct Range {  // of this CTA; `first` and `last` name the CTAs that share its first and last unit
  Cut begin, end;
};

TW_INLINE bool has_unit(const Walk& w, const Range& range) {
  return w.unit < range.end.unit || (w.unit == range.end.unit && range.end.tile > 0);
}
// The tiles of the unit that this CTA does: to the cut, or to the last one as the keys are now.
TW_INLINE void bound(Walk& w, const Params& p, const Variant& variant, const Range& range) {
  const int queries = p.qo_indptr ? p.qo_indptr[w.request + 1] - p.qo_indptr[w.request] : 1;
  const int first = tw::first_query(p, w.keys, w.request, queries);
  const tw::Tile rows{tw::Bound{first, first + queries - 1}, {}, tw::Bound{w.head * G, w.head * G + G - 1}, tw::bound(w.head),
                      tw::bound(w.request), {}, tw::bound(queries), tw::bound(w.keys.length)};
  w.seen = tw::tiles_seen<TILE>(variant, rows, w.keys);
  const int all = w.seen.count();
  w.end = w.unit == range.end.unit && range.end.tile < all ? range.end.tile : all;
}
TW_INLINE void next_unit(Walk& w, const Params& p, const Variant& variant, const Range& range) {
  ++w.unit;
  w.tile = 0;
  w.head += GANG;
  if (w.head >= p.kv_heads) {
    w.head -= p.kv_heads;
    ++w.request;
    if (has_unit(w, range)) w.keys = tw::pages_of(p, w.request, MAX_KEYS);
  }
  if (has_unit(w, range)) bound(w, p, variant, range);
}

// Issues the copies of one warp, some tiles ahead of the arithmetic. A lane holds the table's entry for
// one key of two neighbouring tiles; entries are loaded two tiles before they are needed, because under
// load a read that misses the L1 waits behind the copies for microseconds.
struct Copier {
  Walk w;
  int stage, first;      // the tile of the unit that `entry` starts with
  int64_t entry, ahead;  // of tiles first, first + 1 and of the two after them

  TW_INLINE int key_of(int tile, int warp, int lane) const {
    return w.seen.at(tile + lane / KEYS) * TILE + warp * KEYS + lane % KEYS;
  }
  TW_INLINE int64_t load_entry(const Params& p, int tile, int warp, int lane) const {
    const int page = key_of(tile, warp, lane) / p.page_size;
    return page < w.keys.count ? tw::page_at(p, w.keys, page) : 0;
  }
  TW_INLINE void start_unit(const Params& p, int warp, int lane) {
    first = w.tile;
    entry = load_entry(p, first, warp, lane);
    ahead = load_entry(p, first + 2, warp, lane);
  }
  TW_INLINE void next_tile(const Params& p, int warp, int lane) {
    if (++w.tile - first < 2) return;
    first = w.tile;
    entry = ahead;
    ahead = load_entry(p, first + 2, warp, lane);
  }

  // The keys and values of the next tile on their way to shared memory; zeros beyond the length.
  TW_INLINE void issue(const Params& p, const Variant& variant, const Range& range, Element* ring, int warp, int lane) {
    if (has_unit(w, range) && w.tile >= w.end) {
      do next_unit(w, p, variant, range); while (has_unit(w, range) && w.tile >= w.end);
      if (has_unit(w, range)) start_unit(p, warp, lane);
    }
    if (has_unit(w, range)) {
      const int valid = w.keys.length - w.seen.at(w.tile) * TILE - warp * KEYS;  // keys of this warp that exist
      const int slot = key_of(first, warp, lane) % p.page_size;
      const int from = (w.tile - first) * KEYS;  // the lane that holds the first key of the tile
      const bool exists = lane % KEYS < valid;
      const int64_t k_row = exists ? entry * p.k_page + slot * p.k_slot : 0;
      const int64_t v_row = exists ? entry * p.v_page + slot * p.v_slot : 0;
      const Element* k = p.k + w.head * p.k_head;
      const Element* v = p.v + w.head * p.v_head;
      Element* to = ring + stage * STAGE;
#pragma unroll
      for (int i = 0; i < (KEYS * CHUNKS + 31) / 32; ++i) {
        const int n = i * 32 + lane, row = n / CHUNKS, chunk = n % CHUNKS;
        const int64_t k_at = __shfl_sync(0xffffffffu, k_row, from + row % KEYS);
        const int64_t v_at = __shfl_sync(0xffffffffu, v_row, from + row % KEYS);
        if (KEYS * CHUNKS % 32 == 0 || row < KEYS) {
          const int bytes = row < valid && chunk < D / 8 ? 16 : 0;
          const int column = bytes ? chunk * 8 : 0;
          tw::copy_async_16(to + row * ROW + chunk * 8, k + k_at + column, bytes);
          tw::copy_async_16(to + (KEYS + row) * ROW + chunk * 8, v + v_at + column, bytes);
        }
      }
      next_tile(p, warp, lane);
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    tw::copy_async_commit();
  }
};

// In all fragments lane = 4 g + t. Scores: keys g and g + 8 × packed rows 2 t and 2 t + 1 of a block;
// outputs: columns g and g + 8 of 16 × the same rows.
struct Rows {  // of one warp: outputs not yet divided, row maxima (of scores · log2 e) and row sums
  float o[BLOCKS][DP / 16][4];
  float row_max[BLOCKS][2], row_sum[BLOCKS][2];
};

TW_INLINE void reset(Rows& r) {
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n) {
#pragma unroll
    for (int j = 0; j < DP / 16; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) r.o[n][j][i] = 0.0f;
    r.row_max[n][0] = r.row_max[n][1] = lowest();
    r.row_sum[n][0] = r.row_sum[n][1] = 0.0f;
  }
}

struct Query {  // of one unit: fragments of q, and its rows
  uint32_t b[BLOCKS][DP / 16][2];
  int token, rows, first;  // the first query's row of q, packed rows, the first query's position
};

TW_INLINE void load_query(Query& q, const Params& p, const Walk& w, int lane) {
  // Without qo_indptr each request has one query: the loads of q wait for no other load.
  const int begin = p.qo_indptr ? p.qo_indptr[w.request] : w.request;
  const int count = p.qo_indptr ? p.qo_indptr[w.request + 1] - begin : 1;
  q.token = begin;
  q.rows = count * G < M ? count * G : M;
  q.first = tw::first_query(p, w.keys, w.request, count);
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n) {
    const int row = n * 8 + (lane >> 2);
    const Element* from = p.q + (begin + row / G) * p.q_token + (w.head * G + row % G) * p.q_head;
#pragma unroll
    for (int j = 0; j < DP / 16; ++j)
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const int column = j * 16 + low * 8 + (lane & 3) * 2;
        q.b[n][j][low] = row < q.rows && column < D ? __ldg(reinterpret_cast<const uint32_t*>(from + column)) : 0u;
      }
  }
}

// Values of keys that no row sees become 0: a weight of 0 times NaN or Inf would reach the outputs.
TW_INLINE void hide_values(Element* values, const bool (&visible)[2], int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t lanes = __ballot_sync(0xffffffffu, visible[half]);
#pragma unroll
    for (int g = 0; g < 8; ++g)
      if (!(lanes & 0xfu << (g * 4)))
        for (int c = lane; c < CHUNKS; c += 32)
          *reinterpret_cast<uint4*>(values + (half * 8 + g) * ROW + c * 8) = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
}

TW_INLINE float max_over_keys(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
TW_INLINE float sum_over_keys(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

TW_INLINE At at_of(const Walk& w, const Query& q, int row, int key) {
  return At{q.first + row / G, w.keys.position(key), w.head * G + row % G, w.head, w.request,
            q.token + (row < q.rows ? row / G : 0), key, q.rows / G, w.keys.length};
}

// One tile for one warp: 16 keys from `stage` at position key0 on.
TW_INLINE void attend(const Params& p, const Variant& variant, const Walk& w, const Query& q, Element* stage, int key0, Rows& rows, int lane) {
  const int last = key0 + KEYS < w.keys.length ? key0 + KEYS - 1 : w.keys.length - 1;
  const tw::Tile tile{tw::Bound{q.first, q.first + (q.rows - 1) / G}, tw::Bound{w.keys.position(key0), w.keys.position(last)},
                      tw::Bound{w.head * G, w.head * G + G - 1}, tw::bound(w.head), tw::bound(w.request),
                      tw::Bound{key0, last}, tw::bound(q.rows / G), tw::bound(w.keys.length)};
  const int kind = last < key0 || q.rows == 0 ? tw::EMPTY : variant.tile_class(tile);
  if (kind == tw::EMPTY) return;
  const bool full = last == key0 + KEYS - 1 && kind == tw::FULL;
  float s[BLOCKS][4] = {};
  const Element* k = stage + (lane & 15) * ROW + (lane >> 4) * 8;
#pragma unroll
  for (int j = 0; j < DP / 16; ++j) {
    uint32_t a[4];
    tw::load_matrices(a, k + j * 16);
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) tw::mma<Kind>(s[n], a, q.b[n][j][0], q.b[n][j][1]);
  }
  bool visible[2] = {};  // keys g and g + 8, to any row of this lane
  uint32_t weights[BLOCKS][2];
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n) {
    float rescale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = n * 8 + (lane & 3) * 2 + i;
      float largest = rows.row_max[n][i];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& x = s[n][half * 2 + i];
        const int key = key0 + half * 8 + (lane >> 2);
        const At at = at_of(w, q, row, key);
        x = variant.logits(x * p.sm_scale, at) * LOG2E;
        if (!full) {
          const bool seen = row < q.rows && key < w.keys.length && variant.mask(at);
          visible[half] |= seen;
          if (!seen) x = lowest();
        }
        largest = fmaxf(largest, x);
      }
      largest = max_over_keys(largest);
      const float base = largest == lowest() ? 0.0f : largest;
      rescale[i] = tw::exp2(rows.row_max[n][i] - base);
      rows.row_max[n][i] = largest;
      const float low = tw::exp2(s[n][i] - base), high = tw::exp2(s[n][2 + i] - base);
      rows.row_sum[n][i] = rows.row_sum[n][i] * rescale[i] + (low + high);
      s[n][i] = low;
      s[n][2 + i] = high;
    }
    if (__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int j = 0; j < DP / 16; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) rows.o[n][j][i] *= rescale[i & 1];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      weights[n][half] = tw::transpose_matrix(tw::pack<Kind>(s[n][half * 2], s[n][half * 2 + 1]));
  }
  if (!full) hide_values(stage + KEYS * ROW, visible, lane);
  const Element* v = stage + (KEYS + (lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * 8;
#pragma unroll
  for (int j = 0; j < DP / 16; ++j) {
    uint32_t a[4];
    tw::load_matrices_transposed(a, v + j * 16);
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) tw::mma<Kind>(rows.o[n][j], a, weights[n][0], weights[n][1]);
  }
}

TW_INLINE void store_four(float* to, float a, float b, float c, float d) { *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d); }
TW_INLINE void store_four(uint16_t* to, float a, float b, float c, float d) { *reinterpret_cast<uint2*>(to) = make_uint2(tw::pack<Kind>(a, b), tw::pack<Kind>(c, d)); }

// Four outputs of a row, divided by its sum; a row that sees nothing has o = 0 and lse = −inf.
TW_INLINE void write(const Params& p, const Walk& w, const Query& q, int row, int column, const float (&o)[4], float row_max, float row_sum) {
  float largest = row_max / LOG2E, keep = 1.0f;
  if constexpr (Variant::SINK) keep = tw::add_sink(Variant(p).sink(at_of(w, q, row, 0)), largest, row_sum);
  const bool none = row_sum == 0.0f;
  const float scale = none ? 0.0f : keep / row_sum;
  const int64_t at = static_cast<int64_t>(q.token + row / G) * p.qo_heads + w.head * G + row % G;
  if (column < D) store_four(p.o + at * D + column, o[0] * scale, o[1] * scale, o[2] * scale, o[3] * scale);
  if (column == 0) p.lse[at] = none ? lowest() : largest + log2f(row_sum) / LOG2E;
}

// Partial states `first` … `last` of a unit, in the order of their CTAs, as the result. PARTS are read
// at once.
template <int PARTS>
TW_INLINE void merge(const Params& p, const Walk& w, const Query& q, int first, int last, int member, int thread) {
  for (int i = thread; i < q.rows * (DP / 4); i += THREADS) {
    const int row = i / (DP / 4), column = i % (DP / 4) * 4;
    float row_max = lowest(), row_sum = 0.0f, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int k0 = first; k0 <= last; k0 += PARTS) {  // many parts at a time: one latency
      float2 sum[PARTS];
      float4 x[PARTS];
#pragma unroll
      for (int j = 0; j < PARTS; ++j) {
        const int k = k0 + j <= last ? k0 + j : last;
        const float* part = p.partials + (2 * (static_cast<int64_t>(k) * GANG + member) + (k == first ? 1 : 0)) * PARTIAL;
        sum[j] = __ldcg(reinterpret_cast<const float2*>(part + M * DP + row * 2));
        x[j] = __ldcg(reinterpret_cast<const float4*>(part + row * DP + column));
      }
      float largest = row_max;
#pragma unroll
      for (int j = 0; j < PARTS; ++j) {
        if (k0 + j > last) sum[j].x = lowest();
        largest = fmaxf(largest, sum[j].x);
      }
      const float base = largest == lowest() ? 0.0f : largest, keep = tw::exp2(row_max - base);
      row_max = largest;
      row_sum *= keep;
#pragma unroll
      for (int c = 0; c < 4; ++c) o[c] *= keep;
#pragma unroll
      for (int j = 0; j < PARTS; ++j) {
        const float factor = tw::exp2(sum[j].x - base);
        row_sum += sum[j].y * factor;
        o[0] += x[j].x * factor;
        o[1] += x[j].y * factor;
        o[2] += x[j].z * factor;
        o[3] += x[j].w * factor;
      }
    }
    write(p, w, q, row, column, o, row_max, row_sum);
  }
}

// The warps' states become one; it is the result, or a part of it that the last CTA merges.
TW_INLINE void finish(const Params& p, const Walk& w, const Query& q, Rows& rows, char* smem, int stage, const Range& range, int cta, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  float2* sums = reinterpret_cast<float2*>(smem + RING_BYTES);
  int* arrived = reinterpret_cast<int*>(sums + WARPS * M);
  Element* ring = reinterpret_cast<Element*>(smem);
  float* mine = reinterpret_cast<float*>(ring + (warp * STAGES + stage) * STAGE);
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = n * 8 + (lane & 3) * 2 + i, column = lane >> 2;
      const float sum = sum_over_keys(rows.row_sum[n][i]);
      if (row < q.rows) {
        if (column == 0) sums[warp * M + row] = make_float2(rows.row_max[n][i], sum);
#pragma unroll
        for (int j = 0; j < DP / 16; ++j) {
          mine[row * PITCH + j * 16 + column] = rows.o[n][j][i];
          mine[row * PITCH + j * 16 + column + 8] = rows.o[n][j][2 + i];
        }
      }
    }
  tw::bar_sync(1, THREADS);
  const bool head_part = w.unit == range.begin.unit && range.begin.tile > 0;
  const bool tail_part = w.unit == range.end.unit;
  float* slot = p.partials + (2 * static_cast<int64_t>(cta) + (head_part ? 0 : 1)) * PARTIAL;
  for (int i = thread; i < q.rows * (DP / 4); i += THREADS) {
    const int row = i / (DP / 4), column = i % (DP / 4) * 4;
    float row_max = lowest(), row_sum = 0.0f, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < WARPS; ++k) row_max = fmaxf(row_max, sums[k * M + row].x);
    const float base = row_max == lowest() ? 0.0f : row_max;
#pragma unroll
    for (int k = 0; k < WARPS; ++k) {
      const float factor = tw::exp2(sums[k * M + row].x - base);
      const float4 part = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(ring + (k * STAGES + stage) * STAGE) + row * PITCH + column);
      row_sum += sums[k * M + row].y * factor;
      o[0] += part.x * factor;
      o[1] += part.y * factor;
      o[2] += part.z * factor;
      o[3] += part.w * factor;
    }
    if (!head_part && !tail_part) {
      write(p, w, q, row, column, o, row_max, row_sum);
    } else {
      *reinterpret_cast<float4*>(slot + row * DP + column) = make_float4(o[0], o[1], o[2], o[3]);
      if (column == 0) *reinterpret_cast<float2*>(slot + M * DP + row * 2) = make_float2(row_max, row_sum);
    }
  }
  if (head_part || tail_part) {
    const int first = head_part ? range.begin.first : cta / GANG, last = tail_part ? range.end.last : cta / GANG;
    tw::bar_sync(1, THREADS);
    if (thread == 0) *arrived = tw::arrive(p.counters + first * GANG + cta % GANG) == last - first;
    tw::bar_sync(1, THREADS);
    if (*arrived) {
      if (thread == 0) p.counters[first * GANG + cta % GANG] = 0;
      if (last - first < 4) {
        merge<4>(p, w, q, first, last, cta % GANG, thread);
      } else {
        merge<16>(p, w, q, first, last, cta % GANG, thread);
      }
    }
  }
  tw::bar_sync(1, THREADS);
}

TW_INLINE void body(const Params& p, int cta, int thread, char* smem) {
  const Range range{p.cuts[cta / GANG], p.cuts[cta / GANG + 1]};
  const int warp = thread / 32, lane = thread % 32;
  Walk w{range.begin.unit, range.begin.request, range.begin.group * GANG + cta % GANG, range.begin.tile, 0, {}, {}};
  if (!has_unit(w, range)) return;
  const Variant variant(p);
  Element* ring = reinterpret_cast<Element*>(smem) + warp * STAGES * STAGE;
  w.keys = tw::pages_of(p, w.request, MAX_KEYS);
  bound(w, p, variant, range);
  Copier copier{w, 0, 0, 0, 0};
  copier.start_unit(p, warp, lane);
  Query q;
  load_query(q, p, w, lane);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) copier.issue(p, variant, range, ring, warp, lane);
  int stage = 0;
  while (has_unit(w, range)) {
    Rows rows;
    reset(rows);
    for (; w.tile < w.end; ++w.tile) {
      tw::copy_async_wait<STAGES - 2>();
      __syncwarp();
      copier.issue(p, variant, range, ring, warp, lane);
      attend(p, variant, w, q, ring + stage * STAGE, w.seen.at(w.tile) * TILE + warp * KEYS, rows, lane);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    // The stage before the next one is free: it was read last, and the next copy goes there.
    finish(p, w, q, rows, smem, stage == 0 ? STAGES - 1 : stage - 1, range, cta, thread);
    next_unit(w, p, variant, range);
    if (has_unit(w, range)) load_query(q, p, w, lane);
  }
  tw::copy_async_wait<0>();
}

}  // namespace attention

extern "C" __global__ void __launch_bounds__(attention::THREADS, attention::CTAS) stage0(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) char smem[];
  tw::start_next_launch();
  tw::wait_for_previous_launch();
  attention::body(p, blockIdx.x, threadIdx.x, smem);
}
