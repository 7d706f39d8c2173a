// Stands for hopper.cuh behind warps.h: mbarriers and TMA on fibers. Addresses of shared memory are offsets in it. A box,
// and a thread's copies that tell a barrier of their end, arrive when they are issued or later, while some thread waits. wgmma does nothing: for kernels' parts without it.
#include <algorithm>

using std::max;
using std::min;

struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline void __threadfence() {}
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
template <class T>
inline T reduced(T x, T (*f)(T, T)) {
  T all[32];
  simulated::collective(x, all);
  for (T one : all) x = f(x, one);
  return x;
}
inline int __reduce_min_sync(uint32_t, int x) { return reduced<int>(x, [](int a, int b) { return min(a, b); }); }
inline uint32_t __reduce_or_sync(uint32_t, uint32_t x) { return reduced<uint32_t>(x, [](uint32_t a, uint32_t b) { return a | b; }); }
inline uint32_t __reduce_and_sync(uint32_t, uint32_t x) { return reduced<uint32_t>(x, [](uint32_t a, uint32_t b) { return a & b; }); }

namespace simulated {

struct Mbarrier { int16_t count, pending; int32_t phase : 1, bytes : 31; };
static_assert(sizeof(Mbarrier) == 8, "");
inline Mbarrier& mbarrier(uint32_t at) { return *reinterpret_cast<Mbarrier*>(smem + at); }
inline void settle(Mbarrier& b) {
  if (b.pending < 0) { fprintf(stderr, "more arrive at a barrier than it expects\n"); abort(); }
  if (b.pending || b.bytes) return;
  b.phase = ~b.phase;
  b.pending = b.count;
}
struct Map { uint64_t base; int64_t shape[4], stride[4], box[4]; };  // as test_hopper_simulated.py writes it
struct Box { uint32_t to; const Map* map; uint32_t barrier; int at[4]; };
Box boxes[4096];  // under way
int box_count;
inline void perform(const Box& b) {
  const Map& m = *b.map;
  uint32_t line = b.to;
  for (int64_t page = 0; page < m.box[3]; ++page)
    for (int64_t head = 0; head < m.box[2]; ++head)
      for (int64_t row = 0; row < m.box[1]; ++row, line += 128)
        for (int64_t column = 0; column < m.box[0]; ++column) {
          const int64_t at[4] = {b.at[0] + column, b.at[1] + row, b.at[2] + head, b.at[3] + page};
          bool exists = true;
          int64_t from = 0;
          for (int i = 0; i < 4; ++i) exists &= at[i] >= 0 && at[i] < m.shape[i], from += at[i] * m.stride[i];
          const int chunk = static_cast<int>(column / 8) ^ (line >> 7 & 7);
          reinterpret_cast<uint16_t*>(smem + line)[chunk * 8 + column % 8] = exists ? reinterpret_cast<const uint16_t*>(m.base)[from] : 0;
        }
  Mbarrier& full = mbarrier(b.barrier);
  full.bytes = full.bytes - static_cast<int>(128 * m.box[1] * m.box[2] * m.box[3]);
  settle(full);
}
struct Rows { Fiber* fiber; int end; uint32_t barrier; };  // of a thread, its copies in front of `end`
Rows rows[4096];  // under way
int rows_count;
inline void perform(const Rows& r) {
  Fiber& f = *r.fiber;
  for (; f.copy_begin < r.end; ++f.copy_begin) perform(f.copies[f.copy_begin % 4096]);
  --mbarrier(r.barrier).pending;
  settle(mbarrier(r.barrier));
}
template <class T>
inline void arrive_one(T (&all)[4096], int& count) {
  if (!count) return;
  T& drawn = all[random32() % static_cast<unsigned>(count)];
  const T one = drawn;
  drawn = all[--count];
  perform(one);
}
inline void arrive_some() {
  if (random32() % 4) return;
  arrive_one(boxes, box_count);
  for (int i = 0; i < 8; ++i) arrive_one(rows, rows_count);
}

}  // namespace simulated

namespace tw {

inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const char*>(p) - simulated::smem); }
inline void load_matrices(uint32_t (&v)[4], uint32_t at) { load_matrices(v, static_cast<const void*>(simulated::smem + at)); }
inline void load_matrices_transposed(uint32_t (&v)[4], uint32_t at) { load_matrices_transposed(v, static_cast<const void*>(simulated::smem + at)); }
inline bool elect() { __syncwarp(); return simulated::current % 32 == 0; }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float log2_fast(float x) { return log2f(x); }
inline float tanh_fast(float x) { return tanhf(x); }
inline uint32_t load_word_if(bool c, const void* at) { return c ? *static_cast<const uint32_t*>(at) : 0; }

inline void barrier_init(uint32_t barrier, int arrivals) {
  simulated::Mbarrier& b = simulated::mbarrier(barrier);
  b.count = b.pending = static_cast<int16_t>(arrivals);
  b.phase = b.bytes = 0;
}
inline void barrier_init_done() {}
inline void barrier_arrive(uint32_t barrier) {
  --simulated::mbarrier(barrier).pending;
  simulated::settle(simulated::mbarrier(barrier));
}
inline void barrier_expect(uint32_t barrier, int bytes) {
  simulated::mbarrier(barrier).bytes = simulated::mbarrier(barrier).bytes + bytes;
  barrier_arrive(barrier);
}
inline void barrier_arrive_after(uint32_t barrier, bool arrives, float) { if (arrives) barrier_arrive(barrier); }
inline bool barrier_test(uint32_t barrier, uint32_t parity) { return (simulated::mbarrier(barrier).phase & 1) != static_cast<int>(parity); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_test(barrier, parity)) {
    simulated::arrive_some();
    simulated::yield();
  }
}
inline void prefetch_map(const void*) {}
inline void copy_box(uint32_t to, const void* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  if (simulated::box_count == 4096) abort();
  simulated::boxes[simulated::box_count++] = {to, static_cast<const simulated::Map*>(map), barrier, {c0, c1, c2, c3}};
  simulated::arrive_some();
}
inline void copy_box(uint32_t to, const void* map, uint32_t barrier, int c0, int c1, int c2) { copy_box(to, map, barrier, c0, c1, c2, 0); }
inline void store_box(const void*, uint32_t, int, int, int) {}
inline void stores_read() {}
inline void fence_async() {}
inline void copy_row_async(uint32_t to, const void* from, int bytes) { copy_async_16(simulated::smem + to, from, bytes); }
inline void copy_async_arrive(uint32_t barrier) {
  simulated::Fiber& f = simulated::fibers[simulated::current];
  copy_async_commit();
  if (simulated::rows_count == 4096) abort();
  simulated::rows[simulated::rows_count++] = {&f, static_cast<int>(f.copy_end), barrier};
  simulated::arrive_some();
}
template <int> inline void more_registers() {}
template <int> inline void fewer_registers() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int> inline void wgmma_wait() {}
template <class T, int N> inline void tie(T (&)[N]) {}
inline uint64_t wgmma_descriptor(uint32_t, int, int) { return 0; }
template <class Kind, int N, bool Adds, bool Turned>
struct wgmma {
  template <class A> static void of(float (&)[N / 2], A, uint64_t, bool = true) {}
};
inline void store_matrices(uint32_t, uint32_t, uint32_t, uint32_t, uint32_t) {}

}  // namespace tw
