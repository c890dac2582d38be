// Patches of token ids embedded and normalized: see embed_patches.h.
#include "cpu/embed_patches.h"

#include <algorithm>

namespace mblm::cpu {

template <class T>
MBLM_INLINE Moments moments_of(const T* __restrict vector, int64_t n) {
  const double mean =
      sum_in_lanes(n, [=](int64_t c) MBLM_INLINE_LAMBDA { return double(vector[c]); }) / double(n);
  const double squares = sum_in_lanes(n, [=](int64_t c) MBLM_INLINE_LAMBDA {
    const double deviation = double(vector[c]) - mean;
    return deviation * deviation;
  });
  return {mean, squares};
}

template <class T>
MBLM_CLONES void embed_patches_row_moments(const EmbedPatchesInput<T>& in, Moments* moments,
                                           int64_t begin, int64_t end) {
  for (int64_t v = begin; v < end; ++v) moments[v] = moments_of(in.table + v * in.width, in.width);
}

template <class T>
MBLM_CLONES void embed_patches_moments(const EmbedPatchesInput<T>& in, const Moments* row_moments,
                                       double eps, compute_t<T>* mean, compute_t<T>* inverse_std,
                                       int64_t begin, int64_t end) {
  using C = compute_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    // Vectors are taken in one by one; the deviation of their means adds to the squares.
    Moments patch = {0, 0};
    for (int64_t r = 0; r < in.patch_size; ++r) {
      const int64_t id = in.id(i, r);
      const Moments vector =
          row_moments ? row_moments[id] : moments_of(in.table + id * in.width, in.width);
      const double deviation = vector.mean - patch.mean;
      patch.mean += deviation / double(r + 1);
      patch.squares += vector.squares + deviation * (vector.mean - patch.mean) * double(in.width);
    }
    const double variance = patch.squares / double(in.patch_size * in.width);
    mean[i] = C(patch.mean);
    inverse_std[i] = C(1 / std::sqrt(variance + eps));
  }
}

template <class T>
MBLM_CLONES void embed_patches(const EmbedPatchesInput<T>& in, const compute_t<T>* mean,
                               const compute_t<T>* inverse_std, const T* bias, T* out,
                               int64_t begin, int64_t end) {
  using C = compute_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t patch = i / in.patch_size, r = i % in.patch_size;
    const C center = mean[patch], scale = inverse_std[patch];
    const T* __restrict vector = in.table + in.id(patch, r) * in.width;
    const T* __restrict w = in.weight + r * in.width;
    const T* __restrict b = bias + r * in.width;
    T* __restrict to = out + i * in.width;
    for (int64_t c = 0; c < in.width; ++c) {
      to[c] = T((C(vector[c]) - center) * scale * C(w[c]) + C(b[c]));
    }
  }
}

// Where id i of (B, L) is: position r of a patch.
struct Place {
  int64_t patch, r;
};

template <class T>
MBLM_INLINE Place place_of(const EmbedPatchesGrad<T>& in, int64_t i) {
  const int64_t row = i / in.length, l = i % in.length;
  return {row * in.num_patches + l / in.patch_size, l % in.patch_size};
}

template <class T>
MBLM_INLINE const T* grad_at(const EmbedPatchesGrad<T>& in, Place place) {
  return in.grad + (place.patch * in.patch_size + place.r) * in.width;
}

template <class T>
MBLM_CLONES void embed_patches_terms(const EmbedPatchesGrad<T>& in, PatchTerms* terms,
                                     int64_t begin, int64_t end) {
  using C = compute_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const C center = in.mean[i];
    double scaled = 0, along = 0;  // sums of grad * weight and grad * weight * (value - mean)
    for (int64_t r = 0; r < in.patch_size; ++r) {
      const T* __restrict vector = in.table + in.id(i, r) * in.width;
      const T* __restrict w = in.weight + r * in.width;
      const T* __restrict grad = grad_at(in, {i, r});
      scaled += sum_in_lanes(
          in.width, [=](int64_t c) MBLM_INLINE_LAMBDA { return double(C(grad[c]) * C(w[c])); });
      along += sum_in_lanes(in.width, [=](int64_t c) MBLM_INLINE_LAMBDA {
        return double(C(grad[c]) * C(w[c])) * double(C(vector[c]) - center);
      });
    }
    const double count = double(in.patch_size * in.width);
    terms[i] = {scaled / count, along * double(in.inverse_std[i]) / count};
  }
}

// Columns [column, column + n) of position r of every patch.
template <class T>
MBLM_INLINE void affine_tile(const EmbedPatchesGrad<T>& in, int64_t all_patches, T* grad_weight,
                             T* grad_bias, int64_t r, int64_t column, int64_t n) {
  using C = compute_t<T>;
  double weight_sums[kTileColumns] = {}, bias_sums[kTileColumns] = {};
  for (int64_t i = 0; i < all_patches; ++i) {
    MBLM_NO_JAM;
    const C center = in.mean[i], scale = in.inverse_std[i];
    const T* __restrict vector = in.table + in.id(i, r) * in.width + column;
    const T* __restrict grad = grad_at(in, {i, r}) + column;
    if (i + 1 < all_patches) prefetch(grad + in.patch_size * in.width, n);
    for (int64_t c = 0; c < n; ++c) {
      const C g = C(grad[c]);
      bias_sums[c] += g;
      weight_sums[c] += g * ((C(vector[c]) - center) * scale);
    }
  }
  for (int64_t c = 0; c < n; ++c) {
    grad_weight[r * in.width + column + c] = T(weight_sums[c]);
    grad_bias[r * in.width + column + c] = T(bias_sums[c]);
  }
}

template <class T>
MBLM_CLONES void embed_patches_affine(const EmbedPatchesGrad<T>& in, int64_t all_patches,
                                      T* grad_weight, T* grad_bias, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t r = begin / in.width, column = begin % in.width;
    const int64_t n = std::min({kTileColumns, in.width - column, end - begin});
    affine_tile(in, all_patches, grad_weight, grad_bias, r, column, n);
    begin += n;
  }
}

// The gradient of a vector e at position r of a patch is
//   inverse_std * (grad * weight - mean_term - (e - mean) * inverse_std * normalized_term),
// and e is the same for all positions of an id: only grad * weight needs a sum per column.
template <class T>
MBLM_INLINE void table_tile(const EmbedPatchesGrad<T>& in, const PatchTerms* terms,
                            const int64_t* offsets, const int64_t* order, int64_t num_embeddings,
                            T* grad_table, int64_t column, int64_t n) {
  using C = compute_t<T>;
  double sums[kTileColumns];
  for (int64_t v = 0; v < num_embeddings; ++v) {
    std::fill(sums, sums + n, 0.0);
    double constant = 0, slope = 0;  // of e
    const int64_t last = v == in.pad_token_id ? offsets[v] : offsets[v + 1];
    for (int64_t k = offsets[v]; k < last; ++k) {
      MBLM_NO_JAM;
      if (k + 1 < last) prefetch(grad_at(in, place_of(in, order[k + 1])) + column, n);
      const Place place = place_of(in, order[k]);
      const C scale = in.inverse_std[place.patch];
      const double along = double(scale) * double(scale) * terms[place.patch].normalized;
      constant += double(scale) * terms[place.patch].mean - along * double(in.mean[place.patch]);
      slope += along;
      const T* __restrict w = in.weight + place.r * in.width + column;
      const T* __restrict grad = grad_at(in, place) + column;
      for (int64_t c = 0; c < n; ++c) sums[c] += scale * (C(grad[c]) * C(w[c]));
    }
    T* __restrict to = grad_table + v * in.width + column;
    if (offsets[v] == last) {  // not used: zeros, whatever the table holds
      std::fill(to, to + n, T(0.0f));
      continue;
    }
    const T* __restrict vector = in.table + v * in.width + column;
    for (int64_t c = 0; c < n; ++c) to[c] = T(sums[c] - constant - slope * double(vector[c]));
  }
}

template <class T>
MBLM_CLONES void embed_patches_table(const EmbedPatchesGrad<T>& in, const PatchTerms* terms,
                                     const int64_t* offsets, const int64_t* order,
                                     int64_t num_embeddings, T* grad_table, int64_t begin,
                                     int64_t end) {
  for (int64_t c = begin; c < end; c += kTileColumns) {
    table_tile(in, terms, offsets, order, num_embeddings, grad_table, c,
               std::min(kTileColumns, end - c));
  }
}

MBLM_INSTANTIATE(embed_patches_row_moments)
MBLM_INSTANTIATE(embed_patches_moments)
MBLM_INSTANTIATE(embed_patches)
MBLM_INSTANTIATE(embed_patches_terms)
MBLM_INSTANTIATE(embed_patches_affine)
MBLM_INSTANTIATE(embed_patches_table)

}  // namespace mblm::cpu
