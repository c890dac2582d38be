// A linear map of a few rows on a GPU: every weight is read once for up to eight rows.
#pragma once

#include "cpu/linear_rows.h"
#include "cuda/stream.h"

namespace mblm::cuda {

// out is (rows, outputs). A row is summed in the same order however many rows there are.
template <class T>
Error linear_rows(const cpu::LinearRowsInput<T>& in, T* out, Stream stream);

}  // namespace mblm::cuda
