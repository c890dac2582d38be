// Tests of the state-space product and of the small products under it against plain loops.
#include "cpu/ssd.h"

#include <algorithm>

#include "check.h"
#include "cpu/products.h"
#include "ssd_case.h"

using namespace mblm;
template <class T>
using Case = test::SsdCase<T>;

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

// The chunk from position start on, with its scores.
template <class T>
cpu::SsdInput<T> input_of(const Case<T>& c, int64_t start, std::vector<cpu::compute_t<T>>& scores) {
  const auto& s = c.s;
  const int64_t positions = std::min(s.chunk_size, s.length - start);
  cpu::SsdInput<T> in{s.rows,
                      s.length,
                      s.heads,
                      s.head_dim,
                      s.states,
                      start,
                      positions,
                      c.x.data(),
                      s.length * c.position_stride(),
                      c.position_stride(),
                      c.dt.data(),
                      c.rates.data(),
                      c.weight_in.data(),
                      c.weight_out.data(),
                      c.direct.data(),
                      nullptr};
  scores.resize(s.rows * positions * in.padded_positions());
  cpu::ssd_scores(in, scores.data(), 0, s.rows / 2);
  cpu::ssd_scores(in, scores.data(), s.rows / 2, s.rows);
  in.scores = scores.data();
  return in;
}

template <class T>
void forward_and_backward(const Case<T>& c) {
  using C = cpu::compute_t<T>;
  const auto [rows, length, heads, head_dim, states, chunk_size] = c.s;
  const auto expected = test::plain(c);
  const int64_t per_row = heads * head_dim * states;
  std::vector<C> scores, state = c.initial;
  std::vector<std::vector<C>> before;  // each chunk
  std::vector<T> y(c.grad_y.size(), T(7.0f));
  for (int64_t start = 0; start < length; start += chunk_size) {
    before.push_back(state);
    const auto in = input_of(c, start, scores);
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
    const auto in = input_of(c, chunk * chunk_size, scores);
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
