// A stage's input laid out with positions and context: see assemble_stage.h.
//
// A thread takes N channels of a vector, a pack or a single one.
#include "cuda/assemble_stage.h"
#include "cuda/groups.cuh"
#include "cuda/kernel.cuh"

namespace mblm::cuda {
namespace {

using cpu::AssembleStageGrad;
using cpu::AssembleStageInput;

// Channel `first` + k of a vector whose interleaved pairs are rotated, by the sine's sign.
template <int N, class T, class C>
MBLM_DEVICE Pack<C, N> rotated(const T* vector, const C* rotation, int64_t first, C sign) {
  const Pack<T, N> own = load_pack<N>(vector + first);
  Pack<C, N> result;
  for (int k = 0; k < N; ++k) {
    const int64_t c = first + k;
    const C other = value_of(N == 1 ? vector[c ^ 1] : own.values[N == 1 ? 0 : k ^ 1]);
    const C cos = rotation[c & ~int64_t(1)], sin = rotation[c | 1] * sign;
    // (x0 cos - x1 sin, x1 cos + x0 sin)
    result.values[k] = value_of(own.values[k]) * cos + (c % 2 ? other * sin : -other * sin);
  }
  return result;
}

template <int N, class T>
MBLM_DEVICE void add_vector(const T* vector, int64_t first, compute_t<T>* sums) {
  const Pack<T, N> pack = load_pack<N>(vector + first);
  for (int k = 0; k < N; ++k) sums[k] += value_of(pack.values[k]);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    forward(AssembleStageInput<T> in, int64_t rows, int64_t num_embeddings, T* out) {
  using C = compute_t<T>;
  const int64_t packs = in.width / N, items = rows * (1 + in.length) * packs;
  for (int64_t item = first_item(); item < items; item += item_stride()) {
    const int64_t vector = quotient(item, packs), first = (item - vector * packs) * N;
    const int64_t row = quotient(vector, 1 + in.length), p = vector - row * (1 + in.length) - 1;
    T* to = out + vector * in.width + first;
    if (p < 0) {
      store_pack(to, load_pack<N>(in.start_token + first));
      continue;
    }
    const int64_t id = in.ids ? in.ids[row * in.length + p] : 0;
    Pack<C, N> sum;
    if (in.ids && (id < 0 || id >= num_embeddings)) {
      for (int k = 0; k < N; ++k) sum.values[k] = C(NAN);
    } else {
      const T* from = in.embeddings +
                      (in.ids ? id * in.embeddings_row_stride
                              : row * in.embeddings_row_stride + p * in.embeddings_position_stride);
      if (in.rotation) {
        sum = rotated<N>(from, in.rotation + p * in.width, first, C(1));
      } else {
        const Pack<T, N> pack = load_pack<N>(from + first);
        for (int k = 0; k < N; ++k) sum.values[k] = value_of(pack.values[k]);
      }
    }
    if (in.positions) add_vector<N>(in.positions + p * in.width, first, sum.values);
    if (in.context) {
      add_vector<N>(in.context + row * in.context_row_stride + p * in.context_position_stride,
                    first, sum.values);
    }
    Pack<T, N> result;
    for (int k = 0; k < N; ++k) result.values[k] = rounded<T>(sum.values[k]);
    store_pack(to, result);
  }
}

// The gradient vector of embedding i of rows * P, turned back.
template <class T>
struct GradTerms {
  AssembleStageGrad<T> in;

  template <int N>
  MBLM_DEVICE void add(int64_t /*id*/, int64_t i, int64_t first, compute_t<T>* sums) const {
    const int64_t row = quotient(i, in.length), p = i - row * in.length;
    const T* grad = in.grad + (row * (1 + in.length) + 1 + p) * in.width;
    if (in.rotation) {
      const auto turned = rotated<N>(grad, in.rotation + p * in.width, first, compute_t<T>(-1));
      for (int k = 0; k < N; ++k) sums[k] += turned.values[k];
    } else {
      add_vector<N>(grad, first, sums);
    }
  }
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    unrotate(GradTerms<T> terms, int64_t rows, T* grad_embeddings) {
  const int64_t width = terms.in.width, packs = width / N, items = rows * terms.in.length * packs;
  for (int64_t item = first_item(); item < items; item += item_stride()) {
    const int64_t vector = quotient(item, packs), first = (item - vector * packs) * N;
    Pack<compute_t<T>, N> sum = {};
    terms.template add<N>(0, vector, first, sum.values);
    Pack<T, N> result;
    for (int k = 0; k < N; ++k) result.values[k] = rounded<T>(sum.values[k]);
    store_pack(grad_embeddings + vector * width + first, result);
  }
}

template <class T>
bool packs_fit(const AssembleStageInput<T>& in) {
  constexpr int64_t N = kPackSize<T>;
  return in.width % N == 0 && in.embeddings_row_stride % N == 0 &&
         in.embeddings_position_stride % N == 0 && in.context_row_stride % N == 0 &&
         in.context_position_stride % N == 0 && is_aligned(in.start_token) &&
         is_aligned(in.embeddings) && is_aligned(in.positions) && is_aligned(in.context);
}

}  // namespace

template <class T>
Error assemble_stage(const AssembleStageInput<T>& in, int64_t rows, int64_t num_embeddings, T* out,
                     Stream stream) {
  constexpr int N = kPackSize<T>;
  const bool packed = packs_fit(in) && is_aligned(out);
  const int64_t items = rows * (1 + in.length) * in.width / (packed ? N : 1);
  return launch(packed ? forward<T, N> : forward<T, 1>, divide_up(items, kThreads), kThreads, 0,
                stream, in, rows, num_embeddings, out);
}

template <class T>
Error assemble_stage_unrotate(const AssembleStageGrad<T>& in, int64_t rows, T* grad_embeddings,
                              Stream stream) {
  constexpr int N = kPackSize<T>;
  const bool packed = in.width % N == 0 && is_aligned(in.grad) && is_aligned(grad_embeddings);
  const int64_t items = rows * in.length * in.width / (packed ? N : 1);
  return launch(packed ? unrotate<T, N> : unrotate<T, 1>, divide_up(items, kThreads), kThreads, 0,
                stream, GradTerms<T>{in}, rows, grad_embeddings);
}

template <class T>
Error assemble_stage_table(const AssembleStageGrad<T>& in, const Groups& groups,
                           int64_t padding_idx, compute_t<T>* sums, T* grad_table, Stream stream) {
  const bool packed = in.width % kPackSize<T> == 0 && is_aligned(in.grad) && is_aligned(sums);
  return sum_groups(groups, in.width, padding_idx, packed, GradTerms<T>{in}, sums, grad_table,
                    stream);
}

MBLM_INSTANTIATE(assemble_stage)
MBLM_INSTANTIATE(assemble_stage_unrotate)
MBLM_INSTANTIATE(assemble_stage_table)

}  // namespace mblm::cuda
