// The gradients of Mamba-2's state-space product: see ssd_chunks.cuh.
#include "cuda/ssd_chunks.cuh"

namespace mblm::cuda {
namespace {

// What positions give to the gradients of the sums of dt A, of the sum over the whole chunk, of dt
// itself, and of D.
enum class Term { kSums, kInto, kSteps, kDirect };

template <class T>
MBLM_DEVICE double* place_of(Term term, const Chunk<T>& own, int t, const SsdGradients<T>& grad) {
  return grad.terms + int64_t(term) * own.in.rows * own.in.length * own.in.heads + own.at(t);
}

// Adds sums over this thread's entries of its rows, of the tile from `row` on, to a term of each
// position.
template <class Sums, class T, class S>
MBLM_DEVICE void add_to_term(const Chunk<T>& own, int row, S (&sums)[Sums::kOwnRows],
                             const SsdGradients<T>& grad, Term term) {
  MBLM_UNROLL_ALL
  for (int r = 0; r < Sums::kOwnRows; ++r) {
    for (int offset = Sums::kNeighbors / 2; offset > 0; offset /= 2) {
      sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], offset);
    }
    const int t = row + Sums::row(r);
    if (!Sums::is_first() || t >= own.positions) continue;
    *place_of(term, own, t, grad) += sums[r];
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
      // Not before all is summed up, which would take more registers than there are.
      add_to_term<Sums>(own, row, into, grad, Term::kInto);
      add_to_term<Sums>(own, row, of_sums, grad, Term::kSums);
      add_to_term<Sums>(own, row, of_dt, grad, Term::kSteps);
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
      add_to_term<Sums>(own, row, of_direct, grad, Term::kDirect);
      add_to_term<Sums>(own, row, of_sums, grad, Term::kSums);
    }
  }
}

// What goes through the decay of the state over a whole chunk: exp(s_last) dh h. A warp takes a
// head of a chunk.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gradients_of_totals(SsdInput<T> in, SsdGradients<T> grad) {
  using C = compute_t<T>;
  const int64_t items = in.rows * in.chunks * in.heads, per_head = in.head_dim * in.states;
  for (int64_t item = first_item_of_warp(); item < items; item += warp_stride()) {
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
  for (int64_t item = first_item(); item < items; item += item_stride()) {
    int64_t unit = item;
    const int64_t head = take(unit, in.heads);
    const Chunk<T> own(in, unit, head);
    double of_rate = double(grad.rates[item]), of_rates = 0, of_direct = 0;
    MBLM_UNROLL
    for (int64_t t = 0; t < own.positions; ++t) {
      of_rate += *place_of(Term::kInto, own, t, grad);
      of_direct += *place_of(Term::kDirect, own, t, grad);
    }
    MBLM_UNROLL
    for (int64_t t = own.positions - 1; t >= 0; --t) {
      of_rate += *place_of(Term::kSums, own, t, grad);
      of_rates += of_rate * double(in.dt[own.at(t)]);
      grad.dt[own.at(t)] =
          C(of_rate * double(in.rates[head]) + *place_of(Term::kSteps, own, t, grad));
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

template <class T, class Sums>
Error ssd_backward_in_tiles(const SsdInput<T>& in, const SsdGradients<T>& grad, Stream stream) {
  const int64_t units = in.rows * in.chunks, heads = units * in.heads;
  const int64_t tiles = divide_up(in.chunk_size, kTile), pairs = units * tiles * tiles;
  const int64_t items = units * tiles * divide_up(in.states, kTile) * 2, each = heads * tiles;
  return first_error(
      {states_of_chunks<T, Sums>(in, grad.y, grad.carries, grad.state, stream),
       launch_tiles<Sums>(gradients_of_positions<T, Sums>, each, stream, in, each, grad),
       launch_tiles<Sums>(gradients_through_outputs<T, Sums>, each, stream, in, each, grad),
       launch(gradients_of_totals<T>, divide_up(heads, kWarps), kThreads, 0, stream, in, grad),
       launch(gradients_of_rates<T>, divide_up(heads, kThreads), kThreads, 0, stream, in, grad),
       launch_tiles<Sums>(gradients_of_scores<T, Sums>, pairs, stream, in, pairs, grad),
       launch_tiles<Sums>(gradients_of_weights<T, Sums>, items, stream, in, items, grad)});
}

}  // namespace

template <class T>
Error ssd_backward(const SsdInput<T>& in, const SsdGradients<T>& grad, Stream stream) {
  return with_tile(
      in, [&](auto tile) { return ssd_backward_in_tiles<T, decltype(tile)>(in, grad, stream); });
}

MBLM_INSTANTIATE(ssd_backward)

}  // namespace mblm::cuda
