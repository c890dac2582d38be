// Rotary positions and causal attention of many short sequences: see short_attention.h.
//
// One head of one row at a time: its queries, keys and values are copied, rotated, to buffers whose
// rows are whole lanes, and everything up to the result happens in a core's cache.
#include "cpu/short_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/products.h"

namespace mblm::cpu {

// One vector of width values, rotated if there are a cosine and a sine, times factor.
template <class C, class T>
MBLM_INLINE void read_rotated(const T* __restrict from, int64_t width, const float* cos,
                              const float* sin, C factor, C* __restrict to) {
  if (!cos) {
    for (int64_t c = 0; c < width; ++c) to[c] = C(from[c]) * factor;
    return;
  }
  const int64_t half = width / 2;
  for (int64_t c = 0; c < half; ++c) {
    const C one = C(from[c]) * factor, two = C(from[c + half]) * factor;
    to[c] = one * C(cos[c]) - two * C(sin[c]);
    to[c + half] = two * C(cos[c]) + one * C(sin[c]);
  }
}

// The gradient of what read_rotated read, from that of what it gave.
template <class C, class T>
MBLM_INLINE void write_rotated_back(const C* __restrict from, int64_t width, const float* cos,
                                    const float* sin, C factor, T* __restrict to) {
  if (!cos) {
    for (int64_t c = 0; c < width; ++c) to[c] = T(from[c] * factor);
    return;
  }
  const int64_t half = width / 2;
  for (int64_t c = 0; c < half; ++c) {
    const C one = from[c] * factor, two = from[c + half] * factor;
    to[c] = T(one * C(cos[c]) + two * C(sin[c]));
    to[c + half] = T(two * C(cos[c]) - one * C(sin[c]));
  }
}

// a (rows, depth) times b (columns, depth) transposed, entries j <= i + offset; the others are set
// to fill. Rows of a and b are whole lanes, to has rows of to_row.
template <class C>
MBLM_INLINE void causal_products(int64_t rows, int64_t offset, int64_t depth, const C* a,
                                 const C* b, C fill, C* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t seen = i + offset + 1;
    for (int64_t j = 0; j < seen; ++j) {
      Lanes<C> sums{};
      for (int64_t c = 0; c < depth; c += kLaneCount<C>) {
        sums += load(a + i * depth + c) * load(b + j * depth + c);
      }
      to[i * to_row + j] = sum(sums);
    }
    std::fill(to + i * to_row + seen, to + (i + 1) * to_row, fill);
  }
}

// Buffers for one head of one row, and its probabilities.
template <class T>
struct Head {
  using C = compute_t<T>;
  const ShortAttentionInput<T>& in;
  const int64_t offset, width, span;  // T - S, padded d and T
  const C scale;
  std::vector<C> q, k, v;        // (S, padded d), (T, padded d) twice; q scaled
  std::vector<C> probabilities;  // (S, padded T)

  explicit Head(const ShortAttentionInput<T>& in)
      : in(in),
        offset(in.keys - in.queries),
        width(padded(in.width)),
        span(padded(in.keys)),
        scale(C(1 / std::sqrt(double(in.width)))),
        q(in.queries * width),
        k(in.keys * width),
        v(in.keys * width),
        probabilities(in.queries * span) {}

  MBLM_INLINE const float* table(const float* values, int64_t position) const {
    return values ? values + position * (in.width / 2) : nullptr;
  }

  MBLM_INLINE void read(int64_t row, int64_t head) {
    for (int64_t i = 0; i < in.queries; ++i) {
      read_rotated(
          in.q.data + row * in.q.row_stride + i * in.q.position_stride + head * in.q.head_stride,
          in.width, table(in.cos, offset + i), table(in.sin, offset + i), scale,
          q.data() + i * width);
    }
    for (int64_t j = 0; j < in.keys; ++j) {
      read_rotated(
          in.k.data + row * in.k.row_stride + j * in.k.position_stride + head * in.k.head_stride,
          in.width, table(in.cos, j), table(in.sin, j), C(1), k.data() + j * width);
      read_rotated(
          in.v.data + row * in.v.row_stride + j * in.v.position_stride + head * in.v.head_stride,
          in.width, nullptr, nullptr, C(1), v.data() + j * width);
    }
    constexpr C kLowest = -std::numeric_limits<C>::infinity();
    causal_products(in.queries, offset, width, q.data(), k.data(), kLowest, probabilities.data(),
                    span);
    for (int64_t i = 0; i < in.queries; ++i) softmax(probabilities.data() + i * span);
  }

  MBLM_INLINE void softmax(C* row) const {
    C highest = row[0];
    for (int64_t j = 1; j < in.keys; ++j) highest = row[j] > highest ? row[j] : highest;
    Lanes<C> sums{};
    for (int64_t j = 0; j < span; j += kLaneCount<C>) {
      const Lanes<C> power = exp(load(row + j) - highest);
      store(row + j, power);
      sums += power;
    }
    const C inverse = C(1) / sum(sums);
    for (int64_t j = 0; j < span; ++j) row[j] *= inverse;
  }
};

// to (S, padded d) = a (S, padded T) b (T, padded d), a zero where causality forbids. Compiled once
// for all types that are computed in C, as is what follows.
template <class C>
MBLM_CLONES void causal_sum(int64_t queries, int64_t offset, int64_t width, int64_t span,
                            const C* a, const C* b, C* to) {
  std::fill(to, to + queries * width, C(0));
  for (int64_t i = 0; i < queries; i += kProductRows) {
    C* const sums = to + i * width;
    const int64_t stop = std::min(i + kProductRows, queries);
    inline_product(stop - i, width, offset + stop, a + i * span, span, int64_t(1), b, width, C(1),
                   static_cast<const C*>(sums), sums, width);
  }
}

// to (T, padded d) = a (S, padded T) transposed times b (S, padded d).
template <class C>
MBLM_CLONES void transposed_sum(int64_t queries, int64_t keys, int64_t offset, int64_t width,
                                int64_t span, const C* a, const C* b, C* to) {
  std::fill(to, to + keys * width, C(0));
  for (int64_t j = 0; j < keys; j += kProductRows) {
    C* const sums = to + j * width;
    const int64_t first = std::max<int64_t>(j - offset, 0);  // query that sees key j
    inline_product(std::min(kProductRows, keys - j), width, queries - first, a + first * span + j,
                   int64_t(1), span, b + first * width, width, C(1), static_cast<const C*>(sums),
                   sums, width);
  }
}

template <class T>
MBLM_CLONES void short_attention(const ShortAttentionInput<T>& in, T* out, int64_t begin,
                                 int64_t end) {
  using C = compute_t<T>;
  Head<T> own(in);
  std::vector<C> sums(own.q.size());
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / in.heads, head = item % in.heads;
    own.read(row, head);
    causal_sum(in.queries, own.offset, own.width, own.span, own.probabilities.data(), own.v.data(),
               sums.data());
    for (int64_t i = 0; i < in.queries; ++i) {
      T* to = out + ((row * in.queries + i) * in.heads + head) * in.width;
      convert(sums.data() + i * own.width, in.width, to);
    }
  }
}

template <class T>
MBLM_CLONES void short_attention_backward(const ShortAttentionInput<T>& in,
                                          const HeadsView<T>& grad, T* grad_q, T* grad_k, T* grad_v,
                                          int64_t begin, int64_t end) {
  using C = compute_t<T>;
  Head<T> own(in);
  const int64_t queries = in.queries, keys = in.keys, width = own.width, span = own.span;
  std::vector<C> grad_out(own.q.size()), grad_scores(own.probabilities.size());
  std::vector<C> sums(own.k.size()), query_sums(own.q.size());
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / in.heads, head = item % in.heads;
    own.read(row, head);
    for (int64_t i = 0; i < queries; ++i) {
      const T* from =
          grad.data + row * grad.row_stride + i * grad.position_stride + head * grad.head_stride;
      convert(from, in.width, grad_out.data() + i * width);
    }
    const auto place = [&](T* to, int64_t positions, int64_t position) MBLM_INLINE_LAMBDA {
      return to + ((row * positions + position) * in.heads + head) * in.width;
    };

    transposed_sum(queries, keys, own.offset, width, span, own.probabilities.data(),
                   grad_out.data(), sums.data());
    for (int64_t j = 0; j < keys; ++j) {
      write_rotated_back(sums.data() + j * width, in.width, nullptr, nullptr, C(1),
                         place(grad_v, keys, j));
    }
    // Through the softmax: p_ij (dp_ij - sum over j of p_ij dp_ij).
    causal_products(queries, own.offset, width, grad_out.data(), own.v.data(), C(0),
                    grad_scores.data(), span);
    for (int64_t i = 0; i < queries; ++i) {
      const C* p = own.probabilities.data() + i * span;
      C* g = grad_scores.data() + i * span;
      Lanes<C> along{};
      for (int64_t j = 0; j < span; j += kLaneCount<C>) along += load(p + j) * load(g + j);
      const C mean = sum(along);
      for (int64_t j = 0; j < span; ++j) g[j] = p[j] * (g[j] - mean);
    }
    causal_sum(queries, own.offset, width, span, grad_scores.data(), own.k.data(),
               query_sums.data());
    for (int64_t i = 0; i < queries; ++i) {
      write_rotated_back(query_sums.data() + i * width, in.width, own.table(in.cos, own.offset + i),
                         own.table(in.sin, own.offset + i), own.scale, place(grad_q, queries, i));
    }
    transposed_sum(queries, keys, own.offset, width, span, grad_scores.data(), own.q.data(),
                   sums.data());
    for (int64_t j = 0; j < keys; ++j) {
      write_rotated_back(sums.data() + j * width, in.width, own.table(in.cos, j),
                         own.table(in.sin, j), C(1), place(grad_k, keys, j));
    }
  }
}

MBLM_INSTANTIATE(short_attention)
MBLM_INSTANTIATE(short_attention_backward)

}  // namespace mblm::cpu
