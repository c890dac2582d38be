// Mamba-2's state-space product: see ssd.h.
//
// A head's part of a chunk is copied to buffers whose rows are whole lanes, (positions, padded P),
// and worked on there with small matrix products. Its states are used where they lie.
#include "cpu/ssd.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/products.h"

namespace mblm::cpu {

// to = from * factor, n a multiple of the lanes.
template <class C>
MBLM_INLINE void scale(const C* from, C factor, int64_t n, C* to) {
  for (int64_t i = 0; i < n; i += kLaneCount<C>) store(to + i, load(from + i) * factor);
}

// Buffers for one head of one chunk: T positions, P channels, N states.
template <class C>
struct HeadBuffers {
  int64_t width, span;                 // padded P and T
  std::vector<double> sums;            // (padded T): of dt A up to each position
  std::vector<C> step, since, until;   // (T): dt; decay from the state before, to the state after
  C total;                             // decay over the whole chunk
  std::vector<C> x, scaled, arriving;  // (T, padded P): x, dt x, the part of dt x that is left
  std::vector<C> pairs;                // (T, padded T): decay from position j to i >= j, else 0
  std::vector<C> turned;               // (N, padded P), a transposed state

  template <class T>
  explicit HeadBuffers(const SsdInput<T>& in)
      : width(padded(in.head_dim)),
        span(in.padded_positions()),
        sums(span),
        step(in.positions),
        since(in.positions),
        until(in.positions),
        x(in.positions * width),
        scaled(x.size()),
        arriving(x.size()),
        pairs(in.positions * span),
        turned(in.states * width) {}

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
      convert(from, in.head_dim, to);
      scale(to, step[t], width, scaled.data() + t * width);
      scale(to, step[t] * until[t], width, arriving.data() + t * width);
    }
    for (int64_t i = 0; i < positions; ++i) {
      C* pair = pairs.data() + i * span;
      const double sum_i = sums[i];
      for (int64_t j = 0; j <= i; j += kMostLanes) {
        const double* const sums_j = sums.data() + j;
        for (int64_t lane = 0; lane < kMostLanes; ++lane) pair[j + lane] = C(sum_i - sums_j[lane]);
        for (int64_t lane = 0; lane < kMostLanes; lane += kLaneCount<C>) {
          store(pair + j + lane, exp(load(pair + j + lane)));
        }
      }
      std::fill(pair + i + 1, pair + span, C(0));
    }
  }
};

template <class T>
MBLM_CLONES void ssd_scores(const SsdInput<T>& in, compute_t<T>* scores, int64_t begin,
                            int64_t end) {
  using C = compute_t<T>;
  const int64_t positions = in.positions, states = in.states, span = in.padded_positions();
  std::vector<C> turned(states * span);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = (row * in.length + in.start) * states;
    transpose(positions, states, in.weight_in + first, states, turned.data(), span);
    set_product(positions, span, states, in.weight_out + first, states, int64_t(1), turned.data(),
                span, scores + row * positions * span, span);
  }
}

template <class T>
MBLM_CLONES void ssd(const SsdInput<T>& in, T* y, SsdStates<const compute_t<T>> before,
                     SsdStates<compute_t<T>> after, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t positions = in.positions, states = in.states, head_dim = in.head_dim;
  HeadBuffers<C> own(in);
  const int64_t width = own.width, span = own.span;
  std::vector<C> out(positions * width);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / in.heads, head = item % in.heads;
    const C* weight_in = in.weight_in + (row * in.length + in.start) * states;
    const C* weight_out = in.weight_out + (row * in.length + in.start) * states;
    const C* h = before.data + row * before.row_stride + head * head_dim * states;
    own.read(in, row, head);

    // What the state before gives to each position: h C.
    transpose(head_dim, states, h, states, own.turned.data(), width);
    set_product(positions, width, states, weight_out, states, int64_t(1), own.turned.data(), width,
                out.data(), width);
    for (int64_t t = 0; t < positions; ++t) {
      scale(out.data() + t * width, own.since[t], width, out.data() + t * width);
    }
    // What earlier positions of the chunk give: the scores, decayed, times dt x.
    const C* scores = in.scores + row * positions * span;
    for (int64_t i = 0; i < positions; ++i) {
      C* mixing = own.pairs.data() + i * span;
      for (int64_t j = 0; j <= i; j += kLaneCount<C>) {
        store(mixing + j, load(mixing + j) * load(scores + i * span + j));
      }
    }
    for (int64_t i = 0; i < positions; i += kProductRows) {
      const int64_t stop = std::min(i + kProductRows, positions);
      add_product(stop - i, width, stop, own.pairs.data() + i * span, span, int64_t(1),
                  own.scaled.data(), width, out.data() + i * width, width);
    }
    const C direct = in.direct[head];
    for (int64_t t = 0; t < positions; ++t) {
      T* __restrict to = y + ((row * in.length + in.start + t) * in.heads + head) * head_dim;
      const C *from = out.data() + t * width, *x = own.x.data() + t * width;
      for (int64_t p = 0; p < head_dim; ++p) to[p] = T(from[p] + direct * x[p]);
    }
    product(head_dim, states, positions, own.arriving.data(), int64_t(1), width, weight_in, states,
            own.total, h, after.data + row * after.row_stride + head * head_dim * states, states);
  }
}

template <class C>
MBLM_INLINE C dot(const C* a, const C* b, int64_t n) {
  Lanes<C> sums{};
  for (int64_t i = 0; i < n; i += kLaneCount<C>) sums += load(a + i) * load(b + i);
  return sum(sums);
}

// The pairs' part: from grad_mixing (T, padded T), the gradient of the decayed scores, to the
// gradients of the scores (set, or added to) and of the sums of dt A. Leaves the decayed scores in
// pairs, and in grad_mixing the gradients of the differences of sums.
template <class C>
MBLM_INLINE void pairs_backward(int64_t positions, int64_t span, const C* scores, C* grad_mixing,
                                C* pairs, bool add, C* grad_scores, double* __restrict grad_sums) {
  for (int64_t i = 0; i < positions; ++i) {
    const int64_t row = i * span;
    for (int64_t j = row; j < row + span; j += kLaneCount<C>) {
      if (j > row + i) {
        if (!add) store(grad_scores + j, Lanes<C>{});
        continue;
      }
      const Lanes<C> pair = load(pairs + j), score = load(scores + j);
      const Lanes<C> decayed = load(grad_mixing + j) * pair;  // 0 after i
      store(grad_scores + j, add ? load(grad_scores + j) + decayed : decayed);
      store(pairs + j, pair * score);
      store(grad_mixing + j, decayed * score);
    }
    const C* __restrict through = grad_mixing + row;
    for (int64_t j = 0; j <= i; ++j) grad_sums[j] -= double(through[j]);
    grad_sums[i] +=
        sum_in_lanes(i + 1, [through](int64_t j) MBLM_INLINE_LAMBDA { return double(through[j]); });
  }
}

// to = from, or to += from; returns the dot product of from and other. n is a multiple of the
// lanes.
template <class C>
MBLM_INLINE C move_and_dot(const C* from, const C* other, int64_t n, bool add, C* to) {
  Lanes<C> sums{};
  for (int64_t i = 0; i < n; i += kLaneCount<C>) {
    const Lanes<C> values = load(from + i);
    store(to + i, add ? load(to + i) + values : values);
    sums += values * load(other + i);
  }
  return sum(sums);
}

// As in the reference: with s_i the sum of dt A up to position i of the chunk, each decay is an
// exponential of s_i, s_j or the last s; their gradients, summed from the end, are those of dt A.
template <class T>
MBLM_CLONES void ssd_backward(const SsdInput<T>& in, const SsdGradients<T>& grad, int64_t row,
                              int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t positions = in.positions, states = in.states, head_dim = in.head_dim;
  HeadBuffers<C> own(in);
  const int64_t width = own.width, span = own.span;
  std::vector<C> grad_y(own.x.size()), leaving(own.x.size()), grad_scaled(own.x.size());
  std::vector<C> carried(own.x.size()), out_of(positions * states);
  std::vector<C> scaled_turned(width * span), grad_mixing(own.pairs.size());
  std::vector<double> grad_sums(positions);
  const C* weight_in = in.weight_in + (row * in.length + in.start) * states;
  const C* weight_out = in.weight_out + (row * in.length + in.start) * states;
  for (int64_t head = begin; head < end; ++head) {
    const int64_t item = row * in.heads + head;
    const bool add = head > begin;
    const C* before = grad.before.data + row * grad.before.row_stride + head * head_dim * states;
    C* carry = grad.state + item * head_dim * states;
    own.read(in, row, head);
    for (int64_t t = 0; t < positions; ++t) {
      const T* from = grad.y + ((row * in.length + in.start + t) * in.heads + head) * head_dim;
      C* to = grad_y.data() + t * width;
      convert(from, head_dim, to);
      scale(to, own.since[t], width, leaving.data() + t * width);
    }

    // Pairs of positions: y_i += pairs_ij scores_ij scaled_j.
    std::fill(grad_sums.begin(), grad_sums.end(), 0.0);
    transpose(positions, width, own.scaled.data(), width, scaled_turned.data(), span);
    for (int64_t i = 0; i < positions; i += kProductRows) {
      const int64_t stop = std::min(i + kProductRows, positions);
      set_product(stop - i, padded(stop), width, grad_y.data() + i * width, width, int64_t(1),
                  scaled_turned.data(), span, grad_mixing.data() + i * span, span);
    }
    pairs_backward(positions, span, in.scores + row * positions * span, grad_mixing.data(),
                   own.pairs.data(), add, grad.scores, grad_sums.data());
    for (int64_t j = 0; j < positions; j += kProductRows) {
      const int64_t count = std::min(kProductRows, positions - j);
      set_product(count, width, positions - j, own.pairs.data() + j * span + j, int64_t(1), span,
                  grad_y.data() + j * width, width, grad_scaled.data() + j * width, width);
    }

    // Into the state after: h += arriving' B.
    transpose(head_dim, states, carry, states, own.turned.data(), width);
    set_product(positions, width, states, weight_in, states, int64_t(1), own.turned.data(), width,
                carried.data(), width);
    product(positions, states, head_dim, own.arriving.data(), width, int64_t(1), carry, states,
            C(1), add ? grad.weight_in : nullptr, grad.weight_in, states);
    // Out of the state before: y_i += since_i h C_i.
    set_product(positions, states, head_dim, leaving.data(), width, int64_t(1), before, states,
                out_of.data(), states);
    for (int64_t t = 0; t < positions; ++t) {
      grad_sums[t] += double(move_and_dot(out_of.data() + t * states, weight_out + t * states,
                                          states, add, grad.weight_out + t * states));
    }

    // From the state after to the one before.
    double grad_last = 0;
    for (int64_t p = 0; p < head_dim; ++p) {
      grad_last += double(own.total * dot(carry + p * states, before + p * states, states));
    }
    product(head_dim, states, positions, leaving.data(), int64_t(1), width, weight_out, states,
            own.total, static_cast<const C*>(carry), carry, states);

    for (int64_t t = 0; t < positions; ++t) {
      const int64_t at = t * width;
      const double into = double(dot(own.arriving.data() + at, carried.data() + at, width));
      grad_sums[t] -= into;
      grad_last += into;
      for (int64_t p = 0; p < width; p += kLaneCount<C>) {
        store(grad_scaled.data() + at + p,
              load(grad_scaled.data() + at + p) + load(carried.data() + at + p) * own.until[t]);
      }
    }
    // Of dt A at each position: the sum over the positions from there on.
    double grad_rate = grad_last, grad_rates = 0, grad_direct = 0;
    const C direct = in.direct[head], rate = in.rates[head];
    for (int64_t t = positions - 1; t >= 0; --t) {
      const int64_t at = t * width, position = row * in.length + in.start + t;
      const C *of_scaled = grad_scaled.data() + at, *of_y = grad_y.data() + at;
      const C step = own.step[t];
      grad_rate += grad_sums[t];
      grad_rates += grad_rate * double(step);
      grad_direct += double(dot(of_y, own.x.data() + at, width));
      grad.dt[position * in.heads + head] =
          C(grad_rate) * rate + dot(of_scaled, own.x.data() + at, width);
      T* __restrict to = grad.x + (position * in.heads + head) * head_dim;
      for (int64_t p = 0; p < head_dim; ++p) to[p] = T(of_scaled[p] * step + direct * of_y[p]);
    }
    grad.rates[item] += C(grad_rates);
    grad.direct[item] += C(grad_direct);
  }
}

template <class C>
MBLM_INLINE void add_groups(int64_t groups, int64_t each, C* sums) {
  for (int64_t i = each; i < groups * each; i += kLaneCount<C>) {
    C* const to = sums + i % each;
    store(to, load(to) + load(sums + i));
  }
}

template <class T>
MBLM_CLONES void ssd_backward_weights(const SsdInput<T>& in, int64_t groups, compute_t<T>* scores,
                                      compute_t<T>* weight_in, compute_t<T>* weight_out, T* grad_in,
                                      T* grad_out, int64_t row) {
  using C = compute_t<T>;
  const int64_t positions = in.positions, states = in.states, span = in.padded_positions();
  const int64_t first = (row * in.length + in.start) * states, count = positions * states;
  add_groups(groups, positions * span, scores);
  add_groups(groups, count, weight_in);
  add_groups(groups, count, weight_out);
  add_product(positions, states, positions, static_cast<const C*>(scores), int64_t(1), span,
              in.weight_out + first, states, weight_in, states);
  add_product(positions, states, positions, static_cast<const C*>(scores), span, int64_t(1),
              in.weight_in + first, states, weight_out, states);
  convert(weight_in, count, grad_in + first);
  convert(weight_out, count, grad_out + first);
}

MBLM_INSTANTIATE(ssd_scores)
MBLM_INSTANTIATE(ssd)
MBLM_INSTANTIATE(ssd_backward)
MBLM_INSTANTIATE(ssd_backward_weights)

}  // namespace mblm::cpu
