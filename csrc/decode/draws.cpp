// Drawing numbers and keeping them for the lanes that come later: see draws.h.
#include "decode/draws.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>

namespace mblm::decode {

GeneratorDraws::GeneratorDraws(std::optional<at::Generator> generator, int64_t lanes,
                               int64_t num_tokens)
    : generator_(generator ? *generator : at::detail::getDefaultCPUGenerator()),
      num_tokens_(num_tokens),
      lanes_(lanes) {
  if (generator_.device().type() != at::kCPU) {
    throw std::invalid_argument("generator: expected one of the CPU, got one of " +
                                generator_.device().str());
  }
  spare_.reserve(1);
}

void GeneratorDraws::check(int64_t lane) const {
  const LaneState& of = lanes_[lane];
  if (of.is_in_use) {
    throw std::invalid_argument("lane: " + std::to_string(lane) +
                                " of these draws serves another row");
  }
  if (of.next < first_) {
    throw std::invalid_argument("lane: " + std::to_string(lane) +
                                " of these draws has ended after " + std::to_string(of.next) +
                                " bytes, and the others have gone on to " + std::to_string(first_));
  }
}

void GeneratorDraws::check_free(int64_t lane) const {
  const std::lock_guard lock(draws_mutex());
  check(lane);
}

int64_t GeneratorDraws::enter(int64_t lane) {
  const std::lock_guard lock(draws_mutex());
  check(lane);
  lanes_[lane].is_in_use = lanes_[lane].is_waited_for = true;
  return lanes_[lane].next;
}

void GeneratorDraws::leave(int64_t lane, int64_t n) noexcept {
  const std::lock_guard lock(draws_mutex());
  lanes_[lane] = {n, false, false};
  forget();
}

const float* GeneratorDraws::of(int64_t lane, int64_t n) noexcept {
  const std::lock_guard lock(draws_mutex());
  lanes_[lane].next = n;
  forget();
  try {
    while (n >= first_ + int64_t(kept_.size())) draw();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
  return kept_[n - first_].get() + lane * num_tokens_;
}

void GeneratorDraws::draw() {
  const int64_t count = int64_t(lanes_.size()) * num_tokens_;
  std::unique_ptr<float[]> numbers;
  if (spare_.empty()) {
    numbers = std::make_unique_for_overwrite<float[]>(count);
  } else {
    numbers = std::move(spare_.back());
    spare_.pop_back();
  }
  float* const to = numbers.get();
  kept_.push_back(std::move(numbers));
  auto* const generator = generator_.get<at::CPUGeneratorImpl>();
  const std::lock_guard lock(generator->mutex_);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = float(generator->random() & 0xffffff) * (1.f / float(1 << 24));
  }
}

// Lets go of numbers that no lane will ask for.
void GeneratorDraws::forget() noexcept {
  int64_t first = std::numeric_limits<int64_t>::max(), last = 0;
  for (const LaneState& lane : lanes_) {
    if (lane.is_waited_for) first = std::min(first, lane.next);
    last = std::max(last, lane.next);
  }
  first = std::min(first, last);
  for (; first_ < first; ++first_) {
    if (kept_.empty()) continue;
    if (spare_.empty()) spare_.push_back(std::move(kept_.front()));
    kept_.pop_front();
  }
}

}  // namespace mblm::decode
