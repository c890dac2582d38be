// Mamba-2's state-space product: see ssd.h.
//
// A head's part of a chunk is copied to buffers whose rows are whole lanes, (positions, padded P),
// and worked on there with small matrix products.
#include "cpu/ssd.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/products.h"

namespace mblm::cpu {

constexpr int64_t kPad = 8;

MBLM_INLINE int64_t padded(int64_t size) {
  return (size + kPad - 1) / kPad * kPad;
}

// Buffers for one head of one chunk: T positions, P channels, N states.
template <class C>
struct HeadBuffers {
  int64_t width, span;                 // padded P and T
  std::vector<double> sums;            // (T): of dt A up to each position
  std::vector<C> step, since, until;   // (T): dt; decay from the state before, to the state after
  C total;                             // decay over the whole chunk
  std::vector<C> x, scaled, arriving;  // (T, padded P): x, dt x, the part of dt x that is left
  std::vector<C> pairs;                // (T, padded T): decay from position j to i >= j, else 0
  std::vector<C> state, turned;        // (P, padded N) and a transposed one, (padded N, padded P)

  template <class T>
  explicit HeadBuffers(const SsdInput<T>& in)
      : width(padded(in.head_dim)),
        span(padded(in.positions)),
        sums(in.positions),
        step(in.positions),
        since(in.positions),
        until(in.positions),
        x(in.positions * width),
        scaled(x.size()),
        arriving(x.size()),
        pairs(in.positions * span),
        state(in.head_dim * in.padded_states),
        turned(in.padded_states * width) {}

  template <class T>
  MBLM_INLINE void read(const SsdInput<T>& in, int64_t row, int64_t head) {
    const int64_t positions = in.positions;
    double sum = 0;
    for (int64_t t = 0; t < positions; ++t) {
      step[t] = in.dt[(row * in.length + in.start + t) * in.heads + head];
      sum += double(C(step[t] * in.rates[head]));
      sums[t] = sum;
    }
    total = C(std::exp(sum));
    for (int64_t t = 0; t < positions; ++t) {
      since[t] = C(std::exp(sums[t]));
      until[t] = C(std::exp(sum - sums[t]));
      const T* from =
          in.x + row * in.x_row_stride + (in.start + t) * in.x_position_stride + head * in.head_dim;
      C* to = x.data() + t * width;
      for (int64_t p = 0; p < in.head_dim; ++p) to[p] = C(from[p]);
      for (int64_t p = 0; p < width; ++p) {
        scaled[t * width + p] = to[p] * step[t];
        arriving[t * width + p] = scaled[t * width + p] * until[t];
      }
    }
    for (int64_t i = 0; i < positions; ++i) {
      C* pair = pairs.data() + i * span;
      for (int64_t j = 0; j <= i; ++j) pair[j] = C(sums[i] - sums[j]);
      for (int64_t j = 0; j <= i; j += kLaneCount<C>) store(pair + j, exp(load(pair + j)));
      std::fill(pair + i + 1, pair + span, C(0));
    }
  }
};

// (P, N) to and from (P, padded N).
template <class C>
MBLM_INLINE void copy_state(int64_t head_dim, int64_t states, const C* from, int64_t from_row,
                            C* to, int64_t to_row) {
  for (int64_t p = 0; p < head_dim; ++p) std::copy_n(from + p * from_row, states, to + p * to_row);
}

template <class C>
MBLM_INLINE void scale(std::vector<C>& values, C factor) {
  for (C& value : values) value *= factor;
}

template <class T>
MBLM_INLINE void forward(const SsdInput<T>& in, T* y, compute_t<T>* state, int64_t begin,
                         int64_t end) {
  using C = compute_t<T>;
  const int64_t positions = in.positions, padded_states = in.padded_states;
  HeadBuffers<C> own(in);
  const int64_t width = own.width, span = own.span;
  std::vector<C> out(positions * width);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / in.heads, head = item % in.heads;
    const C* weight_in = in.weight_in + (row * in.length + in.start) * padded_states;
    const C* weight_out = in.weight_out + (row * in.length + in.start) * padded_states;
    C* h = state + item * in.head_dim * in.states;
    own.read(in, row, head);
    copy_state(in.head_dim, in.states, h, in.states, own.state.data(), padded_states);

    // What the state before gives to each position: h C.
    std::fill(out.begin(), out.end(), C(0));
    transpose(in.head_dim, padded_states, own.state.data(), padded_states, own.turned.data(),
              width);
    add_product(positions, width, padded_states, weight_out, padded_states, int64_t(1),
                own.turned.data(), width, out.data(), width);
    for (int64_t t = 0; t < positions; ++t) {
      for (int64_t p = 0; p < width; ++p) out[t * width + p] *= own.since[t];
    }
    // What earlier positions of the chunk give: the scores, decayed, times dt x.
    const C* scores = in.scores + row * positions * positions;
    for (int64_t i = 0; i < positions; ++i) {
      C* mixing = own.pairs.data() + i * span;
      for (int64_t j = 0; j <= i; ++j) mixing[j] *= scores[i * positions + j];
    }
    for (int64_t i = 0; i < positions; i += kProductRows) {
      const int64_t stop = std::min(i + kProductRows, positions);
      add_product(stop - i, width, stop, own.pairs.data() + i * span, span, int64_t(1),
                  own.scaled.data(), width, out.data() + i * width, width);
    }
    for (int64_t t = 0; t < positions; ++t) {
      T* to = y + ((row * in.length + in.start + t) * in.heads + head) * in.head_dim;
      for (int64_t p = 0; p < in.head_dim; ++p) {
        to[p] = T(out[t * width + p] + in.direct[head] * own.x[t * width + p]);
      }
    }

    scale(own.state, own.total);
    add_product(in.head_dim, padded_states, positions, own.arriving.data(), int64_t(1), width,
                weight_in, padded_states, own.state.data(), padded_states);
    copy_state(in.head_dim, in.states, own.state.data(), padded_states, h, in.states);
  }
}

template <class C>
MBLM_INLINE C dot(const C* a, const C* b, int64_t n) {
  Lanes<C> sums{};
  for (int64_t i = 0; i < n; i += kLaneCount<C>) sums += load(a + i) * load(b + i);
  return sum(sums);
}

// The pairs' part: from grad_mixing (T, padded T), the gradient of the decayed scores, to the
// gradients of the scores and of the sums of dt A. Leaves the decayed scores in pairs.
template <class C>
MBLM_INLINE void pairs_backward(int64_t positions, int64_t span, const C* scores,
                                const C* grad_mixing, C* pairs, C* grad_scores, double* grad_sums) {
  for (int64_t i = 0; i < positions; ++i) {
    double row_sum = 0;
    for (int64_t j = 0; j <= i; ++j) {
      const C decayed = grad_mixing[i * span + j] * pairs[i * span + j];
      const C score = scores[i * positions + j];
      grad_scores[i * positions + j] += decayed;
      pairs[i * span + j] *= score;
      row_sum += double(decayed * score);
      grad_sums[j] -= double(decayed * score);
    }
    grad_sums[i] += row_sum;
  }
}

// As in the reference: with s_i the sum of dt A up to position i of the chunk, each decay is an
// exponential of s_i, s_j or the last s; their gradients, summed from the end, are those of dt A.
template <class T>
MBLM_INLINE void backward(const SsdInput<T>& in, const SsdGradients<T>& grad, int64_t row,
                          int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t positions = in.positions, states = in.padded_states, head_dim = in.head_dim;
  HeadBuffers<C> own(in);
  const int64_t width = own.width, span = own.span;
  std::vector<C> grad_y(own.x.size()), leaving(own.x.size()), grad_scaled(own.x.size());
  std::vector<C> carried(own.x.size()), carry(own.state.size()), out_of(positions * states);
  std::vector<C> scaled_turned(width * span), grad_mixing(own.pairs.size());
  std::vector<double> grad_sums(positions);
  const C* weight_in = in.weight_in + (row * in.length + in.start) * states;
  const C* weight_out = in.weight_out + (row * in.length + in.start) * states;
  for (int64_t head = begin; head < end; ++head) {
    const int64_t item = row * in.heads + head;
    C* grad_state = grad.state + item * head_dim * in.states;
    own.read(in, row, head);
    copy_state(head_dim, in.states,
               grad.before + row * grad.before_row_stride + head * head_dim * in.states, in.states,
               own.state.data(), states);
    copy_state(head_dim, in.states, grad_state, in.states, carry.data(), states);
    for (int64_t t = 0; t < positions; ++t) {
      const T* from = grad.y + ((row * in.length + in.start + t) * in.heads + head) * head_dim;
      for (int64_t p = 0; p < head_dim; ++p) {
        grad_y[t * width + p] = C(from[p]);
        leaving[t * width + p] = C(from[p]) * own.since[t];
      }
    }

    // Pairs of positions: y_i += pairs_ij scores_ij scaled_j.
    std::fill(grad_mixing.begin(), grad_mixing.end(), C(0));
    std::fill(grad_sums.begin(), grad_sums.end(), 0.0);
    std::fill(grad_scaled.begin(), grad_scaled.end(), C(0));
    transpose(positions, width, own.scaled.data(), width, scaled_turned.data(), span);
    for (int64_t i = 0; i < positions; i += kProductRows) {
      const int64_t stop = std::min(i + kProductRows, positions);
      add_product(stop - i, padded(stop), width, grad_y.data() + i * width, width, int64_t(1),
                  scaled_turned.data(), span, grad_mixing.data() + i * span, span);
    }
    pairs_backward(positions, span, in.scores + row * positions * positions, grad_mixing.data(),
                   own.pairs.data(), grad.scores + row * positions * positions, grad_sums.data());
    for (int64_t j = 0; j < positions; j += kProductRows) {
      const int64_t count = std::min(kProductRows, positions - j);
      add_product(count, width, positions - j, own.pairs.data() + j * span + j, int64_t(1), span,
                  grad_y.data() + j * width, width, grad_scaled.data() + j * width, width);
    }

    // Into the state after: h += arriving' B.
    std::fill(carried.begin(), carried.end(), C(0));
    transpose(head_dim, states, carry.data(), states, own.turned.data(), width);
    add_product(positions, width, states, weight_in, states, int64_t(1), own.turned.data(), width,
                carried.data(), width);
    add_product(positions, states, head_dim, own.arriving.data(), width, int64_t(1), carry.data(),
                states, grad.weight_in + row * positions * states, states);
    // Out of the state before: y_i += since_i h C_i.
    std::fill(out_of.begin(), out_of.end(), C(0));
    add_product(positions, states, head_dim, leaving.data(), width, int64_t(1), own.state.data(),
                states, out_of.data(), states);
    C* grad_out = grad.weight_out + row * positions * states;
    for (int64_t i = 0; i < positions * states; ++i) grad_out[i] += out_of[i];

    // From the state after to the one before.
    scale(carry, own.total);
    double grad_last = 0;
    for (int64_t p = 0; p < head_dim; ++p) {
      grad_last += double(dot(carry.data() + p * states, own.state.data() + p * states, states));
    }
    add_product(head_dim, states, positions, leaving.data(), int64_t(1), width, weight_out, states,
                carry.data(), states);
    copy_state(head_dim, in.states, carry.data(), states, grad_state, in.states);

    for (int64_t t = 0; t < positions; ++t) {
      const int64_t at = t * width;
      const double into = double(dot(own.arriving.data() + at, carried.data() + at, width));
      grad_sums[t] +=
          double(dot(out_of.data() + t * states, weight_out + t * states, states)) - into;
      grad_last += into;
      for (int64_t p = 0; p < width; ++p) grad_scaled[at + p] += carried[at + p] * own.until[t];
    }
    // Of dt A at each position: the sum over the positions from there on.
    double grad_rate = grad_last, grad_rates = 0, grad_direct = 0;
    for (int64_t t = positions - 1; t >= 0; --t) {
      const int64_t at = t * width, position = row * in.length + in.start + t;
      grad_rate += grad_sums[t];
      grad_rates += grad_rate * double(own.step[t]);
      grad_direct += double(dot(grad_y.data() + at, own.x.data() + at, width));
      grad.dt[position * in.heads + head] =
          C(grad_rate) * in.rates[head] + dot(grad_scaled.data() + at, own.x.data() + at, width);
      T* to = grad.x + (position * in.heads + head) * head_dim;
      for (int64_t p = 0; p < head_dim; ++p) {
        to[p] = T(grad_scaled[at + p] * own.step[t] + in.direct[head] * grad_y[at + p]);
      }
    }
    grad.rates[item] += C(grad_rates);
    grad.direct[item] += C(grad_direct);
  }
}

#define MBLM_INSTANTIATE(T)                                                                \
  template <>                                                                              \
  MBLM_CLONES void ssd<T>(const SsdInput<T>& in, T* y, compute_t<T>* state, int64_t begin, \
                          int64_t end) {                                                   \
    forward(in, y, state, begin, end);                                                     \
  }                                                                                        \
  template <>                                                                              \
  MBLM_CLONES void ssd_backward<T>(const SsdInput<T>& in, const SsdGradients<T>& grad,     \
                                   int64_t row, int64_t begin, int64_t end) {              \
    backward(in, grad, row, begin, end);                                                   \
  }
MBLM_INSTANTIATE(float)
MBLM_INSTANTIATE(double)
MBLM_INSTANTIATE(BFloat16)
#undef MBLM_INSTANTIATE

}  // namespace mblm::cpu
