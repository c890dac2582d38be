// Random numbers of plans from a CPU generator of PyTorch's, as its uniform_ draws them: the twin
// of mblm/inference/plan.py's Draws.
#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "decode/rows.h"

namespace mblm::decode {

class GeneratorDraws : public Draws {
 public:
  // Of one or more lanes; without a generator, of the device's default one.
  GeneratorDraws(std::optional<at::Generator> generator, int64_t lanes, int64_t num_tokens,
                 const c10::Device& device = at::kCPU);

  int64_t num_tokens() const { return num_tokens_; }
  int64_t lanes() const { return int64_t(lanes_.size()); }

  // Has a lane serve a row. Throws std::invalid_argument if it serves another one, or has missed
  // numbers that are kept no longer.
  static Lane enter(std::shared_ptr<GeneratorDraws> draws, int64_t lane);

  const float* of(int64_t lane, int64_t n) noexcept override;
  Numbers ahead(int64_t lane, int64_t n) override;
  void pass_on(int64_t lane, int64_t n) noexcept override;
  void leave(int64_t lane, int64_t n) noexcept override;
  void put_back(int64_t lane) noexcept override;
  void give_back() noexcept override;
  bool can_give_back() const override { return drawn_at_once_ > 0; }
  const void* generator() const override { return generator_.unsafeGetGeneratorImpl(); }

 private:
  // The numbers of a byte, (lanes, num_tokens). Of a GPU's generator only where they are asked for.
  struct Kept {
    std::unique_ptr<float[]> values;
    uint64_t seed = 0, offset = 0;
  };
  struct LaneState {
    int64_t next = 0;  // which numbers come next
    bool is_in_use = false;
    bool is_waited_for = true;  // numbers are kept for it, too
  };

  void draw_to(int64_t n);
  void draw(Kept& kept);
  void fill(Kept& kept);
  void forget() noexcept;

  const at::Generator generator_;
  const int64_t num_tokens_;
  std::vector<LaneState> lanes_;
  int64_t first_ = 0;  // which numbers are kept first
  std::deque<Kept> kept_;
  std::unique_ptr<float[]> spare_;  // of numbers that are forgotten
  // Of a GPU's generator: by how much its offset grows with a byte, and with how many threads.
  uint64_t drawn_at_once_ = 0;
  uint32_t threads_ = 1;
};

}  // namespace mblm::decode
