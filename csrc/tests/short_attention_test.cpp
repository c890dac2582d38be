// Tests of short attention against plain loops in double.
#include "cpu/short_attention.h"

#include <algorithm>
#include <cmath>

#include "check.h"

using namespace mblm;
using Doubles = std::vector<double>;

struct Sizes {
  int64_t rows, queries, keys, heads, width;
};

// (count, width) rotated, position first + i for the i-th, or back.
Doubles rotated(const Doubles& x, int64_t width, int64_t first, const std::vector<float>& cos,
                const std::vector<float>& sin, double direction) {
  Doubles result = x;
  const int64_t half = width / 2, count = int64_t(x.size()) / width;
  for (int64_t i = 0; i < count && !cos.empty(); ++i) {
    for (int64_t c = 0; c < half; ++c) {
      const double cosine = double(cos[(first + i) * half + c]);
      const double sine = direction * double(sin[(first + i) * half + c]);
      const double one = x[i * width + c], two = x[i * width + c + half];
      result[i * width + c] = one * cosine - two * sine;
      result[i * width + c + half] = two * cosine + one * sine;
    }
  }
  return result;
}

template <class T>
void forward_and_backward(Sizes s, bool rotary, int64_t gap) {
  test::Numbers numbers;
  const int64_t offset = s.keys - s.queries, d = s.width;
  const int64_t position_stride = s.heads * d + gap;
  const auto q = numbers.vector<T>(s.rows * s.queries * position_stride);
  const auto k = numbers.vector<T>(s.rows * s.keys * position_stride);
  const auto v = numbers.vector<T>(s.rows * s.keys * position_stride);
  const auto g = numbers.vector<T>(s.rows * s.queries * position_stride);
  const auto cos = numbers.vector<float>(rotary ? s.keys * (d / 2) : 0);
  const auto sin = numbers.vector<float>(rotary ? s.keys * (d / 2) : 0);
  const auto view = [&](const std::vector<T>& values, int64_t positions) {
    return cpu::HeadsView<T>{values.data(), positions * position_stride, position_stride, d};
  };
  const cpu::ShortAttentionInput<T> in{s.heads,
                                       d,
                                       s.queries,
                                       s.keys,
                                       view(q, s.queries),
                                       view(k, s.keys),
                                       view(v, s.keys),
                                       rotary ? cos.data() : nullptr,
                                       rotary ? sin.data() : nullptr};

  Doubles out(s.rows * s.queries * s.heads * d), grad_q(out.size());
  Doubles grad_k(s.rows * s.keys * s.heads * d), grad_v(grad_k.size());
  for (int64_t item = 0; item < s.rows * s.heads; ++item) {
    const int64_t row = item / s.heads, head = item % s.heads;
    const auto gather = [&](const std::vector<T>& values, int64_t positions) {
      Doubles own;
      for (int64_t i = 0; i < positions * d; ++i) {
        const int64_t position = row * positions + i / d;
        own.push_back(double(values[position * position_stride + head * d + i % d]));
      }
      return own;
    };
    const auto scatter = [&](const Doubles& own, int64_t positions, Doubles& to) {
      for (int64_t i = 0; i < positions * d; ++i) {
        to[((row * positions + i / d) * s.heads + head) * d + i % d] = own[i];
      }
    };
    const Doubles own_q = rotated(gather(q, s.queries), d, offset, cos, sin, 1);
    const Doubles own_k = rotated(gather(k, s.keys), d, 0, cos, sin, 1);
    const Doubles own_v = gather(v, s.keys), own_g = gather(g, s.queries);
    Doubles own_out(s.queries * d), own_gq(s.queries * d), own_gk(s.keys * d), own_gv(s.keys * d);
    const double scale = 1 / std::sqrt(double(d));
    for (int64_t i = 0; i < s.queries; ++i) {
      const int64_t seen = offset + i + 1;
      Doubles p(seen), grad_p(seen);
      double total = 0, along = 0;
      for (int64_t j = 0; j < seen; ++j) {
        for (int64_t c = 0; c < d; ++c) p[j] += scale * own_q[i * d + c] * own_k[j * d + c];
        p[j] = std::exp(p[j]);
        total += p[j];
      }
      for (int64_t j = 0; j < seen; ++j) {
        p[j] /= total;
        for (int64_t c = 0; c < d; ++c) {
          own_out[i * d + c] += p[j] * own_v[j * d + c];
          own_gv[j * d + c] += p[j] * own_g[i * d + c];
          grad_p[j] += own_g[i * d + c] * own_v[j * d + c];
        }
        along += p[j] * grad_p[j];
      }
      for (int64_t j = 0; j < seen; ++j) {
        const double score = p[j] * (grad_p[j] - along) * scale;
        for (int64_t c = 0; c < d; ++c) {
          own_gq[i * d + c] += score * own_k[j * d + c];
          own_gk[j * d + c] += score * own_q[i * d + c];
        }
      }
    }
    scatter(own_out, s.queries, out);
    scatter(rotated(own_gq, d, offset, cos, sin, -1), s.queries, grad_q);
    scatter(rotated(own_gk, d, 0, cos, sin, -1), s.keys, grad_k);
    scatter(own_gv, s.keys, grad_v);
  }

  // In two ranges, as two threads would.
  const int64_t items = s.rows * s.heads;
  std::vector<T> got(out.size(), T(7.0f)), got_q(out.size(), T(7.0f));
  std::vector<T> got_k(grad_k.size(), T(7.0f)), got_v(grad_k.size(), T(7.0f));
  cpu::short_attention(in, got.data(), 0, items / 2);
  cpu::short_attention(in, got.data(), items / 2, items);
  for (const auto& [begin, end] : {std::pair(int64_t(0), items / 2), std::pair(items / 2, items)}) {
    cpu::short_attention_backward(in, view(g, s.queries), got_q.data(), got_k.data(), got_v.data(),
                                  begin, end);
  }
  CHECK(test::all_close(got, out));
  CHECK(test::all_close(got_q, grad_q));
  CHECK(test::all_close(got_k, grad_k));
  CHECK(test::all_close(got_v, grad_v));
}

template <class T>
void all_sizes() {
  for (const int64_t rows : {0, 1, 3}) {
    for (const int64_t queries : {0, 1, 2, 5, 9, 64}) {
      for (const int64_t more : {0, 1, 6}) {
        if (queries + more > 64) continue;
        for (const int64_t heads : {0, 1, 3}) {
          for (const int64_t width : {1, 2, 8, 18}) {
            const Sizes sizes{rows, queries, queries + more, heads, width};
            forward_and_backward<T>(sizes, false, 0);
            if (width % 2 == 0) forward_and_backward<T>(sizes, true, 3);
          }
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
