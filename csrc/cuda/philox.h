// The random numbers of torch's generators on a GPU: Philox4x32-10, a counter that is encrypted.
// Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MBLM_ANYWHERE __host__ __device__ __forceinline__
#else
#define MBLM_ANYWHERE inline
#endif

namespace mblm::cuda {

struct FourWords {
  uint32_t words[4];
};

MBLM_ANYWHERE FourWords philox(FourWords counter, uint64_t seed) {
  uint32_t key[] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(0xd2511f53) * counter.words[0],
                   second = uint64_t(0xcd9e8d57) * counter.words[2];
    counter = {{uint32_t(second >> 32) ^ counter.words[1] ^ key[0], uint32_t(second),
                uint32_t(first >> 32) ^ counter.words[3] ^ key[1], uint32_t(first)}};
    key[0] += 0x9e3779b9;
    key[1] += 0xbb67ae85;
  }
  return counter;
}

// The index-th number that uniform_(0, 1) draws from a generator at this offset with so many
// threads: each draws four at once, for places that are `threads` apart.
MBLM_ANYWHERE float uniform_number(uint64_t seed, uint64_t offset, uint32_t threads,
                                   uint32_t index) {
  const uint32_t turn = index / threads, thread = index % threads;
  const uint64_t count = offset / 4 + turn / 4;
  const FourWords drawn = philox({{uint32_t(count), uint32_t(count >> 32), thread, 0}}, seed);
  const uint32_t* const words = drawn.words;  // an index would put them in memory
  const uint32_t word = turn % 4 == 0   ? words[0]
                        : turn % 4 == 1 ? words[1]
                        : turn % 4 == 2 ? words[2]
                                        : words[3];
  const float number = float(word) * 0x1p-32f + 0x1p-33f;  // in (0, 1]
  return number == 1 ? 0 : number;
}

}  // namespace mblm::cuda
