// Attention of many query rows (prefill, append) by wgmma and TMA, sm_90a.
//
// Rows are packed: row r of an item is query r / G of it, head r % G of the KV head's group. An item is
// up to TOKENS queries of one request with one KV head, and all of its keys or a chunk of them: 64 rows for
// each of two or three consumer warpgroups (CONSUMERS). CTAs are persistent and draw items from a counter. Roles side by side:
//   scheduler (a warp)  draws an item and sorts its tiles of BN keys by the mask: those of which only a
//                       part is seen (partial), and those of which every row sees all (full); an item of
//                       more than MAX_TILES tiles goes on in several segments
//   loaders of K, loaders of V (LOADERS warps each), of Q: boxes by TMA into rings of tiles, or rows by cp.async
//                       where pages have fewer than 8. Rows of V that no row of the item sees are zeros
//                       (0 · NaN would reach the outputs), in partial tiles only
//   consumers           S = Q·Kᵀ, softmax, O += P·V, with P from registers. In the loop over full tiles
//                       P·V of the tile before runs behind S of a tile, and the exponentials hide it, as they
//                       hide the other warpgroup's products. Partial tiles come first, in a loop of their
//                       own, so that the loop over full tiles has no mask, and no branch between issue and wait.
//   Of an item in chunks each consumer warp leaves its 16 rows as a partial result; the last warp to come
//   merges them in the order of the chunks.
//
// Where requests share keys (LEVELS > 1) it does the shared nodes that a plan gives it, in front of a decode kernel:
// an item is a block of rows of all requests of a node, with a KV head and a chunk of the keys of the node. Nobody
// merges: the rows of each item are left as states, which the decode kernel adds to the requests' own
// (shared_items.cuh). That one may start as soon as this one has found the kernels before it ended. Rows of a tile are of
// several requests, and finding whose one is takes dependent reads, so that these are masks of an upper limit alone, of
// which a partial tile asks each row, and logits that are DIRECT and do not lean.
//
// In front of this file: gpu.cuh, mma.cuh, async.cuh, hopper.cuh, bounds.h, table.h, variant.h, the constants of
// `attention` (DK and DV: elements of a row of K and of V; G query heads of a KV head, BN keys of a tile,
// BOX keys of a TMA box, CONSUMERS, KEYS_LIE, DIRECT, BENDS, LEANS, TRAILS, RESTS, READS, BY_HEAD, CHUNKED, NARROW, Q_TILES, K_STAGES, V_STAGES, MAX_TILES, MAX_KEYS,
// MOST_QUERIES of a request that shares keys,
// the types Kind and Out), the structs `Params`, `Item`, `At` and `Variant`, the barrier id BARRIER, behind which two more are used.
// DIRECT: logits need no branch: the score itself or, where it BENDS, outer · tanh(score / inner); where it LEANS,
// plus slope · distance, which grows by 1 from key to key (all by methods of `Variant`). Others are computed as
// the mask is, on every tile, with nothing under way.
// EXTREMES: the mask compares elements of KEY_ARRAY, a member of `Variant` with one for each key.
// The mask has key <= limit of a row and, where it TRAILS, newest − key < width, both in `below`; the others, where it RESTS on more, are in `rest`, all methods too. READS: the mask reads tensors; BY_HEAD: the number of a head.
// KEYS_LIE: the keys of a request are IN_PAGES of a table, IN_ROWS one after the other, or IN_ONE page.
//
// Units: `ctas` of the parameters, at most min(items, SMs), all at once; SMEM_BYTES of dynamic shared memory:
//   [Q_TILES of Q, BM rows] [K_STAGES of K] [V_STAGES of V, BN rows]  tiles of blocks of 128-byte rows, swizzled
//   [128 bytes for each row of outputs, where Q_TILES is 1] [2 slots of a segment] [mbarriers]
//   [extremes of the tiles of KEY_ARRAY]
// With more than one tile of Q the outputs of an item pass through its own, where Out has 16 bits.
// Assumes: sm_scale > 0; rows of Q, K, V described by tensor maps; counters are 0 (and are 0 again at the end).

namespace attention {

constexpr int BM = CONSUMERS * 64;    // rows of an item
constexpr int TOKENS = BM / G;        // queries of an item
constexpr bool SHARED = table::LEVELS > 1;
constexpr bool BY_ROWS = BOX < 8;     // K and V come by cp.async, not by TMA
constexpr int LOADERS = BY_ROWS && CONSUMERS == 2 && DV <= 128 ? 3 : 1;  // warps that load K; as many load V
constexpr int LOADER_GROUPS = (2 * LOADERS + 2) / 4;  // warpgroups of the scheduler and the loaders
constexpr int WARPGROUPS = LOADER_GROUPS + CONSUMERS, THREADS = WARPGROUPS * 128;
constexpr int LOADER_REGISTERS = BY_ROWS ? 64 : DV > 128 ? 40 : 56;  // of the 504 or 512 that the warpgroups share
constexpr int CONSUMER_REGISTERS = (65536 / THREADS / 8 * 8 * WARPGROUPS - LOADER_GROUPS * LOADER_REGISTERS) / CONSUMERS / 8 * 8;
constexpr int K_BLOCKS = (DK + 63) / 64, V_BLOCKS = (DV + 63) / 64;  // blocks of 64 columns
constexpr int Q_BLOCK = BM * 128, KV_BLOCK = BN * 128;         // bytes of a block
constexpr int Q_BYTES = K_BLOCKS * Q_BLOCK, K_BYTES = K_BLOCKS * KV_BLOCK, V_BYTES = V_BLOCKS * KV_BLOCK;
constexpr int BOXES = BN / BOX;       // of a tile
constexpr bool STAGED = sizeof(Out) == 2 && Q_TILES > 1;      // outputs pass through the item's tile of Q
constexpr float LOG2E = 1.4426950408889634f, SLACK = 8.0f;
static_assert(DK % 16 == 0 && DV <= DK && BN % BOX == 0 && BN % 32 == 0 && G <= 64, "");

struct Work {  // of an item: what positions, masks and outputs need
  int request, head, token, tokens;  // token: row of q; tokens < 0: no more items
  int first, length, queries;        // position of the first query; keys and queries of the request
  int base, stride;                  // key t has position base + stride · t
  int chunk, chunks, slot, counter;
  TW_INLINE int position(int key) const {
    if constexpr (!table::KEY_POSITIONS && !SHARED) return key;
    return static_cast<int>(static_cast<uint32_t>(base) + static_cast<uint32_t>(stride) * static_cast<uint32_t>(key));
  }
  TW_INLINE int number(int key) const { return SHARED ? base + key : key; }  // among all keys of its requests
};
struct Slot : Work {       // a segment of an item, as the scheduler passes it on
  int begins, ends;        // whether it is the item's first segment, its last
  int partial, full;       // numbers of tiles
  int padding;
  int64_t first_page, page_count;
  TW_INLINE tw::Pages pages() const { return tw::Pages{first_page, page_count, length, base, stride}; }
  int tiles[MAX_TILES];    // partial tiles from the front, full tiles from the back
};
constexpr int WHOLE = 1 << 30;  // on a partial tile of which `rest` holds everywhere

constexpr int Q_AT = 0, K_AT = Q_TILES * Q_BYTES, V_AT = K_AT + K_STAGES * K_BYTES, STAGE_AT = V_AT + V_STAGES * V_BYTES;
constexpr int SLOTS_AT = STAGE_AT + (Q_TILES == 1 ? BM * 128 : 0);
constexpr int BARRIERS_AT = SLOTS_AT + 2 * sizeof(Slot);
enum Barrier { K_FULL, K_EMPTY = K_FULL + K_STAGES, V_FULL = K_EMPTY + K_STAGES, V_EMPTY = V_FULL + V_STAGES, V_LOADED = V_EMPTY + V_STAGES,
               Q_FULL = V_LOADED + V_STAGES, Q_EMPTY = Q_FULL + Q_TILES, ITEM_FULL = Q_EMPTY + Q_TILES, ITEM_EMPTY = ITEM_FULL + 2, BARRIERS = ITEM_EMPTY + 2 };
// The barriers of the pipeline, as its scheduler and its loaders see them.
struct Wide {
  enum : int { K_FULL = attention::K_FULL, K_EMPTY = attention::K_EMPTY, V_FULL = attention::V_FULL, V_EMPTY = attention::V_EMPTY, V_LOADED = attention::V_LOADED,
               Q_FULL = attention::Q_FULL, Q_EMPTY = attention::Q_EMPTY, ITEM_FULL = attention::ITEM_FULL, ITEM_EMPTY = attention::ITEM_EMPTY, END = attention::BARRIERS };
};
// The same of narrow items (hopper_narrow.cuh), in the same rings. Where tiles of Q are lie their queries, up to 8 rows of
// two items, and outputs, maxima and sums of four warps, where an item ends.
struct Narrow {
  enum : int { FIRST = attention::BARRIERS, K_FULL = FIRST + Wide::K_FULL, K_EMPTY = FIRST + Wide::K_EMPTY, V_FULL = FIRST + Wide::V_FULL, V_EMPTY = FIRST + Wide::V_EMPTY,
               V_LOADED = FIRST + Wide::V_LOADED, Q_FULL = FIRST + Wide::Q_FULL, Q_EMPTY = FIRST + Wide::Q_EMPTY, ITEM_FULL = FIRST + Wide::ITEM_FULL,
               ITEM_EMPTY = FIRST + Wide::ITEM_EMPTY, END = FIRST + Wide::END };
  static constexpr int PITCH = DV + 4;  // floats of a row of outputs
  static constexpr int Q_AT = attention::Q_AT, O_AT = Q_AT + 2 * K_BLOCKS * 1024, SUMS_AT = O_AT + 4 * 8 * PITCH * 4, BYTES = SUMS_AT + 4 * 8 * 8;
  static_assert(!NARROW || (BYTES <= K_AT && BN == 128 && CONSUMERS == 2), "");
};
template <class R> constexpr bool NARROW_ITEMS = R::K_FULL > 0;
constexpr int EXTREMES_AT = BARRIERS_AT + (NARROW ? int(Narrow::END) : BARRIERS) * 8;
constexpr int SMEM_BYTES = EXTREMES_AT + EXTREMES * MAX_TILES * 8 + 1024;  // the base is aligned to 1024 by hand
static_assert(SMEM_BYTES <= 232448 && sizeof(Slot) % 8 == 0, "");

// What a warp does from here on, as its line of a trace shows it. `bench prefill --trace` compiles with TW_TRACE;
// otherwise this is nothing. A trace is of CTA 0: TW_TRACE pairs (cycle, state) for each warp, the warps one after
// the other, at the address TW_TRACE_AT.
enum State { WAIT_ITEM, SORT_TILES, WAIT_STAGE, LOAD, WAIT_TILE, ISSUE, WAIT_SCORES, MASK, MAXIMA, WEIGHTS, WAIT_OUTPUTS, WEIGHTS_AND_PACK, WRITE, END };
#ifdef TW_TRACE
struct Trace {
  mutable int2* next = nullptr;
  int2* end = nullptr;
  TW_INLINE Trace(int cta, int warp, int lane) {
    if (cta != 0 || lane != 0) return;
    next = reinterpret_cast<int2*>(TW_TRACE_AT) + warp * TW_TRACE;
    end = next + TW_TRACE;
  }
  TW_INLINE void operator()(State state) const {
    asm volatile("{ .reg .pred p; .reg .b32 t; setp.lt.u64 p, %0, %1; mov.u32 t, %%clock; @p st.global.v2.b32 [%0], {t, %2}; }"
                 ::"l"(next), "l"(end), "r"(static_cast<int>(state)) : "memory");
    ++next;
  }
};
#else
struct Trace {
  TW_INLINE Trace(int, int, int) {}
  TW_INLINE void operator()(State) const {}
};
#endif

struct Shared {  // of a CTA, as one of its warps has it
  char* memory;
  uint32_t base;
  int cta;
  Trace trace;
  TW_INLINE uint32_t barrier(int n) const { return base + BARRIERS_AT + n * 8; }
  TW_INLINE Slot& slot(int n) const { return reinterpret_cast<Slot*>(memory + SLOTS_AT)[n & 1]; }
};

TW_INLINE float lowest() { return __uint_as_float(0xff800000u); }
TW_INLINE int entry_at(const Slot& s, int i) { return i < s.partial ? s.tiles[i] : s.tiles[MAX_TILES - 1 - (i - s.partial)]; }
TW_INLINE int tile_at(const Slot& s, int i) { return entry_at(s, i) & ~WHOLE; }
TW_INLINE tw::Tile rows_and(const Work& w, int from, int to) {  // rows of an item and keys from … to
  if constexpr (SHARED) {
    const tw::Bound any{0, MAX_KEYS};
    return tw::Tile{tw::Bound{w.first, MAX_KEYS}, tw::Bound{w.position(from), w.position(to)}, tw::Bound{w.head * G, w.head * G + G - 1},
                    tw::bound(w.head), any, tw::Bound{w.number(from), w.number(to)}, any, any};
  }
  return tw::Tile{tw::Bound{w.first, w.first + w.tokens - 1}, tw::Bound{w.position(from), w.position(to)}, tw::Bound{w.head * G, w.head * G + G - 1},
                  tw::bound(w.head), tw::bound(w.request), tw::Bound{from, to}, tw::bound(w.queries), tw::bound(w.length)};
}
TW_INLINE At at_of(const Params& p, const Work& w, int row, int key) {
  if constexpr (SHARED) {
    const int token = w.token + max(min(row / G, w.tokens - 1), 0);
    const tw::Row own = tw::row_of(p, w.request, token, MAX_KEYS);
    return At{own.position, w.position(key), w.head * G + row % G, w.head, own.request, token, w.number(key), own.qo_len, own.kv_len};
  }
  return At{w.first + row / G, w.position(key), w.head * G + row % G, w.head, w.request, w.token + row / G, key, w.queries, w.length};
}

// Waits for item n and gives it; `release` when this warp has read what it needs.
template <class R>
TW_INLINE const Slot& next_item(const Shared& shared, int n) {
  shared.trace(WAIT_ITEM);
  tw::barrier_wait(shared.barrier(R::ITEM_FULL + (n & 1)), n >> 1 & 1);
  return shared.slot(n);
}
TW_INLINE void release(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) tw::barrier_arrive(barrier);
}

}  // namespace attention

#include "hopper_load.cuh"
#include "hopper_consume.cuh"
#include "hopper_narrow.cuh"

namespace attention {

// Who arrives: the loaders or the scheduler, the consumer warps, all who read an item.
template <class R>
TW_INLINE void init_barriers(const Shared& shared) {
  for (int i = R::K_FULL; i < R::END; ++i) {
    const bool frees = (i >= R::K_EMPTY && i < R::V_FULL) || (i >= R::V_EMPTY && i < R::V_LOADED) || (i >= R::Q_EMPTY && i < R::ITEM_FULL);
    const bool loaded = i < R::K_EMPTY || (i >= R::V_FULL && i < R::V_EMPTY);
    tw::barrier_init(shared.barrier(i), i >= R::ITEM_EMPTY ? 4 * CONSUMERS + 2 * LOADERS + 1 : frees ? 4 * CONSUMERS : loaded ? (BY_ROWS ? 32 : 1) * LOADERS : 1);
  }
}

// Of the scheduler and the loaders of K and V what this warp is; the loader of Q is none of these.
template <class R>
TW_INLINE void provide(const Params& p, const Variant& variant, const Shared& shared, int items, int warp, int lane) {
  if (warp == 0) schedule<R>(p, variant, shared, items, lane);
  else if (BY_ROWS && warp <= LOADERS) load_rows<R, false>(p, variant, shared, warp - 1, lane);
  else if (BY_ROWS) load_rows<R, true>(p, variant, shared, warp - 1 - LOADERS, lane);
  else if (warp <= LOADERS) load_keys<R>(p, shared, lane);
  else load_values<R>(p, variant, shared, lane);
}

// What was written where tiles of Q are comes before TMA writes there.
TW_INLINE void end_narrow() {
  tw::fence_async();
  tw::bar_sync(NARROW_END, THREADS);
}

TW_INLINE void run(const Params& p, int64_t unit, int thread, char* smem) {
#ifdef TW_CYCLES
  const int64_t began = clock64();
#endif
  const uint32_t start = tw::shared_address(smem), base = (start + 1023) & ~1023u;
  const int cta = static_cast<int>(unit), warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = thread % 32, group = warp / 4;
  const Shared shared{smem + (base - start), base, cta, Trace(cta, warp, lane)};
  if (thread == 0) {
    init_barriers<Wide>(shared);
    if constexpr (NARROW) init_barriers<Narrow>(shared);
    tw::barrier_init_done();
  }
  const int items = SHARED ? tw::node_at(p, tw::own_node(p, 0)).item : 0;
  tw::bar_sync(BARRIER, THREADS);
  if (SHARED && cta >= items) return;  // the launch behind takes this SM
  const Variant variant(p);
  const bool narrow = NARROW && cta < p.narrow_ctas;  // this CTA works on narrow items first
  if (group < LOADER_GROUPS) {
    tw::fewer_registers<LOADER_REGISTERS>();
    if (lane == 0) tw::prefetch_map(warp == 0 ? &p.o_map : warp > 2 * LOADERS ? &p.q_map : warp <= LOADERS ? &p.k_map : &p.v_map);
    if constexpr (NARROW)
      if (narrow) {
        if (warp > 2 * LOADERS) load_few_queries(p, shared, lane);
        else provide<Narrow>(p, variant, shared, p.narrow_count, warp, lane);
        end_narrow();
      }
    if (warp > 2 * LOADERS) load_queries(p, shared, lane);
    else provide<Wide>(p, variant, shared, SHARED ? items : p.item_count, warp, lane);
  } else {
    tw::more_registers<CONSUMER_REGISTERS>();
    if constexpr (NARROW)
      if (narrow) {
        consume_narrow(p, variant, shared, warp - LOADER_GROUPS * 4, lane);
        end_narrow();
      }
    consume(p, variant, shared, group - LOADER_GROUPS, warp % 4, lane);
  }
  shared.trace(END);
#ifdef TW_CYCLES
  if (thread == LOADER_GROUPS * 128) p.cycles[cta] = clock64() - began;
#endif
}

}  // namespace attention
