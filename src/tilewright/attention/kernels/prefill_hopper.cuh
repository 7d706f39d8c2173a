// Attention of many query rows (prefill) by wgmma and TMA, sm_90a.
//
// Rows are packed: row r of an item is query r / G of it, head r % G of the KV head's group. An item is
// up to TOKENS queries of one request with one KV head: 128 rows, 64 for each of two consumer
// warpgroups. CTAs are persistent and draw items from a counter. Four roles run side by side:
//   scheduler (a warp)  draws an item and sorts its tiles of 128 keys by the mask: those of which only a
//                       part is seen (partial), and those of which every row sees all (full); an item of
//                       more than MAX_TILES tiles goes on in several segments
//   loader of Q and K, loader of V (a warp each): boxes by TMA into rings of tiles. Rows of V that
//                       no row of the item sees are overwritten with zeros (0 · NaN would reach the
//                       outputs), in partial tiles only
//   consumers           S = Q·Kᵀ, softmax, O += P·V, with P from registers. In the loop over full tiles
//                       S of a tile and P·V of the tile before are under way while the other warpgroup
//                       computes its exponentials (ping-pong by named barriers), and this one's own hide
//                       P·V. Partial tiles come first, in a loop of their own, so that the loop over full
//                       tiles has no branch and no mask between issue and wait.
//
// In front of this file: gpu.cuh, mma.cuh, hopper.cuh, bounds.h, pages.h, the constants of `attention`
// (D head_dim 64 or 128, G query heads of a KV head, BOX keys of a TMA box, PAGED, TRIVIAL_LOGITS,
// K_STAGES, V_STAGES, MAX_TILES, MAX_KEYS, the types Kind and Out), the structs `Params`, `Work`, `At` and `Variant`.
//
// Launch: grid = at most min(items, SMs) CTAs, THREADS threads, SMEM_BYTES of dynamic shared memory:
//   [2 of Q] [K_STAGES of K] [V_STAGES of V]  tiles of 128 rows, each D/64 blocks of 128-byte rows, swizzled
//   [2 slots of a segment] [mbarriers]
// The outputs of an item pass through its tile of Q, where Out has 16 bits.
// Assumes: sm_scale > 0; rows of Q, K, V described by tensor maps; counter is 0 (and is 0 again at the end).

namespace attention {

constexpr int WARPGROUPS = 3, THREADS = WARPGROUPS * 128;
constexpr int BM = 128, BN = 128;     // rows of an item, keys of a tile
constexpr int TOKENS = BM / G;        // queries of an item
constexpr int HALVES = D / 64;        // blocks of 64 columns
constexpr int BLOCK_BYTES = 128 * 128;             // 128 rows of 64 columns
constexpr int TILE_BYTES = HALVES * BLOCK_BYTES;   // 128 rows
constexpr int BOXES = BN / BOX, ENTRIES = (BOXES + 31) / 32;  // of a tile; entries of the table for each lane
constexpr int LOADER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
constexpr float LOG2E = 1.4426950408889634f;
constexpr int PING = 2;  // named barriers 2, 3: warpgroup 0, 1 may issue; 4, 5: of one warpgroup
static_assert(D % 64 == 0 && D <= 128 && BN % BOX == 0 && G <= 64, "");

struct Slot {  // a segment of an item, as the scheduler passes it on
  int request, head, token, tokens;  // token: row of q; tokens < 0: no more items
  int first, length;                 // position of the first query; keys of the request
  int begins, ends;                  // whether it is the item's first segment, its last
  int partial, full;                 // numbers of tiles
  int tiles[MAX_TILES];              // partial tiles from the front, full tiles from the back
};

constexpr int Q_AT = 0, K_AT = 2 * TILE_BYTES, V_AT = K_AT + K_STAGES * TILE_BYTES, SLOTS_AT = V_AT + V_STAGES * TILE_BYTES;
constexpr int BARRIERS_AT = SLOTS_AT + 2 * sizeof(Slot);
enum Barrier { K_FULL, K_EMPTY = K_FULL + K_STAGES, V_FULL = K_EMPTY + K_STAGES, V_EMPTY = V_FULL + V_STAGES,
               Q_FULL = V_EMPTY + V_STAGES, Q_EMPTY = Q_FULL + 2, V_LOADED = Q_EMPTY + 2, ITEM_FULL, ITEM_EMPTY = ITEM_FULL + 2, BARRIERS = ITEM_EMPTY + 2 };
constexpr int SMEM_BYTES = BARRIERS_AT + BARRIERS * 8 + 1024;  // the base is aligned to 1024 by hand
static_assert(SMEM_BYTES <= 232448 && sizeof(Slot) % 8 == 0, "");

struct Shared {  // of a CTA
  char* memory;
  uint32_t base;
  TW_INLINE uint32_t barrier(int n) const { return base + BARRIERS_AT + n * 8; }
  TW_INLINE Slot& slot(int n) const { return reinterpret_cast<Slot*>(memory + SLOTS_AT)[n & 1]; }
};

TW_INLINE float lowest() { return __uint_as_float(0xff800000u); }
TW_INLINE int tile_at(const Slot& s, int i) { return i < s.partial ? s.tiles[i] : s.tiles[MAX_TILES - 1 - (i - s.partial)]; }
TW_INLINE tw::Tile rows_and(const Slot& s, tw::Bound kv) {
  return tw::Tile{tw::Bound{s.first, s.first + s.tokens - 1}, kv, tw::Bound{s.head * G, s.head * G + G - 1},
                  tw::bound(s.head), tw::bound(s.request)};
}

// Waits for item n and gives it; `release` when this warp has read what it needs.
TW_INLINE const Slot& next_item(const Shared& shared, int n) {
  tw::barrier_wait(shared.barrier(ITEM_FULL + (n & 1)), n >> 1 & 1);
  return shared.slot(n);
}
TW_INLINE void release(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) tw::barrier_arrive(barrier);
}

// -- scheduler -----------------------------------------------------------------------------------

// Sorts up to MAX_TILES tiles of an item, the last ones first, from tile `top` down.
TW_INLINE void sort_tiles(const Variant& variant, Slot& s, int top, int lane) {
  const int count = (s.length + BN - 1) / BN, bottom = max(top - MAX_TILES, -1);
  int partial = 0, full = 0;
  for (; top > bottom; top -= 32) {
    const int tile = top - lane, end = min((tile + 1) * BN, s.length);
    int kind = tw::EMPTY;
    if (tile >= 0) kind = variant.tile_class(rows_and(s, tw::Bound{tile * BN, end - 1}));
    if (kind == tw::FULL && end < (tile + 1) * BN) kind = tw::PARTIAL;
    const uint32_t before = (1u << lane) - 1;
    const uint32_t partials = __ballot_sync(0xffffffffu, kind == tw::PARTIAL), fulls = __ballot_sync(0xffffffffu, kind == tw::FULL);
    if (kind == tw::PARTIAL) s.tiles[partial + __popc(partials & before)] = tile;
    if (kind == tw::FULL) s.tiles[MAX_TILES - 1 - full - __popc(fulls & before)] = tile;
    partial += __popc(partials);
    full += __popc(fulls);
  }
  if (lane == 0) {
    if (partial + full == 0) s.tiles[partial++] = count;  // past the end: no row sees it
    s.partial = partial;
    s.full = full;
  }
}

// The number of the next item of this CTA, the n-th. Each CTA draws until it gets none, so the draw that
// brings the counter to `items` is the last of all: it sets the counter back.
TW_INLINE int draw(const Params& p, int n, int lane) {
  if (n == 0) return blockIdx.x;
  int drawn = 0;
  if (lane == 0) {
    drawn = atomicAdd(p.counter, 1);
    if (drawn == p.items - 1) *p.counter = 0;
  }
  return gridDim.x + __shfl_sync(0xffffffffu, drawn, 0);
}

TW_INLINE void schedule(const Params& p, const Variant& variant, const Shared& shared, int lane) {
  int segments = 0;
  for (int n = 0;; ++n) {
    const int item = draw(p, n, lane);
    const bool ends = item >= p.items;
    const Work work = p.work[ends ? 0 : item];
    const int end = p.qo_indptr[work.request + 1], length = tw::pages_of(p, work.request, MAX_KEYS).length;
    for (int top = (length + BN - 1) / BN - 1, first = 1; first || top >= 0; top -= MAX_TILES, first = 0, ++segments) {
      Slot& s = shared.slot(segments);
      tw::barrier_wait(shared.barrier(ITEM_EMPTY + (segments & 1)), (segments >> 1 & 1) ^ 1);
      if (lane == 0) {
        s.request = work.request;
        s.head = work.head;
        s.token = work.token;
        s.tokens = ends ? -1 : min(TOKENS, end - work.token);
        s.length = length;
        s.first = length - (end - work.token);
        s.begins = first;
        s.ends = top < MAX_TILES;
      }
      __syncwarp();
      if (!ends) sort_tiles(variant, s, top, lane);
      release(shared.barrier(ITEM_FULL + (segments & 1)), lane);
      if (ends) return;
    }
  }
}

// -- loaders -------------------------------------------------------------------------------------

// Issues the boxes of tiles. `entry`: the pages of boxes lane, lane + 32, … of the next tile.
struct Loader {
  const void* map;
  tw::Pages pages;
  int head;
  int entry[ENTRIES];

  TW_INLINE void start(const Params& p, const Slot& s, const void* tensor_map) {
    map = tensor_map;
    pages = tw::pages_of(p, s.request, MAX_KEYS);
    head = s.head;
  }
  TW_INLINE void look_up(const Params& p, int tile, int lane) {
    if constexpr (PAGED)
#pragma unroll
      for (int i = 0; i < ENTRIES; ++i) {
        const int box = i * 32 + lane, page = (tile * BN + box * BOX) >> p.page_shift;
        // A box outside the cache arrives as zeros.
        entry[i] = box < BOXES && page < pages.count ? static_cast<int>(tw::page_at(p, pages, page)) : -1;
      }
  }
  TW_INLINE void issue(const Params& p, int tile, uint32_t to, uint32_t barrier) {
    if (tw::elect()) tw::barrier_expect(barrier, TILE_BYTES);
    if constexpr (PAGED) {
      const int slot = BOX == BN ? tile * BN & ((1 << p.page_shift) - 1) : 0;
#pragma unroll
      for (int i = 0; i < ENTRIES; ++i)
#pragma unroll 8
        for (int box = 0; box < (BOXES < 32 ? BOXES : 32); ++box) {
          const int page = __shfl_sync(0xffffffffu, entry[i], box);
          if (tw::elect()) copy(to + (i * 32 + box) * BOX * 128, barrier, slot, page);
        }
    } else if (tw::elect()) {
      copy(to, barrier, static_cast<int>(pages.first) + tile * BN, 0);
    }
  }
  TW_INLINE void copy(uint32_t to, uint32_t barrier, int row, int page) const {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) tw::copy_box(to + half * BLOCK_BYTES, map, barrier, half * 64, row, head, page);
  }
};

TW_INLINE void load_keys(const Params& p, const Shared& shared, int lane) {
  int done = 0, items = 1;  // tiles, items: 0 is the consumers' empty one, whose tile of Q is free at once
  for (int n = 0;; ++n) {
    const Slot& s = next_item(shared, n);
    if (s.tokens < 0) return;
    const int tiles = s.partial + s.full;
    Loader loader;
    loader.start(p, s, &p.k_map);
    loader.look_up(p, tile_at(s, 0), lane);
    if (s.begins) {
      const int buffer = items & 1;
      const uint32_t full = shared.barrier(Q_FULL + buffer);
      tw::barrier_wait(shared.barrier(Q_EMPTY + buffer), (items++ >> 1 & 1) ^ 1);
      if (tw::elect()) {
        tw::barrier_expect(full, HALVES * TOKENS * G * 128);
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
          tw::copy_box(shared.base + Q_AT + buffer * TILE_BYTES + half * BLOCK_BYTES, &p.q_map, full, half * 64, s.head * G, s.token);
      }
    }
    for (int i = 0; i < tiles; ++i, ++done) {
      const int stage = done % K_STAGES;
      tw::barrier_wait(shared.barrier(K_EMPTY + stage), (done / K_STAGES & 1) ^ 1);
      loader.issue(p, tile_at(s, i), shared.base + K_AT + stage * TILE_BYTES, shared.barrier(K_FULL + stage));
      if (i + 1 < tiles) loader.look_up(p, tile_at(s, i + 1), lane);
    }
    release(shared.barrier(ITEM_EMPTY + (n & 1)), lane);
  }
}

// Whether no row of the item sees a key.
TW_INLINE bool is_unseen(const Variant& variant, const Slot& s, int kv) {
  if (kv >= s.length) return true;
  const int kind = variant.tile_class(rows_and(s, tw::bound(kv)));
  if (kind != tw::PARTIAL) return kind == tw::EMPTY;
  const int rows = s.tokens * G;
#pragma unroll 1
  for (int i = 0; i < rows; ++i) {  // from both ends: the first or the last row mostly sees it
    const int row = i & 1 ? rows - 1 - (i >> 1) : i >> 1;
    if (variant.mask(At{s.first + row / G, kv, s.head * G + row % G, s.head, s.request})) return false;
  }
  return true;
}

TW_INLINE void load_values(const Params& p, const Variant& variant, const Shared& shared, int lane) {
  // The first tile of the ring is zeros: the consumers' first step has a tile before it.
  const int4 zero = make_int4(0, 0, 0, 0);
  for (int i = lane; i < TILE_BYTES / 16; i += 32) reinterpret_cast<int4*>(shared.memory + V_AT)[i] = zero;
  tw::fence_async();
  release(shared.barrier(V_FULL), lane);
  int done = 1, patched = 0;
  for (int n = 0;; ++n) {
    const Slot& s = next_item(shared, n);
    if (s.tokens < 0) return;
    const int tiles = s.partial + s.full;
    Loader loader;
    loader.start(p, s, &p.v_map);
    loader.look_up(p, tile_at(s, 0), lane);
    for (int i = 0; i < tiles; ++i, ++done) {
      const int stage = done % V_STAGES, tile = tile_at(s, i);
      const uint32_t to = shared.base + V_AT + stage * TILE_BYTES;
      int unseen = 0;  // of keys lane, lane + 32, …, a bit each
      if (i < s.partial) {
#pragma unroll 1
        for (int j = 0; j < BN / 32; ++j) unseen |= is_unseen(variant, s, tile * BN + j * 32 + lane) << j;
      }
      const bool patches = __any_sync(0xffffffffu, unseen != 0);
      tw::barrier_wait(shared.barrier(V_EMPTY + stage), (done / V_STAGES & 1) ^ 1);
      loader.issue(p, tile, to, shared.barrier(patches ? V_LOADED : V_FULL + stage));
      if (i + 1 < tiles) loader.look_up(p, tile_at(s, i + 1), lane);
      if (patches) {
        tw::barrier_wait(shared.barrier(V_LOADED), patched++ & 1);
        char* rows = shared.memory + V_AT + stage * TILE_BYTES;
#pragma unroll 1
        for (int j = 0; j < BN / 32; ++j)
          if (unseen >> j & 1)
#pragma unroll
            for (int half = 0; half < HALVES; ++half)
#pragma unroll
              for (int c = 0; c < 8; ++c)
                *reinterpret_cast<uint4*>(rows + half * BLOCK_BYTES + (j * 32 + lane) * 128 + ((c + lane) & 7) * 16) = make_uint4(0, 0, 0, 0);
        tw::fence_async();
        release(shared.barrier(V_FULL + stage), lane);
      }
    }
    release(shared.barrier(ITEM_EMPTY + (n & 1)), lane);
  }
}

// -- consumers -----------------------------------------------------------------------------------

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
  TW_INLINE void my_turn() const { tw::meet(PING + group, 256); }
  TW_INLINE void your_turn() const { tw::arrive_at(PING + 1 - group, 256); }

  // Scores as the variant has them, times log2 e; −inf where the mask refuses.
  TW_INLINE void apply(const Slot& item, int tile, float (&s)[BN / 2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group * 64 + warp * 16 + half * 8 + lane / 4;
      At at{item.first + row / G, 0, item.head * G + row % G, item.head, item.request};
#pragma unroll
      for (int j = 0; j < BN / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[j * 4 + half * 2 + i];
          at.kv = tile * BN + j * 8 + lane % 4 * 2 + i;
          if (!TRIVIAL_LOGITS) x = variant.logits(x * p.sm_scale, at) * LOG2E;
          x = at.kv < item.length && variant.mask(at) ? x : lowest();
        }
    }
  }
  // Scores become weights; `rescale`: what the sums so far are worth under the new maxima.
  TW_INLINE bool weigh(float (&s)[BN / 2], Rows& rows, float (&rescale)[2]) const {
    bool changed = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = rows.row_max[half];
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) largest = fmaxf(largest, fmaxf(s[j * 4 + half * 2], s[j * 4 + half * 2 + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const float base = largest == lowest() ? 0.0f : largest * factor;
      rescale[half] = tw::exp2(rows.row_max[half] * factor - base);
      changed |= rows.row_max[half] != largest;
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

  // Starts the scores of tile `done` and the outputs of the tile before it.
  TW_INLINE void issue(int done, int buffer, float (&s)[BN / 2], float (&o)[D / 2], uint32_t (&weights)[BN / 4]) const {
    const int keys = done % K_STAGES, values = done % V_STAGES;  // V's ring starts with a tile of zeros (load_values)
    tw::barrier_wait(shared.barrier(K_FULL + keys), done / K_STAGES & 1);
    tw::barrier_wait(shared.barrier(V_FULL + values), done / V_STAGES & 1);
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
  TW_INLINE void step(const Slot& item, int tile, int done, int buffer, float (&o)[D / 2], uint32_t (&weights)[BN / 4], Rows& rows) const {
    float s[BN / 2], rescale[2];
    issue(done, buffer, s, o, weights);
    tw::wgmma_wait<Applies ? 0 : 1>();
    tw::tie(s);
    if (Applies) apply(item, tile, s);
    const bool changed = weigh(s, rows, rescale);
    tw::barrier_arrive_after(shared.barrier(K_EMPTY + done % K_STAGES), lane == 0, rows.row_sum[0] + rows.row_sum[1]);
    tw::wgmma_wait<0>();
    tw::tie(o);
    release(shared.barrier(V_EMPTY + done % V_STAGES), lane);
    if (__any_sync(0xffffffffu, changed)) scale(o, rescale);
    pack(weights, s);
  }

  // The first tile of a segment: its scores, and the outputs of the tile before, maybe of another item.
  TW_INLINE void join(int done, int buffer, float (&s)[BN / 2], float (&o)[D / 2], uint32_t (&weights)[BN / 4]) const {
    issue(done, buffer, s, o, weights);
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
    int i = 1;
    for (; i < applied; ++i, ++done) consumer.step<true>(item, tile_at(item, i), done, buffer, o, weights, rows);
    for (; TRIVIAL_LOGITS && i < tiles; ++i, ++done) consumer.step<false>(item, 0, done, buffer, o, weights, rows);
    release(shared.barrier(ITEM_EMPTY + (n & 1)), lane);
  }
  consumer.drain(done, o, weights);
  consumer.write(current, items & 1, o, rows);
}

TW_INLINE void body(const Params& p, int thread, char* smem) {
  const uint32_t start = tw::shared_address(smem), base = (start + 1023) & ~1023u;
  const Shared shared{smem + (base - start), base};
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = thread % 32, group = warp / 4;
  if (thread == 0) {
    for (int i = 0; i < K_STAGES; ++i) {
      tw::barrier_init(shared.barrier(K_FULL + i), 1);
      tw::barrier_init(shared.barrier(K_EMPTY + i), 8);  // consumer warps
    }
    for (int i = 0; i < V_STAGES; ++i) {
      tw::barrier_init(shared.barrier(V_FULL + i), 1);
      tw::barrier_init(shared.barrier(V_EMPTY + i), 8);
    }
    tw::barrier_init(shared.barrier(V_LOADED), 1);
    for (int i = 0; i < 2; ++i) {
      tw::barrier_init(shared.barrier(Q_FULL + i), 1);
      tw::barrier_init(shared.barrier(Q_EMPTY + i), 8);
      tw::barrier_init(shared.barrier(ITEM_FULL + i), 1);
      tw::barrier_init(shared.barrier(ITEM_EMPTY + i), 10);  // consumer warps and loaders
    }
    tw::barrier_init_done();
  }
  __syncthreads();
  const Variant variant(p);
  if (group == 0) {
    tw::fewer_registers<LOADER_REGISTERS>();
    if (warp == 0) load_keys(p, shared, lane);
    else if (warp == 1) load_values(p, variant, shared, lane);
    else if (warp == 2) schedule(p, variant, shared, lane);
  } else {
    tw::more_registers<CONSUMER_REGISTERS>();
    consume(p, variant, shared, group - 1, warp % 4, lane);
  }
}

}  // namespace attention

// Tensor maps lie at multiples of 64 bytes.
struct alignas(64) Aligned { Params p; };

extern "C" __global__ void __launch_bounds__(attention::THREADS, 1) stage0(const __grid_constant__ Aligned aligned) {
  extern __shared__ char smem[];
  const Params& p = aligned.p;
#ifdef TW_CYCLES
  const int64_t began = clock64();
#endif
  attention::body(p, threadIdx.x, smem);
#ifdef TW_CYCLES
  if (threadIdx.x == 128) p.cycles[blockIdx.x] = clock64() - began;
#endif
}
