// Tests of the emulated CUDA kernels of selective_scan against plain loops.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/selective_scan.cu"
#include "cuda/selective_scan_gradients.cu"
#include "scan_case.h"

using namespace mblm;

template <class T>
void equals_plain_loops(int64_t rows, int64_t length, int64_t channels, int64_t states,
                        int64_t chunk_size) {
  using C = cpu::compute_t<T>;
  const test::ScanCase<T> given(rows, length, channels, states, chunk_size);
  const test::ScanExpected expected = test::plain(given);
  const int64_t values = rows * length * channels, units = rows * given.chunks * channels;
  const int64_t parts = cuda::selective_scan_parts(channels, given.padded);
  const auto [y, state, chunk_states] = test::in_both_orders([&] {
    auto y = test::unwritten<T>(values);
    auto state = given.initial, chunk_states = test::unwritten<C>(units * states);
    std::vector<C> delta_sums(units);
    CHECK(!cuda::selective_scan(given.in, y.data(), state.data(), chunk_states.data(),
                                delta_sums.data(), nullptr));
    return std::tuple(y, state, chunk_states);
  });
  CHECK(test::nearly(y, expected.y, 2));
  CHECK(test::nearly(state, expected.state, 2));
  CHECK(test::nearly(chunk_states, expected.chunk_states, 2));

  const auto* const before = &chunk_states;
  const auto [x, delta, first, rates, direct, weight_in, weight_out] = test::in_both_orders([&] {
    auto x = test::unwritten<T>(values);
    auto delta = test::unwritten<C>(values), state = given.grad_state;
    auto rates = test::unwritten<C>(units * given.padded), direct = test::unwritten<C>(units);
    auto weight_in = test::unwritten<C>(parts * rows * length * given.padded);
    auto weight_out = weight_in;
    std::vector<C> carries(units * states), delta_sums(units);
    std::vector<C> kept(cuda::selective_scan_kept(given.in));
    CHECK(!cuda::selective_scan_backward<T>(
        given.in,
        {before->data(), given.grad_y.data(), state.data(), x.data(), delta.data(), rates.data(),
         direct.data(), weight_in.data(), weight_out.data(), carries.data(), delta_sums.data(),
         kept.data()},
        nullptr));
    return std::tuple(x, delta, state, rates, direct, weight_in, weight_out);
  });
  const auto whole = [&](const std::vector<C>& of_parts, int64_t count) {
    return given.without_padding(test::sum_of_parts(of_parts, count * given.padded));
  };
  CHECK(test::nearly(x, expected.grad_x, 4));
  CHECK(test::nearly(delta, expected.grad_delta, 10));
  CHECK(test::nearly(first, expected.grad_state, 4));
  CHECK(test::nearly(whole(rates, channels), expected.grad_rates, 20));
  CHECK(test::nearly(test::sum_of_parts(direct, channels), expected.grad_direct, 20));
  CHECK(test::nearly(whole(weight_in, rows * length), expected.grad_weight_in, 20));
  CHECK(test::nearly(whole(weight_out, rows * length), expected.grad_weight_out, 20));
}

template <class T>
void all_sizes() {
  for (const int64_t states : {1, 16, 20, 128}) equals_plain_loops<T>(2, 11, 5, states, 6);
  equals_plain_loops<T>(1, 9, 70, 16, 64);
  equals_plain_loops<T>(1, 140, 3, 16, 139);  // what is kept of a chunk does not fit shared memory
  equals_plain_loops<T>(2, 0, 3, 4, 4);
  equals_plain_loops<T>(0, 5, 3, 4, 4);
  equals_plain_loops<T>(2, 5, 0, 4, 4);
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  return test::result();
}
