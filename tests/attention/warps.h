// CUDA on one CPU thread, for tests of hand-written kernels: each thread of a CTA is a fiber, CTAs run one
// after the other in any order. Stands for gpu.cuh, mma.cuh and async.cuh; order.h and cpu.h are in front of it.
//
// What a missing barrier would show: each access to memory is checked by happens-before (order.h), whatever the order
// was; an asynchronous copy happens when it is issued or when it is waited for; shared memory holds NaN before a CTA
// starts; fibers are resumed in random order. A barrier that not all of its threads reach ends the launch with
// a report, as a race does. x86-64, GCC or Clang.
#include <math.h>

#define __device__
#define __forceinline__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section("tw_shared")))
#define TW_METHOD inline

namespace simulated {

constexpr int BARRIERS = 16, IDLE = 2000;
struct Copy { void* to; const void* from; int bytes, group; };
struct Fiber {
  void* sp;
  bool ended;
  int turns;  // of collectives of its warp, done
  Copy copies[4096];
  int copy_begin, copy_end, group, groups_done;
};
// What its lanes exchange, in turns; `kind`: of the collective, which all lanes must have in common.
struct Warp { int64_t words[2][32][4]; int arrived[2], kind[2], generation; int32_t* clock[2]; };
struct Counter { const void* at; int32_t* clock; };  // in memory, by which threads synchronise

Fiber fibers[MOST_THREADS];
Warp warps[MOST_THREADS / 32];
int cta_arrived[BARRIERS], cta_generation[BARRIERS], cta_or;
int32_t* cta_clock[BARRIERS][2];
Counter counters[1024];
int counter_count;
int64_t moves;  // steps of any fiber: without one nothing will ever come
uint64_t state = 1;
void (*kernel)(const void*);
const void* argument;
void (*start_others)(), (*end_thread)();  // of warps_hopper.h, where a CTA starts and where a thread ends
uint32_t lateness;                        // of copies that arrive by themselves

UNWATCHED uint32_t random32() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(state >> 33);
}

extern "C" void simulated_switch(void** from, void* to);
asm(R"(
.text
.globl simulated_switch
simulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

// Out of line: what a fiber keeps in registers is saved.
UNWATCHED void yield() {
  settle_stores();
  simulated_switch(&fibers[current].sp, scheduler);
}

UNWATCHED void stop(const char* what) {
  if (!report[0]) snprintf(report, sizeof report, "%s", what);
  for (;;) simulated_switch(&fibers[current].sp, scheduler);  // the launch has ended: this fiber is not resumed
}

UNWATCHED void entry() {
  kernel(argument);
  if (end_thread) end_thread();
  fibers[current].ended = true;
  ++moves;
  for (;;) yield();
}

// All lanes of a warp give `mine` and get that of each. Orders nothing, unless it is a __syncwarp.
enum Collective { SYNC, EXCHANGE, VOTE, MATRIX, PRODUCT, ELECT };
UNWATCHED void exchange(Collective kind, const void* mine, void* all, size_t bytes) {
  const int me = current, lane = me % 32;
  Warp& w = warps[me / 32];
  const int turn = fibers[me].turns++, at = turn & 1;
  if (w.arrived[at] && w.kind[at] != kind * 64 + static_cast<int>(bytes)) stop("lanes of a warp are at different collectives");
  w.kind[at] = kind * 64 + static_cast<int>(bytes);
  memcpy(w.words[at][lane], mine, bytes);
  if (kind == SYNC) release(w.clock[at]);
  if (++w.arrived[at] == 32) {
    w.arrived[at] = 0;
    ++w.generation;
    ++moves;
    // All lanes have left the turn before.
    memset(w.clock[at ^ 1] + (foreign ? 0 : base()), 0, 4l * (foreign ? length : actors));
    memset(w.clock[at ^ 1] + length + (foreign ? 0 : base()), 0, 4l * (foreign ? length : actors));
  }
  while (w.generation <= turn) yield();
  if (kind == SYNC) acquire(w.clock[at]);
  for (int l = 0; l < 32; ++l) memcpy(static_cast<char*>(all) + l * bytes, w.words[at][l], bytes);
}
template <class T>
UNWATCHED void collective(Collective kind, const T& mine, T (&all)[32]) {
  static_assert(sizeof(T) <= 32, "a lane's words");
  exchange(kind, &mine, all, sizeof(T));
}

UNWATCHED void barrier(int id, int count) {
  const int before = cta_generation[id];
  int32_t* clock = cta_clock[id][before & 1];
  release(clock);
  ++moves;
  if (++cta_arrived[id] == count) {
    cta_arrived[id] = 0;
    ++cta_generation[id];
    int32_t* next = cta_clock[id][before + 1 & 1];  // which all have left
    memset(next, 0, 8l * length);
  }
  while (cta_generation[id] == before) yield();
  acquire(clock);
}

UNWATCHED void perform(Copy& c) {
  memset(c.to, 0, 16);
  if (c.bytes) memcpy(c.to, c.from, c.bytes);
  c.to = nullptr;
}

// Launch a grid, one CTA after the other, `order` [ctas]. `arrays`: what it may write (see start_launch). Returns what went wrong, or an empty text.
UNWATCHED const char* run(void (*f)(const void*), const void* p, int count, const int32_t* order, int ctas, uint64_t seed, const int64_t* arrays, int array_count, bool equal) {
  state = seed * 2 + 1;
  lateness = seed % 2 ? 4000 : 4;
  kernel = f;
  argument = p;
  threads = count;
  report[0] = 0;
  equal_stores = equal;
  foreign = true;
  start_launch(ctas, arrays, array_count);
  for (int w = 0; w < count / 32; ++w)
    for (int at = 0; at < 2; ++at) warps[w].clock[at] = new_clock();
  for (int b = 0; b < BARRIERS; ++b)
    for (int at = 0; at < 2; ++at) cta_clock[b][at] = new_clock();
  for (int n = 0; n < ctas && !report[0]; ++n) {
    start_cta(order[n]);
    if (start_others) start_others();
    for (int w = 0; w < count / 32; ++w) {
      Warp& warp = warps[w];
      warp.arrived[0] = warp.arrived[1] = warp.generation = 0;
      for (int at = 0; at < 2; ++at) memset(warp.clock[at], 0, 8l * length);
    }
    for (int b = 0; b < BARRIERS; ++b) {
      cta_arrived[b] = cta_generation[b] = 0;
      for (int at = 0; at < 2; ++at) memset(cta_clock[b][at], 0, 8l * length);
    }
    for (int t = 0; t < count; ++t) {
      Fiber& f = fibers[t];
      f.ended = false;
      f.turns = f.copy_begin = f.copy_end = f.group = f.groups_done = 0;
      uintptr_t top = reinterpret_cast<uintptr_t>(stacks[t]) + sizeof stacks[t] - 64;
      void** sp = reinterpret_cast<void**>(top & ~uintptr_t{15});
      *--sp = nullptr;  // where `entry` would return to
      *--sp = reinterpret_cast<void*>(&entry);
      for (int i = 0; i < 6; ++i) *--sp = nullptr;
      f.sp = sp;
    }
    for (int left = count, idle = 0; left && !report[0]; ) {
      const int first = static_cast<int>(random32() % static_cast<unsigned>(count));
      const int64_t before = moves;
      int ended = 0;
      for (int i = 0; i < count && !report[0]; ++i) {
        const int t = (first + i * 37) % count;  // 37 and the count have no divisor in common
        if (fibers[t].ended) { ++ended; continue; }
        current = t;
        simulated_switch(&scheduler, fibers[t].sp);
      }
      left = count - ended;
      idle = moves == before ? idle + 1 : 0;
      if (idle > IDLE && !report[0]) snprintf(report, sizeof report, "a barrier waits for threads that do not come");
    }
  }
  for (int w = 0; w < count / 32; ++w)
    for (int at = 0; at < 2; ++at) free(warps[w].clock[at]);
  for (int b = 0; b < BARRIERS; ++b)
    for (int at = 0; at < 2; ++at) free(cta_clock[b][at]);
  for (; counter_count; --counter_count) free(counters[counter_count - 1].clock);
  end_launch();
  return report;
}

struct Dim { int x; };
struct Thread { operator Dim() const; };
}  // namespace simulated

#define threadIdx (simulated::Dim{simulated::current})
#define blockIdx (simulated::Dim{simulated::cta})
#define gridDim (simulated::Dim{simulated::grid})

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float __int_as_float(int x) { return tw::bits_to_float(static_cast<uint32_t>(x)); }
inline float __uint_as_float(uint32_t x) { return tw::bits_to_float(x); }
inline int __float_as_int(float x) { return static_cast<int>(tw::float_to_bits(x)); }
inline uint32_t __float_as_uint(float x) { return tw::float_to_bits(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldg(const T* p) { return *p; }
UNWATCHED int atomicAdd(int* p, int x) {
  simulated::access(simulated::UPDATE, p, 4);
  const int before = *p;
  *p += x;
  return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline void __syncwarp() { int all[32]; simulated::collective(simulated::SYNC, 0, all); }
inline void __syncthreads() { simulated::barrier(0, simulated::threads); }
template <class T>
inline T __shfl_sync(uint32_t, T x, int from) {
  T all[32];
  simulated::collective(simulated::EXCHANGE, x, all);
  return all[from & 31];
}
inline void __threadfence() {}  // joins no clocks: counters acquire and release by themselves
template <class T>
inline T __shfl_xor_sync(uint32_t, T x, int with) { T all[32]; simulated::collective(simulated::EXCHANGE, x, all); return all[(simulated::current ^ with) & 31]; }
template <class T>
inline T __shfl_up_sync(uint32_t, T x, int by) {
  T all[32];
  const int lane = simulated::current % 32;
  simulated::collective(simulated::EXCHANGE, x, all);
  return all[lane >= by ? lane - by : lane];
}
inline uint32_t __ballot_sync(uint32_t, bool x) {
  bool all[32];
  uint32_t mask = 0;
  simulated::collective(simulated::VOTE, x, all);
  for (int l = 0; l < 32; ++l) mask |= static_cast<uint32_t>(all[l]) << l;
  return mask;
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t x) {
  uint32_t all[32], sum = 0;
  simulated::collective(simulated::VOTE, x, all);
  for (uint32_t one : all) sum += one;
  return sum;
}
inline int __reduce_max_sync(uint32_t, int x) {
  int all[32];
  simulated::collective(simulated::VOTE, x, all);
  for (int one : all) x = one > x ? one : x;
  return x;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline bool __any_sync(uint32_t m, bool x) { return __ballot_sync(m, x) != 0; }

namespace tw {

struct float16_bits {};
struct bfloat16_bits {};
template <class Kind> struct bits_of;
template <> struct bits_of<float16_bits> {
  static float to(uint16_t x) { return from_float16(x); }
  static uint16_t from(float x) { return to_float16(x); }
};
template <> struct bits_of<bfloat16_bits> {
  static float to(uint16_t x) { return from_bfloat16(x); }
  static uint16_t from(float x) { return to_bfloat16(x); }
};

template <class T> struct op_max { static T of(T a, T b) { return b > a ? b : a; } };
template <class T> struct op_sum { static T of(T a, T b) { return a + b; } };
template <class Op, int Extent, class T>
inline T across_lanes(T x) {
  for (int by = Extent / 2; by > 0; by /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, by));
  return x;
}
inline float lowest() { return -__builtin_inff(); }
template <class T> inline T load_const(const T* p) { return *p; }
inline void prefetch(const void*) {}

// -- copies -----------------------------------------------------------------------------------------
UNWATCHED void copy_async_16(void* to, const void* from, int bytes) {
  using namespace simulated;
  Fiber& f = fibers[current];
  access(WRITE, to, 16, copies_of(current), f.group + 1, clock_of(current));
  Copy c{to, from, bytes, f.group};
  if (random32() & 1) { perform(c); return; }
  f.copies[f.copy_end++ % 4096] = c;
  if (f.copy_end - f.copy_begin > 4096) abort();
}
UNWATCHED void copy_async_commit() { ++simulated::fibers[simulated::current].group; }
template <int Pending>
UNWATCHED void copy_async_wait() {
  using namespace simulated;
  Fiber& f = fibers[current];
  for (; f.copy_begin < f.copy_end && f.copies[f.copy_begin % 4096].group < f.group - Pending; ++f.copy_begin)
    perform(f.copies[f.copy_begin % 4096]);
  know(copies_of(current), f.group - Pending);
}
UNWATCHED void wait_for_previous_launch() { simulated::know(simulated::before(), 1); }
inline void start_next_launch() {}
inline void bar_sync(int id, int count) { simulated::barrier(id, count); }
UNWATCHED bool bar_or(int id, int count, bool x) {
  int& any = simulated::cta_or;
  bar_sync(id, count);
  any = 0;
  bar_sync(id, count);
  any |= x;
  bar_sync(id, count);
  return any;
}
// Acquires and releases: a counter is what CTAs synchronise by.
UNWATCHED int arrive(int* counter, int count = 1) {
  using namespace simulated;
  int n = 0;
  while (n < counter_count && counters[n].at != counter) ++n;
  if (n == 1024) abort();
  if (n == counter_count) counters[counter_count++] = {counter, new_clock()};
  foreign = true;
  access(UPDATE, counter, 4);
  acquire(counters[n].clock);
  release(counters[n].clock);
  const int before = *counter;
  *counter += count;
  return before;
}

// -- products ---------------------------------------------------------------------------------------
// A lane reads the words that it gets.
UNWATCHED void load_matrices(uint32_t (&v)[4], const void* row) {
  const void* rows[32];
  const int lane = simulated::current % 32;
  simulated::collective(simulated::MATRIX, row, rows);
  for (int i = 0; i < 4; ++i) {
    const char* at = static_cast<const char*>(rows[i * 8 + lane / 4]) + lane % 4 * 4;
    simulated::access(simulated::READ, at, 4);
    memcpy(&v[i], at, 4);
  }
}
UNWATCHED void load_matrices_transposed(uint32_t (&v)[4], const void* row) {
  const void* rows[32];
  const int lane = simulated::current % 32;
  simulated::collective(simulated::MATRIX, row, rows);
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const char* at = static_cast<const char*>(rows[i * 8 + lane % 4 * 2 + j]) + lane / 4 * 2;
      simulated::access(simulated::READ, at, 2);
      memcpy(&pair[j], at, 2);
    }
    memcpy(&v[i], pair, 4);
  }
}
UNWATCHED uint32_t transpose_matrix(uint32_t x) {
  uint32_t all[32];
  const int lane = simulated::current % 32;
  simulated::collective(simulated::MATRIX, x, all);
  uint32_t out = 0;
  for (int j = 0; j < 2; ++j) {  // row 2 t + j, column g of the matrix
    const int row = lane % 4 * 2 + j, column = lane / 4;
    out |= (all[row * 4 + column / 2] >> column % 2 * 16 & 0xffffu) << 16 * j;
  }
  return out;
}
template <class Kind>
inline uint32_t pack(float low, float high) {
  return bits_of<Kind>::from(low) | static_cast<uint32_t>(bits_of<Kind>::from(high)) << 16;
}
template <class Kind>
UNWATCHED void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands { uint32_t a[4], b[2]; } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}}, all[32];
  const int lane = simulated::current % 32, g = lane / 4, t = lane % 4;
  simulated::collective(simulated::PRODUCT, mine, all);
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = t * 2 + i % 2;
    float sum = acc[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], y = all[column * 4 + k % 8 / 2].b[k / 8];
      sum += bits_of<Kind>::to(static_cast<uint16_t>(x >> k % 2 * 16)) * bits_of<Kind>::to(static_cast<uint16_t>(y >> k % 2 * 16));
    }
    acc[i] = sum;
  }
}

}  // namespace tw

#undef TW_INLINE  // of what follows: methods too
#define TW_INLINE inline
