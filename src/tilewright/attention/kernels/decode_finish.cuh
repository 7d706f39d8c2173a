// Where a unit of the decode kernel ends: its parts become the result, or a state.
// Part of decode.cuh.

namespace attention {

TW_INLINE void store_four(float* to, float a, float b, float c, float d) { *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d); }
TW_INLINE void store_four(uint16_t* to, float a, float b, float c, float d) { *reinterpret_cast<uint2*>(to) = make_uint2(tw::pack<Kind>(a, b), tw::pack<Kind>(c, d)); }

TW_INLINE int64_t row_of_o(const Params& p, const Walk& w, int row) { return static_cast<int64_t>(w.token + row / G) * p.qo_heads + w.head * G + row % G; }

// Where a unit ends: for each warp the part of its stage that holds outputs, some rows of them at a time.
struct Outputs {
  Element* ring;
  int stage;
  TW_INLINE float* of_warp(int warp) const { return reinterpret_cast<float*>(ring + (warp * STAGES + stage) * STAGE + OUT_AT); }
  // A row that is divided, for the hook of the variant: where a row of a warp was whose place this thread has read.
  TW_INLINE float* row(int row) const { return of_warp(row / (OUT_BLOCKS * 8)) + row % (OUT_BLOCKS * 8) * PITCH; }
};
static_assert(BLOCKS / OUT_BLOCKS <= WARPS, "each row has a place");

// Four outputs of a row, divided by its sum; a row that sees nothing has o = 0 and lse = −inf.
TW_INLINE void write_result(const Params& p, const Walk& w, const tw::Row* whose, const Outputs& outputs, int row, int column, const float (&o)[4], float row_max, float row_sum) {
  float largest = row_max * (1.0f / LOG2E), keep = 1.0f;
  if constexpr (Variant::SINK) keep = tw::add_sink(Variant(p).sink(at_of(w, whose, row, 0)), largest, row_sum);
  const bool none = row_sum == 0.0f;
  const float scale = none ? 0.0f : keep / row_sum;
  const int64_t at = row_of_o(p, w, row);
  if constexpr (Variant::OUTPUT) store_four(outputs.row(row) + column, o[0] * scale, o[1] * scale, o[2] * scale, o[3] * scale);
  else if (column < DV) store_four(p.o + at * DV + column, o[0] * scale, o[1] * scale, o[2] * scale, o[3] * scale);
  if (column == 0) p.lse[at] = none ? lowest() : largest + log2f(row_sum) * (1.0f / LOG2E);
}

// Rows begin … end − 1, which `write_result` has left, as the variant changes them.
TW_INLINE void change_outputs(const Params& p, const Walk& w, const tw::Row* whose, const Outputs& outputs, int begin, int end, unsigned thread) {
  if constexpr (Variant::OUTPUT && KIND != FRONT) {
    const Variant variant(p);
    tw::bar_sync(BARRIER, THREADS);
    for (unsigned i = begin * (DV / 4u) + thread; i < end * (DV / 4u); i += THREADS) {
      const int row = i / (DV / 4u), column = i % (DV / 4u) * 4;
      const float* from = outputs.row(row);
      const auto read = [&](int d) { return from[d]; };
      const auto old = tw::elements_of<DV>(read);
      const At at = at_of(w, whose, row, 0);
      float x[4];
      for (int c = 0; c < 4; ++c) x[c] = variant.output(old, at, column + c);
      store_four(p.o + row_of_o(p, w, row) * DV + column, x[0], x[1], x[2], x[3]);
    }
  }
}

struct Sum { float o[4], row_max, row_sum; };  // of partial states: four outputs of a row

// Adds partial states to a sum, all at once: one latency.
template <int PARTS>
TW_INLINE void add(Sum& sum, const float2 (&sums)[PARTS], const float4 (&x)[PARTS]) {
  float largest = sum.row_max;
#pragma unroll
  for (int j = 0; j < PARTS; ++j) largest = fmaxf(largest, sums[j].x);
  const float base = largest == lowest() ? 0.0f : largest, keep = tw::exp2(sum.row_max - base);
  sum.row_max = largest;
  sum.row_sum *= keep;
#pragma unroll
  for (int c = 0; c < 4; ++c) sum.o[c] *= keep;
#pragma unroll
  for (int j = 0; j < PARTS; ++j) {
    const float factor = tw::exp2(sums[j].x - base);
    sum.row_sum += sums[j].y * factor;
    sum.o[0] += x[j].x * factor;
    sum.o[1] += x[j].y * factor;
    sum.o[2] += x[j].z * factor;
    sum.o[3] += x[j].w * factor;
  }
}

// Adds the states of a row that the launch in front has left, from the inside out and in the order of chunks.
TW_INLINE void add_states(const Params& p, const Walk& w, int row, int column, Sum& sum) {
  constexpr int AT_ONCE = 8;
  for (int at = w.joined; at >= 0;) {
    const tw::Node node = tw::node_at(p, at);
    const int first = tw::first_row(p, node.begin), tokens = tw::first_row(p, node.end) - first;
    const int64_t chunk = static_cast<int64_t>(tokens) * p.qo_heads * STATE;
    const float* states = p.states + (static_cast<int64_t>(node.row + w.token + row / G - first) * p.qo_heads + w.head * G + row % G) * STATE;
    tw::wait_for_previous_launch();
    for (int c0 = 0; c0 < node.chunks; c0 += AT_ONCE) {
      float2 sums[AT_ONCE];
      float4 x[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const float* state = states + chunk * (c0 + j < node.chunks ? c0 + j : node.chunks - 1);
        sums[j] = __ldcg(reinterpret_cast<const float2*>(state + DP));
        x[j] = __ldcg(reinterpret_cast<const float4*>(state + column));
        if (c0 + j >= node.chunks) sums[j].x = lowest();
      }
      add(sum, sums, x);
    }
    at = node.joined;
  }
}

// Four outputs of a row that all keys of the unit have reached.
TW_INLINE void write(const Params& p, const Walk& w, const tw::Row* whose, const Outputs& outputs, int row, int column, Sum sum) {
  if constexpr (LEVELS > 1 && KIND == FRONT) {
    float* state = p.states + (static_cast<int64_t>(w.state + row / G) * p.qo_heads + w.head * G + row % G) * STATE;
    store_four(state + column, sum.o[0], sum.o[1], sum.o[2], sum.o[3]);
    if (column == 0) *reinterpret_cast<float2*>(state + DP) = make_float2(sum.row_max, sum.row_sum);
  } else {
    if constexpr (LEVELS > 1 && KIND == BEHIND) add_states(p, w, row, column, sum);
    write_result(p, w, whose, outputs, row, column, sum.o, sum.row_max, sum.row_sum);
  }
}

TW_INLINE float* slot_of(const Params& p, int cta, bool head_part) { return p.partials + (2 * static_cast<int64_t>(cta) + (head_part ? 0 : 1)) * PARTIAL; }

// Partial states `first` … `last` of a unit, in the order of their CTAs; PARTS of TOGETHER rows are read at once,
// so that few reads wait for others.
template <int PARTS, int TOGETHER>
TW_INLINE void merge(const Params& p, const Walk& w, const tw::Row* whose, const Outputs& outputs, int first, int last, int member, unsigned thread) {
  const unsigned ends = w.rows * (DP / 4u);
  for (unsigned i0 = thread; i0 < ends; i0 += THREADS * TOGETHER) {
    int row[TOGETHER], column[TOGETHER];
    Sum all[TOGETHER];
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t) {
      const unsigned i = i0 + t * THREADS < ends ? i0 + t * THREADS : i0;
      row[t] = i / (DP / 4u), column[t] = i % (DP / 4u) * 4;
      all[t] = Sum{{0.0f, 0.0f, 0.0f, 0.0f}, lowest(), 0.0f};
    }
    for (int k0 = first; k0 <= last; k0 += PARTS) {
      float2 sums[TOGETHER][PARTS];
      float4 x[TOGETHER][PARTS];
#pragma unroll
      for (int j = 0; j < PARTS; ++j) {
        const int k = k0 + j <= last ? k0 + j : last;
        const float* part = slot_of(p, k * HEAD_BLOCK + member, k != first);
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t) {
          sums[t][j] = __ldcg(reinterpret_cast<const float2*>(part + ROWS * DP + row[t] * 2));
          x[t][j] = __ldcg(reinterpret_cast<const float4*>(part + row[t] * DP + column[t]));
          if (k0 + j > last) sums[t][j].x = lowest();
        }
      }
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) add(all[t], sums[t], x[t]);
    }
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t)
      if (i0 + t * THREADS < ends) write(p, w, whose, outputs, row[t], column[t], all[t]);
  }
}

// The result of a unit is the sum of its parts: of its warps, and of the CTAs that share it, of which the last to
// arrive merges them.
TW_INLINE void finish(const Params& p, const Walk& w, Rows& rows, char* smem, int stage, const Range& range, unsigned cta, unsigned thread) {
  const int warp = thread / 32, lane = thread % 32;
  float2* sums = reinterpret_cast<float2*>(smem + RING_BYTES);
  int* arrived = reinterpret_cast<int*>(sums + WARPS * ROWS);
  const tw::Row* whose = rows_of_warp(smem, warp);
  const Outputs outputs{reinterpret_cast<Element*>(smem), stage};
  float* mine = outputs.of_warp(warp);
  const bool head_part = range.begin.tile > 0 && w.node == range.begin.node && w.unit == range.begin.unit;
  const bool tail_part = is_last(w, range), part = !(LEVELS > 1 && KIND == FRONT) && (head_part || tail_part);
  const int first = head_part ? range.begin.first : cta / HEAD_BLOCK, last = tail_part ? range.end.last : cta / HEAD_BLOCK;
  float* slot = slot_of(p, cta, head_part);
  __syncwarp();  // all lanes have read the stage that outputs are written to
#pragma unroll
  for (int n0 = 0; n0 < BLOCKS; n0 += OUT_BLOCKS) {
    if (n0) tw::bar_sync(BARRIER, THREADS);  // the rows before them have been read
#pragma unroll
    for (int n = n0; n < n0 + OUT_BLOCKS; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = n * 8 + (lane & 3) * 2 + i, column = lane >> 2;
        const float sum = sum_over_keys(rows.row_sum[n][i]);
        if (row < w.rows) {
          float* to = mine + (row - n0 * 8) * PITCH;
          if (column == 0) sums[warp * ROWS + row] = make_float2(rows.row_max[n][i], sum);
#pragma unroll
          for (int j = 0; j < DP / 16; ++j) {
            to[j * 16 + column] = rows.o[n][j][i];
            to[j * 16 + column + 8] = rows.o[n][j][2 + i];
          }
        }
      }
    tw::bar_sync(BARRIER, THREADS);
    const int here = n0 + OUT_BLOCKS < BLOCKS && w.rows > (n0 + OUT_BLOCKS) * 8 ? (n0 + OUT_BLOCKS) * 8 : w.rows;
    for (unsigned i = n0 * 8 * (DP / 4u) + thread; i < here * (DP / 4u); i += THREADS) {
      const int row = i / (DP / 4u), column = i % (DP / 4u) * 4;
      float2 weight[WARPS];
      float4 x[WARPS];
#pragma unroll
      for (int k = 0; k < WARPS; ++k) {
        weight[k] = sums[k * ROWS + row];
        x[k] = *reinterpret_cast<const float4*>(outputs.of_warp(k) + (row - n0 * 8) * PITCH + column);
      }
      Sum all{{0.0f, 0.0f, 0.0f, 0.0f}, lowest(), 0.0f};
      add(all, weight, x);
      if (!part) {
        write(p, w, whose, outputs, row, column, all);
      } else {
        store_four(slot + row * DP + column, all.o[0], all.o[1], all.o[2], all.o[3]);
        if (column == 0) *reinterpret_cast<float2*>(slot + ROWS * DP + row * 2) = make_float2(all.row_max, all.row_sum);
      }
    }
    if (!part) change_outputs(p, w, whose, outputs, n0 * 8, here, thread);
  }
  if (part) {
    int* counter = p.counters + first * HEAD_BLOCK + cta % HEAD_BLOCK;
    tw::bar_sync(BARRIER, THREADS);
    if (thread == 0) *arrived = tw::arrive(counter) == last - first;
    tw::bar_sync(BARRIER, THREADS);
    if (*arrived) {
      if (thread == 0) *counter = 0;
      // Outputs of two rows for a thread, where there are so many; as many parts as registers hold.
      constexpr int TOGETHER = G * DP > 4 * THREADS ? 2 : 1, SOME = 16 / TOGETHER;
      constexpr int MANY = BLOCKS > 1 || DP > 128 || CTAS > 2 ? SOME : 32 / TOGETHER + 1;
      const int member = cta % HEAD_BLOCK;
      if (last - first < 4) merge<4, TOGETHER>(p, w, whose, outputs, first, last, member, thread);
      else if (last - first < SOME) merge<SOME, TOGETHER>(p, w, whose, outputs, first, last, member, thread);
      else merge<MANY, TOGETHER>(p, w, whose, outputs, first, last, member, thread);
      change_outputs(p, w, whose, outputs, 0, w.rows, thread);
    }
  }
  tw::bar_sync(BARRIER, THREADS);
}

}  // namespace attention
