// Tests of what decoding is made of: erf, teams of threads, products with packed weights,
// sampling.
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <sstream>

#include "check.h"
#include "check_kernel.h"
#include "cpu/matrix.h"
#include "cpu/sampling.h"
#include "cpu/vector_math.h"
#include "cpu/with_team.h"
#include "on_team.h"
#include "pack.h"

using namespace mblm;
using test::on_team;

void erf_and_what_is_made_of_it() {
  for (double x = -6; x < 6; x += 0.00113) {
    CHECK(std::fabs(cpu::vector_erf(float(x)) - std::erf(double(float(x)))) <= 5e-7);
    const double gelu = 0.5 * x * (1 + std::erf(x / std::sqrt(2.)));
    CHECK(std::fabs(cpu::gelu(float(x)) - gelu) <= 2e-6);
    CHECK(test::close(cpu::silu(float(x)), x / (1 + std::exp(-x))));
  }
  CHECK(std::isnan(cpu::gelu(NAN)));
}

void a_team_shares_every_item_once_and_waits() {
  for (const int64_t threads : {1, 2, 5}) {
    std::vector<int64_t> first(1000), second(77);
    std::atomic<int64_t> wrong{0};
    on_team(threads, [&](const cpu::Worker& worker) {
      for (int64_t round = 1; round <= 50; ++round) {
        worker.share(1000, 7, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++first[i];
        });
        worker.wait();
        worker.share(77, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++second[i];
        });
        worker.wait();
        for (const int64_t count : first) wrong += count != round;
        for (const int64_t count : second) wrong += count != round;
        worker.wait();
      }
    });
    CHECK(wrong == 0);
  }
}

void a_team_begins_only_when_all_have_their_memory() {
  std::atomic<int64_t> begun{0}, floats{0};
  int64_t prepared_for = 0;
  cpu::with_team(
      3, [&](int64_t threads) { return prepared_for = threads; },
      [&](const cpu::Worker& worker) {
        ++begun;
        floats += int64_t(worker.prepared.size());
        CHECK(worker.team.threads() == prepared_for);
        worker.wait();
      });
  CHECK(begun == prepared_for && floats == prepared_for * prepared_for);
  const auto fails = [&](auto prepare) {
    begun = 0;
    try {
      cpu::with_team(3, prepare, [&](const cpu::Worker&) { ++begun; });
    } catch (const std::exception&) {
      return begun == 0;
    }
    return false;
  };
  CHECK(fails([](int64_t) -> int64_t { throw std::bad_alloc(); }));
  CHECK(fails([](int64_t) { return INT64_MAX; }));  // more floats than there can be
}

void reads_limits_of_processor_time() {
  const auto cores = [](const char* text) {
    std::istringstream in(text);
    return cpu::cores_of_cpu_max(in);
  };
  CHECK(cores("100000 100000\n") == 1);
  CHECK(cores("150000 100000") == 2);
  CHECK(cores("1000 100000") == 1);
  CHECK(cores("800000 100000") == 8);
  for (const char* text : {"max 100000", "-1 100000 ", "", "100000", "0 100000", "1 0", "no"}) {
    CHECK(cores(text) == cpu::kNoLimit);
  }
  CHECK(cpu::allowed_cores() >= 1);
}

template <class W>
void check_product(cpu::WeightType type, int64_t inputs, int64_t outputs, int64_t rows) {
  test::Numbers numbers;
  const auto x = numbers.vector<float>(rows * inputs), bias = numbers.vector<float>(outputs);
  const auto residual = numbers.vector<float>(rows * outputs);
  auto scale = numbers.vector<float>(outputs);
  for (float& value : scale) value /= 127;
  std::vector<W> weight(outputs * inputs);
  for (W& value : weight) value = W(float(numbers.next() * (sizeof(W) == 1 ? 127 : 1)));
  const bool scaled = type == cpu::WeightType::kInt8;
  const auto packed = test::pack(weight, outputs, inputs);
  const cpu::Matrix matrix{outputs,    inputs, type, packed.data(), scaled ? scale.data() : nullptr,
                           bias.data()};
  std::vector<double> expected, activated, tolerance;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < outputs; ++column) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        const double term = double(x[row * inputs + i]) * float(weight[column * inputs + i]);
        sum += term;
        size += std::fabs(term);
      }
      const double factor = scaled ? scale[column] : 1.f;
      const double value = sum * factor + bias[column];
      tolerance.push_back(1e-5 + 1.2 * test::kDotTolerance<W> * size * std::fabs(factor));
      expected.push_back(value + residual[row * outputs + column]);
      activated.push_back(0.5 * value * (1 + std::erf(value / std::sqrt(2.))));
    }
  }
  std::vector<float> once;
  for (const int64_t threads : {1, 3}) {
    std::vector<float> out(rows * outputs), in_place = residual;
    on_team(threads, [&](const cpu::Worker& worker) {
      cpu::multiply(worker, matrix, x.data(), rows, in_place.data(), cpu::Then::kStore,
                    in_place.data());
      cpu::multiply(worker, matrix, x.data(), rows, out.data(), cpu::Then::kGelu);
    });
    for (int64_t i = 0; i < rows * outputs; ++i) {
      CHECK(std::fabs(in_place[i] - expected[i]) <= tolerance[i]);
      CHECK(std::fabs(out[i] - activated[i]) <= tolerance[i]);
    }
    if (once.empty()) once = out;
    CHECK(out == once);
    // One row alone has the same bits as beside others.
    std::vector<float> last(outputs);
    on_team(1, [&](const cpu::Worker& worker) {
      cpu::multiply(worker, matrix, x.data() + (rows - 1) * inputs, 1, last.data(),
                    cpu::Then::kGelu);
    });
    CHECK(std::equal(last.begin(), last.end(), out.end() - outputs));
  }
}

void multiplies_packed_weights() {
  for (const int64_t inputs : {1, 31, 32, 100}) {
    for (const int64_t outputs : {1, 17, 200}) {
      for (const int64_t rows : {1, 2, 5, 16}) {
        check_product<float>(cpu::WeightType::kFloat32, inputs, outputs, rows);
        check_product<cpu::BFloat16>(cpu::WeightType::kBFloat16, inputs, outputs, rows);
        check_product<int8_t>(cpu::WeightType::kInt8, inputs, outputs, rows);
      }
    }
  }
}

template <class W>
void check_rows_alone(cpu::WeightType type, int64_t inputs, int64_t outputs) {
  constexpr int64_t kMostRows = 70;
  test::Numbers numbers;
  const auto x = numbers.vector<float>(kMostRows * inputs), bias = numbers.vector<float>(outputs);
  const auto residual = numbers.vector<float>(kMostRows * outputs);
  const std::vector<float> scale(outputs, 0.01f);
  std::vector<W> weight(outputs * inputs);
  for (W& value : weight) value = W(float(numbers.next() * (sizeof(W) == 1 ? 127 : 1)));
  const auto packed = test::pack(weight, outputs, inputs);
  const bool scaled = type == cpu::WeightType::kInt8;
  const cpu::Matrix matrix{outputs,    inputs, type, packed.data(), scaled ? scale.data() : nullptr,
                           bias.data()};
  const auto multiply = [&](int64_t threads, int64_t first, int64_t rows) {
    std::vector<float> out(rows * outputs);
    on_team(threads, [&](const cpu::Worker& worker) {
      cpu::multiply(worker, matrix, x.data() + first * inputs, rows, out.data(), cpu::Then::kGelu,
                    residual.data() + first * outputs);
    });
    return out;
  };
  std::vector<float> alone;
  for (int64_t row = 0; row < kMostRows; ++row) {
    const auto one = multiply(1, row, 1);
    alone.insert(alone.end(), one.begin(), one.end());
  }
  for (int64_t rows = 1; rows <= kMostRows; ++rows) {
    for (const int64_t threads : {1, 2, 3}) {
      const auto out = multiply(threads, 0, rows);
      CHECK(std::equal(out.begin(), out.end(), alone.begin()));
    }
  }
}

void a_row_has_the_same_bits_beside_any_others() {
  for (const auto& [inputs, outputs] : {std::pair<int64_t, int64_t>{75, 130}, {1100, 35}}) {
    check_rows_alone<float>(cpu::WeightType::kFloat32, inputs, outputs);
    check_rows_alone<cpu::BFloat16>(cpu::WeightType::kBFloat16, inputs, outputs);
    check_rows_alone<int8_t>(cpu::WeightType::kInt8, inputs, outputs);
  }
}

void every_instruction_set_that_the_machine_has() {
  for (const cpu::MatrixKernels& kernels : cpu::matrix_kernels()) {
    std::printf("tested: %s\n", kernels.name);
    test::check_sums<float>(kernels.float32, kernels.name);
    test::check_sums<cpu::BFloat16>(kernels.bfloat16, kernels.name);
    test::check_sums<int8_t>(kernels.int8, kernels.name);
    test::check_extremes_of_int8(kernels.int8);
  }
}

void samples_what_the_filters_keep() {
  cpu::SampleMemory memory(257);
  const std::vector<float> logits = {1, 5, 3, 5, -2}, even(5, 0.5f);
  const auto draw = [&](cpu::Sampling sampling, const std::vector<float>& u) {
    return cpu::sample(sampling, logits.data(), nullptr, u.data(), 5, memory);
  };
  CHECK(draw({1, 1, 0}, even) == 1);  // the lower id of two equals
  CHECK(draw({1, 5, 0}, even) == 1);
  // A draw close to one outweighs any logit, where the filter lets it.
  const float high = std::nextafter(1.f, 0.f);
  for (int64_t favored = 0; favored < 5; ++favored) {
    std::vector<float> u(5, 0.f);
    u[favored] = high;
    CHECK(draw({1, 5, 0}, u) == favored);
    CHECK(draw({100, 5, 0}, u) == favored);
    CHECK(draw({1, 3, 0}, u) == (favored == 0 || favored == 4 ? 1 : favored));
    CHECK(draw({1, 2, 0}, u) == (favored == 3 ? 3 : 1));
    // The probabilities are about 0.47, 0.47, 0.06, 0.01 and 0.
    CHECK(draw({1, 1, 0.4f}, u) == 1);
    CHECK(draw({1, 1, 0.9f}, u) == (favored == 3 ? 3 : 1));
    CHECK(draw({1, 1, 0.97f}, u) == (favored == 0 || favored == 4 ? 1 : favored));
    CHECK(draw({1, 1, 1.f}, u) == favored);
  }
  // The likeliest four are 1, 1, 0.14 and 0.02 times as likely as the likeliest.
  for (int64_t favored = 0; favored < 5; ++favored) {
    std::vector<float> u(5, 0.f);
    u[favored] = high;
    CHECK(draw({1, 5, 0, 0.1}, u) == (favored == 0 || favored == 4 ? 1 : favored));
    CHECK(draw({1, 5, 0, 1}, u) == (favored == 3 ? 3 : 1));
    CHECK(draw({1, 5, 1, 0.01}, u) == (favored == 4 ? 1 : favored));
    CHECK(draw({3, 5, 0, 0.1}, u) == (favored == 4 ? 1 : favored));
    CHECK(draw({std::numeric_limits<float>::max(), 3, 0}, u) ==
          (favored == 0 || favored == 4 ? 1 : favored));
  }
  const std::vector<float> broken = {1, NAN, 3, 5, NAN};
  for (const auto& sampling : {cpu::Sampling{1, 1, 0}, {1, 3, 0}, {1, 5, 0}, {1, 5, 0.5f, 0.5}}) {
    CHECK(cpu::sample(sampling, broken.data(), nullptr, even.data(), 5, memory) == 1);
  }
  const auto draw_allowed = [&](const std::vector<float>& of, std::vector<uint8_t> allowed) {
    std::vector<int64_t> ids;
    for (const cpu::Sampling& sampling :
         {cpu::Sampling{1, 1, 0}, {1, 5, 0}, {1, 1, 1}, {1, 2, 0}}) {
      const auto* is = allowed.data();
      ids.push_back(cpu::sample(sampling, of.data(), is, even.data(), 5, memory));
    }
    return ids;
  };
  CHECK(draw_allowed(logits, {1, 0, 1, 0, 1}) == std::vector<int64_t>(4, 2));
  CHECK(draw_allowed(logits, {0, 0, 0, 0, 1}) == std::vector<int64_t>(4, 4));
  CHECK(draw_allowed(broken, {1, 0, 1, 0, 0}) == std::vector<int64_t>(4, 2));
  CHECK(draw_allowed(broken, {1, 0, 0, 1, 1}) == std::vector<int64_t>(4, 4));
  const std::vector<float> none(5, -INFINITY);
  CHECK(draw_allowed(none, {0, 0, 1, 1, 0}) == std::vector<int64_t>(4, 2));
  CHECK(cpu::sample({1, 5, 0}, none.data(), nullptr, even.data(), 5, memory) == 0);
  CHECK(cpu::sample({1, 1, 0}, none.data(), nullptr, even.data(), 5, memory) == 0);
  // Both zeros are one number, below the smallest above it and above all below.
  const float tiny = std::numeric_limits<float>::denorm_min();
  const std::vector<float> zeros = {-tiny, -0.f, 0.f, -1, -0.f};
  CHECK(cpu::sample({1, 1, 0}, zeros.data(), nullptr, even.data(), 5, memory) == 1);
  const std::vector<float> small = {-1, -tiny, 0.f, tiny, -INFINITY};
  CHECK(cpu::sample({1, 1, 0}, small.data(), nullptr, even.data(), 5, memory) == 3);
  const std::vector<float> infinite = {1, INFINITY, -NAN, INFINITY, NAN};
  CHECK(cpu::sample({1, 1, 0}, infinite.data(), nullptr, even.data(), 5, memory) == 2);
  // The likeliest of many, in every place of a vector.
  for (int64_t place = 0; place < 257; ++place) {
    std::vector<float> many(257, -3.f);
    many[place] = -2.5f;
    CHECK(cpu::sample({1, 1, 0}, many.data(), nullptr, nullptr, 257, memory) == place);
  }
}

void tells_log_probabilities() {
  test::Numbers numbers;
  for (const int64_t count : {1, 5, 257}) {
    auto logits = numbers.vector<float>(count);
    for (float& value : logits) value *= 40;
    if (count > 1) logits[1] = -INFINITY;
    double sum = 0;
    for (const float value : logits) sum += std::exp(double(value));
    for (int64_t id = 0; id < count; ++id) {
      const float got = cpu::log_prob(logits.data(), count, id);
      CHECK(std::isinf(logits[id]) ? got == -INFINITY
                                   : test::close(got, logits[id] - std::log(sum)));
    }
  }
  const std::vector<float> broken = {1, NAN};
  CHECK(std::isnan(cpu::log_prob(broken.data(), 2, 0)));
}

int main() {
  erf_and_what_is_made_of_it();
  a_team_shares_every_item_once_and_waits();
  a_team_begins_only_when_all_have_their_memory();
  reads_limits_of_processor_time();
  multiplies_packed_weights();
  a_row_has_the_same_bits_beside_any_others();
  every_instruction_set_that_the_machine_has();
  samples_what_the_filters_keep();
  tells_log_probabilities();
  return test::result();
}
