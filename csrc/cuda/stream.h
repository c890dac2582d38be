// How the CUDA kernels' callers name a stream and learn of an error, without any CUDA header.
#pragma once

namespace mblm::cuda {

// A cudaStream_t.
using Stream = void*;

// What went wrong with a launch, or null. Launchers return as soon as their kernels are queued.
using Error = const char*;

// Whether kernels that are made for it begin while the ones before them end: a switch, for
// measurements. See launch_dependent in kernel.cuh.
inline bool dependent_launches = true;

}  // namespace mblm::cuda
