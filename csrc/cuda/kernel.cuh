// What the CUDA kernels share: launches, element types, packs of 16 bytes, sums over a warp.
//
// A kernel works on independent items that its blocks or warps take in strides of the grid, so that
// any number of items fits. No result depends on the grid, nothing is added up by atomics: results
// are the same from run to run. Without nvcc, tests/cuda_emulation.h stands in for CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "cpu/kernel.h"
#include "cuda/stream.h"

#if !defined(__CUDACC__) && !defined(MBLM_CUDA_EMULATION)
#error "CUDA sources are compiled by nvcc, or after tests/cuda_emulation.h"
#endif

#define MBLM_DEVICE __device__ __forceinline__

// Before a loop whose turns load independently: several loads are in flight at once.
#ifdef __CUDACC__
#define MBLM_UNROLL _Pragma("unroll 4")
#else
#define MBLM_UNROLL _Pragma("GCC unroll 4")
#endif
// Before a loop of few turns over arrays that are to stay in registers.
#ifdef __CUDACC__
#define MBLM_UNROLL_ALL _Pragma("unroll")
#else
#define MBLM_UNROLL_ALL
#endif

namespace mblm::cuda {

using cpu::BFloat16;
using cpu::compute_t;

constexpr int kWarp = 32;

#ifdef __CUDACC__
constexpr int64_t kMaxBlocks = 0x7fffffff;

// What went wrong, which nobody else is to find.
inline Error message_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// How the blocks of a kernel are launched.
struct Grid {
  int64_t clusters;
  int size = 1;           // blocks of a cluster
  bool is_early = false;  // see launch_clusters
};

template <class... Parameters, class... Arguments>
Error launch_grid(void (*kernel)(Parameters...), const Grid& grid, int threads, size_t shared_bytes,
                  Stream stream, Arguments... args) {
  if (grid.clusters <= 0) return nullptr;
  constexpr size_t kSharedAtHand = 48 * 1024;  // more than that must be asked for
  const void* const address = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedAtHand) {
    error = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_bytes));
  }
  // A multiprocessor runs kernels at the same time only if they divide its memory alike.
  if (error == cudaSuccess && grid.is_early) {
    error = cudaFuncSetAttribute(address, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error != cudaSuccess) return message_of(error);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {unsigned(grid.size), 1, 1};
  cudaLaunchConfig_t config{};
  const int64_t most = kMaxBlocks / grid.size;
  config.gridDim = dim3(unsigned(grid.clusters < most ? grid.clusters : most) * grid.size);
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = !grid.is_early ? 0 : grid.size > 1 ? 2 : 1;
  return message_of(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...));
}

// Queues kernel(args...) on `blocks` blocks, at most 2^31 - 1 of them; none is no launch.
template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
             Stream stream, Arguments... args) {
  return launch_grid(kernel, {blocks}, threads, shared_bytes, stream, args...);
}

// Whether the current device has what 9.0 has, and kernels were compiled to make use of it: they
// begin early and wait for their inputs, and blocks form clusters.
bool has_compute_90();

// As launch(), in clusters of so many blocks where there are such; else one block stands for each.
// The kernel may begin before those ahead of it on the stream have ended: what they write or read,
// every block of it touches after wait_for_inputs() alone.
template <class... Parameters, class... Arguments>
Error launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int size, int threads,
                      size_t shared_bytes, Stream stream, Arguments... args) {
  const Grid grid = has_compute_90() ? Grid{clusters, size, true} : Grid{clusters};
  return launch_grid(kernel, grid, threads, shared_bytes, stream, args...);
}

template <class... Parameters, class... Arguments>
Error launch_dependent(void (*kernel)(Parameters...), int64_t blocks, int threads,
                       size_t shared_bytes, Stream stream, Arguments... args) {
  return launch_clusters(kernel, blocks, 1, threads, shared_bytes, stream, args...);
}

// The block's dynamic shared memory.
template <class T>
MBLM_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char mblm_shared_memory[];
  return reinterpret_cast<T*>(mblm_shared_memory);
}
#endif

// What the first of some launches that failed says.
inline Error first_error(std::initializer_list<Error> errors) {
  for (const Error error : errors) {
    if (error) return error;
  }
  return nullptr;
}

inline int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

// An element as what is computed in.
MBLM_DEVICE float value_of(float x) {
  return x;
}
MBLM_DEVICE double value_of(double x) {
  return x;
}
MBLM_DEVICE float value_of(BFloat16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}

// What is computed in as an element, rounded once.
template <class T>
struct Rounded {
  MBLM_DEVICE static T of(compute_t<T> x) { return x; }
};
template <>
struct Rounded<BFloat16> {
  MBLM_DEVICE static BFloat16 of(float x) {
#ifdef __CUDA_ARCH__
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
#else
    return BFloat16(x);
#endif
  }
};
template <class T>
MBLM_DEVICE T rounded(compute_t<T> x) {
  return Rounded<T>::of(x);
}

// N elements next to each other. Multiples of 16 bytes, at addresses that are multiples too, are
// loaded and stored 16 bytes at once.
template <class T, int N>
struct alignas(N * sizeof(T) % 16 == 0 ? 16 : alignof(T)) Pack {
  T values[N];
};
template <class T>
constexpr int kPackSize = int(16 / sizeof(T));

template <int N, class T>
MBLM_DEVICE Pack<T, N> load_pack(const T* from) {
  static_assert(N == 1 || N * sizeof(T) % 16 == 0);
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, class T>
MBLM_DEVICE void store_pack(T* to, const Pack<T, N>& pack) {
  static_assert(N == 1 || N * sizeof(T) % 16 == 0);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Whether packs can be loaded from an address; null is never loaded from.
inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Where one thread per item will do: a thread's first item and the distance to its next.
constexpr int kThreads = 256;
MBLM_DEVICE int64_t first_item() {
  return int64_t(blockIdx.x) * kThreads + threadIdx.x;
}
MBLM_DEVICE int64_t item_stride() {
  return int64_t(gridDim.x) * kThreads;
}
// Likewise of a warp.
constexpr int kWarps = kThreads / kWarp;
MBLM_DEVICE int64_t first_item_of_warp() {
  return int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}
MBLM_DEVICE int64_t warp_stride() {
  return int64_t(gridDim.x) * kWarps;
}

// The same sum in every lane of a warp.
template <class C>
MBLM_DEVICE C warp_sum(C value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// From here on, what kernels ahead on the stream wrote is there, and what they read may be written.
MBLM_DEVICE void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel on the stream begin, as soon as all blocks have said so.
MBLM_DEVICE void release_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes that are read once and never written while the kernel runs: they go past the first
// cache, and are loaded where it says so, not later.
template <class T>
MBLM_DEVICE T load_once(const T* from) {
  static_assert(sizeof(T) == 16);
#ifdef __CUDA_ARCH__
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(from));
  T value;
  memcpy(&value, &bits, sizeof(value));
  return value;
#else
  return *from;
#endif
}

// a / b for a >= 0, b > 0; in 32 bits where that will do, which is several times faster.
MBLM_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return int64_t(uint32_t(a) / uint32_t(b));
  return a / b;
}

}  // namespace mblm::cuda
