// Patches of R token ids embedded as the LayerNorm of their R embeddings, flattened in order.
//
// Ids are padded on the right to num_patches * R. Mean and variance of a patch are put together
// from those of the table's rows it holds, so that a result is written in one pass.
// T is float, double or BFloat16.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace mblm::cpu {

template <class T>
struct EmbedPatchesInput {
  int64_t length;       // L, ids in a row, at most num_patches * patch_size
  int64_t num_patches;  // per row
  int64_t patch_size;   // R
  int64_t width;        // D
  int64_t pad_token_id;
  const int64_t* ids;  // (B, L) in [0, V), contiguous
  const T* table;      // (V, D), contiguous
  const T* weight;     // (R, D), contiguous

  // The id at position r of patch i of B * num_patches.
  MBLM_INLINE int64_t id(int64_t i, int64_t r) const {
    const int64_t row = i / num_patches, l = i % num_patches * patch_size + r;
    return l < length ? ids[row * length + l] : pad_token_id;
  }
};

struct Moments {
  double mean;
  double squares;  // sum of squared deviations from the mean
};

// Moments of the table's rows [begin, end).
template <class T>
void embed_patches_row_moments(const EmbedPatchesInput<T>& in, Moments* moments, int64_t begin,
                               int64_t end);

// Mean and 1 / sqrt(variance + eps) of patches [begin, end) of B * num_patches. row_moments are
// those of the table's V rows; null: computed as they are met, better for few ids. Equal bits.
template <class T>
void embed_patches_moments(const EmbedPatchesInput<T>& in, const Moments* row_moments, double eps,
                           compute_t<T>* mean, compute_t<T>* inverse_std, int64_t begin,
                           int64_t end);

// Vectors [begin, end) of B * num_patches * R. out is (B, num_patches, R, D), bias (R, D).
template <class T>
void embed_patches(const EmbedPatchesInput<T>& in, const compute_t<T>* mean,
                   const compute_t<T>* inverse_std, const T* bias, T* out, int64_t begin,
                   int64_t end);

template <class T>
struct EmbedPatchesGrad : EmbedPatchesInput<T> {
  const T* grad;                    // (B, num_patches, R, D), contiguous
  const compute_t<T>* mean;         // (B, num_patches)
  const compute_t<T>* inverse_std;  // (B, num_patches)
};

// What of a patch's gradient is along its mean and along its normalized values.
struct PatchTerms {
  double mean;        // mean of grad * weight
  double normalized;  // mean of grad * weight * normalized
};

// Patches [begin, end) of B * num_patches.
template <class T>
void embed_patches_terms(const EmbedPatchesGrad<T>& in, PatchTerms* terms, int64_t begin,
                         int64_t end);

// Columns [begin, end) of R * D of the gradients of weight and bias: sums over all patches.
template <class T>
void embed_patches_affine(const EmbedPatchesGrad<T>& in, int64_t all_patches, T* grad_weight,
                          T* grad_bias, int64_t begin, int64_t end);

// Columns [begin, end) of D of the gradient of the table (V, D); the pad token's row gets zeros.
// offsets and order are group_by_id's of the ids (B, L).
template <class T>
void embed_patches_table(const EmbedPatchesGrad<T>& in, const PatchTerms* terms,
                         const int64_t* offsets, const int64_t* order, int64_t num_embeddings,
                         T* grad_table, int64_t begin, int64_t end);

}  // namespace mblm::cpu
