// How the CUDA kernels' callers name a stream and learn of an error, without any CUDA header.
#pragma once

namespace mblm::cuda {

// A cudaStream_t.
using Stream = void*;

// What went wrong with a launch, or null. Launchers return as soon as their kernels are queued.
using Error = const char*;

}  // namespace mblm::cuda
