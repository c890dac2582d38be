// Tests of the GPU's products, emulated, against sums in double.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/decode_product.cu"
#include "cuda/decode_product_mma.cu"
#include "models.h"

using namespace mblm;
using test::Store;
using test::WeightType;

struct Case {
  int64_t rows, inputs, outputs;
  int64_t second = 0;  // outputs of a second matrix
  int64_t unread = 0;  // of x, behind each row
  bool has_norm = false, has_delayed = false, has_residual = false;
};

double weight_of(const cpu::Matrix& matrix, int64_t index) {
  switch (matrix.type) {
    case WeightType::kFloat32:
      return static_cast<const float*>(matrix.weight)[index];
    case WeightType::kBFloat16:
      return double(float(static_cast<const cpu::BFloat16*>(matrix.weight)[index]));
    default:
      return static_cast<const int8_t*>(matrix.weight)[index];
  }
}

double input_of(const cuda::Product& in, int64_t row, int64_t k) {
  const int64_t half = in.matrix.inputs / 2, kept = in.matrix.inputs - half;
  return in.delayed && k >= kept ? in.delayed[row * half + k - kept] : in.x[row * in.x_stride + k];
}

// One entry is as close to the sum of what the rounded weights give as a sum in float is.
void check_entry(const cuda::Product& in, const cpu::Matrix& matrix, int64_t row, int64_t column,
                 float got) {
  const int64_t inputs = matrix.inputs;
  double sum = 0, size = 0, squares = 0;
  for (int64_t k = 0; k < inputs; ++k) {
    const double x = input_of(in, row, k), gain = in.norm.weight ? in.norm.weight[k] : 1;
    const double term = x * gain * weight_of(matrix, column * inputs + k);
    squares += x * x;
    sum += term;
    size += std::fabs(term);
  }
  double factor = matrix.scale ? matrix.scale[column] : 1;
  if (in.norm.weight) factor /= std::sqrt(squares / double(inputs) + in.norm.eps);
  double expected = sum * factor + (matrix.bias ? matrix.bias[column] : 0);
  if (in.residual) expected += in.residual[row * matrix.outputs + column];
  const double tolerance = 1e-5 * size * factor + 1e-6 * (1 + std::fabs(expected));
  if (!(std::fabs(got - expected) <= tolerance)) {
    std::printf("row %d of %d, column %d of %d, %d inputs: got %g, expected %g\n", int(row),
                int(in.rows), int(column), int(matrix.outputs), int(inputs), got, expected);
    ++test::failures;
  }
}

std::vector<float> row_of(const std::vector<float>& all, int64_t row, int64_t width) {
  return {all.begin() + row * width, all.begin() + (row + 1) * width};
}

void equals_sums_in_double(WeightType type, const Case& of) {
  Store store(type);
  cuda::Product in;
  in.rows = of.rows;
  in.matrix = store.matrix(of.outputs, of.inputs);
  if (of.second) in.second = store.matrix(of.second, of.inputs, false);
  in.x_stride = of.inputs + of.unread;
  in.x = store.vector(of.rows * in.x_stride, 3);
  if (of.has_norm) in.norm = {store.vector(of.inputs), 1e-5f, false};
  if (of.has_delayed) in.delayed = store.vector(of.rows * (of.inputs / 2));
  if (of.has_residual) in.residual = store.vector(of.rows * of.outputs);
  const auto run = [&](cuda::Product product) {
    return test::in_both_orders([&] {
      auto out = test::unwritten<float>(product.rows * of.outputs);
      auto second = test::unwritten<float>(product.rows * of.second);
      auto kept = test::unwritten<float>(product.rows * (of.outputs / 2));
      product.out = out.data();
      product.out_second = second.data();
      if (product.residual) product.keep = kept.data();
      CHECK(!cuda::multiply(product, nullptr));
      return std::tuple(out, second, kept);
    });
  };
  const auto [out, second, kept] = run(in);
  for (int64_t row = 0; row < of.rows; ++row) {
    for (int64_t column = 0; column < of.outputs; ++column) {
      check_entry(in, in.matrix, row, column, out[row * of.outputs + column]);
    }
    for (int64_t column = 0; column < of.second; ++column) {
      check_entry(in, in.second, row, column, second[row * of.second + column]);
    }
    if (!of.has_residual) continue;
    const float* last = in.residual + (row + 1) * of.outputs - of.outputs / 2;
    CHECK(std::equal(last, last + of.outputs / 2, kept.data() + row * (of.outputs / 2)));
  }
  // The last rows, as few as take the same way, have the same bits.
  const bool is_of_many = of.rows > cuda::kFewRows && type != WeightType::kFloat32;
  const int64_t few = is_of_many ? cuda::kFewRows + 1 : 1;
  const int64_t skipped = of.rows - few;
  in.rows = few;
  in.x += skipped * in.x_stride;
  if (in.delayed) in.delayed += skipped * (of.inputs / 2);
  if (in.residual) in.residual += skipped * of.outputs;
  const auto alone = std::get<0>(run(in));
  CHECK(test::same_bits(row_of(alone, few - 1, of.outputs), row_of(out, of.rows - 1, of.outputs)));
}

// Squares are added up in each split of the inputs, and then split by split, as in clusters, where
// each block has a split. One large square among them would swallow a lane's later ones.
void squares_are_added_split_by_split() {
  constexpr int64_t kRows = 9, kInputs = 8192, kSplits = 8, kChunk = 128, kOutputs = 8;
  std::vector<float> x(kRows * kInputs), gains(kInputs, 1.0f), out(kRows * kOutputs);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t k = 0; k < kInputs; k += kChunk) {
      for (int i = 0; i < 4; ++i) x[row * kInputs + k + i] = 0.5f;  // a quad of one lane: 1
    }
    for (int i = 0; i < 4; ++i) x[row * kInputs + i] = i ? 0.0f : 4096.0f;
  }
  std::vector<cpu::BFloat16> weights(kOutputs * kInputs, cpu::BFloat16(0.0f));
  for (int64_t column = 0; column < kOutputs; ++column) {
    weights[column * kInputs] = cpu::BFloat16(1.0f);
  }
  cuda::Product in;
  in.rows = kRows;
  in.matrix = {kOutputs, kInputs, WeightType::kBFloat16, weights.data()};
  in.x = x.data();
  in.x_stride = kInputs;
  in.norm = {gains.data(), 0.0f, false};
  in.out = out.data();
  CHECK(!cuda::multiply(in, nullptr));
  const double later = double(kInputs / kChunk / kSplits * (kSplits - 1));
  const double expected = 4096 / std::sqrt((4096.0 * 4096.0 + later) / kInputs);
  for (const float value : out) CHECK(std::fabs(value / expected - 1) < 5e-7);
}

void products(WeightType type) {
  for (const int64_t rows : {1, 2, 8, 9, 32, 33, 65}) {
    equals_sums_in_double(type, {rows, 96, 21});
    equals_sums_in_double(type, {rows, 40, 16});
  }
  equals_sums_in_double(type, {9, 8, 1});
  // More of the inputs than are loaded ahead, in one split and in several.
  for (const int64_t rows : {1, 3, 17}) equals_sums_in_double(type, {rows, 4096 + 16, 19});
  equals_sums_in_double(type, {11, 2504, 5});
  // Wide blocks, of one matrix and of two whose border is inside one.
  equals_sums_in_double(type, {16, 64, 1030});
  for (const int64_t rows : {1, 4}) equals_sums_in_double(type, {rows, 64, 2041, 20});
  equals_sums_in_double(type, {13, 80, 1000, 41});
  equals_sums_in_double(type, {9, 80, 7, 9});
  // All that is done beside a product.
  for (const int64_t inputs : {64, 1056, 72}) {
    equals_sums_in_double(type, {20, inputs, 18, 6, 0, true, true});
    equals_sums_in_double(type, {1, inputs, 18, 6, 0, true, true});
    equals_sums_in_double(type, {7, inputs, 18, 0, 4, true, true, true});
    equals_sums_in_double(type, {20, inputs, 18, 0, 12, true, false, true});
    equals_sums_in_double(type, {64, inputs, 34, 0, 4, true, true, true});
  }
}

// They would be read beyond their ends, or where they do not begin.
void what_is_not_whole_packs_is_refused(WeightType type) {
  Store store(type);
  std::vector<float> out(8);
  cuda::Product in;
  in.rows = 1;
  in.x = store.vector(64);
  in.out = out.data();
  for (const int64_t inputs : {0, 1, 12}) {
    in.matrix = store.matrix(8, inputs);
    in.x_stride = inputs;
    CHECK(cuda::multiply(in, nullptr) != nullptr);
  }
  in.matrix = store.matrix(8, 16);
  in.x_stride = 16;
  CHECK(!cuda::multiply(in, nullptr));
  ++in.x;
  CHECK(cuda::multiply(in, nullptr) != nullptr);
}

// Also the squares of so many inputs that a thread loads some of a row together, of eight rows one
// after the other.
void each_of_eight_rows_has_the_bits_that_it_has_alone(WeightType type) {
  const int64_t rows = cuda::kFewRows, inputs = 4 * 2048 + 8;
  Store store(type);
  cuda::Product in;
  in.rows = rows;
  in.matrix = store.matrix(1, inputs);
  in.x = store.vector(rows * inputs, 3);
  in.x_stride = inputs;
  in.norm = {store.vector(inputs), 1e-5f, false};
  std::vector<float> out(rows), alone(rows);
  in.out = out.data();
  CHECK(!cuda::multiply(in, nullptr));
  in.rows = 1;
  for (int64_t row = 0; row < rows; ++row, in.x += inputs) {
    in.out = alone.data() + row;
    CHECK(!cuda::multiply(in, nullptr));
  }
  CHECK(test::same_bits(alone, out));
}

// GELU, the windows of a convolution and what has ended are the same as with few rows.
void what_comes_after_is_that_of_few_rows(WeightType type) {
  const int64_t rows = 16, inputs = 48, outputs = 40, taps = 3, channels = 22;
  Store store(type);
  cuda::Product in;
  in.x = store.vector(rows * inputs);
  in.x_stride = inputs;
  in.matrix = store.matrix(outputs, inputs);
  in.convolution = {5, channels, taps, store.vector(channels * taps), store.vector(channels)};
  const float* windows = store.vector(rows * (taps - 1) * channels);
  const auto run = [&](int64_t at_once, cpu::Then then, const int64_t* positions) {
    return test::in_both_orders([&] {
      auto out = test::unwritten<float>(rows * outputs);
      std::vector<float> window(windows, windows + rows * (taps - 1) * channels);
      for (int64_t row = 0; row < rows; row += at_once) {
        cuda::Product some = in;
        some.rows = at_once;
        some.then = then;
        some.positions = positions;
        some.x += row * inputs;
        some.out = out.data() + row * outputs;
        some.convolution.window = window.data() + row * (taps - 1) * channels;
        CHECK(!cuda::multiply(some, nullptr));
      }
      return std::tuple(out, window);
    });
  };
  for (const auto then : {cpu::Then::kStore, cpu::Then::kGelu}) {
    const auto [out, window] = run(rows, then, nullptr);
    const auto [expected, expected_window] = run(cuda::kFewRows, then, nullptr);
    CHECK(test::nearly(out, expected));
    CHECK(test::nearly(window, expected_window));
  }
  const std::vector<int64_t> positions(rows, -1);
  const auto [out, window] = run(rows, cpu::Then::kStore, positions.data());
  CHECK(out == test::unwritten<float>(rows * outputs));
  CHECK(std::equal(window.begin(), window.end(), windows));
}

// All int8 are multiplied exactly: by numbers that two bfloat16 hold, one at a time.
void every_int8_is_exact() {
  const int64_t count = 256, rows = 9;
  std::vector<int8_t> weights(count * 16);
  for (int64_t i = 0; i < count; ++i) weights[i * 16 + i % 16] = int8_t(i - 128);
  std::vector<float> x(rows * 16), out(rows * count);
  for (int64_t i = 0; i < rows * 16; ++i) x[i] = 1 + float(i) / 256;  // 16 bits
  cuda::Product in;
  in.rows = rows;
  in.x = x.data();
  in.x_stride = 16;
  in.matrix = {count, 16, WeightType::kInt8, weights.data()};
  in.out = out.data();
  CHECK(!cuda::multiply(in, nullptr));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < count; ++i) {
      CHECK(out[row * count + i] == float(i - 128) * x[row * 16 + i % 16]);
    }
  }
}

// What is not finite stays in its row, and an infinity is none the less one.
void what_is_not_finite_stays_so() {
  const int64_t rows = 10, inputs = 32;
  const std::vector<cpu::BFloat16> weights(inputs, cpu::BFloat16(0.5f));
  std::vector<float> x(rows * inputs, 1.0f), out(rows);
  x[2 * inputs + 3] = INFINITY;
  x[3 * inputs + 9] = -INFINITY;
  x[5 * inputs + 6] = INFINITY;
  x[4 * inputs + 31] = NAN;
  cuda::Product in;
  in.rows = rows;
  in.x = x.data();
  in.x_stride = inputs;
  in.matrix = {1, inputs, WeightType::kBFloat16, weights.data()};
  in.out = out.data();
  CHECK(!cuda::multiply(in, nullptr));
  CHECK(out[0] == 16 && out[1] == 16 && out[9] == 16);
  CHECK(out[2] == INFINITY && out[3] == -INFINITY && std::isnan(out[4]));
  CHECK(out[5] == INFINITY);
}

int main() {
  for (const auto type : test::kWeightTypes) {
    products(type);
    what_is_not_whole_packs_is_refused(type);
    each_of_eight_rows_has_the_bits_that_it_has_alone(type);
    what_comes_after_is_that_of_few_rows(type);
  }
  every_int8_is_exact();
  squares_are_added_split_by_split();
  what_is_not_finite_stays_so();
  return test::result();
}
