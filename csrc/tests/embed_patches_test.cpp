// Tests of embed_patches against plain loops in double.
#include "cpu/embed_patches.h"

#include "check.h"
#include "cpu/ids.h"

using namespace mblm;

constexpr int64_t kIds = 6, kPad = 1;
constexpr double kEps = 1e-5;

template <class T>
void forward_and_backward(int64_t batch, int64_t length, int64_t num_patches, int64_t patch_size,
                          int64_t width) {
  using C = cpu::compute_t<T>;
  test::Numbers numbers;
  const int64_t patches = batch * num_patches, patch_width = patch_size * width;
  const auto ids = numbers.ids(batch * length, kIds);
  const auto table = numbers.vector<T>(kIds * width);
  const auto weight = numbers.vector<T>(patch_width), bias = numbers.vector<T>(patch_width);
  const auto grad = numbers.vector<T>(patches * patch_width);

  std::vector<double> out(patches * patch_width), mean(patches), inverse_std(patches);
  std::vector<double> grad_table(kIds * width), grad_weight(patch_width), grad_bias(patch_width);
  for (int64_t i = 0; i < patches; ++i) {
    std::vector<double> flat(patch_width);
    std::vector<int64_t> patch_ids(patch_size);
    for (int64_t r = 0; r < patch_size; ++r) {
      const int64_t l = i % num_patches * patch_size + r;
      patch_ids[r] = l < length ? ids[i / num_patches * length + l] : kPad;
      for (int64_t c = 0; c < width; ++c) {
        flat[r * width + c] = double(table[patch_ids[r] * width + c]);
        mean[i] += flat[r * width + c] / double(patch_width);
      }
    }
    double variance = 0;
    for (const double value : flat) {
      variance += (value - mean[i]) * (value - mean[i]) / double(patch_width);
    }
    inverse_std[i] = 1 / std::sqrt(variance + kEps);
    double mean_term = 0, along = 0;
    for (int64_t j = 0; j < patch_width; ++j) {
      const double normalized = (flat[j] - mean[i]) * inverse_std[i];
      const double g = double(grad[i * patch_width + j]);
      out[i * patch_width + j] = normalized * double(weight[j]) + double(bias[j]);
      grad_weight[j] += g * normalized;
      grad_bias[j] += g;
      mean_term += g * double(weight[j]) / double(patch_width);
      along += g * double(weight[j]) * normalized / double(patch_width);
    }
    for (int64_t j = 0; j < patch_width; ++j) {
      const double normalized = (flat[j] - mean[i]) * inverse_std[i];
      const double scaled = double(grad[i * patch_width + j]) * double(weight[j]);
      const int64_t id = patch_ids[j / width];
      if (id == kPad) continue;
      grad_table[id * width + j % width] +=
          (scaled - mean_term - normalized * along) * inverse_std[i];
    }
  }

  const cpu::EmbedPatchesInput<T> in = {length, num_patches, patch_size,   width,
                                        kPad,   ids.data(),  table.data(), weight.data()};
  std::vector<cpu::Moments> row_moments(kIds);
  cpu::embed_patches_row_moments(in, row_moments.data(), 0, 2);
  cpu::embed_patches_row_moments(in, row_moments.data(), 2, kIds);
  std::vector<C> got_mean(patches), got_std(patches), other_mean(patches), other_std(patches);
  cpu::embed_patches_moments(in, row_moments.data(), kEps, got_mean.data(), got_std.data(), 0,
                             patches);
  cpu::embed_patches_moments<T>(in, nullptr, kEps, other_mean.data(), other_std.data(), 0, patches);
  CHECK(test::all_close(got_mean, mean));
  CHECK(test::all_close(got_std, inverse_std));
  CHECK(got_mean == other_mean && got_std == other_std);

  const int64_t vectors = patches * patch_size;
  std::vector<T> got(out.size());
  cpu::embed_patches(in, got_mean.data(), got_std.data(), bias.data(), got.data(), 0, vectors / 2);
  cpu::embed_patches(in, got_mean.data(), got_std.data(), bias.data(), got.data(), vectors / 2,
                     vectors);
  CHECK(test::all_close(got, out));

  const cpu::EmbedPatchesGrad<T> back = {in, grad.data(), got_mean.data(), got_std.data()};
  std::vector<cpu::PatchTerms> terms(patches);
  cpu::embed_patches_terms(back, terms.data(), 0, patches);
  std::vector<T> got_weight(patch_width), got_bias(patch_width), got_table(kIds * width);
  const int64_t cut = patch_width / 3;
  cpu::embed_patches_affine(back, patches, got_weight.data(), got_bias.data(), 0, cut);
  cpu::embed_patches_affine(back, patches, got_weight.data(), got_bias.data(), cut, patch_width);
  CHECK(test::all_close(got_weight, grad_weight));
  CHECK(test::all_close(got_bias, grad_bias));

  std::vector<int64_t> offsets(kIds + 1), order(ids.size());
  cpu::group_by_id(ids.data(), batch * length, kIds, offsets.data(), order.data());
  cpu::embed_patches_table(back, terms.data(), offsets.data(), order.data(), kIds, got_table.data(),
                           0, width / 2);
  cpu::embed_patches_table(back, terms.data(), offsets.data(), order.data(), kIds, got_table.data(),
                           width / 2, width);
  CHECK(test::all_close(got_table, grad_table));
}

template <class T>
void all_sizes() {
  for (const int64_t batch : {0, 1, 3}) {
    for (const int64_t num_patches : {0, 1, 4}) {
      for (const int64_t patch_size : {1, 3}) {
        for (const int64_t width : {4, 7, 64, 1030}) {
          const int64_t full = num_patches * patch_size;
          for (const int64_t length : {int64_t(0), full / 2, full}) {
            forward_and_backward<T>(batch, length, num_patches, patch_size, width);
          }
        }
      }
    }
  }
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  return test::result();
}
