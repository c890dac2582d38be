// Mamba-2's state-space product, forwards: see ssd_chunks.cuh.
#include "cuda/ssd_chunks.cuh"

namespace mblm::cuda {
namespace {

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

template <class T, class Sums>
Error ssd_in_tiles(const SsdInput<T>& in, T* y, compute_t<T>* state, compute_t<T>* chunk_states,
                   Stream stream) {
  const T* const forwards = nullptr;
  const int64_t items = in.rows * in.chunks * in.heads * divide_up(in.chunk_size, kTile) *
                        divide_up(in.head_dim, kTile);
  return first_error(
      {states_of_chunks<T, Sums>(in, forwards, chunk_states, state, stream),
       launch_tiles<Sums>(forward<T, Sums>, items, stream, in, items, chunk_states, y)});
}

}  // namespace

template <class T, class Sums>
Error states_of_chunks(const SsdInput<T>& in, const T* grad_y, compute_t<T>* parts,
                       compute_t<T>* state, Stream stream) {
  const int64_t units = in.rows * in.chunks, tiles = divide_up(in.chunk_size, kTile);
  const int64_t pairs = units * tiles * tiles;
  const int64_t items =
      units * in.heads * divide_up(in.head_dim, kTile) * divide_up(in.states, kTile);
  return first_error(
      {launch(sums_of_chunks<T>, divide_up(units * in.heads, kThreads), kThreads, 0, stream, in),
       launch_tiles<Sums>(scores_of_chunks<T, Sums>, pairs, stream, in, pairs),
       launch_tiles<Sums>(parts_of_chunks<T, Sums>, items, stream, in, items, grad_y, parts),
       launch(join_chunks<T>, divide_up(in.rows * in.heads * in.head_dim * in.states, kThreads),
              kThreads, 0, stream, in, grad_y != nullptr, parts, state)});
}

// What the gradients begin with, too.
template Error states_of_chunks<float, Tile<float>>(const SsdInput<float>&, const float*, float*,
                                                    float*, Stream);
template Error states_of_chunks<float, TensorTile>(const SsdInput<float>&, const float*, float*,
                                                   float*, Stream);
template Error states_of_chunks<double, Tile<double>>(const SsdInput<double>&, const double*,
                                                      double*, double*, Stream);
template Error states_of_chunks<BFloat16, TensorTile>(const SsdInput<BFloat16>&, const BFloat16*,
                                                      float*, float*, Stream);

template <class T>
Error ssd(const SsdInput<T>& in, T* y, compute_t<T>* state, compute_t<T>* chunk_states,
          Stream stream) {
  return with_tile(in, [&](auto tile) {
    return ssd_in_tiles<T, decltype(tile)>(in, y, state, chunk_states, stream);
  });
}

MBLM_INSTANTIATE(ssd)

}  // namespace mblm::cuda
