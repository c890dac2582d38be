// Tests of the selective scan against plain loops in double.
#include "cpu/selective_scan.h"

#include <algorithm>

#include "check.h"
#include "scan_case.h"

using namespace mblm;

template <class T>
using Case = test::ScanCase<T>;

template <class T>
void forward_and_backward(const Case<T>& c) {
  using C = cpu::compute_t<T>;
  const test::ScanExpected expected = test::plain(c);
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
  CHECK(test::all_close(c.without_padding(grad_rates), expected.grad_rates));
  CHECK(test::all_close(c.without_padding(grad_in), expected.grad_weight_in));
  CHECK(test::all_close(c.without_padding(grad_out), expected.grad_weight_out));
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
