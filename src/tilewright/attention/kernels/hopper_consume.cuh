// The consumers of prefill_hopper.cuh, which includes this file and says what they do.
#include "hopper_write.cuh"

namespace attention {

struct Consumer : Writer {
  uint64_t q, k, v;          // descriptors of the first tile of Q, K and V
  float inner;               // BENDS: a product times this is the tanh's argument
  float factor;              // exp2 of factor · (score − row maximum) is a weight

  TW_INLINE void issue_scores(float (&s)[BN / 2], int buffer, int stage) const {
    const uint64_t queries = q + buffer * (Q_BYTES / 16), keys = k + stage * (K_BYTES / 16);
    tw::wgmma<Kind, BN, false, false>::of(s, queries, keys);
#pragma unroll
    for (int i = 1; i < DK / 16; ++i)
      tw::wgmma<Kind, BN, true, false>::of(s, queries + i / 4 * (Q_BLOCK / 16) + i % 4 * 2, keys + i / 4 * (KV_BLOCK / 16) + i % 4 * 2);
    tw::wgmma_commit();
  }
  // `fresh`: instead of o, of which nothing is kept; the products after these add to them.
  TW_INLINE void issue_outputs(float (&o)[DV / 2], const uint32_t (&weights)[BN / 4], int stage, bool& fresh) const {
    const uint64_t values = v + stage * (V_BYTES / 16);
#pragma unroll
    for (int i = 0; i < BN / 16; ++i) tw::wgmma<Kind, DV, true, true>::of(o, weights + i * 4, values + i * 128, i > 0 || !fresh);
    tw::wgmma_commit();
    fresh = false;
  }

  // The rows of an item before its first key.
  TW_INLINE Rows begin(const Slot& item) const {
    Rows rows{{lowest(), lowest()}, {0.0f, 0.0f}};
    if constexpr (LEANS)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const At at = at_of(p, item, group * 64 + warp * 16 + half * 8 + lane / 4, 0);
        rows.slope[half] = variant.slope(at) * LOG2E;
        rows.start[half] = variant.distance(at) + lane % 4 * 2;
      }
    return rows;
  }
  // Products become what the weights are computed of, beside P·V: no branch, no memory. Where scores lean, `shift` is
  // what all of a row's share, and each key adds its column times the slope.
  TW_INLINE void bend(float (&s)[BN / 2], Rows& rows, int tile) const {
    if constexpr (BENDS)
#pragma unroll
      for (int i = 0; i < BN / 2; ++i) s[i] = tw::tanh_fast(s[i] * inner);
    if constexpr (LEANS)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows.shift[half] = rows.slope[half] * static_cast<float>(rows.start[half] + tile * BN);
        const float slope = rows.slope[half] * tw::reciprocal_fast(factor);
#pragma unroll
        for (int j = 0; j < BN / 8; ++j) {
          s[j * 4 + half * 2] = fmaf(slope, j * 8, s[j * 4 + half * 2]);
          s[j * 4 + half * 2 + 1] = fmaf(slope, j * 8 + 1, s[j * 4 + half * 2 + 1]);
        }
      }
  }
  // The first of this thread's columns of a row, those below `column` of a tile: a bit each. It has 8 j and 8 j + 1
  // behind its first.
  TW_INLINE static uint32_t columns_below(int column) {
    const int n = max(column, 0) / 8 * 2 + min(max(column, 0) % 8, 2);
    return static_cast<uint32_t>((uint64_t{1} << min(n, 32)) - 1);
  }
  // −inf where the mask refuses. Logits that are not DIRECT are computed here too, times log2 e. Returns how many
  // blocks of 32 keys this warp sees any of; where it `skips`, those behind are left as they are.
  TW_INLINE int apply(const Slot& item, int entry, float (&s)[BN / 2], bool skips) const {
    const int column = here(lane) % 4 * 2, tile = entry & ~WHOLE;
    At at[2];
    uint32_t bits[2];  // of columns that are seen by comparisons, and of all that reads memory
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      at[half] = at_of(p, item, group * 64 + warp * 16 + half * 8 + lane / 4, 0);
      const int limit = variant.limit(at[half]), base = SHARED ? item.base : 0;  // keys of lower levels
      const int last = max(min(item.length - 1, SHARED ? max(limit, base - 1) - base : limit), -1);
      bits[half] = columns_below(last - tile * BN + 1 - column);
      if constexpr (TRAILS) {
        const int64_t first = int64_t{variant.newest(at[half])} - variant.width(at[half]) + 1 - tile * BN - column;
        bits[half] &= ~columns_below(static_cast<int>(min(max(first, int64_t{0}), int64_t{BN})));
      }
    }
    const uint32_t some = __reduce_or_sync(0xffffffffu, bits[0] | bits[1]);
    const int blocks = skips ? (39 - __clz(some)) / 8 : BN / 32;
    if (READS && !(entry & WHOLE))  // a few keys at a time: all at once would not fit into registers
#pragma unroll 8
      for (int i = 0; i < blocks * 8; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          at[half].key = tile * BN + column + i / 2 * 8 + i % 2;
          at[half].kv = item.position(at[half].key);
          if (!variant.rest(at[half])) bits[half] &= ~(1u << i);
        }
    // Most blocks are seen by all rows of this warp, where comparisons decide.
    const uint32_t all = DIRECT && entry & WHOLE ? __reduce_and_sync(0xffffffffu, bits[0] & bits[1]) : 0;
#pragma unroll
    for (int block = 0; block < BN / 32; ++block)
      if (block < blocks && (all >> block * 8 & 255) != 255)
#pragma unroll
        for (int n = 0; n < 16; ++n) {
          const int half = n / 2 & 1, c = block * 32 + n / 4 * 8 + (n & 1);
          float& x = s[block * 16 + n];
          at[half].key = tile * BN + column + c;
          at[half].kv = item.position(at[half].key);
          if (!DIRECT) x = variant.logits(x * p.sm_scale, at[half]) * LOG2E;
          const bool seen = READS || variant.rest(at[half]);
          x = bits[half] & 1u << (block * 8 + n / 4 * 2 + (n & 1)) && seen ? x : lowest();
        }
    return blocks;
  }
  // New maxima: each stays as it is until a score exceeds it by SLACK (log2), so most tiles leave the outputs
  // alone; weights up to 2^SLACK are exact enough, and the division at the end takes any maximum out again.
  // Returns whether one of this warp grew.
  TW_INLINE bool raise(const float (&s)[BN / 2], Rows& rows, int blocks = BN / 32) const {
    bool grew = false;
    float most[2] = {lowest(), lowest()};
#pragma unroll
    for (int block = 0; block < BN / 32; ++block)
      if (block < blocks)
#pragma unroll
        for (int i = block * 16; i < block * 16 + 16; i += 2) most[i / 2 & 1] = fmaxf(most[i / 2 & 1], fmaxf(s[i], s[i + 1]));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = most[half] * factor;
      if constexpr (LEANS) largest += rows.shift[half];  // which differs between the threads of a row
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const bool grows = largest > rows.base[half] + SLACK;
      rows.base[half] = grows ? largest : rows.base[half];
      grew |= grows;
    }
    return __any_sync(0xffffffffu, grew);
  }
  // Scores become weights, those of keys 8 · From … 8 · To; `sum` of them.
  template <int From, int To>
  TW_INLINE void weigh(float (&s)[BN / 2], const Rows& rows, float (&sum)[2]) const {
    float base[2] = {finite(rows.base[0]), finite(rows.base[1])};
    if constexpr (LEANS) base[0] -= rows.shift[0], base[1] -= rows.shift[1];
#pragma unroll
    for (int i = From * 4; i < To * 4; ++i) {
      s[i] = tw::exp2(s[i] * factor - base[i / 2 & 1]);
      sum[i / 2 & 1] += s[i];
    }
  }
  // The same of all keys; those behind the first `blocks` blocks have the weight 0.
  template <int Block = 0>
  TW_INLINE void weigh_blocks(float (&s)[BN / 2], const Rows& rows, float (&sum)[2], int blocks) const {
    if (Block < blocks) weigh<Block * 4, Block * 4 + 4>(s, rows, sum);
    else
#pragma unroll
      for (int i = Block * 16; i < Block * 16 + 16; ++i) s[i] = 0.0f;
    if constexpr (Block + 1 < BN / 32) weigh_blocks<Block + 1>(s, rows, sum, blocks);
  }
  TW_INLINE void pack(uint32_t (&weights)[BN / 4], const float (&s)[BN / 2]) const {
#pragma unroll
    for (int i = 0; i < BN / 4; ++i) weights[i] = tw::pack<Kind>(s[2 * i], s[2 * i + 1]);
  }
  // Whether K of tile `done` and V of the tile before it have arrived; asked early, the answer costs nothing.
  TW_INLINE bool has_arrived(int done) const {
    return tw::barrier_test(shared.barrier(K_FULL + done % K_STAGES), done / K_STAGES & 1) &
           tw::barrier_test(shared.barrier(V_FULL + done % V_STAGES), done / V_STAGES & 1);
  }
  // Waits for both. V's ring starts with a tile of zeros (load_values), so it is one ahead.
  TW_INLINE void arrive(int done) const {
    tw::barrier_wait(shared.barrier(K_FULL + done % K_STAGES), done / K_STAGES & 1);
    tw::barrier_wait(shared.barrier(V_FULL + done % V_STAGES), done / V_STAGES & 1);
  }

  // A tile that is not the first: its scores and weights, and the outputs of the tile before. `Applies`: with the
  // mask; one of more than limits, and logits that are not DIRECT, need registers, so nothing is under way meanwhile.
  // `last` of the item: its queries are not read any more. Some exponentials come behind the wait for P·V: they hide what the registers of the weights must wait for.
  template <bool Applies>
  TW_INLINE void step(const Slot& item, int tile, int done, int buffer, bool last, bool& arrived, bool& fresh, float (&o)[DV / 2], uint32_t (&weights)[BN / 4], Rows& rows) const {
    constexpr int EARLY = BN / 16;
    float s[BN / 2], sum[2] = {};
    const Rows old = rows;
    shared.trace(WAIT_TILE);
    if (!arrived) arrive(done);
    if (BY_ROWS) tw::fence_async();
    shared.trace(ISSUE);
    tw::tie(weights);
    tw::tie(o);
    tw::wgmma_fence();
    issue_scores(s, buffer, done % K_STAGES);
    issue_outputs(o, weights, done % V_STAGES, fresh);
    shared.trace(WAIT_SCORES);
    tw::wgmma_wait<Applies && (RESTS || READS || !DIRECT) ? 0 : 1>();
    tw::tie(s);
    if (Applies || BENDS || LEANS) shared.trace(MASK);
    bend(s, rows, tile & ~WHOLE);
    if (Applies) apply(item, tile, s, false);
    shared.trace(MAXIMA);
    const bool grew = raise(s, rows);
    shared.trace(WEIGHTS);
    weigh<0, EARLY>(s, rows, sum);
    tw::barrier_arrive_after(shared.barrier(K_EMPTY + done % K_STAGES), lane == 0, sum[0] + sum[1]);
    if (!STAGED) tw::barrier_arrive_after(shared.barrier(Q_EMPTY + buffer), lane == 0 && last, sum[0] + sum[1]);
    shared.trace(WAIT_OUTPUTS);
    tw::wgmma_wait<0>();
    tw::tie(o);
    shared.trace(WEIGHTS_AND_PACK);
    release(shared.barrier(V_EMPTY + done % V_STAGES), lane);
    arrived = has_arrived(done + 1);
    weigh<EARLY, BN / 8>(s, rows, sum);
    pack(weights, s);
    if (grew) rescale(o, rows, old);
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
  }

  // Starts the outputs of the last tile of a segment, which are under way while the next one is found, and computes the
  // `ends` of its item.
  TW_INLINE void finish(int done, bool arrived, bool& fresh, const Rows& rows, Ends& ends, float (&o)[DV / 2], uint32_t (&weights)[BN / 4]) const {
    shared.trace(WAIT_TILE);
    if (!arrived) tw::barrier_wait(shared.barrier(V_FULL + done % V_STAGES), done / V_STAGES & 1);
    if (BY_ROWS) tw::fence_async();
    shared.trace(ISSUE);
    tw::tie(weights);
    tw::tie(o);
    tw::wgmma_fence();
    issue_outputs(o, weights, done % V_STAGES, fresh);
    if constexpr (EARLY_ENDS) {
      ends = ends_of(Work{}, rows);
      tw::tie(ends.scale);
      tw::tie(ends.lse);
    }
  }
  // Waits for these.
  TW_INLINE void wait_outputs(float (&o)[DV / 2]) const {
    shared.trace(WAIT_OUTPUTS);
    tw::wgmma_wait<0>();
    tw::tie(o);
  }

  // The first tile of a segment: starts its scores. The outputs of the tile before, maybe of another item, are there.
  TW_INLINE void join(int done, int buffer, bool arrived, float (&s)[BN / 2], float (&o)[DV / 2]) const {
    wait_outputs(o);
    release(shared.barrier(V_EMPTY + done % V_STAGES), lane);
    shared.trace(WAIT_TILE);
    if (!arrived) tw::barrier_wait(shared.barrier(K_FULL + done % K_STAGES), done / K_STAGES & 1);
    if (BY_ROWS) tw::fence_async();
    shared.trace(ISSUE);
    tw::wgmma_fence();
    issue_scores(s, buffer, done % K_STAGES);
  }
};

TW_INLINE void consume(const Params& p, const Variant& variant, const Shared& shared, int group, int warp, int lane) {
  // outer · tanh(x) = |outer| · tanh(±x): with a factor above 0 the largest score stays the largest.
  const float outer = variant.outer(), factor = BENDS ? fmaxf(fabsf(outer), 1e-20f) * LOG2E : DIRECT ? p.sm_scale * LOG2E : 1.0f;
  const Consumer consumer{{p, variant, shared, group, warp, lane},
                          tw::wgmma_descriptor(shared.base + Q_AT + group * 64 * 128, 0, 1024),
                          tw::wgmma_descriptor(shared.base + K_AT, 0, 1024),
                          tw::wgmma_descriptor(shared.base + V_AT, KV_BLOCK, 1024), copysignf(p.sm_scale, outer) / variant.inner(), factor};
  int done = 0, items = 0;  // tiles, and the item: 0 is an empty one
  float o[DV / 2] = {};
  uint32_t weights[BN / 4] = {};  // of the tile of zeros
  Rows rows{};
  Ends ends{};
  Work current{};
  bool arrived = false, fresh = true;  // whether the next tile has, whether nothing of o is kept
  if (!STAGED) consumer.free_queries(0);
  for (int n = 0;; ++n) {
    consumer.finish(done, arrived, fresh, rows, ends, o, weights);
    const Slot& item = next_item<Wide>(shared, n);
    if (item.tokens < 0) break;
    const int tiles = item.partial + item.full, applied = DIRECT ? item.partial : tiles;  // tiles that the variant is applied to
    float s[BN / 2], sum[2] = {};
    if (item.begins) {
      tw::barrier_wait(shared.barrier(Q_FULL + (items + 1) % Q_TILES), items / Q_TILES & 1);
      ++items;
    }
    const int buffer = items % Q_TILES, previous = (items + Q_TILES - 1) % Q_TILES;
    consumer.join(done, buffer, arrived, s, o);
    if (item.begins) {
      shared.trace(WRITE);
      consumer.write(current, previous, o, rows, ends);
      current = item;
      rows = consumer.begin(item);
      fresh = true;
    }
    shared.trace(WAIT_SCORES);
    tw::wgmma_wait<0>();
    tw::tie(s);
    release(shared.barrier(K_EMPTY + done % K_STAGES), lane);
    shared.trace(MASK);
    consumer.bend(s, rows, tile_at(item, 0));
    int blocks = BN / 32;  // that this warp sees: of a first tile it is often a part
    if (applied) blocks = consumer.apply(item, item.partial ? item.tiles[0] : tile_at(item, 0), s, DIRECT);
    // With two tiles of Q the next item's queries wait for this one.
    if (STAGED && item.begins && Q_TILES == 2) consumer.free_queries(previous);
    const Rows old = rows;
    shared.trace(MAXIMA);
    const bool grew = consumer.raise(s, rows, blocks);
    shared.trace(WEIGHTS_AND_PACK);
    consumer.weigh_blocks(s, rows, sum, blocks);
    consumer.pack(weights, s);
    if (STAGED && item.begins && Q_TILES > 2) consumer.free_queries(previous);
    if (grew && !item.begins) rescale(o, rows, old);
    rows.sum[0] += sum[0];
    rows.sum[1] += sum[1];
    if (!STAGED && item.ends && tiles == 1) consumer.free_queries(buffer);
    ++done;
    arrived = consumer.has_arrived(done);
    int i = 1;
    for (; i < applied; ++i, ++done) consumer.step<true>(item, DIRECT ? item.tiles[i] : tile_at(item, i), done, buffer, item.ends && i + 1 == tiles, arrived, fresh, o, weights, rows);
    for (; DIRECT && i < tiles; ++i, ++done) consumer.step<false>(item, LEANS ? tile_at(item, i) : 0, done, buffer, item.ends && i + 1 == tiles, arrived, fresh, o, weights, rows);
    release(shared.barrier(ITEM_EMPTY + (n & 1)), lane);
  }
  consumer.wait_outputs(o);
  shared.trace(WRITE);
  consumer.write(current, items % Q_TILES, o, rows, ends);
  if (STAGED) consumer.free_queries(items % Q_TILES);
}

}  // namespace attention
