// Drawing numbers and keeping them for the lanes that come later: see draws.h.
#include "decode/torch/draws.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cpu/kernel.h"
#include "cuda/decode_slots.h"
#include "cuda/philox.h"
#include "torch/common.h"

namespace mblm::decode {
namespace {

// Numbers of a generator's next bits, which are those of its state mixed.
MBLM_CLONES void mix_bits(const uint32_t* state, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = state[i];
    bits ^= bits >> 11;
    bits ^= (bits << 7) & 0x9d2c5680;
    bits ^= (bits << 15) & 0xefc60000;
    bits ^= bits >> 18;
    to[i] = float(int32_t(bits & 0xffffff)) * (1.f / float(1 << 24));
  }
}

// As uniform_ draws: up to the end of the generator's state at a time, then one that renews it.
void draw_uniform(at::mt19937& engine, float* to, int64_t count) {
  while (count > 0) {
    at::mt19937_data_pod state = engine.data();
    // Also of a state that was made by hand.
    const int64_t ready = std::clamp<int64_t>(
        std::min<int64_t>(state.left_ - 1, int64_t(state.state_.size()) - state.next_), 0, count);
    mix_bits(state.state_.data() + state.next_, ready, to);
    state.left_ -= int(ready);
    state.next_ += uint32_t(ready);
    engine.set_data(state);
    to += ready;
    count -= ready;
    if (count == 0) return;
    *to++ = float(engine() & 0xffffff) * (1.f / float(1 << 24));
    --count;
  }
}

}  // namespace

GeneratorDraws::GeneratorDraws(std::optional<at::Generator> generator, int64_t lanes,
                               int64_t num_tokens, const c10::Device& device)
    : generator_(generator ? *generator : at::globalContext().defaultGenerator(device)),
      num_tokens_(num_tokens) {
  TORCH_CHECK_VALUE(generator_.device().type() == device.type(), "generator: expected one of ",
                    device, ", got one of ", generator_.device());
  TORCH_CHECK_VALUE(lanes > 0 && num_tokens > 0, "lanes and num_tokens must be positive, got ",
                    lanes, " and ", num_tokens);
  lanes_.resize(lanes);
  if constexpr (kCuda) {
    if (!device.is_cuda()) return;
    const c10::DeviceGuard guard(device);
    TORCH_CHECK_VALUE(lanes <= std::numeric_limits<uint32_t>::max() / num_tokens,
                      "lanes: numbers for ", lanes, " of them are too many to draw at once");
    const cuda::Drawing drawing = cuda::drawing_of(lanes * num_tokens);
    TORCH_CHECK(!drawing.error, "a GPU does not tell how it draws: ", drawing.error);
    threads_ = uint32_t(drawing.threads);
    drawn_at_once_ = uint64_t(drawing.offset);
  }
}

Lane GeneratorDraws::enter(std::shared_ptr<GeneratorDraws> draws, int64_t lane) {
  const std::lock_guard lock(draws_mutex());
  LaneState& of = draws->lanes_[lane];
  const std::string name = "lane: " + std::to_string(lane) + " of these draws ";
  if (of.is_in_use) throw std::invalid_argument(name + "serves another row");
  if (of.next < draws->first_) {
    throw std::invalid_argument(name + "has ended after " + std::to_string(of.next) +
                                " bytes, and the others have gone on to " +
                                std::to_string(draws->first_));
  }
  of.is_in_use = true;
  return Lane(std::move(draws), lane, of.next);
}

void GeneratorDraws::leave(int64_t lane, int64_t n) noexcept {
  const std::lock_guard lock(draws_mutex());
  lanes_[lane] = {n, false, false};
  forget();
}

void GeneratorDraws::put_back(int64_t lane) noexcept {
  const std::lock_guard lock(draws_mutex());
  lanes_[lane].is_in_use = false;
}

const float* GeneratorDraws::of(int64_t lane, int64_t n) noexcept {
  pass_on(lane, n);
  const std::lock_guard lock(draws_mutex());
  try {
    draw_to(n);
    Kept& kept = kept_[n - first_];
    if (!kept.values) fill(kept);
    return kept.values.get() + lane * num_tokens_;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

Numbers GeneratorDraws::ahead(int64_t lane, int64_t n) {
  const std::lock_guard lock(draws_mutex());
  draw_to(n);
  const Kept& kept = kept_[n - first_];
  const int64_t first = lane * num_tokens_;
  if (drawn_at_once_ == 0) return {.values = kept.values.get() + first};
  return {.seed = kept.seed, .offset = kept.offset, .threads = threads_, .first = uint32_t(first)};
}

void GeneratorDraws::pass_on(int64_t lane, int64_t n) noexcept {
  const std::lock_guard lock(draws_mutex());
  lanes_[lane].next = n;
  forget();
}

void GeneratorDraws::draw_to(int64_t n) {
  while (n >= first_ + int64_t(kept_.size())) {
    Kept kept;
    if (drawn_at_once_ == 0) {
      kept.values = spare_ ? std::move(spare_)
                           : std::make_unique_for_overwrite<float[]>(lanes() * num_tokens_);
    }
    kept_.push_back(std::move(kept));
    draw(kept_.back());
  }
}

void GeneratorDraws::draw(Kept& kept) {
  if (drawn_at_once_ > 0) {
    c10::GeneratorImpl* const generator = generator_.unsafeGetGeneratorImpl();
    const std::lock_guard lock(generator->mutex_);
    kept.seed = generator->current_seed();
    kept.offset = generator->get_offset();
    generator->set_offset(kept.offset + drawn_at_once_);
    return;
  }
  auto* const generator = generator_.get<at::CPUGeneratorImpl>();
  const std::lock_guard lock(generator->mutex_);
  at::mt19937 engine = generator->engine();
  draw_uniform(engine, kept.values.get(), lanes() * num_tokens_);
  generator->set_engine(engine);
}

// The numbers that a GPU would draw.
void GeneratorDraws::fill(Kept& kept) {
  const int64_t count = lanes() * num_tokens_;
  kept.values = std::make_unique_for_overwrite<float[]>(count);
  for (int64_t i = 0; i < count; ++i) {
    kept.values[i] = cuda::uniform_number(kept.seed, kept.offset, threads_, uint32_t(i));
  }
}

void GeneratorDraws::give_back() noexcept {
  const std::lock_guard lock(draws_mutex());
  int64_t end = first_;
  for (const LaneState& lane : lanes_) end = std::max(end, lane.next);
  c10::GeneratorImpl* const generator = generator_.unsafeGetGeneratorImpl();
  const std::lock_guard lock_of_generator(generator->mutex_);
  while (drawn_at_once_ > 0 && first_ + int64_t(kept_.size()) > end) {
    const Kept& last = kept_.back();
    const bool is_latest = generator->current_seed() == last.seed &&
                           generator->get_offset() == last.offset + drawn_at_once_;
    if (!is_latest) return;
    generator->set_offset(last.offset);
    kept_.pop_back();
  }
}

// Lets go of numbers that no lane will ask for.
void GeneratorDraws::forget() noexcept {
  int64_t first = std::numeric_limits<int64_t>::max(), last = 0;
  for (const LaneState& lane : lanes_) {
    if (lane.is_in_use || lane.is_waited_for) first = std::min(first, lane.next);
    last = std::max(last, lane.next);
  }
  first = std::min(first, last);
  for (; first_ < first; ++first_) {
    if (kept_.empty()) continue;
    if (!spare_) spare_ = std::move(kept_.front().values);
    kept_.pop_front();
  }
}

}  // namespace mblm::decode
