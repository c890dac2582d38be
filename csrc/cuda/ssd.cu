// Mamba-2's state-space product: see ssd.h.
//
// With s_i the sum of dt A up to position i of a chunk, h the state before it and scaled = dt x,
//   y_i = exp(s_i) h C_i + sum over j <= i of exp(s_i - s_j) (C_i B_j) scaled_j + D x_i,
//   state after = exp(s_last) h + sum over j of exp(s_last - s_j) scaled_j B_j'.
// Everything is a product of matrices but the walk from chunk to chunk, which is short. Sums is the
// class of a product's tile: TensorTile where x is bfloat16, or where PyTorch may round float32.
#include <type_traits>

#include "cuda/product.cuh"
#include "cuda/ssd.h"
#include "cuda/tensor_product.cuh"

namespace mblm::cuda {
namespace {

constexpr int kTile = Tile<float>::kSize;
static_assert(kTile == TensorTile::kSize);

// Whether x, B and C are bfloat16, and what is multiplied by them is not.
template <class T>
constexpr bool kExact = std::is_same_v<T, BFloat16>;

// One chunk of one row, and one head of it. Indices inside a chunk have 32 bits, for which a GPU
// multiplies once; where things lie has 64.
template <class T>
struct Chunk {
  using C = compute_t<T>;
  const SsdInput<T>& in;
  int positions;
  int64_t first;  // position, among all rows'
  // Of its first position and its head, of its first pair of positions, of its first state.
  int64_t head_at, corner, state_at;
  const T* own_x;

  // unit: the chunk, among all rows'.
  MBLM_DEVICE Chunk(const SsdInput<T>& in, int64_t unit, int64_t head) : in(in) {
    const int64_t row = quotient(unit, in.chunks), start = (unit - row * in.chunks) * in.chunk_size;
    const int64_t left = in.length - start;
    positions = int(left < in.chunk_size ? left : in.chunk_size);
    first = row * in.length + start;
    head_at = first * in.heads + head;
    corner = unit * in.chunk_size * in.chunk_size;
    state_at = (unit * in.heads + head) * in.head_dim * in.states;
    own_x = in.x + row * in.x_row_stride + start * in.x_position_stride + head * in.head_dim;
  }

  MBLM_DEVICE static int64_t product(int a, int64_t b) { return int64_t(a) * int(b); }

  // In a tensor (rows, L).
  MBLM_DEVICE int64_t position(int t) const { return first + t; }
  // In a tensor (rows, L, H).
  MBLM_DEVICE int64_t at(int t) const { return head_at + product(t, in.heads); }
  // In a tensor (rows, chunks, H, P, N).
  MBLM_DEVICE int64_t state(int p, int n) const { return state_at + product(p, in.states) + n; }
  // In a tensor (rows, chunks, chunk_size, chunk_size).
  MBLM_DEVICE int64_t pair(int i, int j) const { return corner + product(i, in.chunk_size) + j; }

  MBLM_DEVICE const T* x_place(int t, int p) const { return own_x + t * in.x_position_stride + p; }
  MBLM_DEVICE C x(int t, int p) const { return value_of(*x_place(t, p)); }
  // Of a contiguous (rows, L, H, P).
  MBLM_DEVICE const T* place(const T* values, int t, int p) const {
    return values + head_at * in.head_dim + product(t, in.heads * in.head_dim) + p;
  }
  MBLM_DEVICE C value(const T* values, int t, int p) const {
    return value_of(*place(values, t, p));
  }
  MBLM_DEVICE C scaled(int t, int p) const { return x(t, p) * in.dt[at(t)]; }
  MBLM_DEVICE C weight(const C* weights, int t, int n) const {
    return weights[first * in.padded_states + product(t, in.padded_states) + n];
  }

  // The decay from the state before to a position, from a position to the state after, over the
  // whole chunk, from a position to a later one.
  MBLM_DEVICE C since(int t) const { return exp(C(in.sums[at(t)])); }
  MBLM_DEVICE C until(int t) const { return exp(C(in.sums[at(positions - 1)] - in.sums[at(t)])); }
  MBLM_DEVICE C total() const { return since(positions - 1); }
  MBLM_DEVICE C decay(int from, int to) const {
    return exp(C(in.sums[at(to)] - in.sums[at(from)]));
  }
  // What position i takes from position j.
  MBLM_DEVICE C mixing(int i, int j) const { return decay(j, i) * in.scores[pair(i, j)]; }
};

// Entries of operands and terms of sums are loaded from a clamped place before it is known whether
// they count: where that decides whether there is a load, one load waits for the other.
MBLM_DEVICE int clamped(int index, int64_t count) {
  return index < count ? index : int(count) - 1;
}

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
template <class T, class Sums>
__global__ void __launch_bounds__(Sums::kThreads, Sums::kBlocks)
    scores_of_chunks(SsdInput<T> in, int64_t items) {
  using C = compute_t<T>;
  const int64_t tiles = (in.chunk_size + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const int column = int(take(unit, tiles)) * kTile, row = int(take(unit, tiles)) * kTile;
    if (column > row) continue;
    const Chunk<T> own(in, unit, 0);
    Sums tile;
    tile.template add<false, false, kExact<T>, kExact<T>>(
        0, in.padded_states,
        [&](int i, int n) {
          return row + i < own.positions ? own.weight(in.weight_out, row + i, n) : C(0);
        },
        [&](int n, int j) {
          return column + j < own.positions ? own.weight(in.weight_in, column + j, n) : C(0);
        });
    tile.for_each([&](int i, int j, C& sum, int) {
      if (row + i < own.positions && column + j <= row + i) {
        in.scores[own.pair(row + i, column + j)] = sum;
      }
    });
  }
}

// What the positions of each chunk make of a state (P, N): forwards, what they add to the state
// after; backwards, to the gradient of the state before. Items are tiles of heads of chunks.
template <class T, class Sums>
__global__ void __launch_bounds__(Sums::kThreads, Sums::kBlocks)
    parts_of_chunks(SsdInput<T> in, int64_t items, const T* grad_y, compute_t<T>* parts) {
  using C = compute_t<T>;
  const int64_t columns = (in.states + kTile - 1) / kTile;
  const int64_t rows = (in.head_dim + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const int column = int(take(unit, columns)) * kTile, row = int(take(unit, rows)) * kTile;
    const int64_t head = take(unit, in.heads);
    const Chunk<T> own(in, unit, head);
    const C* const weights = grad_y ? in.weight_out : in.weight_in;
    Sums tile;
    tile.template add<true, true, false, kExact<T>>(
        0, own.positions,
        [&](int p, int t) {
          const int channel = clamped(row + p, in.head_dim);
          const C input =
              value_of(grad_y ? *own.place(grad_y, t, channel) : *own.x_place(t, channel));
          const C scaled = (grad_y ? C(1) : in.dt[own.at(t)]) * input;
          const C part = scaled * (grad_y ? own.since(t) : own.until(t));
          return row + p < in.head_dim ? part : C(0);
        },
        [&](int t, int n) {
          return column + n < in.states ? own.weight(weights, t, column + n) : C(0);
        });
    tile.for_each([&](int p, int n, C& sum, int) {
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
template <bool kFromItself, class Sums, class T>
MBLM_DEVICE Sums outputs(const Chunk<T>& own, const compute_t<T>* chunk_states, int row,
                         int column) {
  using C = compute_t<T>;
  const SsdInput<T>& in = own.in;
  Sums tile;
  tile.template add<false, false, kExact<T>, false>(
      0, in.states,
      [&](int i, int n) {
        return row + i < own.positions ? own.weight(in.weight_out, row + i, n) : C(0);
      },
      [&](int n, int p) {
        return column + p < in.head_dim ? chunk_states[own.state(column + p, n)] : C(0);
      });
  tile.for_each([&](int i, int, C& sum, int) {
    if (row + i < own.positions) sum *= own.since(row + i);
  });
  const int last = row + kTile < own.positions ? row + kTile : own.positions;
  tile.template add<false, true, false, kExact<T>>(
      0, last,
      [&](int i, int j) {
        const bool counts = row + i < own.positions && j < row + i + (kFromItself ? 1 : 0);
        const C taken = own.mixing(clamped(row + i, own.positions), j) * in.dt[own.at(j)];
        return counts ? taken : C(0);
      },
      [&](int j, int p) { return column + p < in.head_dim ? own.x(j, column + p) : C(0); });
  return tile;
}

// Items are tiles of heads of chunks.
template <class T, class Sums>
__global__ void __launch_bounds__(Sums::kThreads, Sums::kBlocks)
    forward(SsdInput<T> in, int64_t items, const compute_t<T>* chunk_states, T* y) {
  using C = compute_t<T>;
  const int64_t columns = (in.head_dim + kTile - 1) / kTile;
  const int64_t rows = (in.chunk_size + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const int column = int(take(unit, columns)) * kTile, row = int(take(unit, rows)) * kTile;
    const int64_t head = take(unit, in.heads);
    const Chunk<T> own(in, unit, head);
    if (row >= own.positions) continue;
    Sums tile = outputs<true, Sums>(own, chunk_states, row, column);
    tile.for_each([&](int i, int j, C& sum, int) {
      const int t = clamped(row + i, own.positions), p = clamped(column + j, in.head_dim);
      sum += in.direct[head] * own.x(t, p);
    });
    tile.for_each([&](int i, int j, C& sum, int) {
      const int t = row + i, p = column + j;
      if (t < own.positions && p < in.head_dim) y[own.at(t) * in.head_dim + p] = rounded<T>(sum);
    });
  }
}

// Adds sums over this thread's entries of its rows, of the tile from `row` on, to a term of each
// position.
template <class Sums, class T, class S>
MBLM_DEVICE void add_to_term(const Chunk<T>& own, int row, S (&sums)[Sums::kOwnRows],
                             double* term) {
  MBLM_UNROLL_ALL
  for (int r = 0; r < Sums::kOwnRows; ++r) {
    for (int offset = Sums::kNeighbors / 2; offset > 0; offset /= 2) {
      sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], offset);
    }
    const int t = row + Sums::row(r);
    if (!Sums::is_first() || t >= own.positions) continue;
    term[own.at(t)] += sums[r];
  }
}

// The gradients of x, and of dt and of the sums of dt A what comes from single positions: `terms`
// are (4, rows, L, H), to which is added. Items are tiles of positions of heads of chunks.
//
// As s_i is in the exponent of all of y_i but the direct path, and -s_j in that of all that
// scaled_j gives, the gradient of s_t is dy_t (y_t - D x_t) - scaled_t dscaled_t, in both of which
// what a position takes from itself is left out: it would cancel. That of s_last is the sum of
// scaled_t times what dscaled_t has from the state after, and exp(s_last) dh h.
template <class T, class Sums>
__global__ void __launch_bounds__(Sums::kThreads, Sums::kBlocks)
    gradients_of_positions(SsdInput<T> in, int64_t items, SsdGradients<T> grad) {
  using C = compute_t<T>;
  constexpr int kOwn = Sums::kOwnRows;
  const int64_t tiles = (in.chunk_size + kTile - 1) / kTile;
  const int64_t values = in.rows * in.length * in.heads;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const int row = int(take(unit, tiles)) * kTile;
    const int64_t head = take(unit, in.heads);
    const Chunk<T> own(in, unit, head);
    if (row >= own.positions) continue;
    const C direct = in.direct[head];
    for (int column = 0; column < in.head_dim; column += kTile) {
      // Of scaled: what the state after has from it, then what later positions have.
      Sums tile;
      tile.template add<false, false, kExact<T>, false>(
          0, in.states,
          [&](int i, int n) {
            return row + i < own.positions ? own.weight(in.weight_in, row + i, n) : C(0);
          },
          [&](int n, int p) {
            return column + p < in.head_dim ? grad.carries[own.state(column + p, n)] : C(0);
          });
      C into[kOwn] = {};
      tile.for_each([&](int i, int j, C& sum, int r) {
        const int t = clamped(row + i, own.positions), p = clamped(column + j, in.head_dim);
        sum *= own.until(t);
        const C scaled = own.scaled(t, p);
        into[r] += column + j < in.head_dim ? scaled * sum : C(0);
      });
      add_to_term<Sums>(own, row, into, grad.terms + values);
      tile.template add<true, true, false, kExact<T>>(
          row, own.positions,
          [&](int j, int i) {
            const C taken = own.mixing(i, clamped(row + j, own.positions));
            return row + j < i ? taken : C(0);
          },
          [&](int i, int p) {
            return column + p < in.head_dim ? own.value(grad.y, i, column + p) : C(0);
          });
      // Summed as `into` is, which cancels it where no later position takes anything.
      C of_sums[kOwn] = {};
      C of_dt[kOwn] = {};
      tile.for_each([&](int i, int j, C& sum, int r) {
        const int t = clamped(row + i, own.positions), p = clamped(column + j, in.head_dim);
        const C given = own.x(t, p), step = in.dt[own.at(t)];
        const bool counts = column + j < in.head_dim;
        const C out = counts ? own.value(grad.y, t, column + j) : C(0),
                input = counts ? given : C(0);
        of_sums[r] -= step * input * sum;
        sum += in.scores[own.pair(t, t)] * out;
        of_dt[r] += sum * input;
        sum = sum * step + direct * out;
      });
      tile.for_each([&](int i, int j, C& sum, int) {
        const int t = row + i, p = column + j;
        if (t < own.positions && p < in.head_dim) {
          grad.x[own.at(t) * in.head_dim + p] = rounded<T>(sum);
        }
      });
      add_to_term<Sums>(own, row, of_sums, grad.terms);
      add_to_term<Sums>(own, row, of_dt, grad.terms + 2 * values);
    }
  }
}

// Of the sums of dt A, what comes from dy_t (y_t - D x_t), added to the first of the terms; and the
// last of the terms, of D. A kernel of its own, as registers are scarce. Items are tiles of
// positions of heads of chunks.
template <class T, class Sums>
__global__ void __launch_bounds__(Sums::kThreads, Sums::kBlocks)
    gradients_through_outputs(SsdInput<T> in, int64_t items, SsdGradients<T> grad) {
  using C = compute_t<T>;
  const int64_t values = in.rows * in.length * in.heads;
  const int64_t tiles = (in.chunk_size + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const int row = int(take(unit, tiles)) * kTile;
    const int64_t head = take(unit, in.heads);
    const Chunk<T> own(in, unit, head);
    if (row >= own.positions) continue;
    for (int column = 0; column < in.head_dim; column += kTile) {
      Sums tile = outputs<false, Sums>(own, grad.chunk_states, row, column);
      double of_sums[Sums::kOwnRows] = {};
      C of_direct[Sums::kOwnRows] = {};
      tile.for_each([&](int i, int j, C& sum, int r) {
        const int t = clamped(row + i, own.positions), p = clamped(column + j, in.head_dim);
        const C out = own.value(grad.y, t, p), input = own.x(t, p);
        of_sums[r] += column + j < in.head_dim ? out * sum : C(0);
        of_direct[r] += column + j < in.head_dim ? out * input : C(0);
      });
      add_to_term<Sums>(own, row, of_direct, grad.terms + 3 * values);
      add_to_term<Sums>(own, row, of_sums, grad.terms);
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
template <class T, class Sums>
__global__ void __launch_bounds__(Sums::kThreads, Sums::kBlocks)
    gradients_of_scores(SsdInput<T> in, int64_t items, SsdGradients<T> grad) {
  using C = compute_t<T>;
  const int64_t tiles = (in.chunk_size + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const int column = int(take(unit, tiles)) * kTile, row = int(take(unit, tiles)) * kTile;
    if (column > row) continue;
    Sums total;
    for (int64_t head = 0; head < in.heads; ++head) {
      const Chunk<T> own(in, unit, head);
      Sums tile;
      tile.template add<false, false, kExact<T>, kExact<T>>(
          0, in.head_dim,
          [&](int i, int p) {
            return row + i < own.positions ? own.value(grad.y, row + i, p) : C(0);
          },
          [&](int p, int j) { return column + j < own.positions ? own.x(column + j, p) : C(0); });
      total.add(tile, [&](int i, int j) {
        const int to = clamped(row + i, own.positions), from = clamped(column + j, own.positions);
        const C factor = in.dt[own.at(from)] * own.decay(from, to);
        return column + j <= row + i ? factor : C(0);
      });
    }
    const Chunk<T> own(in, unit, 0);
    total.for_each([&](int i, int j, C& sum, int) {
      if (row + i < own.positions && column + j <= row + i) {
        grad.scores[own.pair(row + i, column + j)] = sum;
      }
    });
  }
}

// Of B or C: through the scores, and through the states. Items are tiles of (positions, N) of
// chunks, of B and of C.
template <class T, class Sums>
__global__ void __launch_bounds__(Sums::kThreads, Sums::kBlocks)
    gradients_of_weights(SsdInput<T> in, int64_t items, SsdGradients<T> grad) {
  using C = compute_t<T>;
  const int64_t columns = (in.states + kTile - 1) / kTile;
  const int64_t rows = (in.chunk_size + kTile - 1) / kTile, per_row = in.heads * in.head_dim;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    int64_t unit = item;
    const bool is_in = take(unit, 2) == 0;
    const int column = int(take(unit, columns)) * kTile, row = int(take(unit, rows)) * kTile;
    const Chunk<T> own(in, unit, 0);
    if (row >= own.positions) continue;
    const C* const others = is_in ? in.weight_out : in.weight_in;
    const C* const states = (is_in ? grad.carries : grad.chunk_states) + unit * per_row * in.states;
    Sums tile;
    tile.template add<false, true, false, kExact<T>>(
        0, own.positions,
        [&](int i, int k) {
          const int t = row + i;
          if (t >= own.positions || (is_in ? k < t : k > t)) return C(0);
          return grad.scores[is_in ? own.pair(k, t) : own.pair(t, k)];
        },
        [&](int k, int n) {
          return column + n < in.states ? own.weight(others, k, column + n) : C(0);
        });
    tile.template add<false, true, false, false>(
        0, per_row,
        [&](int i, int k) {
          // Heads and channels lie next to each other.
          const int t = clamped(row + i, own.positions);
          const int64_t at = own.at(t) + k / int(in.head_dim);
          const int64_t last = own.at(own.positions - 1) + k / int(in.head_dim);
          const C input = value_of(is_in ? *own.x_place(t, k) : *own.place(grad.y, t, k));
          const double since = in.sums[at];
          const C decay = exp(C(is_in ? in.sums[last] - since : since));
          const C part = (is_in ? in.dt[at] : C(1)) * input * decay;
          return row + i < own.positions ? part : C(0);
        },
        [&](int k, int n) {
          return column + n < in.states ? states[k * in.states + column + n] : C(0);
        });
    C* const to = is_in ? grad.weight_in : grad.weight_out;
    tile.for_each([&](int i, int n, C& sum, int) {
      if (row + i < own.positions && column + n < in.states) {
        to[own.position(row + i) * in.states + column + n] = sum;
      }
    });
  }
}

// A kernel whose blocks take tiles.
template <class Sums, class... Parameters, class... Arguments>
Error launch_tiles(void (*kernel)(Parameters...), int64_t items, Stream stream, Arguments... args) {
  return launch(kernel, items, Sums::kThreads, Sums::kSharedBytes, stream, args...);
}

// What both passes begin with, and what follows it: the states that enter the chunks.
template <class T, class Sums>
Error states_of_chunks(const SsdInput<T>& in, const T* grad_y, compute_t<T>* parts,
                       compute_t<T>* state, Stream stream) {
  const int64_t units = in.rows * in.chunks, tiles = divide_up(in.chunk_size, kTile);
  if (const Error error = launch(sums_of_chunks<T>, divide_up(units * in.heads, kThreads), kThreads,
                                 0, stream, in)) {
    return error;
  }
  const int64_t pairs = units * tiles * tiles;
  if (const Error error = launch_tiles<Sums>(scores_of_chunks<T, Sums>, pairs, stream, in, pairs)) {
    return error;
  }
  const int64_t items =
      units * in.heads * divide_up(in.head_dim, kTile) * divide_up(in.states, kTile);
  if (const Error error =
          launch_tiles<Sums>(parts_of_chunks<T, Sums>, items, stream, in, items, grad_y, parts)) {
    return error;
  }
  return launch(join_chunks<T>, divide_up(in.rows * in.heads * in.head_dim * in.states, kThreads),
                kThreads, 0, stream, in, grad_y != nullptr, parts, state);
}

template <class T, class Sums>
Error ssd_in_tiles(const SsdInput<T>& in, T* y, compute_t<T>* state, compute_t<T>* chunk_states,
                   Stream stream) {
  const T* const forwards = nullptr;
  if (const Error error = states_of_chunks<T, Sums>(in, forwards, chunk_states, state, stream)) {
    return error;
  }
  const int64_t items = in.rows * in.chunks * in.heads * divide_up(in.chunk_size, kTile) *
                        divide_up(in.head_dim, kTile);
  return launch_tiles<Sums>(forward<T, Sums>, items, stream, in, items, chunk_states, y);
}

template <class T, class Sums>
Error ssd_backward_in_tiles(const SsdInput<T>& in, const SsdGradients<T>& grad, Stream stream) {
  if (const Error error = states_of_chunks<T, Sums>(in, grad.y, grad.carries, grad.state, stream)) {
    return error;
  }
  const int64_t units = in.rows * in.chunks, heads = units * in.heads;
  const int64_t tiles = divide_up(in.chunk_size, kTile), pairs = units * tiles * tiles;
  const int64_t items = units * tiles * divide_up(in.states, kTile) * 2;
  if (const Error error = launch_tiles<Sums>(gradients_of_positions<T, Sums>, heads * tiles, stream,
                                             in, heads * tiles, grad)) {
    return error;
  }
  if (const Error error = launch_tiles<Sums>(gradients_through_outputs<T, Sums>, heads * tiles,
                                             stream, in, heads * tiles, grad)) {
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
  if (const Error error =
          launch_tiles<Sums>(gradients_of_scores<T, Sums>, pairs, stream, in, pairs, grad)) {
    return error;
  }
  return launch_tiles<Sums>(gradients_of_weights<T, Sums>, items, stream, in, items, grad);
}

// Calls function with a tile of the class that multiplies.
template <class T, class Function>
Error with_tile(const SsdInput<T>& in, Function function) {
  if constexpr (std::is_same_v<T, double>) {
    return function(Tile<double>());
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return function(TensorTile());
  } else {
    return in.may_round ? function(TensorTile()) : function(Tile<float>());
  }
}

}  // namespace

template <class T>
Error ssd(const SsdInput<T>& in, T* y, compute_t<T>* state, compute_t<T>* chunk_states,
          Stream stream) {
  return with_tile(in, [&](auto tile) {
    return ssd_in_tiles<T, decltype(tile)>(in, y, state, chunk_states, stream);
  });
}

template <class T>
Error ssd_backward(const SsdInput<T>& in, const SsdGradients<T>& grad, Stream stream) {
  return with_tile(
      in, [&](auto tile) { return ssd_backward_in_tiles<T, decltype(tile)>(in, grad, stream); });
}

#define MBLM_INSTANTIATE(T)                                                            \
  template Error ssd<T>(const SsdInput<T>&, T*, compute_t<T>*, compute_t<T>*, Stream); \
  template Error ssd_backward<T>(const SsdInput<T>&, const SsdGradients<T>&, Stream)
MBLM_FOR_EACH_TYPE(MBLM_INSTANTIATE)
#undef MBLM_INSTANTIATE

}  // namespace mblm::cuda
