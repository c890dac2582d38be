// What the operators' glue shares: checks in the references' words, dtypes, data pointers, threads,
// and where a GPU's kernels are compiled in, launching them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/bfloat16.h"
#include "cpu/ids.h"
#include "cuda/stream.h"
#include "tensors.h"

#if defined(MBLM_CUDA) && !defined(MBLM_CUDA_EMULATED)
// Of torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h), which spares the glue
// CUDA's headers.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace mblm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef MBLM_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

// Whether a tensor is for the CUDA kernels: in a build that emulates them, every one is.
inline bool on_gpu(const at::Tensor& tensor) {
#ifdef MBLM_CUDA_EMULATED
  return tensor.is_cpu();
#else
  return tensor.is_cuda();
#endif
}

// Calls launcher(stream) with the current stream of a GPU and throws the error that it returns.
// Only where `if constexpr (kCuda)` holds: elsewhere there is no launcher to link.
template <class Launcher>
void launch([[maybe_unused]] const c10::Device& device, Launcher launcher) {
  cuda::Stream stream = nullptr;
#if defined(MBLM_CUDA) && !defined(MBLM_CUDA_EMULATED)
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream) == 0,
              "no CUDA stream on ", device);
#endif
  const cuda::Error error = launcher(stream);
  TORCH_CHECK(!error, "a CUDA kernel could not be launched on ", device, ": ", error);
}

inline void check_device(const char* name, const at::Tensor& tensor, const char* other_name,
                         const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), name, " must be on the device of ",
                    other_name, ", ", other.device(), ", got ", tensor.device());
}

inline void check_device(const char* name, const std::optional<at::Tensor>& tensor,
                         const char* other_name, const at::Tensor& other) {
  if (tensor) check_device(name, *tensor, other_name, other);
}

inline void check_floating(const char* name, const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, name,
      " must be float16, bfloat16, float32 or float64, got ", type);
}

inline void check_type(const char* name, const at::Tensor& tensor, at::ScalarType type) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, ", got ",
                   tensor.scalar_type());
}

inline void check_like(const char* name, const at::Tensor& tensor, const char* other_name,
                       const at::Tensor& other) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), name, " must have the dtype of ",
                   other_name, ", ", other.scalar_type(), ", got ", tensor.scalar_type());
  check_device(name, tensor, other_name, other);
}

inline void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ",
                    tensor.sizes());
}

// The same in one, of a tensor that is to have so many elements of that type on another's device.
inline void check_tensor(const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                         at::ScalarType type, const char* other_name, const at::Tensor& other) {
  check_shape(name, tensor, shape);
  check_type(name, tensor, type);
  check_device(name, tensor, other_name, other);
}

inline void check_like(const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                       const char* other_name, const at::Tensor& other) {
  check_shape(name, tensor, shape);
  check_like(name, tensor, other_name, other);
}

inline void check_count(const char* name, size_t got, size_t expected) {
  TORCH_CHECK_VALUE(got == expected, name, " must have ", expected, " items, got ", got);
}

inline void check_ids_type(const at::Tensor& ids) {
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong, "ids must be int64, got ", ids.scalar_type());
  TORCH_CHECK_VALUE(ids.dim() == 2, "ids must have two dimensions, got ", ids.sizes());
}

// ids are contiguous. On a GPU nobody waits for what they are: the kernels give NaNs for those
// outside.
inline void check_ids_range(const at::Tensor& ids, int64_t num_embeddings) {
  if (on_gpu(ids)) return;
  const int64_t* data = ids.const_data_ptr<int64_t>();
  const int64_t index = cpu::first_id_outside(data, ids.numel(), num_embeddings);
  TORCH_CHECK_VALUE(index < 0, "ids must lie in [0, ", num_embeddings, "), got ", data[index],
                    " at index ", index);
}

// The positions of contiguous ids grouped by id: see cpu/ids.h.
struct GroupedIds {
  std::vector<int64_t> offsets, order;

  GroupedIds(const at::Tensor& ids, int64_t num_ids) : offsets(num_ids + 1), order(ids.numel()) {
    cpu::group_by_id(ids.const_data_ptr<int64_t>(), ids.numel(), num_ids, offsets.data(),
                     order.data());
  }
};

// What the kernels compute results of this type in.
inline at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// The type of the kernel that computes results of this type: float16 is cast to float32 and back.
inline at::ScalarType kernel_type(at::ScalarType type) {
  return type == at::kHalf ? at::kFloat : type;
}

// Calls function(T(), C()) with the kernels' element type and the type that they compute in.
template <class Function>
void dispatch(at::ScalarType type, Function function) {
  switch (type) {
    case at::kFloat:
      return function(float(), float());
    case at::kDouble:
      return function(double(), double());
    case at::kBFloat16:
      return function(cpu::BFloat16(), float());
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for ", type);
  }
}

template <class T>
const T* data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const std::optional<at::Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The tensor, copied only if its last dimension is not contiguous.
inline at::Tensor with_unit_stride(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// How many parts of a size it takes, without a sum that may not fit.
inline int64_t divide_up(int64_t value, int64_t by) {
  return value / by + (value % by != 0);
}

// Calls function(begin, end) from several threads for ranges of [0, items); an item's work is
// given as the number of values it touches.
template <class Function>
void parallel(int64_t items, int64_t values_per_item, Function function) {
  constexpr int64_t kValuesPerThread = 16384;
  const int64_t grain =
      std::max<int64_t>(kValuesPerThread / std::max<int64_t>(values_per_item, 1), 1);
  at::parallel_for(0, items, grain, function);
}

// The same for columns, cut at multiples of 16 so that threads share no cache line.
template <class Function>
void parallel_columns(int64_t columns, int64_t values_per_column, Function function) {
  constexpr int64_t kCut = 16;
  parallel((columns + kCut - 1) / kCut, kCut * values_per_column, [&](int64_t begin, int64_t end) {
    function(begin * kCut, std::min(end * kCut, columns));
  });
}

// Runs a kernel where a tensor is: on_device(stream) on a GPU, which returns an error; else
// on_cpu(begin, end) as parallel() does. The former takes `auto`: it is compiled only where there
// are kernels for a GPU.
template <class OnDevice, class OnCpu>
void run(const at::Tensor& where, OnDevice on_device, int64_t items, int64_t values_per_item,
         OnCpu on_cpu) {
  if constexpr (kCuda) {
    if (on_gpu(where)) return launch(where.device(), on_device);
  }
  parallel(items, values_per_item, on_cpu);
}

}  // namespace mblm
