// Registers the operators' kernels with PyTorch, and compiles their glue: together, since torch's
// headers cost more than all of it.
#include <torch/library.h>

#include "assemble_stage.h"
#include "causal_conv.h"
#include "embed_patches.h"
#include "linear.h"
#include "rms_norms.h"
#include "selective_scan.h"
#include "short_attention.h"
#include "ssd.h"

namespace mblm {

std::string device_kind() {
#ifdef MBLM_CUDA_EMULATED
  return "cpu";
#else
  return kCuda ? "cuda" : "";
#endif
}

}  // namespace mblm

namespace {

void add_kernels(torch::Library& library) {
  library.impl("assemble_stage", mblm::assemble_stage);
  library.impl("assemble_stage_backward", mblm::assemble_stage_backward);
  library.impl("causal_conv", mblm::causal_conv);
  library.impl("causal_conv_backward", mblm::causal_conv_backward);
  library.impl("embed_patches", mblm::embed_patches);
  library.impl("embed_patches_backward", mblm::embed_patches_backward);
  library.impl("gated_rms_norm", mblm::gated_rms_norm);
  library.impl("gated_rms_norm_backward", mblm::gated_rms_norm_backward);
  library.impl("selective_scan", mblm::selective_scan);
  library.impl("selective_scan_backward", mblm::selective_scan_backward);
  library.impl("shift_rms_norm", mblm::shift_rms_norm);
  library.impl("shift_rms_norm_backward", mblm::shift_rms_norm_backward);
  library.impl("short_attention", mblm::short_attention);
  library.impl("short_attention_backward", mblm::short_attention_backward);
  library.impl("ssd", mblm::ssd);
  library.impl("ssd_backward", mblm::ssd_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(mblm, CPU, library) {
  add_kernels(library);
  library.impl("linear", mblm::linear);
}

#ifdef MBLM_CUDA
TORCH_LIBRARY_IMPL(mblm, CUDA, library) {
  add_kernels(library);
}
#endif

TORCH_LIBRARY_FRAGMENT(mblm, library) {
  library.def("onednn_is_faster() -> bool", &mblm::onednn_is_faster);
  library.def("device_kind() -> str", &mblm::device_kind);
}
