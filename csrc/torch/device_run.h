// A run on a GPU, bound to the tensors of one decoding state, as Python holds it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <string>
#include <vector>

#include "cuda/run.h"
#include "hierarchy.h"

namespace mblm {

// Its units queue kernels on the current stream and wait for nothing; see cuda/run.h for them and
// mblm/inference/device_units.py for their order.
struct DeviceRun : torch::CustomClassHolder {
  c10::intrusive_ptr<Hierarchy> hierarchy;
  std::vector<at::Tensor> tensors;  // kept alive
  cuda::Run run;

  void embed_byte() const;
  void step_and_sample(int64_t slot) const;
  void sample(int64_t slot) const;
  void take_patch(int64_t stage) const;
  void begin_anew(int64_t stage) const;

  int64_t slots = 0;

 private:
  int64_t check_slot(int64_t slot) const;
  template <class Unit>
  void queue(Unit unit) const;
};

// tensors: flags (2) int32, whether the run has ended, now and as latched; settings (3):
// temperature, top_p, top_k; ends (V) bool; next (B) and history (B, R_1) int64, where the next
// byte comes to lie and the last bytes; pending (B) int64; uniform (slots, B, V); ids (slots, B)
// int64. Then per stage: positions (B) int64, output and start output (B, D_n), context (B, P_n,
// D_n) or empty, fixed positions and rotation or empty, and its state as for Hierarchy.run,
// counts[n] tensors. limits: tokens that each stage has room for.
c10::intrusive_ptr<DeviceRun> device_run(const c10::intrusive_ptr<Hierarchy>& hierarchy,
                                         const std::vector<at::Tensor>& tensors,
                                         const std::vector<int64_t>& counts,
                                         const std::vector<int64_t>& limits);

// Where tensors are that run so: "cuda", "cpu" where that is emulated, or nothing.
std::string device_kind();

// Whether kernels begin before those ahead of them end, where the GPU can: a switch to measure by.
void set_dependent_launches(bool value);

}  // namespace mblm
