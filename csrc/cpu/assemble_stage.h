// A stage's input laid out as [start token, e_1, ..., e_P], with positions and context added.
//
// Vector 1 + p of a row is rotate(e_p) + positions[p] + context[row, p]. A rotation turns the
// interleaved pairs of channels: (x0, x1) -> (x0 * cos - x1 * sin, x1 * cos + x0 * sin).
// T is float, double or BFloat16. The sums over rows that the start token's and the positions'
// gradients are come from sum_rows.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

template <class T>
struct AssembleStageInput {
  int64_t length;        // P
  int64_t width;         // D; even if there is a rotation
  const T* start_token;  // (D)
  const T* embeddings;   // (rows, P, D), or with ids a table (V, D); channels contiguous
  int64_t embeddings_row_stride;
  int64_t embeddings_position_stride;
  const int64_t* ids;            // (rows, P) in [0, V), contiguous; null for none
  const T* positions;            // (>= P, D), contiguous; null for none
  const compute_t<T>* rotation;  // (>= P, D / 2, 2), contiguous; null for none
  const T* context;              // (rows, P, D), channels contiguous; null for none
  int64_t context_row_stride;
  int64_t context_position_stride;
};

// Vectors [begin, end) of rows * (1 + P). out is (rows, 1 + P, D), contiguous. With ids, the stride
// of the table's rows is embeddings_row_stride.
template <class T>
void assemble_stage(const AssembleStageInput<T>& in, T* out, int64_t begin, int64_t end);

template <class T>
struct AssembleStageGrad {
  int64_t length;                // P
  int64_t width;                 // D
  const T* grad;                 // (rows, 1 + P, D), contiguous
  const compute_t<T>* rotation;  // as above
};

// The gradient of embeddings that were rotated: vectors [begin, end) of rows * P.
// grad_embeddings is (rows, P, D), contiguous.
template <class T>
void assemble_stage_unrotate(const AssembleStageGrad<T>& in, T* grad_embeddings, int64_t begin,
                             int64_t end);

// The gradient of a table (V, D), contiguous: columns [begin, end), both even if there is a
// rotation. offsets and order are group_by_id's of the ids (rows, P).
template <class T>
void assemble_stage_table(const AssembleStageGrad<T>& in, const int64_t* offsets,
                          const int64_t* order, int64_t num_embeddings, int64_t padding_idx,
                          T* grad_table, int64_t begin, int64_t end);

}  // namespace mblm::cpu
