// Tests of where the chunks of ssd lie on a GPU. What its kernels compute is tested by tests/ops.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/ssd_chunks.cuh"

using namespace mblm;

// Tensors may have more elements than 32 bits count: only what lies inside a chunk is counted in
// them.
int main() {
  cpu::BFloat16 first{};
  cuda::SsdInput<cpu::BFloat16> in{};
  in.rows = 64;
  in.heads = 128;
  in.head_dim = 64;
  in.states = 256;
  in.chunk_size = 256;
  in.chunks = 4096;
  in.length = in.chunks * in.chunk_size;
  in.x = &first;
  const int64_t unit = in.rows * in.chunks - 1;  // the last chunk of the last row
  const cuda::Chunk<cpu::BFloat16> own(in, unit, 127);
  const int64_t positions = in.rows * in.length, chunks = in.rows * in.chunks;
  CHECK(own.state(63, 255) == chunks * 128 * 64 * 256 - 1);
  CHECK(own.pair(255, 255) == chunks * 256 * 256 - 1);
  CHECK(own.at(255) == positions * 128 - 1);
  CHECK(own.place(&first, 255, 63) - &first == positions * 128 * 64 - 1);
  return test::result();
}
