// What both passes of Mamba-2's state-space product are made of: see ssd.h.
//
// With s_i the sum of dt A up to position i of a chunk, h the state before it and scaled = dt x,
//   y_i = exp(s_i) h C_i + sum over j <= i of exp(s_i - s_j) (C_i B_j) scaled_j + D x_i,
//   state after = exp(s_last) h + sum over j of exp(s_last - s_j) scaled_j B_j'.
// Everything is a product of matrices but the walk from chunk to chunk, which is short. Sums is the
// class of a product's tile: TensorTile where x is bfloat16, or where PyTorch may round float32.
#pragma once

#include <type_traits>

#include "cuda/product.cuh"
#include "cuda/ssd.h"
#include "cuda/tensor_product.cuh"

namespace mblm::cuda {

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

// A kernel whose blocks take tiles.
template <class Sums, class... Parameters, class... Arguments>
Error launch_tiles(void (*kernel)(Parameters...), int64_t items, Stream stream, Arguments... args) {
  return launch(kernel, items, Sums::kThreads, Sums::kSharedBytes, stream, args...);
}

// What both passes begin with, and what follows it: the states that enter the chunks, in `parts`.
// Forwards grad_y is null, and state goes from what enters the first chunk to what leaves the last;
// backwards these are gradients, and it goes the other way.
template <class T, class Sums>
Error states_of_chunks(const SsdInput<T>& in, const T* grad_y, compute_t<T>* parts,
                       compute_t<T>* state, Stream stream);

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

}  // namespace mblm::cuda
