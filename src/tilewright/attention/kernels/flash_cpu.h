// Flash attention on the CPU: one work item is some queries of one request, with one KV head.
//
// In front of this file: the prelude (cpu.h), the constants of `flash` (DK and DV: elements of a row of
// K and of V, G query heads of a KV head, N lanes, T keys of a tile, RB × CB the register block,
// MAX_TOKENS of an item, MAX_KEYS of a request, CHUNK_TILES at least in a chunk; the element types Q, KV
// and O), `Params`, `Item`, bounds.h, table.h, variant.h, the struct `Variant`
// and vectors_cpu.h.
// Rows of an item are (token, query head of the group), tokens first: all of them share each load
// of K and V. Sums are float32 and run in a fixed order, whatever thread runs the item. Where the CPU
// multiplies pairs of bfloat16 (AVX-512 BF16) and Q and KV are bfloat16, so are the products of many
// queries, with weights rounded to bfloat16; the sum of the weights is that of the unrounded ones.

namespace flash {

// -- the KV cache ----------------------------------------------------------------------------------

using K_t = typename KV::type;

// Where the keys kv0 … kv0+n-1 lie.
TW_INLINE void find_rows(const Params& p, const tw::Pages& pages, int kv_head, int kv0, int n, const K_t** k, const K_t** v) {
  int64_t page_number = kv0 / p.page_size, slot = kv0 % p.page_size;
  const K_t* k_head = p.k + kv_head * p.k_head;
  const K_t* v_head = p.v + kv_head * p.v_head;
  for (int j = 0; j < n; ++page_number, slot = 0) {
    const int64_t page = tw::page_at(p, pages, kv_head, page_number);
    const K_t* k_row = k_head + page * p.k_page + slot * p.k_slot;
    const K_t* v_row = v_head + page * p.v_page + slot * p.v_slot;
    for (; j < n && slot < p.page_size; ++slot, ++j, k_row += p.k_slot, v_row += p.v_slot) {
      k[j] = k_row;
      v[j] = v_row;
    }
  }
}

// -- a block of rows -------------------------------------------------------------------------------

// Positions of a vector of keys.
TW_INLINE I position(const tw::Pages& pages, I key) {
  if constexpr (!table::KEY_POSITIONS && table::LEVELS == 1) return key;
  using U = vec<uint32_t, N>;  // wraps around like int32
  return __builtin_convertvector(__builtin_convertvector(key, U) * static_cast<uint32_t>(pages.stride) + static_cast<uint32_t>(pages.base), I);
}

struct Softmax {  // of one row, over the keys seen so far; without one all scales are that of 0
  float largest = Variant::SOFTMAX ? LOWEST : 0.0f, weight = 0.0f;
};

// Scores in s become weights; returns the rescale factor of the sums so far. The weight of a masked
// key is −0 (no other is), so that `add_values` can tell it from one that underflowed.
template <bool MASKED>
TW_INLINE float online_softmax(const Variant& variant, const At& at, const tw::Pages& pages, int kv0, float* s, Softmax& row) {
  const F masked = tw::splat<float, N>(Variant::SOFTMAX ? LOWEST : -0.0f);
  F top = tw::splat<float, N>(LOWEST);
  I key = tw::ramp<int32_t, N>(kv0);
  for (int c = 0; c < TV; ++c, key += N) {
    const I kv = position(pages, key), number = table::LEVELS == 1 ? key : kv;
    F x = variant.logits(tw::load<float, N>(s + c * N), at, kv, number);
    if (!Variant::SOFTMAX) x += 0.0f;  // a weight that is not −0
    if (MASKED) x = (variant.mask(at, kv, number) & (key < pages.length)) ? x : masked;
    tw::store<float, N>(s + c * N, x);
    top = tw::vmax<float, N>(top, x);
  }
  if (!Variant::SOFTMAX) return 1.0f;
  float largest = tw::max<float>(row.largest, tw::fold_max<float, N>(top));
  float base = largest == LOWEST ? 0.0f : largest;  // nothing seen: all weights are 0
  F sum{};
  for (int c = 0; c < TV; ++c) {
    F x = tw::load<float, N>(s + c * N), w = tw::exp<N>(x - base);
    if (MASKED) w = x == tw::splat<float, N>(LOWEST) ? tw::splat<float, N>(-0.0f) : w;
    tw::store<float, N>(s + c * N, w);
    sum += w;
  }
  float keep = row.largest == largest ? 1.0f : tw::exp(row.largest - base);
  row.weight = row.weight * keep + tw::fold_sum<float, N>(sum);
  row.largest = largest;
  return keep;
}

TW_INLINE float online_softmax(const Variant& variant, const At& at, const tw::Pages& pages, int kv0, bool masked, float* s, Softmax& row) {
  return masked ? online_softmax<true>(variant, at, pages, kv0, s, row)
                : online_softmax<false>(variant, at, pages, kv0, s, row);
}

// Σ_k weights[r][k] values[k] where no value of a masked key counts, NaN and Inf included.
template <int R, int C, class LoadB>
__attribute__((noinline)) void block_of_visible(const float* weights, LoadB value, int n, float* sums) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v) {
      F sum{};
      for (int k = 0; k < n; ++k)
        if (tw::float_to_bits(weights[r * T + k]) != 0x80000000u) sum += weights[r * T + k] * value(k, v);
      tw::store<float, N>(sums + (r * C + v) * N, sum);
    }
}

// sums[r] = keep[r] * sums[r] + Σ_k weights[r][k] values[k] over n keys: a tile is summed from 0, or
// small terms would vanish beside the sum of a long context. `products(v0, acc)` computes the columns
// from vector v0 on.
template <int R, class Products, class Value>
TW_INLINE void add_values(Products products, const float* weights, Value value, int n, float* sums, const float* keep, bool masked) {
  for_columns<NV>([&](int v0, auto count) {
    constexpr int C = decltype(count)::value;
    F acc[R][C], all{};
    products(v0, acc);
    if (masked) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) all += acc[r][v] * 0.0f;
    }
    if (tw::fold_sum<float, N>(all) != 0.0f) {  // NaN: some value is not finite
      alignas(64) float again[R * C * N];
      block_of_visible<R, C>(weights, [&](int k, int v) { return value(k, v0 + v); }, n, again);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) acc[r][v] = tw::load<float, N>(again + (r * C + v) * N);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) {
        float* c = sums + r * DVP + (v0 + v) * N;
        tw::store<float, N>(c, tw::load<float, N>(c) * keep[r] + acc[r][v]);
      }
  });
}

// -- one item --------------------------------------------------------------------------------------

struct Work {  // an item with the lengths read from memory
  const Params& p;
  const Item& item;
  Variant variant;
  tw::Pages pages;
  const tw::Row* whose;  // its rows of q
  int tokens, rows;
  int begin, end;        // its tiles, as numbers in `seen`
  int chunk, chunks;
  tw::Tiles<Variant::RANGES> seen;
  At at(int row) const {
    const tw::Row& own = whose[row / G];
    return At{own.position, item.kv_head * G + row % G, item.kv_head, own.request,
              item.qo_begin + row / G, own.qo_len, own.kv_len};
  }
  tw::Tile tile(int row0, int row1, int kv0, int kv1) const {  // both ends included
    tw::Tile tile{{}, tw::Bound{pages.position(kv0), pages.position(kv1)},
                  tw::Bound{item.kv_head * G, item.kv_head * G + G - 1}, tw::bound(item.kv_head), {},
                  tw::Bound{pages.number(kv0), pages.number(kv1)}, {}, {}};
    const tw::Row &first = whose[row0 / G], &last = whose[row1 / G];
    tile.qo = tw::Bound{first.position, last.position};
    tile.request = tw::Bound{first.request, last.request};
    tile.qo_len = tw::bound(first.qo_len);
    tile.kv_len = tw::bound(first.kv_len);
    if constexpr (table::LEVELS > 1)
      for (int t = row0 / G; t <= row1 / G; ++t) {
        auto reach = [](tw::Bound& all, int64_t x) { all = tw::Bound{tw::least(all.lo, x), tw::most(all.hi, x)}; };
        reach(tile.qo, whose[t].position);
        reach(tile.qo_len, whose[t].qo_len);
        reach(tile.kv_len, whose[t].kv_len);
      }
    return tile;
  }
  int tile_class(int row0, int row1, int t) const {
    int kv1 = (t + 1) * T;
    return variant.tile_class(tile(row0, row1, t * T, (kv1 < pages.length ? kv1 : pages.length) - 1));
  }
};

TW_INLINE const typename Q::type* query_row(const Work& w, int r) {
  return w.p.q + static_cast<int64_t>(w.item.qo_begin + r / G) * w.p.q_token + (w.item.kv_head * G + r % G) * w.p.q_head;
}

// Queries in float32, scaled, with zeros up to `padded` rows.
TW_INLINE void load_queries(const Work& w, int padded, float* q) {
  for (int r = 0; r < padded; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NK; ++v) {
      F x = r < w.rows ? load_head<Q, DK>(query_row(w, r), v) * (Variant::QUERY ? 1.0f : w.p.sm_scale) : F{};
      tw::store<float, N>(q + r * DKP + v * N, x);
    }
    if constexpr (Variant::QUERY)
      if (r < w.rows) change_row<DK>(q + r * DKP, [&](const auto& row, int d) { return w.variant.query(row, w.at(r), d) * w.p.sm_scale; });
  }
}

// The elements of a tile of keys as the variant changes them, in rows of DKP floats.
TW_INLINE void change_keys(const Work& w, int kv0, int n, const K_t* const* k, float* rows) {
  const tw::Row& own = w.whose[0];
  for (int j = 0; j < n; ++j) {
    for (int v = 0; v < NK; ++v) tw::store<float, N>(rows + j * DKP + v * N, load_head<KV, DK>(k[j], v));
    const At at{0, 0, w.item.kv_head, own.request, 0, 0, own.kv_len};
    const int kv = w.pages.position(kv0 + j), number = w.pages.number(kv0 + j);
    if constexpr (Variant::KEY)
      change_row<DK>(rows + j * DKP, [&](const auto& row, int d) { return w.variant.key(row, at, d, kv, number); });
  }
}

// Prefetches a row of D elements.
template <int D>
TW_INLINE void prefetch_head(const K_t* p) {
#pragma GCC unroll 16
  for (int d = 0; d < D; d += 64 / sizeof(K_t)) __builtin_prefetch(p + d);
}

// One query: dot products along the head, K and V read where they lie. Each is asked for while the
// other is worked on: V of the same keys, K of the next tile.
TW_INLINE void attend_one(const Work& w, float* sums, Softmax* rows) {
  alignas(64) float q[G * DKP], s[G][T], keep[G], changed[Variant::KEY ? T * DKP : N];
  const K_t *keys[2][T], *vals[2][T];
  load_queries(w, G, q);
  auto length_of = [&](int t) { return w.pages.length - t * T < T ? w.pages.length - t * T : T; };
  auto find = [&](int i, int n) { find_rows(w.p, w.pages, w.item.kv_head, w.seen.at(i) * T, n, keys[i & 1], vals[i & 1]); };
  if (w.begin < w.end) find(w.begin, length_of(w.seen.at(w.begin)));
  for (int i = w.begin; i < w.end; ++i) {
    const K_t *const *k = keys[i & 1], *const *v = vals[i & 1], *const *next = keys[(i + 1) & 1];
    int t = w.seen.at(i), kv0 = t * T, n = length_of(t), coming = i + 1 < w.end ? length_of(w.seen.at(i + 1)) : 0;
    if (coming > 0) find(i + 1, coming);
    int kind = w.tile_class(0, G - 1, t);
    if (kind == tw::EMPTY) continue;
    if (Variant::KEY) change_keys(w, kv0, n, k, changed);
    for (int j0 = 0; j0 < T; j0 += N) {
      F part[G][N];
      for (int j = 0; j < N; ++j) {
        if (j0 + j >= n) {
          for (int g = 0; g < G; ++g) part[g][j] = F{};
          continue;
        }
        F key[NK];
        prefetch_head<DV>(v[j0 + j]);
#pragma GCC unroll 16
        for (int d = 0; d < NK; ++d)
          key[d] = Variant::KEY ? tw::load<float, N>(changed + (j0 + j) * DKP + d * N) : load_head<KV, DK>(k[j0 + j], d);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          F dot = key[0] * tw::load<float, N>(q + g * DKP);
#pragma GCC unroll 16
          for (int d = 1; d < NK; ++d) dot += key[d] * tw::load<float, N>(q + g * DKP + d * N);
          part[g][j] = dot;
        }
      }
      for (int g = 0; g < G; ++g) tw::store<float, N>(&s[g][j0], sum_each(part[g]));
    }
    bool masked = n < T || kind != tw::FULL;
    for (int g = 0; g < G; ++g)
      keep[g] = online_softmax(w.variant, w.at(g), w.pages, kv0, masked, s[g], rows[g]);
    auto value = [&](int j, int d) {
      if (d == 0 && j < coming) prefetch_head<DK>(next[j]);
      return load_head<KV, DV>(v[j], d);
    };
    auto add = [&](int g, auto count) {
      auto products = [&](int v0, auto& acc) { block(s[g], T, [&](int j, int d) { return value(j, v0 + d); }, n, acc); };
      add_values<decltype(count)::value>(products, s[g], value, n, sums + g * DVP, keep + g, masked);
    };
    constexpr int most = G / RB * RB;
    for (int g = 0; g < most; g += RB) add(g, Count<RB>());
    if constexpr (most < G) add(most, Count<most < G ? G - most : RB>());
  }
}

// Queries as pairs, unscaled, with zeros up to `padded` rows.
TW_INLINE void load_queries(const Work& w, int padded, uint32_t* q) {
  __builtin_memset(q, 0, sizeof(uint32_t) * QP * padded);
  for (int r = 0; r < w.rows; ++r) __builtin_memcpy(q + r * QP, query_row(w, r), DK * sizeof(typename Q::type));
}

// A tile of keys as operands, transposed, with zeros beyond n; `load(j, d, to)` loads vector d of key j.
template <class Load>
TW_INLINE void load_keys(Load load, int n, Operand* keys) {
  for (int j0 = 0; j0 < T; j0 += N) {
#pragma GCC unroll 1
    for (int d = 0; d < NQ; ++d) {
      F square[N];  // of the bits of operands
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) {
        Operands operands{};
        if (j0 + j < n) load(j0 + j, d, operands);
        square[j] = (F)operands;
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) tw::store<Operand, N>(keys + (d * N + i) * T + j0, (Operands)square[i]);
    }
  }
}

// A tile of n values: floats in rows of keys, or the pairs of keys 2j and 2j + 1 in row j.
TW_INLINE void load_values(const K_t** v, int n, float* values) {
  for (int j = 0; j < n; ++j)
    for (int d = 0; d < NV; ++d) tw::store<float, N>(values + j * DVP + d * N, load_head<KV, DV>(v[j], d));
}

TW_INLINE void load_values(const K_t** v, int n, uint32_t* values) {
  using U = vec<uint32_t, N>;
  for (int j = 0; j < n; j += 2)
    for (int d = 0; d < NV; ++d) {
      U low = (U)load_head<KV, DV>(v[j], d), high = j + 1 < n ? (U)load_head<KV, DV>(v[j + 1], d) : U{};
      tw::store<uint32_t, N>(values + j / 2 * DVP + d * N, low >> 16 | high);  // float32 ends in zeros
    }
}

// Vector `d` of the value of key j.
TW_INLINE F value_of(const float* values, int j, int d) { return tw::load<float, N>(values + j * DVP + d * N); }
TW_INLINE F value_of(const uint32_t* values, int j, int d) {
  vec<uint32_t, N> pairs = tw::load<uint32_t, N>(values + j / 2 * DVP + d * N);
  return (F)(j % 2 ? pairs & 0xffff0000u : pairs << 16);
}

// The weights of RB rows as operands.
TW_INLINE const float* as_operands(const float* weights, float*) { return weights; }
TW_INLINE const uint32_t* as_operands(const float* weights, uint32_t* pairs) {
#pragma GCC unroll 8
  for (int c = 0; c < RB * T; c += 2 * N)
    tw::store<uint32_t, N>(pairs + c / 2, to_pairs(tw::load<float, N>(weights + c), tw::load<float, N>(weights + c + N)));
  return pairs;
}

// Many queries: products of register blocks over a copied tile.
TW_INLINE void attend_many(const Work& w, float* sums, Softmax* rows) {
  constexpr int MAX_ROWS = (MAX_TOKENS * G + RB - 1) / RB * RB;
  alignas(64) Operand q[MAX_ROWS * QP], keys[QP * T], values[T / EACH * DVP], weights[RB * T / EACH];
  alignas(64) float s[RB * T], keep[RB], changed[Variant::KEY ? T * DKP : N];
  const K_t *k[T], *v[T];
  load_queries(w, (w.rows + RB - 1) / RB * RB, q);
  for (int i = w.begin; i < w.end; ++i) {
    const int t = w.seen.at(i);
    if (w.tile_class(0, w.rows - 1, t) == tw::EMPTY) continue;
    int kv0 = t * T, n = w.pages.length - kv0 < T ? w.pages.length - kv0 : T;
    find_rows(w.p, w.pages, w.item.kv_head, kv0, n, k, v);
    if (Variant::KEY) change_keys(w, kv0, n, k, changed);
    auto load = [&](int j, int d, auto& to) {
      if constexpr (Variant::KEY) to = tw::load<float, N>(changed + j * DKP + d * N);
      else load_operands(k[j], d, to);
    };
    load_keys(load, n, keys);
    load_values(v, n, values);
    for (int r0 = 0; r0 < w.rows; r0 += RB) {
      int count = w.rows - r0 < RB ? w.rows - r0 : RB;
      int kind = w.tile_class(r0, r0 + count - 1, t);
      if (kind == tw::EMPTY) continue;
      auto key = [&](int d, int c) { return tw::load<Operand, N>(keys + d * T + c * N); };
      product<RB, TV>(q + r0 * QP, QP, key, (DK + EACH - 1) / EACH, PAIRED ? w.p.sm_scale : 1.0f, s, T);
      bool masked = n < T || kind != tw::FULL;
      for (int r = 0; r < RB; ++r) {
        keep[r] = 1.0f;
        if (r < count)
          keep[r] = online_softmax(w.variant, w.at(r0 + r), w.pages, kv0, masked, s + r * T, rows[r0 + r]);
      }
      const Operand* a = as_operands(s, weights);
      auto products = [&](int v0, auto& acc) {
        auto b = [&](int j, int d) { return tw::load<Operand, N>(values + j * DVP + (v0 + d) * N); };
        block(a, T / EACH, b, (n + EACH - 1) / EACH, acc);
      };
      auto value = [&](int j, int d) { return value_of(values, j, d); };
      add_values<RB>(products, s, value, n, sums + r0 * DVP, keep, masked);
    }
  }
}

// -- results -----------------------------------------------------------------------------------------

TW_INLINE void write_result(const Work& w, int row, float* sums, Softmax softmax) {
  int64_t at = static_cast<int64_t>(w.item.qo_begin + row / G) * w.p.qo_heads + w.item.kv_head * G + row % G;
  float keep = 1.0f;
  if constexpr (Variant::SINK) keep = tw::add_sink(w.variant.sink(w.at(row)), softmax.largest, softmax.weight);
  float factor = !Variant::SOFTMAX ? 1.0f : softmax.largest == LOWEST ? 0.0f : keep / softmax.weight;
  typename O::type* o = w.p.o + at * DV;
  if constexpr (Variant::OUTPUT) {
    for (int d = 0; d < DV; ++d) sums[d] *= factor;
    factor = 1.0f;
    change_row<DV>(sums, [&](const auto& old, int d) { return w.variant.output(old, w.at(row), d); });
  }
  for (int d = 0; d < DV; ++d) o[d] = from_float(sums[d] * factor, O());
  if (w.p.lse) w.p.lse[at] = softmax.largest == LOWEST ? LOWEST : softmax.largest + __builtin_logf(softmax.weight);
}

TW_INLINE void store_partial(float* to, const float* sums, Softmax softmax) {
  __builtin_memcpy(to, sums, DVP * sizeof(float));
  to[DVP] = softmax.largest;
  to[DVP + 1] = softmax.weight;
}

// Partial results of a row, `step` floats apart, as one, in their order.
TW_INLINE Softmax merged(const float* parts, int64_t step, int count, float* total) {
  Softmax all;
  for (int d = 0; d < DVP; ++d) total[d] = 0.0f;
  for (int c = 0; c < count; ++c) all.largest = tw::max<float>(all.largest, parts[c * step + DVP]);
  for (int c = 0; c < count; ++c) {
    const float* part = parts + c * step;
    if (part[DVP] == LOWEST) continue;
    float factor = tw::exp(part[DVP] - all.largest);
    all.weight += part[DVP + 1] * factor;
    for (int d = 0; d < DVP; ++d) total[d] += part[d] * factor;
  }
  return all;
}

// Whether `count` others have arrived at a counter, which is then ready for the next replay.
TW_INLINE bool arrives_last(int32_t* counter, int count) {
  if (__atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL) != count) return false;
  __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
  return true;
}

// A row that all keys of its item have reached: the result, or the state of a level of shared keys.
TW_INLINE float* state_of(const Work& w, int level, int row) {
  int64_t at = static_cast<int64_t>(w.item.qo_begin + row / G) * w.p.qo_heads + w.item.kv_head * G + row % G;
  return w.p.states + (level * w.p.state_rows + at) * PARTIAL_ROW;
}
TW_INLINE void write_row(const Work& w, int row, float* sums, Softmax softmax) {
  if constexpr (table::LEVELS == 1) {
    write_result(w, row, sums, softmax);
  } else {
    store_partial(state_of(w, tw::node_at(w.p, w.item.request).level, row), sums, softmax);
  }
}
// The last level of a row of q to arrive merges the states of all, in the order of the levels.
TW_INLINE void join_levels(const Work& w) {
  for (int t = 0; t < w.tokens; ++t) {
    int64_t counter = static_cast<int64_t>(w.item.qo_begin + t) * w.p.kv_heads + w.item.kv_head;
    if (!arrives_last(w.p.arrivals + counter, table::LEVELS - 1)) continue;
    for (int row = t * G; row < t * G + G; ++row) {
      alignas(64) float total[DVP];
      Softmax all = merged(state_of(w, 0, row), w.p.state_rows * PARTIAL_ROW, table::LEVELS, total);
      write_result(w, row, total, all);
    }
  }
}

// The partial results of an item's chunks; whoever comes last merges them in their order.
TW_INLINE bool write_partial(const Work& w, const float* sums, const Softmax* rows) {
  int64_t size = static_cast<int64_t>(w.rows) * PARTIAL_ROW;
  float* all = w.p.partials + w.item.slot * static_cast<int64_t>(MAX_TOKENS * G) * PARTIAL_ROW;
  for (int r = 0; r < w.rows; ++r) store_partial(all + w.chunk * size + r * PARTIAL_ROW, sums + r * DVP, rows[r]);
  if (!arrives_last(w.p.counters + w.item.counter, w.chunks - 1)) return false;
  for (int r = 0; r < w.rows; ++r) {
    alignas(64) float total[DVP];
    Softmax row = merged(all + r * PARTIAL_ROW, size, w.chunks, total);
    write_row(w, r, total, row);
  }
  return true;
}

static void run_item(const Params& p, const Item& item) {
  tw::Pages pages = tw::pages_of(p, item.request, MAX_KEYS);
  int tokens = item.qo_end - item.qo_begin;
  tw::Row whose[MAX_TOKENS];
  for (int t = 0; t < tokens; ++t) whose[t] = tw::row_of(p, item.request, item.qo_begin + t, MAX_KEYS);
  Work w{p, item, Variant(p), pages, whose, tokens, tokens * G, 0, 0, item.chunk, item.chunks, {}};
  w.seen = tw::tiles_seen<T>(w.variant, w.tile(0, w.rows - 1, 0, 0), pages);
  const int tiles = w.seen.count();
  if (w.chunks > 1 && tiles / CHUNK_TILES < w.chunks) w.chunks = tiles < 2 * CHUNK_TILES ? 1 : tiles / CHUNK_TILES;
  if (w.chunk < w.chunks) {  // else too short to cut: others do it all
    w.begin = static_cast<int>(static_cast<int64_t>(tiles) * w.chunk / w.chunks);
    w.end = static_cast<int>(static_cast<int64_t>(tiles) * (w.chunk + 1) / w.chunks);
    constexpr int MAX_ROWS = (MAX_TOKENS * G + RB - 1) / RB * RB;
    alignas(64) float sums[MAX_ROWS * DVP];
    Softmax rows[MAX_ROWS];
    __builtin_memset(sums, 0, sizeof(float) * DVP * ((w.rows + RB - 1) / RB * RB));
    if (tokens == 1 && G <= 8) {
      attend_one(w, sums, rows);
    } else {
      attend_many(w, sums, rows);
    }
    if (w.chunks > 1) {
      if (!write_partial(w, sums, rows)) return;
    } else {
      for (int r = 0; r < w.rows; ++r) write_row(w, r, sums + r * DVP, rows[r]);
    }
    if constexpr (table::LEVELS > 1) join_levels(w);
  }
}

}  // namespace flash

extern "C" __attribute__((visibility("default"))) void stage0(const void* raw, int64_t begin, int64_t end) {
  const Params& p = *static_cast<const Params*>(raw);
  for (int64_t unit = begin; unit < end; ++unit) flash::run_item(p, p.items[unit]);
}
