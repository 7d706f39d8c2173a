// Items of up to 8 packed rows in prefill_hopper.cuh, which includes this file: decode beside prefill.
//
// Keys are the rows and packed rows the columns of mma.sync m16n8k16: S' = K Q', then O' = V' P'. So a tile is read
// once from shared memory, and a CTA takes little longer than its SM needs to load it. Of a tile of 128 keys each
// consumer warp has 16, with maxima, sums and outputs of its own, so no warp waits for another before an item ends.

namespace attention {

enum NarrowBarrier { NARROW_ALL = BARRIER + 1, NARROW_END };

TW_INLINE void load_few_queries(const Params& p, const Shared& shared, int lane) {
  int items = 0;
  for (int n = 0;; ++n) {
    const Slot& s = next_item<Narrow>(shared, n);
    if (s.tokens < 0) return;
    if (s.begins) {
      const int buffer = items % 2, rows = s.tokens * G;
      tw::barrier_wait(shared.barrier(Narrow::Q_EMPTY + buffer), (items++ / 2 & 1) ^ 1);
#pragma unroll
      for (int i = 0; i < K_BLOCKS * 2; ++i) {
        const int n = i * 32 + lane, row = n / 8 % 8, block = n / 64, chunk = n % 8, column = block * 64 + chunk * 8;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < rows && column < DK)
          x = *reinterpret_cast<const uint4*>(p.q + (s.token + row / G) * p.q_token + (s.head * G + row % G) * p.q_head + column);
        *reinterpret_cast<uint4*>(shared.memory + Narrow::Q_AT + (buffer * K_BLOCKS + block) * 1024 + row * 128 + ((chunk ^ row) << 4)) = x;
      }
      release(shared.barrier(Narrow::Q_FULL + buffer), lane);
    }
    release(shared.barrier(Narrow::ITEM_EMPTY + (n & 1)), lane);
  }
}

// A thread has keys lane / 4 and 8 later of its warp's 16, and packed rows 2 (lane % 4) and the next one.
struct FewRows {
  float o[DV / 16][4];  // columns 16 j + lane / 4 and 8 later, of the two rows each; not yet divided
  float base[2], sum[2];
};

struct NarrowConsumer {
  const Params& p;
  const Variant& variant;
  const Shared& shared;
  int warp, lane;
  uint32_t k_at[4], v_at[4];  // this lane's line of four matrices in a block of 64 columns

  TW_INLINE NarrowConsumer(const Params& p, const Variant& variant, const Shared& shared, int warp, int lane)
      : p(p), variant(variant), shared(shared), warp(warp), lane(lane) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      k_at[j] = shared.base + (warp * 16 + (lane & 15)) * 128 + ((2 * j + (lane >> 4) ^ (lane & 7)) << 4);
      v_at[j] = shared.base + (warp * 16 + (lane & 7) + (lane >> 4) * 8) * 128 + ((2 * j + (lane >> 3 & 1) ^ (lane & 7)) << 4);
    }
  }
  TW_INLINE void load_queries(uint32_t (&q)[DK / 16][2], int buffer) const {
#pragma unroll
    for (int j = 0; j < DK / 32; ++j) {
      uint32_t words[4];
      const int chunk = j % 2 * 4 + (lane >> 3);
      tw::load_matrices(words, shared.base + Narrow::Q_AT + (buffer * K_BLOCKS + j / 2) * 1024 + (lane & 7) * 128 + ((chunk ^ (lane & 7)) << 4));
      q[2 * j][0] = words[0], q[2 * j][1] = words[1], q[2 * j + 1][0] = words[2], q[2 * j + 1][1] = words[3];
    }
  }
  TW_INLINE void scores(float (&s)[4], const uint32_t (&q)[DK / 16][2], int stage) const {
    float halves[2][4] = {};  // two chains
#pragma unroll
    for (int j = 0; j < DK / 16; ++j) {
      uint32_t a[4];
      tw::load_matrices(a, k_at[j % 4] + K_AT + stage * K_BYTES + j / 4 * KV_BLOCK);
      tw::mma<Kind>(halves[j % 2], a, q[j][0], q[j][1]);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) s[n] = halves[0][n] + halves[1][n];
  }
  TW_INLINE void outputs(FewRows& rows, const float (&w)[4], int stage) const {
    const uint32_t low = tw::transpose_matrix(tw::pack<Kind>(w[0], w[1])), high = tw::transpose_matrix(tw::pack<Kind>(w[2], w[3]));
#pragma unroll
    for (int j = 0; j < DV / 16; ++j) {
      uint32_t a[4];
      tw::load_matrices_transposed(a, v_at[j % 4] + V_AT + stage * V_BYTES + j / 4 * KV_BLOCK);
      tw::mma<Kind>(rows.o[j], a, low, high);
    }
  }
  // Scores become weights. A row's maximum stays as it is until a score exceeds it by SLACK.
  TW_INLINE void weigh(const Slot& item, int i, float (&s)[4], FewRows& rows) const {
    constexpr bool BARE = DIRECT && !BENDS && !LEANS;
    if (BARE && i >= item.partial) {
#pragma unroll
      for (int n = 0; n < 4; ++n) s[n] *= p.sm_scale * LOG2E;
    } else {
      const int first = (tile_at(item, i) & ~WHOLE) * BN + warp * 16 + lane / 4;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int row = lane % 4 * 2 + n % 2, key = first + n / 2 * 8;
        const At at = at_of(p, item, row, key);
        const bool seen = row < item.tokens * G && key < item.length && variant.mask(at);
        s[n] = seen ? variant.logits(s[n] * p.sm_scale, at) * LOG2E : lowest();
      }
    }
    float most[2] = {fmaxf(s[0], s[2]), fmaxf(s[1], s[3])};
    if (__any_sync(0xffffffffu, most[0] > rows.base[0] + SLACK || most[1] > rows.base[1] + SLACK)) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) most[c] = fmaxf(most[c], __shfl_xor_sync(0xffffffffu, most[c], step));
        const float old = rows.base[c];
        rows.base[c] = fmaxf(old, most[c]);
        const float factor = tw::exp2(old - finite(rows.base[c]));
        rows.sum[c] *= factor;
#pragma unroll
        for (int j = 0; j < DV / 16; ++j) rows.o[j][c] *= factor, rows.o[j][c + 2] *= factor;
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) s[n] = tw::exp2(s[n] - finite(rows.base[n % 2]));
    rows.sum[0] += s[0] + s[2];
    rows.sum[1] += s[1] + s[3];
  }

  struct Sum {  // of parts of a row: four outputs, maximum, sum
    float4 o;
    float base, sum;
    TW_INLINE void add(float4 x, float2 of) {
      const float top = fmaxf(base, of.x), keep = tw::exp2(base - finite(top)), factor = tw::exp2(of.x - finite(top));
      o = make_float4(o.x * keep + x.x * factor, o.y * keep + x.y * factor, o.z * keep + x.z * factor, o.w * keep + x.w * factor);
      base = top;
      sum = sum * keep + of.y * factor;
    }
  };

  // Leaves a chunk's part of a row in memory. The last warp of all chunks to come to this row merges them, in their
  // order, and only it is told so.
  TW_INLINE bool merge(const Work& item, int first, Sum& all) const {
    constexpr int STRIDE = 4 * CONSUMERS * 32 * (DV / 2 + 4);  // floats of a slot (see merge in hopper_consume.cuh)
    float* parts = p.partials + static_cast<int64_t>(item.slot) * STRIDE + warp * (DV + 4);
    float* mine = parts + static_cast<int64_t>(item.chunk) * STRIDE;
    int* counter = p.counters + item.counter * (4 * CONSUMERS) + warp;
    if (first < DV) *reinterpret_cast<float4*>(mine + first) = all.o;
    if (lane == 0) *reinterpret_cast<float2*>(mine + DV) = make_float2(all.base, all.sum);
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane == 0) before = tw::arrive(counter);
    if (__shfl_sync(0xffffffffu, before, 0) != item.chunks - 1) return false;
    if (lane == 0) *counter = 0;
    __syncwarp();  // all lanes come behind the arrival of the first
    all = Sum{make_float4(0.0f, 0.0f, 0.0f, 0.0f), lowest(), 0.0f};
#pragma unroll 1
    for (int chunk = 0; chunk < item.chunks; ++chunk) {
      const float* part = parts + static_cast<int64_t>(chunk) * STRIDE;
      all.add(__ldcg(reinterpret_cast<const float4*>(part + (first < DV ? first : 0))), __ldcg(reinterpret_cast<const float2*>(part + DV)));
    }
    return true;
  }

  // The parts of the warps become the results of an item: those of the second four join the first four's, which each
  // warp merges for a row of its own.
  TW_INLINE void write(const Work& item, FewRows& rows) const {
    float* parts = reinterpret_cast<float*>(shared.memory + Narrow::O_AT);
    float2* sums = reinterpret_cast<float2*>(shared.memory + Narrow::SUMS_AT);
    const int row = lane % 4 * 2, slot = warp % 4 * 8;
    auto leave = [&] {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float* to = parts + (slot + row + c) * Narrow::PITCH + lane / 4;
#pragma unroll
        for (int j = 0; j < DV / 16; ++j) to[j * 16] = rows.o[j][c], to[j * 16 + 8] = rows.o[j][c + 2];
        if (lane < 4) sums[slot + row + c] = make_float2(rows.base[c], rows.sum[c]);
      }
    };
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int step = 4; step < 32; step *= 2) rows.sum[c] += __shfl_xor_sync(0xffffffffu, rows.sum[c], step);
    if (warp >= 4) leave();
    tw::bar_sync(NARROW_ALL, CONSUMERS * 128);
    if (warp < 4) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float2 of = sums[slot + row + c];
        const float* from = parts + (slot + row + c) * Narrow::PITCH + lane / 4;
        const float top = fmaxf(rows.base[c], of.x), keep = tw::exp2(rows.base[c] - finite(top)), factor = tw::exp2(of.x - finite(top));
        rows.base[c] = top;
        rows.sum[c] = rows.sum[c] * keep + of.y * factor;
#pragma unroll
        for (int j = 0; j < DV / 16; ++j) {
          rows.o[j][c] = rows.o[j][c] * keep + from[j * 16] * factor;
          rows.o[j][c + 2] = rows.o[j][c + 2] * keep + from[j * 16 + 8] * factor;
        }
      }
      __syncwarp();
      leave();
    }
    tw::bar_sync(NARROW_ALL, CONSUMERS * 128);
    const int first = lane * 4;
    if (warp < item.tokens * G) {
      Sum all{make_float4(0.0f, 0.0f, 0.0f, 0.0f), lowest(), 0.0f};
#pragma unroll
      for (int other = 0; other < 4; ++other)
        all.add(*reinterpret_cast<const float4*>(parts + (other * 8 + warp) * Narrow::PITCH + (first < DV ? first : 0)), sums[other * 8 + warp]);
      if (!CHUNKED || item.chunks == 1 || merge(item, first, all)) {
        constexpr float LN2 = 0.6931471805599453f;
        float largest = all.base * LN2, keep = 1.0f;
        if constexpr (Variant::SINK) keep = tw::add_sink(variant.sink(at_of(p, item, warp, 0)), largest, all.sum);
        const float scale = all.sum == 0.0f ? 0.0f : keep / all.sum;
        const int64_t at = static_cast<int64_t>(item.token + warp / G) * p.qo_heads + item.head * G + warp % G;
        if (first < DV) {
          if constexpr (sizeof(Out) == 2)
            *reinterpret_cast<uint2*>(p.o + at * DV + first) = make_uint2(tw::pack<Kind>(all.o.x * scale, all.o.y * scale), tw::pack<Kind>(all.o.z * scale, all.o.w * scale));
          else *reinterpret_cast<float4*>(p.o + at * DV + first) = make_float4(all.o.x * scale, all.o.y * scale, all.o.z * scale, all.o.w * scale);
        }
        if (lane == 0) p.lse[at] = all.sum == 0.0f ? lowest() : largest + tw::log2_fast(all.sum) * LN2;
      }
    }
    tw::bar_sync(NARROW_ALL, CONSUMERS * 128);
  }
};

TW_INLINE void consume_narrow(const Params& p, const Variant& variant, const Shared& shared, int warp, int lane) {
  const NarrowConsumer consumer(p, variant, shared, warp, lane);
  int done = 0, items = 0;
  FewRows rows{};
  uint32_t q[DK / 16][2];
  for (int n = 0;; ++n) {
    const Slot& item = next_item<Narrow>(shared, n);
    if (item.tokens < 0) return;
    const int tiles = item.partial + item.full;
    if (item.begins) {
      const int buffer = items % 2;
      tw::barrier_wait(shared.barrier(Narrow::Q_FULL + buffer), items++ / 2 & 1);
      consumer.load_queries(q, buffer);
      release(shared.barrier(Narrow::Q_EMPTY + buffer), lane);
      rows = FewRows{{}, {lowest(), lowest()}, {0.0f, 0.0f}};
    }
#pragma unroll 1
    for (int i = 0; i < tiles; ++i, ++done) {
      const int k = done % K_STAGES, v = done % V_STAGES;
      float s[4];
      tw::barrier_wait(shared.barrier(Narrow::K_FULL + k), done / K_STAGES & 1);
      consumer.scores(s, q, k);
      release(shared.barrier(Narrow::K_EMPTY + k), lane);
      consumer.weigh(item, i, s, rows);
      tw::barrier_wait(shared.barrier(Narrow::V_FULL + v), done / V_STAGES & 1);
      consumer.outputs(rows, s, v);
      release(shared.barrier(Narrow::V_EMPTY + v), lane);
    }
    if (item.ends) consumer.write(item, rows);
    release(shared.barrier(Narrow::ITEM_EMPTY + (n & 1)), lane);
  }
}

}  // namespace attention
