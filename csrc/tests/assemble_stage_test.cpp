// Tests of assemble_stage against plain loops in double.
#include "cpu/assemble_stage.h"

#include "check.h"
#include "cpu/ids.h"

using namespace mblm;

struct Terms {
  bool ids, positions, rotation, context;
};

template <class T>
void forward_and_backward(int64_t rows, int64_t length, int64_t width, Terms terms) {
  using C = cpu::compute_t<T>;
  constexpr int64_t kIds = 5, kPadding = 2;
  test::Numbers numbers;
  const auto start = numbers.vector<T>(width);
  const auto embeddings = numbers.vector<T>(terms.ids ? kIds * width : rows * length * width);
  const auto ids = numbers.ids(rows * length, kIds);
  const auto positions = numbers.vector<T>(length * width);
  const auto rotation = numbers.vector<C>(length * width);
  const int64_t context_stride = width + 3;
  const auto context = numbers.vector<T>(rows * length * context_stride);
  const auto grad = numbers.vector<T>(rows * (1 + length) * width);

  std::vector<double> expected(rows * (1 + length) * width), grad_table(kIds * width);
  std::vector<double> grad_embeddings(rows * length * width);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < width; ++c) {
      expected[row * (1 + length) * width + c] = double(start[c]);
    }
    for (int64_t p = 0; p < length; ++p) {
      const int64_t n = row * length + p, at = (row * (1 + length) + 1 + p) * width;
      const T* e = embeddings.data() + (terms.ids ? ids[n] : n) * width;
      for (int64_t c = 0; c < width; ++c) {
        double value = double(e[c]), g = double(grad[at + c]);
        if (terms.rotation) {
          const bool second = c % 2 == 1;
          const int64_t other = second ? c - 1 : c + 1;
          const double cos = double(rotation[p * width + c - c % 2]);
          const double sin = double(rotation[p * width + c - c % 2 + 1]);
          value = value * cos + (second ? 1 : -1) * double(e[other]) * sin;
          g = g * cos - (second ? 1 : -1) * double(grad[at + other]) * sin;
        }
        if (terms.positions) value += double(positions[p * width + c]);
        if (terms.context) value += double(context[n * context_stride + c]);
        expected[at + c] = value;
        grad_embeddings[n * width + c] = g;
        if (ids[n] != kPadding) grad_table[ids[n] * width + c] += g;
      }
    }
  }

  const cpu::AssembleStageInput<T> in = {length,
                                         width,
                                         start.data(),
                                         embeddings.data(),
                                         terms.ids ? width : length * width,
                                         width,
                                         terms.ids ? ids.data() : nullptr,
                                         terms.positions ? positions.data() : nullptr,
                                         terms.rotation ? rotation.data() : nullptr,
                                         terms.context ? context.data() : nullptr,
                                         length * context_stride,
                                         context_stride};
  const int64_t vectors = rows * (1 + length);
  std::vector<T> out(expected.size());
  cpu::assemble_stage(in, out.data(), 0, vectors / 2);
  cpu::assemble_stage(in, out.data(), vectors / 2, vectors);
  CHECK(test::all_close(out, expected));

  const cpu::AssembleStageGrad<T> back = {length, width, grad.data(), in.rotation};
  if (terms.rotation) {
    std::vector<T> got(grad_embeddings.size());
    cpu::assemble_stage_unrotate(back, got.data(), 0, rows * length);
    CHECK(test::all_close(got, grad_embeddings));
  }
  std::vector<int64_t> offsets(kIds + 1), order(ids.size());
  cpu::group_by_id(ids.data(), rows * length, kIds, offsets.data(), order.data());
  std::vector<T> got(kIds * width);
  const int64_t cut = width / 4 * 2;
  cpu::assemble_stage_table(back, offsets.data(), order.data(), kIds, kPadding, got.data(), 0, cut);
  cpu::assemble_stage_table(back, offsets.data(), order.data(), kIds, kPadding, got.data(), cut,
                            width);
  CHECK(test::all_close(got, grad_table));
}

template <class T>
void all_sizes() {
  for (int terms = 0; terms < 16; ++terms) {
    const Terms chosen = {bool(terms & 1), bool(terms & 2), bool(terms & 4), bool(terms & 8)};
    for (const int64_t rows : {0, 1, 3}) {
      for (const int64_t length : {0, 1, 4}) {
        for (const int64_t width : {1, 2, 7, 36, 1030}) {
          if (chosen.rotation && width % 2) continue;
          forward_and_backward<T>(rows, length, width, chosen);
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
