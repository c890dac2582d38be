// Tests of the selective scan against plain loops in double.
#include "cpu/selective_scan.h"

#include <algorithm>
#include <cmath>

#include "check.h"

using namespace mblm;

template <class T>
struct Case {
  using C = cpu::compute_t<T>;
  int64_t rows, length, channels, states, padded, chunk_size, chunks;
  std::vector<T> x, grad_y;
  std::vector<C> delta, rates, weight_in, weight_out, direct, initial, grad_state;
  cpu::SelectiveScanInput<T> in;

  Case(int64_t rows, int64_t length, int64_t channels, int64_t states, int64_t chunk_size)
      : rows(rows), length(length), channels(channels), states(states), chunk_size(chunk_size) {
    test::Numbers numbers;
    padded = (states + cpu::kScanStatesMultiple - 1) / cpu::kScanStatesMultiple *
             cpu::kScanStatesMultiple;
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

  std::vector<double> without_padding(const std::vector<C>& values) const {
    std::vector<double> kept;
    for (size_t i = 0; i < values.size(); ++i) {
      if (int64_t(i) % padded < states) kept.push_back(double(values[i]));
    }
    return kept;
  }
};

// What the kernels should give, all in double, without padding.
struct Expected {
  std::vector<double> y, state, grad_x, grad_delta, grad_rates, grad_weight_in, grad_weight_out,
      grad_direct, grad_state;
};

template <class T>
Expected plain(const Case<T>& c) {
  const int64_t L = c.length, D = c.channels, N = c.states, P = c.padded;
  Expected e;
  e.y.resize(c.rows * L * D);
  e.grad_x.resize(c.rows * L * D);
  e.grad_delta.resize(c.rows * L * D);
  e.grad_rates.resize(D * N);
  e.grad_weight_in.resize(c.rows * L * N);
  e.grad_weight_out.resize(c.rows * L * N);
  e.grad_direct.resize(D);
  e.state.assign(c.initial.begin(), c.initial.end());
  e.grad_state.assign(c.grad_state.begin(), c.grad_state.end());
  std::vector<double> h(L + 1);
  for (int64_t i = 0; i < c.rows * D * N; ++i) {
    const int64_t row = i / (D * N), d = i / N % D, n = i % N;
    const double rate = double(c.rates[d * P + n]);
    h[0] = double(c.initial[i]);
    for (int64_t t = 0; t < L; ++t) {
      const int64_t at = (row * L + t) * D + d, weight = (row * L + t) * P + n;
      const double step = double(c.delta[at]), x = double(c.x[at]);
      h[t + 1] = std::exp(step * rate) * h[t] + step * x * double(c.weight_in[weight]);
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

template <class T>
void forward_and_backward(const Case<T>& c) {
  using C = cpu::compute_t<T>;
  const Expected expected = plain(c);
  const int64_t tiles = (c.channels + cpu::kScanTile - 1) / cpu::kScanTile;
  const int64_t items = c.rows * tiles;

  // In two ranges, as two threads would.
  std::vector<T> y(c.x.size(), T(7.0f));
  std::vector<C> state = c.initial;
  std::vector<C> chunk_states(c.rows * c.chunks * c.channels * c.states, C(7));
  cpu::selective_scan(c.in, y.data(), state.data(), chunk_states.data(), 0, items / 2);
  cpu::selective_scan(c.in, y.data(), state.data(), chunk_states.data(), items / 2, items);
  CHECK(test::all_close(y, expected.y));
  CHECK(test::all_close(state, expected.state));

  std::vector<T> grad_x(c.x.size(), T(7.0f));
  std::vector<C> grad_delta(c.x.size(), C(7)), grad_state = c.grad_state;
  std::vector<C> grad_rates(c.rates.size()), grad_direct(c.channels);
  std::vector<C> grad_in(c.weight_in.size()), grad_out(c.weight_in.size());
  const int64_t middle = tiles / 2 * cpu::kScanTile;
  for (int64_t chunk = c.chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * c.chunk_size;
    const int64_t values = std::min(c.chunk_size, c.length - start) * c.padded;
    std::vector<C> chunk_in(c.rows * values), chunk_out(c.rows * values);
    const cpu::SelectiveScanGradients<T> grad{
        c.grad_y.data(),   grad_state.data(),  grad_x.data(),   grad_delta.data(),
        grad_rates.data(), grad_direct.data(), chunk_in.data(), chunk_out.data()};
    cpu::selective_scan_backward(c.in, chunk_states.data(), chunk, grad, 0, c.rows, 0, middle);
    cpu::selective_scan_backward(c.in, chunk_states.data(), chunk, grad, 0, c.rows, middle,
                                 c.channels);
    for (int64_t row = 0; row < c.rows; ++row) {
      const int64_t to = (row * c.length + start) * c.padded;
      std::copy_n(chunk_in.data() + row * values, values, grad_in.data() + to);
      std::copy_n(chunk_out.data() + row * values, values, grad_out.data() + to);
    }
  }
  CHECK(test::all_close(grad_x, expected.grad_x));
  CHECK(test::all_close(grad_delta, expected.grad_delta));
  CHECK(test::all_close(grad_state, expected.grad_state));
  CHECK(test::all_close(grad_direct, expected.grad_direct));
  const auto compare = [&](const std::vector<C>& got, const std::vector<double>& wanted) {
    const std::vector<double> kept = c.without_padding(got);
    CHECK(test::all_close(std::vector<C>(kept.begin(), kept.end()), wanted));
  };
  compare(grad_rates, expected.grad_rates);
  compare(grad_in, expected.grad_weight_in);
  compare(grad_out, expected.grad_weight_out);
}

template <class T>
void all_sizes() {
  for (const int64_t rows : {0, 1, 3}) {
    for (const int64_t length : {0, 1, 4, 9}) {
      for (const int64_t channels : {0, 1, 5, 35}) {
        for (const int64_t states : {1, 8, 11}) {
          forward_and_backward(Case<T>(rows, length, channels, states, 4));
        }
      }
    }
  }
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  return test::result();
}
