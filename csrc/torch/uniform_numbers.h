// The random numbers of a run.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/uniform.h>
#include <c10/core/InferenceMode.h>

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
      : generator_(generator),
        is_given_(given.has_value()),
        is_exact_(is_exact && !is_given_),
        rows_(rows),
        most_(most),
        vocabulary_(vocabulary) {
    if (is_given_) {
      numbers_ = check_state("uniform", *given, {rows, most, vocabulary});
    } else {
      numbers_ = make::empty({is_exact ? kAhead : 1, rows, vocabulary}, options);
    }
  }

  // Whether they may be drawn ahead: those of a byte that is never sampled are left to the
  // generator.
  bool is_exact() const { return is_exact_; }

  // Of a row's n-th byte; if not exact, drawn now.
  const float* of(int64_t row, int64_t n) {
    const float* const numbers = numbers_.const_data_ptr<float>();
    if (is_given_) return numbers + (row * most_ + n) * vocabulary_;
    if (!is_exact_ && n == drawn_) draw(1);
    return numbers + (n % numbers_.size(0) * rows_ + row) * vocabulary_;
  }

  // Sees to it that there are those of one more byte than at the last call, with so many bytes'
  // numbers at once if there are not. Another thread may read those from before.
  void draw_ahead(int64_t at_once) {
    if (asked_ == most_) return;
    if (++asked_ > drawn_) draw(std::min({at_once, most_ - drawn_, kAhead - drawn_ % kAhead}));
  }

  // An exception must not leave a team's thread.
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  static constexpr int64_t kAhead = 32;

  void draw(int64_t count) {
    const c10::InferenceMode guard;  // a team's thread has no mode of its own
    at::Tensor next = numbers_.narrow(0, drawn_ % numbers_.size(0), count);
    drawn_ += count;
    try {
      next.uniform_(0, 1, generator_);
    } catch (...) {
      failure_ = std::current_exception();
      std::fill_n(next.mutable_data_ptr<float>(), next.numel(), 0.5f);
    }
  }

  const std::optional<at::Generator> generator_;
  const bool is_given_, is_exact_;
  const int64_t rows_, most_, vocabulary_;
  at::Tensor numbers_;  // (rows, most, vocabulary) as given, or (bytes ahead, rows, vocabulary)
  int64_t asked_ = 0, drawn_ = 0;  // in bytes
  std::exception_ptr failure_;
};

}  // namespace mblm
