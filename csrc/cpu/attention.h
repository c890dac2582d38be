// The sums of attention in decoding: a query's products with keys, their softmax, and values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/lanes.h"
#include "cpu/vector_math.h"

namespace mblm::cpu {

// query . key for the whole lanes of dim, to be summed over lanes.
MBLM_INLINE FloatLanes multiply_key(const float* query, const float* key, int64_t dim) {
  constexpr int64_t kWidth = kLaneCount<float>;
  FloatLanes even{}, odd{};
  int64_t c = 0;
  for (; c + 2 * kWidth <= dim; c += 2 * kWidth) {
    even += load(query + c) * load(key + c);
    odd += load(query + c + kWidth) * load(key + c + kWidth);
  }
  for (; c + kWidth <= dim; c += kWidth) even += load(query + c) * load(key + c);
  return even + odd;
}

// query . key for what whole lanes leave over.
MBLM_INLINE float multiply_rest(const float* query, const float* key, int64_t dim) {
  float rest = 0;
  for (int64_t c = dim / kLaneCount<float> * kLaneCount<float>; c < dim; ++c) {
    rest += query[c] * key[c];
  }
  return rest;
}

// scores[i] = scale * query . keys[i], for keys (count, dim).
MBLM_INLINE void multiply_keys(const float* query, const float* keys, int64_t count, int64_t dim,
                               float scale, float* scores) {
  constexpr int64_t kWidth = kLaneCount<float>;
  int64_t i = 0;
  // Eight sums over lanes at once take fewer instructions than the products they are of.
  for (; i + kWidth <= count; i += kWidth) {
    FloatLanes products[kWidth], rest{};
    for (int64_t k = 0; k < kWidth; ++k) {
      products[k] = multiply_key(query, keys + (i + k) * dim, dim);
      rest[k] = multiply_rest(query, keys + (i + k) * dim, dim);
    }
    store(scores + i, FloatLanes((sums(products) + rest) * scale));
  }
  for (; i < count; ++i) {
    const float* key = keys + i * dim;
    scores[i] = (sum(multiply_key(query, key, dim)) + multiply_rest(query, key, dim)) * scale;
  }
}

// scores = exp(scores - their highest); returns one over their sum.
MBLM_INLINE float exponentials(float* scores, int64_t count) {
  constexpr int64_t kWidth = kLaneCount<float>;
  FloatLanes lanes = FloatLanes{} - INFINITY;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const FloatLanes here = load(scores + i);
    lanes = here > lanes ? here : lanes;
  }
  float highest = -INFINITY;
  for (; i < count; ++i) highest = std::max(highest, scores[i]);
  for (int64_t lane = 0; lane < kWidth; ++lane) highest = std::max(highest, lanes[lane]);
  for (i = 0; i < count; ++i) scores[i] = vector_exp(scores[i] - highest);
  return float(
      1 / sum_in_lanes(count, [&](int64_t at) MBLM_INLINE_LAMBDA { return double(scores[at]); }));
}

// add_values for 8 kParts columns, which begin at the pointers.
template <int64_t kParts>
MBLM_INLINE void add_columns(const float* weights, const float* values, int64_t count, int64_t dim,
                             float* out) {
  constexpr int64_t kWidth = kLaneCount<float>;
  FloatLanes sums[kParts];
  for (int64_t k = 0; k < kParts; ++k) sums[k] = load(out + k * kWidth);
  for (int64_t i = 0; i < count; ++i, values += dim) {
    for (int64_t k = 0; k < kParts; ++k) sums[k] += weights[i] * load(values + k * kWidth);
  }
  for (int64_t k = 0; k < kParts; ++k) store(out + k * kWidth, sums[k]);
}

// out += the sum of weights[i] * values[i], for values (count, dim), in their order.
MBLM_INLINE void add_values(const float* weights, const float* values, int64_t count, int64_t dim,
                            float* out) {
  constexpr int64_t kWidth = kLaneCount<float>;
  int64_t c = 0;
  for (; c + 4 * kWidth <= dim; c += 4 * kWidth) {
    add_columns<4>(weights, values + c, count, dim, out + c);
  }
  for (; c + kWidth <= dim; c += kWidth) {
    add_columns<1>(weights, values + c, count, dim, out + c);
  }
  for (; c < dim; ++c) {
    float sum = out[c];
    for (int64_t i = 0; i < count; ++i) sum += weights[i] * values[i * dim + c];
    out[c] = sum;
  }
}

}  // namespace mblm::cpu
