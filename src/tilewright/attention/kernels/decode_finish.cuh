// Where a unit of the decode kernel ends: its parts become a state, states of levels become the result.
// Part of decode.cuh.

namespace attention {

constexpr int ALL = 1 << 24;  // what the states of a level count when they arrive
static_assert(LEVELS <= 23, "counts fit, and the bits of levels");
static_assert(STAGE * 2 >= 4 * 32 * 8, "a stage holds where 32 states of 4 rows are");

TW_INLINE void store_four(float* to, float a, float b, float c, float d) { *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d); }
TW_INLINE void store_four(uint16_t* to, float a, float b, float c, float d) { *reinterpret_cast<uint2*>(to) = make_uint2(tw::pack<Kind>(a, b), tw::pack<Kind>(c, d)); }

// Four outputs of a row, divided by its sum; a row that sees nothing has o = 0 and lse = −inf.
TW_INLINE void write_result(const Params& p, const Walk& w, const tw::Row* whose, int row, int column, const float (&o)[4], float row_max, float row_sum) {
  float largest = row_max * (1.0f / LOG2E), keep = 1.0f;
  if constexpr (Variant::SINK) keep = tw::add_sink(Variant(p).sink(at_of(w, whose, row, 0)), largest, row_sum);
  const bool none = row_sum == 0.0f;
  const float scale = none ? 0.0f : keep / row_sum;
  const int64_t at = static_cast<int64_t>(w.token + row / G) * p.qo_heads + w.head * G + row % G;
  if (column < DV) store_four(p.o + at * DV + column, o[0] * scale, o[1] * scale, o[2] * scale, o[3] * scale);
  if (column == 0) p.lse[at] = none ? lowest() : largest + log2f(row_sum) * (1.0f / LOG2E);
}

// Where a row of a unit has its state at a level: outputs not yet divided, maximum, sum, and the ranges that
// share the unit. Where there are such, the state is in their slots, and the maximum is the number of the row there.
TW_INLINE float* state_of(const Params& p, const Walk& w, int level, int row) {
  const int64_t at = static_cast<int64_t>(w.token + row / G) * p.qo_heads + w.head * G + row % G;
  return p.states + (level * p.state_rows + at) * STATE;
}
TW_INLINE void store_sums(float* state, float row_max, float row_sum) {
  store_four(state + DP, row_max, row_sum, __int_as_float(-1), 0.0f);
}
// Four outputs of a row that all keys of the unit have reached.
TW_INLINE void write(const Params& p, const Walk& w, const tw::Row* whose, int row, int column, const float (&o)[4], float row_max, float row_sum) {
  if (LEVELS > 1 && !w.alone) {
    float* to = state_of(p, w, tw::node_at(p, w.node).level, row);
    store_four(to + column, o[0], o[1], o[2], o[3]);
    if (column == 0) store_sums(to, row_max, row_sum);
  } else {
    write_result(p, w, whose, row, column, o, row_max, row_sum);
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

TW_INLINE float* slot_of(const Params& p, int cta, bool head_part) { return p.partials + (2 * static_cast<int64_t>(cta) + (head_part ? 0 : 1)) * PARTIAL; }

// Partial states `first` … `last` of a unit, in the order of their CTAs; PARTS of TOGETHER rows are read at once,
// so that few reads wait for others.
template <int PARTS, int TOGETHER>
TW_INLINE void merge(const Params& p, const Walk& w, const tw::Row* whose, int first, int last, int member, unsigned thread) {
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
          sums[t][j] = __ldcg(reinterpret_cast<const float2*>(part + MOST_ROWS * DP + row[t] * 2));
          x[t][j] = __ldcg(reinterpret_cast<const float4*>(part + row[t] * DP + column[t]));
          if (k0 + j > last) sums[t][j].x = lowest();
        }
      }
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) add(all[t], sums[t], x[t]);
    }
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t)
      if (i0 + t * THREADS < ends) write(p, w, whose, row[t], column[t], all[t].o, all[t].row_max, all[t].row_sum);
  }
}

// Rows whose last state of all has now arrived are merged, in the order of levels and ranges. `share`: of the states
// of this level, which count ALL however many they are. A warp has ROWS rows at once: each lane finds a state of each
// and its weight, then all lanes add the outputs.
template <int ROWS>
TW_INLINE void join(const Params& p, const Walk& w, const tw::Row* whose, char* smem, int* joined, int2* table, int share, int member, unsigned thread) {
  const int warp = thread / 32, lane = thread % 32;
  int* joins = reinterpret_cast<int*>(rows_of_warp(smem, WARPS));  // a row of q, and the levels of its states
  int4* where = reinterpret_cast<int4*>(joins + WIDE_ROWS);
  if (thread == 0) *joined = 0;
  tw::bar_sync(1, THREADS);
  for (int t = thread; t < w.rows / G; t += THREADS) {
    const int states = tw::node_at(p, tw::own_node(p, whose[t].request)).states;
    int* arrivals = p.arrivals + static_cast<int64_t>(w.token + t) * p.kv_heads + w.head;
    if (tw::arrive(arrivals, share) != __popc(static_cast<unsigned>(states)) * ALL - share) continue;
    *arrivals = 0;
    joins[atomicAdd(joined, 1)] = states << 8 | t;
  }
  tw::bar_sync(1, THREADS);
  const int rows = *joined * G;
  auto row_of = [&](int i) { return (joins[i / G] & 255) * G + i % G; };
  for (unsigned i = thread; i < static_cast<unsigned>(rows * LEVELS); i += THREADS) {
    const bool exists = joins[i / LEVELS / G] >> 8 >> i % LEVELS & 1;
    int4 of = make_int4(0, 0, 0, -1);
    if (exists) of = __ldcg(reinterpret_cast<const int4*>(state_of(p, w, i % LEVELS, row_of(i / LEVELS)) + DP));
    where[i] = of.z < 0 ? make_int4(0, -1, 0, 0) : of;  // -1: the unit was of one CTA, whose state it is
  }
  tw::bar_sync(1, THREADS);
  for (int i0 = warp * ROWS; i0 < rows; i0 += WARPS * ROWS) {
    Sum all[ROWS];
    int row[ROWS], count[ROWS] = {}, most = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int i = i0 + r < rows ? i0 + r : rows - 1;
      all[r] = Sum{{0.0f, 0.0f, 0.0f, 0.0f}, lowest(), 0.0f};
      row[r] = row_of(i);
      for (int level = 0; level < LEVELS; ++level) count[r] += where[i * LEVELS + level].w - where[i * LEVELS + level].z + 1;
      most = count[r] > most ? count[r] : most;
    }
    for (int first = 0; first < most; first += 32) {
      float2 sums[ROWS];
      int from[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        int at = first + lane < count[r] ? first + lane : count[r] - 1;
        const int4* of = where + (i0 + r < rows ? i0 + r : rows - 1) * LEVELS;
        int level = 0;
        for (; level < LEVELS - 1 && at > of[level].w - of[level].z; ++level) at -= of[level].w - of[level].z + 1;
        const bool own = of[level].y < 0;  // the unit was of one CTA
        const float* base = own ? state_of(p, w, level, row[r]) : slot_of(p, (of[level].z + at) * HEAD_BLOCK + member, at > 0);
        from[r] = static_cast<int>((base - p.partials) / 2) + (own ? 0 : of[level].x * DP / 2);
        sums[r] = __ldcg(reinterpret_cast<const float2*>(base + (own ? DP : MOST_ROWS * DP + of[level].x * 2)));
        if (first + lane >= count[r]) sums[r] = make_float2(lowest(), 0.0f);
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float largest = fmaxf(all[r].row_max, sums[r].x);
#pragma unroll
        for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        const float base = largest == lowest() ? 0.0f : largest, keep = tw::exp2(all[r].row_max - base), factor = tw::exp2(sums[r].x - base);
        float weight = sums[r].y * factor;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) weight += __shfl_xor_sync(0xffffffffu, weight, step);
        all[r].row_max = largest;
        all[r].row_sum = all[r].row_sum * keep + weight;
#pragma unroll
        for (int c = 0; c < 4; ++c) all[r].o[c] *= keep;
        table[r * 32 + lane] = make_int2(from[r], __float_as_int(factor));
      }
      __syncwarp();
      for (int k = 0; k < 32 && first + k < most; k += 4) {
        float4 x[ROWS][4];
        float factor[ROWS][4];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int2 state = table[r * 32 + k + j];
            factor[r][j] = __int_as_float(state.y);
            x[r][j] = __ldcg(reinterpret_cast<const float4*>(p.partials + static_cast<int64_t>(state.x) * 2 + lane % (DP / 4) * 4));
          }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float values[4] = {x[r][j].x, x[r][j].y, x[r][j].z, x[r][j].w};
#pragma unroll
            for (int c = 0; c < 4; ++c) all[r].o[c] += values[c] * factor[r][j];
          }
      }
      __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (i0 + r < rows && lane < DP / 4) write_result(p, w, whose, row[r], lane * 4, all[r].o, all[r].row_max, all[r].row_sum);
  }
}

// The state of a unit is the sum of its parts: of its warps where it is narrow, and of the CTAs that share
// it, of which the last to arrive merges them, with those of other levels where there are such.
template <bool WIDE, int BLOCKS>
TW_INLINE void finish(const Params& p, const Walk& w, Rows<BLOCKS>& rows, char* smem, int stage, const Range& range, unsigned cta, unsigned thread) {
  const int warp = thread / 32, lane = thread % 32, row0 = WIDE ? warp * BLOCKS * 8 : 0;
  float2* sums = reinterpret_cast<float2*>(smem + RING_BYTES);
  int* arrived = reinterpret_cast<int*>(sums + WARPS * NARROW_ROWS);
  const tw::Row* whose = rows_of_warp(smem, warp);
  Element* ring = reinterpret_cast<Element*>(smem);
  float* mine = reinterpret_cast<float*>(ring + (warp * STAGES + stage) * STAGE + OUT_AT);
  const bool head_part = range.begin.tile > 0 && w.node == range.begin.node && w.unit == range.begin.unit;
  const bool tail_part = is_last(w, range), part = head_part || tail_part;
  const int first = head_part ? range.begin.first : cta / HEAD_BLOCK, last = tail_part ? range.end.last : cta / HEAD_BLOCK;
  float* slot = slot_of(p, cta, head_part);
  // Of a row whose state is in the slots of `first` … `last`.
  auto share = [&](int row) {
    if constexpr (LEVELS > 1) *reinterpret_cast<int4*>(state_of(p, w, tw::node_at(p, w.node).level, row) + DP) = make_int4(row, 0, first, last);
  };
  __syncwarp();  // all lanes have read the stage that outputs are written to
  constexpr int STEP = WIDE ? BLOCKS : OUT_BLOCKS;
#pragma unroll
  for (int n0 = 0; n0 < BLOCKS; n0 += STEP) {
    if (n0) tw::bar_sync(1, THREADS);  // the rows before them have been read
#pragma unroll
    for (int n = n0; n < n0 + STEP; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row0 + n * 8 + (lane & 3) * 2 + i, column = lane >> 2;
        const float sum = sum_over_keys(rows.row_sum[n][i]);
        if (row < w.rows) {
          float* to = mine + (row - n0 * 8) * PITCH;
          float2* sum_to = sums + warp * NARROW_ROWS + row;
          if constexpr (WIDE) {
            to = part ? slot + row * DP : state_of(p, w, tw::node_at(p, w.node).level, row);
            sum_to = reinterpret_cast<float2*>(slot + MOST_ROWS * DP + row * 2);
            if (column == 0 && part) share(row);
            if (column == 0 && !part) store_sums(to, rows.row_max[n][i], sum);
          }
          if (column == 0 && !(WIDE && !part)) *sum_to = make_float2(rows.row_max[n][i], sum);
#pragma unroll
          for (int j = 0; j < DP / 16; ++j) {
            to[j * 16 + column] = rows.o[n][j][i];
            to[j * 16 + column + 8] = rows.o[n][j][2 + i];
          }
        }
      }
    if constexpr (!WIDE) {
      tw::bar_sync(1, THREADS);
      const int here = n0 + STEP < BLOCKS && w.rows > (n0 + STEP) * 8 ? (n0 + STEP) * 8 : w.rows;
      for (unsigned i = n0 * 8 * (DP / 4u) + thread; i < here * (DP / 4u); i += THREADS) {
        const int row = i / (DP / 4u), column = i % (DP / 4u) * 4;
        float2 weight[WARPS];
        float4 x[WARPS];
#pragma unroll
        for (int k = 0; k < WARPS; ++k) {
          weight[k] = sums[k * NARROW_ROWS + row];
          x[k] = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(ring + (k * STAGES + stage) * STAGE + OUT_AT) + (row - n0 * 8) * PITCH + column);
        }
        Sum all{{0.0f, 0.0f, 0.0f, 0.0f}, lowest(), 0.0f};
        add(all, weight, x);
        if (!part) {
          write(p, w, whose, row, column, all.o, all.row_max, all.row_sum);
        } else {
          store_four(slot + row * DP + column, all.o[0], all.o[1], all.o[2], all.o[3]);
          if (column == 0) {
            *reinterpret_cast<float2*>(slot + MOST_ROWS * DP + row * 2) = make_float2(all.row_max, all.row_sum);
            share(row);
          }
        }
      }
    }
  }
  if (LEVELS > 1 && (WIDE || !w.alone)) {
    if constexpr (LEVELS > 1) {
      int2* free = reinterpret_cast<int2*>(ring + (warp * STAGES + (WIDE ? 0 : stage)) * STAGE);
      const int share = !part ? ALL : cta / HEAD_BLOCK == first ? ALL - (last - first) : 1;
      join<4>(p, w, whose, smem, arrived, free, share, cta % HEAD_BLOCK, thread);
    }
  } else if (!WIDE && part) {
    int* counter = p.counters + first * HEAD_BLOCK + cta % HEAD_BLOCK;
    tw::bar_sync(1, THREADS);
    if (thread == 0) *arrived = tw::arrive(counter) == last - first;
    tw::bar_sync(1, THREADS);
    if (*arrived) {
      if (thread == 0) *counter = 0;
      // Outputs of two rows for a thread, where there are so many; as many parts as registers hold.
      constexpr int TOGETHER = G * DP > 4 * THREADS ? 2 : 1, SOME = 16 / TOGETHER, MANY = 32 / TOGETHER + 1;
      const int member = cta % HEAD_BLOCK;
      if (last - first < 4) merge<4, TOGETHER>(p, w, whose, first, last, member, thread);
      else if (last - first < SOME) merge<SOME, TOGETHER>(p, w, whose, first, last, member, thread);
      else merge<MANY, TOGETHER>(p, w, whose, first, last, member, thread);
    }
  }
  tw::bar_sync(1, THREADS);
}

}  // namespace attention
