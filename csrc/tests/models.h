// Stages with random weights of every type.
#pragma once

#include <deque>
#include <vector>

#include "check.h"
#include "cpu/mamba1_stage.h"
#include "cpu/mamba2_stage.h"
#include "cpu/transformer_stage.h"
#include "pack.h"

namespace mblm::test {

using cpu::WeightType;

constexpr WeightType kWeightTypes[] = {WeightType::kFloat32, WeightType::kBFloat16,
                                       WeightType::kInt8};

struct Sizes {
  int64_t dim, inner, heads, head_dim, states, taps, rank, layers;
};

enum class Device { kCpu, kGpu };

// Numbers, weights and states, which live as long as this. Asked for the same one after the other,
// one for each device has the same numbers, in the order that the device reads.
class Store {
 public:
  explicit Store(WeightType type = WeightType::kFloat32, Device device = Device::kGpu)
      : type_(type), device_(device) {}

  float* vector(int64_t size, double scale = 1) {
    auto& values = floats_.emplace_back(numbers_.vector<float>(size));
    for (float& value : values) value = float(value * scale);
    return values.data();
  }
  float* zeros(int64_t size) { return floats_.emplace_back(size, 0.0f).data(); }

  cpu::Matrix matrix(int64_t outputs, int64_t inputs, bool has_bias = true) {
    cpu::Matrix matrix;
    matrix.outputs = outputs;
    matrix.inputs = inputs;
    matrix.type = type_;
    const int64_t size = outputs * inputs;
    switch (type_) {
      case WeightType::kFloat32:
        matrix.weight = vector(size, 0.3);
        break;
      case WeightType::kBFloat16: {
        auto& values = halves_.emplace_back(size);
        for (auto& value : values) value = cpu::BFloat16(0.3 * numbers_.next());
        matrix.weight = values.data();
        break;
      }
      case WeightType::kInt8: {
        auto& values = bytes_.emplace_back(size);
        for (auto& value : values) value = int8_t(127 * numbers_.next());
        if (device_ == Device::kCpu) values = pack(values, outputs, inputs);
        matrix.weight = values.data();
        float* scale = vector(outputs);
        for (int64_t i = 0; i < outputs; ++i) scale[i] = (scale[i] + 2) * 0.0015f;
        matrix.scale = scale;
      }
    }
    if (has_bias) matrix.bias = vector(outputs);
    return matrix;
  }

 private:
  WeightType type_;
  Device device_;
  Numbers numbers_;
  std::deque<std::vector<float>> floats_;
  std::deque<std::vector<cpu::BFloat16>> halves_;
  std::deque<std::vector<int8_t>> bytes_;
};

inline void fill(Store& store, const Sizes& sizes, cpu::TransformerStage& stage) {
  stage.dim = sizes.dim;
  stage.heads = sizes.heads;
  stage.head_dim = sizes.head_dim;
  stage.norm = store.vector(sizes.dim);
  const int64_t width = sizes.heads * sizes.head_dim;
  for (int64_t layer = 0; layer < sizes.layers; ++layer) {
    stage.layers.push_back({store.vector(sizes.dim), store.matrix(width, sizes.dim, false),
                            store.matrix(2 * width, sizes.dim, false),
                            store.matrix(sizes.dim, width, false), store.vector(sizes.dim),
                            store.matrix(sizes.inner, sizes.dim),
                            store.matrix(sizes.dim, sizes.inner)});
  }
}

inline void fill(Store& store, const Sizes& sizes, cpu::Mamba1Stage& stage) {
  stage.dim = sizes.dim;
  stage.inner = sizes.inner;
  stage.states = sizes.states;
  stage.rank = sizes.rank;
  stage.taps = sizes.taps;
  for (int64_t index = 0; index < sizes.layers; ++index) {
    cpu::Mamba1Layer layer{};
    layer.norm = store.vector(sizes.dim);
    layer.eps = 1e-5f;
    layer.in = store.matrix(2 * sizes.inner, sizes.dim);
    layer.x = store.matrix(sizes.rank + 2 * sizes.states, sizes.inner);
    layer.dt = store.matrix(sizes.inner, sizes.rank);
    layer.out = store.matrix(sizes.dim, sizes.inner);
    layer.conv = store.vector(sizes.inner * sizes.taps);
    layer.conv_bias = store.vector(sizes.inner);
    layer.rates = store.vector(sizes.inner * sizes.states, 0.1);
    layer.direct = store.vector(sizes.inner);
    stage.layers.push_back(layer);
  }
}

inline void fill(Store& store, const Sizes& sizes, cpu::Mamba2Stage& stage) {
  stage.dim = sizes.dim;
  stage.inner = sizes.inner;
  stage.states = sizes.states;
  stage.heads = sizes.heads;
  stage.taps = sizes.taps;
  stage.eps = 1e-5f;
  stage.norm = store.vector(sizes.dim);
  const int64_t channels = sizes.inner + 2 * sizes.states;
  for (int64_t index = 0; index < sizes.layers; ++index) {
    cpu::Mamba2Layer layer{};
    layer.norm = store.vector(sizes.dim);
    layer.in = store.matrix(sizes.inner + channels + sizes.heads, sizes.dim);
    layer.out = store.matrix(sizes.dim, sizes.inner);
    layer.conv = store.vector(channels * sizes.taps);
    layer.conv_bias = store.vector(channels);
    layer.dt_bias = store.vector(sizes.heads);
    layer.rates = store.vector(sizes.heads, 0.1);
    layer.direct = store.vector(sizes.heads);
    layer.gated_norm = store.vector(sizes.inner);
    stage.layers.push_back(layer);
  }
}

}  // namespace mblm::test
