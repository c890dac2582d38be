// Glue of assemble_stage: checks, allocation, calls of the kernels.
#pragma once

#include "common.h"
#include "cpu/assemble_stage.h"
#include "cpu/sum_rows.h"
#include "cuda/assemble_stage.h"
#include "groups.h"

namespace mblm {
namespace {

void check_rotation(const Tensor& rotation, int64_t length, int64_t width) {
  check_floating("rotation", rotation);
  TORCH_CHECK_VALUE(width % 2 == 0, "rotation needs an even width, got embeddings of width ",
                    width);
  TORCH_CHECK_VALUE(rotation.dim() == 3 && rotation.size(0) >= length &&
                        rotation.size(1) == width / 2 && rotation.size(2) == 2,
                    "rotation must have shape [>= ", length, ", ", width / 2, ", 2], got ",
                    rotation.sizes());
}

OptionalTensor contiguous(const OptionalTensor& tensor, at::ScalarType type) {
  return tensor ? OptionalTensor(tensor->to(type).contiguous()) : std::nullopt;
}

}  // namespace

Tensor assemble_stage(const Tensor& start_token, const Tensor& embeddings,
                      const OptionalTensor& ids, const OptionalTensor& positions,
                      const OptionalTensor& rotation, const OptionalTensor& context,
                      int64_t /*padding_idx*/) {
  check_floating("embeddings", embeddings);
  if (ids) {
    check_ids_type(*ids);
    check_device("ids", ids, "embeddings", embeddings);
    TORCH_CHECK_VALUE(embeddings.dim() == 2,
                      "embeddings must have shape [V, D] where ids are given, got ",
                      embeddings.sizes());
  } else {
    TORCH_CHECK_VALUE(embeddings.dim() == 3, "embeddings must have shape [rows, P, D], got ",
                      embeddings.sizes());
  }
  const Tensor& rows_of = ids ? *ids : embeddings;
  const int64_t rows = rows_of.size(0), length = rows_of.size(1), width = embeddings.size(-1);
  check_like("start_token", start_token, {width}, "embeddings", embeddings);
  if (positions) {
    check_like("positions", *positions, "embeddings", embeddings);
    TORCH_CHECK_VALUE(
        positions->dim() == 2 && positions->size(0) >= length && positions->size(1) == width,
        "positions must have shape [>= ", length, ", ", width, "], got ", positions->sizes());
  }
  if (rotation) check_rotation(*rotation, length, width);
  check_device("rotation", rotation, "embeddings", embeddings);
  if (context) check_like("context", *context, {rows, length, width}, "embeddings", embeddings);
  const c10::DeviceGuard device(embeddings.device());
  const OptionalTensor ids_in = contiguous(ids, at::kLong);
  if (ids) check_ids_range(*ids_in, embeddings.size(0));

  const at::ScalarType type = kernel_type(embeddings.scalar_type());
  const Tensor start_in = start_token.to(type).contiguous();
  const Tensor embeddings_in = with_unit_stride(embeddings.to(type));
  const OptionalTensor positions_in = contiguous(positions, type);
  const OptionalTensor rotation_in = contiguous(rotation, compute_type(type));
  OptionalTensor context_in;
  if (context) context_in = with_unit_stride(context->to(type));

  Tensor out = make::empty({rows, 1 + length, width}, start_in.options());
  dispatch(type, [&]<class T, class C>(T, C) {
    const cpu::AssembleStageInput<T> in = {length,
                                           width,
                                           data<T>(start_in),
                                           data<T>(embeddings_in),
                                           embeddings_in.stride(0),
                                           ids ? 0 : embeddings_in.stride(1),
                                           data<int64_t>(ids_in),
                                           data<T>(positions_in),
                                           data<C>(rotation_in),
                                           data<T>(context_in),
                                           context ? context_in->stride(0) : 0,
                                           context ? context_in->stride(1) : 0};
    T* to = mutable_data<T>(out);
    run(
        out,
        [&](auto stream) { return cuda::assemble_stage(in, rows, embeddings.size(0), to, stream); },
        rows * (1 + length), width,
        [&](int64_t begin, int64_t end) { cpu::assemble_stage(in, to, begin, end); });
  });
  return out.to(embeddings.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> assemble_stage_backward(
    const Tensor& grad, const OptionalTensor& ids, const OptionalTensor& rotation,
    int64_t num_embeddings, int64_t num_positions, int64_t padding_idx) {
  check_floating("grad", grad);
  TORCH_CHECK_VALUE(grad.dim() == 3 && grad.size(1) >= 1,
                    "grad must have shape [rows, 1 + P, D], got ", grad.sizes());
  const int64_t rows = grad.size(0), length = grad.size(1) - 1, width = grad.size(2);
  if (ids) {
    check_ids_type(*ids);
    check_shape("ids", *ids, {rows, length});
  }
  check_device("ids", ids, "grad", grad);
  if (rotation) check_rotation(*rotation, length, width);
  check_device("rotation", rotation, "grad", grad);
  TORCH_CHECK_VALUE(num_positions >= 0, "num_positions must not be negative, got ", num_positions);
  TORCH_CHECK_VALUE(!ids || num_embeddings >= 0, "num_embeddings must not be negative, got ",
                    num_embeddings);
  const c10::DeviceGuard device(grad.device());
  const OptionalTensor ids_in = contiguous(ids, at::kLong);
  if (ids) check_ids_range(*ids_in, num_embeddings);

  const at::ScalarType type = kernel_type(grad.scalar_type());
  const Tensor grad_in = grad.to(type).contiguous();
  const OptionalTensor rotation_in = contiguous(rotation, compute_type(type));
  // The start token's gradient and the positions' that there are, one after the other.
  const int64_t used = std::min(num_positions, length);
  Tensor sums = make::empty({1 + used, width}, grad_in.options());
  Tensor grad_embeddings = make::empty({0}, grad_in.options());
  if (ids) {
    grad_embeddings = make::empty({num_embeddings, width}, grad_in.options());
  } else if (rotation) {
    grad_embeddings = make::empty({rows, length, width}, grad_in.options());
  }
  dispatch(type, [&]<class T, class C>(T, C) {
    const cpu::AssembleStageGrad<T> in = {length, width, data<T>(grad_in), data<C>(rotation_in)};
    T* to = mutable_data<T>(grad_embeddings);
    if constexpr (kCuda) {
      if (on_gpu(grad)) {
        sums = grad_in.narrow(1, 0, 1 + used).sum(0);
        if (ids) {
          const GroupsOnDevice groups(*ids_in, num_embeddings);
          Tensor scratch = groups.sums(width, grad.options().dtype(compute_type(type)));
          launch(grad.device(), [&](cuda::Stream stream) {
            return cuda::assemble_stage_table(in, groups.groups(), padding_idx,
                                              mutable_data<C>(scratch), to, stream);
          });
        } else if (rotation) {
          launch(grad.device(), [&](cuda::Stream stream) {
            return cuda::assemble_stage_unrotate(in, rows, to, stream);
          });
        }
        return;
      }
    }
    T* to_sums = mutable_data<T>(sums);
    parallel_columns((1 + used) * width, rows, [&](int64_t begin, int64_t end) {
      cpu::sum_rows<T>(in.grad, rows, (1 + length) * width, to_sums, begin, end);
    });
    if (ids) {
      const GroupedIds groups(*ids_in, num_embeddings);
      parallel_columns(width, rows * length + num_embeddings, [&](int64_t begin, int64_t end) {
        cpu::assemble_stage_table(in, groups.offsets.data(), groups.order.data(), num_embeddings,
                                  padding_idx, to, begin, end);
      });
    } else if (rotation) {
      parallel(rows * length, width, [&](int64_t begin, int64_t end) {
        cpu::assemble_stage_unrotate(in, to, begin, end);
      });
    }
  });
  Tensor grad_positions = make::zeros({num_positions, width}, grad.options());
  grad_positions.narrow(0, 0, used).copy_(sums.narrow(0, 1, used));
  return {sums.select(0, 0).to(grad.scalar_type(), /*non_blocking=*/false, /*copy=*/true),
          grad_embeddings.to(grad.scalar_type()), grad_positions};
}

}  // namespace mblm
