// The operators' kernels, for tensors on a CPU or a GPU: see mblm/ops for what they compute.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace mblm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
// Of a scan's x, steps, A, B, C, D and initial state.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// On a CPU only.
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);
bool onednn_is_faster();

Tensor assemble_stage(const Tensor& start_token, const Tensor& embeddings,
                      const OptionalTensor& ids, const OptionalTensor& positions,
                      const OptionalTensor& rotation, const OptionalTensor& context,
                      int64_t padding_idx);
std::tuple<Tensor, Tensor, Tensor> assemble_stage_backward(
    const Tensor& grad, const OptionalTensor& ids, const OptionalTensor& rotation,
    int64_t num_embeddings, int64_t num_positions, int64_t padding_idx);

std::tuple<Tensor, Tensor> causal_conv(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                       const OptionalTensor& window);
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv_backward(
    const Tensor& grad_y, const OptionalTensor& grad_next_window, const Tensor& x,
    const Tensor& weight, const Tensor& bias, const OptionalTensor& window);

std::tuple<Tensor, Tensor, Tensor> embed_patches(const Tensor& ids, const Tensor& table,
                                                 const Tensor& weight, const Tensor& bias,
                                                 int64_t num_patches, int64_t patch_size,
                                                 int64_t pad_token_id, double eps);
std::tuple<Tensor, Tensor, Tensor> embed_patches_backward(const Tensor& grad, const Tensor& ids,
                                                          const Tensor& table, const Tensor& weight,
                                                          const Tensor& mean,
                                                          const Tensor& inverse_std,
                                                          int64_t patch_size, int64_t pad_token_id);

std::tuple<Tensor, Tensor> gated_rms_norm(const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& gate, double eps);
std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward(const Tensor& grad, const Tensor& x,
                                                           const Tensor& weight,
                                                           const OptionalTensor& gate,
                                                           const Tensor& inverse_norm, double eps);

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& delta,
                                                  const Tensor& rates, const Tensor& weight_in,
                                                  const Tensor& weight_out, const Tensor& direct,
                                                  const OptionalTensor& initial_state,
                                                  int64_t chunk_size);
Gradients selective_scan_backward(const Tensor& grad_y, const Tensor& grad_final_state,
                                  const Tensor& x, const Tensor& delta, const Tensor& rates,
                                  const Tensor& weight_in, const Tensor& weight_out,
                                  const Tensor& direct, const Tensor& chunk_states,
                                  int64_t chunk_size);

std::tuple<Tensor, Tensor> shift_rms_norm(const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& previous, bool shift, double eps);
std::tuple<Tensor, Tensor, Tensor> shift_rms_norm_backward(const Tensor& grad, const Tensor& x,
                                                           const Tensor& weight,
                                                           const OptionalTensor& previous,
                                                           const Tensor& inverse_norm, bool shift,
                                                           double eps);

Tensor short_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cos,
                       const OptionalTensor& sin);
std::tuple<Tensor, Tensor, Tensor> short_attention_backward(const Tensor& grad, const Tensor& q,
                                                            const Tensor& k, const Tensor& v,
                                                            const OptionalTensor& cos,
                                                            const OptionalTensor& sin);

std::tuple<Tensor, Tensor, Tensor> ssd(const Tensor& x, const Tensor& dt, const Tensor& rates,
                                       const Tensor& weight_in, const Tensor& weight_out,
                                       const Tensor& direct, const OptionalTensor& initial_state,
                                       int64_t chunk_size);
Gradients ssd_backward(const Tensor& grad_y, const Tensor& grad_final_state, const Tensor& x,
                       const Tensor& dt, const Tensor& rates, const Tensor& weight_in,
                       const Tensor& weight_out, const Tensor& direct, const Tensor& chunk_states,
                       int64_t chunk_size);

}  // namespace mblm
