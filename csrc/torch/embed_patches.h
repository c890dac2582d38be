// Glue of embed_patches: checks, allocation, calls of the kernels.
#pragma once

#include "common.h"
#include "cpu/embed_patches.h"
#include "cuda/embed_patches.h"
#include "groups.h"

namespace mblm {
namespace {

void check_sizes(const Tensor& ids, const Tensor& table, const Tensor& weight, int64_t num_patches,
                 int64_t patch_size, int64_t pad_token_id) {
  check_ids_type(ids);
  check_floating("table", table);
  check_device("ids", ids, "table", table);
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) >= 1,
                    "table must have shape [V, D] with D >= 1, got ", table.sizes());
  TORCH_CHECK_VALUE(patch_size >= 1, "patch_size must be at least 1, got ", patch_size);
  // num_patches * patch_size >= length, without the product: it may not fit an integer.
  TORCH_CHECK_VALUE(
      num_patches >= 0 && num_patches >= (ids.size(1) - 1) / patch_size + (ids.size(1) > 0),
      "num_patches * patch_size must be at least ", ids.size(1), ", the length of ids, got ",
      num_patches, " * ", patch_size);
  TORCH_CHECK_VALUE(pad_token_id >= 0 && pad_token_id < table.size(0),
                    "pad_token_id must lie in [0, ", table.size(0), "), got ", pad_token_id);
  int64_t patch_width = 0;
  TORCH_CHECK_VALUE(!__builtin_mul_overflow(patch_size, table.size(1), &patch_width),
                    "weight must have shape [patch_size * D] = [", patch_size, " * ", table.size(1),
                    "], got ", weight.sizes());
  check_like("weight", weight, {patch_width}, "table", table);
}

// The tensors as the kernel wants them: contiguous and in its dtype.
struct PatchInputs {
  at::ScalarType type;
  int64_t batch, length, num_patches, patch_size, width, num_embeddings, pad_token_id;
  Tensor ids, table, weight;

  PatchInputs(const Tensor& ids_, const Tensor& table_, const Tensor& weight_, int64_t num_patches,
              int64_t patch_size, int64_t pad_token_id)
      : type(kernel_type(table_.scalar_type())),
        batch(ids_.size(0)),
        length(ids_.size(1)),
        num_patches(num_patches),
        patch_size(patch_size),
        width(table_.size(1)),
        num_embeddings(table_.size(0)),
        pad_token_id(pad_token_id),
        ids(ids_.contiguous()),
        table(table_.to(type).contiguous()),
        weight(weight_.to(type).contiguous()) {
    check_ids_range(ids, num_embeddings);
  }

  int64_t all_patches() const { return batch * num_patches; }

  template <class T>
  cpu::EmbedPatchesInput<T> kernel_input() const {
    return {length,       num_patches,        patch_size,     width,
            pad_token_id, data<int64_t>(ids), data<T>(table), data<T>(weight)};
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> embed_patches(const Tensor& ids, const Tensor& table,
                                                 const Tensor& weight, const Tensor& bias,
                                                 int64_t num_patches, int64_t patch_size,
                                                 int64_t pad_token_id, double eps) {
  check_sizes(ids, table, weight, num_patches, patch_size, pad_token_id);
  check_like("bias", bias, {patch_size * table.size(1)}, "table", table);
  TORCH_CHECK_VALUE(eps >= 0, "eps must not be negative, got ", eps);
  const c10::DeviceGuard device(table.device());
  const PatchInputs in(ids, table, weight, num_patches, patch_size, pad_token_id);
  const Tensor bias_in = bias.to(in.type).contiguous();

  const int64_t patches = in.all_patches(), patch_width = patch_size * in.width;
  Tensor out = make::empty({in.batch, num_patches, patch_width}, in.table.options());
  const auto moment_options = in.table.options().dtype(compute_type(in.type));
  Tensor mean = make::empty({in.batch, num_patches}, moment_options);
  Tensor inverse_std = make::empty({in.batch, num_patches}, moment_options);
  dispatch(in.type, [&]<class T, class C>(T, C) {
    const auto input = in.kernel_input<T>();
    C* to_mean = mutable_data<C>(mean);
    C* to_std = mutable_data<C>(inverse_std);
    T* to = mutable_data<T>(out);
    if constexpr (kCuda) {
      if (on_gpu(table)) {
        Tensor scratch = make::empty({in.num_embeddings, 2}, out.options().dtype(at::kDouble));
        return launch(table.device(), [&](cuda::Stream stream) {
          return cuda::embed_patches(input, patches, in.num_embeddings, data<T>(bias_in), eps,
                                     mutable_data<cpu::Moments>(scratch), to_mean, to_std, to,
                                     stream);
        });
      }
    }
    std::vector<cpu::Moments> row_moments;
    if (patches * patch_size > in.num_embeddings) {
      row_moments.resize(in.num_embeddings);
      parallel(in.num_embeddings, in.width, [&](int64_t begin, int64_t end) {
        cpu::embed_patches_row_moments(input, row_moments.data(), begin, end);
      });
    }
    const cpu::Moments* rows = row_moments.empty() ? nullptr : row_moments.data();
    parallel(patches, rows ? patch_size : patch_width, [&](int64_t begin, int64_t end) {
      cpu::embed_patches_moments(input, rows, eps, to_mean, to_std, begin, end);
    });
    parallel(patches * patch_size, in.width, [&](int64_t begin, int64_t end) {
      cpu::embed_patches(input, to_mean, to_std, data<T>(bias_in), to, begin, end);
    });
  });
  return {out.to(table.scalar_type()), mean, inverse_std};
}

std::tuple<Tensor, Tensor, Tensor> embed_patches_backward(
    const Tensor& grad, const Tensor& ids, const Tensor& table, const Tensor& weight,
    const Tensor& mean, const Tensor& inverse_std, int64_t patch_size, int64_t pad_token_id) {
  TORCH_CHECK_VALUE(mean.dim() == 2, "mean must have shape [B, num_patches], got ", mean.sizes());
  check_sizes(ids, table, weight, mean.size(1), patch_size, pad_token_id);
  const int64_t patch_width = patch_size * table.size(1);
  const at::ScalarType compute = compute_type(table.scalar_type());
  check_tensor("mean", mean, {ids.size(0), mean.size(1)}, compute, "table", table);
  check_tensor("inverse_std", inverse_std, mean.sizes(), compute, "table", table);
  check_like("grad", grad, {mean.size(0), mean.size(1), patch_width}, "table", table);
  const c10::DeviceGuard device(table.device());
  const PatchInputs in(ids, table, weight, mean.size(1), patch_size, pad_token_id);
  const Tensor grad_in = grad.to(in.type).contiguous();
  const Tensor mean_in = mean.contiguous(), inverse_in = inverse_std.contiguous();
  const int64_t patches = in.all_patches();
  Tensor grad_table = make::empty({in.num_embeddings, in.width}, in.table.options());
  Tensor grad_weight = make::empty({patch_width}, in.table.options());
  Tensor grad_bias = make::empty({patch_width}, in.table.options());
  dispatch(in.type, [&]<class T, class C>(T, C) {
    const cpu::EmbedPatchesGrad<T> input = {in.kernel_input<T>(), data<T>(grad_in),
                                            data<C>(mean_in), data<C>(inverse_in)};
    T* to_table = mutable_data<T>(grad_table);
    if constexpr (kCuda) {
      if (on_gpu(table)) {
        const GroupsOnDevice groups(in.ids, in.num_embeddings);
        const auto options = in.table.options().dtype(compute_type(in.type));
        Tensor terms = make::empty({patches, 2}, options.dtype(at::kDouble));
        Tensor sums = groups.sums(in.width, options);
        Tensor parts = make::empty({cuda::embed_patches_parts(patches), 2, patch_width}, options);
        launch(table.device(), [&](cuda::Stream stream) {
          return cuda::embed_patches_backward(
              input, patches, groups.groups(), mutable_data<cpu::PatchTerms>(terms),
              mutable_data<C>(sums), to_table, mutable_data<C>(parts), stream);
        });
        const Tensor weight_bias = parts.sum(0).to(in.type);
        grad_weight = weight_bias[0].clone();
        grad_bias = weight_bias[1].clone();
        return;
      }
    }
    std::vector<cpu::PatchTerms> terms(patches);
    parallel(patches, patch_width, [&](int64_t begin, int64_t end) {
      cpu::embed_patches_terms(input, terms.data(), begin, end);
    });
    T* to_weight = mutable_data<T>(grad_weight);
    T* to_bias = mutable_data<T>(grad_bias);
    parallel_columns(patch_width, patches, [&](int64_t begin, int64_t end) {
      cpu::embed_patches_affine(input, patches, to_weight, to_bias, begin, end);
    });
    const GroupedIds groups(in.ids, in.num_embeddings);
    parallel_columns(in.width, in.ids.numel() + in.num_embeddings, [&](int64_t begin, int64_t end) {
      cpu::embed_patches_table(input, terms.data(), groups.offsets.data(), groups.order.data(),
                               in.num_embeddings, to_table, begin, end);
    });
  });
  return {grad_table.to(table.scalar_type()), grad_weight.to(weight.scalar_type()),
          grad_bias.to(weight.scalar_type())};
}

}  // namespace mblm
