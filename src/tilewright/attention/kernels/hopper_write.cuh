// What the consumers of prefill_hopper.cuh leave of an item: outputs and lse, a chunk's part of them, or states.

namespace attention {

struct Rows {  // of one thread, two rows: maxima (times `factor`; see raise), sums of this thread's columns
  float base[2], sum[2];
  float slope[2], shift[2];  // where scores lean, log2: for each key, and of this thread's first key of a tile
  int start[2];              // the distance of key 0
};
struct Ends {  // of one thread, two rows: the factor of the outputs, lse
  float scale[2], lse[2];
};
constexpr bool EARLY_ENDS = !CHUNKED && !Variant::SINK && !SHARED;  // known before the last P·V, behind which they are computed
// x, of which what depends on it is computed here, not in front of the loops, where it would hold registers.
TW_INLINE int here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
TW_INLINE float finite(float base) { return base == lowest() ? 0.0f : base; }
// The sums so far, under the maxima of `rows` instead of `old` ones.
TW_INLINE void rescale(float (&o)[DV / 2], Rows& rows, const Rows& old) {
  const float factors[2] = {tw::exp2(old.base[0] - finite(rows.base[0])), tw::exp2(old.base[1] - finite(rows.base[1]))};
  rows.sum[0] *= factors[0];
  rows.sum[1] *= factors[1];
#pragma unroll
  for (int i = 0; i < DV / 2; ++i) o[i] *= factors[i / 2 & 1];
}

struct Writer {
  const Params& p;
  const Variant& variant;
  const Shared& shared;
  int group, warp, lane;  // the warpgroup, the warp in it

  // Leaves a chunk's part of this warp's rows in memory. The last warp to come merges all, in the order of
  // the chunks, into `o` and `rows`, and only it is told so.
  TW_INLINE bool merge(const Work& item, float (&o)[DV / 2], Rows& rows) const {
    constexpr int WARPS = 4 * CONSUMERS, FLOATS = 32 * (DV / 2 + 4);  // of a warp: four for each lane in turn
    const int number = group * 4 + warp, lane = here(this->lane);
    float* parts = p.partials + (static_cast<int64_t>(item.slot) * WARPS + number) * FLOATS + lane * 4;
    float4* mine = reinterpret_cast<float4*>(parts + static_cast<int64_t>(item.chunk) * WARPS * FLOATS);
#pragma unroll
    for (int i = 0; i < DV / 8; ++i) mine[i * 32] = make_float4(o[i * 4], o[i * 4 + 1], o[i * 4 + 2], o[i * 4 + 3]);
    mine[DV / 8 * 32] = make_float4(rows.base[0], rows.base[1], rows.sum[0], rows.sum[1]);
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane == 0) before = tw::arrive(p.counters + item.counter * WARPS + number);
    if (__shfl_sync(0xffffffffu, before, 0) != item.chunks - 1) return false;
    if (lane == 0) p.counters[item.counter * WARPS + number] = 0;
    __syncwarp();  // all lanes come behind the arrival of the first
    rows = Rows{{lowest(), lowest()}, {0.0f, 0.0f}};
#pragma unroll
    for (int i = 0; i < DV / 2; ++i) o[i] = 0.0f;
#pragma unroll 1
    for (int chunk = 0; chunk < item.chunks; ++chunk) {
      const float4* part = reinterpret_cast<const float4*>(parts + static_cast<int64_t>(chunk) * WARPS * FLOATS);
      const float4 r = __ldcg(part + DV / 8 * 32);
      const Rows old = rows;
      rows.base[0] = fmaxf(old.base[0], r.x);
      rows.base[1] = fmaxf(old.base[1], r.y);
      rescale(o, rows, old);
      const float factors[2] = {tw::exp2(r.x - finite(rows.base[0])), tw::exp2(r.y - finite(rows.base[1]))};
      rows.sum[0] += r.z * factors[0];
      rows.sum[1] += r.w * factors[1];
#pragma unroll
      for (int i = 0; i < DV / 8; ++i) {
        const float4 x = __ldcg(part + i * 32);
        o[i * 4] += x.x * factors[0];
        o[i * 4 + 1] += x.y * factors[0];
        o[i * 4 + 2] += x.z * factors[1];
        o[i * 4 + 3] += x.w * factors[1];
      }
    }
    return true;
  }

  // 64 columns of this warp's 16 rows to shared memory, as TMA has them.
  TW_INLINE void stage(int at, int block, const float (&o)[DV / 2], int lane) const {
    const int row = lane & 15;
#pragma unroll
    for (int j = 0; j < 8 && block * 8 + j < DV / 8; j += 2) {
      const float* x = o + (block * 8 + j) * 4;
      tw::store_matrices(shared.base + at + row * 128 + ((j + (lane >> 4) ^ (row & 7)) << 4), tw::pack<Kind>(x[0], x[1]), tw::pack<Kind>(x[2], x[3]),
                         tw::pack<Kind>(x[4], x[5]), tw::pack<Kind>(x[6], x[7]));
    }
  }
  // And from there to memory, the rows that the item has.
  TW_INLINE void copy(const Work& item, int at, int block, int lane) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i * 4 + lane / 8, packed = group * 64 + warp * 16 + r, column = block * 64 + lane % 8 * 8;
      const uint4 x = *reinterpret_cast<const uint4*>(shared.memory + at + r * 128 + ((lane % 8 ^ (r & 7)) << 4));
      if (packed < item.tokens * G && column < DV)
        *reinterpret_cast<uint4*>(p.o + (static_cast<int64_t>(item.token + packed / G) * p.qo_heads + item.head * G + packed % G) * DV + column) = x;
    }
  }

  // A row that sees nothing has o = 0 and lse = −inf. Sums are 0 or at least about 1, so no case needs a slow path.
  TW_INLINE Ends ends_of(const Work& item, const Rows& rows) const {
    constexpr float LN2 = 0.6931471805599453f;
    Ends ends;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.sum[half], keep = 1.0f, largest = rows.base[half] * LN2;
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if constexpr (Variant::SINK) keep = tw::add_sink(variant.sink(at_of(p, item, group * 64 + warp * 16 + half * 8 + here(lane) / 4, 0)), largest, sum);
      ends.scale[half] = sum == 0.0f ? 0.0f : keep * tw::reciprocal_fast(sum);
      ends.lse[half] = sum == 0.0f ? lowest() : largest + tw::log2_fast(sum) * LN2;
    }
    return ends;
  }

  // The state of each row of an item of shared keys: outputs not yet divided, maximum (log2), sum.
  TW_INLINE void leave(const Work& item, const float (&o)[DV / 2], const Rows& rows) const {
    const int lane = here(this->lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group * 64 + warp * 16 + half * 8 + lane / 4;
      float sum = rows.sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (row >= item.tokens * G) continue;
      float* state = p.partials + (static_cast<int64_t>(item.slot + row / G) * p.qo_heads + item.head * G + row % G) * (DV + 8);
#pragma unroll
      for (int j = 0; j < DV / 8; ++j)
        *reinterpret_cast<float2*>(state + lane % 4 * 2 + j * 8) = make_float2(o[j * 4 + half * 2], o[j * 4 + half * 2 + 1]);
      if (lane % 4 == 0) *reinterpret_cast<float2*>(state + DV) = make_float2(rows.base[half], sum);
    }
  }

  // Outputs divided by the sums, and lse.
  TW_INLINE void write(const Work& item, int buffer, float (&o)[DV / 2], Rows& rows, Ends& ends) const {
    if constexpr (SHARED) return leave(item, o, rows);
    if (CHUNKED && item.chunks > 1 && !merge(item, o, rows)) return;
    if constexpr (!EARLY_ENDS) ends = ends_of(item, rows);
    const int first = group * 64 + warp * 16, lane = here(this->lane);  // packed row of this warp
    int64_t at[2];  // rows of the outputs
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + half * 8 + lane / 4;
      exists[half] = row < item.tokens * G;
      at[half] = static_cast<int64_t>(item.token + row / G) * p.qo_heads + item.head * G + row % G;
    }
#pragma unroll
    for (int i = 0; i < DV / 2; ++i) o[i] *= ends.scale[i / 2 & 1];
    if constexpr (STAGED) {
      const int tile = Q_AT + buffer * Q_BYTES + first * 128;
#pragma unroll
      for (int block = 0; block < V_BLOCKS; ++block) stage(tile + block * Q_BLOCK, block, o, lane);
      tw::fence_async();
      __syncwarp();
      if (16 % G == 0 && first + 16 <= item.tokens * G) {
        if (tw::elect())
#pragma unroll
          for (int block = 0; block < V_BLOCKS; ++block)
            tw::store_box(&p.o_map, shared.base + tile + block * Q_BLOCK, block * 64, item.head * G, item.token + first / G);
      } else {
#pragma unroll 1
        for (int block = 0; block < V_BLOCKS; ++block) copy(item, tile + block * Q_BLOCK, block, lane);
        tw::fence_async();
      }
    } else if constexpr (sizeof(Out) == 2) {
      const int tile = STAGE_AT + (group * 4 + warp) * 16 * 128;
#pragma unroll
      for (int block = 0; block < V_BLOCKS; ++block) {
        stage(tile, block, o, lane);
        __syncwarp();
        copy(item, tile, block, lane);
        __syncwarp();
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (exists[half])
#pragma unroll
          for (int j = 0; j < DV / 8; ++j)
            *reinterpret_cast<float2*>(p.o + at[half] * DV + lane % 4 * 2 + j * 8) = make_float2(o[j * 4 + half * 2], o[j * 4 + half * 2 + 1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)  // behind the fence, which would wait for it
      if (lane % 4 == 0 && exists[half]) p.lse[at[half]] = ends.lse[half];
  }
  // The item's tile of Q is free: its outputs, if they passed through it, have been read.
  TW_INLINE void free_queries(int buffer) const {
    if (STAGED) tw::stores_read();
    release(shared.barrier(Q_EMPTY + buffer), lane);
  }
};

}  // namespace attention
