// Tests of attention in decoding on a GPU, emulated, against sums in double.
#include "cuda_check.h"
// The emulation comes before the sources.
#include <algorithm>
#include <cmath>

#include "cuda/decode_attention.cu"
#include "cuda/decode_product.cu"
#include "cuda/decode_product_mma.cu"
#include "models.h"

using namespace mblm;
using test::Store;

// Largest difference relative to the largest value.
double relative_error(const float* got, const float* expected, int64_t size) {
  double error = 0, largest = 1e-3;
  for (int64_t i = 0; i < size; ++i) {
    if (!std::isfinite(got[i])) return INFINITY;
    error = std::max(error, std::fabs(double(got[i]) - expected[i]));
    largest = std::max(largest, std::fabs(double(expected[i])));
  }
  return error / largest;
}

// Attention to caches of several parts, against sums in double; a row alone has the same bits,
// however much room there is.
void attends_to_a_long_cache() {
  Store store;
  const int64_t heads = 2, dim = 40;
  const std::vector<int64_t> positions = {75, 63, 64, 4500, 190, -1};
  const int64_t rows = int64_t(positions.size()), capacity = 4600, width = heads * dim;
  cuda::CachedAttention in;
  in.rows = rows;
  in.heads = heads;
  in.head_dim = dim;
  in.positions = positions.data();
  in.limit = in.capacity = capacity;
  in.q = store.vector(rows * width);
  in.kv = store.vector(rows * 2 * width);
  in.keys = store.vector(rows * width * capacity, 3);
  in.values = store.vector(rows * width * capacity);
  const auto attend = [&] {
    auto out = test::unwritten<float>(in.rows * width);
    std::vector<float> partial(cuda::size_of_partial(in.rows * heads, dim, in.limit), NAN);
    std::vector<uint32_t> tickets(in.rows * heads);
    in.out = out.data();
    in.partial = partial.data();
    in.tickets = tickets.data();
    CHECK(!cuda::attend(in, nullptr));
    CHECK(std::count(tickets.begin(), tickets.end(), 0u) == in.rows * heads);
    return std::tuple(out);
  };
  const auto [out] = test::in_both_orders(attend);
  for (int64_t item = 0; item < rows * heads; ++item) {
    const int64_t row = item / heads, head = item % heads, position = positions[row];
    const float *keys = in.keys + item * capacity * dim,
                *values = in.values + item * capacity * dim;
    if (position < 0) {
      CHECK(out[item * dim] == 7.0f);
      continue;
    }
    const float* own = in.kv + (row * 2 * heads + head) * dim;
    CHECK(std::equal(own, own + dim, keys + position * dim));
    CHECK(std::equal(own + width, own + width + dim, values + position * dim));
    std::vector<double> sums(dim);
    double total = 0;
    for (int64_t at = 0; at <= position; ++at) {
      double score = 0;
      for (int64_t c = 0; c < dim; ++c) score += double(in.q[item * dim + c]) * keys[at * dim + c];
      const double weight = std::exp(score / std::sqrt(double(dim)));
      total += weight;
      for (int64_t c = 0; c < dim; ++c) sums[c] += weight * values[at * dim + c];
    }
    for (int64_t c = 0; c < dim; ++c) CHECK(test::close(out[item * dim + c], sums[c] / total));
  }
  in.rows = 1;
  in.limit = 80;
  const auto [alone] = attend();
  CHECK(std::equal(alone.begin(), alone.end(), out.begin()));
}

// The output product of a few rows computes attention to short caches, as its own kernel would.
void a_product_attends_for_itself(test::WeightType type, const std::vector<int64_t>& positions) {
  Store store(type);
  const int64_t heads = 11, dim = 40, width = heads * dim, capacity = 9, outputs = 21;
  const int64_t rows = int64_t(positions.size()), size = rows * width;
  cuda::CachedAttention attention;
  attention.rows = rows;
  attention.heads = heads;
  attention.head_dim = dim;
  attention.positions = positions.data();
  attention.limit = attention.capacity = capacity;
  attention.q = store.vector(size, 3);
  attention.kv = store.vector(2 * size, 3);
  attention.cos = store.vector(capacity * dim / 2);
  attention.sin = store.vector(capacity * dim / 2);
  const float *keys = store.vector(size * capacity), *values = store.vector(size * capacity);
  cuda::Product out;
  out.rows = rows;
  out.positions = positions.data();
  out.x_stride = width;
  out.matrix = store.matrix(outputs, width);
  CHECK(cuda::attends(out, attention));
  const auto run = [&](bool is_fused) {
    std::vector<float> k(keys, keys + size * capacity), v(values, values + size * capacity);
    std::vector<float> attended(size), result(rows * outputs, 7.0f);
    attention.keys = k.data();
    attention.values = v.data();
    attention.out = attended.data();
    out.x = is_fused ? nullptr : attended.data();
    out.attention = is_fused ? attention : cuda::CachedAttention();
    out.out = result.data();
    if (!is_fused) CHECK(!cuda::attend(attention, nullptr));
    CHECK(!cuda::multiply(out, nullptr));
    return std::tuple(k, v, result);
  };
  const auto [k, v, expected] = run(false);
  const auto fused = test::in_both_orders([&] { return run(true); });
  CHECK(std::get<0>(fused) == k && std::get<1>(fused) == v);
  CHECK(relative_error(std::get<2>(fused).data(), expected.data(), rows * outputs) < 1e-5);
  attention.limit = cuda::kShortCache + 1;
  CHECK(!cuda::attends(out, attention));
  attention.limit = capacity;
  attention.heads = 65 / rows + 1;  // more than warps of a cluster
  CHECK(!cuda::attends(out, attention));
  attention.heads = 1;
  out.rows = 5;  // more than a cluster reads the caches of
  CHECK(!cuda::attends(out, attention));
}

// As on the CPU, a position whose score overflows has no weight, wherever it lies.
void positions_of_infinitely_low_scores_have_no_weight() {
  const int64_t position = 70, capacity = 80, dim = 2;
  const std::vector<float> q(dim, 1), kv = {0, 0, 3, 5};
  std::vector<float> keys(capacity * dim, -INFINITY), values(capacity * dim, 1), out(dim);
  std::vector<float> partial(cuda::size_of_partial(1, dim, capacity), NAN);
  std::vector<uint32_t> tickets(1);
  keys[66 * dim] = keys[66 * dim + 1] = 0;
  cuda::CachedAttention in;
  in.rows = in.heads = 1;
  in.head_dim = dim;
  in.positions = &position;
  in.limit = in.capacity = capacity;
  in.q = q.data();
  in.kv = kv.data();
  in.keys = keys.data();
  in.values = values.data();
  in.out = out.data();
  in.partial = partial.data();
  in.tickets = tickets.data();
  CHECK(!cuda::attend(in, nullptr));
  CHECK(test::close(out[0], 2) && test::close(out[1], 3));
}

void no_position_beyond_the_cache_is_written() {
  Store store;
  const int64_t positions[] = {4, -1};
  cuda::CachedAttention in;
  in.rows = 2;
  in.heads = 1;
  in.head_dim = 8;
  in.positions = positions;
  in.limit = in.capacity = 4;
  in.q = store.vector(16);
  in.kv = store.vector(32);
  std::vector<float> keys(64, 7.0f), values = keys, out(16, 7.0f);
  in.keys = keys.data();
  in.values = values.data();
  in.out = out.data();
  CHECK(!cuda::attend(in, nullptr));
  for (const auto* untouched : {&keys, &values, &out}) {
    for (const float value : *untouched) CHECK(value == 7.0f);
  }
}

int main() {
  attends_to_a_long_cache();
  positions_of_infinitely_low_scores_have_no_weight();
  for (const auto type : {test::WeightType::kBFloat16, test::WeightType::kInt8}) {
    for (const int64_t position : {0, 3, 8, -1}) a_product_attends_for_itself(type, {position});
    a_product_attends_for_itself(type, {3, -1});
    a_product_attends_for_itself(type, {8, 0, -1, 5});
  }
  no_position_beyond_the_cache_is_written();
  return test::result();
}
