// Tests of the emulated CUDA kernels of selective_scan against those of the CPU.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/selective_scan.cu"
#include "cuda/selective_scan_gradients.cu"

using namespace mblm;

template <class C>
std::vector<C> sum_of_parts(const std::vector<C>& parts, size_t size) {
  std::vector<C> sums(size);
  for (size_t i = 0; i < parts.size(); ++i) sums[i % size] += parts[i];
  return sums;
}

template <class T>
void equals_cpu(int64_t rows, int64_t length, int64_t channels, int64_t states,
                int64_t chunk_size) {
  using C = cpu::compute_t<T>;
  test::Numbers numbers;
  const int64_t padded = (states + 7) / 8 * 8, values = rows * length * channels;
  const int64_t chunks = cuda::divide_up(length, chunk_size);
  const auto x = numbers.vector<T>(values), grad_y = numbers.vector<T>(values);
  auto delta = numbers.vector<C>(values), rates = numbers.vector<C>(channels * padded);
  for (C& step : delta) step = C(0.3) * (step + C(1));
  for (C& rate : rates) rate = -(rate + C(1.1));
  auto weight_in = numbers.vector<C>(rows * length * padded);
  auto weight_out = numbers.vector<C>(rows * length * padded);
  for (auto* weights : {&rates, &weight_in, &weight_out}) {
    for (size_t i = 0; i < weights->size(); ++i) {
      if (int64_t(i) % padded >= states) (*weights)[i] = 0;
    }
  }
  const auto direct = numbers.vector<C>(channels);
  const auto initial = numbers.vector<C>(rows * channels * states);
  const cpu::SelectiveScanInput<T> in = {
      rows,         length,           channels,          states,
      padded,       chunk_size,       x.data(),          delta.data(),
      rates.data(), weight_in.data(), weight_out.data(), direct.data()};
  std::vector<T> y(values);
  std::vector<C> state = initial, chunk_states(rows * chunks * channels * states);
  const int64_t tiles = cuda::divide_up(channels, cpu::kScanTile);
  cpu::selective_scan(in, y.data(), state.data(), chunk_states.data(), 0, rows * tiles);
  const auto [got_y, got_state, got_chunks] = test::in_both_orders([&] {
    auto y = test::unwritten<T>(values);
    auto state = initial, chunk_states = test::unwritten<C>(rows * chunks * channels * states);
    std::vector<C> delta_sums(rows * chunks * channels);
    CHECK(!cuda::selective_scan(in, y.data(), state.data(), chunk_states.data(), delta_sums.data(),
                                nullptr));
    return std::tuple(y, state, chunk_states);
  });
  CHECK(test::nearly(got_y, y, 2));
  CHECK(test::nearly(got_state, state, 2));
  CHECK(test::nearly(got_chunks, chunk_states, 2));

  const auto grad_final = numbers.vector<C>(initial.size());
  std::vector<T> grad_x(values);
  std::vector<C> grad_state = grad_final, grad_delta(values), grad_rates(channels * padded),
                 grad_direct(channels), grad_in(rows * length * padded), grad_out(grad_in.size());
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * chunk_size, positions = std::min(chunk_size, length - start);
    std::vector<C> in_part(rows * positions * padded), out_part(in_part.size());
    cpu::selective_scan_backward<T>(
        in, chunk_states.data(), chunk,
        {grad_y.data(), grad_state.data(), grad_x.data(), grad_delta.data(), grad_rates.data(),
         grad_direct.data(), in_part.data(), out_part.data()},
        0, rows, 0, channels);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < positions * padded; ++i) {
        const int64_t to = (row * length + start) * padded + i;
        grad_in[to] = in_part[row * positions * padded + i];
        grad_out[to] = out_part[row * positions * padded + i];
      }
    }
  }
  const int64_t parts = cuda::selective_scan_parts(channels, padded);
  const auto [got_x, got_delta, got_first, got_rates, got_direct, got_in, got_out] =
      test::in_both_orders([&] {
        auto x = test::unwritten<T>(values);
        auto delta = test::unwritten<C>(values), state = grad_final;
        auto rates = test::unwritten<C>(rows * chunks * channels * padded);
        auto direct = test::unwritten<C>(rows * chunks * channels);
        auto weight_in = test::unwritten<C>(parts * rows * length * padded);
        auto weight_out = weight_in;
        std::vector<C> carries(chunk_states.size()), delta_sums(direct.size());
        std::vector<C> kept(cuda::selective_scan_kept(in));
        CHECK(!cuda::selective_scan_backward<T>(
            in,
            {chunk_states.data(), grad_y.data(), state.data(), x.data(), delta.data(), rates.data(),
             direct.data(), weight_in.data(), weight_out.data(), carries.data(), delta_sums.data(),
             kept.data()},
            nullptr));
        return std::tuple(x, delta, state, rates, direct, weight_in, weight_out);
      });
  CHECK(test::nearly(got_x, grad_x, 4));
  CHECK(test::nearly(got_delta, grad_delta, 10));
  CHECK(test::nearly(got_first, grad_state, 4));
  CHECK(test::nearly(sum_of_parts(got_rates, grad_rates.size()), grad_rates, 20));
  CHECK(test::nearly(sum_of_parts(got_direct, grad_direct.size()), grad_direct, 20));
  CHECK(test::nearly(sum_of_parts(got_in, grad_in.size()), grad_in, 20));
  CHECK(test::nearly(sum_of_parts(got_out, grad_out.size()), grad_out, 20));
}

template <class T>
void all_sizes() {
  for (const int64_t states : {1, 16, 20, 128}) equals_cpu<T>(2, 11, 5, states, 6);
  equals_cpu<T>(1, 9, 70, 16, 64);
  equals_cpu<T>(1, 140, 3, 16, 139);  // what is kept of a chunk does not fit shared memory
  equals_cpu<T>(2, 5, 3, 0, 4);
  equals_cpu<T>(2, 0, 3, 4, 4);
  equals_cpu<T>(0, 5, 3, 4, 4);
  equals_cpu<T>(2, 5, 0, 4, 4);
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  return test::result();
}
