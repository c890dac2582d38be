// Tests of the emulated CUDA kernels of embed_patches against those of the CPU.
#include "cuda_check.h"
#include "cuda_groups.h"
// The emulation comes before the sources.
#include "cuda/embed_patches.cu"

using namespace mblm;

constexpr int64_t kIds = 9, kPad = 4;
constexpr double kEps = 1e-5;

template <class T>
void equals_cpu(int64_t batch, int64_t length, int64_t num_patches, int64_t patch_size,
                int64_t width) {
  using C = cpu::compute_t<T>;
  test::Numbers numbers;
  const int64_t patches = batch * num_patches, patch_width = patch_size * width;
  const auto ids = numbers.ids(batch * length, kIds);
  const auto table = numbers.vector<T>(kIds * width), weight = numbers.vector<T>(patch_width);
  const auto bias = numbers.vector<T>(patch_width);
  const cpu::EmbedPatchesInput<T> in = {length, num_patches, patch_size,   width,
                                        kPad,   ids.data(),  table.data(), weight.data()};
  std::vector<C> mean(patches), inverse_std(patches);
  std::vector<T> out(patches * patch_width);
  cpu::embed_patches_moments(in, nullptr, kEps, mean.data(), inverse_std.data(), 0, patches);
  cpu::embed_patches(in, mean.data(), inverse_std.data(), bias.data(), out.data(), 0,
                     patches * patch_size);
  const auto [got, got_mean, got_std] = test::in_both_orders([&] {
    auto out = test::unwritten<T>(patches * patch_width);
    auto mean = test::unwritten<C>(patches), inverse_std = test::unwritten<C>(patches);
    std::vector<cpu::Moments> row_moments(kIds);
    CHECK(!cuda::embed_patches(in, patches, kIds, bias.data(), kEps, row_moments.data(),
                               mean.data(), inverse_std.data(), out.data(), nullptr));
    return std::tuple(out, mean, inverse_std);
  });
  CHECK(test::nearly(got, out));
  CHECK(test::nearly(got_mean, mean));
  CHECK(test::nearly(got_std, inverse_std, 4));

  const auto grad = numbers.vector<T>(patches * patch_width);
  const cpu::EmbedPatchesGrad<T> from = {in, grad.data(), mean.data(), inverse_std.data()};
  std::vector<cpu::PatchTerms> terms(patches);
  std::vector<T> grad_weight(patch_width), grad_bias(patch_width), grad_table(kIds * width);
  const test::GroupedIds groups(ids, kIds);
  cpu::embed_patches_terms(from, terms.data(), 0, patches);
  cpu::embed_patches_affine(from, patches, grad_weight.data(), grad_bias.data(), 0, patch_width);
  cpu::embed_patches_table(from, terms.data(), groups.offsets.data(), groups.order.data(), kIds,
                           grad_table.data(), 0, width);
  const int64_t parts = cuda::embed_patches_parts(patches);
  const auto [got_table, weight_bias] = test::in_both_orders([&] {
    auto grad_table = test::unwritten<T>(kIds * width);
    auto weight_bias = test::unwritten<C>(parts * 2 * patch_width);
    std::vector<cpu::PatchTerms> terms(patches);
    std::vector<C> sums(groups.groups().max_pieces() * width);
    CHECK(!cuda::embed_patches_backward(from, patches, groups.groups(), terms.data(), sums.data(),
                                        grad_table.data(), weight_bias.data(), nullptr));
    return std::tuple(grad_table, weight_bias);
  });
  const auto sums = test::sum_of_parts(weight_bias, 2 * patch_width);
  std::vector<T> got_weight(patch_width), got_bias(patch_width);
  for (int64_t c = 0; c < patch_width; ++c) {
    got_weight[c] = T(sums[c]);
    got_bias[c] = T(sums[patch_width + c]);
  }
  // Terms of table and weight may cancel out.
  CHECK(test::nearly(got_table, grad_table, 50));
  CHECK(test::nearly(got_weight, grad_weight, 20));
  CHECK(test::nearly(got_bias, grad_bias, 20));
}

template <class T>
void all_sizes() {
  for (const int64_t width : {5, 16}) {
    for (const int64_t patch_size : {1, 3, 8}) {
      equals_cpu<T>(2, 4 * patch_size, 4, patch_size, width);
      equals_cpu<T>(3, 2 * patch_size + 1, 5, patch_size, width);  // padded
    }
  }
  equals_cpu<T>(0, 3, 1, 3, 4);
  equals_cpu<T>(2, 0, 0, 3, 4);
  equals_cpu<T>(2, 0, 1, 3, 4);
  equals_cpu<T>(1, 70, 2, 35, 8);   // patches longer than a warp
  equals_cpu<T>(100, 36, 9, 4, 8);  // several pieces of an id, several parts of the patches
}

// An id outside the table reads nothing; its patch alone is not a number.
void ids_outside_give_nan() {
  const std::vector<float> table(4, 1.0f), weight(4, 1.0f);
  for (const int64_t outside : {int64_t(-1), int64_t(2), int64_t(1) << 62}) {
    const std::vector<int64_t> ids = {0, outside, 1, 1};
    const cpu::EmbedPatchesInput<float> in = {
        4, 2, 2, 2, 0, ids.data(), table.data(), weight.data()};
    std::vector<cpu::Moments> moments(2);
    std::vector<float> mean(2), inverse_std(2), out(8);
    CHECK(!cuda::embed_patches(in, 2, 2, weight.data(), kEps, moments.data(), mean.data(),
                               inverse_std.data(), out.data(), nullptr));
    for (int64_t c = 0; c < 4; ++c) CHECK(std::isnan(out[c]) && out[4 + c] == 1);

    std::vector<float> sums(cuda::Groups{3, 2, nullptr, nullptr, nullptr}.max_pieces() * 2);
    const std::vector<int64_t> order = {0, 2, 3}, offsets = {0, 1, 3}, pieces = {0, 1, 2};
    const cuda::Groups groups = {3, 2, order.data(), offsets.data(), pieces.data()};
    const std::vector<float> grad(8, 1.0f);
    std::vector<cpu::PatchTerms> terms(2);
    std::vector<float> grad_table(4), weight_bias(cuda::embed_patches_parts(2) * 8);
    CHECK(!cuda::embed_patches_backward<float>({in, grad.data(), mean.data(), inverse_std.data()},
                                               2, groups, terms.data(), sums.data(),
                                               grad_table.data(), weight_bias.data(), nullptr));
  }
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  ids_outside_give_nan();
  return test::result();
}
