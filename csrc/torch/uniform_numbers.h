// The random numbers of a run.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/uniform.h>

#include <algorithm>
#include <exception>
#include <optional>

#include "stage_state.h"

namespace mblm {

// Uniform random numbers for the rows of a run: those given, or a generator's as torch's uniform_
// draws them for (rows, vocabulary), whenever all rows come to their next byte.
class UniformNumbers {
 public:
  UniformNumbers(const std::optional<at::Tensor>& given,
                 const std::optional<at::Generator>& generator, int64_t rows, int64_t most,
                 int64_t vocabulary, const at::TensorOptions& options)
      : generator_(generator), is_given_(given.has_value()), most_(most), vocabulary_(vocabulary) {
    if (is_given_) {
      numbers_ = check_state("uniform", *given, {rows, most, vocabulary});
    } else {
      numbers_ = at::empty({rows, vocabulary}, options);
    }
  }

  const float* of(int64_t row, int64_t n) {
    if (is_given_) return numbers_.const_data_ptr<float>() + (row * most_ + n) * vocabulary_;
    if (n == drawn_) draw();
    return numbers_.const_data_ptr<float>() + row * vocabulary_;
  }

  // An exception must not leave a team's thread.
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void draw() {
    ++drawn_;
    try {
      numbers_.uniform_(0, 1, generator_);
    } catch (...) {
      failure_ = std::current_exception();
      std::fill_n(numbers_.mutable_data_ptr<float>(), numbers_.numel(), 0.5f);
    }
  }

  const std::optional<at::Generator> generator_;
  const bool is_given_;
  const int64_t most_, vocabulary_;
  at::Tensor numbers_;
  int64_t drawn_ = 0;
  std::exception_ptr failure_;
};

}  // namespace mblm
