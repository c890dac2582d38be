// Tests of the emulated CUDA kernels of ssd against plain loops.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/ssd.cu"
#include "cuda/ssd_gradients.cu"
#include "ssd_case.h"

using namespace mblm;

// Where operands are the sums of two bfloat16, floats are nearly as exact as with 16 bits.
template <class T>
void equals_plain_loops(const test::SsdSizes& sizes, bool may_round) {
  using C = cpu::compute_t<T>;
  const test::SsdCase<T> given(sizes);
  const test::SsdExpected expected = test::plain(given);
  const auto& [rows, length, heads, head_dim, states, chunk_size] = sizes;
  const int64_t chunks = sizes.chunks(), units = rows * chunks, values = rows * length * heads;
  std::vector<double> sums(values);
  std::vector<C> scores(units * chunk_size * chunk_size);
  const cuda::SsdInput<T> in = {rows,
                                length,
                                heads,
                                head_dim,
                                states,
                                sizes.padded(),
                                chunk_size,
                                chunks,
                                given.x.data(),
                                length * given.position_stride(),
                                given.position_stride(),
                                given.dt.data(),
                                given.rates.data(),
                                given.weight_in.data(),
                                given.weight_out.data(),
                                given.direct.data(),
                                sums.data(),
                                scores.data(),
                                may_round};
  const double factor = may_round || std::is_same_v<T, cpu::BFloat16> ? 10 : 1;
  const auto scratch_is_unwritten = [&] {
    std::fill(sums.begin(), sums.end(), 7.0);
    std::fill(scores.begin(), scores.end(), C(7));
  };
  const auto [y, state, chunk_states] = test::in_both_orders([&] {
    scratch_is_unwritten();
    auto y = test::unwritten<T>(given.grad_y.size());
    auto state = given.initial, chunk_states = test::unwritten<C>(expected.chunk_states.size());
    CHECK(!cuda::ssd(in, y.data(), state.data(), chunk_states.data(), nullptr));
    return std::tuple(y, state, chunk_states);
  });
  CHECK(test::nearly(y, expected.y, 4));
  CHECK(test::nearly(state, expected.state, 4 * factor));
  CHECK(test::nearly(chunk_states, expected.chunk_states, 4 * factor));

  const auto* const before = &chunk_states;
  const auto [x, dt, first, rates, direct, weight_in, weight_out] = test::in_both_orders([&] {
    scratch_is_unwritten();
    auto x = test::unwritten<T>(given.grad_y.size());
    auto dt = test::unwritten<C>(values), state = given.grad_state;
    auto rates = test::unwritten<C>(units * heads), direct = rates;
    auto weight_in = test::unwritten<C>(rows * length * states), weight_out = weight_in;
    auto carries = test::unwritten<C>(before->size());
    auto grad_scores = test::unwritten<C>(scores.size());
    std::vector<double> terms(4 * values);
    CHECK(!cuda::ssd_backward<T>(
        in,
        {before->data(), given.grad_y.data(), state.data(), x.data(), dt.data(), rates.data(),
         direct.data(), weight_in.data(), weight_out.data(), carries.data(), grad_scores.data(),
         terms.data()},
        nullptr));
    return std::tuple(x, dt, state, rates, direct, weight_in, weight_out);
  });
  std::vector<C> sum_of_rates(rows * heads), sum_of_direct(rows * heads);
  for (int64_t i = 0; i < units * heads; ++i) {
    const int64_t to = i / heads / chunks * heads + i % heads;
    sum_of_rates[to] += rates[i];
    sum_of_direct[to] += direct[i];
  }
  CHECK(test::nearly(x, expected.grad_x, 10));
  CHECK(test::nearly(dt, expected.grad_dt, 50 * factor));
  CHECK(test::nearly(first, expected.grad_state, 10 * factor));
  CHECK(test::nearly(sum_of_rates, expected.grad_rates, 100 * factor));
  CHECK(test::nearly(sum_of_direct, expected.grad_direct, 20 * factor));
  CHECK(test::nearly(weight_in, expected.grad_in, 20 * factor));
  CHECK(test::nearly(weight_out, expected.grad_out, 20 * factor));
}

template <class T>
void all_sizes(bool may_round = false) {
  equals_plain_loops<T>({2, 21, 3, 5, 9, 8}, may_round);
  equals_plain_loops<T>({1, 9, 2, 16, 16, 64}, may_round);
  equals_plain_loops<T>({1, 1, 1, 1, 1, 1}, may_round);
  equals_plain_loops<T>({1, 70, 2, 3, 4, 70}, may_round);  // two tiles of positions
  equals_plain_loops<T>({1, 5, 1, 70, 66, 4}, may_round);  // two tiles of channels and of states
  equals_plain_loops<T>({0, 5, 2, 3, 4, 4}, may_round);
  equals_plain_loops<T>({2, 0, 2, 3, 4, 4}, may_round);
  equals_plain_loops<T>({2, 5, 0, 3, 4, 4}, may_round);
  equals_plain_loops<T>({1, 5, 2, 0, 3, 4}, may_round);
}

// Tensors may have more elements than 32 bits count: only what lies inside a chunk is counted in
// them.
void places_have_64_bits() {
  cpu::BFloat16 first{};
  cuda::SsdInput<cpu::BFloat16> in{};
  in.rows = 64;
  in.heads = 128;
  in.head_dim = 64;
  in.states = 256;
  in.chunk_size = 256;
  in.chunks = 4096;
  in.length = in.chunks * in.chunk_size;
  in.x = &first;
  const int64_t unit = in.rows * in.chunks - 1;  // the last chunk of the last row
  const cuda::Chunk<cpu::BFloat16> own(in, unit, 127);
  const int64_t positions = in.rows * in.length, chunks = in.rows * in.chunks;
  CHECK(own.state(63, 255) == chunks * 128 * 64 * 256 - 1);
  CHECK(own.pair(255, 255) == chunks * 256 * 256 - 1);
  CHECK(own.at(255) == positions * 128 - 1);
  CHECK(own.place(&first, 255, 63) - &first == positions * 128 * 64 - 1);
}

int main() {
  places_have_64_bits();
  all_sizes<float>();
  all_sizes<float>(true);
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  return test::result();
}
