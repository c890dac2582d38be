// Rotary positions and causal attention of many short sequences: see short_attention.h.
//
// A block takes one head of one row at a time. The S x T probabilities are kept in shared memory;
// queries, keys and values pass through it in slices of some of their channels, so that any width
// fits. A slice holds pairs of channels (c, c + half), which a rotation keeps together.
#include <algorithm>
#include <cmath>

#include "cuda/kernel.cuh"
#include "cuda/short_attention.h"

namespace mblm::cuda {
namespace {

using cpu::HeadsView;
using cpu::ShortAttentionInput;

// Channels of a slice; its rows in shared memory are a pack longer, which spreads them over banks.
template <class C>
constexpr int kSlice = sizeof(C) == 4 ? 64 : 16;
template <class C>
constexpr int kSliceRow = kSlice<C> + kPackSize<C>;

// What a block works on, and its shared memory.
template <class T>
struct Head {
  using C = compute_t<T>;
  static constexpr int kPairs = kSlice<C> / 2, kRow = kSliceRow<C>;
  const ShortAttentionInput<T>& in;
  int64_t row, head;
  int queries, keys, offset;  // offset: T - S
  int64_t half;               // pairs of channels
  C* probabilities;           // (S, T + 1)
  C* grad_scores;             // (S, T + 1), backward only
  C* a;                       // (S, kRow)
  C* b;                       // (T, kRow)
  C* c;                       // (T, kRow), backward only

  MBLM_DEVICE Head(const ShortAttentionInput<T>& in, C* shared, bool backward)
      : in(in),
        queries(int(in.queries)),
        keys(int(in.keys)),
        offset(keys - queries),
        half((in.width + 1) / 2),
        a(shared),
        b(a + queries * kRow),
        c(b + keys * kRow) {
    probabilities = c + (backward ? keys * kRow : 0);
    grad_scores = probabilities + queries * (keys + 1);
  }

  // The channel of entry `local` of the slice that begins at this pair; beyond the end, none.
  MBLM_DEVICE int64_t channel(int64_t pair, int local) const {
    const int64_t own = pair + local % kPairs;
    if (own >= half) return in.width;
    return local < kPairs ? own : half + own;
  }

  // A slice of `count` vectors to shared memory, rotated to the positions from `position` on if
  // there are tables, times factor.
  MBLM_DEVICE void read(const HeadsView<T>& view, int count, int64_t pair, const float* cos,
                        const float* sin, int position, C factor, C* to) const {
    const T* from = view.data + row * view.row_stride + head * view.head_stride;
    for (int item = threadIdx.x; item < count * kPairs; item += blockDim.x) {
      const int i = item / kPairs, p = item % kPairs;
      const int64_t first = pair + p, second = half + first;
      const T* vector = from + i * view.position_stride;
      const C one = first < half ? value_of(vector[first]) * factor : C(0);
      const C two = first < half && second < in.width ? value_of(vector[second]) * factor : C(0);
      C* own = to + i * kRow + p;
      if (cos && first < half) {
        const int64_t at = (position + i) * half + first;
        own[0] = one * C(cos[at]) - two * C(sin[at]);
        own[kPairs] = two * C(cos[at]) + one * C(sin[at]);
      } else {
        own[0] = one;
        own[kPairs] = two;
      }
    }
  }

  // The gradient of what read() read, from that of what it gave, to (B, count, H, d).
  MBLM_DEVICE void write(const C* from, int count, int64_t pair, const float* cos, const float* sin,
                         int position, C factor, T* to) const {
    for (int item = threadIdx.x; item < count * kPairs; item += blockDim.x) {
      const int i = item / kPairs, p = item % kPairs;
      const int64_t first = pair + p, second = half + first;
      if (first >= half) continue;
      C one = from[i * kRow + p] * factor, two = from[i * kRow + kPairs + p] * factor;
      if (cos) {
        const int64_t at = (position + i) * half + first;
        const C x = one, y = two;
        one = x * C(cos[at]) + y * C(sin[at]);
        two = y * C(cos[at]) - x * C(sin[at]);
      }
      T* vector = to + ((row * count + i) * in.heads + head) * in.width;
      vector[first] = rounded<T>(one);
      if (second < in.width) vector[second] = rounded<T>(two);
    }
  }

  // to (S, T + 1) (+)= a b' for the keys that each query sees.
  MBLM_DEVICE void products(bool add, C* to) const {
    constexpr int N = kPackSize<C>;
    for (int item = threadIdx.x; item < queries * keys; item += blockDim.x) {
      const int i = item / keys, j = item - i * keys;
      if (j > i + offset) continue;
      C sums[N] = {};
      for (int l = 0; l < kSlice<C>; l += N) {
        const Pack<C, N> x = load_pack<N>(a + i * kRow + l), y = load_pack<N>(b + j * kRow + l);
        for (int k = 0; k < N; ++k) sums[k] += x.values[k] * y.values[k];
      }
      C sum = sums[0];
      for (int k = 1; k < N; ++k) sum += sums[k];
      C& entry = to[i * (keys + 1) + j];
      entry = add ? entry + sum : sum;
    }
  }

  // to (S, kRow) = matrix (S, T + 1) times vectors (T, kRow).
  MBLM_DEVICE void sums_over_keys(const C* matrix, const C* vectors, C* to) const {
    constexpr int N = kPackSize<C>, kPacks = kSlice<C> / N;
    for (int item = threadIdx.x; item < queries * kPacks; item += blockDim.x) {
      const int i = item / kPacks, l = item % kPacks * N;
      Pack<C, N> sum = {};
      for (int j = 0; j <= i + offset; ++j) {
        const C factor = matrix[i * (keys + 1) + j];
        const Pack<C, N> x = load_pack<N>(vectors + j * kRow + l);
        for (int k = 0; k < N; ++k) sum.values[k] += factor * x.values[k];
      }
      store_pack(to + i * kRow + l, sum);
    }
  }

  // to (T, kRow) = matrix (S, T + 1) transposed times vectors (S, kRow).
  MBLM_DEVICE void sums_over_queries(const C* matrix, const C* vectors, C* to) const {
    constexpr int N = kPackSize<C>, kPacks = kSlice<C> / N;
    for (int item = threadIdx.x; item < keys * kPacks; item += blockDim.x) {
      const int j = item / kPacks, l = item % kPacks * N;
      Pack<C, N> sum = {};
      for (int i = j > offset ? j - offset : 0; i < queries; ++i) {
        const C factor = matrix[i * (keys + 1) + j];
        const Pack<C, N> x = load_pack<N>(vectors + i * kRow + l);
        for (int k = 0; k < N; ++k) sum.values[k] += factor * x.values[k];
      }
      store_pack(to + j * kRow + l, sum);
    }
  }

  // Queries, scaled, and keys of a slice to a and b.
  MBLM_DEVICE void read_queries_and_keys(int64_t pair, C scale) const {
    read(in.q, queries, pair, in.cos, in.sin, offset, scale, a);
    read(in.k, keys, pair, in.cos, in.sin, 0, C(1), b);
  }

  // The probabilities of this head; ends at a barrier.
  MBLM_DEVICE void attend(C scale) const {
    for (int64_t pair = 0; pair < half; pair += kPairs) {
      read_queries_and_keys(pair, scale);
      __syncthreads();
      products(pair > 0, probabilities);
      __syncthreads();
    }
    for (int i = threadIdx.x; i < queries; i += blockDim.x) {
      C* own = probabilities + i * (keys + 1);
      const int seen = i + offset + 1;
      C highest = own[0], sum = 0;
      for (int j = 1; j < seen; ++j) highest = own[j] > highest ? own[j] : highest;
      for (int j = 0; j < seen; ++j) {
        own[j] = exp(own[j] - highest);
        sum += own[j];
      }
      const C inverse = C(1) / sum;
      for (int j = 0; j < seen; ++j) own[j] *= inverse;
    }
    __syncthreads();
  }
};

constexpr int kMaxThreads = 256;

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    forward(ShortAttentionInput<T> in, int64_t items, compute_t<T> scale, T* out) {
  using C = compute_t<T>;
  Head<T> own(in, shared_memory<C>(), false);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    own.row = quotient(item, in.heads);
    own.head = item - own.row * in.heads;
    own.attend(scale);
    for (int64_t pair = 0; pair < own.half; pair += Head<T>::kPairs) {
      own.read(in.v, own.keys, pair, nullptr, nullptr, 0, C(1), own.b);
      __syncthreads();
      own.sums_over_keys(own.probabilities, own.b, own.a);
      __syncthreads();
      own.write(own.a, own.queries, pair, nullptr, nullptr, 0, C(1), out);
      __syncthreads();
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    backward(ShortAttentionInput<T> in, int64_t items, compute_t<T> scale, HeadsView<T> grad,
             T* grad_q, T* grad_k, T* grad_v) {
  using C = compute_t<T>;
  Head<T> own(in, shared_memory<C>(), true);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    own.row = quotient(item, in.heads);
    own.head = item - own.row * in.heads;
    own.attend(scale);
    for (int64_t pair = 0; pair < own.half; pair += Head<T>::kPairs) {
      own.read(grad, own.queries, pair, nullptr, nullptr, 0, C(1), own.a);
      own.read(in.v, own.keys, pair, nullptr, nullptr, 0, C(1), own.b);
      __syncthreads();
      own.products(pair > 0, own.grad_scores);
      own.sums_over_queries(own.probabilities, own.a, own.c);
      __syncthreads();
      own.write(own.c, own.keys, pair, nullptr, nullptr, 0, C(1), grad_v);
      __syncthreads();
    }
    // Through the softmax: p_ij (dp_ij - sum over j of p_ij dp_ij).
    for (int i = threadIdx.x; i < own.queries; i += blockDim.x) {
      const C* p = own.probabilities + i * (own.keys + 1);
      C* g = own.grad_scores + i * (own.keys + 1);
      C along = 0;
      for (int j = 0; j <= i + own.offset; ++j) along += p[j] * g[j];
      for (int j = 0; j <= i + own.offset; ++j) g[j] = p[j] * (g[j] - along);
    }
    for (int64_t pair = 0; pair < own.half; pair += Head<T>::kPairs) {
      own.read_queries_and_keys(pair, scale);
      __syncthreads();
      own.sums_over_keys(own.grad_scores, own.b, own.c);
      __syncthreads();
      own.write(own.c, own.queries, pair, in.cos, in.sin, own.offset, scale, grad_q);
      __syncthreads();
      own.sums_over_queries(own.grad_scores, own.a, own.c);
      __syncthreads();
      own.write(own.c, own.keys, pair, in.cos, in.sin, 0, C(1), grad_k);
      __syncthreads();
    }
  }
}

// As many threads as there are products, within bounds.
int threads_for(int64_t queries, int64_t keys) {
  constexpr int64_t kMinThreads = 64;
  return int(
      std::clamp<int64_t>(divide_up(queries * keys / 2, kWarp) * kWarp, kMinThreads, kMaxThreads));
}

template <class T>
size_t shared_bytes(const ShortAttentionInput<T>& in, bool backward) {
  using C = compute_t<T>;
  const int64_t vectors = in.queries + in.keys * (backward ? 2 : 1);
  const int64_t matrices = in.queries * (in.keys + 1) * (backward ? 2 : 1);
  return size_t(vectors * kSliceRow<C> + matrices) * sizeof(C);
}

template <class T>
compute_t<T> scale_of(const ShortAttentionInput<T>& in) {
  return compute_t<T>(1 / std::sqrt(double(in.width)));
}

}  // namespace

template <class T>
Error short_attention(const ShortAttentionInput<T>& in, int64_t items, T* out, Stream stream) {
  return launch(forward<T>, items, threads_for(in.queries, in.keys), shared_bytes(in, false),
                stream, in, items, scale_of(in), out);
}

template <class T>
Error short_attention_backward(const ShortAttentionInput<T>& in, int64_t items,
                               const HeadsView<T>& grad, T* grad_q, T* grad_k, T* grad_v,
                               Stream stream) {
  return launch(backward<T>, items, threads_for(in.queries, in.keys), shared_bytes(in, true),
                stream, in, items, scale_of(in), grad, grad_q, grad_k, grad_v);
}

MBLM_INSTANTIATE(short_attention)
MBLM_INSTANTIATE(short_attention_backward)

}  // namespace mblm::cuda
