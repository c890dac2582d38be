// A stage's input laid out with positions and context: see assemble_stage.h.
#include "cpu/assemble_stage.h"

#include <algorithm>

namespace mblm::cpu {

// out = vector + position + context; the last two may be null.
template <class T>
MBLM_INLINE void add(const T* __restrict vector, const T* __restrict position,
                     const T* __restrict context, T* __restrict out, int64_t n) {
  using C = compute_t<T>;
  for (int64_t c = 0; c < n; ++c) {
    C sum = C(vector[c]);
    if (position) sum += C(position[c]);
    if (context) sum += C(context[c]);
    out[c] = T(sum);
  }
}

// The same with the vector rotated first.
template <class T, class C>
MBLM_INLINE void rotate_and_add(const T* __restrict vector, const C* __restrict rotation,
                                const T* __restrict position, const T* __restrict context,
                                T* __restrict out, int64_t n) {
  for (int64_t c = 0; c < n; c += 2) {
    const C cos = rotation[c], sin = rotation[c + 1];
    const C x0 = C(vector[c]), x1 = C(vector[c + 1]);
    C sum0 = x0 * cos - x1 * sin, sum1 = x1 * cos + x0 * sin;
    if (position) sum0 += C(position[c]), sum1 += C(position[c + 1]);
    if (context) sum0 += C(context[c]), sum1 += C(context[c + 1]);
    out[c] = T(sum0);
    out[c + 1] = T(sum1);
  }
}

template <class T>
MBLM_CLONES void assemble_stage(const AssembleStageInput<T>& in, T* out, int64_t begin,
                                int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / (1 + in.length), p = i % (1 + in.length) - 1;
    T* to = out + i * in.width;
    if (p < 0) {
      std::copy(in.start_token, in.start_token + in.width, to);
      continue;
    }
    const T* vector =
        in.ids ? in.embeddings + in.ids[row * in.length + p] * in.embeddings_row_stride
               : in.embeddings + row * in.embeddings_row_stride + p * in.embeddings_position_stride;
    const T* position = in.positions ? in.positions + p * in.width : nullptr;
    const T* context =
        in.context ? in.context + row * in.context_row_stride + p * in.context_position_stride
                   : nullptr;
    if (in.rotation) {
      rotate_and_add(vector, in.rotation + p * in.width, position, context, to, in.width);
    } else {
      add(vector, position, context, to, in.width);
    }
  }
}

// The gradient vector of embedding i of rows * P.
template <class T>
MBLM_INLINE const T* grad_of(const AssembleStageGrad<T>& in, int64_t i) {
  const int64_t row = i / in.length, p = i % in.length;
  return in.grad + (row * (1 + in.length) + 1 + p) * in.width;
}

// out (+)= the gradient turned back, for n columns of one vector.
template <bool kAdd, class T, class C, class Out>
MBLM_INLINE void turn_back(const T* __restrict grad, const C* __restrict rotation,
                           Out* __restrict out, int64_t n) {
  for (int64_t c = 0; c < n; c += 2) {
    const C cos = rotation[c], sin = rotation[c + 1];
    const C g0 = C(grad[c]), g1 = C(grad[c + 1]);
    const C x0 = g0 * cos + g1 * sin, x1 = g1 * cos - g0 * sin;
    out[c] = kAdd ? Out(out[c] + x0) : Out(x0);
    out[c + 1] = kAdd ? Out(out[c + 1] + x1) : Out(x1);
  }
}

template <class T>
MBLM_CLONES void assemble_stage_unrotate(const AssembleStageGrad<T>& in, T* grad_embeddings,
                                         int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    turn_back<false>(grad_of(in, i), in.rotation + i % in.length * in.width,
                     grad_embeddings + i * in.width, in.width);
  }
}

// Columns [column, column + n) of the table's gradient.
template <class T>
MBLM_INLINE void table_tile(const AssembleStageGrad<T>& in, const int64_t* offsets,
                            const int64_t* order, int64_t num_embeddings, int64_t padding_idx,
                            T* grad_table, int64_t column, int64_t n) {
  double sums[kTileColumns];
  for (int64_t v = 0; v < num_embeddings; ++v) {
    std::fill(sums, sums + n, 0.0);
    const int64_t last = v == padding_idx ? offsets[v] : offsets[v + 1];
    for (int64_t k = offsets[v]; k < last; ++k) {
      MBLM_NO_JAM;
      const T* __restrict grad = grad_of(in, order[k]) + column;
      if (k + 1 < last) prefetch(grad_of(in, order[k + 1]) + column, n);
      if (in.rotation) {
        const int64_t p = order[k] % in.length;
        turn_back<true>(grad, in.rotation + p * in.width + column, sums, n);
      } else {
        for (int64_t c = 0; c < n; ++c) sums[c] += grad[c];
      }
    }
    T* to = grad_table + v * in.width + column;
    for (int64_t c = 0; c < n; ++c) to[c] = T(sums[c]);
  }
}

template <class T>
MBLM_CLONES void assemble_stage_table(const AssembleStageGrad<T>& in, const int64_t* offsets,
                                      const int64_t* order, int64_t num_embeddings,
                                      int64_t padding_idx, T* grad_table, int64_t begin,
                                      int64_t end) {
  for (int64_t c = begin; c < end; c += kTileColumns) {
    table_tile(in, offsets, order, num_embeddings, padding_idx, grad_table, c,
               std::min(kTileColumns, end - c));
  }
}

MBLM_INSTANTIATE(assemble_stage)
MBLM_INSTANTIATE(assemble_stage_unrotate)
MBLM_INSTANTIATE(assemble_stage_table)

}  // namespace mblm::cpu
