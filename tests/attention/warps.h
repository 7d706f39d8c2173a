// CUDA on one CPU thread, for tests of hand-written kernels: each thread of a CTA is a fiber, CTAs run one
// after the other in any order. Stands for gpu.cuh, mma.cuh and async.cuh; cpu.h is in front of it.
//
// What a missing barrier would show: fibers are resumed in random order, an asynchronous copy happens when it
// is issued or when it is waited for, shared memory holds NaN before a CTA starts. A barrier that not all of
// its threads reach ends the program. x86-64, GCC or Clang.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define __device__
#define __forceinline__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define TW_METHOD inline

namespace simulated {

constexpr int MOST_THREADS = 1024, STACK = 1 << 17, MOST_SMEM = 232448;
struct Copy { void* to; const void* from; int bytes, group; };
struct Fiber {
  void* sp;
  bool ended;
  int turns;  // of collectives of its warp, done
  Copy copies[4096];
  int copy_begin, copy_end, group, groups_done;
};
struct Warp { int64_t words[2][32][4]; int arrived[2]; int generation; };

alignas(128) char smem[MOST_SMEM];
alignas(64) char stacks[MOST_THREADS][STACK];
Fiber fibers[MOST_THREADS];
Warp warps[MOST_THREADS / 32];
int current, threads, cta, grid, cta_arrived[16], cta_generation[16], cta_or;
void* scheduler;
uint64_t state = 1;
void (*kernel)(const void*);
const void* argument;

inline uint32_t random32() {
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
__attribute__((noinline)) inline void yield() { simulated_switch(&fibers[current].sp, scheduler); }

__attribute__((noinline)) inline void entry() {
  kernel(argument);
  fibers[current].ended = true;
  yield();
}

template <class T>
__attribute__((noinline)) inline void collective(const T& mine, T (&all)[32]) {
  static_assert(sizeof(T) <= 32, "a lane's words");
  const int me = current, lane = me % 32;
  Warp& w = warps[me / 32];
  const int turn = fibers[me].turns++, at = turn & 1;
  memcpy(w.words[at][lane], &mine, sizeof(T));
  if (++w.arrived[at] == 32) {
    w.arrived[at] = 0;
    ++w.generation;
  }
  while (w.generation <= turn) yield();
  for (int l = 0; l < 32; ++l) memcpy(&all[l], w.words[at][l], sizeof(T));
}

__attribute__((noinline)) inline void barrier(int id, int count) {
  const int before = cta_generation[id];
  if (++cta_arrived[id] == count) {
    cta_arrived[id] = 0;
    ++cta_generation[id];
    return;
  }
  while (cta_generation[id] == before) yield();
}

inline void perform(Copy& c) {
  memset(c.to, 0, 16);
  if (c.bytes) memcpy(c.to, c.from, c.bytes);
  c.to = nullptr;
}

// One CTA after the other, `order` [ctas].
inline void run(void (*f)(const void*), const void* p, int count, const int32_t* order, int ctas, uint64_t seed) {
  grid = ctas;
  state = seed * 2 + 1;
  kernel = f;
  argument = p;
  threads = count;
  grid = ctas;
  for (int n = 0; n < ctas; ++n) {
    cta = order[n];
    memset(smem, 0xff, sizeof smem);
    memset(warps, 0, sizeof warps);
    memset(cta_arrived, 0, sizeof cta_arrived);
    for (int t = 0; t < count; ++t) {
      Fiber& f = fibers[t];
      f.ended = false;
      f.turns = f.copy_begin = f.copy_end = f.group = f.groups_done = 0;
      uintptr_t top = reinterpret_cast<uintptr_t>(stacks[t]) + STACK - 64;
      void** sp = reinterpret_cast<void**>(top & ~uintptr_t{15});
      *--sp = nullptr;  // where `entry` would return to
      *--sp = reinterpret_cast<void*>(&entry);
      for (int i = 0; i < 6; ++i) *--sp = nullptr;
      f.sp = sp;
    }
    for (int left = count, idle = 0; left; ) {
      const int first = static_cast<int>(random32() % static_cast<unsigned>(count));
      int ended = 0;
      for (int i = 0; i < count; ++i) {
        const int t = (first + i * 37) % count;  // 37 and the count have no divisor in common
        if (fibers[t].ended) { ++ended; continue; }
        current = t;
        simulated_switch(&scheduler, fibers[t].sp);
      }
      idle = count - ended == left ? idle + 1 : 0;
      left = count - ended;
      if (idle > 40000000) { fprintf(stderr, "a barrier waits for threads that do not come\n"); abort(); }
    }
  }
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
inline int atomicAdd(int* p, int x) { const int before = *p; *p += x; return before; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline void __syncwarp() { int all[32]; simulated::collective(0, all); }
inline void __syncthreads() { simulated::barrier(0, simulated::threads); }
template <class T>
inline T __shfl_sync(uint32_t, T x, int from) { T all[32]; simulated::collective(x, all); return all[from & 31]; }
template <class T>
inline T __shfl_xor_sync(uint32_t, T x, int with) { T all[32]; simulated::collective(x, all); return all[(simulated::current ^ with) & 31]; }
template <class T>
inline T __shfl_up_sync(uint32_t, T x, int by) {
  T all[32];
  const int lane = simulated::current % 32;
  simulated::collective(x, all);
  return all[lane >= by ? lane - by : lane];
}
inline uint32_t __ballot_sync(uint32_t, bool x) {
  bool all[32];
  uint32_t mask = 0;
  simulated::collective(x, all);
  for (int l = 0; l < 32; ++l) mask |= static_cast<uint32_t>(all[l]) << l;
  return mask;
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t x) {
  uint32_t all[32], sum = 0;
  simulated::collective(x, all);
  for (uint32_t one : all) sum += one;
  return sum;
}
inline int __reduce_max_sync(uint32_t, int x) {
  int all[32];
  simulated::collective(x, all);
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
inline void copy_async_16(void* to, const void* from, int bytes) {
  simulated::Fiber& f = simulated::fibers[simulated::current];
  simulated::Copy c{to, from, bytes, f.group};
  if (simulated::random32() & 1) { simulated::perform(c); return; }
  f.copies[f.copy_end++ % 4096] = c;
  if (f.copy_end - f.copy_begin > 4096) abort();
}
inline void copy_async_commit() { ++simulated::fibers[simulated::current].group; }
template <int Pending>
inline void copy_async_wait() {
  simulated::Fiber& f = simulated::fibers[simulated::current];
  for (; f.copy_begin < f.copy_end && f.copies[f.copy_begin % 4096].group < f.group - Pending; ++f.copy_begin)
    simulated::perform(f.copies[f.copy_begin % 4096]);
}
inline void wait_for_previous_launch() {}
inline void start_next_launch() {}
inline void bar_sync(int id, int count) { simulated::barrier(id, count); }
inline bool bar_or(int id, int count, bool x) {
  int& any = simulated::cta_or;
  bar_sync(id, count);
  any = 0;
  bar_sync(id, count);
  any |= x;
  bar_sync(id, count);
  return any;
}
inline int arrive(int* counter, int count = 1) { const int before = *counter; *counter += count; return before; }

// -- products ---------------------------------------------------------------------------------------
inline void load_matrices(uint32_t (&v)[4], const void* row) {
  const void* rows[32];
  const int lane = simulated::current % 32;
  simulated::collective(row, rows);
  for (int i = 0; i < 4; ++i) memcpy(&v[i], static_cast<const char*>(rows[i * 8 + lane / 4]) + lane % 4 * 4, 4);
}
inline void load_matrices_transposed(uint32_t (&v)[4], const void* row) {
  const void* rows[32];
  const int lane = simulated::current % 32;
  simulated::collective(row, rows);
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) memcpy(&pair[j], static_cast<const char*>(rows[i * 8 + lane % 4 * 2 + j]) + lane / 4 * 2, 2);
    memcpy(&v[i], pair, 4);
  }
}
inline uint32_t transpose_matrix(uint32_t x) {
  uint32_t all[32];
  const int lane = simulated::current % 32;
  simulated::collective(x, all);
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
__attribute__((noinline)) inline void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands { uint32_t a[4], b[2]; } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}}, all[32];
  const int lane = simulated::current % 32, g = lane / 4, t = lane % 4;
  simulated::collective(mine, all);
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
