// Tests of the state-space product and of the small products under it against plain loops.
#include "cpu/ssd.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "cpu/products.h"

using namespace mblm;

void products_and_transposes() {
  test::Numbers numbers;
  for (const int64_t rows : {0, 1, 4, 7, 17}) {
    for (const int64_t columns : {8, 16, 24}) {
      for (const int64_t depth : {0, 1, 5, 16}) {
        const auto a = numbers.vector<float>(rows * depth),
                   b = numbers.vector<float>(depth * columns);
        auto got = numbers.vector<float>(rows * columns), other = got;
        std::vector<double> expected(got.begin(), got.end());
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < columns; ++c) {
            for (int64_t k = 0; k < depth; ++k) {
              expected[r * columns + c] += double(a[r * depth + k]) * double(b[k * columns + c]);
            }
          }
        }
        cpu::add_product(rows, columns, depth, a.data(), depth, int64_t(1), b.data(), columns,
                         got.data(), columns);
        CHECK(test::all_close(got, expected));
        std::vector<float> turned(a.size());
        cpu::transpose(rows, depth, a.data(), depth, turned.data(), rows);
        cpu::add_product(rows, columns, depth, turned.data(), int64_t(1), rows, b.data(), columns,
                         other.data(), columns);
        CHECK(other == got);

        // Starting from nothing, and from something else scaled.
        const auto from = got;
        for (double& value : expected) value = 0;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < columns; ++c) {
            for (int64_t k = 0; k < depth; ++k) {
              expected[r * columns + c] += double(a[r * depth + k]) * double(b[k * columns + c]);
            }
          }
        }
        cpu::set_product(rows, columns, depth, a.data(), depth, int64_t(1), b.data(), columns,
                         got.data(), columns);
        CHECK(test::all_close(got, expected));
        for (size_t i = 0; i < from.size(); ++i) expected[i] += 0.5 * double(from[i]);
        cpu::product(rows, columns, depth, a.data(), depth, int64_t(1), b.data(), columns, 0.5f,
                     from.data(), got.data(), columns);
        CHECK(test::all_close(got, expected));
      }
    }
  }
}

struct Sizes {
  int64_t rows, length, heads, head_dim, states, chunk_size;
};

template <class T>
struct Case {
  using C = cpu::compute_t<T>;
  Sizes s;
  int64_t gap = 3;
  std::vector<T> x, grad_y;
  std::vector<C> dt, rates, weight_in, weight_out, direct, initial, grad_state;

  explicit Case(Sizes sizes) : s(sizes) {
    test::Numbers numbers;
    x = numbers.vector<T>(s.rows * s.length * position_stride());
    grad_y = numbers.vector<T>(s.rows * s.length * s.heads * s.head_dim);
    dt = numbers.vector<C>(s.rows * s.length * s.heads);
    for (C& step : dt) step = std::fabs(step);
    rates = numbers.vector<C>(s.heads);
    for (C& rate : rates) rate = -std::fabs(rate);
    direct = numbers.vector<C>(s.heads);
    initial = numbers.vector<C>(s.rows * s.heads * s.head_dim * s.states);
    grad_state = numbers.vector<C>(initial.size());
    weight_in = numbers.vector<C>(s.rows * s.length * s.states);
    weight_out = numbers.vector<C>(weight_in.size());
  }

  int64_t position_stride() const { return s.heads * s.head_dim + gap; }

  double x_at(int64_t row, int64_t t, int64_t channel) const {
    return double(x[(row * s.length + t) * position_stride() + channel]);
  }

  // The chunk from position start on, with its scores.
  cpu::SsdInput<T> chunk(int64_t start, std::vector<C>& scores) const {
    const int64_t positions = std::min(s.chunk_size, s.length - start);
    cpu::SsdInput<T> in{s.rows,
                        s.length,
                        s.heads,
                        s.head_dim,
                        s.states,
                        start,
                        positions,
                        x.data(),
                        s.length * position_stride(),
                        position_stride(),
                        dt.data(),
                        rates.data(),
                        weight_in.data(),
                        weight_out.data(),
                        direct.data(),
                        nullptr};
    scores.resize(s.rows * positions * in.padded_positions());
    cpu::ssd_scores(in, scores.data(), 0, s.rows / 2);
    cpu::ssd_scores(in, scores.data(), s.rows / 2, s.rows);
    in.scores = scores.data();
    return in;
  }
};

// What the kernels should give, all in double.
struct Expected {
  std::vector<double> y, state, grad_x, grad_dt, grad_rates, grad_direct, grad_in, grad_out,
      grad_state;
};

template <class T>
Expected plain(const Case<T>& c) {
  const auto [rows, length, heads, head_dim, states, chunk_size] = c.s;
  Expected e;
  e.y.resize(c.grad_y.size());
  e.grad_x.resize(c.grad_y.size());
  e.grad_dt.resize(c.dt.size());
  e.grad_rates.resize(rows * heads);
  e.grad_direct.resize(rows * heads);
  e.grad_in.resize(c.weight_in.size());
  e.grad_out.resize(c.weight_in.size());
  e.state.resize(c.initial.size());
  e.grad_state.resize(c.initial.size());
  std::vector<double> h(length + 1);
  for (int64_t i = 0; i < rows * heads * head_dim * states; ++i) {
    const int64_t n = i % states, channel = i / states % (heads * head_dim);
    const int64_t row = i / states / heads / head_dim, head = channel / head_dim;
    const bool first_state = n == 0;
    const double rate = double(c.rates[head]), direct = double(c.direct[head]);
    h[0] = double(c.initial[i]);
    for (int64_t t = 0; t < length; ++t) {
      const int64_t position = row * length + t;
      const double step = double(c.dt[position * heads + head]), x = c.x_at(row, t, channel);
      h[t + 1] =
          std::exp(step * rate) * h[t] + step * x * double(c.weight_in[position * states + n]);
      double& y = e.y[position * heads * head_dim + channel];
      y += double(c.weight_out[position * states + n]) * h[t + 1];
      if (first_state) y += direct * x;
    }
    e.state[i] = h[length];
    double g = double(c.grad_state[i]);
    for (int64_t t = length - 1; t >= 0; --t) {
      const int64_t position = row * length + t, weight = position * states + n;
      const int64_t at = position * heads * head_dim + channel;
      const double step = double(c.dt[position * heads + head]), x = c.x_at(row, t, channel);
      const double out = double(c.grad_y[at]);
      g += double(c.weight_out[weight]) * out;
      const double rate_grad = g * std::exp(step * rate) * h[t];
      e.grad_out[weight] += out * h[t + 1];
      e.grad_in[weight] += step * x * g;
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

template <class T>
void forward_and_backward(const Case<T>& c) {
  using C = cpu::compute_t<T>;
  const auto [rows, length, heads, head_dim, states, chunk_size] = c.s;
  const Expected expected = plain(c);
  const int64_t per_row = heads * head_dim * states;
  std::vector<C> scores, state = c.initial;
  std::vector<std::vector<C>> before;  // each chunk
  std::vector<T> y(c.grad_y.size(), T(7.0f));
  for (int64_t start = 0; start < length; start += chunk_size) {
    before.push_back(state);
    const auto in = c.chunk(start, scores);
    const int64_t items = rows * heads;  // in two ranges, as two threads would
    const cpu::SsdStates<const C> from{before.back().data(), per_row};
    const cpu::SsdStates<C> to{state.data(), per_row};
    cpu::ssd(in, y.data(), from, to, 0, items / 2);
    cpu::ssd(in, y.data(), from, to, items / 2, items);
  }
  CHECK(test::all_close(y, expected.y));
  CHECK(test::all_close(state, expected.state));

  std::vector<T> grad_x(y.size(), T(7.0f));
  std::vector<C> grad_state = c.grad_state, grad_dt(c.dt.size(), C(7));
  std::vector<C> grad_rates(rows * heads), grad_direct(rows * heads);
  std::vector<T> grad_in(c.weight_in.size()), grad_out(c.weight_in.size());
  for (int64_t chunk = int64_t(before.size()) - 1; chunk >= 0; --chunk) {
    const auto in = c.chunk(chunk * chunk_size, scores);
    const int64_t scores_each = in.positions * in.padded_positions(), each = in.positions * states;
    const int64_t groups = std::min(heads, int64_t(2)), half = heads / 2;
    for (int64_t row = 0; row < rows && groups > 0; ++row) {
      std::vector<C> grad_scores(groups * scores_each, C(7)), of_in(groups * each, C(7));
      std::vector<C> of_out = of_in;
      for (int64_t group = 0; group < groups; ++group) {
        const cpu::SsdGradients<T> grad{c.grad_y.data(),
                                        {before[chunk].data(), per_row},
                                        grad_state.data(),
                                        grad_x.data(),
                                        grad_dt.data(),
                                        grad_rates.data(),
                                        grad_direct.data(),
                                        grad_scores.data() + group * scores_each,
                                        of_in.data() + group * each,
                                        of_out.data() + group * each};
        cpu::ssd_backward(in, grad, row, group * half, group + 1 < groups ? half : heads);
      }
      cpu::ssd_backward_weights(in, groups, grad_scores.data(), of_in.data(), of_out.data(),
                                grad_in.data(), grad_out.data(), row);
    }
  }
  CHECK(test::all_close(grad_x, expected.grad_x));
  CHECK(test::all_close(grad_dt, expected.grad_dt));
  CHECK(test::all_close(grad_state, expected.grad_state));
  CHECK(test::all_close(grad_rates, expected.grad_rates));
  CHECK(test::all_close(grad_direct, expected.grad_direct));
  CHECK(test::all_close(grad_in, expected.grad_in));
  CHECK(test::all_close(grad_out, expected.grad_out));
}

template <class T>
void all_sizes() {
  for (const int64_t rows : {0, 1, 2}) {
    for (const int64_t length : {0, 1, 5, 9, 14}) {
      for (const int64_t heads : {0, 1, 3}) {
        for (const int64_t head_dim : {1, 8, 11}) {
          for (const int64_t states : {8, 16}) {
            forward_and_backward(Case<T>({rows, length, heads, head_dim, states, 5}));
          }
        }
      }
    }
  }
}

int main() {
  products_and_transposes();
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  return test::result();
}
