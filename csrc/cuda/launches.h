// Queues kernels one after the other, up to the first that cannot be launched.
#pragma once

#include "cuda/stream.h"

namespace mblm::cuda {

class Launches {
 public:
  explicit Launches(Stream stream) : stream_(stream) {}

  // Calls launcher(parameters..., stream).
  template <class Launcher, class... Parameters>
  void add(Launcher launcher, const Parameters&... parameters) {
    if (!error_) error_ = launcher(parameters..., stream_);
  }

  Error error() const { return error_; }

 private:
  Stream stream_;
  Error error_ = nullptr;
};

}  // namespace mblm::cuda
