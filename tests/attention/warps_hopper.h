// Stands for hopper.cuh behind warps.h: mbarriers, TMA and wgmma on fibers. Addresses of shared memory are offsets in it.
// A box, and a thread's copies that tell a barrier of their end, arrive when they are issued or later, while some thread
// waits. Products are computed when they are issued; their sums are NaN until they are waited for.
using tw::max;
using tw::min;

struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
template <class T>
inline T reduced(T x, T (*f)(T, T)) {
  T all[32];
  simulated::collective(simulated::VOTE, x, all);
  for (T one : all) x = f(x, one);
  return x;
}
inline int __reduce_min_sync(uint32_t, int x) { return reduced<int>(x, [](int a, int b) { return min(a, b); }); }
inline uint32_t __reduce_or_sync(uint32_t, uint32_t x) { return reduced<uint32_t>(x, [](uint32_t a, uint32_t b) { return a | b; }); }
inline uint32_t __reduce_and_sync(uint32_t, uint32_t x) { return reduced<uint32_t>(x, [](uint32_t a, uint32_t b) { return a & b; }); }

namespace simulated {

struct Mbarrier { int16_t count, pending; int32_t phase : 1, bytes : 31; };
static_assert(sizeof(Mbarrier) == 8, "");
// What else belongs to one: the clocks of the arrivals of this phase and of all before it, and how many there were.
struct Arrivals { uint32_t at; int32_t *now, *done, phases; };
Arrivals arrivals[MBARRIERS];
int arrivals_count;
HERE Mbarrier& mbarrier(uint32_t at) { return *reinterpret_cast<Mbarrier*>(smem + at); }
UNWATCHED int number_of(uint32_t at) {
  for (int n = 0; n < arrivals_count; ++n)
    if (arrivals[n].at == at) return n;
  stop("an mbarrier that nobody has initialised");
  return 0;
}
UNWATCHED void settle(uint32_t at) {
  Mbarrier& b = mbarrier(at);
  if (b.pending < 0) stop("more arrive at a barrier than it expects");
  if (b.pending || b.bytes) return;
  b.phase = ~b.phase;
  b.pending = b.count;
  Arrivals& a = arrivals[number_of(at)];
  join(a.done, a.now);
  memset(a.now, 0, 8l * length);
  ++a.phases;
  ++moves;
}
// An operation on an mbarrier by the thread that runs.
UNWATCHED Arrivals& touch(uint32_t at) {
  access(UPDATE, smem + at, 8);
  return arrivals[number_of(at)];
}
struct Map { uint64_t base; int64_t shape[4], stride[4], box[4]; };  // as test_hopper_simulated.py writes it
struct Box { uint32_t to; const Map* map; uint32_t barrier; int at[4], phase; };
Box boxes[4096];  // under way
int box_count;
// use(element in global memory or nullptr, its place in shared memory), of each element of a box
template <class Use>
HERE void each_element(const Map& m, const int (&from)[4], uint32_t line, Use use) {
  for (int64_t page = 0; page < m.box[3]; ++page)
    for (int64_t head = 0; head < m.box[2]; ++head)
      for (int64_t row = 0; row < m.box[1]; ++row, line += 128)
        for (int64_t column = 0; column < m.box[0]; ++column) {
          const int64_t at[4] = {from[0] + column, from[1] + row, from[2] + head, from[3] + page};
          bool exists = true;
          int64_t element = 0;
          for (int i = 0; i < 4; ++i) exists &= at[i] >= 0 && at[i] < m.shape[i], element += at[i] * m.stride[i];
          const int chunk = static_cast<int>(column / 8) ^ (line >> 7 & 7);
          use(exists ? reinterpret_cast<uint16_t*>(m.base) + element : nullptr, reinterpret_cast<uint16_t*>(smem + line) + chunk * 8 + column % 8);
        }
}
UNWATCHED void perform(const Box& b) {
  const Map& m = *b.map;
  each_element(m, b.at, b.to, [](const uint16_t* from, uint16_t* to) __attribute__((no_sanitize("thread"))) { *to = from ? *from : 0; });
  Mbarrier& full = mbarrier(b.barrier);
  full.bytes = full.bytes - static_cast<int>(128 * m.box[1] * m.box[2] * m.box[3]);
  const int n = number_of(b.barrier);
  int32_t& known = arrivals[n].now[boxes_of(n)];
  known = max(known, b.phase);
  settle(b.barrier);
}
struct Rows { Fiber* fiber; int end, group; uint32_t barrier; };  // of a thread, its copies in front of `end`
Rows rows[4096];  // under way
int rows_count;
UNWATCHED void perform(const Rows& r) {
  Fiber& f = *r.fiber;
  for (; f.copy_begin < r.end; ++f.copy_begin) perform(f.copies[f.copy_begin % 4096]);
  int32_t& known = arrivals[number_of(r.barrier)].now[copies_of(static_cast<int>(r.fiber - fibers))];
  known = max(known, r.group);
  --mbarrier(r.barrier).pending;
  settle(r.barrier);
}
template <class T>
UNWATCHED void arrive_one(T (&all)[4096], int& count) {
  if (!count) return;
  T& drawn = all[random32() % static_cast<unsigned>(count)];
  const T one = drawn;
  drawn = all[--count];
  ++moves;
  perform(one);
}
UNWATCHED void arrive_some() {
  if (random32() % lateness) return;
  arrive_one(boxes, box_count);
  for (int i = 0; i < 8; ++i) arrive_one(rows, rows_count);
}

}  // namespace simulated

namespace tw {

HERE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const char*>(p) - simulated::smem); }
inline void load_matrices(uint32_t (&v)[4], uint32_t at) { load_matrices(v, static_cast<const void*>(simulated::smem + at)); }
inline void load_matrices_transposed(uint32_t (&v)[4], uint32_t at) { load_matrices_transposed(v, static_cast<const void*>(simulated::smem + at)); }
inline bool elect() {
  int all[32];
  simulated::collective(simulated::ELECT, 0, all);
  return simulated::current % 32 == 0;
}
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float log2_fast(float x) { return log2f(x); }
inline float tanh_fast(float x) { return tanhf(x); }
inline uint32_t load_word_if(bool c, const void* at) { return c ? *static_cast<const uint32_t*>(at) : 0; }

UNWATCHED void barrier_init(uint32_t barrier, int count) {
  using namespace simulated;
  access(WRITE, smem + barrier, 8);
  Mbarrier& b = mbarrier(barrier);
  b.count = b.pending = static_cast<int16_t>(count);
  b.phase = b.bytes = 0;
  for (int n = 0; n < arrivals_count; ++n)
    if (arrivals[n].at == barrier) return;
  if (arrivals_count == MBARRIERS) abort();
  arrivals[arrivals_count++] = {barrier, new_clock(), new_clock(), 0};
}
UNWATCHED void fence_async() { simulated::fence_of_proxies(); }
UNWATCHED void barrier_init_done() { simulated::fence_of_proxies(); }
UNWATCHED void barrier_arrive(uint32_t barrier) {
  simulated::release(simulated::touch(barrier).now);
  --simulated::mbarrier(barrier).pending;
  simulated::settle(barrier);
}
UNWATCHED void barrier_expect(uint32_t barrier, int bytes) {
  simulated::touch(barrier);
  simulated::mbarrier(barrier).bytes = simulated::mbarrier(barrier).bytes + bytes;
  barrier_arrive(barrier);
}
inline void barrier_arrive_after(uint32_t barrier, bool arrives, float) { if (arrives) barrier_arrive(barrier); }
UNWATCHED bool barrier_test(uint32_t barrier, uint32_t parity) {
  const simulated::Arrivals& a = simulated::touch(barrier);
  if ((simulated::mbarrier(barrier).phase & 1) == static_cast<int>(parity)) return false;
  simulated::acquire(a.done);
  return true;
}
UNWATCHED void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_test(barrier, parity)) {
    simulated::arrive_some();
    simulated::yield();
  }
}
inline void prefetch_map(const void*) {}
UNWATCHED void copy_box(uint32_t to, const void* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  using namespace simulated;
  if (box_count == 4096) abort();
  const Map& m = *static_cast<const Map*>(map);
  const int n = number_of(barrier), phase = arrivals[n].phases + 1;
  access(UPDATE, smem + barrier, 8, boxes_of(n), phase, clock_of(current));
  access(WRITE, smem + to, 128 * m.box[1] * m.box[2] * m.box[3], boxes_of(n), phase, clock_of(current));
  boxes[box_count++] = {to, &m, barrier, {c0, c1, c2, c3}, phase};
  arrive_some();
}
inline void copy_box(uint32_t to, const void* map, uint32_t barrier, int c0, int c1, int c2) { copy_box(to, map, barrier, c0, c1, c2, 0); }
UNWATCHED void copy_row_async(uint32_t to, const void* from, int bytes) { copy_async_16(simulated::smem + to, from, bytes); }
UNWATCHED void copy_async_arrive(uint32_t barrier) {
  using namespace simulated;
  Fiber& f = fibers[current];
  touch(barrier);
  copy_async_commit();
  if (rows_count == 4096) abort();
  rows[rows_count++] = {&f, static_cast<int>(f.copy_end), f.group, barrier};
  arrive_some();
}
template <int> inline void more_registers() {}
template <int> inline void fewer_registers() {}

}  // namespace tw

// -- products of warpgroups, boxes that are stored ---------------------------------------------------
namespace simulated {

// The sums of a product under way, of one thread: where they go, what they will be, and the group that they end with.
struct Sums { float* to; int count, group; float values[128]; };
struct Products {
  Sums sums[4];
  int count, group;      // of sums; groups so far
  bool fenced;           // registers that the thread wrote may be read
  int stores, stored;    // boxes that the thread has stored, those that it has waited for
};
Products products[MOST_THREADS];

UNWATCHED void start_hopper() {
  box_count = rows_count = 0;
  for (; arrivals_count; --arrivals_count) free(arrivals[arrivals_count - 1].now), free(arrivals[arrivals_count - 1].done);
  for (int t = 0; t < threads; ++t) products[t].count = products[t].group = products[t].stores = products[t].stored = products[t].fenced = 0;
}
UNWATCHED void end_hopper() {
  const Products& p = products[current];
  if (p.stored < p.stores) stop("a thread ends while its boxes are read from shared memory");
  if (p.count) stop("a thread ends with products that nobody waits for");
}
HERE float element(uint64_t descriptor, int row, int k, bool turned, bool bfloat16) {
  const uint32_t start = (descriptor & 0x3fff) << 4, columns64 = (descriptor >> 16 & 0x3fff) << 4, rows8 = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t line = turned ? k : row, column = turned ? row : k;
  const uint32_t at = start + column / 64 * columns64 + line / 8 * rows8 + line % 8 * 128 + column % 64 * 2;
  const uint32_t place = at ^ (at >> 7 & 7) << 4;
  uint16_t x;
  memcpy(&x, smem + place, 2);
  return bfloat16 ? tw::from_bfloat16(x) : tw::from_float16(x);
}
// What the products of this warp read of `rows` rows, or columns, of 16 elements of k. By its first lane.
UNWATCHED void read_operand(uint64_t descriptor, int first, int rows, bool turned, int when) {
  if (current % 32) return;
  const uint32_t start = (descriptor & 0x3fff) << 4, columns64 = (descriptor >> 16 & 0x3fff) << 4, rows8 = (descriptor >> 32 & 0x3fff) << 4;
  for (int line = 0; line < (turned ? 16 : rows); ++line)
    for (int chunk = 0; chunk < (turned ? rows / 8 : 2); ++chunk) {
      const uint32_t r = turned ? line : first + line, at = start + chunk / 8 * columns64 + r / 8 * rows8 + r % 8 * 128 + chunk % 8 * 16;
      access(READ, smem + (at ^ (at >> 7 & 7) << 4), 16, products_of(current / 32), when, clock_of(current));
    }
}
UNWATCHED Sums& sums_of(float* acc, int count, bool adds) {
  Products& p = products[current];
  if (!p.fenced) stop("products whose registers no wgmma.fence orders");
  int n = 0;
  while (n < p.count && p.sums[n].to != acc) ++n;
  Sums& s = p.sums[n];
  if (n == 4) abort();
  if (n == p.count) {
    ++p.count;
    s.to = acc, s.count = count;
    memcpy(s.values, acc, 4 * count);
    memset(acc, 0xff, 4 * count);
  }
  if (!adds) memset(s.values, 0, 4 * count);
  s.group = p.group;
  return s;
}

}  // namespace simulated

namespace tw {

UNWATCHED void wgmma_fence() { simulated::products[simulated::current].fenced = true; }
UNWATCHED void wgmma_commit() { ++simulated::products[simulated::current].group; }
template <int Pending>
UNWATCHED void wgmma_wait() {
  using namespace simulated;
  Products& p = products[current];
  p.fenced = false;
  int left = 0;
  for (int n = 0; n < p.count; ++n)
    if (p.sums[n].group < p.group - Pending) memcpy(p.sums[n].to, p.sums[n].values, 4 * p.sums[n].count);
    else p.sums[left++] = p.sums[n];
  p.count = left;
  know(products_of(current / 32), p.group - Pending);
}
template <class T, int N> inline void tie(T (&)[N]) {}
HERE uint64_t wgmma_descriptor(uint32_t address, int columns64, int rows8) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(columns64 >> 4) << 16 | static_cast<uint64_t>(rows8 >> 4) << 32;
}
template <class Kind, int N, bool Adds, bool Turned>
struct wgmma {
  static constexpr bool BFLOAT16 = sizeof(Kind) && same<Kind, bfloat16_bits>::value;
  UNWATCHED static void add(float (&acc)[N / 2], const float (&a)[2][16], uint64_t b, bool adds) {
    using namespace simulated;
    const int lane = current % 32;
    Sums& s = sums_of(acc, N / 2, adds);
    read_operand(b, 0, N, Turned, products[current].group + 1);
    for (int j = 0; j < N / 8; ++j)
      for (int c = 0; c < 2; ++c)
        for (int k = 0; k < 16; ++k) {
          const float x = element(b, j * 8 + lane % 4 * 2 + c, k, Turned, BFLOAT16);
          s.values[j * 4 + c] += a[0][k] * x;
          s.values[j * 4 + 2 + c] += a[1][k] * x;
        }
  }
  UNWATCHED static void of(float (&acc)[N / 2], uint64_t a, uint64_t b) {
    using namespace simulated;
    int all[32];
    collective(PRODUCT, 0, all);
    const int first = current / 32 % 4 * 16, lane = current % 32;
    float rows[2][16];
    read_operand(a, first, 16, false, products[current].group + 1);
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) rows[half][k] = element(a, first + half * 8 + lane / 4, k, false, BFLOAT16);
    add(acc, rows, b, Adds);
  }
  UNWATCHED static void of(float (&acc)[N / 2], const uint32_t* a, uint64_t b, int adds = Adds) {
    struct Words { uint32_t x[4]; } mine{{a[0], a[1], a[2], a[3]}}, all[32];
    simulated::collective(simulated::PRODUCT, mine, all);
    const int lane = simulated::current % 32;
    float rows[2][16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) {
        const uint16_t x = static_cast<uint16_t>(all[lane / 4 * 4 + k % 8 / 2].x[half + k / 8 * 2] >> k % 2 * 16);
        rows[half][k] = BFLOAT16 ? from_bfloat16(x) : from_float16(x);
      }
    add(acc, rows, b, adds);
  }
};
UNWATCHED void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t rows[32], words[4] = {a, b, c, d};
  const int lane = simulated::current % 32;
  simulated::collective(simulated::MATRIX, to, rows);
  for (int i = 0; i < 4; ++i) {
    char* at = simulated::smem + rows[i * 8 + lane / 4] + lane % 4 * 4;
    simulated::access(simulated::WRITE, at, 4);
    memcpy(at, &words[i], 4);
  }
}
UNWATCHED void store_box(const void* map, uint32_t from, int c0, int c1, int c2) {
  using namespace simulated;
  const Map& m = *static_cast<const Map*>(map);
  const int at[4] = {c0, c1, c2, 0}, warp = current / 32, when = ++products[current].stores;
  access(READ, smem + from, 128 * m.box[1] * m.box[2], stores_of(warp), when, clock_of(current));
  each_element(m, at, from, [=](uint16_t* to, const uint16_t* x) __attribute__((no_sanitize("thread"))) {
    if (!to) return;
    access(WRITE, to, 2, stores_of(warp), when, clock_of(current));
    *to = *x;
  });
}
// Those of this thread; a warp stores by one.
UNWATCHED void stores_read() {
  using namespace simulated;
  Products& p = products[current];
  if (p.stores) know(stores_of(current / 32), p.stored = p.stores);
}

}  // namespace tw
