// Patches of token ids embedded and normalized on a GPU: the mathematics and the inputs are those
// of cpu/embed_patches.h. An id outside [0, num_embeddings) gives NaNs in its patch, and no
// gradient to the table.
#pragma once

#include "cpu/embed_patches.h"
#include "cuda/groups.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// out is (B, num_patches, R, D), mean and inverse_std are (B, num_patches), bias is (R, D);
// row_moments is scratch, (num_embeddings).
template <class T>
Error embed_patches(const cpu::EmbedPatchesInput<T>& in, int64_t all_patches,
                    int64_t num_embeddings, const T* bias, double eps, cpu::Moments* row_moments,
                    cpu::compute_t<T>* mean, cpu::compute_t<T>* inverse_std, T* out, Stream stream);

// In how many parts the gradients of weight and bias are given for so many patches.
int64_t embed_patches_parts(int64_t all_patches);

// grad_table is (V, D). The sums of grad_weight_bias (parts, 2, R * D) over its parts are the
// gradients of weight and bias. groups are of the ids (B, L); terms, (all_patches), and sums,
// (groups.max_pieces(), D), are scratch.
template <class T>
Error embed_patches_backward(const cpu::EmbedPatchesGrad<T>& in, int64_t all_patches,
                             const Groups& groups, cpu::PatchTerms* terms, cpu::compute_t<T>* sums,
                             T* grad_table, cpu::compute_t<T>* grad_weight_bias, Stream stream);

}  // namespace mblm::cuda
