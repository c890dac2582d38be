// Tests of choosing bytes on a GPU, emulated: filters and noise as on the CPU, automata, numbers.
#include "cuda_check.h"
// The emulation comes before the sources.
#include <limits>

#include "cpu/sampling.h"
#include "cuda/decode_choose.cu"

using namespace mblm;

// What a kernel leaves of rows that choose one byte.
struct Chosen {
  std::vector<cuda::Slot> rows;
  std::vector<int64_t> ids;
  std::vector<float> log_probs;
};

Chosen choose(std::vector<cuda::Slot> rows, const std::vector<float>& given,
              const std::vector<float>& uniform = {}) {
  const auto slots = int64_t(rows.size()), count = int64_t(given.size()) / slots;
  const auto before = rows;
  std::vector<float> log_probs;
  const auto [ids] = test::in_both_orders([&] {
    rows = before;
    auto logits = given;
    std::vector<uint64_t> keys(slots * cuda::keys_of(count));
    std::vector<int64_t> positions(slots, 1);
    const std::vector<cuda::Drawn> drawn(slots, {11, 8});
    std::vector<int64_t> ids(slots, -7);
    log_probs.assign(slots, NAN);
    cuda::Slots in;
    in.count = slots;
    in.num_tokens = count;
    in.bytes = 1;
    in.rows = rows.data();
    in.positions = positions.data();
    in.logits = logits.data();
    in.keys = keys.empty() ? nullptr : keys.data();
    in.drawn = drawn.data();
    in.uniform = uniform.data();
    in.ids = ids.data();
    in.log_probs = log_probs.data();
    CHECK(!cuda::choose(in, {}, false, nullptr));
    return std::tuple(ids);
  });
  return {rows, ids, log_probs};
}

cuda::Slot planned(int64_t left) {
  cuda::Slot row;
  row.taken = 3;
  row.pending = 1;
  row.left = row.planned = left;
  row.way = cuda::Way::kChoose;
  row.has_numbers = true;
  return row;
}

void chooses_as_the_cpu_does() {
  test::Numbers numbers;
  for (const int64_t count : {1, 5, 257, 5000}) {
    const int64_t rows = 6;
    auto logits = numbers.vector<float>(rows * count),
         uniform = numbers.vector<float>(rows * count);
    for (float& value : logits) value = std::round(value * 40) / 8;  // with ties
    for (float& value : uniform) value = (value + 1) / 2;
    uniform[0] = 0;
    for (int64_t i = 0; i < count; ++i) logits[i] = 1;                  // equal
    for (int64_t i = 0; i < count; ++i) logits[count + i] = -INFINITY;  // none
    for (int64_t i = 0; i < count; i += 2) logits[2 * count + i] = -INFINITY;
    for (const float temperature : {0.7f, 1.0f}) {
      for (const auto& [top_k, top_p] : std::vector<std::pair<int64_t, float>>{
               {1, 0}, {3, 0}, {200, 0}, {1 << 20, 0}, {1, 0.1f}, {1, 0.6f}, {1, 1.0f}}) {
        std::vector<cuda::Slot> slots(rows, planned(4));
        for (cuda::Slot& slot : slots) {
          slot.temperature = temperature;
          slot.top_k = top_k;
          slot.top_p = top_p;
        }
        const Chosen got = choose(slots, logits, uniform);
        cpu::Sampling sampling;
        sampling.temperature = temperature;
        sampling.top_k = std::min(top_k, count);
        sampling.top_p = top_p;
        cpu::SampleMemory memory(count);
        for (int64_t row = 0; row < rows; ++row) {
          CHECK(got.rows[row].pending == got.ids[row] && got.rows[row].taken == 4);
          CHECK(got.rows[row].left == 3 && got.rows[row].done == 1);
          CHECK(got.ids[row] == cpu::sample(sampling, logits.data() + row * count, nullptr,
                                            uniform.data() + row * count, count, memory));
        }
      }
    }
  }
  const std::vector<float> broken = {1, NAN, 3, 5, NAN}, even(5, 0.5f);
  CHECK(choose({planned(1)}, broken, even).ids[0] == 1);
  cuda::Slot hot = planned(1);
  hot.top_k = 5;
  CHECK(choose({hot}, broken, even).ids[0] == 1);
}

void min_p_keeps_what_is_likely_enough() {
  cuda::Slot row = planned(1);
  row.top_k = 3;
  const std::vector<float> logits = {2, 1.9f, 0}, uniform = {0.01f, 0.2f, 0.999999f};
  CHECK(choose({row}, logits, uniform).ids[0] == 2);
  row.least = std::log(0.2f);  // the last is 0.14 times as likely as the first
  CHECK(choose({row}, logits, uniform).ids[0] == 1);
  row.least = 0;
  CHECK(choose({row}, logits, uniform).ids[0] == 0);
}

// Tokens 0 and 1 are of one class, 2 and 3 of others: (0|1)* 2, then nothing more.
struct Pattern {
  std::vector<int32_t> classes = {0, 0, 1, 2}, next = {0, 1, -1, -1, -1, -1}, distance = {1, 0};
  cuda::Automaton automaton() const { return {classes.data(), next.data(), distance.data(), 3, 0}; }
};

void automata_allow_and_end() {
  const Pattern pattern;
  const std::vector<float> logits = {1, 2, 3, 9}, even(4, 0.5f);
  cuda::Slot row = planned(4);
  row.allow = pattern.automaton();
  Chosen got = choose({row}, logits, even);
  CHECK(got.ids[0] == 2 && got.rows[0].left == 0);  // accepted, and nothing may follow
  CHECK(got.rows[0].allow.state == 1);
  row.left = row.planned = 1;
  CHECK(choose({row}, {1, 4, -INFINITY, 9}, even).ids[0] == 2);  // the model rules it out
  row.allow.state = 1;                                           // after which nothing may come
  CHECK(choose({row}, logits, even).ids[0] < 4);
  row.allow.state = 0;
  row.left = row.planned = 4;
  got = choose({row}, {1, 4, 3, 9}, even);
  CHECK(got.ids[0] == 1 && got.rows[0].left == 3 && got.rows[0].planned == 3);
  row.left = row.planned = 1;  // acceptance stays within reach
  CHECK(choose({row}, {1, 4, 3, 9}, even).ids[0] == 2);
  row = planned(4);
  row.stop = pattern.automaton();
  got = choose({row, row}, {1, 2, 3, 0, 1, 4, 3, 0}, std::vector<float>(8, 0.5f));
  CHECK(got.ids == (std::vector<int64_t>{2, 1}));
  CHECK(got.rows[0].left == 0 && got.rows[1].left == 3);
}

// What a stop automaton forbids is chosen all the same: it stops nothing from there on.
void an_automaton_has_no_state_after_what_it_forbids() {
  const std::vector<int32_t> tables = {0, 0, 1, 2, 0, 1, -1, 0, 0, 0, 1, 0};  // one after the other
  cuda::Slot row = planned(4);
  row.stop = {tables.data(), tables.data() + 4, tables.data() + 10, 3, 0};
  const std::vector<float> logits = {1, 2, 3, 9}, even(4, 0.5f);
  const Chosen got = choose({row}, logits, even);
  CHECK(got.ids[0] == 3 && got.rows[0].left == 3 && got.rows[0].stop.state == -1);
  row.stop.state = -1;  // whose distance would be the last of the next states
  const Chosen after = choose({row}, {1, 2, 9, 3}, even);
  CHECK(after.ids[0] == 2 && after.rows[0].left == 3 && after.rows[0].stop.state == -1);
}

void log_probabilities_are_of_what_the_model_gave() {
  const Pattern pattern;
  cuda::Slot row = planned(1);
  row.allow = pattern.automaton();
  row.has_log_probs = true;
  const std::vector<float> logits = {1, 2, 3, 9};
  const Chosen got = choose({row}, logits, std::vector<float>(4, 0.5f));
  double sum = 0;
  for (const float logit : logits) sum += std::exp(double(logit));
  CHECK(test::close(got.log_probs[0], 3 - std::log(sum)));
  row.allow = {};
  const float large = 1 << 20;  // whose neighbors are 1/8 apart
  const Chosen of_large = choose({row}, {large, large, 0, 0}, std::vector<float>(4, 0.5f));
  CHECK(test::close(of_large.log_probs[0], -std::log(2.0)));
}

void rows_that_take_no_part_are_left_alone() {
  cuda::Slot none = planned(0), paused = planned(1), fed = planned(2);
  paused.way = cuda::Way::kPause;
  fed.way = cuda::Way::kFeed;
  const Chosen got =
      choose({none, paused, fed}, std::vector<float>(12, 1.f), std::vector<float>(12, 0.5f));
  CHECK(got.rows[0].taken == 3 && got.rows[0].pending == 1 && got.ids[0] == -7);
  CHECK(got.rows[1].taken == 4 && got.rows[1].pending == -1 && got.rows[1].left == 0);
  CHECK(got.rows[2].taken == 4 && got.rows[2].pending == -7);  // of the ids that are there
}

// The answers that come with Philox's reference implementation.
void philox_gives_the_known_numbers() {
  using Words = std::vector<uint32_t>;
  const auto words = [](const cuda::FourWords& counter, uint64_t seed) {
    const cuda::FourWords drawn = cuda::philox(counter, seed);
    return Words(drawn.words, drawn.words + 4);
  };
  constexpr uint32_t kAll = 0xffffffff;
  CHECK(words({{0, 0, 0, 0}}, 0) == (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK(words({{kAll, kAll, kAll, kAll}}, ~uint64_t(0)) ==
        (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK(words({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0x299f31d0a4093822) ==
        (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// A thread draws four at once: the first for its own place, the others for places further on.
void numbers_lie_where_uniform_puts_them() {
  constexpr uint64_t kSeed = 5, kOffset = 12;
  constexpr uint32_t kThreads = 3;
  for (uint32_t index = 0; index < 30; ++index) {
    const uint32_t turn = index / kThreads, thread = index % kThreads;
    const cuda::FourWords drawn =
        cuda::philox({{uint32_t(kOffset / 4) + turn / 4, 0, thread, 0}}, kSeed);
    const double expected = (drawn.words[turn % 4] + 0.5) / 4294967296.0;
    CHECK(test::close(cuda::uniform_number(kSeed, kOffset, kThreads, index), expected));
  }
  // The kernel takes them where the host has drawn none.
  cuda::Slot row = planned(1);
  row.has_numbers = false;
  row.top_k = 50;
  row.threads = 256;
  row.first_number = 50;
  std::vector<float> uniform(50), logits(50, 0.f);
  for (uint32_t i = 0; i < 50; ++i) uniform[i] = cuda::uniform_number(11, 8, 256, 50 + i);
  cuda::Slot given = row;
  given.has_numbers = true;
  CHECK(choose({row}, logits).ids == choose({given}, logits, uniform).ids);
}

int main() {
  chooses_as_the_cpu_does();
  min_p_keeps_what_is_likely_enough();
  automata_allow_and_end();
  an_automaton_has_no_state_after_what_it_forbids();
  log_probabilities_are_of_what_the_model_gave();
  rows_that_take_no_part_are_left_alone();
  philox_gives_the_known_numbers();
  numbers_lie_where_uniform_puts_them();
  return test::result();
}
