// Asynchronous copies from global to shared memory (cp.async, sm_80 and newer).
// Reference: PTX ISA, data movement instructions, cp.async.
#pragma once

namespace tw {

// 16 bytes, or `bytes` of them and zeros for the rest; both addresses are multiples of 16.
TW_INLINE void copy_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(bytes) : "memory");
}
// `N` elements, or zeros where the condition fails: 4, 8 or 16 bytes at a multiple of their size.
// `Unaligned`: the source may not be one, so elements are copied one by one before this returns.
template <class T, int N, bool Unaligned = false>
TW_INLINE void copy_async(T* to, const T* from, bool c = true) {
#ifndef TW_UNALIGNED
  if constexpr (!Unaligned) {
    constexpr int bytes = sizeof(T) * N;
    if constexpr (bytes == 16) copy_async_16(to, from, c ? 16 : 0);
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "n"(bytes), "r"(c ? bytes : 0) : "memory");
    return;
  }
#endif
  TW_EACH(N) to[l] = c ? load_const(from + l) : T{};
}
TW_INLINE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `Pending` groups of this thread are under way.
template <int Pending>
TW_INLINE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory"); }

// Programmatic dependent launch (sm_90 and newer; elsewhere launches follow each other whole).
// Waits until the kernel before has ended and its writes can be seen: nothing that it may write, and
// nothing that it may read, is touched before. Reference: PTX ISA, griddepcontrol.
TW_INLINE void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the CTAs of the next kernel start where there is room.
TW_INLINE void start_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Adds to a counter and returns its old value. What this CTA wrote before (other threads: before a
// barrier of the CTA) is visible to whoever sees the count, and the other way round.
TW_INLINE int arrive(int* counter, int count = 1) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(count) : "memory");
  return before;
}

}  // namespace tw
