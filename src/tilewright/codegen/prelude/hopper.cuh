// Hopper's asynchronous tensor instructions: mbarriers, boxes copied by TMA, wgmma (sm_90a only).
//
// Addresses of shared memory are 32-bit words of the shared window (`shared_address` of mma.cuh). Tiles have rows
// of 64 elements of 16 bits (128 bytes) in the 128-byte swizzle: 16-byte chunk c of a row lies at
// c XOR (address bits 7-9). TMA writes and wgmma reads that form, so a tile may start at any multiple
// of 128 bytes. References: PTX ISA, mbarrier, cp.async.bulk.tensor, asynchronous warpgroup matrix
// instructions.
#pragma once

namespace tw {

// One lane of a warp that has converged. For `lane == 0` ptxas would loop over the lanes.
TW_INLINE bool elect() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
  return elected != 0;
}

// By the special function unit, without a branch. Relative errors: of the reciprocal 2^-23, of tanh 2^-11; absolute
// error of the logarithm of x >= 0.5: 2^-22.
#define TW_SPECIAL(NAME, PTX) \
  TW_INLINE float NAME##_fast(float x) { float y; asm(PTX " %0, %1;" : "=f"(y) : "f"(x)); return y; }
TW_SPECIAL(reciprocal, "rcp.approx.ftz.f32")
TW_SPECIAL(log2, "lg2.approx.ftz.f32")
TW_SPECIAL(tanh, "tanh.approx.f32")
#undef TW_SPECIAL
// A word that no thread writes during the launch, or 0 where the condition fails: a predicated load, no branch.
TW_INLINE uint32_t load_word_if(bool c, const void* at) {
  uint32_t x;
  asm("{ .reg .pred p; setp.ne.b32 p, %1, 0; mov.b32 %0, 0; @p ld.global.nc.b32 %0, [%2]; }" : "=r"(x) : "r"(static_cast<int>(c)), "l"(at));
  return x;
}

// -- mbarriers -----------------------------------------------------------------------------------

TW_INLINE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After all inits by one thread, before the CTA's barrier: TMA sees the barriers too.
TW_INLINE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
TW_INLINE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and `bytes` of TMA belong to this phase: boxes count in full, clipped parts included.
TW_INLINE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives if `arrives`, and not before `x` is computed: it depends on x, which is never below 0 (it may
// be NaN). Without such a dependence ptxas moves the computation of x behind the next wait for wgmma.
TW_INLINE void barrier_arrive_after(uint32_t barrier, bool arrives, float x) {
  asm volatile("{ .reg .pred p, q; setp.ne.b32 p, %1, 0; setp.geu.and.f32 q, %2, 0f00000000, p; @q mbarrier.arrive.shared::cta.b64 _, [%0]; }"
               ::"r"(barrier), "r"(static_cast<int>(arrives)), "f"(x) : "memory");
}
// Until the phase of this parity has ended: use k of a stage waits for parity k & 1 of "full" and
// (k & 1) ^ 1 of "empty"; a new barrier counts as having ended the phase of parity 1.
TW_INLINE void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef TW_TRAP_HANGS
  uint32_t done = 0;
  for (int tries = 0; !done; ++tries) {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    if (tries > 200000) asm volatile("trap;");
  }
#else
  asm volatile("{ .reg .pred p; TRY: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra.uni DONE; bra.uni TRY; DONE: }"
               ::"r"(barrier), "r"(parity) : "memory");
#endif
}

// Whether that phase has ended, without waiting.
TW_INLINE bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done != 0;
}

// 16 bytes by cp.async, or zeros if `bytes` is 0. wgmma sees them behind the barrier at which `copy_async_arrive`
// arrives and a fence_async() of the thread that waited for it.
TW_INLINE void copy_row_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// An arrival of this thread, counted at the start, once all its cp.async so far have come.
TW_INLINE void copy_async_arrive(uint32_t barrier) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory"); }

// -- TMA -----------------------------------------------------------------------------------------

// A CUtensorMap, in constant memory (a kernel's parameter) at a multiple of 64 bytes.
struct alignas(64) TensorMap { char bytes[128]; };

TW_INLINE void prefetch_map(const void* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// One box to shared memory; coordinates with the fastest dimension first. By one thread.
TW_INLINE void copy_box(uint32_t to, const void* map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
TW_INLINE void copy_box(uint32_t to, const void* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
// One box from shared memory, by one thread, as a group of its own. What lies outside the array is not written.
TW_INLINE void store_box(const void* map, uint32_t from, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(from), "r"(c0), "r"(c1), "r"(c2) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until the boxes that this thread stores have been read from shared memory.
TW_INLINE void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// What this thread wrote to shared memory before is seen by TMA and wgmma after a barrier.
TW_INLINE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// -- warpgroups ----------------------------------------------------------------------------------

template <int Registers> TW_INLINE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers)); }
template <int Registers> TW_INLINE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers)); }

TW_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TW_INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `Pending` groups of this warpgroup are under way.
template <int Pending>
TW_INLINE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory"); }
// Registers that wgmma writes or reads, tied to this point of the program.
template <int N> TW_INLINE void tie(float (&x)[N]) { TW_EACH(N) asm volatile("" : "+f"(x[l]) :: "memory"); }
template <int N> TW_INLINE void tie(uint32_t (&x)[N]) { TW_EACH(N) asm volatile("" : "+r"(x[l]) :: "memory"); }

// The descriptor of a swizzled tile. `rows8`: bytes from one group of 8 rows to the next. `columns64`:
// bytes to the next 64 columns, read only where the operand's rows are its k dimension. Adding bytes / 16
// to a descriptor moves it: 32 bytes for the next 16 columns, 16 rows of 128 bytes for the next 16 rows.
TW_INLINE uint64_t wgmma_descriptor(uint32_t address, int columns64, int rows8) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(columns64 >> 4) << 16 |
         static_cast<uint64_t>(rows8 >> 4) << 32 | uint64_t(1) << 62;
}

// acc (64 × N) = or += a (64 × 16) · b (16 × N). Thread t of the warpgroup, r = 16 (t / 32) + (t % 32) / 4
// and c = 8 j + 2 (t % 4), holds (r, c) (r, c+1) (r+8, c) (r+8, c+1) in acc[4j] … acc[4j+3]. `a` comes by a
// descriptor or from registers: with pack() of pairs of acc[8k] … acc[8k+7] a result is the operand of the
// k-th 16 columns; there `adds` may be known at run time, the same in all threads. `Turned`: the rows of b in memory are its k dimension.
template <class Kind, int N, bool Adds, bool Turned>
struct wgmma;

#define TW_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TW_16(d, i) TW_4(d, i), TW_4(d, i + 4), TW_4(d, i + 8), TW_4(d, i + 12)
#define TW_32(d) TW_16(d, 0), TW_16(d, 16)
#define TW_48(d) TW_32(d), TW_16(d, 32)
#define TW_64(d) TW_48(d), TW_16(d, 48)
#define TW_128(d) TW_64(d), TW_16(d, 64), TW_16(d, 80), TW_16(d, 96), TW_16(d, 112)
#define TW_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TW_NAMES_48 TW_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TW_NAMES_64 TW_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TW_NAMES_128 TW_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TW_WGMMA(Kind, kind, N, REGISTERS, NAMES, A, B, B4, ADDS, TURNED, ADDS4, TURNED4)                        \
  template <bool Adds, bool Turned>                                                                           \
  struct wgmma<Kind, N, Adds, Turned> {                                                                       \
    static TW_INLINE void of(float (&acc)[N / 2], uint64_t a, uint64_t b) {                                   \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " ADDS ", 0; wgmma.mma_async.sync.aligned.m64n" #N         \
                   "k16.f32." kind "." kind " {" NAMES "}, " A ", " B ", p, 1, 1, 0, " TURNED "; }"           \
                   : REGISTERS(acc) : "l"(a), "l"(b), "n"(Adds), "n"(Turned));                                \
    }                                                                                                         \
    static TW_INLINE void of(float (&acc)[N / 2], const uint32_t* a, uint64_t b, int adds = Adds) {           \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " ADDS4 ", 0; wgmma.mma_async.sync.aligned.m64n" #N        \
                   "k16.f32." kind "." kind " {" NAMES "}, {" B4 ", p, 1, 1, " TURNED4 "; }"                   \
                   : REGISTERS(acc) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds), "n"(Turned)); \
    }                                                                                                         \
  };
#define TW_WGMMAS(N, REGISTERS, NAMES, A, B, B4, ADDS, TURNED, ADDS4, TURNED4)                            \
  TW_WGMMA(float16_bits, "f16", N, REGISTERS, NAMES, A, B, B4, ADDS, TURNED, ADDS4, TURNED4)               \
  TW_WGMMA(bfloat16_bits, "bf16", N, REGISTERS, NAMES, A, B, B4, ADDS, TURNED, ADDS4, TURNED4)
TW_WGMMAS(64, TW_32, TW_NAMES_32, "%32", "%33", "%32, %33, %34, %35}, %36", "%34", "%35", "%37", "%38")
TW_WGMMAS(96, TW_48, TW_NAMES_48, "%48", "%49", "%48, %49, %50, %51}, %52", "%50", "%51", "%53", "%54")
TW_WGMMAS(128, TW_64, TW_NAMES_64, "%64", "%65", "%64, %65, %66, %67}, %68", "%66", "%67", "%69", "%70")
TW_WGMMAS(256, TW_128, TW_NAMES_128, "%128", "%129", "%128, %129, %130, %131}, %132", "%130", "%131", "%133", "%134")
#undef TW_WGMMAS
#undef TW_WGMMA
#undef TW_NAMES_32
#undef TW_NAMES_48
#undef TW_NAMES_64
#undef TW_NAMES_128
#undef TW_4
#undef TW_16
#undef TW_32
#undef TW_48
#undef TW_64
#undef TW_128

// Four 8 × 8 matrices of 16-bit elements to shared memory: lane l gives the address of row l % 8 of
// matrix l / 8; a word holds two neighbours of row l / 4.
TW_INLINE void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

}  // namespace tw
