// Preloaded by gpu_decode.py, it has CUDA's runtime refuse to record graphs, and launch kernels
// only when those ahead of them have ended. With -DGRAPHS it lets graphs be recorded.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define NAME "libcudart.so." TEXT(CUDA_MAJOR)

extern "C" cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                           void** arguments) {
  using Launch = decltype(cudaLaunchKernelExC);
  static auto* const launch =
      reinterpret_cast<Launch*>(dlsym(dlopen(NAME, RTLD_LAZY), "cudaLaunchKernelExC"));
  cudaLaunchAttribute kept[8];
  cudaLaunchConfig_t changed = *config;
  changed.attrs = kept;
  changed.numAttrs = 0;
  for (unsigned i = 0; i < config->numAttrs && i < 8; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) continue;
    kept[changed.numAttrs++] = config->attrs[i];
  }
  return launch(&changed, kernel, arguments);
}

#ifndef GRAPHS
extern "C" cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return cudaErrorStreamCaptureUnsupported;
}
#endif
