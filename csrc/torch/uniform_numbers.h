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
  // Of `most` bytes at most; exactly so many, if none ends the run.
  UniformNumbers(const std::optional<at::Tensor>& given,
                 const std::optional<at::Generator>& generator, int64_t rows, int64_t most,
                 bool is_exact, int64_t vocabulary, const at::TensorOptions& options)
      : generator_(generator), is_given_(given.has_value()), most_(most), vocabulary_(vocabulary) {
    if (is_given_) {
      numbers_ = check_state("uniform", *given, {rows, most, vocabulary});
      return;
    }
    // To ask torch for the numbers of several bytes costs as much as for those of one, and draws
    // the same. But those of a byte that is never sampled must be left to the generator.
    constexpr int64_t kAtOnce = 32;
    at_once_ = is_exact ? kAtOnce : 1;
    numbers_ = at::empty({at_once_, rows, vocabulary}, options);
  }

  const float* of(int64_t row, int64_t n) {
    if (is_given_) return numbers_.const_data_ptr<float>() + (row * most_ + n) * vocabulary_;
    if (n == drawn_) draw();
    const int64_t rows = numbers_.size(1);
    return numbers_.const_data_ptr<float>() + (n % at_once_ * rows + row) * vocabulary_;
  }

  // An exception must not leave a team's thread.
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void draw() {
    const int64_t count = std::min(at_once_, most_ - drawn_);
    drawn_ += count;
    try {
      numbers_.narrow(0, 0, count).uniform_(0, 1, generator_);
    } catch (...) {
      failure_ = std::current_exception();
      std::fill_n(numbers_.mutable_data_ptr<float>(), numbers_.numel(), 0.5f);
    }
  }

  const std::optional<at::Generator> generator_;
  const bool is_given_;
  const int64_t most_, vocabulary_;
  at::Tensor numbers_;
  int64_t at_once_ = 0, drawn_ = 0;  // in bytes
  std::exception_ptr failure_;
};

}  // namespace mblm
