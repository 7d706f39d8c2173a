// The scheduler and the loaders of prefill_hopper.cuh, which includes this file and says what they do.
#include "shared_items.cuh"

namespace attention {

// -- scheduler -----------------------------------------------------------------------------------

// Sorts up to MAX_TILES tiles of an item: number `top` of those that its mask's extents hold, and down to `bottom`.
template <class Tiles>
TW_INLINE void sort_tiles(const Variant& variant, Slot& s, const Tiles& seen, int top, int bottom, int lane) {
  int partial = 0, full = 0;
  for (; top >= bottom; top -= 32) {
    const bool exists = top - lane >= bottom;
    const int tile = exists ? seen.at(top - lane) : 0, end = min((tile + 1) * BN, s.length);
    const tw::Tile rows = rows_and(s, tile * BN, end - 1);
    const int rest = exists ? variant.rest_class(rows) : int(tw::EMPTY);
    int kind = min(variant.below_class(rows), rest);
    if (kind == tw::FULL && end < (tile + 1) * BN) kind = tw::PARTIAL;
    const uint32_t before = (1u << lane) - 1;
    const uint32_t partials = __ballot_sync(0xffffffffu, kind == tw::PARTIAL), fulls = __ballot_sync(0xffffffffu, kind == tw::FULL);
    if (kind == tw::PARTIAL) s.tiles[partial + __popc(partials & before)] = rest == tw::FULL ? tile | WHOLE : tile;
    if (kind == tw::FULL) s.tiles[MAX_TILES - 1 - full - __popc(fulls & before)] = tile;
    partial += __popc(partials);
    full += __popc(fulls);
  }
  if (lane == 0) {
    if (partial + full == 0) s.tiles[partial++] = (s.length + BN - 1) / BN;  // past the end: no row sees it
    s.partial = partial;
    s.full = full;
  }
}

// The number of the next item of this CTA, the n-th. Each CTA draws until it gets none, so the draw that
// brings the counter to `count` is the last of all: it sets the counter back.
template <class R>
TW_INLINE int draw(const Params& p, int cta, int n, int count, int lane) {
  constexpr bool FEW = NARROW_ITEMS<R>, LATE = NARROW && !FEW;  // LATE: some CTAs come late and have no first item
  const int grid = FEW ? p.narrow_ctas : p.ctas;
  if (!LATE && n == 0) return cta;
  int drawn = 0;
  if (lane == 0) {
    int* counter = p.counter + FEW;
    drawn = atomicAdd(counter, 1);
    if (drawn == count - 1 + (LATE ? grid : 0)) *counter = 0;
  }
  return (LATE ? 0 : grid) + __shfl_sync(0xffffffffu, drawn, 0);
}

TW_INLINE Item item_of(const tw::SharedItem& x) { return Item{x.node, x.head, x.token, x.end, x.chunk, x.chunks, x.row, 0}; }
TW_INLINE Work work_of(const Params& p, const Item& item, const tw::Pages& pages) {
  if constexpr (SHARED) {  // queries of shared keys lie behind them, but for those of a request without keys of its own
    const int lowest = table::QUERY_POSITIONS ? -MAX_KEYS : pages.base + pages.length - (p.qo_indptr ? MOST_QUERIES : 1);
    return Work{item.request, item.kv_head, item.qo_begin, item.qo_end - item.qo_begin, lowest, pages.length, 0,
                pages.base, pages.stride, item.chunk, item.chunks, item.slot, 0};
  }
  const int begin = p.qo_indptr[item.request], queries = p.qo_indptr[item.request + 1] - begin;
  const int first = tw::first_query(p, pages, item.request, queries) + (item.qo_begin - begin);
  return Work{item.request, item.kv_head, item.qo_begin, item.qo_end - item.qo_begin, first, pages.length, queries,
              pages.base, pages.stride, item.chunk, item.chunks, item.slot, item.counter};
}

#ifdef KEY_ARRAY
// Extremes of the elements of KEY_ARRAY that the positions of an item's queries have, and of those that the tiles of its
// request have, read once for all of its items that a CTA draws one after the other. Outside the tensor elements are 0.
TW_INLINE void learn(Variant& variant, const Shared& shared, const Work& work, int lane) {
  constexpr int AT_ONCE = 4, NEAR = 32;  // tiles that are read at once, that are brought near at once
  auto& array = variant.KEY_ARRAY;
  const auto extremes = [&](int low, int high) { return int2{__reduce_min_sync(0xffffffffu, low), __reduce_max_sync(0xffffffffu, high)}; };
  int low = 2147483647, high = -2147483648;
#pragma unroll
  for (int i = 0; i < (TOKENS + 31) / 32; ++i) {
    const int at = i * 32 + lane, x = array.at(work.request, work.first + at);
    low = at < work.tokens ? min(low, x) : low;
    high = at < work.tokens ? max(high, x) : high;
  }
  if (array.known.row != work.request) {
    const int tiles = min((work.length + BN - 1) / BN, MAX_TILES);
    int2* of = reinterpret_cast<int2*>(shared.memory + EXTREMES_AT);
    __syncwarp();
    for (int first = 0; first < tiles; first += AT_ONCE) {
      int lows[AT_ONCE], highs[AT_ONCE];
      if (first % NEAR == 0) {  // an element of each sector of 32 bytes at once, or tiles would wait for memory one after the other
        int any = 0;
#pragma unroll
        for (int i = 0; i < NEAR * BN / 256; ++i) any ^= array.at(work.request, first * BN + (i * 32 + lane) * 8);
        of[min(first + lane, MAX_TILES - 1)].x = any;  // so that they are read; tiles from `first` on are written below
        __syncwarp();
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        lows[i] = 2147483647, highs[i] = -2147483648;
#pragma unroll
        for (int j = 0; j < BN / 32; ++j) {
          const int key = (first + i) * BN + j * 32 + lane, x = array.at(work.request, key);
          lows[i] = key < work.length ? min(lows[i], x) : lows[i];
          highs[i] = key < work.length ? max(highs[i], x) : highs[i];
        }
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int2 both = extremes(lows[i], highs[i]);
        if (lane == i && first + i < tiles) of[first + i] = both;
      }
    }
    __syncwarp();
    array.known.row = work.request;
    array.known.tiles = tiles;
    array.known.of = of;
  }
  array.known.from = work.first;
  array.known.to = work.first + work.tokens - 1;
  array.known.range = extremes(low, high);
}
#endif

template <class R>
TW_INLINE void schedule(const Params& p, Variant variant, const Shared& shared, int items, int lane) {
  int segments = 0;
  for (int n = 0;; ++n) {
    shared.trace(SORT_TILES);
    const int number = draw<R>(p, shared.cta, n, items, lane);
    const bool ends = number >= items;
    Item item;
    tw::Pages pages;
    if constexpr (SHARED) {
      const int n = tw::shared_node(p, ends ? 0 : number, lane);
      const tw::Node node = tw::node_at(p, n);
      pages = tw::pages_of(p, n, MAX_KEYS);
      item = item_of(tw::shared_item<TOKENS>(p, n, node, ends ? 0 : number));
    } else {
      item = p.items[ends ? 0 : number + (NARROW_ITEMS<R> ? p.item_count : 0)];  // narrow items come behind the others
      pages = tw::pages_of(p, item.request, MAX_KEYS);
    }
    Work work = work_of(p, item, pages);
#ifdef KEY_ARRAY
    learn(variant, shared, work, lane);
#endif
    const auto seen = tw::tiles_seen<BN>(variant, rows_and(work, 0, work.length - 1), pages);
    const int64_t count = seen.count();
    int top = static_cast<int>(CHUNKED ? count * (item.chunk + 1) / item.chunks : count) - 1;
    const int bottom = CHUNKED ? static_cast<int>(count * item.chunk / item.chunks) : 0;
    if (ends) work.tokens = -1;
    for (int first = 1; first || top >= bottom; top -= MAX_TILES, first = 0, ++segments) {
      Slot& s = shared.slot(segments);
      shared.trace(WAIT_STAGE);
      tw::barrier_wait(shared.barrier(R::ITEM_EMPTY + (segments & 1)), (segments >> 1 & 1) ^ 1);
      shared.trace(SORT_TILES);
      if (lane == 0) {
        static_cast<Work&>(s) = work;
        s.begins = first;
        s.ends = top - MAX_TILES < bottom;
        s.first_page = pages.first;
        s.page_count = pages.count;
      }
      __syncwarp();
      if (!ends) sort_tiles(variant, s, seen, top, max(bottom, top - MAX_TILES + 1), lane);
      release(shared.barrier(R::ITEM_FULL + (segments & 1)), lane);
      if (ends) return;
    }
  }
}

// -- loaders -------------------------------------------------------------------------------------

// Issues the boxes of tiles. `entry`: the page of box `lane` of the next tile.
template <int BLOCKS>
struct Loader {
  const void* map;
  tw::Pages pages;
  int head;
  int entry;

  TW_INLINE void start(const Slot& s, const void* tensor_map) {
    map = tensor_map;
    pages = s.pages();
    head = s.head;
  }
  TW_INLINE void look_up(const Params& p, int tile, int lane) {
    if constexpr (KEYS_LIE == IN_PAGES) {
      const int page = (tile * BN + lane * BOX) >> p.page_shift;
      // A box outside the cache arrives as zeros.
      entry = lane < BOXES && page < pages.count ? static_cast<int>(tw::page_at(p, pages, head, page)) : -1;
    }
  }
  TW_INLINE void issue(const Params& p, int tile, uint32_t to, uint32_t barrier) {
    if (tw::elect()) tw::barrier_expect(barrier, BLOCKS * KV_BLOCK);
    if constexpr (KEYS_LIE == IN_PAGES) {
      const int mask = (1 << p.page_shift) - 1;
      // A box too many, and the barrier would never complete. With more at once their addresses do not fit into uniform
      // registers, and moving them takes longer than the boxes.
      constexpr int AT_ONCE = BOXES % 2 == 0 ? 2 : 1;
      static_assert(BY_ROWS || (BOXES <= 32 && BOXES % AT_ONCE == 0), "");
#pragma unroll 1
      for (int first = 0; first < BOXES; first += AT_ONCE) {
        int page[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) page[j] = __shfl_sync(0xffffffffu, entry, first + j);
        if (tw::elect())
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j) {
            const int row = (first + j) * BOX;
            copy(to + row * 128, barrier, tile * BN + row & mask, page[j]);
          }
      }
    } else if (tw::elect()) {
      const int first = static_cast<int>(pages.first);
      if (KEYS_LIE == IN_ROWS) copy(to, barrier, first + tile * BN, 0);
      else copy(to, barrier, tile * BN, first);
    }
  }
  TW_INLINE void copy(uint32_t to, uint32_t barrier, int row, int page) const {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) tw::copy_box(to + block * KV_BLOCK, map, barrier, block * 64, row, head, page);
  }
};

TW_INLINE void load_queries(const Params& p, const Shared& shared, int lane) {
  int items = 1;  // 0 is the consumers' empty one, whose tile of Q is free at once
  for (int n = 0;; ++n) {
    const Slot& s = next_item<Wide>(shared, n);
    if (s.tokens < 0) return;
    if (s.begins) {
      const int buffer = items % Q_TILES;
      const uint32_t full = shared.barrier(Q_FULL + buffer);
      shared.trace(WAIT_STAGE);
      tw::barrier_wait(shared.barrier(Q_EMPTY + buffer), (items++ / Q_TILES & 1) ^ 1);
      shared.trace(LOAD);
      if (tw::elect()) {
        tw::barrier_expect(full, K_BLOCKS * TOKENS * G * 128);
#pragma unroll
        for (int block = 0; block < K_BLOCKS; ++block)
          tw::copy_box(shared.base + Q_AT + buffer * Q_BYTES + block * Q_BLOCK, &p.q_map, full, block * 64, s.head * G, s.token);
      }
    }
    release(shared.barrier(ITEM_EMPTY + (n & 1)), lane);
  }
}

template <class R>
TW_INLINE void load_keys(const Params& p, const Shared& shared, int lane) {
  int done = 0;
  for (int n = 0;; ++n) {
    const Slot& s = next_item<R>(shared, n);
    if (s.tokens < 0) return;
    const int tiles = s.partial + s.full;
    Loader<K_BLOCKS> loader;
    loader.start(s, &p.k_map);
    loader.look_up(p, tile_at(s, 0), lane);
    for (int i = 0; i < tiles; ++i, ++done) {
      const int stage = done % K_STAGES;
      shared.trace(WAIT_STAGE);
      tw::barrier_wait(shared.barrier(R::K_EMPTY + stage), (done / K_STAGES & 1) ^ 1);
      shared.trace(LOAD);
      loader.issue(p, tile_at(s, i), shared.base + K_AT + stage * K_BYTES, shared.barrier(R::K_FULL + stage));
      if (i + 1 < tiles) loader.look_up(p, tile_at(s, i + 1), lane);
    }
    release(shared.barrier(R::ITEM_EMPTY + (n & 1)), lane);
  }
}

// Whether no row of the item sees a key; `whole`: the key's tile is WHOLE, and no element is read.
TW_INLINE bool is_unseen(const Params& p, const Variant& variant, const Slot& s, int key, bool whole) {
  if (key >= s.length) return true;
  const int last = s.tokens * G - 1;
  const auto sees = [&](int row) {
    const At at = at_of(p, s, row, key);
    return variant.below(at) && (whole || variant.rest(at));
  };
  if (!SHARED && (sees(last) || sees(0))) return false;  // mostly; whose a row of shared keys is takes long to find
  tw::Tile tile = rows_and(s, key, key);
  if (READS) tile.request.hi = tile.request.lo + 1;  // no element of a tensor: they are of one request
  const int kind = whole ? variant.below_class(tile) : variant.tile_class(tile);
  if (kind != tw::PARTIAL) return kind == tw::EMPTY;
#pragma unroll 1
  for (int row = SHARED ? 0 : BY_HEAD ? 1 : G; SHARED ? row <= last : row < last; row += BY_HEAD ? 1 : G)
    if (sees(row)) return false;
  return true;
}

// The first tile of V's ring is zeros: the consumers' first step has a tile before it.
TW_INLINE void load_zeros(const Shared& shared, int part, int lane) {
  for (int i = part * 32 + lane; i < V_BYTES / 16; i += LOADERS * 32) reinterpret_cast<int4*>(shared.memory + V_AT)[i] = make_int4(0, 0, 0, 0);
  tw::fence_async();
  if (BY_ROWS) tw::barrier_arrive(shared.barrier(V_FULL));
  else release(shared.barrier(V_FULL), lane);
}

template <class R>
TW_INLINE void load_values(const Params& p, const Variant& variant, const Shared& shared, int lane) {
  int done = NARROW_ITEMS<R> ? 0 : 1;
  if (done) load_zeros(shared, 0, lane);
  uint32_t patched = 0;  // a bit for each stage: the parity of its tiles that were patched
  for (int n = 0;; ++n) {
    const Slot& s = next_item<R>(shared, n);
    if (s.tokens < 0) return;
    const int tiles = s.partial + s.full;
    Loader<V_BLOCKS> loader;
    loader.start(s, &p.v_map);
    loader.look_up(p, tile_at(s, 0), lane);
    for (int i = 0; i < tiles; ++i, ++done) {
      const int stage = done % V_STAGES, tile = tile_at(s, i);
      const uint32_t to = shared.base + V_AT + stage * V_BYTES;
      int unseen = 0;  // of keys lane, lane + 32, …, a bit each
      if (i < s.partial) {
#pragma unroll 1
        for (int j = 0; j < BN / 32; ++j) unseen |= is_unseen(p, variant, s, tile * BN + j * 32 + lane, s.tiles[i] & WHOLE) << j;
      }
      const bool patches = __any_sync(0xffffffffu, unseen != 0);
      shared.trace(WAIT_STAGE);
      tw::barrier_wait(shared.barrier(R::V_EMPTY + stage), (done / V_STAGES & 1) ^ 1);
      shared.trace(LOAD);
      loader.issue(p, tile, to, shared.barrier((patches ? R::V_LOADED : R::V_FULL) + stage));
      if (i + 1 < tiles) loader.look_up(p, tile_at(s, i + 1), lane);
      if (patches) {
        tw::barrier_wait(shared.barrier(R::V_LOADED + stage), patched >> stage & 1);
        patched ^= 1u << stage;
        char* rows = shared.memory + V_AT + stage * V_BYTES;
#pragma unroll 1
        for (int j = 0; j < BN / 32; ++j)
          if (unseen >> j & 1)
#pragma unroll 1
            for (int block = 0; block < V_BLOCKS; ++block)
#pragma unroll
              for (int c = 0; c < 8; ++c)
                *reinterpret_cast<uint4*>(rows + block * KV_BLOCK + (j * 32 + lane) * 128 + ((c + lane) & 7) * 16) = make_uint4(0, 0, 0, 0);
        tw::fence_async();
        release(shared.barrier(R::V_FULL + stage), lane);
      }
    }
    release(shared.barrier(R::ITEM_EMPTY + (n & 1)), lane);
  }
}

// Pages below 8 rows: TMA takes as long for a box of one row as for one of 64, so LOADERS warps copy rows by cp.async,
// four at a time, 8 lanes each; of a tile warp `part` copies the fours part, part + LOADERS, … A page has BOX rows, so
// each lane's rows have one place in their pages. Copies arrive at the tile's barrier by themselves, so the next tile's
// rows are requested while a tile's come. Rows that are no keys of the cache, and values that no row of the item sees,
// are zeros.
template <class R, bool VALUES>
TW_INLINE void load_rows(const Params& p, const Variant& variant, const Shared& shared, int part, int lane) {
  constexpr int DIM = VALUES ? DV : DK, STAGES = VALUES ? V_STAGES : K_STAGES, FULL = VALUES ? R::V_FULL : R::K_FULL, EMPTY = VALUES ? R::V_EMPTY : R::K_EMPTY;
  constexpr int FOURS = (BN / 4 + LOADERS - 1) / LOADERS, HELD = (FOURS + 7) / 8;
  const uint32_t page_bytes = static_cast<uint32_t>(2 * (VALUES ? p.v_page : p.k_page));
  const int chunk = lane % 8;
  // Of the first four that this warp copies; bit 2 of a row turns bit 2 of its chunks.
  const uint32_t start = shared.base + (VALUES ? V_AT : K_AT) + part * 512 + lane / 8 * 128 + ((chunk ^ lane / 8 ^ part % 2 * 4) << 4);
  int done = VALUES && !NARROW_ITEMS<R>;
  if (done) load_zeros(shared, part, lane);
  for (int n = 0;; ++n) {
    const Slot& s = next_item<R>(shared, n);
    if (s.tokens < 0) break;
    const int tiles = s.partial + s.full, head = s.head;
    const tw::Pages pages = s.pages();
    const int64_t row_in_page = lane / 8 % BOX;
    const char* from = reinterpret_cast<const char*>(VALUES ? p.v + head * p.v_head + row_in_page * p.v_slot : p.k + head * p.k_head + row_in_page * p.k_slot) + chunk * 16;
    int entry[HELD] = {};  // of row 4 · (part + LOADERS · (8 i + lane / 4)) + lane % 4 of a tile: not looked at before its turn
    bool exists[HELD] = {};
    const auto look_up = [&](int i) {
      const int tile = tile_at(s, i);
#pragma unroll
      for (int j = 0; j < HELD; ++j) {
        const int row = 4 * (part + LOADERS * (8 * j + lane / 4)) + lane % 4, key = tile * BN + row, number = key / BOX;
        exists[j] = row < BN && number < pages.count;
        if (VALUES && i < s.partial) exists[j] = exists[j] && !is_unseen(p, variant, s, key, s.tiles[i] & WHOLE);
        entry[j] = exists[j] ? static_cast<int>(tw::entry_at(p, pages, head, number)) : 0;
      }
    };
    for (int i = -1; i < tiles; ++i) {
      int page[HELD];  // the sign: zeros
#pragma unroll
      for (int j = 0; j < HELD; ++j) page[j] = exists[j] ? static_cast<int>(tw::cached_page(p, entry[j])) : 1 << 31;
      if (i + 1 < tiles) look_up(i + 1);  // while rows come
      if (i < 0) continue;
      const int stage = done % STAGES;
      shared.trace(WAIT_STAGE);
      tw::barrier_wait(shared.barrier(EMPTY + stage), (done / STAGES & 1) ^ 1);
      shared.trace(LOAD);
      const uint32_t even = start + stage * (VALUES ? V_BYTES : K_BYTES), odd = even ^ (LOADERS % 2 * 64);
#pragma unroll
      for (int j = 0; j < FOURS; ++j) {
        const int of = __shfl_sync(0xffffffffu, page[j / 8], j % 8 * 4 + lane / 8);
        const char* at = from + static_cast<uint64_t>(static_cast<uint32_t>(of & 0x7fffffff)) * page_bytes;
        if (BN / 4 % LOADERS == 0 || j < FOURS - 1 || part < BN / 4 % LOADERS)
#pragma unroll
          for (int block = 0; block < (DIM + 63) / 64; ++block)
            if (DIM % 64 == 0 || block * 64 + chunk * 8 < DIM)
              tw::copy_row_async((j % 2 ? odd : even) + j * LOADERS * 512 + block * KV_BLOCK, at + block * 128, of < 0 ? 0 : 16);
      }
      tw::copy_async_arrive(shared.barrier(FULL + stage));
      ++done;
    }
    release(shared.barrier(R::ITEM_EMPTY + (n & 1)), lane);
  }
  tw::copy_async_wait<0>();
}

}  // namespace attention
