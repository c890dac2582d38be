// Copies from global memory that go on while a kernel does something else, or waits.
#pragma once

#include <cstring>

#include "cuda/kernel.cuh"

namespace mblm::cuda {

// Copies kBytes (4, 8 or 16, aligned so), or zeros where there is nothing to copy.
template <int kBytes>
MBLM_DEVICE void copy_async(void* to, const void* from, bool there_is) {
#ifdef __CUDA_ARCH__
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(to));
  const int bytes = there_is ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past the first cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
#else
  if (there_is) {
    std::memcpy(to, from, kBytes);
  } else {
    std::memset(to, 0, kBytes);
  }
#endif
}

// Ends a group of the calling thread's copies.
MBLM_DEVICE void end_of_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for the calling thread's groups but the last kLeft.
template <int kLeft>
MBLM_DEVICE void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// Has the second cache hold what is read later; from is a multiple of 16. Emulated, it is read.
MBLM_DEVICE void prefetch([[maybe_unused]] const void* from, [[maybe_unused]] uint32_t bytes) {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 900
  bytes = bytes / 16 * 16;
  if (bytes == 0) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
#else
  const volatile char* const values = static_cast<const char*>(from);
  (void)values[0], (void)values[bytes - 1];
#endif
}

}  // namespace mblm::cuda
