// Patches of token ids embedded and normalized: see embed_patches.h.
#include <algorithm>

#include "cuda/embed_patches.h"
#include "cuda/groups.cuh"
#include "cuda/kernel.cuh"

namespace mblm::cuda {
namespace {

using cpu::EmbedPatchesGrad;
using cpu::EmbedPatchesInput;
using cpu::Moments;
using cpu::PatchTerms;

// The id at position r of patch i of B * num_patches.
template <class T>
MBLM_DEVICE int64_t id_at(const EmbedPatchesInput<T>& in, int64_t i, int64_t r) {
  const int64_t row = quotient(i, in.num_patches);
  const int64_t l = (i - row * in.num_patches) * in.patch_size + r;
  return l < in.length ? in.ids[row * in.length + l] : in.pad_token_id;
}

// Moments of the table's rows, one warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    moments_of_rows(EmbedPatchesInput<T> in, int64_t num_embeddings, Moments* moments) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t v = first_item_of_warp(); v < num_embeddings; v += warp_stride()) {
    const T* vector = in.table + v * in.width;
    double sum = 0, squares = 0;
    for (int64_t c = lane; c < in.width; c += kWarp) sum += double(value_of(vector[c]));
    const double mean = warp_sum(sum) / double(in.width);
    for (int64_t c = lane; c < in.width; c += kWarp) {
      const double deviation = double(value_of(vector[c])) - mean;
      squares += deviation * deviation;
    }
    squares = warp_sum(squares);
    if (lane == 0) moments[v] = {mean, squares};
  }
}

// Moments of patches from those of the rows they hold, one warp a patch.
template <class T>
__global__ void __launch_bounds__(kThreads)
    moments_of_patches(EmbedPatchesInput<T> in, int64_t all_patches, int64_t num_embeddings,
                       const Moments* rows, double eps, compute_t<T>* mean,
                       compute_t<T>* inverse_std) {
  using C = compute_t<T>;
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = first_item_of_warp(); i < all_patches; i += warp_stride()) {
    double sum = 0, squares = 0;
    for (int64_t r = lane; r < in.patch_size; r += kWarp) {
      const int64_t id = id_at(in, i, r);
      sum += id < 0 || id >= num_embeddings ? double(NAN) : rows[id].mean;
    }
    const double center = warp_sum(sum) / double(in.patch_size);
    for (int64_t r = lane; r < in.patch_size; r += kWarp) {
      const int64_t id = id_at(in, i, r);
      if (id < 0 || id >= num_embeddings) continue;
      const double deviation = rows[id].mean - center;
      squares += rows[id].squares + deviation * deviation * double(in.width);
    }
    squares = warp_sum(squares);
    if (lane == 0) {
      mean[i] = C(center);
      inverse_std[i] = C(1 / sqrt(squares / double(in.patch_size * in.width) + eps));
    }
  }
}

// A thread normalizes N channels of a vector.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    normalize(EmbedPatchesInput<T> in, int64_t all_patches, int64_t num_embeddings,
              const compute_t<T>* mean, const compute_t<T>* inverse_std, const T* bias, T* out) {
  const int64_t packs = in.width / N, items = all_patches * in.patch_size * packs;
  for (int64_t item = first_item(); item < items; item += item_stride()) {
    const int64_t vector = quotient(item, packs), first = (item - vector * packs) * N;
    const int64_t patch = quotient(vector, in.patch_size), r = vector - patch * in.patch_size;
    const int64_t id = id_at(in, patch, r);
    // The mean of a patch with an id outside is NaN: any row will do.
    const T* from = in.table + (id < 0 || id >= num_embeddings ? 0 : id) * in.width;
    const Pack<T, N> x = load_pack<N>(from + first);
    const Pack<T, N> w = load_pack<N>(in.weight + r * in.width + first);
    const Pack<T, N> b = load_pack<N>(bias + r * in.width + first);
    Pack<T, N> result;
    for (int k = 0; k < N; ++k) {
      result.values[k] = rounded<T>((value_of(x.values[k]) - mean[patch]) * inverse_std[patch] *
                                        value_of(w.values[k]) +
                                    value_of(b.values[k]));
    }
    store_pack(out + vector * in.width + first, result);
  }
}

// Whether the id of a forward pass was in the table: elsewhere its patch's mean is NaN.
template <class C>
MBLM_DEVICE bool is_valid(C mean) {
  return !(mean != mean);
}

// What of each patch's gradient is along its mean and its normalized values, one warp a patch.
template <class T>
__global__ void __launch_bounds__(kThreads)
    terms_of_patches(EmbedPatchesGrad<T> in, int64_t all_patches, PatchTerms* terms) {
  using C = compute_t<T>;
  const int64_t patch_width = in.patch_size * in.width;
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = first_item_of_warp(); i < all_patches; i += warp_stride()) {
    C scaled = 0, along = 0;  // sums of grad * weight and grad * weight * (value - mean)
    const C center = in.mean[i];
    const int64_t end = is_valid(center) ? patch_width : 0;
    for (int64_t c = lane; c < end; c += kWarp) {
      const int64_t r = quotient(c, in.width);
      const T value = in.table[id_at(in, i, r) * in.width + c - r * in.width];
      const C product = value_of(in.grad[i * patch_width + c]) * value_of(in.weight[c]);
      scaled += product;
      along += product * (value_of(value) - center);
    }
    scaled = warp_sum(scaled);
    along = warp_sum(along);
    if (lane == 0) {
      terms[i] = {double(scaled) / double(patch_width),
                  double(along) * double(in.inverse_std[i]) / double(patch_width)};
    }
  }
}

// The gradients of weight and bias: a thread takes a column in one part of the patches.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    affine(EmbedPatchesGrad<T> in, int64_t all_patches, int64_t parts,
           compute_t<T>* grad_weight_bias) {
  using C = compute_t<T>;
  const int64_t patch_width = in.patch_size * in.width;
  const int64_t each = (all_patches + parts - 1) / parts;
  for (int64_t item = first_item(); item < parts * patch_width; item += item_stride()) {
    const int64_t part = quotient(item, patch_width), c = item - part * patch_width;
    const int64_t r = quotient(c, in.width), column = c - r * in.width;
    const int64_t stop = (part + 1) * each, end = stop < all_patches ? stop : all_patches;
    C weight_sum = 0, bias_sum = 0;
    MBLM_UNROLL
    for (int64_t i = part * each; i < end; ++i) {
      const C g = value_of(in.grad[i * patch_width + c]), center = in.mean[i];
      const int64_t id = is_valid(center) ? id_at(in, i, r) : 0;
      bias_sum += g;
      weight_sum += g * ((value_of(in.table[id * in.width + column]) - center) * in.inverse_std[i]);
    }
    C* to = grad_weight_bias + part * 2 * patch_width;
    to[c] = weight_sum;
    to[patch_width + c] = bias_sum;
  }
}

// The gradient of the vector e at position r of a patch:
//   inverse_std * (grad * weight - mean_term - (e - mean) * inverse_std * normalized_term).
template <class T>
struct TableTerms {
  EmbedPatchesGrad<T> in;
  const PatchTerms* terms;

  template <int N>
  MBLM_DEVICE void add(int64_t id, int64_t i, int64_t first, compute_t<T>* sums) const {
    using C = compute_t<T>;
    const int64_t row = quotient(i, in.length), l = i - row * in.length;
    const int64_t in_row = quotient(l, in.patch_size), r = l - in_row * in.patch_size;
    const int64_t patch = row * in.num_patches + in_row;
    const C scale = in.inverse_std[patch], center = in.mean[patch];
    const C along_mean = C(terms[patch].mean), along = C(terms[patch].normalized);
    const Pack<T, N> x = load_pack<N>(in.table + id * in.width + first);
    const Pack<T, N> w = load_pack<N>(in.weight + r * in.width + first);
    const Pack<T, N> g = load_pack<N>(in.grad + (patch * in.patch_size + r) * in.width + first);
    for (int k = 0; k < N; ++k) {
      const C normalized = (value_of(x.values[k]) - center) * scale;
      const C scaled = value_of(g.values[k]) * value_of(w.values[k]);
      sums[k] += scale * (scaled - along_mean - normalized * along);
    }
  }
};

}  // namespace

template <class T>
Error embed_patches(const EmbedPatchesInput<T>& in, int64_t all_patches, int64_t num_embeddings,
                    const T* bias, double eps, Moments* row_moments, compute_t<T>* mean,
                    compute_t<T>* inverse_std, T* out, Stream stream) {
  constexpr int N = kPackSize<T>;
  const bool packed = in.width % N == 0 && is_aligned(in.table) && is_aligned(in.weight) &&
                      is_aligned(bias) && is_aligned(out);
  const int64_t items = all_patches * in.patch_size * in.width / (packed ? N : 1);
  return first_error(
      {launch(moments_of_rows<T>, divide_up(num_embeddings, kWarps), kThreads, 0, stream, in,
              num_embeddings, row_moments),
       launch(moments_of_patches<T>, divide_up(all_patches, kWarps), kThreads, 0, stream, in,
              all_patches, num_embeddings, row_moments, eps, mean, inverse_std),
       launch(packed ? normalize<T, N> : normalize<T, 1>, divide_up(items, kThreads), kThreads, 0,
              stream, in, all_patches, num_embeddings, mean, inverse_std, bias, out)});
}

int64_t embed_patches_parts(int64_t all_patches) {
  constexpr int64_t kPatchesPerPart = 32, kMaxParts = 512;
  return std::min(divide_up(all_patches, kPatchesPerPart), kMaxParts);
}

template <class T>
Error embed_patches_backward(const EmbedPatchesGrad<T>& in, int64_t all_patches,
                             const Groups& groups, PatchTerms* terms, compute_t<T>* sums,
                             T* grad_table, compute_t<T>* grad_weight_bias, Stream stream) {
  const int64_t parts = embed_patches_parts(all_patches);
  const bool packed = in.width % kPackSize<T> == 0 && is_aligned(in.table) &&
                      is_aligned(in.weight) && is_aligned(in.grad) && is_aligned(sums);
  return first_error({launch(terms_of_patches<T>, divide_up(all_patches, kWarps), kThreads, 0,
                             stream, in, all_patches, terms),
                      launch(affine<T>, divide_up(parts * in.patch_size * in.width, kThreads),
                             kThreads, 0, stream, in, all_patches, parts, grad_weight_bias),
                      sum_groups(groups, in.width, in.pad_token_id, packed,
                                 TableTerms<T>{in, terms}, sums, grad_table, stream)});
}

MBLM_INSTANTIATE(embed_patches)
MBLM_INSTANTIATE(embed_patches_backward)

}  // namespace mblm::cuda
