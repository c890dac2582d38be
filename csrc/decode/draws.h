// Random numbers of plans from a CPU generator of PyTorch's, as its uniform_ draws them: the twin
// of mblm/inference/plan.py's Draws.
#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "decode/rows.h"

namespace mblm::decode {

class GeneratorDraws : public Draws {
 public:
  // Of one or more lanes; without a generator, of the default one.
  GeneratorDraws(std::optional<at::Generator> generator, int64_t lanes, int64_t num_tokens);

  int64_t num_tokens() const { return num_tokens_; }
  int64_t lanes() const { return int64_t(lanes_.size()); }

  // Has a lane serve a row; returns which numbers come first. Throws std::invalid_argument if it
  // serves another, or has missed numbers that are kept no longer.
  int64_t enter(int64_t lane);
  void check_free(int64_t lane) const;

  const float* of(int64_t lane, int64_t n) noexcept override;
  void leave(int64_t lane, int64_t n) noexcept override;

 private:
  struct LaneState {
    int64_t next = 0;  // which numbers come next
    bool is_in_use = false;
    bool is_waited_for = true;  // numbers are kept for it
  };

  void check(int64_t lane) const;
  void draw();
  void forget() noexcept;

  const at::Generator generator_;
  const int64_t num_tokens_;
  std::vector<LaneState> lanes_;
  int64_t first_ = 0;                            // which numbers are kept first
  std::deque<std::unique_ptr<float[]>> kept_;    // (lanes, num_tokens) each
  std::vector<std::unique_ptr<float[]>> spare_;  // one at most
};

}  // namespace mblm::decode
