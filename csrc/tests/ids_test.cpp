// Tests of ids, bfloat16 and sums of rows.
#include "cpu/ids.h"

#include <limits>

#include "check.h"
#include "cpu/sum_rows.h"

using namespace mblm;
using cpu::BFloat16;

void finds_the_first_id_outside() {
  const std::vector<int64_t> ids = {0, 4, 2, 5, -1};
  CHECK(cpu::first_id_outside(ids.data(), 5, 6) == 4);
  CHECK(cpu::first_id_outside(ids.data(), 5, 5) == 3);
  CHECK(cpu::first_id_outside(ids.data(), 3, 5) == -1);
  CHECK(cpu::first_id_outside(ids.data(), 1, 0) == 0);
  CHECK(cpu::first_id_outside(nullptr, 0, 0) == -1);
}

void groups_positions_by_id() {
  test::Numbers numbers;
  for (const int64_t count : {0, 1, 2, 100}) {
    for (const int64_t num_ids : {1, 2, 7, 300}) {
      const auto ids = numbers.ids(count, num_ids);
      std::vector<int64_t> offsets(num_ids + 1, -1), order(count, -1), expected;
      cpu::group_by_id(ids.data(), count, num_ids, offsets.data(), order.data());
      for (int64_t v = 0; v < num_ids; ++v) {
        CHECK(offsets[v] == int64_t(expected.size()));
        for (int64_t i = 0; i < count; ++i) {
          if (ids[i] == v) expected.push_back(i);
        }
      }
      CHECK(offsets[num_ids] == count);
      CHECK(order == expected);
    }
  }
  int64_t offset = -1;
  cpu::group_by_id(nullptr, 0, 0, &offset, nullptr);
  CHECK(offset == 0);
}

void rounds_bfloat16_to_nearest_even() {
  CHECK(float(BFloat16(1.0f)) == 1.0f);
  CHECK(float(BFloat16(-0.0f)) == 0.0f && std::signbit(float(BFloat16(-0.0f))));
  CHECK(float(BFloat16(1.0f + 0x1p-8f)) == 1.0f);                       // half way, to even
  CHECK(float(BFloat16(1.0f + 0x1p-7f + 0x1p-8f)) == 1.0f + 0x1p-6f);   // half way, to even
  CHECK(float(BFloat16(1.0f + 0x1p-8f + 0x1p-20f)) == 1.0f + 0x1p-7f);  // above half way
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(float(BFloat16(infinity)) == infinity && float(BFloat16(-infinity)) == -infinity);
  CHECK(float(BFloat16(std::numeric_limits<float>::max())) == infinity);
  CHECK(std::isnan(float(BFloat16(std::nanf("")))));
}

template <class T>
void sums_rows() {
  test::Numbers numbers;
  for (const int64_t rows : {0, 1, 3, 50}) {
    for (const int64_t columns : {1, 7, 64, 515, 1200}) {
      const int64_t stride = columns + 3;
      const auto matrix = numbers.vector<T>(rows * stride);
      std::vector<double> expected(columns);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) expected[c] += double(matrix[r * stride + c]);
      }
      std::vector<T> out(columns);
      cpu::sum_rows(matrix.data(), rows, stride, out.data(), 0, columns / 2);
      cpu::sum_rows(matrix.data(), rows, stride, out.data(), columns / 2, columns);
      CHECK(test::all_close(out, expected));
    }
  }
}

int main() {
  finds_the_first_id_outside();
  groups_positions_by_id();
  rounds_bfloat16_to_nearest_even();
  sums_rows<float>();
  sums_rows<double>();
  sums_rows<BFloat16>();
  return test::result();
}
