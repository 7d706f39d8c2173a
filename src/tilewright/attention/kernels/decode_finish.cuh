// Where a unit of the decode kernel ends: its parts become a state, states of levels become the result.
// Part of decode.cuh.

namespace attention {

constexpr int ALL = 1 << 24;  // what the states of a level count when they arrive
static_assert(LEVELS <= 23, "counts fit, and the bits of levels");
static_assert(STAGE * 2 >= 2 * 8 * DP * 4, "a stage holds two rounds of 8 states");

TW_INLINE void store_four(float* to, float a, float b, float c, float d) { *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d); }
TW_INLINE void store_four(uint16_t* to, float a, float b, float c, float d) { *reinterpret_cast<uint2*>(to) = make_uint2(tw::pack<Kind>(a, b), tw::pack<Kind>(c, d)); }

// Four outputs of a row, divided by its sum; a row that sees nothing has o = 0 and lse = −inf.
TW_INLINE void write_result(const Params& p, const Walk& w, const tw::Row* whose, int row, int column, const float (&o)[4], float row_max, float row_sum) {
  float largest = row_max / LOG2E, keep = 1.0f;
  if constexpr (Variant::SINK) keep = tw::add_sink(Variant(p).sink(at_of(w, whose, row, 0)), largest, row_sum);
  const bool none = row_sum == 0.0f;
  const float scale = none ? 0.0f : keep / row_sum;
  const int64_t at = static_cast<int64_t>(w.token + row / G) * p.qo_heads + w.head * G + row % G;
  if (column < D) store_four(p.o + at * D + column, o[0] * scale, o[1] * scale, o[2] * scale, o[3] * scale);
  if (column == 0) p.lse[at] = none ? lowest() : largest + log2f(row_sum) / LOG2E;
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

// Partial states `first` … `last` of a unit, in the order of their CTAs; PARTS are read at once.
template <int PARTS>
TW_INLINE void merge(const Params& p, const Walk& w, const tw::Row* whose, int first, int last, int member, unsigned thread) {
  for (unsigned i = thread; i < w.rows * (DP / 4u); i += THREADS) {
    const int row = i / (DP / 4u), column = i % (DP / 4u) * 4;
    Sum all{{0.0f, 0.0f, 0.0f, 0.0f}, lowest(), 0.0f};
    for (int k0 = first; k0 <= last; k0 += PARTS) {
      float2 sums[PARTS];
      float4 x[PARTS];
#pragma unroll
      for (int j = 0; j < PARTS; ++j) {
        const int k = k0 + j <= last ? k0 + j : last;
        const float* part = slot_of(p, k * HEAD_BLOCK + member, k != first);
        sums[j] = __ldcg(reinterpret_cast<const float2*>(part + MOST_ROWS * DP + row * 2));
        x[j] = __ldcg(reinterpret_cast<const float4*>(part + row * DP + column));
        if (k0 + j > last) sums[j].x = lowest();
      }
      add(all, sums, x);
    }
    write(p, w, whose, row, column, all.o, all.row_max, all.row_sum);
  }
}

// Rows whose last state of all has now arrived are merged, in the order of levels and ranges. `share`: of the
// states of this level, which count ALL in all, however many they are. A warp has a row; its lanes find the states
// of the row, up to PARTS at once, and the outputs of the next PARTS are on their way to `ring` meanwhile.
template <int PARTS>
TW_INLINE void join(const Params& p, const Walk& w, const tw::Row* whose, char* smem, int* joined, float* ring, int share, int member, unsigned thread) {
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
    where[i] = exists ? __ldcg(reinterpret_cast<const int4*>(state_of(p, w, i % LEVELS, row_of(i / LEVELS)) + DP)) : make_int4(0, 0, 0, -1);
  }
  tw::bar_sync(1, THREADS);
  struct Round { int states; bool last; float2 sums; };  // of a row; `sums`: of the state of this lane
  int next = warp, first = 0, slot = 0;  // the row that is loaded next, and which of its states
  auto load = [&]() {
    Round r{0, false, make_float2(lowest(), 0.0f)};
    if (next < rows) {
      int count = 0;
      const float *o = p.partials, *sums = o;
#pragma unroll
      for (int level = 0; level < LEVELS; ++level) {
        const int4 of = where[next * LEVELS + level];
        const int states = of.z < 0 ? 1 : of.w - of.z + 1, at = first + lane - count;  // -1: the unit was of one CTA
        if (at >= 0 && at < states) {
          const float* from = of.z < 0 ? state_of(p, w, level, row_of(next)) : slot_of(p, (of.z + at) * HEAD_BLOCK + member, at > 0);
          o = from + (of.z < 0 ? 0 : of.x * DP);
          sums = from + (of.z < 0 ? DP : MOST_ROWS * DP + of.x * 2);
        }
        count += states;
      }
      r.states = count - first < PARTS ? count - first : PARTS;
      if (lane < r.states) r.sums = __ldcg(reinterpret_cast<const float2*>(sums));
#pragma unroll 4
      for (int j = 0; j < r.states; ++j) {
        const float* from = reinterpret_cast<const float*>(__shfl_sync(0xffffffffu, reinterpret_cast<int64_t>(o), j));
        if (lane < DP / 4) tw::copy_async_16(ring + (slot * PARTS + j) * DP + lane * 4, from + lane * 4, 16);
      }
      first += PARTS;
      r.last = first >= count;
      if (r.last) next += WARPS, first = 0;
    }
    slot ^= 1;
    tw::copy_async_commit();
    return r;
  };
  Sum all{{0.0f, 0.0f, 0.0f, 0.0f}, lowest(), 0.0f};
  Round now = load();
  for (int i = warp; i < rows;) {
    const Round ahead = load();
    tw::copy_async_wait<1>();
    __syncwarp();
    float largest = fmaxf(all.row_max, now.sums.x), weight = now.sums.y;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    const float base = largest == lowest() ? 0.0f : largest, keep = tw::exp2(all.row_max - base), factor = tw::exp2(now.sums.x - base);
    weight *= factor;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) weight += __shfl_xor_sync(0xffffffffu, weight, step);
    all.row_max = largest;
    all.row_sum = all.row_sum * keep + weight;
#pragma unroll
    for (int c = 0; c < 4; ++c) all.o[c] *= keep;
#pragma unroll 4
    for (int j = 0; j < now.states; ++j) {
      const float times = __shfl_sync(0xffffffffu, factor, j);
      const float4 x = *reinterpret_cast<const float4*>(ring + (slot * PARTS + j) * DP + lane % (DP / 4) * 4);
      all.o[0] += x.x * times;
      all.o[1] += x.y * times;
      all.o[2] += x.z * times;
      all.o[3] += x.w * times;
    }
    if (now.last) {
      if (lane < DP / 4) write_result(p, w, whose, row_of(i), lane * 4, all.o, all.row_max, all.row_sum);
      all = Sum{{0.0f, 0.0f, 0.0f, 0.0f}, lowest(), 0.0f};
      i += WARPS;
    }
    now = ahead;
    __syncwarp();  // what was read may be overwritten
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
  float* mine = reinterpret_cast<float*>(ring + (warp * STAGES + stage) * STAGE);
  const bool head_part = range.begin.tile > 0 && w.node == range.begin.node && w.unit == range.begin.unit;
  const bool tail_part = w.node == range.end.node && w.unit == range.end.unit;
  const bool part = head_part || tail_part;
  const int first = head_part ? range.begin.first : cta / HEAD_BLOCK, last = tail_part ? range.end.last : cta / HEAD_BLOCK;
  float* slot = slot_of(p, cta, head_part);
  // Of a row whose state is in the slots of `first` … `last`.
  auto share = [&](int row) {
    if constexpr (LEVELS > 1) *reinterpret_cast<int4*>(state_of(p, w, tw::node_at(p, w.node).level, row) + DP) = make_int4(row, 0, first, last);
  };
  __syncwarp();  // all lanes have read the stage that outputs are written to
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + n * 8 + (lane & 3) * 2 + i, column = lane >> 2;
      const float sum = sum_over_keys(rows.row_sum[n][i]);
      if (row < w.rows) {
        float* to = mine + row * PITCH;
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
    for (unsigned i = thread; i < w.rows * (DP / 4u); i += THREADS) {
      const int row = i / (DP / 4u), column = i % (DP / 4u) * 4;
      float2 weight[WARPS];
      float4 x[WARPS];
#pragma unroll
      for (int k = 0; k < WARPS; ++k) {
        weight[k] = sums[k * NARROW_ROWS + row];
        x[k] = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(ring + (k * STAGES + stage) * STAGE) + row * PITCH + column);
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
  if (LEVELS > 1 && (WIDE || !w.alone)) {
    if constexpr (LEVELS > 1) {
      float* free = reinterpret_cast<float*>(WIDE ? ring + warp * STAGES * STAGE : ring + (warp * STAGES + stage) * STAGE);
      const int share = !part ? ALL : cta / HEAD_BLOCK == first ? ALL - (last - first) : 1;
      join<WIDE ? 8 * STAGES : 8>(p, w, whose, smem, arrived, free, share, cta % HEAD_BLOCK, thread);
    }
  } else if (!WIDE && part) {
    int* counter = p.counters + first * HEAD_BLOCK + cta % HEAD_BLOCK;
    tw::bar_sync(1, THREADS);
    if (thread == 0) *arrived = tw::arrive(counter) == last - first;
    tw::bar_sync(1, THREADS);
    if (*arrived) {
      if (thread == 0) *counter = 0;
      if (last - first < 4) {
        merge<4>(p, w, whose, first, last, cta % HEAD_BLOCK, thread);
      } else {
        merge<16>(p, w, whose, first, last, cta % HEAD_BLOCK, thread);
      }
    }
  }
  tw::bar_sync(1, THREADS);
}

}  // namespace attention
