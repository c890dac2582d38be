// A case of the state-space product, and plain loops for it in double.
#pragma once

#include <cmath>

#include "check.h"
#include "cpu/kernel.h"

namespace mblm::test {

struct SsdSizes {
  int64_t rows, length, heads, head_dim, states, chunk_size;

  int64_t padded() const { return (states + 7) / 8 * 8; }
  int64_t chunks() const { return (length + chunk_size - 1) / chunk_size; }
};

template <class T>
struct SsdCase {
  using C = cpu::compute_t<T>;
  SsdSizes s;
  int64_t gap = 3;
  std::vector<T> x, grad_y;
  std::vector<C> dt, rates, direct, initial, grad_state;
  std::vector<C> weight_in, weight_out;  // (rows, length, padded states), values of type T

  explicit SsdCase(SsdSizes sizes) : s(sizes) {
    test::Numbers numbers;
    x = numbers.vector<T>(s.rows * s.length * position_stride());
    grad_y = numbers.vector<T>(s.rows * s.length * s.heads * s.head_dim);
    dt = numbers.vector<C>(s.rows * s.length * s.heads);
    for (C& step : dt) step = std::fabs(step) / 2;
    rates = numbers.vector<C>(s.heads);
    for (C& rate : rates) rate = -std::fabs(rate);
    direct = numbers.vector<C>(s.heads);
    initial = numbers.vector<C>(s.rows * s.heads * s.head_dim * s.states);
    grad_state = numbers.vector<C>(initial.size());
    weight_in = numbers.vector<C>(s.rows * s.length * s.padded());
    weight_out = numbers.vector<C>(weight_in.size());
    for (auto* weights : {&weight_in, &weight_out}) {
      for (size_t i = 0; i < weights->size(); ++i) {
        const bool is_padding = int64_t(i) % s.padded() >= s.states;
        (*weights)[i] = is_padding ? 0 : C(T((*weights)[i]));
      }
    }
  }

  int64_t position_stride() const { return s.heads * s.head_dim + gap; }

  double x_at(int64_t row, int64_t t, int64_t channel) const {
    return double(x[(row * s.length + t) * position_stride() + channel]);
  }
};

// What the kernels should give, all in double.
struct SsdExpected {
  std::vector<double> y, state, chunk_states, grad_x, grad_dt, grad_rates, grad_direct, grad_in,
      grad_out, grad_state;
};

template <class T>
SsdExpected plain(const SsdCase<T>& c) {
  const auto [rows, length, heads, head_dim, states, chunk_size] = c.s;
  SsdExpected e;
  e.y.resize(c.grad_y.size());
  e.grad_x.resize(c.grad_y.size());
  e.grad_dt.resize(c.dt.size());
  e.grad_rates.resize(rows * heads);
  e.grad_direct.resize(rows * heads);
  e.grad_in.resize(rows * length * states);
  e.grad_out.resize(rows * length * states);
  e.state.resize(c.initial.size());
  e.grad_state.resize(c.initial.size());
  const int64_t chunks = c.s.chunks(), per_row = heads * head_dim * states;
  e.chunk_states.resize(rows * chunks * per_row);
  std::vector<double> h(length + 1);
  for (int64_t i = 0; i < rows * per_row; ++i) {
    const int64_t n = i % states, channel = i / states % (heads * head_dim);
    const int64_t row = i / states / heads / head_dim, head = channel / head_dim;
    const bool first_state = n == 0;
    const double rate = double(c.rates[head]), direct = double(c.direct[head]);
    h[0] = double(c.initial[i]);
    for (int64_t t = 0; t < length; ++t) {
      const int64_t position = row * length + t, weight = position * c.s.padded() + n;
      const double step = double(c.dt[position * heads + head]), x = c.x_at(row, t, channel);
      h[t + 1] = std::exp(step * rate) * h[t] + step * x * double(c.weight_in[weight]);
      if (t % chunk_size == 0) {
        e.chunk_states[(row * chunks + t / chunk_size) * per_row + i % per_row] = h[t];
      }
      double& y = e.y[position * heads * head_dim + channel];
      y += double(c.weight_out[weight]) * h[t + 1];
      if (first_state) y += direct * x;
    }
    e.state[i] = h[length];
    double g = double(c.grad_state[i]);
    for (int64_t t = length - 1; t >= 0; --t) {
      const int64_t position = row * length + t, weight = position * c.s.padded() + n;
      const int64_t at = position * heads * head_dim + channel;
      const double step = double(c.dt[position * heads + head]), x = c.x_at(row, t, channel);
      const double out = double(c.grad_y[at]);
      g += double(c.weight_out[weight]) * out;
      const double rate_grad = g * std::exp(step * rate) * h[t];
      e.grad_out[position * states + n] += out * h[t + 1];
      e.grad_in[position * states + n] += step * x * g;
      e.grad_rates[row * heads + head] += step * rate_grad;
      e.grad_x[at] += step * g * double(c.weight_in[weight]);
      e.grad_dt[position * heads + head] += x * g * double(c.weight_in[weight]) + rate * rate_grad;
      if (first_state) e.grad_x[at] += direct * out;
      if (first_state) e.grad_direct[row * heads + head] += x * out;
      g *= std::exp(step * rate);
    }
    e.grad_state[i] = g;
  }
  return e;
}

}  // namespace mblm::test
