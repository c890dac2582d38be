// A matrix of weights as decoding reads it, and its product with a few rows of activations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "cpu/team.h"

namespace mblm::cpu {

enum class WeightType { kFloat32, kBFloat16, kInt8 };

inline int64_t size_of(WeightType type) {
  return type == WeightType::kFloat32 ? 4 : type == WeightType::kBFloat16 ? 2 : 1;
}

// On a CPU, int8 weights lie in tiles of so many outputs and inputs, filled up with zeros: the
// lanes of a vector are outputs, whose sums need no adding up, while the weights are read in order.
constexpr int64_t kTileOutputs = 32, kTileInputs = 4;

struct Matrix {
  int64_t outputs = 0, inputs = 0;
  WeightType type = WeightType::kFloat32;
  // (outputs, inputs), or tiles, of which there are ceil(outputs / kTileOutputs) by
  // ceil(inputs / kTileInputs): (.., .., kTileOutputs, kTileInputs).
  const void* weight = nullptr;
  const float* scale = nullptr;  // (outputs), of int8 only
  const float* bias = nullptr;   // (outputs), or null

  int64_t weights() const { return outputs * inputs; }
};

// Floats that each thread's worker prepares to multiply so many rows.
int64_t prepared_floats(const Matrix& matrix, int64_t rows);

// Of all matrices of some layers.
template <class Layer>
int64_t weights_of(std::span<const Layer> layers) {
  int64_t count = 0;
  for (const Layer& layer : layers) {
    for (const Matrix* matrix : layer.matrices()) count += matrix->weights();
  }
  return count;
}
template <class Layer>
int64_t prepared_floats(std::span<const Layer> layers, int64_t rows) {
  int64_t most = 0;
  for (const Layer& layer : layers) {
    for (const Matrix* matrix : layer.matrices()) {
      most = std::max(most, prepared_floats(*matrix, rows));
    }
  }
  return most;
}

// Some of the outputs of a matrix. The first begins a tile.
Matrix outputs_of(const Matrix& matrix, int64_t begin, int64_t count);

// What becomes of a product.
enum class Then { kStore, kGelu };

// out (rows, outputs) = then(x (rows, inputs) @ weight.T + bias + residual), its columns shared by
// the team. residual (rows, outputs) is null or may be out. Every weight is read once. A row is
// summed in the same order however many rows there are.
void multiply(const Worker& worker, const Matrix& matrix, const float* x, int64_t rows, float* out,
              Then then = Then::kStore, const float* residual = nullptr);

// One of several products of the same rows.
struct Product {
  Matrix matrix;
  float* out;  // (rows, matrix.outputs)
};

// Each out = x (rows, inputs) @ weight.T + bias, for matrices of one type.
void multiply(const Worker& worker, std::span<const Product> products, const float* x,
              int64_t rows);

// The same, all of it the calling thread's.
void multiply_alone(const Worker& worker, std::span<const Product> products, const float* x,
                    int64_t rows, Then then = Then::kStore);

// Whether so many threads have equal parts of its outputs, one behind the other.
bool has_even_parts(int64_t threads, const Matrix& matrix);

// Asks for values of which other threads have computed a part: one after the other, they would come
// from other cores' caches as slowly as memory does.
void ask_for(const Worker& worker, const float* values, int64_t count);

// Waits for the team. Meanwhile, asks for weights that are multiplied after that, if a kernel reads
// them in order; null for none.
void wait_for(const Worker& worker, const Matrix* next);

}  // namespace mblm::cpu
