// Tests of the emulated CUDA kernels of short_attention against those of the CPU.
#include "cuda_check.h"
// The emulation comes before the sources.
#include "cuda/short_attention.cu"

using namespace mblm;

template <class T>
void equals_cpu(int64_t rows, int64_t queries, int64_t keys, int64_t heads, int64_t width,
                bool rotary, bool heads_first = false) {
  test::Numbers numbers;
  const int64_t items = rows * heads;
  const auto view = [&](const std::vector<T>& values, int64_t positions) {
    if (heads_first) {
      return cpu::HeadsView<T>{values.data(), heads * positions * width, width, positions * width};
    }
    return cpu::HeadsView<T>{values.data(), positions * heads * width, heads * width, width};
  };
  const auto q = numbers.vector<T>(items * queries * width);
  const auto k = numbers.vector<T>(items * keys * width);
  const auto v = numbers.vector<T>(items * keys * width);
  const auto grad = numbers.vector<T>(items * queries * width);
  const auto cos = numbers.vector<float>(keys * (width / 2));
  const auto sin = numbers.vector<float>(keys * (width / 2));
  const cpu::ShortAttentionInput<T> in = {heads,
                                          width,
                                          queries,
                                          keys,
                                          view(q, queries),
                                          view(k, keys),
                                          view(v, keys),
                                          rotary ? cos.data() : nullptr,
                                          rotary ? sin.data() : nullptr};
  std::vector<T> out(q.size()), grad_q(q.size()), grad_k(k.size()), grad_v(v.size());
  cpu::short_attention(in, out.data(), 0, items);
  cpu::short_attention_backward(in, view(grad, queries), grad_q.data(), grad_k.data(),
                                grad_v.data(), 0, items);
  const auto [got, got_q, got_k, got_v] = test::in_both_orders([&] {
    auto out = test::unwritten<T>(q.size()), grad_q = out;
    auto grad_k = test::unwritten<T>(k.size()), grad_v = grad_k;
    CHECK(!cuda::short_attention(in, items, out.data(), nullptr));
    CHECK(!cuda::short_attention_backward(in, items, view(grad, queries), grad_q.data(),
                                          grad_k.data(), grad_v.data(), nullptr));
    return std::tuple(out, grad_q, grad_k, grad_v);
  });
  CHECK(test::nearly(got, out));
  CHECK(test::nearly(got_q, grad_q, 4));
  CHECK(test::nearly(got_k, grad_k, 4));
  CHECK(test::nearly(got_v, grad_v, 4));
}

template <class T>
void all_sizes() {
  for (const bool rotary : {false, true}) {
    for (const int64_t width : {2, 10, 64, 136}) {
      equals_cpu<T>(2, 9, 9, 2, width, rotary);
      equals_cpu<T>(1, 1, 7, 3, width, rotary, true);
      equals_cpu<T>(1, 8, 17, 1, width, rotary);
    }
    equals_cpu<T>(1, 64, 64, 1, 24, rotary);
  }
  for (const int64_t width : {1, 5, 67}) equals_cpu<T>(2, 3, 5, 2, width, false);
  equals_cpu<T>(0, 3, 3, 2, 4, false);
  equals_cpu<T>(2, 0, 0, 2, 4, false);
  equals_cpu<T>(2, 0, 3, 2, 4, false);  // no queries: gradients of zero
  equals_cpu<T>(2, 3, 3, 0, 4, false);
}

int main() {
  all_sizes<float>();
  all_sizes<double>();
  all_sizes<cpu::BFloat16>();
  return test::result();
}
