// A linear map of a few rows: every weight is read once, for all rows.
#pragma once

#include <cstdint>

#include "cpu/bfloat16.h"
#include "cpu/kernel.h"

namespace mblm::cpu {

template <class T>
struct LinearRowsInput {
  int64_t rows, inputs, outputs;
  const T* x;       // (rows, inputs)
  const T* weight;  // (outputs, inputs)
  const T* bias;    // (outputs), or null
};

// Writes columns [begin, end) of out (rows, outputs). A row is summed in the same order however
// many rows there are.
template <class T>
void linear_rows(const LinearRowsInput<T>& in, T* out, int64_t begin, int64_t end);

}  // namespace mblm::cpu
