// The inner loop of matrix.h, once per instruction set; the best that the machine has is used.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/matrix.h"

namespace mblm::cpu {

// sums[i] = x . weight[i] for rows i < count of a weight (.., n) of the kernel's type.
using Dots = void (*)(const void* weight, const float* x, int64_t n, float* sums, int64_t count);

struct MatrixKernels {
  const char* name;
  Dots float32, bfloat16, int8;
};

// Those that run on this machine, the best first; the last is for every machine.
const std::vector<MatrixKernels>& matrix_kernels();

// Adds its kernels if the machine has the instructions.
void add_avx512_kernels(std::vector<MatrixKernels>& kernels);
void add_avx2_kernels(std::vector<MatrixKernels>& kernels);

}  // namespace mblm::cpu
