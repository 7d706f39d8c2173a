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
// In front of this file: gpu.cuh, mma.cuh, hopper.cuh, bounds.h, table.h, variant.h, the constants of `attention`
// (D head_dim 64 or 128, G query heads of a KV head, BOX keys of a TMA box, KEYS_LIE, TRIVIAL_LOGITS,
// K_STAGES, V_STAGES, MAX_TILES, MAX_KEYS, the types Kind and Out), the structs `Params`, `Item`, `At` and `Variant`.
// KEYS_LIE: the keys of a request are IN_PAGES of a table, IN_ROWS one after the other, or IN_ONE page.
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
constexpr float LOG2E = 1.4426950408889634f, SLACK = 8.0f;
constexpr int PING = 2;  // named barriers 2, 3: warpgroup 0, 1 may issue; 4, 5: of one warpgroup
static_assert(D % 64 == 0 && D <= 128 && BN % BOX == 0 && G <= 64, "");

struct Slot {  // a segment of an item, as the scheduler passes it on
  int request, head, token, tokens;  // token: row of q; tokens < 0: no more items
  int first, length;                 // position of the first query; keys of the request
  int queries, padding;              // of the request
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
TW_INLINE tw::Tile rows_and(const Slot& s, tw::Bound key) {  // a key has its own number as its position
  return tw::Tile{tw::Bound{s.first, s.first + s.tokens - 1}, key, tw::Bound{s.head * G, s.head * G + G - 1}, tw::bound(s.head),
                  tw::bound(s.request), key, tw::bound(s.queries), tw::bound(s.length)};
}
TW_INLINE At at_of(const Slot& s, int row, int key) {
  return At{s.first + row / G, key, s.head * G + row % G, s.head, s.request, s.token + row / G, key, s.queries, s.length};
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

}  // namespace attention

#include "hopper_load.cuh"
#include "hopper_consume.cuh"

namespace attention {

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
