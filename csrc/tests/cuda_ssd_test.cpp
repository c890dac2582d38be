// Tests of the emulated CUDA kernels of ssd against those of the CPU.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/ssd.cu"
#include "cuda/ssd_gradients.cu"

using namespace mblm;

struct Sizes {
  int64_t rows, length, heads, head_dim, states, chunk_size;
  int64_t padded() const { return (states + 7) / 8 * 8; }
  int64_t chunks() const { return cuda::divide_up(length, chunk_size); }
};

template <class T>
struct Case {
  using C = cpu::compute_t<T>;
  Sizes sizes;
  std::vector<T> x, grad_y;
  std::vector<C> dt, rates, weight_in, weight_out, direct, initial, grad_final;

  explicit Case(const Sizes& sizes) : sizes(sizes) {
    test::Numbers numbers;
    const int64_t positions = sizes.rows * sizes.length;
    x = numbers.vector<T>(positions * sizes.heads * sizes.head_dim);
    grad_y = numbers.vector<T>(x.size());
    dt = numbers.vector<C>(positions * sizes.heads);
    for (C& step : dt) step = C(0.2) * (step + C(1));
    rates = numbers.vector<C>(sizes.heads);
    for (C& rate : rates) rate = -(rate + C(1.1));
    weight_in = numbers.vector<C>(positions * sizes.padded());
    weight_out = numbers.vector<C>(weight_in.size());
    for (auto* weights : {&weight_in, &weight_out}) {
      for (size_t i = 0; i < weights->size(); ++i) {
        const bool is_padding = int64_t(i) % sizes.padded() >= sizes.states;
        (*weights)[i] = is_padding ? 0 : C(float(T((*weights)[i])));
      }
    }
    direct = numbers.vector<C>(sizes.heads);
    initial = numbers.vector<C>(sizes.rows * sizes.heads * sizes.head_dim * sizes.states);
    grad_final = numbers.vector<C>(initial.size());
  }
};

template <class T>
struct Results {
  using C = cpu::compute_t<T>;
  std::vector<T> y, grad_x, grad_in, grad_out;
  std::vector<C> state, chunk_states, grad_dt, grad_rates, grad_direct, grad_state;
};

// Rows of `from` values as rows of `to`, cut or padded with zeros.
template <class C>
std::vector<C> resized(const std::vector<C>& values, int64_t from, int64_t to) {
  if (from == 0) return {};
  std::vector<C> out(int64_t(values.size()) / from * to);
  for (int64_t i = 0; i < int64_t(values.size()); ++i) {
    if (i % from < to) out[i / from * to + i % from] = values[i];
  }
  return out;
}

// What the CPU's kernels, whose states are padded, give chunk by chunk.
template <class T>
Results<T> on_cpu(const Case<T>& given) {
  using C = cpu::compute_t<T>;
  const auto& [rows, length, heads, head_dim, states, chunk_size] = given.sizes;
  const int64_t padded = given.sizes.padded(), chunks = given.sizes.chunks();
  const int64_t row_states = heads * head_dim * padded, values = rows * length * heads;
  Results<T> out;
  out.y.resize(given.x.size());
  out.grad_x.resize(given.x.size());
  out.grad_dt.resize(values);
  out.grad_rates.resize(heads);
  out.grad_direct.resize(heads);

  const auto chunk_of = [&](int64_t chunk, std::vector<C>& scores) {
    cpu::SsdInput<T> in{rows,
                        length,
                        heads,
                        head_dim,
                        padded,
                        chunk * chunk_size,
                        std::min(chunk_size, length - chunk * chunk_size),
                        given.x.data(),
                        length * heads * head_dim,
                        heads * head_dim,
                        given.dt.data(),
                        given.rates.data(),
                        given.weight_in.data(),
                        given.weight_out.data(),
                        given.direct.data(),
                        nullptr};
    scores.assign(rows * in.positions * in.padded_positions(), 0);
    cpu::ssd_scores(in, scores.data(), 0, rows);
    in.scores = scores.data();
    return in;
  };
  std::vector<C> scores, state = resized(given.initial, states, padded), chunk_states;
  state.resize(rows * row_states);
  std::vector<std::vector<C>> before;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    before.push_back(state);
    const auto in = chunk_of(chunk, scores);
    cpu::ssd(in, out.y.data(), {before.back().data(), row_states}, {state.data(), row_states}, 0,
             rows * heads);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (const auto& states_before : before) {
      const C* from = states_before.data() + row * row_states;
      chunk_states.insert(chunk_states.end(), from, from + row_states);
    }
  }
  out.state = resized(state, padded, states);
  out.chunk_states = resized(chunk_states, padded, states);

  std::vector<C> grad_state = resized(given.grad_final, states, padded);
  grad_state.resize(rows * row_states);
  std::vector<C> grad_rates(rows * heads), grad_direct(rows * heads);
  std::vector<T> grad_in(rows * length * padded), grad_out(grad_in.size());
  for (int64_t chunk = chunks - 1; chunk >= 0 && heads > 0; --chunk) {
    const auto in = chunk_of(chunk, scores);
    std::vector<C> grad_scores(in.positions * in.padded_positions());
    std::vector<C> weights_in(in.positions * padded), weights_out(weights_in.size());
    for (int64_t row = 0; row < rows; ++row) {
      cpu::ssd_backward<T>(in,
                           {given.grad_y.data(),
                            {before[chunk].data(), row_states},
                            grad_state.data(),
                            out.grad_x.data(),
                            out.grad_dt.data(),
                            grad_rates.data(),
                            grad_direct.data(),
                            grad_scores.data(),
                            weights_in.data(),
                            weights_out.data()},
                           row, 0, heads);
      cpu::ssd_backward_weights(in, 1, grad_scores.data(), weights_in.data(), weights_out.data(),
                                grad_in.data(), grad_out.data(), row);
    }
  }
  out.grad_state = resized(grad_state, padded, states);
  out.grad_in = resized(grad_in, padded, states);
  out.grad_out = resized(grad_out, padded, states);
  for (int64_t i = 0; i < rows * heads; ++i) {
    out.grad_rates[i % heads] += grad_rates[i];
    out.grad_direct[i % heads] += grad_direct[i];
  }
  return out;
}

// As the CPU's kernels round the gradients of B and C.
template <class T, class C>
std::vector<T> rounded(const std::vector<C>& values) {
  std::vector<T> out;
  for (const C value : values) out.push_back(T(value));
  return out;
}

// Where operands are the sums of two bfloat16, floats are nearly as exact as with 16 bits.
template <class T>
void equals_cpu(const Sizes& sizes, bool may_round = false) {
  using C = cpu::compute_t<T>;
  const Case<T> given(sizes);
  const Results<T> expected = on_cpu(given);
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
                                length * heads * head_dim,
                                heads * head_dim,
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
    auto y = test::unwritten<T>(given.x.size());
    auto state = given.initial, chunk_states = test::unwritten<C>(expected.chunk_states.size());
    CHECK(!cuda::ssd(in, y.data(), state.data(), chunk_states.data(), nullptr));
    return std::tuple(y, state, chunk_states);
  });
  CHECK(test::nearly(y, expected.y, 4));
  CHECK(test::nearly(state, expected.state, 4 * factor));
  CHECK(test::nearly(chunk_states, expected.chunk_states, 4 * factor));

  const auto [x, dt, first, rates, direct, weight_in, weight_out] = test::in_both_orders([&] {
    scratch_is_unwritten();
    auto x = test::unwritten<T>(given.x.size());
    auto dt = test::unwritten<C>(values), state = given.grad_final;
    auto rates = test::unwritten<C>(units * heads), direct = rates;
    auto weight_in = test::unwritten<C>(rows * length * states), weight_out = weight_in;
    auto carries = test::unwritten<C>(expected.chunk_states.size());
    auto grad_scores = test::unwritten<C>(scores.size());
    std::vector<double> terms(4 * values);
    CHECK(!cuda::ssd_backward<T>(
        in,
        {expected.chunk_states.data(), given.grad_y.data(), state.data(), x.data(), dt.data(),
         rates.data(), direct.data(), weight_in.data(), weight_out.data(), carries.data(),
         grad_scores.data(), terms.data()},
        nullptr));
    return std::tuple(x, dt, state, rates, direct, weight_in, weight_out);
  });
  std::vector<C> sum_of_rates(heads), sum_of_direct(heads);
  for (int64_t i = 0; i < units * heads; ++i) {
    sum_of_rates[i % heads] += rates[i];
    sum_of_direct[i % heads] += direct[i];
  }
  CHECK(test::nearly(x, expected.grad_x, 10));
  CHECK(test::nearly(dt, expected.grad_dt, 50 * factor));
  CHECK(test::nearly(first, expected.grad_state, 10 * factor));
  CHECK(test::nearly(sum_of_rates, expected.grad_rates, 100 * factor));
  CHECK(test::nearly(sum_of_direct, expected.grad_direct, 20 * factor));
  CHECK(test::nearly(rounded<T>(weight_in), expected.grad_in, 20));
  CHECK(test::nearly(rounded<T>(weight_out), expected.grad_out, 20));
}

template <class T>
void all_sizes(bool may_round = false) {
  equals_cpu<T>({2, 21, 3, 5, 9, 8}, may_round);
  equals_cpu<T>({1, 9, 2, 16, 16, 64}, may_round);
  equals_cpu<T>({1, 1, 1, 1, 1, 1}, may_round);
  equals_cpu<T>({1, 70, 2, 3, 4, 70}, may_round);  // two tiles of positions
  equals_cpu<T>({1, 5, 1, 70, 66, 4}, may_round);  // two tiles of channels and of states
  equals_cpu<T>({0, 5, 2, 3, 4, 4}, may_round);
  equals_cpu<T>({2, 0, 2, 3, 4, 4}, may_round);
  equals_cpu<T>({2, 5, 0, 3, 4, 4}, may_round);
  equals_cpu<T>({1, 5, 2, 3, 0, 4}, may_round);
  equals_cpu<T>({1, 5, 2, 0, 3, 4}, may_round);
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
