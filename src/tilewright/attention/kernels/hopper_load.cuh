// The scheduler and the loaders of prefill_hopper.cuh, which includes this file and says what they do.

namespace attention {

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
// brings the counter to `item_count` is the last of all: it sets the counter back.
TW_INLINE int draw(const Params& p, int n, int lane) {
  if (n == 0) return blockIdx.x;
  int drawn = 0;
  if (lane == 0) {
    drawn = atomicAdd(p.counter, 1);
    if (drawn == p.item_count - 1) *p.counter = 0;
  }
  return gridDim.x + __shfl_sync(0xffffffffu, drawn, 0);
}

TW_INLINE void schedule(const Params& p, const Variant& variant, const Shared& shared, int lane) {
  int segments = 0;
  for (int n = 0;; ++n) {
    const int item = draw(p, n, lane);
    const bool ends = item >= p.item_count;
    const Item work = p.items[ends ? 0 : item];
    const int begin = p.qo_indptr[work.request], end = p.qo_indptr[work.request + 1];
    const tw::Pages pages = tw::pages_of(p, work.request, MAX_KEYS);
    const int length = pages.length;
    for (int top = (length + BN - 1) / BN - 1, first = 1; first || top >= 0; top -= MAX_TILES, first = 0, ++segments) {
      Slot& s = shared.slot(segments);
      tw::barrier_wait(shared.barrier(ITEM_EMPTY + (segments & 1)), (segments >> 1 & 1) ^ 1);
      if (lane == 0) {
        s.request = work.request;
        s.head = work.kv_head;
        s.token = work.qo_begin;
        s.tokens = ends ? -1 : work.qo_end - work.qo_begin;
        s.length = length;
        s.queries = end - begin;
        s.first = tw::first_query(p, pages, work.request, end - begin) + (work.qo_begin - begin);
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
    if constexpr (KEYS_LIE == IN_PAGES)
#pragma unroll
      for (int i = 0; i < ENTRIES; ++i) {
        const int box = i * 32 + lane, page = (tile * BN + box * BOX) >> p.page_shift;
        // A box outside the cache arrives as zeros.
        entry[i] = box < BOXES && page < pages.count ? static_cast<int>(tw::page_at(p, pages, page)) : -1;
      }
  }
  TW_INLINE void issue(const Params& p, int tile, uint32_t to, uint32_t barrier) {
    if (tw::elect()) tw::barrier_expect(barrier, TILE_BYTES);
    if constexpr (KEYS_LIE == IN_PAGES) {
      const int slot = BOX == BN ? tile * BN & ((1 << p.page_shift) - 1) : 0;
#pragma unroll
      for (int i = 0; i < ENTRIES; ++i)
#pragma unroll 8
        for (int box = 0; box < (BOXES < 32 ? BOXES : 32); ++box) {
          const int page = __shfl_sync(0xffffffffu, entry[i], box);
          if (tw::elect()) copy(to + (i * 32 + box) * BOX * 128, barrier, slot, page);
        }
    } else if (tw::elect()) {
      const int first = static_cast<int>(pages.first);
      if (KEYS_LIE == IN_ROWS) copy(to, barrier, first + tile * BN, 0);
      else copy(to, barrier, tile * BN, first);
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
    if (variant.mask(at_of(s, row, kv))) return false;
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

}  // namespace attention
