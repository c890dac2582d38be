// Products of packed weights and a few rows: see matrix.h.
#include "cpu/matrix.h"

#include "cpu/bfloat16.h"
#include "cpu/dot.h"
#include "cpu/kernel.h"
#include "cpu/matrix_kernels.h"
#include "cpu/vector_math.h"

namespace mblm::cpu {
namespace {

// Bytes of weights that a thread takes at a time: long streams, and yet even shares.
constexpr int64_t kPartBytes = 1 << 16;
// Bytes of weights that stay in the first cache while all rows are multiplied with them.
constexpr int64_t kBlockBytes = 1 << 14;
constexpr int64_t kMaxBlock = 64;

template <class W>
void dots(const void* weight, const float* x, int64_t n, float* sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    sums[i] = dot<float>(x, static_cast<const W*>(weight) + i * n, n);
  }
}

MBLM_CLONES void apply_gelu(float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = gelu(values[i]);
}

int64_t bytes_of(WeightType type) {
  return type == WeightType::kFloat32 ? 4 : type == WeightType::kBFloat16 ? 2 : 1;
}

Dots dots_of(WeightType type) {
  static const MatrixKernels best = matrix_kernels().front();
  return type == WeightType::kFloat32    ? best.float32
         : type == WeightType::kBFloat16 ? best.bfloat16
                                         : best.int8;
}

}  // namespace

const std::vector<MatrixKernels>& matrix_kernels() {
  static const std::vector<MatrixKernels> kernels = [] {
    std::vector<MatrixKernels> list;
    add_avx512_kernels(list);
    add_avx2_kernels(list);
    list.push_back({"baseline", dots<float>, dots<BFloat16>, dots<int8_t>});
    return list;
  }();
  return kernels;
}

void multiply(const Worker& worker, int64_t loop, const Matrix& matrix, const float* x,
              int64_t rows, float* out, Then then, const float* residual) {
  const Dots dots = dots_of(matrix.type);
  const int64_t outputs = matrix.outputs, bytes = matrix.inputs * bytes_of(matrix.type);
  // At least 16 columns, so that threads do not write to one cache line.
  const int64_t part = std::max<int64_t>(16, kPartBytes / bytes / 16 * 16);
  const int64_t block =
      rows == 1 ? kMaxBlock : std::clamp<int64_t>(kBlockBytes / bytes, 4, kMaxBlock);
  worker.team.share(loop, outputs, part, [&](int64_t begin, int64_t end) {
    float sums[kMaxBlock];
    for (int64_t first = begin; first < end; first += block) {
      const int64_t count = std::min(block, end - first);
      const char* weight = static_cast<const char*>(matrix.weight) + first * bytes;
      for (int64_t row = 0; row < rows; ++row) {
        dots(weight, x + row * matrix.inputs, matrix.inputs, sums, count);
        float* to = out + row * outputs + first;
        const float* added = residual ? residual + row * outputs + first : nullptr;
        for (int64_t i = 0; i < count; ++i) {
          float value = matrix.scale ? sums[i] * matrix.scale[first + i] : sums[i];
          if (matrix.bias) value += matrix.bias[first + i];
          to[i] = added ? value + added[i] : value;
        }
        if (then == Then::kGelu) apply_gelu(to, count);
      }
    }
  });
}

}  // namespace mblm::cpu
