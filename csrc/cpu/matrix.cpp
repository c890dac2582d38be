// Products of packed weights and a few rows: see matrix.h.
#include "cpu/matrix.h"

#include "cpu/bfloat16.h"
#include "cpu/dot.h"
#include "cpu/vector_math.h"

namespace mblm::cpu {
namespace {

// Bytes of weights that a thread takes at a time: long streams, and yet even shares.
constexpr int64_t kPartBytes = 1 << 16;

struct Product {
  const Matrix& matrix;
  const float* x;
  int64_t rows;
  float* out;
  Then then;
  const float* residual;
};

template <class W>
MBLM_INLINE void columns(const Product& p, int64_t begin, int64_t end) {
  const Matrix& m = p.matrix;
  for (int64_t column = begin; column < end; ++column) {
    const W* weight = static_cast<const W*>(m.weight) + column * m.inputs;
    const float scale = m.scale ? m.scale[column] : 1.f;
    const float bias = m.bias ? m.bias[column] : 0.f;
    for (int64_t row = 0; row < p.rows; ++row) {
      const float sum = dot<float>(p.x + row * m.inputs, weight, m.inputs);
      const float residual = p.residual ? p.residual[row * m.outputs + column] : 0.f;
      p.out[row * m.outputs + column] = sum * scale + bias + residual;
    }
  }
  for (int64_t row = 0; p.then == Then::kGelu && row < p.rows; ++row) {
    float* out = p.out + row * m.outputs;
    for (int64_t column = begin; column < end; ++column) out[column] = gelu(out[column]);
  }
}

MBLM_CLONES void columns_float32(const Product& p, int64_t begin, int64_t end) {
  columns<float>(p, begin, end);
}

MBLM_CLONES void columns_bfloat16(const Product& p, int64_t begin, int64_t end) {
  columns<BFloat16>(p, begin, end);
}

MBLM_CLONES void columns_int8(const Product& p, int64_t begin, int64_t end) {
  columns<int8_t>(p, begin, end);
}

int64_t bytes(WeightType type) {
  return type == WeightType::kFloat32 ? 4 : type == WeightType::kBFloat16 ? 2 : 1;
}

}  // namespace

void multiply(const Worker& worker, int64_t loop, const Matrix& matrix, const float* x,
              int64_t rows, float* out, Then then, const float* residual) {
  const Product product{matrix, x, rows, out, then, residual};
  // At least 16 columns, so that threads do not write to one cache line.
  const int64_t part =
      std::max<int64_t>(16, kPartBytes / (matrix.inputs * bytes(matrix.type)) / 16 * 16);
  worker.team.share(loop, matrix.outputs, part, [&](int64_t begin, int64_t end) {
    switch (matrix.type) {
      case WeightType::kFloat32:
        return columns_float32(product, begin, end);
      case WeightType::kBFloat16:
        return columns_bfloat16(product, begin, end);
      case WeightType::kInt8:
        return columns_int8(product, begin, end);
    }
  });
}

}  // namespace mblm::cpu
