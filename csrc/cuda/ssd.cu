// Mamba-2's state-space product: see ssd.h.
//
// With s_i the sum of dt A up to position i of a chunk, h the state before it and scaled = dt x,
//   y_i = exp(s_i) h C_i + sum over j <= i of exp(s_i - s_j) (C_i B_j) scaled_j + D x_i,
//   state after = exp(s_last) h + sum over j of exp(s_last - s_j) scaled_j B_j'.
// Everything is a product of matrices but the walk from chunk to chunk, which is short.
#include "cuda/kernel.cuh"
#include "cuda/product.cuh"
#include "cuda/ssd.h"

namespace mblm::cuda {
namespace {

constexpr int64_t kTile = Tile<float>::kSize;

// One chunk of one row, and one head of it.
template <class T>
struct Chunk {
  using C = compute_t<T>;
  const SsdInput<T>& in;
  int64_t unit, head;  // unit: the chunk, among all rows'
  int64_t row, start;  // start: the first position, in the row
  int64_t positions;

  MBLM_DEVICE Chunk(const SsdInput<T>& in, int64_t unit, int64_t head)
      : in(in), unit(unit), head(head), row(quotient(unit, in.chunks)) {
    start = (unit - row * in.chunks) * in.chunk_size;
    const int64_t left = in.length - start;
    positions = left < in.chunk_size ? left : in.chunk_size;
  }

  // In a tensor (rows, L).
  MBLM_DEVICE int64_t position(int64_t t) const { return row * in.length + start + t; }
  // In a tensor (rows, L, H).
  MBLM_DEVICE int64_t at(int64_t t) const { return position(t) * in.heads + head; }
  // In a tensor (rows, chunks, H).
  MBLM_DEVICE int64_t unit_head() const { return unit * in.heads + head; }
  // In a tensor (rows, chunks, H, P, N).
  MBLM_DEVICE int64_t state(int64_t p, int64_t n) const {
    return (unit_head() * in.head_dim + p) * in.states + n;
  }
  // In a tensor (rows, chunks, chunk_size, chunk_size).
  MBLM_DEVICE int64_t pair(int64_t i, int64_t j) const {
    return (unit * in.chunk_size + i) * in.chunk_size + j;
  }

  MBLM_DEVICE C x(int64_t t, int64_t p) const {
    return value_of(
        in.x[row * in.x_row_stride + (start + t) * in.x_position_stride + head * in.head_dim + p]);
  }
  // Of a contiguous (rows, L, H, P).
  MBLM_DEVICE C value(const T* values, int64_t t, int64_t p) const {
    return value_of(values[at(t) * in.head_dim + p]);
  }
  MBLM_DEVICE C scaled(int64_t t, int64_t p) const { return x(t, p) * in.dt[at(t)]; }
  MBLM_DEVICE C weight(const C* weights, int64_t t, int64_t n) const {
    return weights[position(t) * in.padded_states + n];
  }

  // The decay from the state before to a position, from a position to the state after, over the
  // whole chunk, from a position to a later one.
  MBLM_DEVICE C since(int64_t t) const { return exp(C(in.sums[at(t)])); }
  MBLM_DEVICE C until(int64_t t) const {
    return exp(C(in.sums[at(positions - 1)] - in.sums[at(t)]));
  }
  MBLM_DEVICE C total() const { return since(positions - 1); }
  MBLM_DEVICE C decay(int64_t from, int64_t to) const {
    return exp(C(in.sums[at(to)] - in.sums[at(from)]));
  }
  // What position i takes from position j.
  MBLM_DEVICE C mixing(int64_t i, int64_t j) const { return decay(j, i) * in.scores[pair(i, j)]; }
};

// Takes the next of several indices, of which there are so many, off an item's number.
MBLM_DEVICE int64_t take(int64_t& item, int64_t count) {
  const int64_t rest = quotient(item, count), index = item - rest * count;
  item = rest;
  return index;
}

// The sums of dt A; a thread takes a head of a chunk.
template <class T>
__global__ void __launch_bounds__(kThreads) sums_of_chunks(SsdInput<T> in) {
  using C = compute_t<T>;
  const int64_t items = in.rows * in.chunks * in.heads;
  for (int64_t item = first_item(); item < items; item += item_stride()) {
    int64_t unit = item;
    const int64_t head = take(unit, in.heads);
    const Chunk<T> own(in, unit, head);
    double sum = 0;
    MBLM_UNROLL
    for (int64_t t = 0; t < own.positions; ++t) {
      sum += double(C(in.dt[own.at(t)] * in.rates[head]));
      in.sums[own.at(t)] = sum;
    }
  }
}

// C_i B_j, for j <= i. Items are tiles of chunks.
template <class T>
__global__ void __launch_bounds__(kThreads) scores_of_chunks(SsdInput<T> in, int64_t items) {
  using C = compute_t<T>;
  const int64_t tiles = (in.chunk_size + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const int64_t column = take(unit, tiles) * kTile, row = take(unit, tiles) * kTile;
    if (column > row) continue;
    const Chunk<T> own(in, unit, 0);
    Tile<C> tile;
    tile.template add<false, false>(
        0, in.padded_states,
        [&](int i, int64_t n) {
          return row + i < own.positions ? own.weight(in.weight_out, row + i, n) : C(0);
        },
        [&](int64_t n, int j) {
          return column + j < own.positions ? own.weight(in.weight_in, column + j, n) : C(0);
        });
    tile.for_each([&](int i, int j, C& sum) {
      if (row + i < own.positions && column + j <= row + i) {
        in.scores[own.pair(row + i, column + j)] = sum;
      }
    });
  }
}

// What the positions of each chunk make of a state (P, N): forwards, what they add to the state
// after; backwards, to the gradient of the state before. Items are tiles of heads of chunks.
template <class T>
__global__ void __launch_bounds__(kThreads)
    parts_of_chunks(SsdInput<T> in, int64_t items, const T* grad_y, compute_t<T>* parts) {
  using C = compute_t<T>;
  const int64_t columns = (in.states + kTile - 1) / kTile;
  const int64_t rows = (in.head_dim + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const int64_t column = take(unit, columns) * kTile, row = take(unit, rows) * kTile;
    const int64_t head = take(unit, in.heads);
    const Chunk<T> own(in, unit, head);
    const C* const weights = grad_y ? in.weight_out : in.weight_in;
    Tile<C> tile;
    tile.template add<true, true>(
        0, own.positions,
        [&](int p, int64_t t) {
          if (row + p >= in.head_dim) return C(0);
          return grad_y ? own.value(grad_y, t, row + p) * own.since(t)
                        : own.scaled(t, row + p) * own.until(t);
        },
        [&](int64_t t, int n) {
          return column + n < in.states ? own.weight(weights, t, column + n) : C(0);
        });
    tile.for_each([&](int p, int n, C& sum) {
      if (row + p < in.head_dim && column + n < in.states) {
        parts[own.state(row + p, column + n)] = sum;
      }
    });
  }
}

// Puts the parts of the chunks together: state is what enters the first, in the order of the walk,
// and becomes what leaves the last; parts become what enters each chunk. A thread takes a state.
template <class T>
__global__ void __launch_bounds__(kThreads)
    join_chunks(SsdInput<T> in, bool backwards, compute_t<T>* parts, compute_t<T>* state) {
  using C = compute_t<T>;
  const int64_t per_head = in.head_dim * in.states, per_row = in.heads * per_head;
  for (int64_t item = first_item(); item < in.rows * per_row; item += item_stride()) {
    const int64_t row = quotient(item, per_row), rest = item - row * per_row;
    const int64_t head = quotient(rest, per_head);
    C h = state[item];
    MBLM_UNROLL
    for (int64_t i = 0; i < in.chunks; ++i) {
      const int64_t unit = row * in.chunks + (backwards ? in.chunks - 1 - i : i);
      const C own = parts[unit * per_row + rest];
      parts[unit * per_row + rest] = h;
      h = Chunk<T>(in, unit, head).total() * h + own;
    }
    state[item] = h;
  }
}

// y without the direct path, rows `row` and columns `column` onwards; with what a position takes
// from itself or without.
template <bool kFromItself, class T>
MBLM_DEVICE Tile<compute_t<T>> outputs(const Chunk<T>& own, const compute_t<T>* chunk_states,
                                       int64_t row, int64_t column) {
  using C = compute_t<T>;
  const SsdInput<T>& in = own.in;
  Tile<C> tile;
  tile.template add<false, false>(
      0, in.states,
      [&](int i, int64_t n) {
        return row + i < own.positions ? own.weight(in.weight_out, row + i, n) : C(0);
      },
      [&](int64_t n, int p) {
        return column + p < in.head_dim ? chunk_states[own.state(column + p, n)] : C(0);
      });
  tile.for_each([&](int i, int, C& sum) {
    if (row + i < own.positions) sum *= own.since(row + i);
  });
  const int64_t last = row + kTile < own.positions ? row + kTile : own.positions;
  tile.template add<false, true>(
      0, last,
      [&](int i, int64_t j) {
        const bool counts = row + i < own.positions && j < row + i + (kFromItself ? 1 : 0);
        return counts ? own.mixing(row + i, j) : C(0);
      },
      [&](int64_t j, int p) {
        return column + p < in.head_dim ? own.scaled(j, column + p) : C(0);
      });
  return tile;
}

// Items are tiles of heads of chunks.
template <class T>
__global__ void __launch_bounds__(kThreads)
    forward(SsdInput<T> in, int64_t items, const compute_t<T>* chunk_states, T* y) {
  using C = compute_t<T>;
  const int64_t columns = (in.head_dim + kTile - 1) / kTile;
  const int64_t rows = (in.chunk_size + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const int64_t column = take(unit, columns) * kTile, row = take(unit, rows) * kTile;
    const int64_t head = take(unit, in.heads);
    const Chunk<T> own(in, unit, head);
    if (row >= own.positions) continue;
    Tile<C> tile = outputs<true>(own, chunk_states, row, column);
    tile.for_each([&](int i, int j, C& sum) {
      const int64_t t = row + i, p = column + j;
      if (t < own.positions && p < in.head_dim) {
        y[own.at(t) * in.head_dim + p] = rounded<T>(sum + in.direct[head] * own.x(t, p));
      }
    });
  }
}

// The gradients of x, and of dt and of the sums of dt A what comes from single positions: `terms`
// are (4, rows, L, H). Items are tiles of positions of heads of chunks.
//
// As s_i is in the exponent of all of y_i but the direct path, and -s_j in that of all that
// scaled_j gives, the gradient of s_t is dy_t (y_t - D x_t) - scaled_t dscaled_t, in both of which
// what a position takes from itself is left out: it would cancel. That of s_last is the sum of
// scaled_t times what dscaled_t has from the state after, and exp(s_last) dh h.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    gradients_of_positions(SsdInput<T> in, int64_t items, SsdGradients<T> grad) {
  using C = compute_t<T>;
  constexpr int kOwn = Tile<C>::kOwn;
  const int64_t tiles = (in.chunk_size + kTile - 1) / kTile;
  const int64_t values = in.rows * in.length * in.heads;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const int64_t row = take(unit, tiles) * kTile, head = take(unit, in.heads);
    const Chunk<T> own(in, unit, head);
    if (row >= own.positions) continue;
    const C direct = in.direct[head];
    double of_sums[kOwn] = {}, into[kOwn] = {}, of_dt[kOwn] = {}, of_direct[kOwn] = {};
    for (int64_t column = 0; column < in.head_dim; column += kTile) {
      // Of scaled: what the state after has from it, then what later positions have.
      Tile<C> tile;
      tile.template add<false, false>(
          0, in.states,
          [&](int i, int64_t n) {
            return row + i < own.positions ? own.weight(in.weight_in, row + i, n) : C(0);
          },
          [&](int64_t n, int p) {
            return column + p < in.head_dim ? grad.carries[own.state(column + p, n)] : C(0);
          });
      tile.for_each([&](int i, int j, C& sum) {
        const int64_t t = row + i, p = column + j;
        if (t >= own.positions || p >= in.head_dim) return;
        sum *= own.until(t);
        into[i % kOwn] += own.scaled(t, p) * sum;
      });
      tile.template add<true, true>(
          row, own.positions,
          [&](int j, int64_t i) { return row + j < i ? own.mixing(i, row + j) : C(0); },
          [&](int64_t i, int p) {
            return column + p < in.head_dim ? own.value(grad.y, i, column + p) : C(0);
          });
      tile.for_each([&](int i, int j, C& sum) {
        const int64_t t = row + i, p = column + j;
        if (t >= own.positions || p >= in.head_dim) return;
        const C out = own.value(grad.y, t, p), input = own.x(t, p), step = in.dt[own.at(t)];
        of_sums[i % kOwn] -= own.scaled(t, p) * sum;
        sum += in.scores[own.pair(t, t)] * out;
        of_dt[i % kOwn] += sum * input;
        of_direct[i % kOwn] += out * input;
        grad.x[own.at(t) * in.head_dim + p] = rounded<T>(sum * step + direct * out);
      });
      Tile<C> given = outputs<false>(own, grad.chunk_states, row, column);
      given.for_each([&](int i, int j, C& sum) {
        const int64_t t = row + i, p = column + j;
        if (t < own.positions && p < in.head_dim) {
          of_sums[i % kOwn] += own.value(grad.y, t, p) * sum;
        }
      });
    }
    for (int i = 0; i < kOwn; ++i) {
      for (int offset = Tile<C>::kNeighbors / 2; offset > 0; offset /= 2) {
        of_sums[i] += __shfl_xor_sync(0xffffffffu, of_sums[i], offset);
        into[i] += __shfl_xor_sync(0xffffffffu, into[i], offset);
        of_dt[i] += __shfl_xor_sync(0xffffffffu, of_dt[i], offset);
        of_direct[i] += __shfl_xor_sync(0xffffffffu, of_direct[i], offset);
      }
      const int64_t t = row + Tile<C>::row() + i;
      if (Tile<C>::column() == 0 && t < own.positions) {
        grad.terms[own.at(t)] = of_sums[i];
        grad.terms[values + own.at(t)] = into[i];
        grad.terms[2 * values + own.at(t)] = of_dt[i];
        grad.terms[3 * values + own.at(t)] = of_direct[i];
      }
    }
  }
}

// What goes through the decay of the state over a whole chunk: exp(s_last) dh h. A warp takes a
// head of a chunk.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gradients_of_totals(SsdInput<T> in, SsdGradients<T> grad) {
  using C = compute_t<T>;
  constexpr int kWarps = kThreads / kWarp;
  const int64_t items = in.rows * in.chunks * in.heads, per_head = in.head_dim * in.states;
  for (int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; item < items;
       item += int64_t(gridDim.x) * kWarps) {
    int64_t unit = item;
    const int64_t head = take(unit, in.heads);
    C sum = 0;
    for (int64_t i = threadIdx.x % kWarp; i < per_head; i += kWarp) {
      sum += grad.carries[item * per_head + i] * grad.chunk_states[item * per_head + i];
    }
    sum = warp_sum(sum) * Chunk<T>(in, unit, head).total();
    if (threadIdx.x % kWarp == 0) grad.rates[item] = sum;
  }
}

// The gradients of dt, A and D from the terms: that of dt_t A is the sum of those of s_t and later
// sums. A thread takes a head of a chunk.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gradients_of_rates(SsdInput<T> in, SsdGradients<T> grad) {
  using C = compute_t<T>;
  const int64_t items = in.rows * in.chunks * in.heads;
  const int64_t values = in.rows * in.length * in.heads;
  for (int64_t item = first_item(); item < items; item += item_stride()) {
    int64_t unit = item;
    const int64_t head = take(unit, in.heads);
    const Chunk<T> own(in, unit, head);
    double of_rate = double(grad.rates[item]), of_rates = 0, of_direct = 0;
    MBLM_UNROLL
    for (int64_t t = 0; t < own.positions; ++t) {
      of_rate += grad.terms[values + own.at(t)];
      of_direct += grad.terms[3 * values + own.at(t)];
    }
    MBLM_UNROLL
    for (int64_t t = own.positions - 1; t >= 0; --t) {
      of_rate += grad.terms[own.at(t)];
      of_rates += of_rate * double(in.dt[own.at(t)]);
      grad.dt[own.at(t)] = C(of_rate * double(in.rates[head]) + grad.terms[2 * values + own.at(t)]);
    }
    grad.rates[item] = C(of_rates);
    grad.direct[item] = C(of_direct);
  }
}

// Of the scores, for j <= i: the sum over the heads of exp(s_i - s_j) dy_i scaled_j. Items are
// tiles of chunks.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gradients_of_scores(SsdInput<T> in, int64_t items, SsdGradients<T> grad) {
  using C = compute_t<T>;
  constexpr int kOwn = Tile<C>::kOwn;
  const int64_t tiles = (in.chunk_size + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const int64_t column = take(unit, tiles) * kTile, row = take(unit, tiles) * kTile;
    if (column > row) continue;
    C total[kOwn][kOwn] = {};
    for (int64_t head = 0; head < in.heads; ++head) {
      const Chunk<T> own(in, unit, head);
      Tile<C> tile;
      tile.template add<false, false>(
          0, in.head_dim,
          [&](int i, int64_t p) {
            return row + i < own.positions ? own.value(grad.y, row + i, p) : C(0);
          },
          [&](int64_t p, int j) {
            return column + j < own.positions ? own.scaled(column + j, p) : C(0);
          });
      tile.for_each([&](int i, int j, C& sum) {
        if (row + i < own.positions && column + j <= row + i) {
          total[i % kOwn][j % kOwn] += sum * own.decay(column + j, row + i);
        }
      });
    }
    const Chunk<T> own(in, unit, 0);
    for (int i = 0; i < kOwn; ++i) {
      for (int j = 0; j < kOwn; ++j) {
        const int64_t t = row + Tile<C>::row() + i, from = column + Tile<C>::column() + j;
        if (t < own.positions && from <= t) grad.scores[own.pair(t, from)] = total[i][j];
      }
    }
  }
}

// Of B or C: through the scores, and through the states. Items are tiles of (positions, N) of
// chunks, of B and of C.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gradients_of_weights(SsdInput<T> in, int64_t items, SsdGradients<T> grad) {
  using C = compute_t<T>;
  const int64_t columns = (in.states + kTile - 1) / kTile;
  const int64_t rows = (in.chunk_size + kTile - 1) / kTile, per_row = in.heads * in.head_dim;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const bool is_in = take(unit, 2) == 0;
    const int64_t column = take(unit, columns) * kTile, row = take(unit, rows) * kTile;
    const Chunk<T> own(in, unit, 0);
    if (row >= own.positions) continue;
    const C* const others = is_in ? in.weight_out : in.weight_in;
    const C* const states = (is_in ? grad.carries : grad.chunk_states) + unit * per_row * in.states;
    Tile<C> tile;
    tile.template add<false, true>(
        0, own.positions,
        [&](int i, int64_t k) {
          const int64_t t = row + i;
          if (t >= own.positions || (is_in ? k < t : k > t)) return C(0);
          return grad.scores[is_in ? own.pair(k, t) : own.pair(t, k)];
        },
        [&](int64_t k, int n) {
          return column + n < in.states ? own.weight(others, k, column + n) : C(0);
        });
    tile.template add<false, true>(
        0, per_row,
        [&](int i, int64_t k) {
          const int64_t t = row + i, head = quotient(k, in.head_dim), p = k - head * in.head_dim;
          if (t >= own.positions) return C(0);
          const Chunk<T> of_head(in, unit, head);
          return is_in ? of_head.scaled(t, p) * of_head.until(t)
                       : of_head.value(grad.y, t, p) * of_head.since(t);
        },
        [&](int64_t k, int n) {
          return column + n < in.states ? states[k * in.states + column + n] : C(0);
        });
    C* const to = is_in ? grad.weight_in : grad.weight_out;
    tile.for_each([&](int i, int n, C& sum) {
      if (row + i < own.positions && column + n < in.states) {
        to[own.position(row + i) * in.states + column + n] = sum;
      }
    });
  }
}

// A kernel whose blocks take tiles.
template <class C, class... Parameters, class... Arguments>
Error launch_tiles(void (*kernel)(Parameters...), int64_t items, Stream stream, Arguments... args) {
  return launch(kernel, items, Tile<C>::kThreads, Tile<C>::kSharedBytes, stream, args...);
}

// What both passes begin with, and what follows it: the states that enter the chunks.
template <class T>
Error states_of_chunks(const SsdInput<T>& in, const T* grad_y, compute_t<T>* parts,
                       compute_t<T>* state, Stream stream) {
  using C = compute_t<T>;
  const int64_t units = in.rows * in.chunks, tiles = divide_up(in.chunk_size, kTile);
  if (const Error error = launch(sums_of_chunks<T>, divide_up(units * in.heads, kThreads), kThreads,
                                 0, stream, in)) {
    return error;
  }
  const int64_t pairs = units * tiles * tiles;
  if (const Error error = launch_tiles<C>(scores_of_chunks<T>, pairs, stream, in, pairs)) {
    return error;
  }
  const int64_t items =
      units * in.heads * divide_up(in.head_dim, kTile) * divide_up(in.states, kTile);
  if (const Error error =
          launch_tiles<C>(parts_of_chunks<T>, items, stream, in, items, grad_y, parts)) {
    return error;
  }
  return launch(join_chunks<T>, divide_up(in.rows * in.heads * in.head_dim * in.states, kThreads),
                kThreads, 0, stream, in, grad_y != nullptr, parts, state);
}

}  // namespace

template <class T>
Error ssd(const SsdInput<T>& in, T* y, compute_t<T>* state, compute_t<T>* chunk_states,
          Stream stream) {
  const T* const forwards = nullptr;
  if (const Error error = states_of_chunks(in, forwards, chunk_states, state, stream)) {
    return error;
  }
  const int64_t items = in.rows * in.chunks * in.heads * divide_up(in.chunk_size, kTile) *
                        divide_up(in.head_dim, kTile);
  return launch_tiles<compute_t<T>>(forward<T>, items, stream, in, items, chunk_states, y);
}

template <class T>
Error ssd_backward(const SsdInput<T>& in, const SsdGradients<T>& grad, Stream stream) {
  using C = compute_t<T>;
  if (const Error error = states_of_chunks(in, grad.y, grad.carries, grad.state, stream)) {
    return error;
  }
  const int64_t units = in.rows * in.chunks, heads = units * in.heads;
  const int64_t tiles = divide_up(in.chunk_size, kTile);
  if (const Error error = launch_tiles<C>(gradients_of_positions<T>, heads * tiles, stream, in,
                                          heads * tiles, grad)) {
    return error;
  }
  if (const Error error = launch(gradients_of_totals<T>, divide_up(heads, kThreads / kWarp),
                                 kThreads, 0, stream, in, grad)) {
    return error;
  }
  if (const Error error = launch(gradients_of_rates<T>, divide_up(heads, kThreads), kThreads, 0,
                                 stream, in, grad)) {
    return error;
  }
  const int64_t pairs = units * tiles * tiles;
  if (const Error error = launch_tiles<C>(gradients_of_scores<T>, pairs, stream, in, pairs, grad)) {
    return error;
  }
  const int64_t items = units * tiles * divide_up(in.states, kTile) * 2;
  return launch_tiles<C>(gradients_of_weights<T>, items, stream, in, items, grad);
}

#define MBLM_INSTANTIATE(T)                                                            \
  template Error ssd<T>(const SsdInput<T>&, T*, compute_t<T>*, compute_t<T>*, Stream); \
  template Error ssd_backward<T>(const SsdInput<T>&, const SsdGradients<T>&, Stream)
MBLM_FOR_EACH_TYPE(MBLM_INSTANTIATE)
#undef MBLM_INSTANTIATE

}  // namespace mblm::cuda
