// Checks of the inner loops of products with packed weights, whatever instructions they use.
#pragma once

#include <limits>
#include <vector>

#include "check.h"
#include "cpu/matrix_kernels.h"
#include "pack.h"

namespace mblm::test {

// Error of a sum of products relative to the sum of their sizes: int8 weights are multiplied with
// numbers of 16 bits, all as fine as the largest of them, bfloat16 ones maybe with two of 8.
template <class W>
inline constexpr double kDotTolerance = sizeof(W) == 1   ? 2e-5
                                        : sizeof(W) == 2 ? 1e-5
                                                         : 1e-6;

template <class W>
void check_dots(const cpu::Kernel& kernel, cpu::Dots dots, const char* name) {
  Numbers numbers;
  for (const int64_t n : {0, 1, 7, 31, 32, 63, 64, 100, 257, 9000}) {
    // Streams of rows with one between them that nobody reads.
    const int64_t streams = kernel.streams, count = streams == 1 ? 7 : 2, apart = count + 1;
    const int64_t rows = streams * apart;
    const auto x = numbers.vector<float>(n);
    float largest = 0;
    for (const float value : x) largest = std::max(largest, std::fabs(value));
    std::vector<W> weight(n * rows);
    for (W& value : weight) value = W(float(numbers.next() * (sizeof(W) == 1 ? 127 : 1)));
    // A tile's outputs are summed together.
    std::vector<float> sums(cpu::round_up(streams * count, cpu::kTileOutputs), NAN);
    std::vector<float> prepared(cpu::prepared_size(n), NAN);
    if (kernel.prepare) kernel.prepare(x.data(), n, prepared.data());
    dots(pack(weight, rows, n).data(), apart, kernel.prepare ? prepared.data() : x.data(), n,
         sums.data(), count);
    for (int64_t index = 0; index < streams * count; ++index) {
      const int64_t row = index % streams * apart + index / streams;
      double sum = 0, size = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double w = double(float(weight[row * n + i]));
        sum += x[i] * w;
        size += std::fabs((sizeof(W) == 1 ? largest : x[i]) * w);
      }
      const bool is_close = std::fabs(sums[index] - sum) <= kDotTolerance<W> * size;
      if (!is_close) std::printf("%s, n = %ld\n", name, long(n));
      CHECK(is_close);
    }
  }
}

// However many rows a panel has, each gets the bits of its sums alone.
template <class W>
void check_panels(const cpu::Kernel& kernel, const char* name) {
  constexpr int64_t kRows = cpu::kPanelRows;
  const int64_t far = kernel.panel_outputs, all = kernel.panel_streams * far;
  Numbers numbers;
  for (const int64_t n : {0, 1, 16, 100, 519, 2100}) {
    const auto x = numbers.vector<float>(kRows * n);
    std::vector<W> weight(all * n);
    for (W& value : weight) value = W(float(numbers.next() * (sizeof(W) == 1 ? 127 : 1)));
    const auto packed = pack(weight, all, n);
    const int64_t stride = kernel.prepare || kernel.pack ? cpu::prepared_size(n) : n;
    std::vector<float> prepared(kRows * stride, NAN);
    std::vector<float> alone(kRows * all);  // (rows, outputs)
    for (int64_t row = 0; row < kRows; ++row) {
      const float* values = x.data() + row * n;
      if (kernel.prepare) {
        float* const to = prepared.data() + row * stride;
        kernel.prepare(values, n, to);
        values = to;
      }
      float* const sums = alone.data() + row * all;
      const int64_t apart = all / kernel.streams;
      std::vector<float> of(all);
      kernel.dots(packed.data(), apart, values, n, of.data(), apart);
      for (int64_t i = 0; i < all; ++i) {
        sums[i % kernel.streams * apart + i / kernel.streams] = of[i];
      }
    }
    bool is_equal = true;
    for (int64_t rows = 1; rows <= kRows; rows += n > 1000 ? 21 : 1) {
      if (kernel.pack) kernel.pack(x.data(), rows, n, stride, prepared.data());
      const float* const values = kernel.prepare || kernel.pack ? prepared.data() : x.data();
      for (const int64_t streams : {int64_t(1), kernel.panel_streams}) {
        for (const int64_t outputs : {int64_t(1), far / 2 - 1, far}) {
          std::vector<float> sums(kRows * cpu::kPanelStride, NAN);
          kernel.panel(
              {packed.data(), outputs, n, values, stride, rows, sums.data(), streams, far});
          for (int64_t i = 0; i < rows * streams * outputs; ++i) {
            const int64_t row = i / (streams * outputs), stream = i / outputs % streams;
            const float* const sum = sums.data() + row * cpu::kPanelStride + i % outputs;
            is_equal = is_equal && sum[stream * cpu::kStreamOutputs] ==
                                       alone[row * all + stream * far + i % outputs];
          }
        }
      }
    }
    if (!is_equal) std::printf("%s, n = %ld\n", name, long(n));
    CHECK(is_equal);
  }
}

template <class W>
void check_sums(const cpu::Kernel& kernel, const char* name) {
  check_dots<W>(kernel, kernel.dots, name);
  if (kernel.panel) check_panels<W>(kernel, name);
}

// The largest sums there are do not overflow, and broken numbers stay broken.
inline void check_extremes_of_int8(const cpu::Kernel& kernel) {
  const int64_t n = 20000;
  const auto weight = pack(std::vector<int8_t>(n, -127), 1, n);
  std::vector<float> prepared(cpu::prepared_size(n));
  const auto dot = [&](const std::vector<float>& x) {
    float sums[cpu::kTileOutputs] = {};
    kernel.prepare(x.data(), n, prepared.data());
    kernel.dots(weight.data(), 0, prepared.data(), n, sums, 1);
    return sums[0];
  };
  CHECK(close(dot(std::vector<float>(n, 3.f)), -3. * 127 * n));
  CHECK(dot(std::vector<float>(n, 0.f)) == 0);
  CHECK(std::fabs(dot(std::vector<float>(n, 1e-43f))) < 1e-30);
  for (const float bad : {INFINITY, -INFINITY, float(NAN)}) {
    std::vector<float> x(n, 1.f);
    x[n - 1] = bad;
    CHECK(std::isnan(dot(x)));
  }
}

}  // namespace mblm::test
