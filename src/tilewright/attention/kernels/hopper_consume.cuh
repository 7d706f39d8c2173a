// The consumers of prefill_hopper.cuh, which includes this file and says what they do.

namespace attention {

struct Queries {  // of an item, where its outputs go
  int token, tokens, head;
};
struct Rows {  // of one thread, two rows: maxima (of scores before `factor`), sums of this thread's columns
  float row_max[2], row_sum[2];
};

struct Consumer {
  const Params& p;
  const Variant& variant;
  const Shared& shared;
  int group, warp, lane;     // the warpgroup, the warp in it
  uint64_t q, k, v;          // descriptors of the first tile of Q, K and V
  float factor;              // exp2 of factor · (score − row maximum) is a weight

  TW_INLINE void issue_scores(float (&s)[BN / 2], int buffer, int stage) const {
    const uint64_t queries = q + buffer * (TILE_BYTES / 16);
    const uint64_t keys = k + stage * (TILE_BYTES / 16);
    tw::wgmma<Kind, BN, false, false>::of(s, queries, keys);
#pragma unroll
    for (int i = 1; i < D / 16; ++i)
      tw::wgmma<Kind, BN, true, false>::of(s, queries + i / 4 * (BLOCK_BYTES / 16) + i % 4 * 2, keys + i / 4 * (BLOCK_BYTES / 16) + i % 4 * 2);
    tw::wgmma_commit();
  }
  TW_INLINE void issue_outputs(float (&o)[D / 2], const uint32_t (&weights)[BN / 4], int stage) const {
    const uint64_t values = v + stage * (TILE_BYTES / 16);
#pragma unroll
    for (int i = 0; i < BN / 16; ++i) tw::wgmma<Kind, D, true, true>::of(o, weights + i * 4, values + i * 128);
    tw::wgmma_commit();
  }
  TW_INLINE void my_turn() const { tw::bar_sync(PING + group, 256); }
  TW_INLINE void your_turn() const { tw::arrive_at(PING + 1 - group, 256); }

  // Scores as the variant has them, times log2 e; −inf where the mask refuses.
  TW_INLINE void apply(const Slot& item, int tile, float (&s)[BN / 2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group * 64 + warp * 16 + half * 8 + lane / 4;
      At at = at_of(item, row, 0);
#pragma unroll
      for (int j = 0; j < BN / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[j * 4 + half * 2 + i];
          at.kv = at.key = tile * BN + j * 8 + lane % 4 * 2 + i;
          if (!TRIVIAL_LOGITS) x = variant.logits(x * p.sm_scale, at) * LOG2E;
          x = at.kv < item.length && variant.mask(at) ? x : lowest();
        }
    }
  }
  // Scores become weights; `rescale`: what the sums so far are worth under the new maxima. A maximum stays
  // as it is until a score exceeds it by SLACK (log2): weights up to 2^SLACK are exact enough, and most tiles
  // then leave the outputs alone. The division at the end takes any maximum out again.
  TW_INLINE bool weigh(float (&s)[BN / 2], Rows& rows, float (&rescale)[2]) const {
    bool changed = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = rows.row_max[half];
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) largest = fmaxf(largest, fmaxf(s[j * 4 + half * 2], s[j * 4 + half * 2 + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const bool grows = largest * factor > rows.row_max[half] * factor + SLACK;
      if (!grows) largest = rows.row_max[half];
      const float base = largest == lowest() ? 0.0f : largest * factor;
      rescale[half] = tw::exp2(rows.row_max[half] * factor - base);
      changed |= grows;
      rows.row_max[half] = largest;
      float sum = rows.row_sum[half] * rescale[half];
#pragma unroll
      for (int j = 0; j < BN / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[j * 4 + half * 2 + i];
          x = tw::exp2(x * factor - base);
          sum += x;
        }
      rows.row_sum[half] = sum;
    }
    return changed;
  }
  TW_INLINE void pack(uint32_t (&weights)[BN / 4], const float (&s)[BN / 2]) const {
#pragma unroll
    for (int i = 0; i < BN / 4; ++i) weights[i] = tw::pack<Kind>(s[2 * i], s[2 * i + 1]);
  }
  TW_INLINE void scale(float (&o)[D / 2], const float (&rescale)[2]) const {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= rescale[i / 2 & 1];
  }

  // Whether K of tile `done` and V of the tile before it have arrived; asked early, the answer costs nothing.
  TW_INLINE bool has_arrived(int done) const {
    return tw::barrier_test(shared.barrier(K_FULL + done % K_STAGES), done / K_STAGES & 1) &
           tw::barrier_test(shared.barrier(V_FULL + done % V_STAGES), done / V_STAGES & 1);
  }

  // Starts the scores of tile `done` and the outputs of the tile before it.
  TW_INLINE void issue(int done, int buffer, bool arrived, float (&s)[BN / 2], float (&o)[D / 2], uint32_t (&weights)[BN / 4]) const {
    const int keys = done % K_STAGES, values = done % V_STAGES;  // V's ring starts with a tile of zeros (load_values)
    if (!arrived) {
      tw::barrier_wait(shared.barrier(K_FULL + keys), done / K_STAGES & 1);
      tw::barrier_wait(shared.barrier(V_FULL + values), done / V_STAGES & 1);
    }
    my_turn();
    tw::tie(weights);
    tw::tie(o);
    tw::wgmma_fence();
    issue_scores(s, buffer, keys);
    issue_outputs(o, weights, values);
    your_turn();
  }

  // A tile that is not the first: its scores and weights, and the outputs of the tile before. `Applies`:
  // with the variant's logits and mask; they may have branches, so nothing is under way meanwhile.
  template <bool Applies>
  TW_INLINE void step(const Slot& item, int tile, int done, int buffer, bool& arrived, float (&o)[D / 2], uint32_t (&weights)[BN / 4], Rows& rows) const {
    float s[BN / 2], rescale[2];
    issue(done, buffer, arrived, s, o, weights);
    tw::wgmma_wait<Applies ? 0 : 1>();
    tw::tie(s);
    if (Applies) apply(item, tile, s);
    const bool changed = weigh(s, rows, rescale);
    tw::barrier_arrive_after(shared.barrier(K_EMPTY + done % K_STAGES), lane == 0, rows.row_sum[0] + rows.row_sum[1]);
    tw::wgmma_wait<0>();
    tw::tie(o);
    release(shared.barrier(V_EMPTY + done % V_STAGES), lane);
    arrived = has_arrived(done + 1);
    if (__any_sync(0xffffffffu, changed)) scale(o, rescale);
    pack(weights, s);
  }

  // The first tile of a segment: its scores, and the outputs of the tile before, maybe of another item.
  TW_INLINE void join(int done, int buffer, float (&s)[BN / 2], float (&o)[D / 2], uint32_t (&weights)[BN / 4]) const {
    issue(done, buffer, false, s, o, weights);
    tw::wgmma_wait<0>();
    tw::tie(s);
    tw::tie(o);
    release(shared.barrier(K_EMPTY + done % K_STAGES), lane);
    release(shared.barrier(V_EMPTY + done % V_STAGES), lane);
  }

  // The outputs of the last tile.
  TW_INLINE void drain(int done, float (&o)[D / 2], uint32_t (&weights)[BN / 4]) const {
    tw::barrier_wait(shared.barrier(V_FULL + done % V_STAGES), done / V_STAGES & 1);
    tw::tie(weights);
    tw::tie(o);
    tw::wgmma_fence();
    issue_outputs(o, weights, done % V_STAGES);
    tw::wgmma_wait<0>();
    tw::tie(o);
  }

  // Outputs divided by the sums, and lse; a row that sees nothing has o = 0 and lse = −inf.
  TW_INLINE void write(const Queries& item, int buffer, float (&o)[D / 2], const Rows& rows) const {
    const int first = group * 64 + warp * 16;  // packed row of this warp
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.row_sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      scale[half] = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
      const int row = first + half * 8 + lane / 4;
      if (lane % 4 == 0 && row < item.tokens * G)
        p.lse[static_cast<int64_t>(item.token + row / G) * p.qo_heads + item.head * G + row % G] =
            sum == 0.0f ? lowest() : (rows.row_max[half] * factor + log2f(sum)) / LOG2E;
    }
    if constexpr (sizeof(Out) == 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + half * 8 + lane / 4;
        Out* to = p.o + (static_cast<int64_t>(item.token + row / G) * p.qo_heads + item.head * G + row % G) * D + lane % 4 * 2;
        if (row < item.tokens * G)
#pragma unroll
          for (int j = 0; j < D / 8; ++j)
            *reinterpret_cast<float2*>(to + j * 8) = make_float2(o[j * 4 + half * 2] * scale[half], o[j * 4 + half * 2 + 1] * scale[half]);
      }
    } else {
      // Through the item's tile of Q, 16 rows of this warp, 16-byte chunk c of row r at c XOR (r mod 8).
      constexpr int CHUNKS = D / 8;
      const uint32_t base = shared.base + Q_AT + buffer * TILE_BYTES + first * D * 2;
      const int row = lane & 15;
#pragma unroll
      for (int j = 0; j < D / 8; j += 2) {
        const int chunk = j + (lane >> 4);
        const uint32_t to = base + row * D * 2 + ((chunk ^ (row & 7)) << 4);
        tw::store_matrices(to, tw::pack<Kind>(o[j * 4] * scale[0], o[j * 4 + 1] * scale[0]), tw::pack<Kind>(o[j * 4 + 2] * scale[1], o[j * 4 + 3] * scale[1]),
                           tw::pack<Kind>(o[j * 4 + 4] * scale[0], o[j * 4 + 5] * scale[0]), tw::pack<Kind>(o[j * 4 + 6] * scale[1], o[j * 4 + 7] * scale[1]));
      }
      __syncwarp();
      const char* rows_at = shared.memory + Q_AT + buffer * TILE_BYTES + first * D * 2;
      constexpr int EACH = 16 * CHUNKS / 32;  // chunks of a lane
      uint4 x[EACH];
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int r = i * (32 / CHUNKS) + lane / CHUNKS;
        x[i] = *reinterpret_cast<const uint4*>(rows_at + r * D * 2 + ((lane % CHUNKS ^ (r & 7)) << 4));
      }
      // TMA writes here next. Before the stores to global memory, or the fence would wait for them.
      tw::fence_async();
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int packed = first + i * (32 / CHUNKS) + lane / CHUNKS;
        if (packed < item.tokens * G)
          *reinterpret_cast<uint4*>(p.o + (static_cast<int64_t>(item.token + packed / G) * p.qo_heads + item.head * G + packed % G) * D + lane % CHUNKS * 8) = x[i];
      }
    }
    release(shared.barrier(Q_EMPTY + buffer), lane);
  }
};

TW_INLINE void consume(const Params& p, const Variant& variant, const Shared& shared, int group, int warp, int lane) {
  Consumer consumer{p, variant, shared, group, warp, lane,
                    tw::wgmma_descriptor(shared.base + Q_AT + group * 64 * 128, 0, 1024),
                    tw::wgmma_descriptor(shared.base + K_AT, 0, 1024),
                    tw::wgmma_descriptor(shared.base + V_AT, BLOCK_BYTES, 1024), TRIVIAL_LOGITS ? p.sm_scale * LOG2E : 1.0f};
  if (group == 1) consumer.your_turn();
  int done = 0, items = 0;  // tiles, and the item: 0 is an empty one
  float o[D / 2] = {};
  uint32_t weights[BN / 4] = {};  // of the tile of zeros
  Rows rows{};
  Queries current{0, 0, 0};
  for (int n = 0;; ++n) {
    const Slot& item = next_item(shared, n);
    if (item.tokens < 0) break;
    const int tiles = item.partial + item.full;
    float s[BN / 2], rescale[2];
    if (item.begins) {
      tw::barrier_wait(shared.barrier(Q_FULL + (items + 1 & 1)), items >> 1 & 1);
      ++items;
    }
    const int buffer = items & 1;
    consumer.join(done, buffer, s, o, weights);
    if (item.begins) {
      consumer.write(current, buffer ^ 1, o, rows);
      current = Queries{item.token, item.tokens, item.head};
      rows = Rows{{lowest(), lowest()}, {0.0f, 0.0f}};
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
    }
    const int applied = TRIVIAL_LOGITS ? item.partial : tiles;  // tiles that the variant is applied to
    if (applied) consumer.apply(item, tile_at(item, 0), s);
    consumer.weigh(s, rows, rescale);
    if (!item.begins) consumer.scale(o, rescale);
    consumer.pack(weights, s);
    ++done;
    bool arrived = false;
    int i = 1;
    for (; i < applied; ++i, ++done) consumer.step<true>(item, tile_at(item, i), done, buffer, arrived, o, weights, rows);
    for (; TRIVIAL_LOGITS && i < tiles; ++i, ++done) consumer.step<false>(item, 0, done, buffer, arrived, o, weights, rows);
    release(shared.barrier(ITEM_EMPTY + (n & 1)), lane);
  }
  consumer.drain(done, o, weights);
  consumer.write(current, items & 1, o, rows);
}

}  // namespace attention
