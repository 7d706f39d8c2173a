// Attention of few query rows over long KV (decode, short append, shared prefixes) by tensor cores, sm_80
// and newer.
//
// Keys are the rows and packed rows (query rows × heads of a group) the columns of mma.sync m16n8k16:
// S' = K Q', then O' = V' P', so that 8 rows fill the instruction. The plan cuts the tiles of all units
// (decode_walk.cuh) into contiguous ranges of equal cost. A range is worked on by HEAD_BLOCK CTAs at once,
// each with a head of its own, so that they read the same pages at the same time. Each warp copies 16 of
// the keys of a tile into a ring of cp.async stages of its own, which runs on across units.
// A warp works on its own 16 keys of a tile, for all rows; warps synchronise where a unit ends.
// Units that several ranges share leave partial states; the last CTA to arrive merges them in the order of
// the ranges, so that the bits of a result do not depend on the order of arrival.
//
// Where requests share keys (LEVELS > 1) the plan decides which nodes of these a launch in front does: of the Hopper
// family (prefill_hopper.cuh) or of this one (KIND is FRONT). That leaves the states of all rows, in chunks of the keys
// (shared_items.cuh); the launch behind it (BEHIND) walks what is left of the keys of each request, starts while the
// other one runs, and adds the states where a row ends. Where nothing is in front a request walks all of its keys (ALONE).
//
// In front of this file: gpu.cuh, mma.cuh, async.cuh, bounds.h, table.h, variant.h, the constants of
// `attention` (DK and DV: elements of a row of K and of V, G query heads of a KV head, BLOCKS of 8 packed rows of a unit,
// HEAD_BLOCK, WARPS, STAGES, CTAS of an SM, MAX_KEYS, KIND, BLOCK queries of an item of the launch in front; the types
// Element and Kind), the structs `Params`, `Cut`, `At` and `Variant`, the barrier id BARRIER.
//
// Units: ranges × HEAD_BLOCK (FRONT: `front_ctas` of the parameters, any number), one a CTA; SMEM_BYTES of dynamic shared memory:
//   [warp][stage][16 rows of K of ROW_K elements, 16 rows of V of ROW_V]   a row ends in 16 bytes against conflicts
//   [warp][packed row] (row maximum, row sum); one word: whether this CTA arrived last
//   where Q_SHARED: [packed row][ROW_K elements] of q
//   where KIND is FRONT: [warp][row of q] whose it is
// Where a unit ends, the stage that was read last holds the outputs of each warp.
// One stage (rows too long for two): the keys of the next tile are copied when those of this one have been read,
// and so are its values, so that one of the two is always under way.
// Assumes: fewer than 2^32 pages; DK and DV multiples of 8, rows of K and V 16-byte aligned, q rows × G at most 8 · BLOCKS for a request.

namespace attention {

constexpr int THREADS = WARPS * 32;
constexpr int KEYS = 16;             // of a tile, for one warp
constexpr int TILE = WARPS * KEYS;   // keys of a tile
constexpr int LEVELS = table::LEVELS;
constexpr int ROWS = BLOCKS * 8;     // the columns of the matrix operand
constexpr int TOKENS = ROWS / G;     // of a unit, where a launch in front does it
template <int N> constexpr int PADDED = (N + 15) / 16 * 16;
constexpr int DKP = PADDED<DK>, DP = PADDED<DV>;
constexpr int ROW_K = DKP + 8, ROW_V = DP + 8;    // elements of a row in shared memory
constexpr int STAGE = KEYS * (ROW_K + ROW_V);     // elements
constexpr bool APART = STAGES == 1;               // keys and values are waited for one after the other
constexpr bool Q_SHARED = BLOCKS * DKP > 256;     // q stays in shared memory: its registers are for the outputs
constexpr int RING_BYTES = WARPS * STAGES * STAGE * 2;
constexpr int SUMS_BYTES = WARPS * ROWS * 8 + 16;
constexpr int Q_BYTES = Q_SHARED ? ROWS * ROW_K * 2 : 0;
constexpr int SMEM_BYTES = RING_BYTES + SUMS_BYTES + Q_BYTES + (KIND == FRONT ? WARPS * ROWS * 16 : 0);
constexpr int PITCH = DP + 4;        // floats of a row of outputs in shared memory: no bank conflicts
constexpr int PARTIAL = ROWS * (DP + 2);  // floats of a partial state: outputs, then (maximum, sum) a row
constexpr int STATE = DP + 8;        // floats of a state that a launch in front leaves: outputs, maximum, sum
constexpr float LOG2E = 1.4426950408889634f;
constexpr int OUT_AT = APART ? KEYS * ROW_K : 0;  // where a stage holds the outputs of a warp, some rows at a time
template <int N> constexpr bool OUT_FITS = N * 8 * PITCH * 4 <= (STAGE - OUT_AT) * 2;
constexpr int OUT_BLOCKS = OUT_FITS<BLOCKS> ? BLOCKS : OUT_FITS<2> ? 2 : 1;
static_assert(OUT_FITS<OUT_BLOCKS> && BLOCKS % OUT_BLOCKS == 0, "a stage holds outputs of a warp");
static_assert(LEVELS == 1 || !APART && !Q_SHARED && OUT_BLOCKS == BLOCKS, "long rows are of requests that share no keys");

}  // namespace attention

#include "shared_items.cuh"
#include "decode_walk.cuh"
#include "decode_query.cuh"

namespace attention {

using tw::lowest;

// Issues the copies of one warp, some tiles ahead of the arithmetic. A lane holds the table's entry for
// one key of two neighbouring tiles; entries are loaded two tiles before they are needed, because under
// load a read that misses the L1 waits behind the copies for microseconds.
struct Copier {
  Walk w;
  uint32_t inverse;          // 2^32 / page_size, rounded down
  int stage = 0, first = 0;  // the tile of the unit that `entry` starts with
  uint32_t entry = 0, ahead = 0;  // pages, of tiles first, first + 1 and of the two after them

  TW_INLINE Copier(const Params& p, const Walk& from) : w(from), inverse(~0u / static_cast<uint32_t>(p.page_size)) {}
  // The page of a key and its slot there. The estimate is at most one too small.
  TW_INLINE uint32_t page_of(const Params& p, uint32_t key, uint32_t& slot) const {
    const uint32_t size = p.page_size, page = static_cast<uint64_t>(key) * inverse >> 32, rest = key - page * size;
    slot = rest < size ? rest : rest - size;
    return rest < size ? page : page + 1;
  }

  // Behind the last tile it is any number above all keys.
  TW_INLINE uint32_t key_of(int tile, int warp, int lane) const {
    return static_cast<uint32_t>(w.seen.at(tile + lane / KEYS)) * TILE + warp * KEYS + lane % KEYS;
  }
  TW_INLINE uint32_t load_entry(const Params& p, int tile, int warp, int lane) const {
    const uint32_t key = key_of(tile, warp, lane);
    uint32_t slot;
    return key < static_cast<uint32_t>(w.keys.length) ? static_cast<uint32_t>(tw::page_at(p, w.keys, w.head, page_of(p, key, slot))) : 0;
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

  // Copy `i` of a lane, of 16 bytes of some of 16 rows of N elements.
  template <int N>
  TW_INLINE void copy_part(int i, Element* to, const Element* rows, int64_t at, int valid, int from, int lane) {
    constexpr int CHUNKS = PADDED<N> / 8;
    constexpr bool WHOLE = 32 % CHUNKS == 0;  // rows: addresses are a constant apart
    if (i * 32 >= KEYS * CHUNKS) return;
    const int n = i * 32 + lane, row = WHOLE ? lane / CHUNKS + i * (32 / CHUNKS) : n / CHUNKS, chunk = WHOLE ? lane % CHUNKS : n % CHUNKS;
    const int64_t row_at = __shfl_sync(0xffffffffu, at, from + row % KEYS);
    if (KEYS * CHUNKS % 32 == 0 || row < KEYS) {
      const int bytes = row < valid && chunk < N / 8 ? 16 : 0;
      tw::copy_async_16(to + row * (PADDED<N> + 8) + chunk * 8, rows + row_at + (bytes ? chunk * 8 : 0), bytes);
    }
  }

  // The keys and values of the next tile (or first the ones, then the others) on their way to shared memory;
  // zeros beyond the length. Behind a unit it goes on with the next one.
  template <bool COPY_K = true, bool COPY_V = true>
  TW_INLINE void issue(const Params& p, const Variant& variant, const Range& range, Element* ring, int member, int warp, int lane) {
    if (COPY_K && in_range(w, range) && w.tile >= w.end) {
#pragma unroll 1
      do {
        if (has_piece(w, range)) next_piece(w, p, variant, range);
        else next_unit(w, p, variant, range, member);
      } while (in_range(w, range) && w.tile >= w.end);
      if (in_range(w, range)) start_unit(p, warp, lane);
    }
    if (in_range(w, range)) {
      const int valid = w.keys.length - w.seen.at(w.tile) * TILE - warp * KEYS;  // keys of this warp that exist
      uint32_t slot;
      page_of(p, key_of(first, warp, lane), slot);
      const int from = (w.tile - first) * KEYS;  // the lane that holds the first key of the tile
      const bool exists = lane % KEYS < valid;
      const int64_t k_row = exists ? static_cast<int64_t>(entry) * p.k_page + slot * p.k_slot : 0;
      const int64_t v_row = exists ? static_cast<int64_t>(entry) * p.v_page + slot * p.v_slot : 0;
      const Element* k = p.k + w.head * p.k_head;
      const Element* v = p.v + w.head * p.v_head;
      Element* to = ring + stage * STAGE;
#pragma unroll
      for (int i = 0; i < (KEYS * (DKP > DP ? DKP : DP) / 8 + 31) / 32; ++i) {
        if constexpr (COPY_K) copy_part<DK>(i, to, k, k_row, valid, from, lane);
        if constexpr (COPY_V) copy_part<DV>(i, to + KEYS * ROW_K, v, v_row, valid, from, lane);
      }
      if constexpr (COPY_V) next_tile(p, warp, lane);
    }
    if constexpr (!COPY_V) {
      tw::copy_async_commit();
      return;
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

// Whose the rows of q of a unit are, in the memory of one warp.
TW_INLINE tw::Row* rows_of_warp(char* smem, int warp) { return reinterpret_cast<tw::Row*>(smem + RING_BYTES + SUMS_BYTES + Q_BYTES) + warp * ROWS; }
TW_INLINE void load_rows(const Params& p, const Walk& w, tw::Row* rows, int lane) {
  if constexpr (LEVELS > 1 && KIND == FRONT) {
    for (int t = lane; t < w.rows / G; t += 32) rows[t] = tw::row_of(p, w.node, w.token + t, MAX_KEYS);
    __syncwarp();
  }
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

TW_INLINE At at_of(const Walk& w, const tw::Row* rows, int row, int key) {
  const int t = row < w.rows ? row / G : 0, head = w.head * G + row % G;
  if constexpr (LEVELS > 1 && KIND == FRONT) {
    const tw::Row own = rows[t];
    return At{own.position, w.keys.position(key), head, w.head, own.request, w.token + t, w.keys.number(key), own.qo_len, own.kv_len};
  } else if constexpr (LEVELS > 1) {
    return At{w.first + row / G, w.keys.position(key), head, w.head, w.request, w.token + t, w.keys.number(key), w.rows / G, w.kv_len};
  }
  return At{w.first + row / G, w.keys.position(key), head, w.head, w.node, w.token + t, key, w.rows / G, w.keys.length};
}

// Adds the values of 16 keys, each times its weight, to the outputs. MASKED: values of keys that no row sees
// (`visible`, to rows of this lane) count as 0: a weight of 0 times NaN or Inf would reach the outputs.
template <bool MASKED>
TW_INLINE void add_values(Rows& rows, const float (&s)[BLOCKS][4], const bool (&visible)[2], const Element* v, int lane) {
  uint32_t weights[BLOCKS][2], keep[2];  // of keys 2 t and 2 t + 1, and of those 8 later
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) weights[n][half] = tw::transpose_matrix(tw::pack<Kind>(s[n][half * 2], s[n][half * 2 + 1]));
    if constexpr (MASKED) {
      const uint32_t lanes = __ballot_sync(0xffffffffu, visible[half]) >> (lane & 3) * 8;
      keep[half] = (lanes & 0xf ? 0xffffu : 0) | (lanes & 0xf0 ? 0xffff0000u : 0);
    }
  }
#pragma unroll
  for (int j = 0; j < DP / 16; ++j) {
    uint32_t a[4];
    tw::load_matrices_transposed(a, v + j * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (MASKED) a[i] &= keep[i >> 1];
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) tw::mma<Kind>(rows.o[n][j], a, weights[n][0], weights[n][1]);
  }
}

// 16 keys for one warp, from key0 on, whose rows lie in a stage.
// `keys_read` is called when the keys are, `values_ready` in front of the first value; both where no row sees a key, too.
template <class Q, class Read, class Ready>
TW_INLINE void attend(const Params& p, const Variant& variant, const Walk& w, const Q& q, const tw::Row* whose, const Element* stage, int key0, Rows& rows, int lane, bool exists, Read keys_read, Ready values_ready) {
  const int last = key0 + KEYS < w.keys.length ? key0 + KEYS - 1 : w.keys.length - 1;
  const tw::Bound kv{w.keys.position(key0), w.keys.position(last)}, number{w.keys.number(key0), w.keys.number(last)};
  const int kind = last < key0 || !exists ? tw::EMPTY : variant.tile_class(tile_of(p, w, kv, number));
  if (kind == tw::EMPTY) {
    keys_read();
    values_ready();
    return;
  }
  const bool full = last == key0 + KEYS - 1 && kind == tw::FULL;
  float s[BLOCKS][4] = {};
  const Element* k = stage + (lane & 15) * ROW_K + (lane >> 4) * 8;
#pragma unroll
  for (int j = 0; j < DKP / 16; ++j) {
    uint32_t b[BLOCKS][2];
    q.load(b, j);
    uint32_t a[4];
    tw::load_matrices(a, k + j * 16);
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) tw::mma<Kind>(s[n], a, b[n][0], b[n][1]);
  }
  keys_read();
  bool visible[2] = {};  // keys lane / 4 and 8 later, to any row of this lane
  float largest[BLOCKS][2], rescale[BLOCKS][2];
  auto each_score = [&](auto value) {  // x = value(x, where it is)
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        largest[n][i] = rows.row_max[n][i];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[n][half * 2 + i];
          x = value(x, n * 8 + (lane & 3) * 2 + i, key0 + half * 8 + (lane >> 2), visible[half]);
          largest[n][i] = fmaxf(largest[n][i], x);
        }
      }
  };
  each_score([&](float x, int row, int key, bool&) { return variant.logits(x * p.sm_scale, at_of(w, whose, row, key)) * LOG2E; });
  if (!full) {
    each_score([&](float x, int row, int key, bool& visible) {
      const bool seen = row < w.rows && key < w.keys.length && variant.mask(at_of(w, whose, row, key));
      visible |= seen;
      return seen ? x : lowest();
    });
  }
  bool rescales = false;
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float top = max_over_keys(largest[n][i]), base = top == lowest() ? 0.0f : top;
      rescale[n][i] = tw::exp2(rows.row_max[n][i] - base);
      rescales |= rescale[n][i] != 1.0f;
      rows.row_max[n][i] = top;
      float sum = 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& x = s[n][half * 2 + i];
        x = tw::exp2(x - base);
        sum += x;
      }
      rows.row_sum[n][i] = rows.row_sum[n][i] * rescale[n][i] + sum;
    }
  if (__any_sync(0xffffffffu, rescales)) {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
      for (int j = 0; j < DP / 16; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) rows.o[n][j][i] *= rescale[n][i & 1];
  }
  values_ready();
  const Element* v = stage + KEYS * ROW_K + ((lane & 7) + (lane >> 4) * 8) * ROW_V + (lane >> 3 & 1) * 8;
  if (full) add_values<false>(rows, s, visible, v, lane);
  else add_values<true>(rows, s, visible, v, lane);
}

}  // namespace attention

#include "decode_finish.cuh"

namespace attention {

// The units from `w` on, up to the end of the range.
TW_INLINE void run_units(const Params& p, const Variant& variant, Walk& w, const Range& range, char* smem, unsigned cta, unsigned thread) {
  const int warp = thread / 32, lane = thread % 32, member = cta % HEAD_BLOCK;
  Element* ring = reinterpret_cast<Element*>(smem) + warp * STAGES * STAGE;
  tw::Row* whose = rows_of_warp(smem, warp);
  Copier copier(p, w);
  copier.start_unit(p, warp, lane);
  typename QueryOf<Q_SHARED>::type q(reinterpret_cast<Element*>(smem + RING_BYTES + SUMS_BYTES), thread);
  load_query(q, p, w, lane);
  load_rows(p, w, whose, lane);
  int stage = 0, issued = 0;
  auto keys_read = [&] {
    if constexpr (APART) {
      __syncwarp();
      copier.template issue<true, false>(p, variant, range, ring, member, warp, lane);
    }
  };
  auto values_ready = [&] {
    if constexpr (APART) {
      tw::copy_async_wait<1>();
      __syncwarp();
    }
  };
#pragma unroll 1
  while (in_range(w, range)) {
    Rows rows;
    reset(rows);
#pragma unroll 1
    for (;; next_piece(w, p, variant, range)) {
#pragma unroll 1
      for (; w.tile < w.end; ++w.tile) {
        if constexpr (!APART) {
#pragma unroll 1
          do {  // one place that issues copies: a few tiles of them in front of the first
            if (issued >= STAGES - 1) {
              tw::copy_async_wait<STAGES - 2>();
              __syncwarp();
            }
            copier.issue(p, variant, range, ring, member, warp, lane);
          } while (++issued < STAGES);
        }
        const int key0 = w.seen.at(w.tile) * TILE + warp * KEYS;
#pragma unroll 1
        do {  // where they are copied apart: once for the first keys, then for each tile
          if (APART && issued) {
            __syncwarp();
            copier.template issue<false, true>(p, variant, range, ring, member, warp, lane);
            values_ready();  // the keys, too, by the order of the copies
          }
          const bool exists = !APART || issued;
          attend(p, variant, w, q, whose, ring + stage * STAGE, key0, rows, lane, exists, keys_read, values_ready);
        } while (APART && issued++ == 0);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
      }
      if (!has_piece(w, range)) break;
    }
    // The stage before the next one is free: it was read last, and the next copy goes there.
    finish(p, w, rows, smem, stage == 0 ? STAGES - 1 : stage - 1, range, cta, thread);
    next_unit(w, p, variant, range, member);
    load_query(q, p, w, lane);  // none where there is no unit
    load_rows(p, w, whose, lane);
  }
  tw::copy_async_wait<0>();
}

TW_INLINE void run(const Params& p, int64_t unit, int number, char* smem) {
  const unsigned cta = static_cast<unsigned>(unit), thread = number;
  const Variant variant(p);
  if constexpr (LEVELS > 1 && KIND == FRONT) {
    const int items = tw::node_at(p, tw::own_node(p, 0)).item;
#pragma unroll 1
    for (int n = cta; n < items; n += p.front_ctas) {
      const int node = tw::shared_node(p, n, thread % 32);
      const tw::SharedItem item = tw::shared_item<BLOCK>(p, node, tw::node_at(p, node), n);
#pragma unroll 1
      for (int token = item.token; token < item.end; token += TOKENS) {
        Range range;
        Walk w = start_item(p, variant, item, token, range);
        run_units(p, variant, w, range, smem, cta, thread);  // of one unit: no member of a range matters
      }
    }
  } else if constexpr (!Q_SHARED) {
    const Range range = range_of(p, cta);
    Walk w = start(p, variant, range, cta % HEAD_BLOCK);
    if (in_range(w, range)) run_units(p, variant, w, range, smem, cta, thread);
  } else {
    __shared__ Range range;  // the tiles take all registers
    if (thread == 0) range = range_of(p, cta);
    tw::bar_sync(BARRIER, THREADS);
    Walk w = start(p, variant, range, cta % HEAD_BLOCK);
    while (in_range(w, range)) run_units(p, variant, w, range, smem, cta, thread);  // once; with `if` ptxas spills
  }
}

}  // namespace attention
