// Tests of the emulated CUDA kernels of assemble_stage against those of the CPU.
#include "cuda_check.h"
#include "cuda_groups.h"
// The emulation comes before the sources.
#include "cuda/assemble_stage.cu"

using namespace mblm;

struct Options {
  bool with_ids, with_positions, with_rotation, with_context;
  int64_t padding;  // how much further apart than they must be vectors lie
};

template <class T>
void equals_cpu(int64_t rows, int64_t length, int64_t width, const Options& options) {
  using C = cpu::compute_t<T>;
  constexpr int64_t kIds = 7, kPaddingId = 2;
  test::Numbers numbers;
  const int64_t stride = width + options.padding, vectors = rows * (1 + length);
  const auto start = numbers.vector<T>(width);
  const auto embeddings = numbers.vector<T>((options.with_ids ? kIds : rows * length) * stride);
  auto ids = numbers.ids(rows * length, kIds);
  const auto positions = numbers.vector<T>(length * width);
  const auto rotation = numbers.vector<C>(length * width);
  const auto context = numbers.vector<T>(rows * length * stride);
  const cpu::AssembleStageInput<T> in = {length,
                                         width,
                                         start.data(),
                                         embeddings.data(),
                                         options.with_ids ? stride : length * stride,
                                         options.with_ids ? 0 : stride,
                                         options.with_ids ? ids.data() : nullptr,
                                         options.with_positions ? positions.data() : nullptr,
                                         options.with_rotation ? rotation.data() : nullptr,
                                         options.with_context ? context.data() : nullptr,
                                         length * stride,
                                         stride};
  std::vector<T> out(vectors * width);
  cpu::assemble_stage(in, out.data(), 0, vectors);
  const auto [got] = test::in_both_orders([&] {
    auto out = test::unwritten<T>(vectors * width);
    CHECK(!cuda::assemble_stage(in, rows, kIds, out.data(), nullptr));
    return std::tuple(out);
  });
  CHECK(test::nearly(got, out));

  const auto grad = numbers.vector<T>(vectors * width);
  const cpu::AssembleStageGrad<T> from = {length, width, grad.data(), in.rotation};
  if (options.with_ids) {
    const test::GroupedIds groups(ids, kIds);
    std::vector<T> table(kIds * width);
    cpu::assemble_stage_table(from, groups.offsets.data(), groups.order.data(), kIds, kPaddingId,
                              table.data(), 0, width);
    const auto [got_table] = test::in_both_orders([&] {
      auto table = test::unwritten<T>(kIds * width);
      std::vector<C> sums(groups.groups().max_pieces() * width);
      CHECK(!cuda::assemble_stage_table(from, groups.groups(), kPaddingId, sums.data(),
                                        table.data(), nullptr));
      return std::tuple(table);
    });
    CHECK(test::nearly(got_table, table, 4));
  } else if (options.with_rotation) {
    std::vector<T> turned(rows * length * width);
    cpu::assemble_stage_unrotate(from, turned.data(), 0, rows * length);
    const auto [got_turned] = test::in_both_orders([&] {
      auto turned = test::unwritten<T>(rows * length * width);
      CHECK(!cuda::assemble_stage_unrotate(from, rows, turned.data(), nullptr));
      return std::tuple(turned);
    });
    CHECK(test::nearly(got_turned, turned));
  }
}

template <class T>
void all_options() {
  for (const bool with_ids : {false, true}) {
    for (const bool with_rotation : {false, true}) {
      for (const bool others : {false, true}) {
        for (const int64_t padding : {0, 3}) {
          const Options options = {with_ids, others, with_rotation, others, padding};
          for (const int64_t width : {2, 14, 48}) equals_cpu<T>(2, 5, width, options);
        }
      }
    }
  }
  for (const int64_t rows : {0, 3}) {
    for (const int64_t length : {0, 1}) {
      equals_cpu<T>(rows, length, 1, {true, true, false, true, 0});
      equals_cpu<T>(rows, length, 16, {false, true, true, true, 0});
    }
  }
  // Ids with several pieces.
  equals_cpu<T>(200, 17, 8, {true, false, true, false, 0});
}

// An id outside the table reads nothing and is seen in the result.
void ids_outside_give_nan() {
  const std::vector<float> start(4, 1.0f), table(8, 1.0f);
  const std::vector<int64_t> ids = {-1, 1, 2, int64_t(1) << 62};
  const cpu::AssembleStageInput<float> in = {4,          4,       start.data(), table.data(), 4, 0,
                                             ids.data(), nullptr, nullptr,      nullptr,      0, 0};
  std::vector<float> out(20);
  CHECK(!cuda::assemble_stage(in, 1, 2, out.data(), nullptr));
  for (int64_t c = 0; c < 4; ++c) {
    CHECK(out[c] == 1 && out[8 + c] == 1);
    CHECK(std::isnan(out[4 + c]) && std::isnan(out[12 + c]) && std::isnan(out[16 + c]));
  }
}

int main() {
  all_options<float>();
  all_options<double>();
  all_options<cpu::BFloat16>();
  ids_outside_give_nan();
  return test::result();
}
