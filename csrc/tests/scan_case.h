// A case of the selective scan, and plain loops for it in double.
#pragma once

#include <cmath>

#include "check.h"
#include "cpu/selective_scan.h"

namespace mblm::test {

template <class T>
struct ScanCase {
  using C = cpu::compute_t<T>;
  int64_t rows, length, channels, states, padded, chunk_size, chunks;
  std::vector<T> x, grad_y;
  std::vector<C> delta, rates, weight_in, weight_out, direct, initial, grad_state;
  cpu::SelectiveScanInput<T> in;

  ScanCase(int64_t rows, int64_t length, int64_t channels, int64_t states, int64_t chunk_size)
      : rows(rows), length(length), channels(channels), states(states), chunk_size(chunk_size) {
    test::Numbers numbers;
    padded = cpu::padded(states);
    chunks = (length + chunk_size - 1) / chunk_size;
    x = numbers.vector<T>(rows * length * channels);
    grad_y = numbers.vector<T>(rows * length * channels);
    delta = numbers.vector<C>(rows * length * channels);
    for (C& step : delta) step = std::fabs(step);
    direct = numbers.vector<C>(channels);
    initial = numbers.vector<C>(rows * channels * states);
    grad_state = numbers.vector<C>(rows * channels * states);
    rates = padded_vector(numbers, channels);
    for (C& rate : rates) rate = -std::fabs(rate);
    weight_in = padded_vector(numbers, rows * length);
    weight_out = padded_vector(numbers, rows * length);
    in = {rows,         length,           channels,          states,
          padded,       chunk_size,       x.data(),          delta.data(),
          rates.data(), weight_in.data(), weight_out.data(), direct.data()};
  }

  std::vector<C> padded_vector(test::Numbers& numbers, int64_t count) const {
    std::vector<C> values(count * padded);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t n = 0; n < states; ++n) values[i * padded + n] = C(numbers.next());
    }
    return values;
  }

  std::vector<C> without_padding(const std::vector<C>& values) const {
    std::vector<C> kept;
    for (size_t i = 0; i < values.size(); ++i) {
      if (int64_t(i) % padded < states) kept.push_back(values[i]);
    }
    return kept;
  }
};

// What the kernels should give, all in double, without padding.
struct ScanExpected {
  std::vector<double> y, state, chunk_states, grad_x, grad_delta, grad_rates, grad_weight_in,
      grad_weight_out, grad_direct, grad_state;
};

template <class T>
ScanExpected plain(const ScanCase<T>& c) {
  const int64_t L = c.length, D = c.channels, N = c.states, P = c.padded;
  ScanExpected e;
  e.y.resize(c.rows * L * D);
  e.grad_x.resize(c.rows * L * D);
  e.grad_delta.resize(c.rows * L * D);
  e.grad_rates.resize(D * N);
  e.grad_weight_in.resize(c.rows * L * N);
  e.grad_weight_out.resize(c.rows * L * N);
  e.grad_direct.resize(D);
  e.state.assign(c.initial.begin(), c.initial.end());
  e.grad_state.assign(c.grad_state.begin(), c.grad_state.end());
  e.chunk_states.resize(c.rows * c.chunks * D * N);
  std::vector<double> h(L + 1);
  for (int64_t i = 0; i < c.rows * D * N; ++i) {
    const int64_t row = i / (D * N), d = i / N % D, n = i % N;
    const double rate = double(c.rates[d * P + n]);
    h[0] = double(c.initial[i]);
    for (int64_t t = 0; t < L; ++t) {
      const int64_t at = (row * L + t) * D + d, weight = (row * L + t) * P + n;
      const double step = double(c.delta[at]), x = double(c.x[at]);
      h[t + 1] = std::exp(step * rate) * h[t] + step * x * double(c.weight_in[weight]);
      if (t % c.chunk_size == 0) {
        e.chunk_states[(row * c.chunks + t / c.chunk_size) * D * N + i % (D * N)] = h[t];
      }
      e.y[at] += double(c.weight_out[weight]) * h[t + 1];
      if (n == 0) e.y[at] += double(c.direct[d]) * x;
    }
    e.state[i] = h[L];
    double g = e.grad_state[i];
    for (int64_t t = L - 1; t >= 0; --t) {
      const int64_t at = (row * L + t) * D + d, weight = (row * L + t) * P + n;
      const int64_t own = (row * L + t) * N + n;
      const double step = double(c.delta[at]), x = double(c.x[at]), out = double(c.grad_y[at]);
      g += double(c.weight_out[weight]) * out;
      const double rate_grad = g * std::exp(step * rate) * h[t];
      e.grad_weight_out[own] += out * h[t + 1];
      e.grad_weight_in[own] += step * x * g;
      e.grad_rates[d * N + n] += step * rate_grad;
      e.grad_x[at] += step * g * double(c.weight_in[weight]);
      e.grad_delta[at] += x * g * double(c.weight_in[weight]) + rate * rate_grad;
      if (n == 0) e.grad_x[at] += double(c.direct[d]) * out;
      if (n == 0) e.grad_direct[d] += x * out;
      g *= std::exp(step * rate);
    }
    e.grad_state[i] = g;
  }
  return e;
}

}  // namespace mblm::test
