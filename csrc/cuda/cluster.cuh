// Clusters: blocks that run at the same time and read each other's shared memory. Before compute
// capability 9.0, and emulated, each block is a cluster of its own.
#pragma once

#include "cuda/kernel.cuh"

namespace mblm::cuda {

constexpr int kMostInCluster = 8;  // on every device that has clusters

MBLM_DEVICE int cluster_size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return int(size);
#else
  return 1;
#endif
}

MBLM_DEVICE int cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}

// All threads of a cluster have come here; what they wrote to shared memory is seen.
MBLM_DEVICE void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive;" ::: "memory");
  asm volatile("barrier.cluster.wait;" ::: "memory");
#else
  __syncthreads();
#endif
}

// What another block of the cluster has at the same place of its shared memory.
MBLM_DEVICE float load_of_rank(const float* shared, [[maybe_unused]] int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t own = uint32_t(__cvta_generic_to_shared(shared));
  uint32_t address;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
#else
  return *shared;
#endif
}

MBLM_DEVICE void store_to_rank(float* shared, [[maybe_unused]] int rank, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t own = uint32_t(__cvta_generic_to_shared(shared));
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#else
  *shared = value;
#endif
}

}  // namespace mblm::cuda
