// Rows' states on a GPU, each in a slot, and the units that advance them. The host tells the GPU
// before a unit what is to become of each row, and reads after it what did.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/decode_graph.h"
#include "cuda/units.h"
#include "decode/bytes.h"
#include "decode/parts.h"
#include "decode/torch/weights.h"

namespace mblm::decode {

class DeviceSlots {
 public:
  // Bytes of a unit, at most.
  static constexpr int64_t kBytes = 32;

  explicit DeviceSlots(const c10::Device& device) : device_(device) {}

  int64_t slots() const { return slots_; }
  // That were recorded.
  int64_t graphs() const {
    return std::count_if(repeated_.begin(), repeated_.end(),
                         [](const auto& each) { return each.second.is_graph(); });
  }
  // Whether there are as many slots as are made for so many rows.
  bool are_for(int64_t rows) const { return slots_ == slots_for(rows); }
  // Makes room for so many rows of so many bytes, at least for the context, with weights that the
  // caller keeps alive.
  void reserve(const Hierarchy& hierarchy, int64_t rows, int64_t bytes);
  const Parts& parts() const { return *parts_; }

  // A row's state, as the named tensors of mblm/inference/cache.py's State, on the CPU.
  using Tensors = std::map<std::string, at::Tensor>;
  Tensors save(int64_t slot, int64_t taken) const;
  // bytes: the last ones of `length`.
  void load(int64_t slot, int64_t taken, const Bytes& bytes, int64_t length,
            const Tensors& tensors);
  void copy(int64_t from, int64_t to);

  // What the host writes before a unit and reads after it.
  cuda::Slot& row(int64_t slot) { return reinterpret_cast<cuda::Slot*>(host(0))[slot]; }
  int64_t* ids(int64_t slot) { return at<int64_t>(ids_at_, slot); }
  cuda::Drawn* drawn(int64_t slot) { return at<cuda::Drawn>(drawn_at_, slot); }
  const float* log_probs(int64_t slot) { return at<float>(log_probs_at_, slot); }
  // Room for numbers (kBytes, num_tokens) that the host draws.
  float* uniform(int64_t slot);

  // Rows grow by so many bytes; waits for it.
  void run(bool has_turn, int64_t count);
  // Logits (slots, num_tokens) of rows that have taken in a byte, on the CPU; of one that has none.
  at::Tensor logits();
  at::Tensor empty_logits() const;

 private:
  // Of all slots.
  struct Buffer {
    std::string name;
    int64_t slot_dim, position_dim;  // the latter -1 where there are no positions
    at::Tensor tensor;

    at::Tensor of(int64_t slot) const { return tensor.select(slot_dim, slot); }
    at::Tensor of(int64_t slot, int64_t positions) const {
      const at::Tensor all = position_dim < 0 ? tensor : tensor.narrow(position_dim, 0, positions);
      return all.select(slot_dim, slot);
    }
  };
  struct StageMemory {
    std::vector<Buffer> buffers;  // output, context, then the model's state
    std::vector<Buffer> start;    // the same of the start token alone, with one slot
    at::Tensor workspace, tickets;
  };

  static int64_t slots_for(int64_t rows);
  at::TensorOptions floats() const { return at::TensorOptions().device(device_).dtype(at::kFloat); }
  std::vector<Buffer> buffers_of(int64_t n, int64_t slots, int64_t limit) const;
  std::vector<Buffer> start_of(int64_t n) const;
  cuda::AnyModelInSlots bind(int64_t n, const std::vector<Buffer>& buffers) const;
  // Memory, with what there is already.
  void allocate(const DeviceSlots& from);
  void allocate_exchange();
  void point();
  void point_at(int64_t n);
  unsigned char* host(int64_t at) { return host_.mutable_data_ptr<uint8_t>() + at; }
  template <class T>
  T* at(int64_t begin, int64_t slot) {
    return reinterpret_cast<T*>(host(begin)) + slot * kBytes;
  }

  c10::Device device_;
  int64_t slots_ = 0, limit_ = 0;  // limit: tokens of the most global stage
  std::shared_ptr<const Parts> parts_;
  std::vector<StageMemory> stages_;
  at::Tensor patch_sizes_, last_bytes_, masks_, logits_, keys_;
  at::Tensor device_io_, host_, device_uniform_, uniform_;  // what the host and the GPU exchange
  bool has_uniform_ = false;
  int64_t ids_at_ = 0, drawn_at_ = 0, log_probs_at_ = 0;
  cuda::Units units_;
  cuda::CaptureStream capture_;
  std::map<std::pair<bool, int64_t>, cuda::Repeated> repeated_;
};

}  // namespace mblm::decode
