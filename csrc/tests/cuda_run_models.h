// Stages with random weights of every type, and caches for them, for the tests of runs on a GPU.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "check.h"
#include "cpu/mamba1_stage.h"
#include "cpu/mamba2_stage.h"
#include "cpu/run.h"
#include "cpu/transformer_stage.h"
#include "cuda/stage_step.h"
#include "pack.h"

namespace mblm::test {

using cpu::WeightType;

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
  int64_t* integers(int64_t size) { return integers_.emplace_back(size, 0).data(); }

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
  std::deque<std::vector<int64_t>> integers_;
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

// A cache of so many rows, laid out as the package's are, in which `filled` numbers stand for what
// came before: of a Transformer, one position.
inline std::vector<cuda::TransformerRow> make_state(Store& store,
                                                    const cpu::TransformerStage& stage,
                                                    int64_t rows, int64_t capacity,
                                                    bool has_rotary = true) {
  const int64_t of_row = stage.heads * capacity * stage.head_dim, half = stage.dim / 2;
  const int64_t layers = int64_t(stage.layers.size());
  cuda::TransformerRow row;
  row.capacity = capacity;
  row.keys = store.vector(layers * rows * of_row);
  row.values = store.vector(layers * rows * of_row);
  row.layer_stride = rows * of_row;
  row.delayed = store.vector(layers * 2 * rows * half);
  row.part_stride = rows * half;
  float* start = store.zeros(layers * 2 * rows * half);
  std::copy_n(row.delayed, layers * 2 * rows * half, start);
  row.start_delayed = start;
  if (has_rotary) {
    row.angles = capacity;
    row.cos = store.vector(capacity * (stage.head_dim / 2));
    row.sin = store.vector(capacity * (stage.head_dim / 2));
  }
  std::vector<cuda::TransformerRow> state;
  for (int64_t i = 0; i < rows; ++i) {
    state.push_back(row);
    row.keys += of_row;
    row.values += of_row;
    row.delayed += half;
    row.start_delayed += half;
  }
  return state;
}

template <class Stage>
std::vector<cuda::MambaRow> make_mamba_state(Store& store, const Stage& stage, int64_t rows,
                                             int64_t channels) {
  const int64_t layers = int64_t(stage.layers.size());
  const int64_t ssm = stage.inner * stage.states, window = (stage.taps - 1) * channels;
  cuda::MambaRow row;
  row.ssm = store.vector(layers * rows * ssm);
  row.window = store.vector(layers * rows * window);
  row.ssm_stride = rows * ssm;
  row.window_stride = rows * window;
  float *start_ssm = store.zeros(layers * rows * ssm),
        *start_window = store.zeros(layers * rows * window);
  std::copy_n(row.ssm, layers * rows * ssm, start_ssm);
  std::copy_n(row.window, layers * rows * window, start_window);
  row.start_ssm = start_ssm;
  row.start_window = start_window;
  std::vector<cuda::MambaRow> state;
  for (int64_t i = 0; i < rows; ++i) {
    state.push_back(row);
    row.ssm += ssm;
    row.window += window;
    row.start_ssm += ssm;
    row.start_window += window;
  }
  return state;
}

inline std::vector<cuda::MambaRow> make_state(Store& store, const cpu::Mamba1Stage& stage,
                                              int64_t rows, int64_t) {
  return make_mamba_state(store, stage, rows, stage.inner);
}

inline std::vector<cuda::MambaRow> make_state(Store& store, const cpu::Mamba2Stage& stage,
                                              int64_t rows, int64_t) {
  return make_mamba_state(store, stage, rows, stage.inner + 2 * stage.states);
}

// Largest difference relative to the largest value.
inline double relative_error(const float* got, const float* expected, int64_t size) {
  double error = 0, largest = 1e-3;
  for (int64_t i = 0; i < size; ++i) {
    if (!std::isfinite(got[i])) return INFINITY;
    error = std::max(error, std::fabs(double(got[i]) - expected[i]));
    largest = std::max(largest, std::fabs(double(expected[i])));
  }
  return error / largest;
}

// int8 weights are multiplied with numbers of 16 bits on a CPU, with floats on a GPU.
inline double tolerance(WeightType type) {
  return type == WeightType::kInt8 ? 2e-3 : 1e-4;
}

constexpr WeightType kWeightTypes[] = {WeightType::kFloat32, WeightType::kBFloat16,
                                       WeightType::kInt8};

}  // namespace mblm::test
