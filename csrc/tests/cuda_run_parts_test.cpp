// Tests of what a run on a GPU is made of, emulated, against the CPU's: steps of every stage,
// attention.
#include "cuda_check.h"
// The emulation comes before the sources.
#include <algorithm>
#include <cmath>

#include "cuda/decode_attention.cu"
#include "cuda/decode_product.cu"
#include "cuda/decode_product_mma.cu"
#include "cuda/decode_scan.cu"
#include "cuda/decode_slots.cu"
#include "cuda/stage_step.cpp"
#include "models.h"

using namespace mblm;
using test::Store;

const cpu::Worker& worker() {
  static cpu::Team team(1);
  static const cpu::Worker one{team, 0};
  return one;
}

// States of so many rows, one beside the other, in which numbers stand for what came before: of a
// Transformer, one position.
std::vector<cuda::TransformerRow> make_state(Store& store, const cpu::TransformerStage& stage,
                                             int64_t rows, int64_t capacity) {
  const int64_t of_row = stage.heads * capacity * stage.head_dim, half = stage.dim / 2;
  const int64_t layers = int64_t(stage.layers.size());
  cuda::TransformerRow row;
  row.capacity = capacity;
  row.keys = store.vector(layers * rows * of_row);
  row.values = store.vector(layers * rows * of_row);
  row.layer_stride = rows * of_row;
  row.delayed = store.vector(layers * 2 * rows * half);
  row.part_stride = rows * half;
  row.angles = capacity;
  row.cos = store.vector(capacity * (stage.head_dim / 2));
  row.sin = store.vector(capacity * (stage.head_dim / 2));
  std::vector<cuda::TransformerRow> state;
  for (int64_t i = 0; i < rows; ++i) {
    state.push_back(row);
    row.keys += of_row;
    row.values += of_row;
    row.delayed += half;
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
  std::vector<cuda::MambaRow> state;
  for (int64_t i = 0; i < rows; ++i) {
    state.push_back(row);
    row.ssm += ssm;
    row.window += window;
  }
  return state;
}

std::vector<cuda::MambaRow> make_state(Store& store, const cpu::Mamba1Stage& stage, int64_t rows,
                                       int64_t) {
  return make_mamba_state(store, stage, rows, stage.inner);
}

std::vector<cuda::MambaRow> make_state(Store& store, const cpu::Mamba2Stage& stage, int64_t rows,
                                       int64_t) {
  return make_mamba_state(store, stage, rows, stage.inner + 2 * stage.states);
}

// Largest difference relative to the largest value.
double relative_error(const float* got, const float* expected, int64_t size) {
  double error = 0, largest = 1e-3;
  for (int64_t i = 0; i < size; ++i) {
    if (!std::isfinite(got[i])) return INFINITY;
    error = std::max(error, std::fabs(double(got[i]) - expected[i]));
    largest = std::max(largest, std::fabs(double(expected[i])));
  }
  return error / largest;
}

// int8 weights are multiplied with numbers of 16 bits on a CPU, with floats on a GPU.
double tolerance(test::WeightType type) {
  return type == test::WeightType::kInt8 ? 2e-3 : 1e-4;
}

// The CPU's rows of such states, each with one position, in a page.
std::vector<cpu::TransformerRow> cpu_rows(cpu::TransformerStage& stage,
                                          std::vector<cuda::TransformerRow>& states) {
  stage.cos = states.front().cos;
  stage.sin = states.front().sin;
  std::vector<cpu::TransformerRow> rows;
  for (cuda::TransformerRow& state : states) {
    cpu::TransformerRow& row = rows.emplace_back();
    row.position = 1;
    row.keys = &state.keys;
    row.values = &state.values;
    row.layer_stride = state.layer_stride;
    row.head_stride = state.capacity * stage.head_dim;
    row.delayed = state.delayed;
    row.part_stride = state.part_stride;
  }
  return rows;
}

template <class Stage>
std::vector<cpu::MambaRow> cpu_rows(const Stage&, const std::vector<cuda::MambaRow>& states) {
  std::vector<cpu::MambaRow> rows;
  for (const cuda::MambaRow& state : states) {
    rows.push_back({1, state.ssm, state.window, state.ssm_stride, state.window_stride});
  }
  return rows;
}

void advance(std::vector<cpu::TransformerRow>& rows) {
  for (cpu::TransformerRow& row : rows) ++row.position;
}
void advance(const std::vector<cpu::MambaRow>&) {}

// Some positions in a row, of a stage on both devices from the same state.
template <class Stage>
void steps_equal_those_of_the_cpu(test::WeightType type, int64_t rows, const test::Sizes& sizes) {
  constexpr int64_t kSteps = 3, kCapacity = 6;
  Store weights(type), cpu_weights(type, test::Device::kCpu);
  Stage stage, cpu_stage;
  test::fill(weights, sizes, stage);
  test::fill(cpu_weights, sizes, cpu_stage);
  Store numbers;
  const float* inputs = numbers.vector(kSteps * rows * sizes.dim);
  const auto on_cpu = [&] {
    Store store;
    auto state = make_state(store, cpu_stage, rows, kCapacity);
    auto of_cpu = cpu_rows(cpu_stage, state);
    std::vector<float> outputs(inputs, inputs + kSteps * rows * sizes.dim);
    std::vector<float> scratch(cpu_stage.scratch_size(rows, kCapacity, 1));
    for (int64_t n = 0; n < kSteps; ++n) {
      float* const x = outputs.data() + n * rows * sizes.dim;
      cpu_stage.prefill(worker(), of_cpu, x, scratch.data());
      cpu_stage.normalize(x, rows, x);
      advance(of_cpu);
    }
    return outputs;
  }();
  const auto [on_gpu] = test::in_both_orders([&] {
    Store store;
    const auto state = make_state(store, stage, rows, kCapacity);
    std::vector<float> outputs(inputs, inputs + kSteps * rows * sizes.dim);
    std::vector<float> workspace(cuda::workspace_size(stage, rows, kCapacity), NAN);
    for (int64_t n = 0; n < kSteps; ++n) {
      const std::vector<int64_t> positions(rows, 1 + n);
      CHECK(!cuda::step(stage, state[0],
                        {rows,
                         positions.data(),
                         kCapacity,
                         outputs.data() + n * rows * sizes.dim,
                         workspace.data(),
                         {}},
                        nullptr));
    }
    return std::tuple(outputs);
  });
  const double error = relative_error(on_gpu.data(), on_cpu.data(), int64_t(on_cpu.size()));
  if (!(error < tolerance(type))) std::printf("error %g, %d rows\n", error, int(rows));
  CHECK(error < tolerance(type));
}

template <class Stage>
void steps() {
  const test::Sizes sizes = {24, 72, 3, 8, 20, 3, 2, 2}, odd = {24, 40, 4, 6, 7, 1, 3, 1},
                    wide = {32, 96, 1, 96, 40, 4, 35, 1};
  for (const auto type : test::kWeightTypes) {
    steps_equal_those_of_the_cpu<Stage>(type, 1, sizes);
    steps_equal_those_of_the_cpu<Stage>(type, 3, odd);
  }
  steps_equal_those_of_the_cpu<Stage>(test::WeightType::kBFloat16, 2, wide);
  for (const auto type : test::kWeightTypes) steps_equal_those_of_the_cpu<Stage>(type, 17, odd);
  steps_equal_those_of_the_cpu<Stage>(test::WeightType::kBFloat16, 12, wide);
}

// Attention to caches of several parts, against sums in double; a row alone has the same bits,
// however much room there is.
void attends_to_a_long_cache() {
  Store store;
  const int64_t heads = 2, dim = 40;
  const std::vector<int64_t> positions = {75, 63, 64, 4500, 190, -1};
  const int64_t rows = int64_t(positions.size()), capacity = 4600, width = heads * dim;
  cuda::CachedAttention in;
  in.rows = rows;
  in.heads = heads;
  in.head_dim = dim;
  in.positions = positions.data();
  in.limit = in.capacity = capacity;
  in.q = store.vector(rows * width);
  in.kv = store.vector(rows * 2 * width);
  in.keys = store.vector(rows * width * capacity, 3);
  in.values = store.vector(rows * width * capacity);
  const auto attend = [&] {
    auto out = test::unwritten<float>(in.rows * width);
    std::vector<float> partial(cuda::size_of_partial(in.rows * heads, dim, in.limit), NAN);
    std::vector<uint32_t> tickets(in.rows * heads);
    in.out = out.data();
    in.partial = partial.data();
    in.tickets = tickets.data();
    CHECK(!cuda::attend(in, nullptr));
    CHECK(std::count(tickets.begin(), tickets.end(), 0u) == in.rows * heads);
    return std::tuple(out);
  };
  const auto [out] = test::in_both_orders(attend);
  for (int64_t item = 0; item < rows * heads; ++item) {
    const int64_t row = item / heads, head = item % heads, position = positions[row];
    const float *keys = in.keys + item * capacity * dim,
                *values = in.values + item * capacity * dim;
    if (position < 0) {
      CHECK(out[item * dim] == 7.0f);
      continue;
    }
    const float* own = in.kv + (row * 2 * heads + head) * dim;
    CHECK(std::equal(own, own + dim, keys + position * dim));
    CHECK(std::equal(own + width, own + width + dim, values + position * dim));
    std::vector<double> sums(dim);
    double total = 0;
    for (int64_t at = 0; at <= position; ++at) {
      double score = 0;
      for (int64_t c = 0; c < dim; ++c) score += double(in.q[item * dim + c]) * keys[at * dim + c];
      const double weight = std::exp(score / std::sqrt(double(dim)));
      total += weight;
      for (int64_t c = 0; c < dim; ++c) sums[c] += weight * values[at * dim + c];
    }
    for (int64_t c = 0; c < dim; ++c) CHECK(test::close(out[item * dim + c], sums[c] / total));
  }
  in.rows = 1;
  in.limit = 80;
  const auto [alone] = attend();
  CHECK(std::equal(alone.begin(), alone.end(), out.begin()));
}

// The output product of a few rows computes attention to short caches, as its own kernel would.
void a_product_attends_for_itself(test::WeightType type, const std::vector<int64_t>& positions) {
  Store store(type);
  const int64_t heads = 11, dim = 40, width = heads * dim, capacity = 9, outputs = 21;
  const int64_t rows = int64_t(positions.size()), size = rows * width;
  cuda::CachedAttention attention;
  attention.rows = rows;
  attention.heads = heads;
  attention.head_dim = dim;
  attention.positions = positions.data();
  attention.limit = attention.capacity = capacity;
  attention.q = store.vector(size, 3);
  attention.kv = store.vector(2 * size, 3);
  attention.cos = store.vector(capacity * dim / 2);
  attention.sin = store.vector(capacity * dim / 2);
  const float *keys = store.vector(size * capacity), *values = store.vector(size * capacity);
  cuda::Product out;
  out.rows = rows;
  out.positions = positions.data();
  out.x_stride = width;
  out.matrix = store.matrix(outputs, width);
  CHECK(cuda::attends(out, attention));
  const auto run = [&](bool is_fused) {
    std::vector<float> k(keys, keys + size * capacity), v(values, values + size * capacity);
    std::vector<float> attended(size), result(rows * outputs, 7.0f);
    attention.keys = k.data();
    attention.values = v.data();
    attention.out = attended.data();
    out.x = is_fused ? nullptr : attended.data();
    out.attention = is_fused ? attention : cuda::CachedAttention();
    out.out = result.data();
    if (!is_fused) CHECK(!cuda::attend(attention, nullptr));
    CHECK(!cuda::multiply(out, nullptr));
    return std::tuple(k, v, result);
  };
  const auto [k, v, expected] = run(false);
  const auto fused = test::in_both_orders([&] { return run(true); });
  CHECK(std::get<0>(fused) == k && std::get<1>(fused) == v);
  CHECK(relative_error(std::get<2>(fused).data(), expected.data(), rows * outputs) < 1e-5);
  attention.limit = cuda::kShortCache + 1;
  CHECK(!cuda::attends(out, attention));
  attention.limit = capacity;
  attention.heads = 65 / rows + 1;  // more than warps of a cluster
  CHECK(!cuda::attends(out, attention));
  attention.heads = 1;
  out.rows = 5;  // more than a cluster reads the caches of
  CHECK(!cuda::attends(out, attention));
}

// As on the CPU, a position whose score overflows has no weight, wherever it lies.
void positions_of_infinitely_low_scores_have_no_weight() {
  const int64_t position = 70, capacity = 80, dim = 2;
  const std::vector<float> q(dim, 1), kv = {0, 0, 3, 5};
  std::vector<float> keys(capacity * dim, -INFINITY), values(capacity * dim, 1), out(dim);
  std::vector<float> partial(cuda::size_of_partial(1, dim, capacity), NAN);
  std::vector<uint32_t> tickets(1);
  keys[66 * dim] = keys[66 * dim + 1] = 0;
  cuda::CachedAttention in;
  in.rows = in.heads = 1;
  in.head_dim = dim;
  in.positions = &position;
  in.limit = in.capacity = capacity;
  in.q = q.data();
  in.kv = kv.data();
  in.keys = keys.data();
  in.values = values.data();
  in.out = out.data();
  in.partial = partial.data();
  in.tickets = tickets.data();
  CHECK(!cuda::attend(in, nullptr));
  CHECK(test::close(out[0], 2) && test::close(out[1], 3));
}

void no_position_beyond_the_cache_is_written() {
  Store store;
  const int64_t positions[] = {4, -1};
  cuda::CachedAttention in;
  in.rows = 2;
  in.heads = 1;
  in.head_dim = 8;
  in.positions = positions;
  in.limit = in.capacity = 4;
  in.q = store.vector(16);
  in.kv = store.vector(32);
  std::vector<float> keys(64, 7.0f), values = keys, out(16, 7.0f);
  in.keys = keys.data();
  in.values = values.data();
  in.out = out.data();
  CHECK(!cuda::attend(in, nullptr));
  for (const auto* untouched : {&keys, &values, &out}) {
    for (const float value : *untouched) CHECK(value == 7.0f);
  }
}

int main() {
  steps<cpu::TransformerStage>();
  steps<cpu::Mamba1Stage>();
  steps<cpu::Mamba2Stage>();
  attends_to_a_long_cache();
  positions_of_infinitely_low_scores_have_no_weight();
  for (const auto type : {test::WeightType::kBFloat16, test::WeightType::kInt8}) {
    for (const int64_t position : {0, 3, 8, -1}) a_product_attends_for_itself(type, {position});
    a_product_attends_for_itself(type, {3, -1});
    a_product_attends_for_itself(type, {8, 0, -1, 5});
  }
  no_position_beyond_the_cache_is_written();
  return test::result();
}
